"""Loading a tokenizer: what is set, what is refused, what its digest depends on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models

from simple_llama.common.errors import UserError
from simple_llama.common.paths import root_path
from simple_llama.dataset.tokenizer import (
    SPECIAL_TOKENS,
    decode_text,
    load_tokenizer,
    one_thread_a_call,
    tokenizer_digest,
    unknown_id,
)
from tiny_hf import byte_level_tokenizer

SHIPPED = root_path("simple_llama", "dataset", "bpe_8k.json")


def changed_copy(tmp_path: Path, change: Callable[[dict], None]) -> Path:
    """The shipped tokenizer's file after `change(parsed JSON)`."""
    saved = json.loads(Path(SHIPPED).read_text(encoding="utf-8"))
    change(saved)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(saved), encoding="utf-8")
    return path


def test_special_tokens_are_the_ids_0_to_9() -> None:
    """As in the original file, whose ids every checkpoint was trained on."""
    tokenizer = load_tokenizer(SHIPPED)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(10))
    assert tokenizer.get_vocab_size() == 8192


def test_original_tokenizer_loads(shared_dir: Path) -> None:
    """The original file has no decoder and no unknown token; both are set, so text comes back and odd bytes are ids."""
    tokenizer = load_tokenizer(shared_dir / "tokenizer" / "bpe_8k.json")
    ids = tokenizer.encode("Hello there, friend.").ids
    assert decode_text(tokenizer, ids) == "Hello there, friend."
    assert tokenizer.encode("\u2019").ids[-3:] == [3, 3, 3]  # three bytes that it never saw


def test_text_that_spells_a_special_token_stays_text() -> None:
    """None of its ids is special, and the text comes back as it was."""
    tokenizer = load_tokenizer(SHIPPED)
    for token in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"a {token} b").ids
        assert min(ids) > 9
        assert decode_text(tokenizer, ids) == f"a {token} b"


@pytest.mark.parametrize(
    "text", ["", "plain", " one space before", "caf\u00e9 \u2603 \U0001f600 \x00\x7f", "a\n\n  b\t"]
)
def test_shipped_tokenizer_knows_every_byte(text: str) -> None:
    """Byte-level with all 256 bytes: never <UNK>; the text comes back, but for one leading space it cannot tell."""
    tokenizer = load_tokenizer(SHIPPED)
    ids = tokenizer.encode(text).ids
    assert 3 not in ids
    assert decode_text(tokenizer, ids) == text.removeprefix(" ")


def test_decode_drops_special_tokens() -> None:
    """An answer between <SOA> (6) and <EOA> (7) comes back alone."""
    tokenizer = load_tokenizer(SHIPPED)
    ids = tokenizer.encode("Yes.").ids
    assert decode_text(tokenizer, [6, *ids, 7]) == "Yes."


def test_truncation_padding_and_dropout_of_the_file_are_off(tmp_path: Path) -> None:
    """A file saved with truncation to 2, padding to 8 and merge dropout would change the scored tokens in silence."""

    def spoil(saved: dict) -> None:
        saved["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        saved["padding"] = {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 2,
            "pad_type_id": 0,
            "pad_token": "<PAD>",
        }
        saved["model"]["dropout"] = 0.9

    text = "The quick brown fox jumps over the lazy dog again and again."
    expected = load_tokenizer(SHIPPED).encode(text).ids
    assert load_tokenizer(changed_copy(tmp_path, spoil)).encode(text).ids == expected


