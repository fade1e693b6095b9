"""TRL's DPO trainer with the columns of `launch/store.py export`: no reference model, no reference pass. For TRL 1.16.

python docs/trl_store_columns.py MODEL pairs.jsonl OUT
"""

import sys

from datasets import load_dataset  # pyright: ignore[reportMissingImports]
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]


class StoreDPOTrainer(DPOTrainer):
    """Takes the columns as the precomputed sums; by itself TRL would compute them once more, and end on two of each."""

    def _precompute_ref_logps(self, dataset, name, batch_size):
        known = {"ref_chosen_logps", "ref_rejected_logps"} <= set(dataset.column_names)
        return dataset if known else super()._precompute_ref_logps(dataset, name, batch_size)


if __name__ == "__main__":
    model, data, output = sys.argv[1:]
    pairs = load_dataset("json", data_files=data, split="train").filter(lambda row: row["split"] == "train")
    # No max_length: of a chat that is cut the columns would have other sums. Numbers as those of the store: dtype.
    arguments = DPOConfig(output, precompute_ref_log_probs=True, max_length=None)
    StoreDPOTrainer(model, args=arguments, train_dataset=pairs).train()
