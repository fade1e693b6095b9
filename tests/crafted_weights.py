"""Weights files written by hand: a few bytes that ask for all memory or for all time, or say what is not so."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile

_OLD = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)  # how that format begins
_MOST = b"J\xff\xff\xff\x7f"  # 2**31 - 1
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
_ORDERED = b"ccollections\nOrderedDict\n)R"
_LEVELS = 40  # of what holds the one below twice: 2**40 in all


def text(value: str) -> bytes:
    """A text in a pickle."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def twice(empty: bytes, pair: bytes) -> bytes:
    """Makes and names (0 to 40) values that hold the one below twice. Args: pair: with %s for each of both."""
    steps = [pair.replace(b"%s", b"h%c" % at) + b"q%c" % (at + 1) for at in range(_LEVELS)]
    return empty + b"q\0" + b"".join(steps)


def checkpoint(metadata: bytes = b"N", heads: bytes = b"K\2", weights: bytes = b"}", before: bytes = b"") -> bytes:
    """A checkpoint's pickle. `before` is done first; the others are values."""
    config = b"csimple_llama.pretraining.config\nTrainingConfig\n)\x81}" + text("n_heads") + heads + b"sb"
    items = text("model_state_dict") + weights + text("config") + config + text("metadata") + b"}"
    return b"\x80\x02" + before + b"}(" + items + text("x") + metadata + b"su."


def storage(elements: bytes, key: bytes | None = None) -> bytes:
    """A storage of fp32 numbers."""
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + (key or text("0")) + text("cpu") + elements + b"tQ"


def tensor(elements: bytes, shape: bytes, stride: bytes) -> bytes:
    """A tensor of one dimension on storage 0."""
    return _REBUILD + b"(" + storage(elements) + b"K\0" + shape + b"\x85" + stride + b"\x85\x89" + _ORDERED + b"tR"


def archive(table: bytes, *more: tuple[str, bytes]) -> bytes:
    """A zip file as torch.save writes it, with this pickle, a storage of one fp32 number and `more` entries."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in (("data.pkl", table), ("version", b"3\n"), ("data/0", b"\0\0\x80\x3f")):
            file.writestr(zipfile.ZipInfo(f"a/{name}"), data)
        for name, data in more:
            file.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def old_archive(table: bytes, *keys: str) -> bytes:
    """A file of torch's format before zip files, whose storages have one number each, whatever the pickle says."""
    return (
        _OLD
        + table.replace(b"tQ", b"NtQ")
        + pickle.dumps(list(keys), 2)
        + b"".join(struct.pack("<qf", 1, 1.0) for _ in keys)
    )


def _in_state_dict(value: bytes) -> bytes:
    """A pickle with one tensor."""
    return checkpoint(weights=b"}" + text("norm.weight") + value + b"s")


_LISTS, _TUPLES = twice(b"]", b"](%s%se"), twice(b")", b"%s%s\x86")
_TOP = b"h%c" % _LEVELS
_NUMBERS = b"](" + b"K\1" * 20_000 + b"eq\0"

# name: (the file, what is said of it)
CRAFTED: dict[str, tuple[bytes, str]] = {
    "a bytearray of 2 GiB": (
        archive(checkpoint(b"c__builtin__\nbytearray\n" + _MOST + b"\x85R")),
        "builtins.bytearray",
    ),
    "a tensor of 8 GiB": (archive(checkpoint(b"ctorch\nTensor\n" + _MOST + b"\x85\x81")), "torch.Tensor"),
    "an empty storage of 2 GiB": (
        archive(checkpoint(b"ctorch.storage\nUntypedStorage\n" + _MOST + b"\x85\x81")),
        "torch.storage.UntypedStorage",
    ),
    "an old storage of 8 GiB": (old_archive(_in_state_dict(tensor(_MOST, b"K\1", b"K\1")), "0"), "shorter than"),
    "lists for a number of the config": (archive(checkpoint(before=_LISTS, heads=_TOP)), "again and again"),
    "lists in the metadata": (archive(checkpoint(before=_LISTS, metadata=_TOP)), "again and again"),
    "lists for a function": (archive(checkpoint(before=_LISTS, metadata=_TOP + b")R")), "'list'"),
    "lists for the name of a storage": (archive(checkpoint(before=_LISTS, metadata=storage(b"K\1", _TOP))), "damaged"),
    "tuples for a key": (archive(checkpoint(before=_TUPLES, metadata=b"}" + _TOP + b"Ns")), "key"),
    "tuples in a set": (
        archive(checkpoint(before=_TUPLES, metadata=b"c__builtin__\nset\n](" + _TOP + b"e\x85R")),
        "key",
    ),
    "a list copied to sets": (
        archive(checkpoint(before=_NUMBERS, metadata=b"](" + b"c__builtin__\nset\nh\0\x85R" * 20_000 + b"e")),
        "more than 1,000,000",
    ),
    "a text copied to bytes": (
        archive(
            checkpoint(
                before=text("x" * 10**6) + b"q\0",
                metadata=b"](" + b"c_codecs\nencode\nh\0X\6\0\0\0latin1\x86R" * 20_000 + b"e",
            )
        ),
        "more than 1,000,000",
    ),
    "a text at many places": (
        archive(checkpoint(before=text("x" * 10**6) + b"q\0", metadata=b"](" + b"h\0" * 10_000 + b"e")),
        "again and again",
    ),
    "four million lists": (archive(checkpoint(before=b"]" * 4_000_000)), "more than 1,000,000"),
    "a million tensors": (
        archive(
            checkpoint(
                before=_REBUILD + b"q\0" + b"(" + storage(b"K\1") + b"K\0)" + b")\x89" + _ORDERED + b"tq\1",
                metadata=b"](" + b"h\0h\1R" * 10**6 + b"e",
            )
        ),
        "more than 1,000,000",
    ),
    "a list in itself": (archive(checkpoint(before=b"]q\0h\0a", metadata=b"h\0")), "without end"),
    "lists a hundred thousand deep": (archive(checkpoint(b"]" * 10**5 + b"a" * (10**5 - 1))), "100 deep"),
    "a tensor of one number": (archive(_in_state_dict(tensor(b"K\1", _MOST, b"K\0"))), "dense"),
    "a tensor beyond its storage": (archive(_in_state_dict(tensor(b"K\1", b"K\2", b"K\1"))), "beyond its storage"),
    "a storage beyond its entry": (archive(_in_state_dict(tensor(b"K\2", b"K\2", b"K\1"))), "shorter than"),
    "a storage that is not there": (archive(checkpoint(storage(b"K\1", text("1")))), "damaged"),
    "an old storage that is not there": (old_archive(checkpoint(storage(b"K\1", text("1"))), "0"), "damaged"),
    "an old storage twice": (old_archive(_in_state_dict(tensor(b"K\1", b"K\1", b"K\1")), *"0" * 10**5), "twice"),
    "two tables": (archive(checkpoint(), ("b/data.pkl", checkpoint())), "name twice"),
    "one name twice": (
        archive(checkpoint(), ("a/data.pk2", checkpoint())).replace(b"a/data.pk2", b"a/data.pkl"),
        "name twice",
    ),
}
