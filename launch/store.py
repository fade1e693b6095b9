"""Reference stores: what there is, whether it is sound, merging, removing, and sums to and from other programs.

python launch/store.py list   [--ref_cache_dir DIR]            # each store: entries, bytes, dtype, model, last used
python launch/store.py verify [--digests 3602,9a29]            # reads everything; status 2 where something is damaged
python launch/store.py merge  [--digests 3602]                 # many small shards -> few that starts need not read
python launch/store.py prune  --older_than_days 90 [--yes]     # also --digests, --leftovers; says what it would do
python launch/store.py export --output pairs.jsonl --model_path MODEL --rlhf_dataset_path pairs  # settings of the pass
python launch/store.py import --model_path MODEL --rlhf_dataset_path with_columns.jsonl  # made by that model: audited

docs/store.md says more; `launch/store.py ACTION --help` lists the settings of an action.
"""

from __future__ import annotations

import sys

try:
    from simple_llama.common.errors import UserError
    from simple_llama.reinforcement_learning.rlhf.store import run_store
except ModuleNotFoundError as missing:
    print(
        f"error: {missing} in {sys.executable}; `make demo` and `. .venv/bin/activate`, or pip install .",
        file=sys.stderr,
    )
    sys.exit(2)


def main() -> None:
    """Does one action; ends with status 2 and a message on bad input, or where `verify` finds damage."""
    try:
        sys.exit(run_store(__doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
