"""Fuzzes the readers of input files with atheris, guided by coverage, from sound files on.

    python tests/fuzz/fuzz_inputs.py TARGET [libFuzzer options, such as -max_total_time=60]

Targets and what must hold: `tests/fuzz_targets.py`. Ends non-zero at the first file that breaks it; the file is kept.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


def say(message: str) -> int:
    """Prints an error; gives the exit status of a mistake that a person can put right."""
    sys.stderr.write(f"error: {message}\n")
    return 2


def main() -> None:
    """Starts libFuzzer on a target."""
    if importlib.util.find_spec("atheris") is None:
        sys.exit(say("atheris is not installed: pip install atheris, then start again"))
    atheris: Any = importlib.import_module("atheris")
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    with atheris.instrument_imports(include=["simple_llama"]):
        import fuzz_targets

    name, *options = sys.argv[1:] or [""]
    if name not in fuzz_targets.TARGETS:
        sys.exit(say(f"expected a target ({', '.join(fuzz_targets.TARGETS)}), found {name!r}"))
    logging.disable(logging.CRITICAL)
    work = Path(tempfile.mkdtemp(prefix="fuzz_"))
    corpus = work / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(fuzz_targets.seeds(name)):
        (corpus / str(number)).write_bytes(seed)

    def once(data: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            fuzz_targets.TARGETS[name](data, Path(folder))

    os.chdir(work)
    print(f"files are kept in {work}", file=sys.stderr, flush=True)
    atheris.Setup([sys.argv[0], *options, "-timeout=20", "-rss_limit_mb=4096", str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
