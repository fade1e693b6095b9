"""Plain data between ranks: JSON and whole numbers as tensors, over torch.distributed. Never pickles.

torch's own object collectives unpickle what comes, so whoever joins as a rank runs code in all others. Here a message
is checked before it is believed: its size goes first and is bounded, it is read as data only, and a caller that uses it
says of what kind it must be. Tuples arrive as lists, on the rank that sent them too.

Every function is a collective. Without a process group, and in one of one rank, it talks to itself.
"""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist

from simple_llama.common.errors import UserError

_MOST = 16 << 20  # bytes of a message; what is read from them takes up to 25 times as much
_PIECE = 1 << 20  # bytes that each rank sends at a time, so that one long message is not paid for by all ranks


def gather(value: Any, kind: Any = Any) -> list[Any]:
    """Each rank's `value` in the order of ranks, on every rank.

    Args:
        kind: what each must be: None, bool, int, float, str, list[...], tuple[...], dict[str, ...], unions, Any.

    Raises:
        UserError: on every rank alike, where one sent something else or more than _MOST bytes.
    """
    mine = torch.frombuffer(bytearray(encoded(value)), dtype=torch.uint8)
    lengths = [int(length) for length in _from_all(torch.tensor([len(mine)]))]
    for rank, length in enumerate(lengths):
        _check_length(rank, length, _MOST)
    parts: list[list[bytes]] = [[] for _ in lengths]
    for start in range(0, max(lengths), _PIECE):
        piece = torch.zeros(min(_PIECE, max(lengths) - start), dtype=torch.uint8)
        own = mine[start : start + len(piece)]
        piece[: len(own)] = own
        for rank, found in enumerate(_from_all(piece)):
            parts[rank].append(found[: max(0, lengths[rank] - start)].numpy().tobytes())
    return [_decoded(b"".join(texts), kind, rank) for rank, texts in enumerate(parts)]


def broadcast(value: Any, kind: Any = Any) -> Any:
    """Rank 0's `value`, on every rank; what the others pass does not matter. `kind` and errors as in `gather`."""
    text = torch.frombuffer(bytearray(encoded(value if _rank() == 0 else None)), dtype=torch.uint8)
    return _decoded(_from_main(text, _MOST).numpy().tobytes(), kind, 0)


def broadcast_positions(positions: np.ndarray, count: int) -> np.ndarray:
    """Rank 0's positions in a sequence of `count` items, each at most once: int64 (P,), on every rank.

    What the others pass does not matter. UserError where rank 0 sent no such positions.
    """
    found = _from_main(torch.from_numpy(np.ascontiguousarray(positions, np.int64)), count).numpy()
    if len(found) and not (found.min() >= 0 and found.max() < count):
        raise UserError(_stranger(0, f"positions from 0 to {count - 1}"))
    return found


def encoded(value: Any, ordered: bool = False) -> bytes:
    """`value` as JSON. With `ordered` two values that are equal as data have equal texts, NaN too.

    Raises TypeError for what is no plain data: numbers, text, lists, tuples, and dicts with text as keys.
    """
    return json.dumps(_plain(value), sort_keys=ordered).encode()


def _plain(value: Any) -> Any:
    """`value` itself, if JSON gives it back as it is but for tuples; json.dumps alone makes text of other keys."""
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"a message has text as keys, not {odd[0]!r}")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a message is plain data, not a {type(value).__name__}")


def _decoded(text: bytes, kind: Any, rank: int) -> Any:
    """What a rank said."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(_stranger(rank, "JSON")) from None
    if not _fits(value, kind):
        raise UserError(_stranger(rank, f"{kind}"))
    return value


def _fits(value: Any, kind: Any) -> bool:
    """Whether what JSON gave is of a kind; a whole number is a float too, a tuple is a list of that length."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, parts[1]) for item in value.values())
    if kind is None:
        return value is None
    return type(value) is kind or (kind is float and type(value) is int)


def _check_length(rank: int, length: int, most: int) -> None:
    """Before room is made for it."""
    if not 0 <= length <= most:
        raise UserError(_stranger(rank, f"a message of at most {most:,} bytes or numbers", f"one of {length:,}"))


def _stranger(rank: int, expected: str, found: str = "something else") -> str:
    """What is said of a rank whose message cannot be one."""
    return (
        f"rank {rank} sent {found}, expected {expected}: all ranks must run this version of the program, and nobody "
        "else may reach the port of MASTER_ADDR (docs/clusters.md, 'Who can do what')"
    )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def _from_all(mine: torch.Tensor) -> Sequence[torch.Tensor]:
    """Every rank's tensor of the same shape and dtype, on the CPU."""
    if _alone():
        return [mine]
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return found


def _from_main(tensor: torch.Tensor, most: int) -> torch.Tensor:
    """Rank 0's flat tensor of at most `most` items; the other ranks' tell the dtype."""
    length = torch.tensor([len(tensor)])
    if not _alone():
        dist.broadcast(length, 0)
    _check_length(0, int(length), most)
    if _alone():
        return tensor
    found = tensor if _rank() == 0 else torch.empty(int(length), dtype=tensor.dtype)
    dist.broadcast(found, 0)
    return found
