"""Pickles of torch.save, read without running code, and bounded: what they may make, and how much of it.

torch's own `weights_only` runs no code either, but makes whatever a file says: `bytearray` of 3 GiB is 60 bytes of
pickle, and a list that holds another twice, forty times over, writes out to all memory. So a pickle is read here, by
the opcodes of protocol 2 that torch.save writes. Each opcode costs one, each call what it makes; nothing is called but
what is listed, tensors stay within their storages, and what is shared counts as often as it would be written out.
"""

from __future__ import annotations

import functools
import io
import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.pretraining.config import TrainingConfig

MOST_BYTES = 16 << 20  # of a pickle: a model of a thousand layers has 3 MB
_MOST_COST = 1_000_000  # of a pickle, each worth some 100 bytes of memory: a tensor costs about 60
_CALL_COST = 10  # of a call, beside what it copies
_MOST_WRITTEN = 16 << 20  # characters, were the whole content written out
_MOST_DEPTH = 100  # of containers in each other
_MOST_ELEMENTS = 1 << 62  # of a tensor: counts stay far from the end of 64 bits
_STORED = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _STORED.items()}
_STORAGES["torch.storage.UntypedStorage"] = torch.uint8
_PYTHON_2 = {"__builtin__": "builtins"}  # torch.save writes names as Python 2 had them
_PLAIN = (str, int, float, bool, type(None), bytes)

# (dtype of the elements, key, bytes) -> all bytes of a storage (n,), uint8
StorageOf = Callable[[torch.dtype, str, int], torch.Tensor]


class OtherTensor:
    """In the place of a tensor that is not dense: sparse, quantized, nested, without values."""


