"""A page that is one file: headings, tables, charts, answers side by side; no network and no script.

Whatever comes from outside is escaped here, and nowhere else: texts go in as they are.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from simple_llama.inference.guards import ENDED_AT_ONCE
from simple_llama.reinforcement_learning.rlhf.report.style import STYLE
from simple_llama.reinforcement_learning.rlhf.report.words import marked_differences

Cell = str | float | int | None  # of a table; None: not recorded
_NOT_RECORDED = "not recorded"
_SHORT = 26  # characters of a cell that stays on one line
_MOST_SHOWN = 20_000  # characters of one text: a reader's, not a machine's, bound


def number(value: float | int | None, digits: int = 4) -> str:
    """A number for a reader: `digits` significant ones, thousands apart, tiny and huge ones as 5e-07; not NaN."""
    if value is None:
        return _NOT_RECORDED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("infinite" if value > 0 else "-infinite")
    if isinstance(value, int) or (value == round(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}"


class Page:
    """A report, built from above to below; `html()` is the file."""

    def __init__(self, title: str, subtitle: str = ""):
        self.title = title
        self._parts: list[str] = []
        self._figures: list[str] = []  # charts that follow each other stand in one grid
        aside = f'<p class="aside">{_text(subtitle)}</p>' if subtitle else ""
        self._parts.append(f"<header><h1>{_text(title)}</h1>{aside}</header>")

    def verdict(self, sentences: Iterable[str]) -> None:
        """What a reader takes home, in words; the first sentence is the largest."""
        first, *others = [*sentences] or ["Nothing can be said."]
        rest = "".join(f"<li>{_text(sentence)}</li>" for sentence in others)
        body = f'<p class="first">{_text(first)}</p>' + (f"<ul>{rest}</ul>" if rest else "")
        self._add(f'<section class="verdict" aria-label="verdict">{body}</section>')

    def heading(self, text: str) -> None:
        """Begins a section."""
        self._add(f"<h2>{_text(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """A paragraph; line breaks stay."""
        self._add(f"<p>{_text(text)}</p>")

    def quotation(self, text: str, caption: str = "") -> None:
        """A text as it is, in letters of one width."""
        above = f'<p class="caption">{_text(caption)}</p>' if caption else ""
        self._add(f"{above}<pre>{_text(_bounded(text))}</pre>")

    def warnings(self, found: Iterable[tuple[str, str]]) -> None:
        """Warnings as (level, text), the level "alarm" or "notice" in words before the text."""
        items = [
            f'<li class="{"alarm" if level == "alarm" else "notice"}"><b>{_text(level)}</b> {_text(text)}</li>'
            for level, text in found
        ]
        self._add(f'<ul class="warnings">{"".join(items)}</ul>')

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[Cell]], caption: str = "") -> None:
        """A table that scrolls inside its own box where it is wide. Numbers stand to the right, by `number`."""
        rows = [*rows]
        head = "".join(_header(header, [row[i] for row in rows]) for i, header in enumerate(headers))
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        above = f"<caption>{_text(caption)}</caption>" if caption else ""
        self._add(
            f'<div class="scroll" tabindex="0"><table>{above}<thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def figure(self, svg: str, caption: str = "") -> None:
        """A chart of charts.py, which is not escaped, with what it shows."""
        below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
        self._figures.append(f"<figure>{svg}{below}</figure>")

    def side_by_side(
        self,
        prompt: str,
        before: str,
        after: str,
        names: tuple[str, str] = ("start model", "policy"),
        note: str = "",
    ) -> None:
        """Two answers to a prompt with the words that differ marked; a column each, on a phone one below the other."""
        cut = _bounded(before), _bounded(after)
        marked = marked_differences(*cut)
        columns = "".join(
            f'<div class="answer"><h4>{_text(name)}</h4><div class="text">{text if raw.strip() else _ENDED}</div></div>'
            for name, raw, text in zip(names, cut, marked, strict=True)
        )
        below = f'<p class="aside">{_text(note)}</p>' if note else ""
        self._add(
            f'<article class="pair"><div class="prompt text">{_text(_bounded(prompt))}</div>'
            f'<div class="answers">{columns}</div>{below}</article>'
        )

    def commands(self, lines: Iterable[str]) -> None:
        """What a person types, a line each; those that begin with # are remarks."""
        self._add(f'<pre class="commands">{_text(chr(10).join(lines))}</pre>')

    def html(self) -> str:
        """The whole file, UTF-8."""
        self._close_figures()
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{_text(self.title)}</title><style>{STYLE}</style></head>\n"
            f"<body><main>\n{chr(10).join(self._parts)}\n</main></body></html>\n"
        )

    def _add(self, part: str) -> None:
        self._close_figures()
        self._parts.append(part)

    def _close_figures(self) -> None:
        if self._figures:
            self._parts.append(f'<div class="figures">{"".join(self._figures)}</div>')
            self._figures = []


_ENDED = f'<span class="aside">{ENDED_AT_ONCE}</span>'


def _text(text: str) -> str:
    """Text as HTML. What no file can hold (half a surrogate pair) or no page shows (NUL) is replaced."""
    return html.escape(text.encode("utf-8", "replace").decode().replace("\0", "\ufffd"))


def _bounded(text: str) -> str:
    """A text that a page can hold, with what was left out said."""
    text = text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
    if len(text) <= _MOST_SHOWN:
        return text
    return f"{text[:_MOST_SHOWN]} ... ({len(text) - _MOST_SHOWN:,} more characters)"


def _header(text: str, column: Sequence[Cell]) -> str:
    """The head of a column, to the right above numbers."""
    kind = ' class="number"' if column and not any(isinstance(cell, str) for cell in column) else ""
    return f'<th scope="col"{kind}>{_text(text)}</th>'


def _cell(value: Cell) -> str:
    """A cell of a table."""
    if isinstance(value, str):
        kind = ' class="short"' if len(value) <= _SHORT else ""
        return f"<td{kind}>{_text(value)}</td>"
    kind = "missing" if value is None else "number"
    return f'<td class="{kind}">{_text(number(value))}</td>'
