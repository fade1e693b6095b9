"""Writes docs/one_pair.md: one shipped pair through the program, with all its numbers: `make docs`.

Nothing is computed here that training does not compute: the reader, the packing, the store and the step are its own.
Measured numbers have four digits after the point, and are the only ones on the page that have.
"""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from simple_llama.common.files import atomic_write
from simple_llama.common.paths import package_path, root_path
from simple_llama.dataset.json_records import Record
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.finetune.format_llm_prompt import encode_chat, format_chat
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.config import TrainingConfig
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation
from simple_llama.reinforcement_learning.rlhf.data.own_records import from_template
from simple_llama.reinforcement_learning.rlhf.data.pair_batch import PairBatch
from simple_llama.reinforcement_learning.rlhf.data.record_checks import ReadOptions
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair
from simple_llama.reinforcement_learning.rlhf.objective.coupling import Pull
from simple_llama.reinforcement_learning.rlhf.objective.losses import Scores
from simple_llama.reinforcement_learning.rlhf.objective.policy import DPOPolicy, PolicyOutput, pair_logps
from simple_llama.reinforcement_learning.rlhf.objective.preference_loss import PreferenceLoss
from simple_llama.reinforcement_learning.rlhf.reference.ref_source import from_store
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore, reference_id
from simple_llama.reinforcement_learning.rlhf.run.metrics import MetricSums
from simple_llama.reinforcement_learning.rlhf.run.step import Portion, accumulate

PAGE = Path(root_path("docs", "one_pair.md"))
RECORD = 242  # of the shipped pairs: the shortest one
MODEL: dict[str, Any] = {"n_embd": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 16, "max_seq_len": 512}
SEED = 7
BETA = 0.5
RATE = 1e-3  # learning rate of the one step
CPU = torch.device("cpu")


class Learner:
    """The plainest thing that a step can drive: a policy, AdamW and a clip, without DeepSpeed."""

    def __init__(self, policy: DPOPolicy):
        self.policy = policy
        self.loss_fn = policy.loss_fn
        self.optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)

    def logps(self, batch: PairBatch) -> torch.Tensor:
        """Log-prob sums, without gradient."""
        return pair_logps(self.policy.model, batch)

    def backward(
        self, batch: PairBatch, ref_logps_B2: torch.Tensor, weight: float, last: bool, pull: Pull | None = None
    ) -> PolicyOutput:
        """Adds `weight` times the gradient of the summed loss."""
        out = self.policy(batch, ref_logps_B2, pull, weight)
        out.loss.backward()
        return out

    def step(self, rate: float) -> float:
        """Clips at 1, moves the weights, gives the norm before the clip."""
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


class Scored(NamedTuple):
    """What the policy makes of the pair at one moment."""

    logps: list[float]  # sums of chosen and rejected, nats
    margin: float
    loss: float


class Walk(NamedTuple):
    """Everything that the page shows."""

    record: dict[str, list[str]]
    conversation: Conversation
    tokenizer: Tokenizer
    pair: TokenizedPair
    batch: PairBatch
    stored: list[float]  # the reference's sums, as read from the store
    before: Scored
    coefficients: list[float]  # d loss / d log-prob sum of chosen and rejected
    norm: float
    after: Scored


def walk() -> Walk:
    """One pair through the program: read, tokenized, packed, scored by the reference, and one optimizer step."""
    path = Path(package_path("reinforcement_learning", "rl_dataset", "curated_safety.json"))
    fields = json.loads(path.read_text())[RECORD - 1]
    tokenizer = load_tokenizer(package_path("dataset", "bpe_8k.json"))
    said = from_template(Record(path.name, RECORD, fields), ReadOptions())
    assert isinstance(said, Conversation), "a record of two answers"
    chosen = encode_chat(tokenizer, said.system or "", said.users, said.chosen)
    rejected = encode_chat(tokenizer, said.system or "", said.users, said.rejected)
    pair = TokenizedPair.from_chats(*chosen, *rejected)
    batch = PairBatch.pack([pair])

    torch.manual_seed(SEED)
    config = TrainingConfig(batch_size=1, tokens_per_update=512, **MODEL)
    model = LLaMaTransformer(Architecture.of(config, tokenizer.get_vocab_size()))
    with tempfile.TemporaryDirectory() as folder:
        store = RefStore.open(folder, reference_id("the model's digest", "the tokenizer's", {}))
        store.add(batch.keys, pair_logps(model, batch).numpy())
        reference = from_store(store)

    loss = PreferenceLoss(beta=BETA)
    policy = DPOPolicy(model, loss)
    before = score(policy, batch, reference(batch))
    coefficients = slopes(loss, batch, reference(batch), before.logps)
    learner = Learner(policy)
    accumulate(learner, [Portion(batch, 1.0, True)], reference, MetricSums(CPU), CPU)
    norm = learner.step(RATE)
    after = score(policy, batch, reference(batch))
    stored = reference(batch)[0].tolist()
    return Walk(fields, said, tokenizer, pair, batch, stored, before, coefficients, norm, after)


