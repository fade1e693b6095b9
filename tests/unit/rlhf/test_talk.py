"""launch/chat.py: the models that it opens, what they hear, and its ends."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from simple_llama.common.errors import UserError
from simple_llama.common.files import atomic_write_json
from simple_llama.dataset.tokenizer import SPECIAL_IDS
from simple_llama.inference.chat import ChatSession
from simple_llama.inference.generate import generate
from simple_llama.interop.open_start import open_start
from simple_llama.pretraining.weights import load_weights, save_weights
from simple_llama.reinforcement_learning.rlhf import talk as talking
from simple_llama.reinforcement_learning.rlhf.talk import talk
from tiny_gguf import make_gguf_job
from tiny_hf import make_hf_job
from tiny_job import ROOT, TinyJob, make_job

FEW = ["--device", "cpu", "--dtype", "float32", "--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """A start model whose next token depends on all before it."""
    job = make_job(tmp_path_factory.mktemp("talk"), max_seq_len=8192, tokens_per_update=8192)
    loaded = load_weights(job.folder / "start.pth")
    torch.manual_seed(3)
    weights = {k: torch.randn_like(t) * 0.3 if t.dim() == 2 else t for k, t in loaded.state_dict.items()}
    save_weights(job.folder / "start.pth", weights, loaded.config, {})
    return job


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that are answered."""
    prompts: list[list[int]] = []

    def listening(model: Any, prompt: Sequence[int], *rest: Any) -> Iterator[int]:
        prompts.append(list(prompt))
        return generate(model, prompt, *rest)

    monkeypatch.setattr(talking, "generate", listening)
    return prompts


def flags(job: TinyJob, *more: str) -> list[str]:
    """A command line for the job's start model."""
    paths = ["--model_path", str(job.folder / "start.pth"), "--tokenize_path", str(job.folder / "tokenizer.json")]
    return [*paths, *FEW, *more]


def said(lines: str, args: list[str]) -> tuple[str, str]:
    """(stdout, stderr) of a conversation over a pipe."""
    out, notes = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(notes):
        patch.setattr(sys, "stdin", io.StringIO(lines))
        talk(args)
    return out.getvalue(), notes.getvalue()


