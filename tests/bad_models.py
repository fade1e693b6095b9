"""The table of broken Hugging Face folders for `unit/rlhf/test_bad_input.py`, as `bad_inputs` has the other inputs."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bad_inputs import Case, RunsCode, Spoil, Start
from tiny_hf import TEMPLATE as CHATML
from tiny_hf import byte_level_tokenizer
from tiny_job import TinyJob

Tensors = dict[str, torch.Tensor]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
HEAD, EMBEDDINGS, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
LAYER = "model.layers.0.self_attn"


# === Ways to spoil ===


def model(job: TinyJob) -> Path:
    """The model's folder."""
    return job.folder / "model"


def file(name: str, content: bytes | Callable[[bytes], bytes] | None) -> Spoil:
    """A file of the folder is these bytes, or its own changed; None takes it out."""

    def spoil(job: TinyJob) -> None:
        path = model(job) / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))

    return spoil


def made(name: str, make: Callable[[Path], object]) -> Spoil:
    """`make` puts something in the place of a file."""

    def spoil(job: TinyJob) -> None:
        path = model(job) / name
        path.unlink(missing_ok=True)
        make(path)

    return spoil


def values(name: str, **changes: Any) -> Spoil:
    """A JSON file of the folder with other values; None takes a key out."""

    def spoil(job: TinyJob) -> None:
        path = model(job) / name
        found = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
        path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))

    return spoil


def config(**changes: Any) -> Spoil:
    """config.json with other values."""
    return values("config.json", **changes)


def tensors(change: Callable[[Tensors], object]) -> Spoil:
    """The weights, changed in place."""

    def spoil(job: TinyJob) -> None:
        path = model(job) / WEIGHTS
        found = load_file(path)
        change(found)
        save_file(found, path)

    return spoil


