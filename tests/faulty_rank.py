"""Runs a launch script with one fault put into it: `python tests/faulty_rank.py --fault=hang --script=launch/...`."""

from __future__ import annotations

import errno
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simple_llama.reinforcement_learning.rlhf.engine import checkpoint
from simple_llama.reinforcement_learning.rlhf.engine.engine import Engine
from simple_llama.reinforcement_learning.rlhf.reference.audit import Auditor
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import ShardWriter


def main() -> None:
    """Takes the two options off the command line, patches, and runs the script."""
    options = dict(arg[2:].split("=", 1) for arg in sys.argv if arg.startswith(("--fault=", "--script=")))
    sys.argv = [options["script"], *(arg for arg in sys.argv[1:] if not arg.startswith(("--fault=", "--script=")))]
    faults = {"hang": hang_in_step_3, "bug": raise_in_step_3, "slow": slow_pass, "unaudited": no_audit}
    faults |= {"full": full_disk_for_the_second_state, "slow_disk": slow_disk}
    faults[options["fault"]]()
    runpy.run_path(options["script"], run_name="__main__")


def hang_in_step_3() -> None:
    """The main thread never comes back, as on a dead disk; the other threads live."""
    before_step_3(lambda: time.sleep(3600))


def raise_in_step_3() -> None:
    """An error that nobody foresaw."""

    def fail() -> None:
        raise RuntimeError("a bug in step 3")

    before_step_3(fail)


def before_step_3(act: Callable[[], object]) -> None:
    """Calls `act` when the third optimizer step begins."""
    step, calls = Engine.step, []

    def faulty(self: Engine, rate: float) -> float:
        calls.append(rate)
        if len(calls) == 3:
            act()
        return step(self, rate)

    Engine.step = faulty


def slow_pass() -> None:
    """The reference pass takes 0.3 s longer for each micro-batch."""
    add = ShardWriter.add

    def slowly(self: ShardWriter, keys: Any, logps_B2: Any) -> None:
        add(self, keys, logps_B2)
        time.sleep(0.3)

    ShardWriter.add = slowly


def full_disk_for_the_second_state() -> None:
    """Its shard finds no room, half a second after the copy was taken."""
    write, calls = checkpoint.write_digested, []

    def faulty(path: Path, chunks: Any) -> str:
        calls.append(path)
        if len(calls) == 2:
            time.sleep(0.5)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, chunks)

    checkpoint.write_digested = faulty


def slow_disk() -> None:
    """A shard takes two seconds longer."""
    write = checkpoint.write_digested

    def slowly(path: Path, chunks: Any) -> str:
        time.sleep(2)
        return write(path, chunks)

    checkpoint.write_digested = slowly


def no_audit() -> None:
    """The pairs that the audit draws happen to be right."""
    Auditor.audit = lambda *args, **kwargs: None


if __name__ == "__main__":
    main()