@dataclass(frozen=True)
class _Name:
    """A name of a function or class, as long as nothing is made of it."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """A storage that a pickle names."""

    data: torch.Tensor  # (bytes,) uint8
    dtype: torch.dtype


def unpickle(data: bytes, start: int, storage_of: StorageOf) -> tuple[Any, int]:
    """The object in a pickle that begins at `start`, and where it ends.

    It holds plain values, containers, tensors and TrainingConfig. Raises UserError for a pickle with anything else or
    too much of it, and any error for one that is damaged.
    """
    file = io.BytesIO(data)
    file.seek(start)
    value = _Machine(storage_of).run(file)
    _check_written(value)
    return value, file.tell()


class _Machine:
    """The stack machine that pickles are programs of: stack, marks, memo."""

    def __init__(self, storage_of: StorageOf):
        self.storage_of = storage_of
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under a mark
        self.memo: dict[int, Any] = {}
        self.cost = 0

    def run(self, file: io.BytesIO) -> Any:
        """What the pickle leaves on its stack."""
        for opcode, argument, _ in pickletools.genops(file):
            self.spend(1)
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name not in _ACTIONS:
                raise _other(opcode.name)
            _ACTIONS[opcode.name](self, argument)
        raise EOFError

    def spend(self, cost: int) -> None:
        """Counts what is about to be made. UserError where it is too much."""
        self.cost += cost
        if self.cost > _MOST_COST:
            raise UserError(f"it holds more than {_MOST_COST:,} values beside its weights; save it without them")

    def push(self, value: Any) -> None:
        """A value, or a name."""
        self.stack.append(value)

    def name(self, argument: str) -> None:
        """Module and name with a space between: a dtype at once, all others when they are used."""
        module, _, name = argument.partition(" ")
        name = f"{_PYTHON_2.get(module, module)}.{name}"
        self.push(_dtypes().get(name) or _Name(name))

    def mark(self, _: None) -> None:
        """What follows is taken together."""
        self.below.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """All since the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def tuple_of(self, count: int) -> None:
        """The last `count` values as one."""
        items = [self.stack.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def extend(self, items: Iterable[Any]) -> None:
        """Appends to the list under `items`."""
        found = self.stack[-1]
        if type(found) is not list:
            raise TypeError
        found.extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Sets keys and values, in turn, of the dict under them."""
        found = self.stack[-1]
        if type(found) not in (dict, OrderedDict, Counter):
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            found[_key(key)] = value

    def call(self, function: Any, arguments: Any) -> Any:
        """What a listed function makes of its arguments."""
        name = function.name if isinstance(function, _Name) else ""
        if name not in _CALLS:
            raise _other(name or type(function).__name__)
        self.spend(_CALL_COST)
        return _CALLS[name](self, *_tuple(arguments))

    def new_object(self, _: None) -> None:
        """An object of a class, without values yet."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if name != _CONFIG or arguments != ():
            raise _other(name.name if isinstance(name, _Name) else type(name).__name__)
        self.spend(_CALL_COST)
        self.push(TrainingConfig.__new__(TrainingConfig))

    def build(self, _: None) -> None:
        """Gives an object its attributes. Those of a dict (the versions of its modules) are of no use here."""
        state, found = self.stack.pop(), self.stack[-1]
        if type(state) is not dict or not all(type(key) is str for key in state):
            raise TypeError
        self.spend(len(state))
        if type(found) is TrainingConfig:
            found.__dict__.update(state)
        elif type(found) is not OrderedDict:
            raise _other(f"attributes of {type(found).__name__}")

    def persistent(self, _: None) -> None:
        """A storage, by what torch.save names it."""
        kind, storage, key, _location, elements, *views = _tuple(self.stack.pop())
        if not isinstance(storage, _Name) or storage.name not in _STORAGES:
            raise _other(storage.name if isinstance(storage, _Name) else type(storage).__name__)
        if kind != "storage" or type(key) is not str or views not in ([], [None]):
            raise TypeError
        self.spend(_CALL_COST)
        dtype = _STORAGES[storage.name]
        self.push(_Storage(self.storage_of(dtype, key, _count(elements) * dtype.itemsize), dtype))


def _other(name: str) -> UserError:
    """For what a checkpoint does not need."""
    return UserError(f"it holds more than tensors, plain values and TrainingConfig: {shown(name)}")


def _tuple(value: Any) -> tuple[Any, ...]:
    """The value, if it is a tuple."""
    if type(value) is not tuple:
        raise TypeError
    return value


def _count(value: Any) -> int:
    """The value, if it counts elements."""
    if type(value) is not int or not 0 <= value < _MOST_ELEMENTS:
        raise TypeError
    return value


def _key(value: Any) -> Any:
    """The value, if it is a key: tuples in tuples can take for ever to hash."""
    if not all(type(part) in _PLAIN for part in (value if type(value) is tuple else (value,))):
        raise _other("a key that is no plain value")
    return value


@functools.cache
def _dtypes() -> dict[str, torch.dtype]:
    """torch's dtypes by name."""
    return {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


# === What may be called: (machine, *arguments) -> value ===


def _tensor(machine: _Machine, storage: Any, offset: Any, shape: Any, strides: Any, *_more: Any) -> torch.Tensor:
    """A view of a storage of its own dtype."""
    return _view(storage, storage.dtype, offset, shape, strides)


def _tensor_of(
    machine: _Machine, storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> torch.Tensor:
    """A view of a storage in a dtype for which there are no storages."""
    return _view(storage, dtype, offset, shape, strides)


def _view(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any) -> torch.Tensor:
    """A tensor on a storage. UserError where it would reach beyond."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        raise TypeError
    data = storage.data.view(dtype)
    elements, last = 1, _count(offset)
    for length, stride in zip(_tuple(shape), _tuple(strides), strict=True):
        elements, last = elements * _count(length), last + max(_count(length) - 1, 0) * _count(stride)
        if max(elements, last) >= _MOST_ELEMENTS:
            raise UserError("a tensor in it has impossible sizes")
    if elements and last >= data.numel():
        raise UserError("a tensor in it reaches beyond its storage")
    return data.as_strided(shape, strides, offset)


def _parameter(machine: _Machine, tensor: Any, *_more: Any) -> torch.Tensor | OtherTensor:
    """A parameter is its tensor."""
    if not isinstance(tensor, torch.Tensor | OtherTensor):
        raise TypeError
    return tensor


def _bytes(machine: _Machine, text: Any, encoding: Any) -> bytes:
    """Bytes, which protocol 2 has as text."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise _other("_codecs.encode")
    machine.spend(len(text) >> 4)
    return text.encode("latin-1")


def _set(machine: _Machine, items: Any) -> set[Any]:
    """A set of plain values."""
    if type(items) is not list:
        raise TypeError
    machine.spend(len(items))
    return {_key(item) for item in items}


def _counter(machine: _Machine, items: Any) -> Counter[Any]:
    """A dict of counts."""
    if type(items) is not dict:
        raise TypeError
    machine.spend(len(items))
    counter: Counter[Any] = Counter()
    dict.update(counter, items)
    return counter


def _complex(machine: _Machine, real: Any, imaginary: Any) -> complex:
    """A complex number."""
    if type(real) is not float or type(imaginary) is not float:
        raise TypeError
    return complex(real, imaginary)


def _device(machine: _Machine, kind: Any, *index: Any) -> torch.device:
    """The name of a device."""
    return torch.device(kind, *map(_count, index))


_CONFIG = _Name(f"{TrainingConfig.__module__}.{TrainingConfig.__qualname__}")
_OTHER_TENSORS = ("sparse_tensor", "meta_tensor_no_storage", "qtensor", "nested_tensor", "wrapper_subclass")
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda machine: OrderedDict(),
    "collections.Counter": _counter,
    "builtins.set": _set,
    "builtins.complex": _complex,
    "_codecs.encode": _bytes,
    "torch.Size": lambda machine, shape: torch.Size(map(_count, _tuple(shape))),
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    # a tensor with attributes: without them
    "torch._tensor._rebuild_from_type_v2": lambda machine, function, kind, arguments, state: machine.call(
        function, arguments
    ),
    "torch.serialization._get_layout": lambda machine, name: None,  # of a sparse tensor
    **{f"torch._utils._rebuild_{name}": lambda machine, *_: OtherTensor() for name in _OTHER_TENSORS},
}

# === Opcodes: (machine, the opcode's argument) ===

_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING"), _Machine.push),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.marked())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.marked()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.marked()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, at: machine.memo.update({at: machine.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, at: machine.push(machine.memo[at])),
    "GLOBAL": _Machine.name,
    "REDUCE": lambda machine, _: machine.push(machine.call(*reversed((machine.stack.pop(), machine.stack.pop())))),
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


# === What is shared ===


def _check_written(root: Any) -> None:
    """UserError where the content, written out, would be endless, too deep or too long.

    Lists, dicts and texts may stand at several places, which costs nothing until someone prints, compares or copies.
    """
    written: dict[int, int] = {}  # characters of each container
    path: set[int] = set()  # the containers that are being walked through
    pending = [(root, False)]
    while pending:
        value, done = pending.pop()
        if done:
            written[id(value)] = sum(written.get(id(part)) or _length(part) for part in _parts(value)) + 1
            path.discard(id(value))
            if written[id(value)] > _MOST_WRITTEN:
                raise UserError("it holds the same lists or texts again and again; save it without them")
        elif _is_container(value) and id(value) not in written:
            if id(value) in path or len(path) == _MOST_DEPTH:
                raise UserError(f"it holds lists or dicts in each other, without end or more than {_MOST_DEPTH} deep")
            path.add(id(value))
            pending.append((value, True))
            pending.extend((part, False) for part in _parts(value) if _is_container(part))


def _is_container(value: Any) -> bool:
    """Whether a value holds others."""
    return isinstance(value, list | tuple | dict | set | TrainingConfig)


def _parts(value: Any) -> Iterable[Any]:
    """The values that a container holds."""
    if isinstance(value, TrainingConfig):
        value = vars(value)
    return [*value.keys(), *value.values()] if isinstance(value, dict) else value


def _length(value: Any) -> int:
    """Characters of a value that is no container, at least one."""
    if isinstance(value, str | bytes):
        return len(value) + 1
    return value.bit_length() // 3 + 1 if isinstance(value, int) else 1