def score(policy: DPOPolicy, batch: PairBatch, ref_logps_B2: torch.Tensor) -> Scored:
    """The policy's sums, their margin over the reference, and the loss."""
    with torch.no_grad():
        out = policy(batch, ref_logps_B2)
    ratios = (out.logps_B2 - ref_logps_B2)[0].tolist()
    return Scored(out.logps_B2[0].tolist(), ratios[0] - ratios[1], float(out.loss))


def slopes(loss: PreferenceLoss, batch: PairBatch, ref_logps_B2: torch.Tensor, logps: Sequence[float]) -> list[float]:
    """d loss / d log-prob sum of chosen and rejected: what multiplies the gradient of each sum."""
    logps_B2 = torch.tensor([logps], requires_grad=True)
    loss(Scores(logps_B2, ref_logps_B2, batch.counts_B2)).sum().backward()
    assert logps_B2.grad is not None
    return logps_B2.grad[0].tolist()


def page() -> str:
    """The whole page."""
    seen = walk()
    parts = (INTRODUCTION, _read(seen), _tokens(seen), _packed(seen), _scored(seen), _stepped(seen))
    return "\n\n".join(_filled(block) for part in parts for block in part.strip().split("\n\n")) + "\n"


INTRODUCTION = f"""
# One pair through the program

Made by `make docs` (docs/one_pair.py), which calls what training calls; a test makes the numbers again.
Do not edit by hand.

The pair is record {RECORD} of `curated_safety.json`. The model is the tests' tiny one with random weights (two
layers, 32 wide, the shipped tokenizer's 8,192 tokens), in fp32: every number is small enough to follow, and none says
anything about preferences. Log-probs are natural logarithms (nats). Paths are below `simple_llama/`, or its
`reinforcement_learning/rlhf/`.
"""


def _read(seen: Walk) -> str:
    """The record and one of its chats."""
    said = seen.conversation
    record = "\n".join(_wrap(f"{json.dumps(key)}: {json.dumps(value)}") for key, value in seen.record.items())
    chat = _wrap(format_chat(said.system or "", said.users, said.chosen).replace("\n\n", "\n"))
    return f"""
## 1. The record

`data/own_records.py` reads this as a conversation with two answers:

```
{record}
```

Each answer makes a chat (`finetune/format_llm_prompt.py`). That of the accepted one, called chosen from here on, but
for the empty line between system prompt and user:

```
{chat}
```
"""


def _tokens(seen: Walk) -> str:
    """The tokens of both chats, the scored ones in brackets."""
    pair, parts = seen.pair, []
    for name, ids, scored in (
        ("prefix, the same in both chats", pair.prefix, 0),
        ("chosen", pair.chosen, pair.chosen_scored),
        ("rejected", pair.rejected, pair.rejected_scored),
    ):
        shown = [_token(seen.tokenizer, token) for token in ids]
        if scored:
            shown[-scored], shown[-1] = "[" + shown[-scored], shown[-1] + "]"
        parts.append(f"{name}: {len(ids)} tokens, {scored} scored\n{_wrap('|'.join(shown))}")
    listing = "\n".join(parts)
    return f"""
## 2. The tokens

Up to the last answer both chats are the same. Scored is the last answer with its `<EOA>`, in brackets here; a bar
stands between two tokens (`data/tokenized_pair.py`: TokenizedPair).

```
{listing}
```
"""


def _packed(seen: Walk) -> str:
    """The stream, its positions, and who sees whom."""
    pair, batch = seen.pair, seen.batch
    shared, chosen, rejected = len(pair.prefix), len(pair.chosen) - 1, len(pair.rejected) - 1
    parts = []
    for name, start, count in (
        ("prefix", 0, shared),
        ("chosen", shared, chosen),
        ("rejected", shared + chosen, rejected),
    ):
        first, last = batch.positions_T[start], batch.positions_T[start + count - 1]
        parts.append(f"| {name} | {start} to {start + count - 1} | {first} to {last} |")
    predicted = []
    for i in (0, 1, pair.chosen_scored - 1, pair.chosen_scored, pair.chosen_scored + 1, len(batch.rows_N) - 1):
        row, token = int(batch.rows_N[i]), _token(seen.tokenizer, int(batch.targets_N[i]))
        of = "chosen" if i < pair.chosen_scored else "rejected"
        predicted.append(f"| {row} | `{token}` | {of} | {_sees(batch, row)} |")
    listing, rows = "\n".join(parts), "\n".join(predicted)
    return f"""
## 3. One packed sequence

The pair is one stream of {len(batch.tokens_T)} rows in the place of two chats of {pair.chosen_len} and
{pair.rejected_len} tokens (PairBatch). The last token of an answer predicts nothing and is left out.

| part | rows | positions |
|---|---|---|
{listing}

Both answers start at the position behind the prefix, and neither sees the other (`ops/attention.py`: PackedLayout). The
last row of the prefix predicts the first token of both. Some of the {len(batch.rows_N)} scored rows:

| row | predicts | of | sees rows |
|---|---|---|---|
{rows}
"""


