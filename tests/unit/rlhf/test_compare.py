"""launch/compare.py: which of several runs is better, from their folders alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simple_llama.common.errors import UserError
from simple_llama.reinforcement_learning.rlhf.compare import CompareConfig, compare_runs

PAIRS = 88


def evaluation(
    step: int, right: float, margin: float, beta: float, chosen: float, pairs: int = PAIRS
) -> dict[str, Any]:
    """A line of metrics.jsonl: `right` pairs of `pairs`, margin and chosen log-ratio in nats."""
    return {
        "step": step,
        "eval_loss": 0.5,
        "eval_rewards/accuracies": right / pairs,
        "eval_rewards/margins": beta * margin,
        "eval_rewards/chosen": beta * chosen,
        "eval_rewards/rejected": beta * (chosen - margin),
        "eval_logps/chosen": -500.0,
        "eval_logps/rejected": -450.0,
        "eval_pairs": float(pairs),
        "eval_longer_is_chosen": 0.55,
    }


def make_run(folder: Path, right: float, margin: float = 4.0, chosen: float = -2.0, **settings: Any) -> Path:
    """The folder of a finished run of four steps, without its held-out pairs one by one."""
    settings = {"beta": 0.1, "loss_type": "sigmoid", "seed": 42, "val_share": 0.2, "epochs": 2, **settings}
    pairs, beta = settings.pop("pairs", PAIRS), settings["beta"]
    lines = [
        evaluation(0, pairs / 2, 0.0, beta, 0.0, pairs),
        {"step": 2, "loss": 0.6, "epoch": 1.0, "perf/step_time_s": 30.0, "perf/pairs_per_second": 5.0},
        evaluation(2, pairs / 2, margin / 2, beta, chosen / 2, pairs),
        {"step": 4, "loss": 0.5, "epoch": 2.0, "perf/step_time_s": 15.0, "perf/pairs_per_second": 7.0},
        evaluation(4, right, margin, beta, chosen, pairs),
    ]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**settings, "run_name": folder.name}))
    write_lines(folder / "metrics.jsonl", lines)
    (folder / "finished.json").write_text('{"step": 4}')
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """What it holds."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def add_pairs(
    folder: Path,
    right: range,
    data: str = "pairs.jsonl",
    step: int = 4,
    count: int = PAIRS,
    longer: Any = 0,
    **more: Any,
) -> None:
    """held_out.npz: margins of the pairs `right` are 5 nats, of all others -2; chosen answers are so much `longer`."""
    gaps_N = np.zeros(count, int) + longer
    margins_N = np.where([i in right for i in range(count)], 5.0, -2.0)
    logps_N2 = np.stack([margins_N, 0 * margins_N], axis=1).astype(np.float32)
    np.savez(
        folder / "held_out.npz",
        step=step,
        logps_N2=logps_N2 + np.array([-7, -17], np.float32),
        ref_N2=0 * logps_N2 + np.array([-7, -17], np.float32),
        counts_N2=np.stack([9 + gaps_N, 0 * gaps_N + 9], axis=1).astype(np.int32),
        origins=np.array([f"{data}:{i}" for i in range(count)]),
        **more,
    )


def compare(log_dir: Path, *runs: str) -> dict[str, Any]:
    """comparison.json; its words are on the terminal too."""
    shown = compare_runs(CompareConfig(runs, str(log_dir)))
    found = json.loads((log_dir / "comparison.json").read_text())
    assert all(words in shown for words in (*found["verdict"], *found["notes"]))
    return found


