"""Runs a launch script that kills itself (kill -9) at one exact place: tests/soak.py starts it.

    python tests/crash_at.py --crash_script=launch/train_dpo.py --crash_place=latest --crash_when=half --crash_call=1

The process dies before, in the half of, or after the `call`-th call of the place's function that it makes; `beside`:
that call waits, in the thread that writes a save, until the main thread has begun two more micro-batches.
"""

from __future__ import annotations

import fnmatch
import importlib
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

BESIDE_S = 10.0  # for micro-batches beside a save: where the next save or the end waits for it, there come none
RLHF = "simple_llama.reinforcement_learning.rlhf"
Half = Callable[..., None]  # does half of what the function with these arguments would do


@dataclass(frozen=True)
class Spot:
    """A function, and which of its calls count."""

    module: str
    name: str  # of the function in the module, or of the method: Class.method
    counts: Callable[..., bool] = lambda *args, **kwargs: True
    half: Half | None = None


def half_of_file(which: int) -> Half:
    """Half of a file whose path, or itself open, is argument number `which`; its content is the one before or after."""

    def write(original: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        path = args[which]
        if isinstance(path, BufferedWriter):
            path.flush()
            path = path.name
        os.truncate(path, os.path.getsize(path) // 2)

    return write


def half_of_folder(original: Callable[..., object], folder: Path, *args: object, **kwargs: object) -> None:
    """One file less."""
    sorted(Path(folder).iterdir())[0].unlink()


def half_of_line(path: Callable[..., Path]) -> Half:
    """Half of what the call appends to a file."""

    def write(original: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        file = path(*args)
        before = file.stat().st_size if file.exists() else 0
        original(*args, **kwargs)
        os.truncate(file, (before + file.stat().st_size) // 2)

    return write


def becomes(pattern: str) -> Callable[..., bool]:
    """Calls of os.replace(source, target) or Path.rename(self, target) that give a file such a name."""
    return lambda source, target, *rest, **kwargs: fnmatch.fnmatch(Path(target).name, pattern)


def temp_of(pattern: str) -> Callable[..., bool]:
    """Calls of Path.write_bytes(self, data) that fill the temp file of such a name."""
    return lambda path, *rest, **kwargs: fnmatch.fnmatch(Path(path).name, f".{pattern}.*.tmp")


def is_old_state(folder: Path, *args: object, **kwargs: object) -> bool:
    """Calls of delete_state that delete a state, not what is left of one."""
    return folder.name.startswith("step_") and folder.exists()


def replaced(pattern: str) -> dict[str, Spot]:
    """When a small file is written: half of its bytes, and before and after it gets its name."""
    rename = Spot("os", "replace", becomes(pattern))
    return {
        "half": Spot("pathlib", "Path.write_bytes", temp_of(pattern), half_of_file(0)),
        "before": rename,
        "after": rename,
    }


def beside(places: dict[str, Spot], at: str = "before") -> dict[str, Spot]:
    """The same places, and a death while training goes on beside what is `at` one of them."""
    return {**places, "beside": places[at]}


def around(module: str, name: str, half: Half | None = None) -> dict[str, Spot]:
    """Before and after a function of the trainer, and in the half of it where that can be told."""
    spot = Spot(f"{RLHF}.{module}", name, half=half)
    return {"before": spot, "after": spot} | ({"half": spot} if half else {})


# By place, then by moment. Each place is hit in every soak of 20 kills, at one of its moments.
PLACES: dict[str, dict[str, Spot]] = {
    # the reference pass
    "shard": {"before": Spot(f"{RLHF}.reference.ref_store", "RefStore._write")} | replaced("*.npy"),
    "reference": replaced("reference.json"),
    # a training run's start
    "records": replaced("config.json"),
    "resume": around("engine.checkpoint", "load_state"),
    # a step
    "backward": around("engine.engine", "Engine.backward"),
    "step": around("engine.engine", "Engine.step"),
    "evaluate": around("run.training_run", "evaluate"),
    "metrics": around("run.records", "RunWriter.scalars", half_of_line(lambda writer, *rest: writer.path)),
    "samples": around("run.sampling", "append_samples", half_of_line(lambda folder, *rest: folder / "samples.jsonl")),
    # a save
    "gather": around("engine.state_copy", "StateCopy.take"),
    "state_shard": beside(around("engine.checkpoint", "write_digested", half_of_file(0))),
    "weights": beside(
        {
            "before": Spot(f"{RLHF}.run.saves", "Saves._export"),  # their state is there
            "half": Spot("torch", "save", half=half_of_file(1)),
            "after": Spot("os", "replace", becomes("dpo_*.pth")),
        }
    ),
    "state_json": beside(replaced("state.json")),
    "state_rename": beside({when: Spot("pathlib", "Path.rename", becomes("step_*")) for when in ("before", "after")}),
    "latest": beside(replaced("latest")),
    "prune": beside(
        around("engine.checkpoint", "prune")
        | {"half": Spot(f"{RLHF}.engine.state_folders", "delete_state", is_old_state, half_of_folder)}
    ),
    # everything is done
    "end": {"before": Spot(f"{RLHF}.run.records", "RunWriter.close")},
}


def main() -> None:
    """Arms the place, then runs the script as if it had been started itself."""
    ours = dict(arg[8:].split("=", 1) for arg in sys.argv if arg.startswith("--crash_"))
    sys.argv = [ours["script"], *(arg for arg in sys.argv[1:] if not arg.startswith("--crash_"))]
    arm(PLACES[ours["place"]][ours["when"]], ours["when"], int(ours["call"]))
    runpy.run_path(ours["script"], run_name="__main__")


def arm(spot: Spot, when: str, call: int) -> None:
    """Puts a function that kills this process in the place of the spot's."""
    owner: Any = importlib.import_module(spot.module)
    *classes, name = spot.name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0
    micro_batches = counted_micro_batches() if when == "beside" else list[int]()

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        counts = spot.counts(*args, **kwargs)
        calls += counts
        if not counts or calls < call:
            return original(*args, **kwargs)
        if when == "half":
            assert spot.half is not None
            spot.half(original, *args, **kwargs)
        elif when == "after":
            original(*args, **kwargs)
        elif when == "beside" and threading.current_thread() is not threading.main_thread():
            begun, deadline = len(micro_batches), time.monotonic() + BESIDE_S
            while len(micro_batches) < begun + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, deadly)


def counted_micro_batches() -> list[int]:
    """As long as the number of micro-batches that this process has begun, from now on."""
    engine: Any = importlib.import_module(f"{RLHF}.engine.engine").Engine
    backward, begun = engine.backward, list[int]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        begun.append(len(begun))
        return backward(*args, **kwargs)

    engine.backward = counted
    return begun


if __name__ == "__main__":
    main()
