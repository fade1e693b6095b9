"""What a run reads: the tokenizer, the pairs, the SFT model, and the identity of the frozen reference."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from typing_extensions import Doc

from simple_llama.cluster import watchdog
from simple_llama.cluster.distributed import Ranks, broadcast_object, fail_together, require_same
from simple_llama.cluster.start_phases import PHASES
from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.common.logging import LOGGER
from simple_llama.common.paths import package_path, root_path
from simple_llama.common.settings import PathText, Settings
from simple_llama.dataset.own_tokenizer import OwnTokenizer
from simple_llama.dataset.tokenizer import is_simple_llama, token_count, tokenizer_digest
from simple_llama.finetune.chat_config import ChatConfig, own_chat, simple_llama_chat
from simple_llama.finetune.chat_format import ChatFormat, about_system
from simple_llama.interop.adapted_start import AdaptedStart, adapted, base_of, reference_of
from simple_llama.interop.adapters import AdapterConfig
from simple_llama.interop.hf_tokenizer import tokenizer_at
from simple_llama.interop.open_start import open_start
from simple_llama.interop.own_checkpoints import tokenizer_for_others
from simple_llama.ops.attention import ATTENTION_VERSION
from simple_llama.ops.logprob import HEAD_VERSION
from simple_llama.pretraining.architecture import Architecture
from simple_llama.pretraining.llama_transformer import LLaMaTransformer
from simple_llama.pretraining.start_file import StartFile
from simple_llama.pretraining.start_model import StartModel
from simple_llama.pretraining.weights import Loaded, build_model, empty_model
from simple_llama.reinforcement_learning.rlhf.data.dataset_loader import DataConfig, RLDatasetLoader, pair_reader
from simple_llama.reinforcement_learning.rlhf.data.find_pairs import TokenCache, is_large, make_share
from simple_llama.reinforcement_learning.rlhf.data.scored_tokens import Scoring
from simple_llama.reinforcement_learning.rlhf.data.sources import Sources
from simple_llama.reinforcement_learning.rlhf.engine.ds_config import EngineConfig, model_dtype, read_ds_config
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import reference_id

_PACKAGES = ("torch", "deepspeed", "tokenizers", "numpy", "safetensors", "tensorboard", "simple-llama-dpo")

TOKENIZER_KEY = "tokenizer_digest"  # in the metadata of a .pth that was made of a folder: of the one that belongs to it


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Which model."""

    # === Model ===
    model_path: Annotated[
        PathText,
        Doc(
            "the model to start from: a .pth file, a folder whose newest .pth is taken, or a Hugging Face folder "
            "(config.json, safetensors); adapters alone that name their base"
        ),
    ] = root_path("simple_llama", "finetune", "full_sft", "sft_checkpoints")
    tokenize_path: Annotated[
        PathText,
        Doc("tokenizer JSON; left at its default, a Hugging Face or GGUF model has its own; a folder: the one in it"),
    ] = package_path("dataset", "bpe_8k.json")

    adapter_path: Annotated[
        str,
        Doc(
            "adapters to stand beside it, which alone are trained: a folder of peft's form, or a file of SimpleLLaMA's "
            "LoRA script; empty: none"
        ),
    ] = ""


@dataclass(frozen=True)
class ChatModelConfig(ChatConfig, ModelConfig):
    """Which model, and how it chats."""


@dataclass(frozen=True)
class InputsConfig(AdapterConfig, EngineConfig, DataConfig, ChatModelConfig):
    """What decides the inputs: the models' and the tokenizer's files, the data, and how the model is computed."""

    # === Reference ===
    reference_path: Annotated[
        str,
        Doc("the model that rewards are measured from, in any form that model_path may have; empty: the start"),
    ] = ""

    def check_rules(self) -> None:
        """UserError where what follows an end token is scored, and the end token is not, or for two references."""
        if self.mask_end_token and self.score_tail:
            raise UserError(
                "mask_end_token: expected no score_tail beside it, which scores the end token and what follows it; "
                "leave one of both out"
            )
        if self.reference_path and self.reference_without_adapters:
            raise UserError(
                "reference_without_adapters: expected no reference_path beside it, which names another reference; "
                "leave one of both out"
            )


