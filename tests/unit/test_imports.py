"""Importing a module of the project does nothing but define it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Runs in a process of its own: here, other tests have imported most modules. Prints the modules that it imported.
IMPORT_ALL = """
import contextlib, importlib, importlib.util, io, logging, os, random, signal, sys
import numpy, torch, torch.distributed

def state():
    return {
        "torch random state": torch.get_rng_state().tolist(),
        "numpy random state": repr(numpy.random.get_state()),
        "python random state": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradient mode": torch.is_grad_enabled(),
        "working folder": os.getcwd(),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "root log handlers": list(logging.getLogger().handlers),
    }

before, printed = state(), io.StringIO()
names = sys.argv[1:]
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    for name in names:
        if name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(os.path.basename(name)[:-3], name)
            sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[spec.name])
        else:
            importlib.import_module(name)
changed = [what for what, value in state().items() if value != before[what]]
assert not changed, f"importing changed: {changed}"
assert not printed.getvalue(), f"importing printed: {printed.getvalue()}"
assert not torch.cuda.is_initialized(), "importing started CUDA"
assert not torch.distributed.is_initialized(), "importing made a process group"
print("\\n".join(names))
"""


def module_names() -> list[str]:
    """Dotted names of all modules of the package, from its files."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "simple_llama").rglob("*.py")]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    if importlib.util.find_spec("triton") is None:
        names.remove("simple_llama.ops.logprob_triton")
    return sorted(names)


def imported(names: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Imports `names` in a new process whose home, temp and working folders are `folder`."""
    folders = {name: str(folder) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TRITON_HOME")}
    # DeepSpeed logs which device it found unless it is told.
    settings = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-W", "error", "-c", IMPORT_ALL, *names]
    environment = {**os.environ, **folders, **settings}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_importing_does_nothing(tmp_path: Path) -> None:
    """All modules and scripts: no output, no warning, no change of a random state or setting, no file, no group."""
    scripts = [str(path) for folder in ("launch", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
    names = module_names() + scripts
    done = imported(names, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines() == names
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("print('hello')", "importing printed: hello"),
        (
            "import torch; torch.manual_seed(1); torch.set_num_threads(1)",
            "importing changed: ['torch random state', 'threads']",
        ),
        ("import warnings; warnings.warn('old', DeprecationWarning)", "DeprecationWarning: old"),
    ],
)
def test_what_the_check_finds(tmp_path: Path, line: str, message: str) -> None:
    """A module that does something at import is found: the check itself can fail."""
    (tmp_path / "bad.py").write_text(line)
    done = imported([str(tmp_path / "bad.py")], tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
