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


# What a run's start needs of DeepSpeed's ZeRO asks for all of its optimizers, one of which has torch's compiler.
START = """
import sys
import torch
import simple_llama.reinforcement_learning.rlhf.apply_dpo
print(*sorted(name for name in sys.argv[1:] if name in sys.modules))
from simple_llama.reinforcement_learning.rlhf.engine.engine import import_deepspeed
import_deepspeed(torch.device("cpu"))
from deepspeed.runtime import compiler
import deepspeed.runtime.zero.muon.muon_optimizer
assert compiler.compile() is torch.compile
compilers = {"torch._inductor.compile_fx", "torch._dynamo.repro.after_dynamo"}
print(*sorted(compilers & sys.modules.keys()))
"""
OF_OTHERS = ("torch._dynamo", "sympy", "triton", "transformers", "pyarrow", "jinja2", "gguf", "pandas", "deepspeed")


def test_a_run_imports_what_it_needs() -> None:
    """No compiler, no table reader, no template engine, no DeepSpeed before the engine is made; then no compiler."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", START, *OF_OTHERS]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "\n\n", done.stdout


def test_no_tensor_without_values_imports_the_compiler() -> None:
    """An empty model is built and filled with nothing, as a run's start does it."""
    code = """
import sys
import torch
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.weights import LoadedModel, build_model
config = TrainingConfig(n_embd=32, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=64, batch_size=1)
found = LoadedModel({}, Architecture.of(config, 50), "nowhere")
class All(set):
    def __contains__(self, name): return True
model = build_model(found, torch.bfloat16, "cpu", unread=All())
assert not any(weight.any() for weight in model.parameters())
print(*sorted(name for name in ("sympy", "torch._dynamo") if name in sys.modules))
"""
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout == "\n", done.stdout
