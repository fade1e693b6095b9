"""What is due after which optimizer step of a run: lines of metrics, evaluations, checkpoints, the end."""

from __future__ import annotations

from typing import Protocol

from simple_llama.reinforcement_learning.rlhf.run.best import Best


class _DueConfig(Protocol):
    """What decides it."""

    @property
    def log_interval(self) -> int: ...
    @property
    def eval_interval(self) -> int: ...
    @property
    def save_interval(self) -> int: ...
    @property
    def early_stop(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    def total_steps(self, steps_per_epoch: int) -> int: ...


class Agenda:
    """The same on all ranks. Steps count from 1; 0 is the start."""

    def __init__(self, config: _DueConfig, steps_per_epoch: int, held_out: int, best: Best):
        """Args: held_out: pairs. best: may end the run."""
        self.config, self.steps_per_epoch, self.held_out, self.best = config, steps_per_epoch, held_out, best
        self.total_steps = config.total_steps(steps_per_epoch)

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` steps are whole epochs, or the whole run, which may end within one."""
        return step > 0 and (step % self.steps_per_epoch == 0 or step == self.total_steps or self.best.ends)

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due after `step` steps."""
        return self.ends_epoch(step) or _due(step, self.config.eval_interval)

    def measures_at(self, step: int) -> bool:
        """Whether a loss is measured after `step` steps, at which a checkpoint is due: held out, or the interval's."""
        return self.evaluates_at(step) or not self.held_out

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        if step == 0:
            return False
        return self.ends_epoch(step) or _due(step, self.config.save_interval) or self.best.is_at(step)

    def logs_at(self, step: int) -> bool:
        """Whether an interval of metrics ends with `step`: where a state may be saved, a resumed run begins one."""
        may_be_best = self.config.early_stop > 0 and self.evaluates_at(step)
        return self.saves_at(step) or may_be_best or _due(step, self.config.log_interval)

    def judges_at(self, step: int) -> bool:
        """Whether the evaluation after `step` steps is one that may be the best."""
        return step > 0 and (self.config.early_stop > 0 or self.saves_at(step))

    def left(self, done: int) -> range:
        """Indices (from 0) of the steps that are to make after `done`."""
        return range(self.total_steps if self.best.ends else done, self.total_steps)

    def why_ended(self, done: int) -> str:
        """What ended the run after `done` steps, in words."""
        if self.best.ends:
            return f"early_stop: no better evaluation in {self.config.early_stop} than {self.best}"
        return "max_steps" if done < self.config.epochs * self.steps_per_epoch else "all epochs are done"


def _due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) happens after `step` steps."""
    return interval > 0 and step % interval == 0