@dataclass(frozen=True)
class Inputs:
    """Everything read from disk before the first computation."""

    chat: ChatFormat  # with its tokenizer
    data: RLDatasetLoader
    start: StartModel  # the model that the policy starts as
    dtype: torch.dtype  # of the computing weights
    max_seq_len: int
    tokenizer: str  # digest of the chats' tokenizer
    numerics: dict[str, str]  # what else than weights decides the reference's output
    given_tokenizer: OwnTokenizer | None = None  # of `tokenize_path`, for exports; None: the model's own
    kept_digest: str | None = None  # of a .pth that was made of a folder: what its exports keep under TOKENIZER_KEY
    other_reference: StartModel | None = None  # where that is not the start model

    @cached_property
    def reference_id(self) -> dict:
        """What names the reference: weights, tokenizer, numerics. Waits for its digest (StartModel)."""
        return reference_id(self.reference.digest, self.tokenizer, self.numerics)

    def build_model(
        self, start: Loaded, device: torch.device | str, dropout: float = 0.0, unread: Collection[str] = ()
    ) -> LLaMaTransformer:
        """The start model in the computing dtype, from `start.reading()`: its fp32 copy does not stay in memory.

        Args: unread: names of weights that are 0 for now: whoever sets them checks them.
        """
        return build_model(start, self.dtype, device, dropout, unread)

    def build_reference(self, device: torch.device | str) -> LLaMaTransformer:
        """The reference model. Raises UserError where it was not made of what `reference_id` names."""
        with self.reference.reading() as reference:
            return self.build_model(reference, device)

    @property
    def reference(self) -> StartModel:
        """The model that rewards are measured from."""
        return self.other_reference or reference_of(self.start)

    @property
    def adapters(self) -> dict[str, Any] | None:
        """What a resumed run must share of the adapters that alone are trained; None without such."""
        return self.start.about if isinstance(self.start, AdaptedStart) else None

    @property
    def about_adapters(self) -> str:
        """The adapters that are trained, in words; "" without such."""
        if not isinstance(self.start, AdaptedStart):
            return ""
        lora = self.start.adapters.lora
        whose = self.start.adapters.source or "fresh"
        return f"rank {lora.rank}, scale {lora.scale:g}, on {', '.join(lora.targets)}, {whose}"

    @property
    def without_adapters(self) -> bool:
        """Whether the policy without its adapters is the reference."""
        return not self.other_reference and self.reference is not self.start

    @property
    def starts_as_reference(self) -> bool:
        """Whether the policy before the first step computes what the reference does."""
        return not self.other_reference and self.reference.digest == self.start.digest

    @property
    def architecture(self) -> Architecture:
        """The model's shape."""
        return self.start.architecture

    @property
    def data_digest(self) -> str:
        """Hex digest of all pairs in order, training then held-out, and of how often an epoch has them."""
        return self.data.digest.hex()


class _Opened(NamedTuple):
    """What is known before the data are read."""

    start: StartModel
    chat: ChatFormat
    given_tokenizer: OwnTokenizer | None
    tokenizer: str  # digest
    kept_digest: str | None
    dtype: torch.dtype
    max_seq_len: int


def load_inputs(
    config: InputsConfig, ranks: Ranks, known: Inputs | None = None, ref_cache_dir: str = "", settled: bool = True
) -> Inputs:
    """Reads and checks all inputs on every rank, then that all ranks have read the same (collective). Weights that are
    not finite are found where a model is made of them.

    Args:
        known: those of another model for the same data settings; the data is not read again where this model's chats
            become tokens as that one's do.
        ref_cache_dir: where tokens of large files are kept, beside the reference stores; empty: nowhere.
        settled: whether `settle_models` is called too. Otherwise the models are still being digested, and the caller
            has time for what needs no digest.

    Raises UserError with the file and what is wrong, or with the host and rank that differ from rank 0.
    """
    with fail_together(ranks):
        opened = _open(config)
    if known and broadcast_object(_reads_alike(known, opened), ranks, bool):
        data = known.data
    else:
        cache = TokenCache(Path(ref_cache_dir) / "tokens", config.verify_data) if ref_cache_dir else None
        data = _read_data(config, opened, cache, ranks)
    with fail_together(ranks):
        inputs = _joined(config, opened, data)
    if known is None:
        LOGGER.info("system prompt: %s", about_system(inputs.chat))
    require_same("package versions", versions(), ranks)
    require_same("settings", asdict(config), ranks)
    require_same("data set (digest)", inputs.data_digest, ranks)
    require_same("what ends an answer (token ids)", sorted(inputs.chat.stop_ids), ranks)
    # before an engine is made, whose ranks exchange tensors of these shapes
    shape = {name: str(value) for name, value in asdict(inputs.start.architecture).items()}
    require_same("start model (architecture)", {**shape, **inputs.start.numerics}, ranks)
    if settled:
        settle_models(inputs, ranks)
    return inputs


