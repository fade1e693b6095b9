"""What a run leaves beside its curves for those who read it later: facts of the data, of the weights, of each pair.

<log_dir>/<run>/   data.json  held_out.npz (of the last epoch's end that was evaluated)
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from simple_llama.cluster.distributed import all_reduce_sum
from simple_llama.common.files import atomic_path, atomic_write_json
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import RLDatasetLoader
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.run.evaluate import HeldOut
from simple_llama.reinforcement_learning.rlhf.run.statistics import effective_count, preferred

_HELD_OUT = "held_out.npz"
_MAGNITUDES = 1 << 15  # bit patterns of bf16 without the sign, whose order is that of the values
_COUNTED_AT_ONCE = 1 << 22  # weights; counting takes 8 bytes of each
_SIGNIFICAND_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


def write_data_facts(folder: Path, data: RLDatasetLoader) -> None:
    """Writes data.json.

    `pairs` and `longer_is_chosen` are of the training pairs, `held_out` counts the others; `prompts` and
    `largest_prompt_share` are of both; `validation_sets` has the number of pairs of each named validation path.
    """
    facts = {
        "pairs": len(data.train),
        "held_out": len(data.validation),
        "prompts": data.prompts,
        "largest_prompt_share": data.largest_prompt_share,
        "longer_is_chosen": data.train.longer_is_chosen,
        "report": data.report,
        "warnings": data.warnings,
        "files": list(data.pairs.files),
    }
    if data.validation_sets:
        facts["validation_sets"] = {name: part.stop - part.start for name, part in data.validation_sets.items()}
    atomic_write_json(folder / "data.json", facts)


def write_held_out(folder: Path, step: int, found: HeldOut, pairs: PairSet) -> None:
    """Writes held_out.npz, whole or not at all: `step`, `logps_N2`, `ref_N2` (NaN where the loss reads no reference)
    and `rewards_N2` (fp32), `counts_N2` (int32), `origins` (`file:record`) and `prompts` (int32, one
    number for all pairs of a prompt) of all held-out pairs, in their order.
    """
    origins = np.array([pairs.origin(index) for index in range(len(pairs))])
    with atomic_path(folder / _HELD_OUT) as temp, temp.open("wb") as file:
        np.savez_compressed(
            file,
            step=np.int64(step),
            logps_N2=found.logps_N2,
            ref_N2=found.ref_N2,
            rewards_N2=found.rewards_N2,
            counts_N2=found.counts_N2,
            origins=origins,
            prompts=pairs.prompts,
        )


def effective_pairs(found: HeldOut, pairs: PairSet) -> dict[str, float]:
    """`eval_effective_pairs`, by the accuracy: nothing where each pair has a prompt of its own."""
    prompts_N = pairs.prompts
    if prompts_N.max() + 1 == len(pairs):
        return {}
    hits_N = preferred(found.rewards_N2[:, 0] - found.rewards_N2[:, 1])
    return {"eval_effective_pairs": effective_count(hits_N, prompts_N)}


def histograms_of(found: HeldOut) -> dict[str, np.ndarray]:
    """What TensorBoard shows of the held-out pairs, by name; without margins where the loss reads no reference."""
    shown = {
        "held_out/margin_nats": found.margins_N,
        "held_out/reward_chosen": found.rewards_N2[:, 0],
        "held_out/reward_rejected": found.rewards_N2[:, 1],
        "held_out/chosen_less_rejected_tokens": found.length_gaps_N,
    }
    return {name: values_N for name, values_N in shown.items() if not np.isnan(values_N).any()}


def drop_held_out(folder: Path, done: int) -> None:
    """Removes a held_out.npz of a step beyond `done`, which is made again, and one that cannot be read."""
    path = folder / _HELD_OUT
    with contextlib.suppress(OSError):
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                beyond = int(found["step"]) > done
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
            beyond = True
        if beyond:
            path.unlink()


def weight_facts(own: Iterable[torch.Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """`weights/median`: the median absolute value of weights of which each rank has a part, `own` (collective), as
    bf16 rounds it; `weights/bits`: bits of the significand that they are computed with."""
    counts = torch.zeros(_MAGNITUDES, dtype=torch.int64, device=device)
    for tensor in own:
        for part in tensor.detach().flatten().split(_COUNTED_AT_ONCE):
            patterns = part.to(torch.bfloat16).view(torch.int16).to(torch.int64) & (_MAGNITUDES - 1)
            counts += torch.bincount(patterns, minlength=_MAGNITUDES)
    cumulated = all_reduce_sum(counts).cumsum(0)
    if not (total := int(cumulated[-1])):
        return {}
    middle = torch.searchsorted(cumulated, torch.tensor((total + 1) // 2, device=device)).to(torch.int16)
    median = middle.view(torch.bfloat16).item()
    return {"weights/median": median, "weights/bits": float(_SIGNIFICAND_BITS[dtype])}