def test_digest_ignores_layout_and_sees_a_changed_merge(tmp_path: Path) -> None:
    """Compact JSON, merges as lists and a missing decoder are the same tokenizer; two swapped merges are another."""

    def relaid(saved: dict) -> None:
        saved["model"]["merges"] = [merge.split(" ") for merge in saved["model"]["merges"]]
        saved["decoder"] = None

    def swapped(saved: dict) -> None:
        merges = saved["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    digest = tokenizer_digest(SHIPPED)
    assert digest == tokenizer_digest(load_tokenizer(SHIPPED)) == tokenizer_digest(changed_copy(tmp_path, relaid))
    assert digest != tokenizer_digest(changed_copy(tmp_path, swapped))
    assert len(digest) == 32


def swap_ids(saved: dict) -> None:
    """<SOA> and <EOA> change places."""
    for token in saved["added_tokens"]:
        token["content"] = {"<SOA>": "<EOA>", "<EOA>": "<SOA>"}.get(token["content"], token["content"])
    vocab = saved["model"]["vocab"]
    vocab["<SOA>"], vocab["<EOA>"] = vocab["<EOA>"], vocab["<SOA>"]


def make_plain(saved: dict) -> None:
    """<EOT> is in the vocabulary, but no added token."""
    saved["added_tokens"].pop()


def unmark(saved: dict) -> None:
    """<EOT> is an added token, but an ordinary one."""
    saved["added_tokens"][-1]["special"] = False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap_ids, "<SOA> with id 6, found 7"),
        (make_plain, "<EOT> among the added tokens"),
        (unmark, "<EOT> among the added tokens, marked special"),
    ],
)
def test_other_special_tokens_are_refused(tmp_path: Path, change: Callable[[dict], None], words: str) -> None:
    """A wrong id would train on the wrong structure; a plain token would not be dropped on decoding."""
    with pytest.raises(UserError, match=words):
        load_tokenizer(changed_copy(tmp_path, change))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"no": "tokenizer"}', "tokenizer JSON"),
        (b"[1", "tokenizer JSON"),
        (b"\xff\xfe", "tokenizer JSON"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    """The message names the file, whatever is wrong with it."""
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        load_tokenizer(path)
    assert str(path) in str(raised.value)


def test_the_library_alone_would_let_text_forge_structure() -> None:
    """Shows that the setting matters: the same file, loaded plainly, takes "<EOA>" in text for the end of an answer."""
    assert Tokenizer.from_file(SHIPPED).encode("a <EOA> b").ids.count(7) == 1


def test_digest_of_another_tokenizer_sees_its_added_tokens() -> None:
    """One more token, and one that is no longer special: each is another."""
    plain, more, unmarked = (byte_level_tokenizer() for _ in range(3))
    more.add_tokens(["<|tool|>"])
    unmarked.add_tokens([AddedToken("<|im_end|>", special=False)])
    assert len({tokenizer_digest(one) for one in (plain, more, unmarked)}) == 3
    assert tokenizer_digest(plain) == tokenizer_digest(byte_level_tokenizer())


def test_stores_of_simple_llama_keep_their_names() -> None:
    """The digest of before other tokenizers were known. A further special token leaves the ids of texts as they were;
    a plain one does not."""
    special, plain = load_tokenizer(SHIPPED), load_tokenizer(SHIPPED)
    special.add_tokens([AddedToken("<pad>", special=True)])
    plain.add_tokens([AddedToken("<think>")])
    before = load_tokenizer(SHIPPED).encode("a<pad><think>").ids
    assert special.encode("a<pad><think>").ids == before != plain.encode("a<pad><think>").ids
    assert tokenizer_digest(SHIPPED) == tokenizer_digest(special) == "43aec0933a5017bedabb03f9c7b0dbc7"
    assert tokenizer_digest(plain) != tokenizer_digest(SHIPPED)


def test_who_knows_all_bytes() -> None:
    """Byte-level with its alphabet, and byte fallback, have no unknown token; else as the file says."""
    assert unknown_id(byte_level_tokenizer()) is None
    characters = {"<unk>": 0, "a": 1}
    assert unknown_id(Tokenizer(models.BPE(characters, [], unk_token="<unk>"))) == 0
    fallback = {**characters, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    assert unknown_id(Tokenizer(models.BPE(fallback, [], unk_token="<unk>", byte_fallback=True))) is None
    assert unknown_id(Tokenizer(models.Unigram([("a", -1.0), ("<u>", 0.0)], unk_id=1))) == 1
    with pytest.raises(UserError, match="leaves characters out"):
        unknown_id(Tokenizer(models.BPE(characters, [])))


@pytest.mark.parametrize("before", [None, "true"])
def test_one_thread_a_call_leaves_the_environment_as_it_was(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """Also where two who are within leave in the order in which they came."""
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.delenv(name, raising=False)
    if before:
        monkeypatch.setenv(name, before)
    one_thread_a_call.__enter__()
    one_thread_a_call.__enter__()
    one_thread_a_call.__exit__()
    assert os.environ[name] == "false"
    one_thread_a_call.__exit__()
    assert os.environ.get(name) == before
