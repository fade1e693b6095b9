"""Do we and TRL compute the same thing? Log-probs, loss and every parameter's gradient, in fp32, before any speed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.peers import Peer, TrlSettings
from simple_llama.common.errors import UserError
from simple_llama.interop.hf_names import from_hf
from simple_llama.pretraining.weights import WeightsFile, build_model
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy, pair_logps
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss

MOST = 1e-4  # largest relative difference of two honest fp32 computations


class Computed(NamedTuple):
    """What one side gives for the mean loss of a few pairs."""

    logps_B2: torch.Tensor
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]  # by our names, on the CPU


def check_agreement(
    start: WeightsFile, pairs: Sequence[TokenizedPair], settings: TrlSettings, device: torch.device
) -> str:
    """Says how far the two sides are apart; UserError where that is more than rounding."""
    settings = replace(settings, numerics="fp32", batch_size=len(pairs), accumulate=1)
    ours, ref_B2 = our_side(start, pairs, settings.beta, device)
    theirs = trl_side(start, pairs, ref_B2, settings, device)
    found = differences(ours, theirs)
    worst = max(found, key=lambda name: found[name])
    gradients = {name: value for name, value in found.items() if name.startswith("gradient")}
    line = (
        f"agreement with TRL in fp32 on {len(pairs)} pairs, relative differences: log-probs {found['log-probs']:.1e}, "
        f"loss {found['loss']:.1e}, gradients of {len(gradients)} parameters at most {max(gradients.values()):.1e} "
        f"({max(gradients, key=lambda name: gradients[name])})"
    )
    if not all(value <= MOST for value in found.values()):
        raise UserError(f"{line}; expected at most {MOST:g}, found {found[worst]:.1e} in {worst}: no speed is measured")
    return line


def our_side(
    start: WeightsFile, pairs: Sequence[TokenizedPair], beta: float, device: torch.device
) -> tuple[Computed, torch.Tensor]:
    """Our numbers, and the reference log-probs of both sides: some nats off ours, so that no coefficient is trivial."""
    loss_fn = PreferenceLoss("sigmoid", beta)
    policy = DPOPolicy(build_model(start, torch.float32, device), loss_fn)
    batch = PairBatch.pack(pairs).to(device)
    logps_B2 = pair_logps(policy.model, batch)
    noise = 10 * torch.randn(logps_B2.shape, generator=torch.Generator().manual_seed(0))
    ref_B2 = logps_B2 + noise.to(device)
    loss = policy(batch, ref_B2).loss / len(pairs)
    loss.backward()
    return Computed(logps_B2.cpu(), loss.detach().cpu(), gradients_of(policy.model)), ref_B2.cpu()


def trl_side(
    start: WeightsFile,
    pairs: Sequence[TokenizedPair],
    ref_B2: torch.Tensor,
    settings: TrlSettings,
    device: torch.device,
) -> Computed:
    """TRL's numbers, by its own collator, `compute_ref_log_probs` and `compute_loss`."""
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(start, pairs, ref_B2.numpy(), settings, device, folder)
        trainer, batch = peer.trainer, peer.first_batch()
        logps_B2 = torch.stack(trainer.compute_ref_log_probs(trainer.model, batch), dim=1)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        gradients = from_hf(gradients_of(trainer.model), start.architecture)
    return Computed(logps_B2.cpu(), loss.detach().cpu(), gradients)


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of all parameters, on the CPU; a parameter without one is an error."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient.cpu() for name, gradient in gradients.items() if gradient is not None}


def differences(ours: Computed, theirs: Computed) -> dict[str, float]:
    """Relative differences: largest of a log-prob, of the loss, and in norm of each parameter's gradient."""
    if ours.gradients.keys() != theirs.gradients.keys():
        odd = ours.gradients.keys() ^ theirs.gradients.keys()
        raise UserError(f"gradients: expected the same parameters on both sides, found {sorted(odd)} on one only")
    found = {
        "log-probs": float(((ours.logps_B2 - theirs.logps_B2) / theirs.logps_B2).abs().max()),
        "loss": float(((ours.loss - theirs.loss) / theirs.loss).abs()),
    }
    for name, gradient in ours.gradients.items():
        scale = theirs.gradients[name].norm()
        found[f"gradient of {name}"] = float((gradient - theirs.gradients[name]).norm() / scale)
    return found
