"""Rendering of templates: bounded in time and memory, sandboxed; what they may read; the date."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from simple_llama.common.errors import UserError
from simple_llama.finetune import templates
from simple_llama.finetune.templates import TemplateRenderer

HI = [{"role": "user", "content": "Hi"}]


def rendered(template: str, given: dict[str, Any] | None = None) -> str:
    """A chat of one message, or the error."""
    [found] = TemplateRenderer(template, {"bos_token": "<s>"}, given or {}, "model").render([(HI, True)])
    return found.text or f"error: {found.error}"


def test_what_templates_see() -> None:
    """Messages, whether an answer is asked for, named tokens, tojson without HTML, blocks cut out of lines, generation
    blocks, and loop controls."""
    assert rendered("{{ bos_token }}{{ messages[0].content }}{{ add_generation_prompt }}") == "<s>HiTrue"
    assert rendered("{{ {'a': '<\u00e9>'} | tojson }}") == '{"a": "<\u00e9>"}'
    assert rendered("{% for m in messages %}\n    {% if true %}\nx\n    {% endif %}\n{% endfor %}") == "x\n"
    assert rendered("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Hi"
    assert rendered("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError: access to attribute 'append'"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('roles must alternate') }}", "error: roles must alternate"),
        ("{{ raise_exception('\\x1b[2J\\nx') }}", "error: '\\x1b[2J\\nx'"),
        ("{{ '\\ud800' }}", "error: UnicodeEncodeError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
        ("{{ messages[0].content.ljust(10 ** 12) }}", "MemoryError"),
        ("{{ messages[0].content * 1000000 }}", "it wrote 2,000,000 characters, more than 1,048,592"),
    ],
)
def test_errors_of_a_rendering(template: str, words: str) -> None:
    """Said in the template's words where it raises them; 1,048,592 = 2**20 + 8 * len("Hi")."""
    assert words in rendered(template)


def test_renderings_without_end_are_ended() -> None:
    """Nested loops, and a macro that calls itself twice: each ends after the CPU time that a rendering may take, and
    the chats behind it are rendered still."""
    template = (
        "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}"
        "{% if messages[0].content == 'calls' %}{{ f(0) }}{% elif messages[0].content == 'loops' %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% else %}fine{% endif %}"
    )
    renderer = TemplateRenderer(template, {}, {}, "model", cpu_seconds=0.1)
    chats = [([{"role": "user", "content": text}], True) for text in ("x", "calls", "y", "loops", "z")]
    found = renderer.render(chats)
    assert [one.text for one in found] == ["fine", "", "fine", "", "fine"]
    assert all("took more than" in one.error for one in (found[1], found[3]))


def test_memory_is_bounded() -> None:
    """A string of 2 GiB, twice what a rendering may take and no more than a machine has: asked for at once, since how
    fast a machine hands out pages would decide whether the bound of memory is met before that of CPU time."""
    filling = "{% set n = namespace(x='a') %}{% set n.x = n.x * 2147483648 %}{{ n.x | length }}"
    assert "MemoryError" in rendered(filling) or "too much memory" in rendered(filling)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "Expected an expression, got 'end of statement block', line 1"),
        ("{{ 'x' | nofilter }}", "No filter named 'nofilter'., line 1"),
        ("{{ ['x', 'y'] | random }}", "No filter named 'random'., line 1"),
        ("{{ 'x' | center(10 ** 12) }}{{ 'x' * 10 ** 12 }}", ""),
        ("{{ " + "(" * 100_000, ""),
    ],
)
def test_what_cannot_be_compiled(template: str, words: str) -> None:
    """A message at once. jinja2 computes constants when it compiles: their memory is bounded too."""
    with pytest.raises(UserError, match="model: expected a chat template") as raised:
        TemplateRenderer(template, {}, {}, "model").render([(HI, True)])
        raise UserError("model: expected a chat template")  # compiled without folding: the rendering is bounded
    assert words in str(raised.value)


def test_names_that_a_template_does_not_read_are_refused() -> None:
    """An option without effect is an error, with the names that would have one."""
    template = "{{ bos_token }}{{ messages }}{% if enable_thinking %}{{ strftime_now('%d') }}{% endif %}"
    TemplateRenderer(template, {"bos_token": ""}, {"enable_thinking": True, "date_string": "x"}, "model")
    with pytest.raises(UserError, match=r"reads \(date_string, enable_thinking\), found typo"):
        TemplateRenderer(template, {"bos_token": ""}, {"typo": 1}, "model")


