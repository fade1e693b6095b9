"""The model's configuration, pickled by module path in every checkpoint: names, order and defaults are upstream's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.common.paths import root_path


@dataclass
class TrainingConfig:
    """What a model was built and pretrained with. Checkpoints restore it without a call of `__init__`."""

    # === Paths and Dataset ===
    dataset_dir: str = root_path("simple_llama", "dataset", "short")  # tokenized training data
    tokenizer_path: str = root_path("simple_llama", "dataset", "bpe_8k.json")  # tokenizer JSON
    ckpt_dir: str = root_path("simple_llama", "pretraining", "checkpoints")  # folder for checkpoints
    log_file: str = root_path("simple_llama", "pretraining", "training_progress.txt")  # training progress

    # === Batch & Sequence ===
    batch_size: int = 4  # sequences a micro-batch
    max_seq_len: int = 2048  # tokens a sequence, at most
    tokens_per_update: int = 2**19  # tokens an optimizer step

    # === Model Architecture ===
    n_embd: int = 2048  # width of the hidden rows
    n_heads: int = 32  # attention heads
    n_layers: int = 24  # decoder blocks
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this
    eps: float = 1e-5  # added to the mean square in RMSNorm
    theta: int = 10_000  # base of the RoPE frequencies
    dropout: float = 0.0  # probability; 0 for pretraining

    # === MLA Hyperparameters ===
    use_mla: bool = False  # multi-head latent attention instead of multi-head attention
    q_lora_rank: int = 0  # width of the query bottleneck; 0 = none
    kv_lora_rank: int = 256  # width of the key/value bottleneck
    qk_nope_head_dim: int = 64  # width of a head's query/key part without position
    qk_rope_head_dim: int = 32  # width of a head's query/key part with RoPE
    v_head_dim: int = 64  # width of a head's value

    # === LoRA Hyperparameters ===
    use_lora: bool = False  # low-rank updates beside the attention projections
    lora_rank: int = 16  # rank of an update
    lora_alpha: int = 8  # an update is scaled by lora_alpha / lora_rank
    q_lora: bool = True  # update the queries
    k_lora: bool = False  # update the keys
    v_lora: bool = True  # update the values
    o_lora: bool = False  # update the output projection

    # === Performance Features ===
    use_flash_attention: bool = True  # upstream's switch; kept for its checkpoints
    enable_compilation: bool = True  # upstream's switch; kept for its checkpoints

    # === Training Schedule ===
    warmup_iterations: int = 500  # optimizer steps of warm-up
    max_lr: float = 1e-4  # learning rate after warm-up
    min_lr: float = 1e-5  # learning rate at the end of the cosine
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.1  # AdamW

    # === Evaluation ===
    eval_interval: int = 32  # optimizer steps between evaluations
    model_gen_multiplier: float = 1.5  # growth of the interval between sampled texts

    # === Training Tokens ===
    training_tokens: int = int(45e9)  # tokens to train on
    load_ckpt: bool = False  # resume from a checkpoint
    token_ckpt: int = int(1e9)  # tokens between checkpoints
    use_prev_scheduler: bool = True  # resume the schedule too

    # === Derived ===
    grad_accum_steps: int = field(init=False)  # micro-batches an optimizer step

    def __post_init__(self) -> None:
        micro_batch = self.batch_size * self.max_seq_len
        if self.tokens_per_update % micro_batch:
            raise UserError(
                f"tokens_per_update: expected a multiple of batch_size * max_seq_len = {micro_batch}, "
                f"found {self.tokens_per_update}"
            )
        self.grad_accum_steps = self.tokens_per_update // micro_batch


_SIZES = ("max_seq_len", "n_embd", "n_heads", "n_layers", "multiple_of")
_MLA_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MOST = {"n_layers": 1000, "max_seq_len": 2**31 - 1}  # far above any model; others: _MOST_WIDTH
_MOST_WIDTH = 2**24
_LARGEST_FLOAT = 3e38  # what fp32 can hold
_SWITCHES = ("use_mla", "use_lora", "q_lora", "k_lora", "v_lora", "o_lora")
_LORA_FIELDS = ("lora_rank", "lora_alpha", "q_lora", "k_lora", "v_lora", "o_lora")


def identity_fields(config: TrainingConfig) -> dict[str, Any]:
    """The fields that, with the weights, decide the model's output: two models that differ here are two models."""
    names = ["n_embd", "n_heads", "n_layers", "multiple_of", "eps", "theta", "use_mla", "use_lora"]
    names += ["q_lora_rank", *_MLA_SIZES] if config.use_mla else []
    names += _LORA_FIELDS if config.use_lora else []
    return {name: getattr(config, name) for name in names}


def check_model_config(config: TrainingConfig) -> None:
    """Raises UserError for the first value that no model can have. Checkpoints come from people: types count too."""
    for name in _SWITCHES:
        if type(getattr(config, name)) is not bool:
            raise UserError(f"{name}: expected True or False, found {shown(getattr(config, name))}")
    sizes = _SIZES + (_MLA_SIZES if config.use_mla else ()) + (("lora_rank",) if config.use_lora else ())
    for name in sizes:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise UserError(f"{name}: expected a whole number of at least 1, found {shown(value)}")
        if value > (most := _MOST.get(name, _MOST_WIDTH)):
            raise UserError(f"{name}: expected at most {most}, found {shown(value)}")
    for name in ("eps", "theta", *(("lora_alpha",) if config.use_lora else ())):
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 < value <= _LARGEST_FLOAT:
            raise UserError(f"{name}: expected a positive number, found {shown(value)}")
    if type(config.dropout) not in (int, float) or not 0 <= config.dropout < 1:
        raise UserError(f"dropout: expected a probability in [0, 1), found {shown(config.dropout)}")
    if config.n_embd % config.n_heads:
        raise UserError(f"n_embd: expected a multiple of n_heads = {config.n_heads}, found {config.n_embd}")
    if config.use_mla:
        _check_mla(config)
    elif (config.n_embd // config.n_heads) % 2:
        raise UserError(f"n_embd / n_heads: expected an even number for RoPE, found {config.n_embd // config.n_heads}")


def _check_mla(config: TrainingConfig) -> None:
    """The rules that only multi-head latent attention has."""
    if type(config.q_lora_rank) is not int or config.q_lora_rank < 0:
        raise UserError(f"q_lora_rank: expected a whole number of at least 0, found {shown(config.q_lora_rank)}")
    if config.q_lora_rank > _MOST_WIDTH:
        raise UserError(f"q_lora_rank: expected at most {_MOST_WIDTH}, found {shown(config.q_lora_rank)}")
    if config.qk_rope_head_dim % 2:
        raise UserError(f"qk_rope_head_dim: expected an even number for RoPE, found {config.qk_rope_head_dim}")
    if config.n_heads * config.v_head_dim != config.n_embd:
        raise UserError(
            f"v_head_dim: expected n_embd / n_heads = {config.n_embd // config.n_heads}, found {config.v_head_dim}"
        )
