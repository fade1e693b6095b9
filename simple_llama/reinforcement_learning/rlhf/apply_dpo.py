"""Direct Preference Optimization, start to end. The file to read first.

    inputs -> reference log-probs -> for each step: forward, loss, backward, step -> metrics -> checkpoints

`python3 apply_dpo.py` does the whole job in one process: it fills the reference store where pairs are missing, then
trains. On several ranks the two halves are launch/precompute_ref.py and launch/train_dpo.py.
Algorithm: Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290.
"""

from __future__ import annotations

from pathlib import Path

from simple_llama.common.distributed import Ranks
from simple_llama.common.logging import LOGGER, progress
from simple_llama.reinforcement_learning.rlhf.command import run_command
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.precompute import precompute
from simple_llama.reinforcement_learning.rlhf.training_run import Run


def train(config: DPOConfig, inputs: Inputs, ranks: Ranks) -> Path:
    """Trains the policy (collective); returns the last exported `.pth`.

    Raises UserError for what a person can put right, TrainingStopped for a loss or gradient that is not finite.
    """
    run = Run(config, inputs, ranks)
    try:
        return run_steps(run)
    finally:
        run.writer.close()


def run_steps(run: Run) -> Path:
    """From step 0 or the saved step to the end; returns the last exported `.pth`."""
    config, ranks = run.config, run.ranks
    first = run.restore() if config.resume else run.check_start()
    for index in progress(range(first, run.total_steps), total=run.total_steps - first, desc="train", ranks=ranks):
        step, rate = index + 1, run.rate(index)
        run.accumulate(index)
        run.update(step, rate)
        ends_epoch = step % run.plan.steps_per_epoch == 0
        saves = ends_epoch or due(step, config.save_interval)
        if saves or due(step, config.log_interval):
            run.log(step, rate)
        if ends_epoch or due(step, config.eval_interval):
            run.evaluate(step)
        if saves:
            run.save(step)
    LOGGER.info("finished: %s", run.last_path)
    return run.last_path


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) happens after `step` steps."""
    return interval > 0 and step % interval == 0


def precompute_and_train(config: DPOConfig, inputs: Inputs, ranks: Ranks) -> Path:
    """The whole job (collective): the reference pass for pairs that the store lacks, then training."""
    if config.reference == "store":
        precompute(config, inputs, ranks)
    return train(config, inputs, ranks)


if __name__ == "__main__":
    run_command(precompute_and_train, __doc__)
