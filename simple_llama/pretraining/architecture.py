"""What a model's layers read, and nothing else: sizes and switches of one architecture, whichever family it is of.

Made from TrainingConfig for SimpleLLaMA's own checkpoints. Numbers that follow from others are derived here, once.
"""

from __future__ import annotations

from dataclasses import dataclass

from simple_llama.common.errors import UserError
from simple_llama.pretraining.config import TrainingConfig, check_model_config
from simple_llama.pretraining.rotary import RopeScaling


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values come from one narrow row."""

    query_rank: int  # width of the query bottleneck; 0 = none
    key_rank: int  # width of the key/value bottleneck
    plain_width: int  # width of a head's query/key part without position


LORA_TARGETS = ("q", "k", "v", "o", "w1", "w2", "w3")  # linear layers of a decoder block that may have an update
LORA_MARK = "_lora_layer."  # in the name of each tensor of an update, behind its layer's
ATTENTION_TARGETS = LORA_TARGETS[:4]  # those that SimpleLLaMA's own checkpoints can have


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates beside linear layers of the decoder blocks (arXiv:2106.09685)."""

    rank: int  # of an update
    alpha: float  # an update is scaled by alpha / rank
    targets: tuple[str, ...]  # which layers have one: of LORA_TARGETS
    rank_stabilized: bool = False  # scaled by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)

    @property
    def scale(self) -> float:
        """What an update is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@dataclass(frozen=True)
class Architecture:
    """All that decides a model's tensors and, with their values, its output. UserError for sizes that do not fit."""

    # === Sizes ===
    vocab_size: int  # tokens it knows
    max_seq_len: int  # tokens of a sequence, at most
    width: int  # of the hidden rows
    layers: int  # decoder blocks
    heads: int  # query heads
    key_heads: int  # key and value heads: each serves heads / key_heads query heads (arXiv:2305.13245)
    rope_width: int  # width of a head's query/key part that RoPE turns; all of it without `latent`
    value_width: int  # width of a head's value
    hidden_width: int  # of the feed-forward

    # === Numbers ===
    eps: float = 1e-5  # added to the mean square in RMSNorm
    theta: float = 10_000  # base of the RoPE frequencies
    rope_scaling: RopeScaling | None = None  # how the frequencies were stretched for longer sequences
    dropout: float = 0.0  # probability, in training

    # === Parts ===
    latent: Latent | None = None  # latent attention instead of multi-head attention
    lora: LoRA | None = None
    qkv_bias: bool = False  # biases of the query, key and value projections
    out_bias: bool = False  # bias of the output projection
    ffwd_bias: bool = False  # biases of the feed-forward
    qk_norm: bool = False  # RMSNorm of each query and key before RoPE; not with `latent`
    tied_head: bool = False  # the vocabulary matrix is the embeddings

    def __post_init__(self) -> None:
        if self.heads % self.key_heads:
            raise UserError(f"key_heads: expected a divisor of heads = {self.heads}, found {self.key_heads}")
        if self.rope_width % 2:
            raise UserError(f"rope_width: expected an even number for RoPE, found {self.rope_width}")
        if self.latent and (self.qk_norm or self.key_heads != self.heads):
            raise UserError("latent attention: expected a key for each head and no qk_norm, found others")

    @property
    def key_width(self) -> int:
        """Width of a head's query and key."""
        return self.rope_width + (self.latent.plain_width if self.latent else 0)

    @classmethod
    def of(cls, config: TrainingConfig, vocab_size: int) -> Architecture:
        """The architecture of a SimpleLLaMA checkpoint. UserError for a value that no such model can have."""
        check_model_config(config)
        head_width, latent, lora = config.n_embd // config.n_heads, None, None
        if config.use_mla:
            latent = Latent(config.q_lora_rank, config.kv_lora_rank, config.qk_nope_head_dim)
        if config.use_lora:
            targets = tuple(name for name in "qkvo" if getattr(config, f"{name}_lora"))
            lora = LoRA(config.lora_rank, config.lora_alpha, targets)
        return cls(
            vocab_size=vocab_size,
            max_seq_len=config.max_seq_len,
            width=config.n_embd,
            layers=config.n_layers,
            heads=config.n_heads,
            key_heads=config.n_heads,
            rope_width=config.qk_rope_head_dim if config.use_mla else head_width,
            value_width=config.v_head_dim if config.use_mla else head_width,
            hidden_width=_feed_forward_width(config.n_embd, config.multiple_of),
            eps=config.eps,
            theta=config.theta,
            dropout=config.dropout,
            latent=latent,
            lora=lora,
            qkv_bias=config.use_mla,  # upstream's latent attention has biases, its multi-head attention none
            out_bias=config.use_mla,
        )


def _feed_forward_width(width: int, multiple_of: int) -> int:
    """8/3 of the width, so that three matrices weigh as much as two of 4 * width, rounded up to `multiple_of`."""
    return multiple_of * -(-int(4 * width * (2 / 3)) // multiple_of)