def test_a_line_is_a_turn_and_answers_alone_are_on_stdout(job: TinyJob, heard: list[list[int]]) -> None:
    """Two turns: the second prompt begins with the first one and its answer. The same lines give the same answers, by
    a seed as well, and others by another."""
    out, notes = said("say 1\nsay 2\n", flags(job))
    assert len(heard) == 2 and heard[1][: len(heard[0])] == heard[0] and len(heard[1]) > len(heard[0]) + 6
    assert "start.pth: float32 on cpu" in notes and "greedy" in notes and "You are SimpleLLaMA" in notes
    assert "(cut at 6 tokens: --max_new_tokens)" in notes and "start.pth" not in out
    assert out == said("say 1\nsay 2\n", flags(job))[0]
    drawn = [said("say 1\n", flags(job, "--temperature", "1.5", "--seed", seed))[0] for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_reader_who_goes_ends_the_conversation(job: TinyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """`| head`: no traceback. Streams that are closed are said."""

    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(ChatSession, "run", gone)
    assert said("say 1\n", flags(job))[0] == ""
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="found one of them closed"):
        talk(flags(job))


def test_special_tokens_that_are_spelled_stay_text(job: TinyJob, heard: list[list[int]], shared_dir: Path) -> None:
    """A message "<EOU>": the prompt has one such token, which ends it. The original tokenizer knows ASCII alone:
    marks and accents are spelled in it, as in training, and what has no form there is said."""
    said("<EOU>\nx\n", flags(job))
    assert [prompt.count(SPECIAL_IDS["<EOU>"]) for prompt in heard] == [1, 2]
    wide = job.folder / "wide.pth"
    loaded = load_weights(job.folder / "start.pth")
    weights = {k: t[torch.arange(8192) % 300] if len(t) == 300 else t for k, t in loaded.state_dict.items()}
    save_weights(wide, weights, loaded.config, {})
    heard.clear()
    paths = ["--model_path", str(wide), "--tokenize_path", str(shared_dir / "tokenizer" / "bpe_8k.json")]
    _, notes = said("\u201cna\u00efve\u201d\n\u6f22\n", [*paths, *FEW, "--max_new_tokens", "1"])
    assert [prompt.count(SPECIAL_IDS["<UNK>"]) > 0 for prompt in heard] == [False, True]
    assert notes.count("does not know") == 1


def test_a_system_prompt(job: TinyJob, heard: list[list[int]]) -> None:
    """It stands in front of what the model hears."""
    _, notes = said("say 1\n", flags(job, "--system_prompt", "the cat sits"))
    said("say 1\n", flags(job))
    assert "system prompt: 'the cat sits'" in notes and len(heard[0]) < len(heard[1])


def test_every_form_of_a_model(tmp_path: Path) -> None:
    """A Hugging Face folder and a GGUF file, with their own tokenizers and templates."""
    for job in (make_hf_job(tmp_path / "hf"), make_gguf_job(tmp_path / "gguf")):
        path = str(job.settings["model_path"])
        out, notes = said("say 1\n", ["--model_path", path, *FEW])
        assert (
            out
            and f"{Path(path).name}: float32" in notes
            and "system prompt: what the chat template has by itself" in notes
        )


# === a second model ===


def export(job: TinyJob, folder: Path, **metadata: Any) -> Path:
    """A model as a run writes it: the start model's weights, the embeddings twice as large."""
    folder.mkdir(parents=True)
    loaded = load_weights(job.folder / "start.pth")
    weights = dict(loaded.state_dict)
    weights["embeddings.weight"] = 2 * weights["embeddings.weight"].flip(0)
    save_weights(folder / "dpo.pth", weights, loaded.config, metadata)
    return folder / "dpo.pth"


def test_the_start_model_of_a_run_beside_its_export(job: TinyJob, tmp_path: Path, monkeypatch: Any) -> None:
    """Named by what the export says of itself, or by the run's config.json beside it: the same answers, the start
    model's own on the right. Tokenizer and system prompt are the run's without being given."""
    monkeypatch.setenv("COLUMNS", "200")
    settings = {"model_path": str(job.folder / "start.pth"), "system_prompt": "the cat sits"}
    settings["tokenize_path"] = str(job.folder / "tokenizer.json")
    digest = open_start(job.folder / "start.pth").digest
    says = export(job, tmp_path / "says", dpo_config=settings, reference={"weights": digest})
    beside = export(job, tmp_path / "beside")
    atomic_write_json(tmp_path / "beside" / "config.json", settings)
    found = [said("say 1\n", ["--model_path", str(path), "--against", "start", *FEW]) for path in (says, beside)]
    assert found[0] == found[1]
    alone = said("say 1\n", flags(job, "--system_prompt", "the cat sits"))[0].strip()
    head, _, *rows = found[0][0].splitlines()
    assert head.split() == ["dpo.pth", "|", "start"]
    right = "\n".join(row.split(" | ")[1] if " | " in row else "" for row in rows)
    assert " ".join(right.split()) == " ".join(alone.split()) != ""
    assert found[0][1].count("'the cat sits'") == 2


def test_a_start_model_that_cannot_be_found(job: TinyJob, tmp_path: Path) -> None:
    """No word of one; gone; another model in its place: each time the way out is a path."""
    against = ["--tokenize_path", str(job.folder / "tokenizer.json"), "--against", "start", *FEW]
    gone, other = {"model_path": str(tmp_path / "gone.pth")}, {"model_path": str(job.folder / "start.pth")}
    paths = {
        "which does not; give the path": job.folder / "start.pth",
        "not where the run found it; give its path": export(job, tmp_path / "a", dpo_config=gone),
        "other weights; give the path": export(job, tmp_path / "b", dpo_config=other, reference={"weights": "00"}),
    }
    for message, path in paths.items():
        with pytest.raises(UserError, match=message):
            said("", ["--model_path", str(path), *against])


def test_two_files_of_one_name(job: TinyJob, tmp_path: Path, monkeypatch: Any) -> None:
    """The second one's column has its path."""
    monkeypatch.setenv("COLUMNS", "400")
    other = export(job, tmp_path / "one")
    os.rename(other, tmp_path / "one" / "start.pth")
    out, _ = said("say 1\n", flags(job, "--against", str(tmp_path / "one" / "start.pth")))
    assert out.splitlines()[0].split() == ["start.pth", "|", str(tmp_path / "one" / "start.pth")]


def test_the_tokenizer_of_another_model_is_refused(job: TinyJob) -> None:
    """The shipped one has 8,000 tokens, the model 300."""
    with pytest.raises(UserError, match="tokens, but the model"):
        said("", ["--model_path", str(job.folder / "start.pth"), *FEW])


# === the program ===


def test_in_a_terminal_ctrl_c_ends_an_answer_and_eof_the_program(job: TinyJob) -> None:
    """A pseudo-terminal: an answer that would go on for 8,170 tokens, or seconds, is cut by Ctrl-C, the program goes on
    and says what was kept, and Ctrl-D ends it with status 0."""
    master, slave = pty.openpty()
    args = [sys.executable, str(ROOT / "launch" / "chat.py"), *flags(job, "--max_new_tokens", "100000")]
    child = subprocess.Popen(args, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    shown = b""

    def until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            assert select.select([master], [], [], 60)[0], shown
            shown += os.read(master, 1000)
        shown = shown.partition(text)[2]

    try:
        until(b"/help lists commands")
        until(b"> ")
        os.write(master, b"say 1\n")
        until(b"say 1\r\n")
        shown += os.read(master, 1)  # it answers
        child.send_signal(signal.SIGINT)
        until(b"(interrupted: what was said stays in the conversation)")
        until(b"> ")
        os.write(master, b"\x04")
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait()
        os.close(master)


def test_the_program_says_what_it_cannot_open() -> None:
    """Status 2 and one message; deepspeed is not imported, so that it starts quickly."""
    code = (
        "import sys; sys.argv = ['chat.py', '--model_path', '/nowhere.pth']; sys.path.insert(0, 'launch')\n"
        "import chat\n"
        "try: chat.main()\n"
        "finally: print('deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n") and done.stderr.startswith("error: /nowhere.pth: expected")
