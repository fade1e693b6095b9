"""An installed package: a wheel in a folder of its own, used from another working folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from simple_llama.common.paths import is_checkout, package_path, root_path

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "ds_configs", "simple_llama")
OUTPUTS = {"model_path", "ckpt_dir", "ref_cache_dir", "log_dir"}
SHIPPED = {"tokenize_path", "rlhf_dataset_path", "deepspeed_config"}

SHOW = """
import json
from simple_llama.common.paths import is_checkout
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.run.run_folder import environment
print(json.dumps({**vars(DPOConfig()), "checkout": is_checkout(), "revision": environment()["git"]}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder with the unpacked wheel, and a working folder that is another project's git checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source, site, work = folder / "source", folder / "site", folder / "work"
    source.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "sft_checkpoints", "rlhf_checkpoints")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    work.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    if shutil.which("git") is not None:
        subprocess.run([*git, "init", "--quiet"], cwd=work, check=True)
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "theirs"], cwd=work, check=True)
    return site, work


def run_python(installed: tuple[Path, Path], code: str) -> str:
    """What code prints that sees the installed package alone, run in the working folder."""
    site, work = installed
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_default_paths_of_an_installed_package(installed: tuple[Path, Path]) -> None:
    """What a run writes lies below the working folder; what the package ships is found inside it, whole.

    The working folder's git revision is another project's, so none is written down.
    """
    site, work = installed
    found = json.loads(run_python(installed, SHOW))
    assert (found["checkout"], found["revision"]) == (False, None)
    for name in OUTPUTS:
        assert Path(found[name]).is_relative_to(work), name
    for name in SHIPPED:
        assert Path(found[name]).is_relative_to(site) and Path(found[name]).exists(), name
    for name in ("dataset/bpe_8k.json", "ds_configs/zero2_bf16.json", "ds_configs/zero3_bf16.json"):
        assert (site / "simple_llama" / name).read_bytes() == Path(package_path(*name.split("/"))).read_bytes()


def test_paths_of_a_checkout() -> None:
    """Here both are the checkout's: the DeepSpeed files lie in its top-level folder, as they always did."""
    assert is_checkout()
    assert root_path("runs") == str(ROOT / "runs")
    assert package_path("ds_configs", "zero2_bf16.json") == str(ROOT / "ds_configs" / "zero2_bf16.json")
    assert package_path("dataset", "bpe_8k.json") == str(ROOT / "simple_llama" / "dataset" / "bpe_8k.json")


@pytest.mark.parametrize("script", ["train_dpo", "precompute_ref", "prepare_data", "supervise", "export", "store"])
def test_a_python_without_the_package_is_told_what_to_do(script: str) -> None:
    """One line and status 2; -I leaves out PYTHONPATH, -S all that is installed."""
    done = subprocess.run([sys.executable, "-IS", f"launch/{script}.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: No module named '\w+' in \S+; `make demo` and .*, or pip install \.\n", done.stderr)
