"""Rules about the size of functions and files, and about who uses a name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("simple_llama", "launch", "benchmarks", "docs")
MOST_IN_A_FUNCTION = 60  # lines
MOST_IN_A_FILE = 450
DATA_TABLES: set[str] = set()  # files that are tables of data
PAGES = ("docs/code.md", "README.md")  # a name in backticks there is meant to be found by people
ENTRIES = {
    # the file to read first
    "simple_llama.reinforcement_learning.rlhf.apply_dpo": {"run_steps", "finish_step", "finish"},
    # exit statuses
    "simple_llama.reinforcement_learning.rlhf.command": {"BUG", "MISTAKE", "INTERRUPTED"},
    "simple_llama.cluster.watchdog": {"LOST"},
    # making a tokenizer, and asking a model token by token, for programs that use the package
    "simple_llama.dataset.train_bpe": {"BPEConfig", "train_bpe", "tokenizer_json"},
    "simple_llama.inference.generate": {"generate"},
    "simple_llama.inference.guards": {"REFUSALS", "refuses"},
}


def sources(*folders: str) -> dict[Path, ast.Module]:
    """Every Python file below the folders, parsed."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path: ast.parse(path.read_text()) for path in paths}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods, inner ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_no_function_and_no_file_is_long() -> None:
    """At most 60 lines a function and 450 a file; tests are left out."""
    long = []
    for path, tree in sources(*CODE).items():
        name = str(path.relative_to(ROOT))
        if len(path.read_text().splitlines()) > MOST_IN_A_FILE and name not in DATA_TABLES:
            long.append(name)
        for node in functions(tree):
            if (node.end_lineno or node.lineno) - node.lineno + 1 > MOST_IN_A_FUNCTION:
                long.append(f"{name}: {node.name}")
    assert not long, "\n".join(long)


def test_a_name_that_no_other_module_uses_is_underscored() -> None:
    """Each public function, class and constant of simple_llama has a user in another module; tests do not count."""
    documented = {name for page in PAGES for name in re.findall(r"`[\w.]*?(\w+)`", (ROOT / page).read_text())}
    trees = {module_name(path): tree for path, tree in sources(*CODE).items()}
    used = {module: uses(tree, set(trees)) for module, tree in trees.items()}
    lonely = []
    for module, tree in trees.items():
        if module.startswith("simple_llama"):
            others = set().union(*(names for user, names in used.items() if user != module))
            mine = public_names(tree) - interface(tree) - documented - ENTRIES.get(module, set())
            lonely += [f"{module}.{name}" for name in sorted(mine) if (module, name) not in others]
    assert not lonely, "\n".join(lonely)


def module_name(path: Path) -> str:
    """`simple_llama.common.files` of its path."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def public_names(tree: ast.Module) -> set[str]:
    """What a module defines at its top without an underscore."""
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def interface(tree: ast.Module) -> set[str]:
    """Names that are met from outside without being imported: types and defaults in what is public, entries of public
    tables and type aliases, and what `python -m` calls."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            for hint in _hints(node):
                found |= names_in(hint)
        elif isinstance(node, ast.Assign):
            targets = {name for target in node.targets for name in names_in(target)}
            alias_or_table = isinstance(node.value, (ast.Dict, ast.BinOp, ast.Subscript))
            if alias_or_table and not any(name.startswith("_") for name in targets):
                found |= names_in(node.value)
        elif isinstance(node, ast.If) and "__name__" in names_in(node.test):
            found |= {name for part in node.body for name in names_in(part)}
    return found


def names_in(node: ast.AST) -> set[str]:
    """Every plain name in a piece of code."""
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def _hints(node: ast.AST) -> Iterator[ast.expr]:
    """Annotations, defaults and bases of a function or class, those of private methods left out."""
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef) and not (part.name.startswith("_") and part.name != "__init__"):
            yield from (
                found.annotation for found in ast.walk(part.args) if isinstance(found, ast.arg) and found.annotation
            )
            yield from (default for default in (part.returns, *part.args.defaults, *part.args.kw_defaults) if default)
        elif isinstance(part, ast.AnnAssign):
            yield part.annotation
        elif isinstance(part, ast.ClassDef):
            yield from part.bases


def uses(tree: ast.Module, modules: set[str]) -> set[tuple[str, str]]:
    """(module, name) of what a file imports from modules, or reads as `module.name`."""
    found, aliases = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in modules:
                    aliases[alias.asname or alias.name] = whole
                else:
                    found.add((node.module, alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            found.add((aliases[node.value.id], node.attr))
    return found


def test_uses_and_interface() -> None:
    """A name counts as used when it is imported or read from its module; a type in a public signature is met there."""
    user = ast.parse("from a import b\nfrom a.c import d as e\nb.f()\nother.g()")
    assert uses(user, {"a.b", "a.c"}) == {("a.b", "f"), ("a.c", "d")}
    owner = ast.parse("X = 1\n_Y = 2\nclass T: pass\ndef f(a: T) -> list[U]: ...\ndef _g(a: V): ...\nTABLE = {'a': h}")
    assert public_names(owner) == {"X", "T", "f", "TABLE"}
    assert interface(owner) == {"T", "list", "U", "h"}
    assert interface(ast.parse("if __name__ == '__main__':\n    main()")) == {"main"}
