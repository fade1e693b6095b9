"""Runs a launch script with data blocks of 600 bytes, of which shards are kept; says which ones this process made.

python tests/small_blocks.py --script=launch/precompute_ref.py ...
"""

from __future__ import annotations

import runpy
import sys

from simple_llama.dataset import data_blocks
from simple_llama.dataset.data_blocks import Block
from simple_llama.reinforcement_learning.rlhf.data import find_pairs
from simple_llama.reinforcement_learning.rlhf.data.token_shards import ReadBlock, TokenShards


def main() -> None:
    """Takes the script off the command line, patches, and runs it."""
    [script] = (arg.removeprefix("--script=") for arg in sys.argv if arg.startswith("--script="))
    sys.argv = [script, *(arg for arg in sys.argv[1:] if not arg.startswith("--script="))]
    data_blocks._BLOCK, data_blocks._PIECE, find_pairs._LEAST_BYTES = 600, 100, 1
    add = TokenShards.add

    def said(self: TokenShards, block: Block, known_format: str, made: ReadBlock) -> None:
        print(f"made block {block.first}", flush=True)
        add(self, block, known_format, made)

    TokenShards.add = said
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
