"""Writes added_tokens.json: what transformers makes of the folders of tokenizer_folders.py.

    PYTHONPATH=.:tests python tests/golden/make_added_tokens.py

Needs transformers. Made with 5.23.0.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]

from tokenizer_folders import FOLDERS, described, write_folder


def main() -> None:
    """Its tokens and ids for each folder, and the names that templates read; the error's name where it refuses one."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        for number, name in enumerate(FOLDERS):
            folder = write_folder(Path(made) / str(number), name)
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder)
            except Exception as error:  # noqa: BLE001 - whatever it is
                found[name] = {"refused": f"{type(error).__name__}: {error}"}
                continue
            found[name] = {**described(tokenizer.backend_tokenizer), "named": tokenizer.special_tokens_map}
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("added_tokens.json")
    lines = [f" {json.dumps(name)}: {json.dumps(said)}" for name, said in found.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