def test_betas_that_88_pairs_cannot_tell_apart(tmp_path: Path) -> None:
    """Accuracies .807, .841, .784 of 88 pairs: 71, 74 and 69 right. The best two differ by 3 / 88 = 0.0341; Newcombe's
    interval of Wilson's 0.7505 to 0.9028 and 0.7122 to 0.8757: 0.0341 - hypot(0.0904, 0.0689) = -0.0796, to 0.1471.

    Three comparisons, so z is 2.3940 + 0.8416, and pairs: (3.2356 / 0.0341)^2 * (0.1338 + 0.1558) = 2,609.
    """
    for beta, right, margin in ((0.05, 71, 9.0), (0.1, 74, 6.0), (0.5, 69, 3.0)):
        make_run(tmp_path / f"beta-{beta}", right, margin, beta=beta)
    found = compare(tmp_path, "beta-*")
    assert found["verdict"] == [
        "The held-out pairs cannot tell beta-0.1, beta-0.05 and beta-0.5 apart: beta-0.1 over beta-0.05 accuracy "
        "+0.034 (-0.080 to +0.147; unpaired); to tell the first two apart you need about 2,700 pairs; there are 88.",
        "Of those that cannot be told apart, beta-0.5 has moved least from its reference: "
        "3.5 (|log-ratio|, nats an answer).",
        "Margins at the same distance from the reference, 3.5 (|log-ratio|, nats an answer): "
        "beta-0.05 4.85, beta-0.1 4.20, beta-0.5 3.00 nats.",
        "Judged over all 3 comparisons together (Holm): 5 % for one wrong word among them.",
    ]
    (group,) = found["groups"]
    assert group["cannot_be_told_from_the_best"] == ["beta-0.1", "beta-0.05", "beta-0.5"]
    assert group["frontier"] == ["beta-0.1", "beta-0.5"]  # beta-0.05 is less accurate than 0.1, and further away
    assert found["settings_that_differ"] == {"beta": {"beta-0.1": 0.1, "beta-0.05": 0.05, "beta-0.5": 0.5}}


def test_never_fewer_pairs_are_asked_for_than_could_not_tell(tmp_path: Path) -> None:
    """7 of 7 against 2 of 7: p = 2 / 2^5, though by the normal distribution five such differences are plenty."""
    for name, right in (("a", 7), ("b", 2)):
        make_run(tmp_path / name, right, pairs=7)
        add_pairs(tmp_path / name, range(right), count=7)
    assert "(p 0.062); you need more than these 7 pairs." in compare(tmp_path, "a", "b")["verdict"][0]


def test_margin_and_distance_in_nats(tmp_path: Path) -> None:
    """Of beta 0.05: reward margin 0.45 is 9 nats; log-ratios -2 and -11: a distance of 6.5, passed by no other run.

    A run of beta 0.5 ends at (2 + 5) / 2 = 3.5, which the first passes between distances 3.25 and 6.5, at margins
    4.5 and 9: 4.5 + (0.25 / 3.25) 4.5 = 4.846.
    """
    make_run(tmp_path / "a", 71, 9.0, beta=0.05)
    make_run(tmp_path / "b", 74, 3.0, beta=0.5)
    add_pairs(tmp_path / "b", range(74))
    found = compare(tmp_path, "a", "b")
    by_name = {run["run"]: run for run in found["runs"]}
    assert by_name["a"]["margin_nats"] == [pytest.approx(9.0), None, None]
    assert by_name["a"]["log_ratio"] == pytest.approx({"chosen": -2.0, "rejected": -11.0})
    assert by_name["a"]["distance"] == pytest.approx(6.5)
    # 74 margins of 5 and 14 of -2: deviation 7 sqrt(74 14 / (88 87)) = 2.575, over sqrt(88) 0.2745, t of 87 is 1.9876
    half = by_name["b"]["margin_nats"][2] - by_name["b"]["margin_nats"][0]
    assert half == pytest.approx(0.5456, abs=5e-4)
    assert found["groups"][0]["margin_at_shared_distance"] == pytest.approx({"a": 4.8462, "b": 3.0}, abs=1e-4)


