"""Talks to a model in the terminal, or over a pipe: launch/chat.py."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from typing_extensions import Doc

from simple_llama.cluster.distributed import device_of
from simple_llama.common.errors import UserError
from simple_llama.common.files import read_json
from simple_llama.common.settings import Count, parse_settings, peek_settings
from simple_llama.dataset.ascii_text import Spelling
from simple_llama.finetune.chat_config import ChatConfig
from simple_llama.finetune.chat_format import Chat
from simple_llama.inference import chat as terminal
from simple_llama.inference.generate import Sampling, generate
from simple_llama.interop.adapted_start import with_adapters
from simple_llama.interop.open_start import open_start, open_start_of
from simple_llama.ops.machine import has_fast_bf16, prepare_gemms
from simple_llama.pretraining.start_model import StartModel
from simple_llama.pretraining.weights import build_model
from simple_llama.reinforcement_learning.rlhf.inputs import ChatModelConfig, ModelConfig, chat_format, check_tokenizer
from simple_llama.reinforcement_learning.rlhf.run.run_folder import without_moved
from simple_llama.reinforcement_learning.rlhf.run.saves import start_digest

_SYSTEM = "what the chat template has by itself"  # where a chat has no other system prompt
_START = "start"


@dataclass(frozen=True)
class _TalkConfig(Sampling, ChatModelConfig):
    """Which model is talked to, and how it answers."""

    # === Talk ===
    against: Annotated[
        str,
        Doc(
            "a second model, whose answers stand beside: a path as --model_path, or start: what the run that "
            "wrote the first one started from"
        ),
    ] = ""
    max_new_tokens: Count = 512  # of an answer
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Doc("of the computation; auto: bfloat16 where the device has units for it"),
    ] = "auto"


def talk(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """Parses the command line, opens the models, and talks until the end of the input.

    How a model chats is what the run that wrote it had, unless it is given. UserError for what cannot be opened.
    KeyboardInterrupt where a Ctrl-C has no answer to end and nobody sits there.
    """
    if set(sys.argv if argv is None else argv) & {"-h", "--help"}:
        parse_settings(_TalkConfig, argv, description)
    if not (sys.stdin and sys.stdout and sys.stderr):
        raise UserError("expected stdin, stdout and stderr, found one of them closed; a pipe or /dev/null will do")
    asked = peek_settings(ModelConfig, argv)
    first = open_start(asked.model_path)
    if asked.adapter_path:
        first = with_adapters(first, asked.adapter_path, Path(asked.adapter_path))
    config = _settings(first, argv, description)
    prepare_gemms()
    device = device_of(config.device)
    speakers = [_speaker(first.path.name, first, config, device)]
    if config.against == _START:
        speakers.append(_speaker(_START, _start_of(first), config, device))
    elif config.against:
        second = open_start(config.against)
        same = first.path.name == second.path.name
        name = str(second.path) if same else second.path.name
        speakers.append(_speaker(name, second, _settings(second, argv, description), device))
    _converse(speakers, config)


def _settings(start: StartModel, argv: Sequence[str] | None, description: str | None) -> _TalkConfig:
    """The settings of a command line, over those of chats that the run which wrote the model had."""
    settings, source = _settings_of_run(start)
    names = [field.name for field in fields(ChatConfig)] + ["tokenize_path"]
    own = without_moved(_TalkConfig, {name: settings[name] for name in names if name in settings})
    return parse_settings(_TalkConfig, argv, description, own, source)


def _settings_of_run(start: StartModel) -> tuple[dict[str, Any], str]:
    """The settings of the run that wrote a model, by what the export says of itself or the run's config.json beside
    it, and where they stand; none for another model."""
    metadata = start.export_metadata(start.path)
    if isinstance(found := metadata.get("dpo_config"), dict):
        return found, f"{start.path} (of the run that wrote it)"
    beside = start.path.parent / "config.json"
    found = read_json(beside) if beside.is_file() else {}
    return (found, str(beside)) if isinstance(found, dict) and "model_path" in found else ({}, "")


def _start_of(start: StartModel) -> StartModel:
    """The model that the run which wrote `start` began with. UserError where it is not known, not there or another."""
    settings = _settings_of_run(start)[0]
    path = settings.get("model_path")
    if not isinstance(path, str):
        raise UserError(
            f"against: expected a model that says which one its run started from, or whose run's config.json lies "
            f"beside it, found {start.path}, which does not; give the path of the start model"
        )
    try:
        found = open_start_of(settings, path)
    except UserError as error:
        raise UserError(f"against: the start model is not where the run found it; give its path: {error}") from error
    if start_digest(start.export_metadata(start.path)) not in (None, found.digest):
        raise UserError(
            f"against: {found.path} is no longer the model that the run started from: other weights; give the path "
            "of the start model"
        )
    return found


def _speaker(name: str, start: StartModel, config: _TalkConfig, device: torch.device) -> terminal.Speaker:
    """A model with its chat format, ready to answer."""
    chat, _ = chat_format(config, start)
    fast = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    dtype = fast if config.dtype == "auto" else getattr(torch, config.dtype)
    with start.reading() as loaded:
        model = build_model(loaded, dtype, device).eval()
        check_tokenizer(chat, config, start)
    spelling = Spelling(chat.tokenizer, chat.unknown_id)

    def encode(users: Sequence[str], answers: Sequence[str]) -> list[int]:
        texts = ([spelling.spell(text)[0] for text in side] for side in (users, answers))
        return chat.encode_prompt(Chat(chat.default_system, *texts))

    def answer(prompt: Sequence[int], most: int, number: int) -> Iterator[int]:
        return generate(model, prompt, most, chat.stop_ids, config, number)

    most = model.architecture.max_seq_len
    about = (
        f"{name}: {str(dtype).removeprefix('torch.')} on {device.type}, conversations of at most {most} tokens; "
        f"system prompt: {_SYSTEM if chat.default_system is None else repr(chat.default_system)}"
    )
    return terminal.Speaker(name, about, encode, chat.decode, answer, most, chat.unknown_id)


def _converse(speakers: Sequence[terminal.Speaker], config: _TalkConfig) -> None:
    """The conversation, on this process's streams. What is no answer goes to stderr where stdout is no terminal."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    sits_there = sys.stdin.isatty() and sys.stdout.isatty()
    if sits_there:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then edits its line
    notes = sys.stdout if sys.stdout.isatty() else sys.stderr
    for speaker in speakers:
        print(speaker.about, file=notes)
    how = (
        "greedy"
        if config.is_greedy
        else f"temperature {config.temperature:g}, top_p {config.top_p:g}, seed {config.seed}"
    )
    print(f"{how}; /help lists commands" if sits_there else how, file=notes, flush=True)
    chat = terminal.ChatSession(
        speakers, config.max_new_tokens, sys.stdout, notes, lambda: shutil.get_terminal_size().columns
    )
    try:
        chat.run(input if sits_there else _next_line, sits_there)
    except BrokenPipeError:  # whoever read the answers has gone; Python would say so once more at its end
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _next_line(_: str) -> str:
    """A line of stdin, at once. EOFError at its end."""
    if line := sys.stdin.readline():
        return line
    raise EOFError