def table(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """The table in front of the weights, changed in place; the bytes behind it stay."""

    def changed(content: bytes) -> bytes:
        [length] = struct.unpack_from("<Q", content)
        found = json.loads(content[8 : 8 + length])
        change(found)
        text = json.dumps(found).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return file(WEIGHTS, changed)


def sharded(change: Callable[[Path, dict[str, str]], object]) -> Spoil:
    """The weights in two files with an index, then changed: gets the folder and the index's table."""

    def spoil(job: TinyJob) -> None:
        folder, found = model(job), load_file(model(job) / WEIGHTS)
        (folder / WEIGHTS).unlink()
        weight_map = {name: SECOND if name.startswith("model.layers.1") else FIRST for name in found}
        for part in (FIRST, SECOND):
            save_file({name: tensor for name, tensor in found.items() if weight_map[name] == part}, folder / part)
        change(folder, weight_map)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return spoil


def pickled(name: str) -> Spoil:
    """A pickle that would make a folder `ran`, in the place of the weights."""

    def spoil(job: TinyJob) -> None:
        (model(job) / WEIGHTS).unlink()
        (model(job) / name).write_bytes(pickle.dumps(RunsCode(job.folder / "ran")))

    return spoil


def adapters(job: TinyJob) -> None:
    """The folder of an adapter of PEFT."""
    (model(job) / WEIGHTS).rename(model(job) / "adapter_model.safetensors")
    (model(job) / "config.json").rename(model(job) / "adapter_config.json")


def overlap(found: dict[str, Any]) -> None:
    """The last norm begins a number earlier, in the bytes of the tensor before it."""
    [start, end] = found[NORM]["data_offsets"]
    found[NORM].update(shape=[33], data_offsets=[start - 4, end])


def another_tokenizer(job: TinyJob) -> None:
    """A tokenizer of more tokens than the model has rows."""
    found = byte_level_tokenizer()
    found.add_tokens([f"<extra_{number}>" for number in range(9)])
    found.save(str(model(job) / "tokenizer.json"))


def template(text: Any) -> Spoil:
    """Another chat template."""
    return values("tokenizer_config.json", chat_template=text)


def settings(*wrong: Spoil, **changes: object) -> Spoil:
    """Spoiled so, and started with other settings."""

    def spoil(job: TinyJob) -> Start:
        for each in wrong:
            each(job)
        return Start(changes)

    return spoil


NOT_SOUND = f"model/{WEIGHTS}: expected a safetensors file, found one that is not sound"
ROLES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
DESCRIBED = "model: expected the tensors that config.json describes, found"
TAKEN = "model: expected a chat that the chat template takes, found: "
NAN = torch.full((32,), torch.nan)
MODELS = [
    # === config.json ===
    Case(
        "no config.json", file("config.json", None), ("model: expected a folder with a Hugging Face model", "found no")
    ),
    Case("config.json cut", file("config.json", lambda text: text[:-9]), ("model/config.json, line", "not JSON")),
    Case("config.json of a list", file("config.json", b"[]"), ("model/config.json: expected an object, found []",)),
    Case("config.json nested", file("config.json", b"[" * 10**5), ("model/config.json: not JSON that can be read",)),
    Case(
        "config.json in UTF-16",
        file("config.json", "{}".encode("utf-16")),
        ("model/config.json, line 1: expected UTF",),
    ),
    Case("config.json behind a pipe", made("config.json", os.mkfifo), ("model/config.json: expected a file", "pipe")),
    Case("config.json as a folder", made("config.json", Path.mkdir), ("model/config.json: expected a file", "folder")),
    Case("a model_type twice", file("config.json", b'{"model_type": "llama", "model_type": "x"}'), ("stands twice",)),
    Case("a key nobody knows", config(logit_magic=2.0), ("model/config.json: expected keys", "'logit_magic' (2.0)")),
    Case(
        "a mixture of experts",
        config(model_type="mixtral", architectures=["MixtralForCausalLM"]),
        ("model/config.json: expected one of the families", "found architectures ['MixtralForCausalLM']"),
    ),
    Case("experts in a Llama", config(num_local_experts=8), ("model/config.json", "'num_local_experts'")),
    Case("two families", config(model_type="qwen2"), ("model/config.json: expected one of the families",)),
    Case("another activation", config(hidden_act="gelu"), ("hidden_act: expected 'silu', found 'gelu'",)),
    Case("quantized weights", config(quantization_config={"bits": 4}), ("found a quantization_config",)),
    Case("code of its own", config(auto_map={"AutoModel": "x.Y"}), ("model/config.json: auto_map: expected {}",)),
    Case("YaRN", config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ("rope_scaling: expected rope_type",)),
    Case(
        "dynamic RoPE", config(rope_scaling={"type": "dynamic", "factor": 2.0}), ("rope_scaling: expected rope_type",)
    ),
    Case(
        "two bases of RoPE", config(rope_parameters={"rope_type": "default", "rope_theta": 5.0}), ("rope_parameters:",)
    ),
    Case("no vocab_size", config(vocab_size=None), ("model/config.json: vocab_size: expected a whole number",)),
    Case("a width as text", config(hidden_size="32"), ("model/config.json: hidden_size: expected", "'32'")),
    Case("a billion layers", config(num_hidden_layers=10**9), ("model/config.json: num_hidden_layers: expected",)),
    Case("a width of 10**400", config(hidden_size=10**400), ("model/config.json: hidden_size: expected",)),
    Case(
        "three key heads of four", config(num_key_value_heads=3), ("model/config.json: key_heads: expected a divisor",)
    ),
    Case("an odd width of heads", config(head_dim=7), ("model/config.json: rope_width: expected an even number",)),
    Case("eps below 0", config(rms_norm_eps=-1e-5), ("model/config.json: rms_norm_eps: expected a positive number",)),
    Case("a tied head that is a word", config(tie_word_embeddings="yes"), ("tie_word_embeddings: expected true or",)),
    Case(
        "a window shorter than a sequence",
        settings(config(model_type="mistral", architectures=None, sliding_window=64), max_seq_len=128),
        ("max_seq_len: expected at most the model's 64 tokens, its sliding window (",),
    ),
    # === What config.json says, and what the weights are ===
    Case("a tied flag without its weight", config(tie_word_embeddings=False), (DESCRIBED, f"missing {HEAD}")),
    Case(
        "a tied head that differs",
        tensors(lambda found: found.update({HEAD: found[EMBEDDINGS] + 1})),
        ("model: config.json says that the head is the embeddings (tie_word_embeddings)", f"found {HEAD}"),
    ),
    Case("a layer more", config(num_hidden_layers=3), (DESCRIBED, "missing model.layers.2.")),
    Case("1,000 layers", config(num_hidden_layers=1000), (DESCRIBED, "tensors for 1000 layers")),
    Case("a layer less", config(num_hidden_layers=1), (DESCRIBED, "unexpected model.layers.1.")),
    Case("a width of 2**20", config(hidden_size=2**20), (DESCRIBED, "wrong shapes:", "instead of (300, 1048576)")),
    Case("another number of key heads", config(num_key_value_heads=4), (DESCRIBED, f"{LAYER}.k_proj.weight (16, 32)")),
    Case("biases that are not there", config(attention_bias=True), (DESCRIBED, f"missing {LAYER}.")),
    Case("a tensor missing", tensors(lambda found: found.pop(NORM)), (DESCRIBED, f"missing {NORM}")),
    Case("a tensor too many", tensors(lambda found: found.update(more=NAN)), (DESCRIBED, "unexpected more")),
    Case(
        "biases that nobody reads",
        tensors(lambda t: t.update({f"{LAYER}.q_proj.bias": NAN})),
        (DESCRIBED, "q_proj.bias"),
    ),
    Case("a wrong shape", tensors(lambda t: t.update({NORM: NAN[:31]})), (DESCRIBED, f"{NORM} (31,) instead of (32,)")),
    Case("a flat matrix", tensors(lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS].flatten()})), (DESCRIBED, "(9600,)")),
    Case("a name of two lines", tensors(lambda t: t.update({"a\nb\x1b[2J": NAN})), (DESCRIBED, "a\\nb\\x1b[2J")),
    Case(
        "NaN in a folder", tensors(lambda t: t.update({NORM: NAN})), ("model: expected finite weights", "norm.weight")
    ),
    Case(
        "infinity in a folder",
        tensors(lambda t: t[EMBEDDINGS][0].fill_(-torch.inf)),
        ("model: expected finite", "embed"),
    ),
    # === Weights ===
    Case("no weights", file(WEIGHTS, None), (f"model: expected {WEIGHTS} or {INDEX}, found no weights",)),
    Case(
        "pickles alone",
        pickled("pytorch_model.bin"),
        ("found pickles alone (pytorch_model.bin)", "save the model again"),
    ),
    Case("a pickle under the other name", pickled(WEIGHTS), (NOT_SOUND,)),
    Case(
        "an adapter",
        adapters,
        ("model: expected a whole model, or adapters that name one", "whose base is not named"),
    ),
    Case("an empty file of weights", file(WEIGHTS, b""), (NOT_SOUND, "it has 0 bytes")),
    Case("weights that were cut", file(WEIGHTS, lambda content: content[:-1]), (NOT_SOUND, "behind the file's end")),
    Case("a byte too many", file(WEIGHTS, lambda content: content + b"\0"), (NOT_SOUND, "its tensors end after")),
    Case("a table of 2**60 bytes", file(WEIGHTS, struct.pack("<Q", 2**60)), (NOT_SOUND, "its table claims")),
    Case("a table of no JSON", file(WEIGHTS, struct.pack("<Q", 2) + b"{]"), (NOT_SOUND, "not JSON")),
    Case("two tensors of the same bytes", table(overlap), (NOT_SOUND, "overlaps the one before")),
    Case("bytes that belong to none", table(lambda t: t.pop(NORM)), (NOT_SOUND,)),
    Case(
        "whole numbers for weights",
        tensors(lambda t: t.update({NORM: NAN.isnan().to(torch.int8)})),
        (NOT_SOUND, "'I8'"),
    ),
    Case("another dtype in the table", table(lambda t: t[NORM].update(dtype="F16")), (NOT_SOUND, "its shape needs 64")),
    Case("weights behind a pipe", made(WEIGHTS, os.mkfifo), (f"model/{WEIGHTS}: expected a safetensors file", "pipe")),
    Case("weights as a folder", made(WEIGHTS, Path.mkdir), (f"model/{WEIGHTS}: expected a safetensors file", "folder")),
    Case("weights that link to a device", made(WEIGHTS, lambda path: path.symlink_to("/dev/zero")), ("device",)),
    Case("weights that link nowhere", made(WEIGHTS, lambda path: path.symlink_to("gone")), (f"{WEIGHTS}: expected a",)),
    # === Shards ===
    Case(
        "a missing shard",
        sharded(lambda folder, _: (folder / SECOND).unlink()),
        (f"model/{INDEX}: expected its 2 files beside it, missing {SECOND}",),
    ),
    Case(
        "a tensor in another shard",
        sharded(lambda _, weight_map: weight_map.update({NORM: SECOND})),
        (f"model/{INDEX}: expected tensor '{NORM}' in {SECOND}, found none",),
    ),
    Case(
        "a shard up the tree",
        sharded(lambda _, weight_map: weight_map.update({NORM: f"../model/{FIRST}"})),
        (f"model/{INDEX}: weight_map: expected the name of a .safetensors file beside it",),
    ),
    Case(
        "shards of pickles",
        sharded(lambda _, weight_map: weight_map.update({NORM: "pytorch_model-00001.bin"})),
        (f"model/{INDEX}: weight_map: expected the name of a .safetensors file",),
    ),
    Case(
        "a tensor in both shards",
        sharded(lambda folder, _: save_file(load_file(folder / FIRST), folder / SECOND)),
        ("expected each tensor in one file, found",),
    ),
    Case("an index of nothing", file(INDEX, b"{}"), (f"model: expected {WEIGHTS} or {INDEX}, found both",)),
    Case(
        "an index that is a list", settings(file(WEIGHTS, None), file(INDEX, b"[]")), (f"model/{INDEX}: expected an",)
    ),
    # === Its tokenizer and chat template ===
    Case("no tokenizer.json", file("tokenizer.json", None), ("model: expected a tokenizer.json, found none",)),
    Case(
        "a tokenizer that was cut",
        file("tokenizer.json", lambda content: content[:-9]),
        ("model/tokenizer.json: expected a tokenizer JSON file, found: EOF",),
    ),
    Case(
        "a tokenizer that is a pickle",
        file("tokenizer.json", pickle.dumps({})),
        ("model/tokenizer.json: expected a tokenizer JSON file, found: 'utf-8'",),
    ),
    Case(
        "a tokenizer behind a pipe",
        made("tokenizer.json", os.mkfifo),
        ("model/tokenizer.json: expected a file", "pipe"),
    ),
    Case("a tokenizer of another model", another_tokenizer, ("model: 309 tokens, but the model", "knows 300")),
    Case(
        "a token with another id",
        values("tokenizer_config.json", added_tokens_decoder={"9": {"content": "<|im_end|>"}}),
        ("tokenizer_config.json: added_tokens_decoder: expected the id that <|im_end|> has",),
    ),
    Case(
        "an end token of another model",
        values("tokenizer_config.json", eos_token="<|eot_id|>"),
        ("tokenizer_config.json: eos_token: expected a token of tokenizer.json",),
    ),
    Case(
        "a stop id of another model",
        values("generation_config.json", eos_token_id=128009),
        ("generation_config.json: eos_token_id: expected ids of tokens", "128009"),
    ),
    Case(
        "tokenizer_config.json as a list",
        file("tokenizer_config.json", b"[]"),
        ("model/tokenizer_config.json: expected a JSON object, found []",),
    ),
    Case("no chat template", template(None), ("model: expected a chat template (chat_template.jinja",)),
    Case(
        "a template that is no Jinja",
        template("{% for m in messages %}{{ m"),
        ("model: expected a chat template (Jinja), found: unexpected end",),
    ),
    Case(
        "a template that calls out",
        template("{{ cycler.__init__.__globals__.os.mkdir('ran') }}" + CHATML),
        (TAKEN, "SecurityError"),
    ),
    Case("a template that reads classes", template("{{ ''.__class__.__mro__ }}" + CHATML), (TAKEN, "SecurityError")),
    Case(
        "a template without end",
        template("{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}"),
        (TAKEN, "Range too big"),
    ),
    Case(
        "a template that fills the memory",
        template("{% set ns = namespace(x='x') %}{% set ns.x = ns.x * 2147483648 %}{{ ns.x | length }}"),
        (TAKEN, "MemoryError"),
    ),
    Case(
        "a template that calls itself",
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        (TAKEN, "RecursionError"),
    ),
    Case(
        "a template that leaves answers out",
        template(CHATML.replace("message['content']", "message['role']")),
        ("model: expected a chat template that writes every message once, in order",),
    ),
    Case(
        "a template that shouts",
        template(CHATML.replace("message['content']", "message['content'] | upper")),
        ("model: expected a chat template that writes every message once, in order",),
    ),
    Case(
        "a template that ends in text",
        template(CHATML.replace("<|im_end|>", "[END]")),
        ("model: expected a chat template that ends an answer with a token", "[END]"),
    ),
    Case("a template that refuses all", template("{{ raise_exception('not me') }}"), (TAKEN, "not me")),
    Case(
        "a template in other bytes",
        file("chat_template.jinja", b"\xff\xfe"),
        ("model/chat_template.jinja: expected UTF-8 text",),
    ),
    Case(
        "several templates, none by default",
        template([{"name": "rag", "template": CHATML}]),
        ('tokenizer_config.json: chat_template: expected one named "default"',),
    ),
    Case(
        "a template without a place for a system prompt",
        settings(template(ROLES), system_prompt="Be kind."),
        ("model: expected no system message", "no system", "leave --system_prompt out"),
    ),
    Case(
        "an option that no template reads",
        settings(chat_template_kwargs='{"enable_thinking": true}'),
        ("chat_template_kwargs: expected names that the chat template of", "reads (nothing), found enable_thinking"),
    ),
    # === The path ===
    Case(
        "a file of the folder",
        lambda job: Start({"model_path": model(job) / WEIGHTS}),
        (f"model/{WEIGHTS}: expected the folder of a Hugging Face model",),
    ),
    Case(
        "config.json alone",
        lambda job: Start({"model_path": model(job) / "config.json"}),
        ("model/config.json: expected the folder of a Hugging Face model",),
    ),
    Case("the name of a model", settings(model_path="org/model"), ("org/model: expected a .pth file", "not looked up")),
]