def test_the_date_is_never_the_day() -> None:
    """`date_string` where it was given; else the template's fallback, or a constant where it has none."""
    asks = "{{ strftime_now('%d %b %Y') }}"
    falls_back = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}of old{% endif %}"
    assert rendered(asks) == "26 Jul 2024"
    assert rendered(falls_back) == "of old"
    given = {"date_string": "1 May 1999"}
    assert rendered(asks, given) == rendered(falls_back, given) == "1 May 1999"


def test_long_chats_do_not_share_the_memory_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most ten characters at once: 3 + 7, then 20 alone, then 1 and 1."""
    monkeypatch.setattr(templates, "_MOST_AT_ONCE", 10)
    renderer = TemplateRenderer("{{ messages[0].content | length }}", {}, {}, "model")
    sent: list[int] = []
    send = renderer._send
    monkeypatch.setattr(renderer, "_send", lambda chats: (sent.append(len(chats)), send(chats)))
    found = renderer.render([([{"role": "user", "content": "x" * length}], True) for length in (3, 7, 20, 1, 1)])
    assert [one.text for one in found] == ["3", "7", "20", "1", "1"]
    assert sent == [2, 1, 2]


@pytest.mark.parametrize(
    ("worker", "words"),
    [
        ("import nosuch", "No module named 'nosuch'"),
        ("import os; os.kill(os.getpid(), 9)", "its process was killed"),
        ("raise SystemExit(3)", "its process ended with status 3"),
    ],
)
def test_a_process_that_cannot_start_is_no_slow_template(
    worker: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own last words are said, or its status; of the first process and of one that takes another's place."""
    renderer = TemplateRenderer("{{ messages[0].content * 10 ** 12 }}", {}, {}, "model")
    (tmp_path / "worker.py").write_text(worker)
    monkeypatch.setattr(templates, "_WORKER", tmp_path / "worker.py")
    with pytest.raises(UserError, match=f"renders chat templates .* cannot start: .*{words}"):
        TemplateRenderer("x", {}, {}, "model")
    renderer._process.kill()  # pyright: ignore[reportOptionalMemberAccess]
    assert "was killed" in renderer.render([(HI, True)])[0].error
    with pytest.raises(UserError, match="cannot start"):
        renderer.render([(HI, True)])


def test_too_little_memory_to_start_is_said() -> None:
    """A limit that this process lives under already (ulimit -v), but no further one can start under."""
    code = (
        "import resource; from simple_llama.finetune.templates import TemplateRenderer\n"
        "resource.setrlimit(resource.RLIMIT_AS, (16 << 20, 16 << 20)); TemplateRenderer('x', {}, {}, 'model')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError: expected a process that renders chat templates" in ended.stderr
    assert "took more than" not in ended.stderr


def test_the_process_ends_with_a_killed_parent() -> None:
    """Though a fork of the parent keeps its input open; and a fork that ends leaves the process alone."""
    code = (
        "import os, signal, sys, time; from simple_llama.finetune.templates import TemplateRenderer\n"
        "signal.alarm(20)\n"
        "renderer = TemplateRenderer('x', {}, {}, 'model')\n"
        "if not (child := os.fork()): sys.exit()\n"
        "os.waitpid(child, 0); assert renderer.render([([], True)])[0].text == 'x'\n"
        "if not (child := os.fork()): time.sleep(60)\n"
        "print(renderer._process.pid, child, flush=True); os.kill(os.getpid(), 9)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    worker, child = map(int, parent.stdout.readline().split())
    try:
        assert parent.wait() == -signal.SIGKILL
        limit = time.monotonic() + 10
        while is_running(worker) and time.monotonic() < limit:
            time.sleep(0.05)
        assert not is_running(worker) and is_running(child)
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def is_running(pid: int) -> bool:
    """Whether a process is there, and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_process_ends_with_its_renderer() -> None:
    """It is waited for, so no zombie stays."""
    renderer = TemplateRenderer("x", {}, {}, "model")
    process = renderer._process
    assert process is not None and process.poll() is None
    del renderer
    assert process.returncode is not None
