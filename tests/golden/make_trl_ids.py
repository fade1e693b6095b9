"""Writes trl_ids.json: the token ids that TRL's DPOTrainer makes of the samples in format_samples.py.

    PYTHONPATH=.:tests python tests/golden/make_trl_ids.py

Needs trl; written by 1.16.0 with transformers 5.24.0. Of each template of chat_templates.py that reads no date and each
sample: the ids of the prompt, and those of the chosen and the rejected answer behind it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from datasets import Dataset  # pyright: ignore[reportMissingImports]
from transformers import PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]
from trl import DPOTrainer  # pyright: ignore[reportMissingImports]

from chat_templates import NAMED, NO_SYSTEM, TEMPLATES, tokenizers_of_each_kind
from format_samples import TRL, tokenizer_kind


def trl_ids(name: str, record: dict[str, Any]) -> list[list[int]]:
    """Ids of (prompt, chosen, rejected), by the trainer's own preparation of a data set."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers_of_each_kind()[tokenizer_kind(name)], chat_template=TEMPLATES[name], **NAMED
    )
    data = Dataset.from_list([{key: record[key] for key in ("prompt", "chosen", "rejected") if key in record}])
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = cast(Any, SimpleNamespace(_tokenizer=tokenizer))
    [found] = DPOTrainer._prepare_dataset(trainer, data, tokenizer, args, "train")
    return [found[f"{side}_ids"] for side in ("prompt", "chosen", "rejected")]


def main() -> None:
    """Ids by template, a list a sample."""
    found: dict[str, list[list[list[int]] | None]] = {}
    for name, template in TEMPLATES.items():
        if "date_string" not in template:
            has_system = [any(m["role"] == "system" for m in r.get("prompt", r["chosen"])) for r in TRL]
            found[name] = [
                None if system and name in NO_SYSTEM else trl_ids(name, record)
                for record, system in zip(TRL, has_system, strict=True)
            ]
    path = Path(__file__).with_name("trl_ids.json")
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
