"""A trace of a few optimizer steps, for TensorBoard, chrome://tracing or ui.perfetto.dev; each rank writes its own.

<log_dir>/<run>/profile/steps_{first}-{last}_rank_{rank}.pt.trace.json.gz
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch.profiler import ProfilerActivity
from typing_extensions import Doc

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.common.logging import LOGGER
from simple_llama.common.settings import WHOLE, Settings
from simple_llama.reinforcement_learning.rlhf.run.records import writes

_MOST_STEPS = 10  # a trace has some hundred bytes an operation


@dataclass(frozen=True)
class ProfileConfig(Settings):
    """Which steps are traced."""

    profile_steps: Annotated[
        tuple[int, int],
        Doc("first and last optimizer step that are traced (at most 10) into <log_dir>/<run_name>/profile; 0 0: none"),
    ] = (0, 0)

    def check_rules(self) -> None:
        """UserError unless the steps are (0, 0), or a first and a last one that are not too many."""
        first, last = self.profile_steps
        if (first, last) != (0, 0) and not 1 <= first <= last <= min(first + _MOST_STEPS - 1, WHOLE):
            raise UserError(
                f"profile_steps: expected 0 0, or a first step from 1 and a last one from it, at most {_MOST_STEPS} "
                f"steps, found {shown(first)} {shown(last)}"
            )


class StepProfile:
    """Operations of the CPU and, where there is one, of the GPU in steps `profile_steps`, without shapes and stacks.

    A step stands in the trace as `ProfilerStep#<number>`. Profiled steps are slower, in the perf/ curves too.
    """

    def __init__(self, config: ProfileConfig, folder: Path, ranks: Ranks, done: int, total_steps: int):
        """Steps up to `done` were made before. UserError where steps are asked for that the run does not have."""
        self.first, self.last = config.profile_steps
        if self.last > total_steps:
            raise UserError(
                f"profile_steps: expected steps from 1 to {total_steps}, which the run has, "
                f"found {self.first} {self.last}"
            )
        if self.first <= done and self.last:
            LOGGER.warning(
                "profile_steps %d %d: the run goes on after step %d; earlier ones are not traced",
                self.first,
                self.last,
                done,
            )
            self.first = done + 1  # past the last one: nothing is left
        self.folder, self.rank = folder / "profile", ranks.rank
        self.on_cuda = ranks.device.type == "cuda"
        self.trace: torch.profiler.profile | None = None
        self.step: torch.profiler.record_function | None = None

    def begin(self, step: int) -> None:
        """Before optimizer step `step` (from 1)."""
        if not self.first <= step <= self.last:
            return
        if self.trace is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])]
            self.trace = torch.profiler.profile(activities=activities)
            self.trace.start()
        self.step = torch.profiler.record_function(f"ProfilerStep#{step}")
        self.step.__enter__()

    def end(self, step: int) -> None:
        """After optimizer step `step`; writes the file after the last one."""
        if self.step is not None:
            self.step.__exit__(None, None, None)
            self.step = None
        if self.trace is not None and step == self.last:
            trace, self.trace = self.trace, None  # a trace that cannot be written is not ended a second time
            with watchdog.patience("writing the profile"):
                self.write(trace)

    def write(self, trace: torch.profiler.profile) -> None:
        """Stops and writes. UserError where the disk does not take it."""
        path = self.folder / f"steps_{self.first}-{self.last}_rank_{self.rank:05d}.pt.trace.json.gz"
        trace.stop()
        with writes(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(path))
        LOGGER.info("profile of steps %d to %d: %s, one file a rank", self.first, self.last, path)

    def close(self) -> None:
        """Ends a trace that a stop or an error cut short; it is not written."""
        if self.step is not None:
            self.step.__exit__(None, None, None)
        if self.trace is not None:
            self.trace.stop()
        self.step = self.trace = None