def test_pairs_tell_what_counts_cannot(tmp_path: Path) -> None:
    """67 and 59 of 88 right differ by less than chance where nothing more is known: z = 1.345, p = 0.18. Pair by pair
    all eight differences are for one run: p = 2 / 2^8 = 0.0078. With five it is 0.0625."""
    for name, right in (("a", 67), ("b", 59), ("c", 62)):
        make_run(tmp_path / name, right)
    assert compare(tmp_path, "a", "b")["verdict"][0].startswith("The held-out pairs cannot tell a and b apart")
    for name, right in (("a", 67), ("b", 59), ("c", 62)):
        add_pairs(tmp_path / name, range(right))
    found = compare(tmp_path, "a", "b")
    assert re.fullmatch(
        r"a is better than b: accuracy \+0\.091 \(\+0\.0[34]\d to \+0\.1[45]\d; they differ on 8 pairs\)\.",
        found["verdict"][0],
    )
    assert found["groups"][0]["differences"][0]["p"] == 2 / 2**8
    found = compare(tmp_path, "a", "c")
    assert found["groups"][0]["differences"][0]["p"] == 2 / 2**5
    assert "cannot tell a and c apart" in found["verdict"][0]
    assert (
        "they differ on 5 pairs), which may be chance (p 0.062); to tell them apart you need about"
        in found["verdict"][0]
    )


def test_pairs_of_one_prompt_are_no_independent_draws(tmp_path: Path) -> None:
    """The eight pairs on which two runs differ, of one prompt, are one difference: p = 2 / 2. Pairs that all are of one
    prompt, or of an earlier step, tell nothing by themselves."""
    for name, right in (("a", 67), ("b", 59)):
        make_run(tmp_path / name, right)
        add_pairs(tmp_path / name, range(right), prompts=np.r_[0:59, 8 * [59], 67:PAIRS])
    (prompts,) = compare(tmp_path, "a", "b")["groups"][0]["differences"]
    assert (prompts["p"], prompts["differ"]) == (1.0, 8)
    changes: list[dict[str, Any]] = [{"prompts": np.zeros(PAIRS, int)}, {"step": 2}]
    for changed in changes:
        add_pairs(tmp_path / "a", range(67), **changed)
        assert compare(tmp_path, "a", "b")["groups"][0]["differences"][0]["differ"] is None


