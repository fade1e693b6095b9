"""Describes and checks a weights file:

    python -m simple_llama.pretraining.weights FILE [--json]

The status is 0 where the file is sound: its archive whole, its tensors those of its own config, all numbers finite. It
is 2 where it is not, with what is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import file_digest, open_file, shown
from simple_llama.pretraining.archives import archive_facts
from simple_llama.pretraining.weights import WeightsFile, check_weights, find_weights, load_weights, weights_digest

_WIDTH = 14  # characters of the first column


def main(argv: Sequence[str]) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser("python -m simple_llama.pretraining.weights", description="Checks a .pth file.")
    parser.add_argument("file", help="a .pth file, or a folder whose newest .pth is taken")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        facts = _describe(args.file)
    except (UserError, OSError) as error:
        print(f"not sound: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 2 if facts["problems"] else 0


def _describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a weights file holds, as JSON values, and under "problems" what is wrong with it.

    Raises UserError or OSError for a file that cannot be read as one.
    """
    path = find_weights(path)
    loaded = load_weights(path)
    with open_file(path) as file:
        archive, wrong = archive_facts(file)
    problems = [f"{shown(name)} does not have the checksum that it should have" for name in wrong]
    try:
        architecture: dict[str, Any] | None = asdict(loaded.architecture)
        check_weights(loaded, torch.float32)
    except UserError as error:
        architecture = None
        problems.append(str(error).removeprefix(f"{path}: "))
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "file_digest": file_digest(path),
        "archive": archive,
        "architecture": architecture,
        "weights": sum(tensor.numel() for tensor in loaded.state_dict.values()),
        "weights_digest": weights_digest(loaded.state_dict),
        "tensors": _tensors(loaded),
        "metadata": _plain(loaded.metadata),
        "problems": problems,
    }


def _tensors(loaded: WeightsFile) -> list[dict[str, Any]]:
    """Name, shape, dtype of each tensor, and how many of its numbers are not finite."""
    return [
        {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "not_finite": int((~tensor.isfinite()).sum()),
        }
        for name, tensor in loaded.state_dict.items()
    ]


def _plain(value: Any) -> Any:
    """Metadata as JSON values: what JSON has not becomes text."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else shown(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return value if value is None or type(value) in (str, int, float, bool) else shown(value)


def _text(facts: dict[str, Any]) -> str:
    """The facts for people."""
    dtypes = Counter(tensor["dtype"] for tensor in facts["tensors"])
    sound = "not sound: " + "; ".join(facts["problems"]) if facts["problems"] else "sound"
    lines = [
        ("file", facts["file"]),
        ("size", f"{facts['bytes']:,} bytes, digest {facts['file_digest']}"),
        ("archive", facts["archive"]),
        ("model", _brief(facts["architecture"] or "cannot be built from its config")),
        ("weights", f"{facts['weights']:,} in {len(facts['tensors'])} tensors, {_brief(dtypes)}"),
        ("digest", f"{facts['weights_digest']} (of names, dtypes, shapes and values)"),
        *((f"  {shown(name)[1:-1]}", _brief(value)) for name, value in facts["metadata"].items()),
        ("result", sound),
    ]
    if not facts["metadata"]:
        lines.insert(-1, ("made by", "not said: without metadata"))
    table = [
        f"  {shown(tensor['name'])[1:-1]} {tuple(tensor['shape'])} {tensor['dtype']}{_count(tensor)}"
        for tensor in facts["tensors"]
    ]
    rows = [f"{name:{_WIDTH}} {text}" for name, text in lines]
    return "\n".join([*rows[:-1], "tensors", *table, rows[-1]])


def _count(tensor: dict[str, Any]) -> str:
    """How many numbers of a tensor are not finite, where there are some."""
    return f", {tensor['not_finite']:,} numbers inf or nan" if tensor["not_finite"] else ""


def _brief(value: Any) -> str:
    """A value on a line: of dicts their names and values, without what is not set."""
    if isinstance(value, dict):
        return ", ".join(f"{shown(name)[1:-1]} {_brief(item)}" for name, item in value.items() if item is not None)
    return shown(value)[1:-1] if isinstance(value, str) else shown(value)
