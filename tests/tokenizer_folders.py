"""Tokenizer folders whose files disagree, or say more than tokenizer.json, and texts that tell the difference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

TEXTS = (
    "a <|im_end|> b",
    "a<|im_end|>b",
    "<|im_end|>\n the",
    "a the bathe",
    "a <TOOL> b<tool> c",
    " <|new|> b",
    "a<|new|>b",
    "A  <|NEW|>\n b",
    "a <two> b",
)
NEW = {"content": "<|new|>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
END = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
OBJECT = {"__type": "AddedToken"}
# by what they show: the files beside tokenizer.json, by their names
FOLDERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "other flags": {"tokenizer_config": {"added_tokens_decoder": {"2": {**END, "lstrip": True, "special": True}}}},
    "not special": {"tokenizer_config": {"added_tokens_decoder": {"2": {**END, "rstrip": True, "special": False}}}},
    "not special, but named": {
        "tokenizer_config": {"added_tokens_decoder": {"2": {**END, "special": False}}, "eos_token": "<|im_end|>"}
    },
    "new": {"tokenizer_config": {"added_tokens_decoder": {"262": {**NEW, "special": True}}}},
    "new, a whole word": {
        "tokenizer_config": {"added_tokens_decoder": {"262": {**NEW, "single_word": True, "special": False}}}
    },
    "new, normalized": {
        "tokenizer_config": {"added_tokens_decoder": {"262": {**NEW, "normalized": True, "special": False}}}
    },
    "few flags": {"tokenizer_config": {"added_tokens_decoder": {"262": {"content": "<|new|>"}}}},
    "a word of the vocabulary": {
        "tokenizer_config": {
            "added_tokens_decoder": {"260": {**NEW, "content": "the", "special": False}},
            "unk_token": "<|endoftext|>",
        }
    },
    "two new, the later first": {
        "tokenizer_config": {"added_tokens_decoder": {"263": {"content": "<two>"}, "262": {"content": "<|new|>"}}}
    },
    "a name": {"tokenizer_config": {"pad_token": "<|new|>"}},
    "a name in the vocabulary": {"tokenizer_config": {"eos_token": "the"}},
    "a name of a plain token": {"tokenizer_config": {"eos_token": "<tool>"}},
    "a name of a plain token, beside others": {
        "tokenizer_config": {"added_tokens_decoder": {"2": END}, "eos_token": "<tool>"}
    },
    "a name with flags": {"tokenizer_config": {"pad_token": {**OBJECT, **NEW, "special": True}}},
    "a known name with flags": {"tokenizer_config": {"eos_token": {**OBJECT, **END, "lstrip": True, "special": True}}},
    "a name of a kind of its own": {"tokenizer_config": {"image_token": "<|new|>"}},
    "further ones": {"tokenizer_config": {"additional_special_tokens": ["<|new|>", "<tool>", "the", "<|im_end|>"]}},
    "further ones by their later name": {"tokenizer_config": {"extra_special_tokens": ["<|new|>"]}},
    "further ones by both names": {
        "tokenizer_config": {"extra_special_tokens": ["<|new|>"], "additional_special_tokens": ["<two>"]}
    },
    "further ones with flags": {"tokenizer_config": {"additional_special_tokens": [{**OBJECT, **NEW}]}},
    "further ones with names": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<|new|>"}}},
    "the map": {"special_tokens_map": {"eos_token": "the", "additional_special_tokens": ["<|new|>"]}},
    "the map with flags": {"special_tokens_map": {"pad_token": NEW}},
    "the map with further flags": {"special_tokens_map": {"additional_special_tokens": [NEW]}},
    "the map before the config": {
        "tokenizer_config": {"eos_token": "the", "pad_token": "<two>"},
        "special_tokens_map": {"eos_token": "<|im_end|>", "pad_token": "<|new|>"},
    },
    "both with further ones": {
        "tokenizer_config": {"additional_special_tokens": ["<two>"]},
        "special_tokens_map": {"additional_special_tokens": ["<|new|>"]},
    },
    "the map beside a decoder": {
        "tokenizer_config": {"added_tokens_decoder": {"2": {**END, "special": True}}, "eos_token": "<|im_end|>"},
        "special_tokens_map": {"eos_token": "the", "pad_token": "<|new|>"},
    },
    "added_tokens.json": {"added_tokens": {"<|new|>": 262, "<two>": 263}, "tokenizer_config": {"pad_token": "<two>"}},
    "added_tokens.json beside a decoder": {
        "tokenizer_config": {"added_tokens_decoder": {"2": {**END, "special": True}}},
        "added_tokens": {"<|new|>": 262},
    },
    "added_tokens.json with a known one": {"added_tokens": {"<|im_end|>": 2, "the": 260}},
}


def small_tokenizer() -> Tokenizer:
    """Lower case, then bytes, of which "the" alone is merged: 262 tokens. ChatML's three (0, 1, 2) are special;
    <tool> (261) is added and plain, and takes the white space in front of it."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    words = [*specials, *characters, "th", "the"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [("t", "h"), ("th", "e")]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, normalized=True, special=False)])
    return tokenizer


def folder_files(name: str) -> dict[str, bytes]:
    """The files of one of FOLDERS, by their names in the folder."""
    beside = {"tokenizer_config": {}, **FOLDERS[name]}
    beside["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast", **beside["tokenizer_config"]}
    found = {f"{stem}.json": json.dumps(content).encode() for stem, content in beside.items()}
    return {"tokenizer.json": small_tokenizer().to_str().encode(), **found}


def write_folder(folder: Path, name: str) -> Path:
    """Writes one of FOLDERS below `folder`, with a config.json for transformers."""
    folder.mkdir(parents=True)
    for file, data in {**folder_files(name), "config.json": b'{"model_type": "llama"}'}.items():
        (folder / file).write_bytes(data)
    return folder


def described(tokenizer: Tokenizer) -> dict[str, Any]:
    """Its added tokens by their ids, flags as letters (Left, Right, Normalized, Single word, Special); ids of TEXTS."""
    flags = {"lstrip": "L", "rstrip": "R", "normalized": "N", "single_word": "W", "special": "S"}
    added = {
        str(number): f"{token.content} " + "".join(letter for name, letter in flags.items() if getattr(token, name))
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {"added": added, "ids": [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]}
