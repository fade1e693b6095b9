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


def test_docs_list_every_python_file(files: list[Path]) -> None:
    """The tree in docs/code.md has a line for each Python file outside tests/, and for no other."""
    tree = re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / "code.md").read_text(), re.DOTALL | re.MULTILINE)[-1]
    shipped = {path.relative_to(ROOT) for path in files if path.suffix == ".py" and path.name != "__init__.py"}
    assert listed_files(tree) == sorted(str(path) for path in shipped if path.parts[0] != "tests")


def test_listed_files() -> None:
    """Indentation says in which folder a file of a tree lies."""
    assert listed_files("a/   folder\n  b/\n    c.py  file\n  d.py\ne/\n  f.py  file\n") == [
        "a/b/c.py",
        "a/d.py",
        "e/f.py",
    ]


def listed_files(tree: str) -> list[str]:
    """Paths of the files in a tree whose folders end with "/", two spaces a level; sorted."""
    found, folders = [], []
    for line in tree.splitlines():
        name = line.split()[0]
        folders[(len(line) - len(line.lstrip())) // 2 :] = [name]
        if not name.endswith("/"):
            found.append("".join(folders))
    return sorted(found)


def test_readme_is_short() -> None:
    """A first page: at most 1,400 words, as wc counts them."""
    assert len((ROOT / "README.md").read_text().split()) <= 1400


def test_pages_name_what_exists(files: list[Path]) -> None:
    """What the project's pages link to and name is there: files, Python modules, `make` targets."""
    here = [str(path.relative_to(ROOT)) for path in files]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong = []
    for page in (path for path in files if path.suffix == ".md" and path.name != "RESULTS.md"):
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT)
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
        wrong += [f"{name}: {link}" for link in links if link and not (page.parent / link).exists()]
        named = re.findall(
            r"(?<![\w/])(?:launch|benchmarks|tests|docs|simple_llama)/[a-z0-9_/]+\.(?:py|sh|json)\b", text
        )
        named += re.findall(r"`([a-z0-9_/]+\.py)`", text)  # from any folder on
        named += [f"{module.replace('.', '/')}.py" for module in re.findall(r"python3? -m ([a-z_.]+\.\w+)", text)]
        wrong += [f"{name}: {file}" for file in named if not any(f"/{path}".endswith(f"/{file}") for path in here)]
        wrong += [f"{name}: make {word}" for word in re.findall(r"`make ([a-z-]+)", text) if word not in targets]
    assert wrong == []


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
