"""Rules about the project's own files."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import LossConfig

ROOT = Path(__file__).resolve().parents[2]
CODE = {".py", ".sh", ".toml", ".txt", ".json", ".yml", ".yaml", ".cfg", ""}  # "": Makefile, hostfile, LICENSE, .ci/run
DATA = {"bpe_8k.json", "curated_safety.json"}  # text of people, in any alphabet
# Folders that are one person's or one machine's. Fixed system folders such as /etc or /proc are not meant.
MACHINE_PATH = re.compile(r"(?<![\w.~/$}>-])/(home|root|Users|work|workspace|mnt|opt|data|scratch)/\w")

TENSORBOARD = re.compile(r"tensorboard\b.*--(logdir|bind_all|host|port)")


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Files that are in git or will be: all but the ignored ones."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a git checkout, to know which files are the project's")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_no_machine_paths(files: list[Path]) -> None:
    """No file names a folder of the machine that it was written on."""
    assert MACHINE_PATH.search("open('/" + "home/me/model.pth')")
    assert not MACHINE_PATH.search("simple_llama/data/x, https://example.org/data/x, ~/work/x, ${HOME}/data/x")
    found = []
    for path in files:
        if path.name not in DATA and path.suffix in CODE | {".md"}:
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [f"{path.relative_to(ROOT)}:{i}" for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert found == []


def test_code_is_ascii(files: list[Path]) -> None:
    """Code has no characters that look like others."""
    found = [path.relative_to(ROOT) for path in files if path.suffix in CODE and path.name not in DATA]
    assert [str(path) for path in found if not (ROOT / path).read_bytes().isascii()] == []


def test_readme_lists_every_python_file(files: list[Path]) -> None:
    """The tree in README.md has a line for each Python file outside tests/."""
    blocks = re.findall(r"^```.*?^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    listed = set(re.findall(r"[\w.]+\.py\b", "\n".join(blocks)))
    shipped = {path for path in files if path.suffix == ".py" and path.relative_to(ROOT).parts[0] != "tests"}
    assert sorted(path.name for path in shipped if path.name != "__init__.py" and path.name not in listed) == []


def test_launch_scripts_are_short(files: list[Path]) -> None:
    """A launch script parses settings and calls one function: at most 60 lines."""
    scripts = [path for path in files if path.parent == ROOT / "launch" and path.suffix == ".py"]
    assert {"precompute_ref.py", "train_dpo.py", "prepare_data.py"} <= {path.name for path in scripts}
    assert [path.name for path in scripts if len(path.read_text().splitlines()) > 60] == []


def test_every_setting_is_read(files: list[Path]) -> None:
    """Each field of DPOConfig is read as `config.FIELD` somewhere outside dpo_config.py.

    Those of LossConfig are the losses' own parameters; test_preference_loss.py holds them against the signatures.
    """
    read = {field.name for field in dataclasses.fields(LossConfig)}
    for path in files:
        if path.suffix == ".py" and path.name != "dpo_config.py" and path.relative_to(ROOT).parts[0] != "tests":
            read |= config_reads(path.read_text())
    assert sorted({field.name for field in dataclasses.fields(DPOConfig)} - read) == []


def test_config_reads() -> None:
    """Only reads of a config count: a write, a keyword or another object's attribute does not."""
    source = "f(config.a, run.config.b, self.config.c)\nother.d\nconfig.e = 1\nf(g=1)"
    assert config_reads(source) == {"a", "b", "c"}


def config_reads(source: str) -> set[str]:
    """Names X read as `config.X` or `something.config.X` in Python source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
            if owner == "config":
                found.add(node.attr)
    return found


def test_deepspeed_settings_repeat_no_setting() -> None:
    """A number lives in DPOConfig or in the DeepSpeed JSON: no file of ds_configs has a batch size, rate or clip."""
    ours = {"optimizer", "scheduler", "gradient_clipping", "gradient_accumulation_steps", "train_batch_size"}
    ours |= {"train_micro_batch_size_per_gpu"}
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        assert ours & json.loads(path.read_text()).keys() == set(), path.name


def test_tensorboard_is_never_open_to_the_network(files: list[Path]) -> None:
    """Each command that starts TensorBoard, in text, code and log lines, binds it to this machine."""
    commands = []
    for path in files:
        if path.suffix in CODE | {".md"} and path.name not in DATA and path != Path(__file__).resolve():
            commands += [line for line in path.read_text(encoding="utf-8").splitlines() if TENSORBOARD.search(line)]
    assert len(commands) >= 3  # README, Makefile, the log of a run
    assert [line for line in commands if "--host localhost" not in line or "--bind_all" in line] == []


def test_every_package_folder_has_a_docstring_only_init() -> None:
    """Each folder with modules is a package, and importing the package itself does nothing."""
    for folder in {path.parent for path in (ROOT / "simple_llama").rglob("*.py")}:
        body = ast.parse((folder / "__init__.py").read_text()).body
        assert len(body) == 1, folder
        assert isinstance(body[0], ast.Expr), folder
        assert isinstance(body[0].value, ast.Constant), folder
