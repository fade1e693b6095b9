"""Writes docs/losses.md, the truth table of the preference losses, from the losses themselves: `make docs`."""

from __future__ import annotations

import functools
import inspect
import math
from pathlib import Path

from benchmarks.check_losses import SUM, VARIANTS, errors
from benchmarks.trl_losses import OUTCOMES, Outcome
from docs.settings import escaped
from simple_llama.common.files import atomic_write, read_json
from simple_llama.common.paths import root_path
from simple_llama.reinforcement_learning.rlhf.objective.losses import LOSSES
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.objective.scores import (
    divergence_scores,
    policy_weights,
    without_length,
)

PAGE = Path(root_path("docs", "losses.md"))
INTRODUCTION = f"""\
# Losses

Made by `make docs` from the losses; do not edit by hand.

    r_w, r_l = log pi / pi_ref of the chosen and the rejected answer, over all scored tokens
    d = r_w - r_l          f'(e^r_w) - f'(e^r_l) with another f_divergence
    d' = d of means over each answer's scored tokens
    p, m = log pi of an answer, and of its mean token

`loss_type` is a name of the first table, or a weighted sum such as `{SUM}` (MPO, arXiv:2411.10442). An
option that is not given has the default of its loss ([settings.md](settings.md#losses)); each loss of a sum has its
own. `nll_weight` w adds w times -m_w to any loss but sft and orpo, which have it themselves: RPO, arXiv:2404.19733, and
Llama 3's 0.2. Losses of one name differ between trainers: where ours is not that of others, or its beta does not carry
over, it is said. Losses that read no reference open no store, and neither ask for a reference pass nor hold a second
model. aot and aot_unpaired couple all pairs of an optimizer step, of all ranks: a pass without gradient makes the sums
first (a third slower), so that neither micro-batches nor ranks change what is learnt.
"""
STRENGTHS = """\
## Weights and gaps

A record may say how strong its preference is, `"weight": 2.0`, and how much better its chosen answer is by a reward
model or a person's scores, `"gap": 1.5` (chosen less rejected; it may be negative). Every loss multiplies a pair's
loss, likelihood term included, by its weight:

    loss of a step = (1 / pairs of the step) * sum over its pairs of weight * loss of the pair

(Where records have more than two answers, each record may count alike instead: [groups.md](groups.md).)
The sum is divided by the number of pairs, not by the sum of their weights: a pair pulls as its weight says, whatever
company it is in, and on any number of ranks. So weights of 2 throughout are twice the gradient (what AdamW and the clip
make of that is theirs); weights with a mean of 1 leave the scale of the loss as it is. A record without a weight has 1.
`loss` and `eval_loss` are of weighted pairs, and `pair_weight` and `eval_pair_weight` in the curves tell the mean
weight; rewards, accuracies and margins count each pair once, as `launch/evaluate.py` does.

Gaps are read by rpo_gap alone, which refuses pairs without one. Log-probs depend on neither: stores of the reference
serve whatever the weights are. A run's data digest changes with them, so none is resumed with others.
"""
SCORED = """\
## What is scored

The last answer and the token that ends it. Two settings of the data change that, and with it the names of pairs in the
store where a pair then scores other tokens than usual, and there alone; one store has all of them.

`score: all` takes all answers of a dialogue together. An answer is found as the last one of the chat up to it; a chat
format that writes earlier answers otherwise, as templates do that leave out what a model thought, is refused. Answers
that are common to both chats stand in the shared prefix, and are computed once: a margin does not see them, a
likelihood or a mean does.

`mask_end_token` leaves out the token that ends an answer, on both sides, as Llama 3 did (arXiv:2407.21783, Sec. 4.1.4):
it is in both answers, one of which the loss makes less likely. What opens an answer is never scored here. It is refused
beside score_tail.
"""
CHECKED = """\
## How they are checked

`first` is the loss of every pair before the first step, with default options. "sums": it depends on the pair, and is
computed in fp64 from the reference's sums and the counts. "chats": it reads no reference; then of eight pairs of the
first step, whose sums the model makes of each chat alone and padded. A run's held-out loss at step 0 must show it, and
each run compares its first optimizer step before it changes a weight: log-prob sums with those of the reference and of
chats alone, each pair's loss with what the loss gives of them in fp64, the weighted loss with their mean. With dropout
the sums cannot be foretold, only what the loss makes of them; the log says so. Of weighted pairs `first` is times the
mean weight.

`value` and `slope` are the largest differences in fp64 from a textbook that was written apart, from the papers, without
stable forms (`benchmarks/textbook_losses.py`, slopes by complex steps): 64 random pairs, weighted, for each divergence
and set of options, relative where a number is above 1, rounded up to a power of ten. Above 1e-10 a test fails.
Log-ratios of -1000, 0 and 1000 on each side, in fp32, give finite losses and slopes; so does an answer of which the
model is certain.

TRL 1.16 is what its trainers' own loss functions gave of the same pairs, one by one, when
`python -m benchmarks.trl_losses` last ran where it is installed; `value` is the largest difference.
"""
REWARDS = """\
## Rewards

`rewards/*` in the curves is what a loss implies that an answer is worth; of a sum, what its first loss implies.

| losses | reward |
|---|---|
| of log-ratios | beta r, of sums where the loss takes means too; beta f'(pi / pi_ref) with another divergence |
| `rdpo` | beta r + length_penalty times its scored tokens |
| `simpo`, `orpo` | beta m; orpo has none in its paper, this is TRL's |
| `sft` | m, an answer's mean log-prob a token |
| `cpo` | beta p |
| `slic` | p |
"""


