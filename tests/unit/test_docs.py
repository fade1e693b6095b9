"""The pages that come from the code are what the code gives now."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from typing_extensions import Doc

from docs import losses, one_pair, settings
from simple_llama.common.settings import WHOLE, Bounds, Count, PathText, Settings
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig, parse_config
from tiny_job import TINY

ROOT = Path(__file__).resolve().parents[2]
MEASURED = re.compile(r"-?\d+\.\d{4}\b")


@dataclass(frozen=True)
class Small(Settings):
    """A class of settings."""

    rate: Annotated[float, Bounds(0, 1, above=True, below=True)] = 0.5  # how fast | how far
    count: Count = 3  # things
    seed: Annotated[int, Bounds(0, WHOLE), Doc("of <it>")] = 0
    place: PathText = "here"  # where
    kind: Literal["a", "b"] = "a"  # which
    loud: bool = False  # more lines


@dataclass(frozen=True)
class Larger(Small):
    """Inherits them, and adds one.

    Not shown.
    """

    name: str = ""  # of the run


def test_settings_page_is_made_from_the_settings() -> None:
    """docs/settings.md is what `make docs` writes."""
    assert settings.PAGE.read_text() == settings.page(), "run `make docs`"


def test_a_setting_stands_in_the_section_of_its_owner() -> None:
    """Default, values and help of each kind of setting; an inherited one stands where it is declared."""
    page = settings.page(Larger)
    home = f"{__name__.replace('.', '/')}.py"
    assert [line for line in page.splitlines() if line.startswith(("## ", "| `", f"`{home}"))][:10] == [
        "## Small",
        f"`{home}`: A class of settings.",
        "| `rate` | `0.5` | above 0 to below 1 | how fast \\| how far |",
        "| `count` | `3` | 1 or more | things |",
        "| `seed` | `0` | 0 or more | of \\<it> |",
        "| `place` | `here` | path | where |",
        "| `kind` | `a` | `a`, `b` | which |",
        "| `loud` | `False` | switch | more lines |",
        "## Larger",
        f"`{home}`: Inherits them, and adds one.",
    ]
    assert "| `name` | (empty) | text | of the run |" in page


def test_a_setting_without_help_is_an_error() -> None:
    """So is one whose comment the command line would not find, because the field takes several lines."""

    @dataclass(frozen=True)
    class Silent(Settings):
        """Has a comment that is no help."""

        rate: Annotated[float, Bounds(0, 1)] = (
            0.5  # how fast
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"Silent\.rate: expected a Doc, or a comment"):
        settings.page(Silent)


def test_help_of_the_command_line_is_that_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` and docs/settings.md say the same of every setting."""
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    words = " ".join(re.sub(r"[\u2500-\u257f]", " ", capsys.readouterr().out).split())  # without the frame
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", settings.PAGE.read_text(), re.MULTILINE)
    fields = {field.name for field in dataclasses.fields(DPOConfig)}
    helps = {name: what.replace("\\", "") for name, what in rows if name in fields}
    assert helps.keys() == fields
    assert [name for name, what in helps.items() if f"{what} (default:" not in words] == []


def test_losses_page_is_made_from_the_losses() -> None:
    """docs/losses.md is what `make docs` writes, but for its errors' powers of ten, which a CPU may round otherwise."""
    power = re.compile(r"\| 1e-\d+ \| 1e-\d+ \|")
    written, made = losses.PAGE.read_text(), losses.page()
    assert power.sub("#", written) == power.sub("#", made), "run `make docs`"
    assert losses.outcomes().keys() == losses.found_errors().keys() - {"orpo:2,hinge:0.5", "aot:0.7,sigmoid:0.3"}


def test_a_setting_that_may_be_unset_is_shown_as_that() -> None:
    """Its values are those that it has when it is given."""

    @dataclass(frozen=True)
    class Unset(Settings):
        """Has defaults of its owner."""

        rate: Annotated[float | None, Bounds(0, 1)] = None  # how fast
        kind: Literal["a", "b"] | None = None  # which

    page = settings.page(Unset)
    assert "| `rate` | unset | 0 to 1 | how fast |" in page and "| `kind` | unset | `a`, `b` | which |" in page


def test_one_pair_page_is_made_by_the_program() -> None:
    """docs/one_pair.md has the text that `make docs` writes, and its numbers but for their last digit.

    A sum of 640 nats in fp32 has a last bit of 6e-5, and a CPU may round it either way.
    """
    written, made = one_pair.PAGE.read_text(), one_pair.page()
    assert MEASURED.sub("#", written) == MEASURED.sub("#", made), "run `make docs`"
    pairs = list(zip(map(float, MEASURED.findall(written)), map(float, MEASURED.findall(made)), strict=True))
    assert len(pairs) == 21
    assert [pair for pair in pairs if not math.isclose(*pair, rel_tol=1e-6, abs_tol=2e-4)] == []


def test_one_pair_walks_the_tests_model_by_hand() -> None:
    """The model is that of tests/tiny_job.py. Before the step d = 0: the loss is ln 2 and the slopes are -+ beta / 2.

    After it the loss is -log sigmoid(beta d) of the d shown.
    """
    assert one_pair.MODEL == TINY
    seen = one_pair.walk()
    assert seen.stored == seen.before.logps
    assert (seen.before.margin, seen.coefficients) == (0.0, [-0.25, 0.25])
    assert seen.before.loss == pytest.approx(math.log(2), abs=1e-7)
    assert seen.after.margin > 1
    assert seen.after.loss == pytest.approx(math.log1p(math.exp(-0.5 * seen.after.margin)), abs=1e-6)
