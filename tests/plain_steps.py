"""Two optimizer steps in a plain loop without DeepSpeed, which those of settings_steps.py are held to."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.ours import PlainLoop
from settings_steps import State, flat, plan_of, step
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.run.start_engine import _build_policy
from simple_llama.reinforcement_learning.rlhf.run.step import portions

Case = dict[str, Any]  # values by dotted key; `reduce_once` is a setting of ours
Plain = tuple[list[float], list[State]]  # norms before the clip and states of two steps


def plain_steps(config: DPOConfig, inputs: Inputs) -> Plain:
    """Two steps on the micro-batches of both ranks, whose weights are halved: ZeRO divides by the number of ranks."""
    device = torch.device("cpu")
    with inputs.start.reading() as start:
        model = inputs.build_model(start, device)
        policy = _build_policy(config, model, PreferenceLoss.of(config), start.path)
        loop = PlainLoop(policy, start, config, device)
    plan, norms, states = plan_of(config, inputs, 2), [], []
    for index in range(2):
        both = [portions(plan.step(index), rank, inputs.data.train) for rank in range(2)]
        norms.append(step(loop, [part._replace(weight=part.weight / 2) for of_rank in both for part in of_rank]))
        moments = loop.optimizer.state
        states.append(flat({"weight": master.detach(), **moments[master]} for master in loop.masters.values()))
    return norms, states


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, in units of the expected norm."""
    return float((found - expected).norm() / expected.norm())


def as_json(case: Case) -> dict[str, Any]:
    """A DeepSpeed file's content."""
    content: dict[str, Any] = {}
    for path, value in case.items():
        *sections, name = path.split(".")
        at = content
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value
    content.pop("reduce_once", None)
    return content