def page() -> str:
    """The whole page."""
    about = ["| loss | what | reads |", "|---|---|---|"]
    checks = ["| loss | first | value | slope | TRL 1.16 | value |", "|---|---|---|---|---|---|"]
    told = outcomes()
    for name, loss in LOSSES.items():
        what = " ".join((inspect.getdoc(loss.function) or "").split())
        reads = ", ".join(word for field, word in _WORDS.items() if field in loss.fields_read(loss.defaults))
        about.append(f"| `{name}` | {escaped(what)} | {reads} |")
        checks.append(_checked(name, told[name]))
    checks.append(_checked(SUM, told[SUM]))
    divergences = ["## Divergences", "", inspect.cleandoc(divergence_scores.__doc__ or ""), ""]
    options = [line for title, what in _OPTIONS.items() for line in (title, "", inspect.cleandoc(what), "")]
    parts = [*about, "", *divergences, *options, STRENGTHS, SCORED, CHECKED, *checks, "", REWARDS]
    return "\n".join([INTRODUCTION, *parts])


_OPTIONS = {
    "## Length: ld_alpha": without_length.__doc__ or "",
    "## What the policy would write: weighting": policy_weights.__doc__ or "",
}


_WORDS = {
    "logps_B2": "policy",
    "ref_B2": "reference",
    "counts_B2": "token counts",
    "gaps_B": "gaps",
    "groups_B": "ranks",
}


def outcomes() -> dict[str, Outcome]:
    """What the comparison with TRL recorded, by loss."""
    return {name: Outcome(**found) for name, found in read_json(OUTCOMES).items()}


@functools.cache
def found_errors() -> dict[str, tuple[float, float]]:
    """The largest errors of value and slope over all options, by loss."""
    found: dict[str, tuple[float, float]] = {}
    for loss in VARIANTS:
        value, slope = errors(loss)
        before = found.get(loss.loss_type, (0.0, 0.0))
        found[loss.loss_type] = (max(value, before[0]), max(slope, before[1]))
    return found


def _checked(name: str, trl: Outcome) -> str:
    """A loss's line of the table of checks."""
    value, slope = (_power_of_ten(error) for error in found_errors()[name])
    return f"| `{name}` | {_first(name)} | {value} | {slope} | {escaped(trl.words)} | {trl.error} |"


def _first(name: str) -> str:
    """The first value of a loss with default options."""
    loss = PreferenceLoss(name)
    first = loss.at_start()
    return "chats" if not loss.needs_reference else "sums" if first is None else f"{first:.6f}"


def _power_of_ten(error: float) -> str:
    """A number rounded up, 1e-15 at least."""
    return f"1e{math.ceil(math.log10(max(error, 1e-15)))}"


if __name__ == "__main__":
    atomic_write(PAGE, page().encode())