def settle_models(inputs: Inputs, ranks: Ranks) -> None:
    """Waits for the models' digests, then checks that all ranks have the same ones (collective). Nothing that was made
    of the weights may be used before. UserError."""
    with watchdog.patience("digesting the models"), fail_together(ranks):
        digests = inputs.start.digest, inputs.reference_id
    PHASES.ended("digest")
    require_same("start model (digest)", digests[0], ranks)
    require_same("reference model (digests)", digests[1], ranks)


def _open(config: InputsConfig) -> _Opened:
    """The start model and the format of its chats, as this rank sees them."""
    dtype = model_dtype(read_ds_config(config))
    start = adapted(open_start(config.model_path, beside=True), config, config.adapter_path)
    chat, given_tokenizer = chat_format(config, start)
    empty_model(start.load())
    digest, kept = check_tokenizer(chat, config, start)
    architecture = start.architecture
    max_seq_len = config.max_seq_len or architecture.max_seq_len
    if max_seq_len > architecture.max_seq_len:
        window = ", its sliding window" if start.slides else ""
        raise UserError(
            f"max_seq_len: expected at most the model's {architecture.max_seq_len} tokens{window} ({start.path}), "
            f"found {config.max_seq_len}"
        )
    return _Opened(start, chat, given_tokenizer, digest, kept, dtype, max_seq_len)


def _read_data(config: InputsConfig, opened: _Opened, cache: TokenCache | None, ranks: Ranks) -> RLDatasetLoader:
    """The pairs, read by each rank for itself; of large data, whose tokens are kept, each makes a share of them first,
    then rank 0 puts them together, and the others find that (collective)."""
    if not (cache and _keeps_tokens(config, ranks)):
        with fail_together(ranks):
            return _pairs_of(config, opened, None)
    if ranks.world_size > 1:
        with fail_together(ranks):
            sources = Sources.of(config.rlhf_dataset_path, config.validation_path)
            reader = pair_reader(opened.chat, opened.max_seq_len, sources, **_reading(config))
            make_share(reader, sources, cache, ranks.rank, ranks.world_size)
    with fail_together(ranks):
        first = _pairs_of(config, opened, cache) if ranks.is_main else None
    with fail_together(ranks):
        return first or _pairs_of(config, opened, cache)


def _keeps_tokens(config: InputsConfig, ranks: Ranks) -> bool:
    """Whether the data are so large that their tokens are kept, by rank 0's word (collective)."""
    with fail_together(ranks):
        large = ranks.is_main and is_large(Sources.of(config.rlhf_dataset_path, config.validation_path))
    return broadcast_object(large, ranks, bool)


def _reading(config: InputsConfig) -> dict[str, Any]:
    """How records become pairs, as `pair_reader` takes it."""
    return {
        "seed": config.seed,
        "ascii_text": config.ascii_text,
        "scoring": Scoring(config.score, config.mask_end_token),
        "compared": config.pairs,
        "reading": config,
        "overlong": config.overlong,
        "contradictions": config.contradictions,
    }


def _pairs_of(config: InputsConfig, opened: _Opened, cache: TokenCache | None) -> RLDatasetLoader:
    """The pairs as this rank sees them."""
    return RLDatasetLoader(
        config.rlhf_dataset_path,
        opened.chat,
        opened.max_seq_len,
        val_share=config.held_out_share,
        max_unknown=config.max_unknown,
        group_weight=config.group_weight,
        group_prompts=config.group_prompts,
        validation_path=config.validation_path,
        cache=cache,
        **_reading(config),
    )


def _joined(config: InputsConfig, opened: _Opened, data: RLDatasetLoader) -> Inputs:
    """All inputs, with the reference's identity."""
    start, chat, given_tokenizer, digest, kept, dtype, max_seq_len = opened
    other = _other_reference(config, opened) if config.reference_path else None
    reference = other or reference_of(start)
    numerics = {
        "dtype": str(dtype).removeprefix("torch."),
        "attention": ATTENTION_VERSION,
        "head": HEAD_VERSION,
        **reference.numerics,
        **chat.identity,
    }
    return Inputs(chat, data, start, dtype, max_seq_len, digest, numerics, given_tokenizer, kept, other)


