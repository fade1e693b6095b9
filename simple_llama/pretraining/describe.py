"""Describes and checks a weights file:

    python -m simple_llama.pretraining.weights FILE [--json]

The status is 0 where the file is sound: its archive whole, its tensors those of its own config, all numbers finite. It
is 2 where it is not, with what is wrong. Of LoRA adapters alone both halves of each have to be there: whether they
fit a base is said where they are opened beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import file_digest, listed, open_file, shown
from simple_llama.pretraining.architecture import LORA_MARK
from simple_llama.pretraining.archives import archive_facts
from simple_llama.pretraining.config import check_model_config
from simple_llama.pretraining.weights import (
    LoraAdapters,
    check_weights,
    find_weights,
    load_lora_adapters,
    load_weights,
    weights_digest,
)

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
    adapters = load_lora_adapters(path)
    found = adapters or load_weights(path)
    tensors = found.tensors if isinstance(found, LoraAdapters) else found.state_dict
    with open_file(path) as file:
        archive, wrong = archive_facts(file)
    problems = [f"{shown(name)} does not have the checksum that it should have" for name in wrong]
    architecture: dict[str, Any] | None = None
    if isinstance(found, LoraAdapters):
        problems += _problems_of(found)
    else:
        try:
            architecture = asdict(found.architecture)
            check_weights(found, torch.float32)
        except UserError as error:
            architecture = None
            problems.append(str(error).removeprefix(f"{path}: "))
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "file_digest": file_digest(path),
        "archive": archive,
        "adapters": {"rank": adapters.config.lora_rank, "alpha": adapters.config.lora_alpha} if adapters else None,
        "architecture": architecture,
        "weights": sum(tensor.numel() for tensor in tensors.values()),
        "weights_digest": weights_digest(tensors),
        "tensors": _tensors(tensors),
        "metadata": _plain(found.metadata),
        "problems": problems,
    }


def _problems_of(adapters: LoraAdapters) -> list[str]:
    """What is wrong with adapters alone: A (I, R) and B (R, O) of each have to be there, of the config's rank R."""
    try:
        check_model_config(adapters.config)
    except UserError as error:
        return [f"config: {error}"]
    rank, problems = adapters.config.lora_rank, []
    shapes = {name: tuple(tensor.shape) for name, tensor in adapters.tensors.items()}
    for place in sorted({name.rpartition("lora_")[0] for name in shapes}):
        a_IR, b_RO = (shapes.get(f"{place}lora_{half}", ()) for half in "ab")
        if not place.endswith(LORA_MARK) or len(a_IR) != 2 or len(b_RO) != 2 or (a_IR[1], b_RO[0]) != (rank, rank):
            problems.append(f"{shown(place)}: expected halves (I, {rank}) and ({rank}, O), found {a_IR} and {b_RO}")
    broken = [name for name, tensor in adapters.tensors.items() if not tensor.isfinite().all()]
    if broken:
        problems.append(f"expected finite weights, found inf or nan in {listed(broken)}")
    return problems if shapes else ["expected adapters, found no tensors"]


def _tensors(state_dict: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Name, shape, dtype of each tensor, and how many of its numbers are not finite."""
    return [
        {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "not_finite": int((~tensor.isfinite()).sum()),
        }
        for name, tensor in state_dict.items()
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
    model = _brief(facts["architecture"] or "cannot be built from its config")
    if facts["adapters"]:
        model = f"none: LoRA adapters alone, {_brief(facts['adapters'])}; their base is another file"
    lines = [
        ("file", facts["file"]),
        ("size", f"{facts['bytes']:,} bytes, digest {facts['file_digest']}"),
        ("archive", facts["archive"]),
        ("model", model),
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
