"""Direct Preference Optimization, start to end. The file to read first.

    inputs -> reference log-probs -> for each step: forward, loss, backward, step -> metrics -> checkpoints

`python3 apply_dpo.py` does the whole job in one process: it fills the reference store where pairs are missing, then
trains. On several ranks the two halves are launch/precompute_ref.py and launch/train_dpo.py. An optimizer step goes on
in run/step.py. Algorithm: Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from simple_llama.cluster import stopping, watchdog
from simple_llama.cluster.console import progress
from simple_llama.cluster.distributed import Ranks
from simple_llama.cluster.start_phases import PHASES
from simple_llama.common.logging import LOGGER
from simple_llama.reinforcement_learning.rlhf.command import run_command
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.precompute import precompute
from simple_llama.reinforcement_learning.rlhf.report.run_report import chat_command, texts_of, write_report
from simple_llama.reinforcement_learning.rlhf.run.run_folder import name_run, own_folders
from simple_llama.reinforcement_learning.rlhf.run.step import optimizer_step
from simple_llama.reinforcement_learning.rlhf.run.training_run import TrainingRun


def train(config: DPOConfig, inputs: Inputs, ranks: Ranks) -> Path:
    """Trains the policy (collective); returns the last exported `.pth`.

    Raises UserError for what a person can put right, NotFinite for a loss or gradient that is no number any more, and
    Stopped on request, after a save.
    """
    stopping.begin()
    started = time.perf_counter()
    name = name_run(config, ranks)
    with own_folders(config, name, ranks) as check_lock:
        with watchdog.patience("setting up the run"):
            run = TrainingRun(config, inputs, ranks, name, check_lock)
        try:
            run_steps(run)
            run.writer.end()
        except stopping.Stopped:
            run.save_stopped()
            raise
        except Exception as error:
            run.saves.let_end(error)
            raise
        finally:
            run.profile.close()
            run.writer.close()
        finish(run, time.perf_counter() - started)
    return run.saves.newest_path


def run_steps(run: TrainingRun) -> None:
    """From the start, or from where the saved run was, to the end."""
    if run.at.unfinished:
        finish_step(run, run.at.done)
    LOGGER.info("start to the first step: %s", PHASES.told())
    left = run.due.left(run.at.done)
    for index in progress(left, total=len(left), desc="train", ranks=run.ranks):
        step, rate = index + 1, run.rate(index)
        run.profile.begin(step)
        with run.naming_pairs(index):
            parts, sums = run.portions(index), run.interval.sums
            first = run.first_step(index)
            norm = optimizer_step(run.engine, parts, run.reference.logps, rate, sums, run.ranks.device, first)
        run.made(step, norm)
        with run.interval.off_the_clock():
            run.profile.end(step)
        if run.due.logs_at(step):
            run.log(step, rate)
        finish_step(run, step)
        if run.best.ends:
            break
    run.saves.end()


def finish_step(run: TrainingRun, step: int) -> None:
    """What is due after `step` steps: the checks of the start, an evaluation, a checkpoint."""
    if step == 0:
        run.check_start()
    elif run.due.evaluates_at(step):
        with run.interval.off_the_clock():
            run.evaluate(step)
    run.at.unfinished = False
    if run.due.saves_at(step):
        with run.interval.off_the_clock():
            run.save()


def finish(run: TrainingRun, seconds: float) -> None:
    """The report and the mark of success (collective), and what to do with the result as the job's last words."""
    run.saves.save_merged(run.at, run.due.measures_at(run.at.done))
    weights, report, metrics = run.saves.newest_path, None, {}
    with watchdog.patience("writing the report"):
        if run.ranks.is_main:
            texts = texts_of(run.inputs.chat, run.held_out)
            report, metrics = write_report(run.log_folder, weights, seconds, texts)
        run.finish(report, metrics, seconds)
    talk = chat_command(asdict(run.config), str(weights))
    LOGGER.info("report: %s; to talk to the result: %s", report or "none was made, see above", talk)


def precompute_and_train(config: DPOConfig, inputs: Inputs, ranks: Ranks) -> Path:
    """The whole job (collective): the reference pass for pairs that the store lacks, then training."""
    if config.reference == "store" and PreferenceLoss.of(config).needs_reference:
        precompute(config, inputs, ranks)
        PHASES.ended("reference pass")
    return train(config, inputs, ranks)


if __name__ == "__main__":
    run_command(precompute_and_train, __doc__)