def _other_reference(config: InputsConfig, opened: _Opened) -> StartModel | None:
    """The model at `reference_path`; None where that is the start model itself. UserError where the chats of the run
    are not this model's."""
    start, digest, max_seq_len = opened.start, opened.tokenizer, opened.max_seq_len
    reference = open_start(config.reference_path)
    if (reference.digest, reference.numerics) == (start.digest, start.numerics):
        return None
    empty_model(reference.load())
    check_tokenizer(opened.chat, config, reference)
    own = reference.own_tokenizer
    chosen = not isinstance(base_of(start), StartFile) and not is_shipped(Path(config.tokenize_path))
    if own and not chosen and (found := tokenizer_digest(own.tokenizer)) != digest:
        raise UserError(
            f"reference_path: {own.source}: expected the tokenizer of the start model {start.path} (digest {digest}), "
            f"found another one ({found}): their log-probs are of different tokens"
        )
    if max_seq_len > reference.architecture.max_seq_len:
        raise UserError(
            f"reference_path: expected a model of at least {max_seq_len} tokens, which the chats may have, found one "
            f"of {reference.architecture.max_seq_len} ({reference.path}); lower max_seq_len"
        )
    return reference


def _reads_alike(known: Inputs, opened: _Opened) -> bool:
    """Whether records become the same tokens as they did."""
    theirs, chat = known.chat, opened.chat
    return (
        known.max_seq_len == opened.max_seq_len
        and known.tokenizer == opened.tokenizer
        and (type(theirs), dict(theirs.identity)) == (type(chat), dict(chat.identity))
        and theirs.default_system == chat.default_system
    )


def check_tokenizer(chat: ChatFormat, config: ChatModelConfig, start: StartModel) -> tuple[str, str | None]:
    """UserError where a chat format's tokenizer is another model's. Gives its digest, and that of the one that belongs
    to a .pth which was made of a folder."""
    known, start = start.architecture.vocab_size, base_of(start)
    if token_count(chat.tokenizer) > known:
        own = start.own_tokenizer if is_shipped(Path(config.tokenize_path)) else None
        raise UserError(
            f"{own.source if own else config.tokenize_path}: {token_count(chat.tokenizer)} tokens, but the model "
            f"{start.path} knows {known}; "
            "expected the tokenizer that the model was trained with (tokenize_path)"
        )
    digest = tokenizer_digest(chat.tokenizer)
    kept = start.metadata.get(TOKENIZER_KEY) if isinstance(start, StartFile) else None
    if kept not in (None, digest):
        raise UserError(
            f"{config.tokenize_path}: expected the tokenizer of the folder that {start.path} was made of (digest "
            f"{shown(kept)}), found another one ({digest}); give that folder as --tokenize_path"
        )
    return digest, kept


def chat_format(config: ChatModelConfig, start: StartModel) -> tuple[ChatFormat, OwnTokenizer | None]:
    """The format of the model's chats, with its tokenizer: its own where `tokenize_path` is left at its default. And
    one that was given, for exports that are folders."""
    start = base_of(start)
    if is_shipped(Path(config.tokenize_path)) and not isinstance(start, StartFile):
        if start.own_tokenizer is None:
            raise UserError(
                f"{start.path}: expected a tokenizer.json, found none; save the model's tokenizer again with "
                "transformers (AutoTokenizer, save_pretrained), or say with --tokenize_path where it is"
            )
        return own_chat(start.own_tokenizer, config), None
    path = Path(config.tokenize_path)
    own = given_tokenizer(path, start)
    if own:
        return own_chat(own, config), own
    chat = simple_llama_chat(config.tokenize_path, config)
    if isinstance(start, StartFile):
        return chat, None
    system, most = chat.default_system or "", start.architecture.max_seq_len
    return chat, tokenizer_for_others(chat.tokenizer, system, most, path)


def given_tokenizer(path: Path, start: StartModel) -> OwnTokenizer | None:
    """The tokenizer at `tokenize_path` and its chat template; None for one whose format is SimpleLLaMA's.

    Of a `.pth` that is the format of a file with SimpleLLaMA's tokenizer, whatever else lies beside it.
    """
    if isinstance(start, StartFile) and path.is_file() and is_simple_llama(path):
        return None
    return tokenizer_at(path, start.architecture.vocab_size)


def is_shipped(path: Path) -> bool:
    """Whether a path is the default of `tokenize_path`, in this checkout or in the one where a run was started."""
    default = Path(package_path("dataset", "bpe_8k.json"))
    return path.parts[-3:] == default.parts[-3:]


def versions() -> dict[str, str | None]:
    """Installed versions of what decides a run's numbers; None for a package that is not installed."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
