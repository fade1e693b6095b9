"""Measures how the code is laid out, from its source alone: a table, for this checkout or another one.

    python tests/house.py [FOLDER ...]

A room is a folder with modules; below rlhf/, today's single files are rooms too, as they stand beside the folders.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("simple_llama", "launch", "benchmarks")
RLHF = "simple_llama.reinforcement_learning.rlhf"


def modules(root: Path) -> dict[str, ast.Module]:
    """The syntax trees of the shipped modules by dotted name; packages' own files left out."""
    paths = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py")) if path.stem != "__init__"]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
    }


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name and lines of every function and method, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def room(module: str) -> str:
    """Where a module lives: its folder; in rlhf/ itself, a single file is its own room."""
    package = module.rpartition(".")[0]
    return module if package == RLHF else package


def arrows(trees: dict[str, ast.Module]) -> set[tuple[str, str]]:
    """Which room imports from which other one, type-checking imports too."""
    found = set()
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
                for target in targets:
                    there = target if target in trees else node.module
                    if there in trees and room(there) != room(name):
                        found.add((room(name), room(there)))
    return found


def takers(trees: dict[str, ast.Module], kind: str) -> list[str]:
    """Functions with a parameter whose annotation names a class."""
    found = []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if any(kind in ast.unparse(one.annotation) for one in arguments if one.annotation):
                    found.append(f"{name}.{node.name}")
    return found


def table(root: Path) -> dict[str, str]:
    """The measures of a checkout by their titles."""
    trees = modules(root)
    lengths = {f"{name}.{function}": lines for name, tree in trees.items() for function, lines in functions(tree)}
    lines = {name: len((root / (name.replace(".", "/") + ".py")).read_text().splitlines()) for name in trees}
    library = {name: tree for name, tree in trees.items() if name.startswith("simple_llama.")}
    rooms = defaultdict(int)
    for name in library:
        rooms[room(name)] += 1
    inner = {name: count for name, count in rooms.items() if name.startswith(RLHF)}
    drawn = arrows(library)
    longest = max(lengths, key=lambda name: lengths[name])
    whole = takers(library, "DPOConfig")
    return {
        "functions": str(len(lengths)),
        "longest function": f"{lengths[longest]} lines ({longest})",
        "functions over 60 lines": str(sum(count > 60 for count in lengths.values())),
        "modules; files over 400 lines": f"{len(lines)}; {sum(count > 400 for count in lines.values())}",
        "rooms of the library; arrows between them": f"{len(rooms)}; {len(drawn)}",
        "rooms in rlhf/; arrows between them": f"{len(inner)}; "
        + str(sum(a.startswith(RLHF) and b.startswith(RLHF) for a, b in drawn)),
        "modules a room, on average and most": f"{len(library) / len(rooms):.1f}; {max(rooms.values())}",
        "functions that take DPOConfig; in rooms": f"{len(whole)}; "
        + str(len({room(name.rpartition(".")[0]) for name in whole})),
        "words of README": str(len((root / "README.md").read_text().split())),
    }


def main() -> None:
    """A column for each folder."""
    roots = [Path(name).resolve() for name in sys.argv[1:]] or [Path(__file__).resolve().parents[1]]
    columns = [table(root) for root in roots]
    print("| measure |" + "".join(f" {root.name} |" for root in roots))
    print("|---|" + "---|" * len(roots))
    for title in columns[0]:
        print(f"| {title} |" + "".join(f" {column[title]} |" for column in columns))


if __name__ == "__main__":
    main()