def test_many_comparisons_are_judged_together(tmp_path: Path) -> None:
    """Nested: 69 and 63 right differ on 6 pairs, p = 2 / 2^6 = 0.03125. It is the largest of three comparisons, where
    Holm asks for 0.05; of the fifteen of six runs ten are left when its turn comes: 0.05 / 10."""
    for name, right in (("a", 69), ("b", 63), ("c", 40)):
        make_run(tmp_path / name, right)
        add_pairs(tmp_path / name, range(right))
    found = compare(tmp_path, "c", "b", "a")
    assert [sentence[:18] for sentence in found["verdict"][:3]] == [
        "a is the best of 3",
        "a is better than b",
        "a is better than c",
    ]
    for name, right in (("d", 69), ("e", 68), ("f", 67)):
        make_run(tmp_path / name, right)
        add_pairs(tmp_path / name, range(right))
    group = compare(tmp_path, "*")["groups"][0]
    assert group["runs"] == ["a", "d", "e", "f", "b", "c"]
    assert group["cannot_be_told_from_the_best"] == ["a", "d", "e", "f", "b"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pairs": 90}, "other held-out pairs: 90, not 88"),
        ({"seed": 7}, "other held-out pairs: seed is 7, not 42"),
        ({"val_share": 0.1}, "other held-out pairs: val_share is 0.1, not 0.2"),
    ],
)
def test_other_held_out_pairs_are_shown_and_judged_apart(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    """By their number, or by what chooses them."""
    make_run(tmp_path / "a", 80)
    make_run(tmp_path / "b", 60, **change)
    found = compare(tmp_path, "a", "b")
    assert found["notes"] == [f"b is not comparable with a: {why}; shown, and judged apart"]
    assert found["verdict"][0].startswith("No two finished runs have the same held-out pairs")
    assert [run["run"] for run in found["runs"]] == ["a", "b"]


def test_other_data_is_seen_in_the_pairs_and_in_the_start(tmp_path: Path) -> None:
    """By their origins; without them by the start model's log-probs, 0.2 % apart, where another seed may stand."""
    make_run(tmp_path / "a", 80)
    path = make_run(tmp_path / "b", 60) / "metrics.jsonl"
    lines = lines_of(path)
    write_lines(path, [{**lines[0], "eval_logps/chosen": -501.0}, *lines[1:]])
    apart = "before training their log-probs are -501.00, not -500.00 nats an answer"
    assert f"other held-out pairs or another start model: {apart}; shown" in compare(tmp_path, "a", "b")["notes"][0]
    add_pairs(tmp_path / "a", range(80))
    add_pairs(tmp_path / "b", range(60))
    assert compare(tmp_path, "a", "b")["notes"] == [
        f"b began with another model than a, and each is measured against its own start: {apart}"
    ]
    add_pairs(tmp_path / "b", range(60), data="others.jsonl")
    assert "other held-out pairs, or other tokens" in compare(tmp_path, "a", "b")["notes"][0]


def test_runs_that_say_nothing_are_shown_and_not_judged(tmp_path: Path) -> None:
    """One that has not ended, and one without held-out pairs; what is level with a rule is said."""
    text = f"answers loop: {'0.5 of ' * 50}them. A larger beta"
    write_lines(make_run(tmp_path / "a", 50) / "warnings.jsonl", [{"step": 4, "level": "alarm", "text": text}])
    make_run(tmp_path / "b", 49)
    path = make_run(tmp_path / "c", 80)
    (path / "finished.json").unlink()
    write_lines(path / "metrics.jsonl", lines_of(path / "metrics.jsonl")[:3])
    path = make_run(tmp_path / "d", 80) / "metrics.jsonl"
    write_lines(path, lines_of(path)[1::2])
    path = make_run(tmp_path / "e", 80, val_share=0.0) / "metrics.jsonl"
    write_lines(path, lines_of(path)[1::2])
    found = compare(tmp_path, "c", "d", "e", "a", "b")
    assert found["notes"] == [
        "c: unfinished at step 2 of 4; shown, and not judged",
        "d: no evaluation recorded, so that nothing says how good it is; shown, and not judged",
        "e: no held-out pairs (val_share 0), so that nothing says how good it is; shown, and not judged",
    ]
    assert [run["run"] for run in found["runs"]] == ["a", "b", "c", "d", "e"]
    assert found["verdict"][-2] == f"Beware: a gave 1 alarm: answers loop: {'0.5 of ' * 50}them."
    assert 'the rule "the longer answer is chosen" scores 0.550' in found["verdict"][-1]
    assert "and a, with 0.568, is not shown to do better" in found["verdict"][-1]


def test_a_rule_is_compared_pair_by_pair(tmp_path: Path) -> None:
    """40 of 88 chosen answers are longer, 48 shorter, and the run is right in these and in ten more: all ten
    differences are for it, 2 / 2^10, though its interval, from 0.552 on, hardly leaves out the rule's 0.545. Four more
    are 2 / 2^4."""
    longer = np.where(np.arange(PAIRS) < 48, -3, 3)
    make_run(tmp_path / "b", 20)
    add_pairs(tmp_path / "b", range(20), longer=longer)
    for name, right in (("ten", 48 + 10), ("four", 48 + 4)):
        path = make_run(tmp_path / name, right) / "metrics.jsonl"
        write_lines(path, [{**line, "eval_longer_is_chosen": 40 / 88} for line in lines_of(path)])
        add_pairs(tmp_path / name, range(right), longer=longer)
        said = [text for text in compare(tmp_path, name, "b")["verdict"] if "shorter answer is chosen" in text]
        assert bool(said) == (name == "four"), compare(tmp_path, name, "b")["verdict"]


def test_kl_is_the_distance_where_all_have_it(tmp_path: Path) -> None:
    """samples/kl at every evaluation: the frontier and the equal distance are then of KL."""
    for name, kl in (("a", 0.2), ("b", 0.1)):
        path = make_run(tmp_path / name, 70) / "metrics.jsonl"
        added = [
            {"samples/kl": kl * line["step"] / 4, "samples/kl_low": 0.0, "samples/kl_high": 1.0}
            for line in lines_of(path)
        ]
        write_lines(path, [line | more for line, more in zip(lines_of(path), added, strict=True)])
    found = compare(tmp_path, "a", "b")
    (group,) = found["groups"]
    assert group["distance"] == "KL to the reference, nats an answer token"
    assert (group["shared_distance"], group["frontier"]) == (0.1, ["b"])
    assert group["margin_at_shared_distance"] == pytest.approx({"a": 2.0, "b": 4.0})
    assert found["runs"][0]["kl"] == [0.1, 0.0, 1.0]


def test_the_page_has_curves_of_eight_runs_and_all_warnings(tmp_path: Path) -> None:
    """Nine runs: tables of all, curves of the best eight. Text of a run is escaped."""
    for right in range(60, 69):
        make_run(tmp_path / f"r{right}", right)
    warnings = [{"step": 2, "level": "alarm", "name": "looped", "text": "<b>answers loop</b>"}]
    write_lines(tmp_path / "r60" / "warnings.jsonl", [*warnings, {"step": 1, "level": "notice", "text": "small"}])
    found = compare(tmp_path, "r*")
    assert [run["run"] for run in found["runs"]][:2] == ["r68", "r67"]
    page = (tmp_path / "comparison.html").read_text()
    assert "Of the best 8 runs; the tables have all 9." in page
    assert "&lt;b&gt;answers loop&lt;/b&gt;" in page
    chart = re.search(r"<svg.*?</svg>", page, re.DOTALL)
    assert chart and "r61" in chart[0] and "r60" not in chart[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert ["r60", "finished, 4 steps", "1", "1", "-", "-", "-", "-", "1.5", "6", "-"] in rows  # 2 * 30 + 2 * 15 s


def test_what_is_refused(tmp_path: Path) -> None:
    """Each by its name: nothing there, no run, records that lack, one run twice, a single run."""
    make_run(tmp_path / "runs" / "a", 70)
    make_run(tmp_path / "runs" / "b", 70)
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "half").mkdir()
    (tmp_path / "runs" / "half" / "config.json").write_text("{}")

    def refused(*runs: str) -> str:
        with pytest.raises(UserError) as caught:
            compare_runs(CompareConfig(runs, str(tmp_path / "runs")))
        return str(caught.value)

    assert "none: expected a run's folder with config.json and metrics.jsonl, found no" in refused("a", "none")
    assert "found none in" in refused("a", "empty")
    assert "found a folder of runs (a, b, half)" in refused("a", str(tmp_path / "runs"))
    assert "half: expected the records of a run, found no metrics.jsonl" in refused("a", "half")
    assert "the same run twice, also as" in refused("a", str(tmp_path / "runs" / "b" / ".." / "a"))
    assert "expected at least two runs, found 1" in refused("a")
    (tmp_path / "runs" / "b" / "held_out.npz").write_bytes(b"PK")
    found = compare(tmp_path / "runs", "a", "b")  # no reason to refuse: less is known
    assert found["notes"] == ["b: held_out.npz cannot be read; compared by its accuracy alone"]
    (tmp_path / "runs" / "b" / "held_out.npz").unlink()
    other = make_run(tmp_path / "others" / "a", 70)
    both = f"{tmp_path / 'runs' / 'a'} and {other} apart"  # two runs of one name
    assert both in compare_runs(CompareConfig(("a", str(other)), str(tmp_path / "runs")))
    assert "not runs, left out: empty" in "".join(compare_runs(CompareConfig(("[abe]*",), str(tmp_path / "runs"))))