def _scored(seen: Walk) -> str:
    """Log-prob sums, the store, margin and loss before the step."""
    pair, before = seen.pair, seen.before
    return f"""
## 4. Log-probs and the reference

Only the {len(seen.batch.rows_N)} scored rows meet the vocabulary matrix (`ops/logprob.py`). A model that knows nothing
gives each of 8,192 tokens about -ln 8192 = -9.01 nats. The frozen model's sums were computed once, and lie in the store
under the pair's digest, `{pair.digest.hex()}` (`reference/ref_store.py`). Training starts from the same weights, so the
policy's sums are the same:

| | chosen | rejected |
|---|---|---|
| scored tokens | {pair.chosen_scored} | {pair.rejected_scored} |
| reference's sum, from the store | {seen.stored[0]:.4f} | {seen.stored[1]:.4f} |
| policy's sum | {before.logps[0]:.4f} | {before.logps[1]:.4f} |
| the same, a token | {before.logps[0] / pair.chosen_scored:.4f} | {before.logps[1] / pair.rejected_scored:.4f} |

## 5. Margin, loss, coefficients

The margin is what the policy has gained over the reference on the chosen answer, less what it has gained on the
rejected one: d = {_number(before.margin)}. With beta = {BETA} the loss is -log sigmoid(beta d) = {before.loss:.4f},
which is ln 2 (`objective/ratio_losses.py`).

Its slope is {seen.coefficients[0]:.4f} for the chosen sum and {seen.coefficients[1]:.4f} for the rejected one: minus
and plus beta sigmoid(-beta d). These two coefficients are all that the rest of the backward pass knows of the loss:
they multiply the gradients of the two sums, within the same pass over the vocabulary that made the log-probs.
"""


def _stepped(seen: Walk) -> str:
    """The gradient, and what one step changes."""
    before, after = seen.before, seen.after
    old, new = ([mine - its for mine, its in zip(at.logps, seen.stored, strict=True)] for at in (before, after))
    return f"""
## 6. A step

The norm of the whole gradient is {seen.norm:.4f}. It is clipped to 1, and AdamW moves the weights at a learning rate of
{RATE} (`run/step.py`; here without DeepSpeed, and with this pair alone). Then:

| | before | after |
|---|---|---|
| chosen: policy's sum less the reference's | {_number(old[0])} | {_number(new[0])} |
| rejected: the same | {_number(old[1])} | {_number(new[1])} |
| margin d | {_number(before.margin)} | {_number(after.margin)} |
| reward margin, beta d | {_number(BETA * before.margin)} | {_number(BETA * after.margin)} |
| loss | {before.loss:.4f} | {after.loss:.4f} |

The stored reference is as before; the policy alone has moved. What a run adds (many pairs a step, several ranks, a
learning rate that warms up, evaluations, checkpoints) is in [code.md](code.md).
"""


def _number(value: float) -> str:
    """Four digits, and no sign for a zero."""
    return f"{value:.4f}" if abs(value) >= 5e-5 else "0.0000"


def _filled(block: str) -> str:
    """A paragraph in lines of 120 characters; headings, tables and listings as they are."""
    return block if block.startswith(("#", "|", "```")) else textwrap.fill(block, 120, break_on_hyphens=False)


def _sees(batch: PairBatch, row: int) -> str:
    """The rows that a row sees, itself the last."""
    (block,) = [block for block in batch.layout.blocks if block.start <= row < block.start + block.rows]
    own = f"{block.start} to {row}"
    return f"{block.prefix_start} to {block.prefix_start + block.prefix - 1}, {own}" if block.prefix else own


def _token(tokenizer: Tokenizer, token: int) -> str:
    """A token as text on one line."""
    return tokenizer.decode([token], skip_special_tokens=False).replace("\n", "\\n")


def _wrap(text: str) -> str:
    """Lines of at most 110 characters; a break stands for the space before it."""
    return "\n".join(textwrap.fill(line, 110, break_on_hyphens=False) for line in text.split("\n"))


if __name__ == "__main__":
    atomic_write(PAGE, page().encode())
