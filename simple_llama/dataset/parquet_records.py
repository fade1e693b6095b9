"""Rows of Parquet and Arrow files, some hundreds at a time: a column of a record that has no value there is null.

Arrow files are read as either of its two kinds, the file and the stream (`datasets` saves streams).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from simple_llama.common.errors import UserError
from simple_llama.common.files import open_file, shown
from simple_llama.dataset.packed_files import optional_package

TABLE_SUFFIXES = (".parquet", ".arrow")
_ROWS_AT_ONCE = 256  # as Python objects; of a row group or a batch that is larger no more than these
_ARROW_FILE = b"ARROW1"  # an Arrow file begins so, a stream does not


def table_rows(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and fields of each row. A null is left out, as a key that a JSON record does not have.

    Raises UserError for a file that cannot be read, and where the package that reads it is missing.
    """
    count = 0
    with _refused(file), open_file(file) as opened:
        found = _parquet(file, opened) if file.lower().endswith(".parquet") else _arrow(file, opened)
        for batch in found:
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                for row in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                    count += 1
                    yield count, _without_nulls(row)


@contextmanager
def _refused(file: str) -> Iterator[None]:
    """A file that the package cannot read, or whose text is no UTF-8, ends in one line."""
    pyarrow = optional_package("pyarrow", file)
    try:
        yield
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        found = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{file}: cannot be read: {found}") from None


def _parquet(file: str, opened: Any) -> Iterator[Any]:
    """Batches of its row groups, one group at a time."""
    found = optional_package("pyarrow.parquet", file).ParquetFile(opened)
    _check_names(file, found.schema_arrow.names)
    yield from found.iter_batches(batch_size=_ROWS_AT_ONCE)


def _arrow(file: str, opened: Any) -> Iterator[Any]:
    """Batches of a file or of a stream, whose pages the kernel may drop again."""
    pyarrow = optional_package("pyarrow", file)
    is_file = opened.read(len(_ARROW_FILE)) == _ARROW_FILE
    with pyarrow.memory_map(file) as mapped:
        if is_file:
            found = pyarrow.ipc.open_file(mapped)
            _check_names(file, found.schema.names)
            batches = map(found.get_batch, range(found.num_record_batches))
        else:
            batches = found = pyarrow.ipc.open_stream(mapped)
            _check_names(file, found.schema.names)
        for batch in batches:
            batch.validate(full=True)  # offsets in a damaged file may lead out of it
            yield batch


def _check_names(file: str, names: list[str]) -> None:
    """UserError for a column that stands twice: which one counts is not guessed."""
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{file}: column {shown(twice[0])} stands twice; keep one of them")


def _without_nulls(value: Any) -> Any:
    """A value without the keys of its objects that have none."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value
