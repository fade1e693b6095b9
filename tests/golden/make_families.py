"""What transformers computes with the models of tests/families.py: families.safetensors. With `tests` on PYTHONPATH:

    python tests/golden/make_families.py --output tests/golden/families.safetensors

Made with transformers 5.23.0 and torch 2.13.0 on a CPU. It holds, for each family F: `F/logits` of some rows of the
chats (`rows_of`), `F/logps_B2` of the pairs, `F/loss` and `F/gradient/NAME`, in fp32, of a DPO step on a padded batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from families import BETA, CONFIGS, Pair, pairs, reference, weights

ROWS = (0, 1, 10, 500, 1999, 2000, 2030, 2035, 2046)  # of a chat whose logits are recorded, as far as it has them


class Computed(NamedTuple):
    """What one side gives for the pairs."""

    logits: torch.Tensor  # of `rows_of`, one after the other (rows, V)
    logps_B2: torch.Tensor
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]  # by their names in transformers


def rows_of(logits_TV: torch.Tensor) -> torch.Tensor:
    """The recorded rows of a chat's logits."""
    return logits_TV[[row for row in ROWS if row < len(logits_TV)]]


def chats(found: list[Pair]) -> list[list[int]]:
    """Whole chats: both of the first pair, then both of the second."""
    return [pair.prompt + answer for pair in found for answer in (pair.chosen, pair.rejected)]


def model_of(family: str) -> torch.nn.Module:
    """transformers' model in fp32, with our values."""
    from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    config = {key: value for key, value in CONFIGS[family].items() if key not in ("dtype", "torch_dtype")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).float().eval()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    model.load_state_dict(weights(family, shapes), strict=False)  # a tied head has the embeddings' value
    return model


def computed_by(model: torch.nn.Module) -> Computed:
    """A DPO step on all chats as one batch, padded at the right with token 0."""
    found = pairs()
    ids = [torch.tensor(chat) for chat in chats(found)]
    ids_NT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask_NT = torch.nn.utils.rnn.pad_sequence([torch.ones_like(chat) for chat in ids], batch_first=True)
    logits_NTV = model(input_ids=ids_NT, attention_mask=mask_NT, use_cache=False).logits
    logps = []
    for row, chat in enumerate(ids):
        prompt = len(found[row // 2].prompt)
        all_logps = F.log_softmax(logits_NTV[row, prompt - 1 : len(chat) - 1], dim=-1)
        logps.append(all_logps.gather(1, chat[prompt:, None]).sum())
    logps_B2 = torch.stack(logps).view(-1, 2)
    margins_B2 = logps_B2 - reference(logps_B2)
    loss = -F.logsigmoid(BETA * (margins_B2[:, 0] - margins_B2[:, 1])).mean()
    loss.backward()
    rows = [rows_of(logits_NTV[row, : len(chat)]) for row, chat in enumerate(ids)]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Computed(
        torch.cat(rows).detach(),
        logps_B2.detach(),
        loss.detach(),
        {name: gradient for name, gradient in gradients.items() if gradient is not None},
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file to make")
    output: Path = parser.parse_args().output
    tensors = {}
    for family in CONFIGS:
        made = computed_by(model_of(family))
        tensors |= {f"{family}/{name}": getattr(made, name) for name in ("logits", "logps_B2", "loss")}
        tensors |= {f"{family}/gradient/{name}": gradient for name, gradient in made.gradients.items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, output)


if __name__ == "__main__":
    main()
