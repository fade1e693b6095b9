"""Which checkpoint is the best, and the end of a run that finds no better one: by itself, and in whole runs."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from simple_llama.cluster.distributed import Ranks
from simple_llama.common.errors import UserError
from simple_llama.pretraining.weights import load_weights
from simple_llama.reinforcement_learning.rlhf.apply_dpo import train
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig
from simple_llama.reinforcement_learning.rlhf.dry_run import describe
from simple_llama.reinforcement_learning.rlhf.inputs import load_inputs
from simple_llama.reinforcement_learning.rlhf.run.agenda import Agenda
from simple_llama.reinforcement_learning.rlhf.run.best import Best, BestConfig
from tiny_job import TinyJob, make_job

# Of 6 steps, an evaluation after each and no save but at epochs' ends, 3 and 6.
QUICK: dict[str, Any] = {"eval_interval": 1, "n_samples": 0, "log_interval": 5, "reference": "online"}
FALLS_AND_RISES = {1: 0.6, 2: 0.5, 3: 0.7, 4: 0.5, 5: 0.4, 6: 0.45}  # held-out losses by step


@pytest.fixture
def job(tmp_path: Path) -> TinyJob:
    return make_job(tmp_path)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations find these losses."""
    see = Best.see
    monkeypatch.setattr(
        Best, "see", lambda self, step, values: see(self, step, {**values, "eval_loss": FALLS_AND_RISES[step]})
    )


def run_job(job: TinyJob, ranks: Ranks, **settings: Any) -> Path:
    """Trains; gives the last exported path."""
    config = DPOConfig(**{**job.settings, **QUICK, **settings})
    return train(config, load_inputs(config, ranks), ranks)


def found(job: TinyJob, name: str, run: str = "tiny") -> dict[str, Any]:
    """A JSON file of a run."""
    return json.loads((job.folder / "runs" / run / name).read_text())


def steps_of_exports(job: TinyJob, run: str = "tiny") -> list[int]:
    """The steps of all exports that are there."""
    return sorted(load_weights(path).metadata["step"] for path in (job.folder / "checkpoints" / run).glob("*.pth"))


def seen(ranks: Ranks, metric: Any, values: list[float], early_stop: int = 0) -> tuple[Best, list[bool]]:
    """What is found in these values, after each whether the run is to end."""
    best, ends = Best(BestConfig(metric, early_stop), Path("runs"), ranks), []
    for step, value in enumerate(values, 1):
        best.see(step, {metric: value})
        ends.append(best.ends)
    return best, ends


def test_the_lowest_loss_and_the_highest_accuracy(ranks: Ranks) -> None:
    """The first of equals; what is no number is no better."""
    values = [math.nan, 0.5, 0.7, 0.3, 0.3, 0.7, math.nan]
    assert str(seen(ranks, "eval_loss", values)[0]) == "eval_loss 0.3 at step 4"
    assert str(seen(ranks, "eval_rewards/accuracies", values)[0]) == "eval_rewards/accuracies 0.7 at step 3"
    assert str(seen(ranks, "eval_rewards/margins", [math.nan])[0]) == "none"


def test_a_run_ends_after_so_many_evaluations_without_a_better_one(ranks: Ranks) -> None:
    """Patience of two: an equal one is no better, a better one begins anew."""
    assert seen(ranks, "eval_loss", [0.5, 0.5, 0.4, 0.6, 0.7], 2)[1] == [False, False, False, False, True]
    assert not any(seen(ranks, "eval_loss", [0.5] * 9)[1])


def test_what_a_state_keeps_goes_on(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    """The count too; with another metric it begins anew, and something else is refused."""
    best, _ = seen(ranks, "eval_loss", [0.5, 0.6], 2)
    kept = json.loads(json.dumps(best.to_json()))
    again = Best(BestConfig("eval_loss", 2), Path("runs"), ranks, kept, "state.json")
    again.see(3, {"eval_loss": 0.5})
    assert again.ends and str(again) == str(best)
    assert Best(BestConfig("eval_rewards/margins"), Path("runs"), ranks, kept).to_json() is None
    assert "best_metric was eval_loss, is now eval_rewards/margins" in caplog.text
    for damaged in ({**kept, "step": "1"}, {**kept, "more": 1}, [1]):
        with pytest.raises(UserError, match="state.json: best: expected a step"):
            Best(BestConfig(), Path("runs"), ranks, damaged, "state.json")


def test_what_is_due_after_which_step(ranks: Ranks) -> None:
    """Two epochs of three steps that end with the fifth; evaluations every 2, saves every 4, lines every 10. Where a
    better evaluation would be saved, a line ends too."""
    config = DPOConfig(epochs=2, max_steps=5, eval_interval=2, save_interval=4, log_interval=10)
    best = Best(config, Path("runs"), ranks)

    def steps(agenda: Agenda, name: str) -> list[int]:
        return [step for step in range(1, 6) if getattr(agenda, name)(step)]

    plain, early = Agenda(config, 3, 1, best), Agenda(replace(config, early_stop=1), 3, 1, best)
    assert steps(plain, "ends_epoch") == [3, 5] and steps(plain, "evaluates_at") == [2, 3, 4, 5]
    assert steps(plain, "saves_at") == steps(plain, "logs_at") == steps(plain, "judges_at") == [3, 4, 5]
    assert steps(early, "saves_at") == [3, 4, 5] and steps(early, "logs_at") == [2, 3, 4, 5]
    assert steps(early, "judges_at") == [1, 2, 3, 4, 5]
    assert (list(plain.left(2)), plain.why_ended(5)) == ([2, 3, 4], "max_steps")
    assert Agenda(replace(config, max_steps=0), 3, 1, best).why_ended(6) == "all epochs are done"


def test_best_json_names_the_best_of_what_is_saved(job: TinyJob, ranks: Ranks, scripted: None) -> None:
    """Without early_stop that is an epoch's end: 0.45 at step 6. With saves every 2 steps, an end at 4 and one kept
    between epochs' ends, step 2's would go as 4's comes, but no later one is better than its 0.5."""
    path = run_job(job, ranks)
    assert found(job, "best.json") == {"step": 6, "metric": "eval_loss", "value": 0.45, "weights": str(path)}
    assert found(job, "finished.json")["ended"] == "all epochs are done" and steps_of_exports(job) == [3, 6]
    run_job(job, ranks, run_name="between", save_interval=2, keep_exports=1, max_steps=4)
    kept = found(job, "best.json", "between")
    assert (kept["step"], load_weights(kept["weights"]).metadata["step"]) == (2, 2)
    assert found(job, "finished.json", "between")["ended"] == "max_steps"
    assert steps_of_exports(job, "between") == [2, 3, 4]


def test_an_early_stop_keeps_the_best_and_survives_a_kill(job: TinyJob, ranks: Ranks, scripted: None) -> None:
    """Two evaluations without a better one than 0.5 at step 2: the run ends with step 4, whose epoch has not ended.
    Steps 1 and 2 were saved for being better; of those between epochs' ends one stays beside the best. Taken up at
    step 2, and at step 4 as killed before its report, it ends with the same files, lines and weights."""
    settings: dict[str, Any] = {"early_stop": 2, "keep_exports": 1, "keep_states": 9}
    last = run_job(job, ranks, **settings)
    kept, ended = found(job, "best.json"), found(job, "finished.json")
    assert (kept["step"], kept["value"], load_weights(kept["weights"]).metadata["step"]) == (2, 0.5, 2)
    assert (ended["step"], ended["weights"]) == (4, str(last)) and load_weights(last).metadata["step"] == 4
    assert ended["ended"] == "early_stop: no better evaluation in 2 than eval_loss 0.5 at step 2"
    assert steps_of_exports(job) == [2, 3, 4]
    folder, logs = job.folder / "checkpoints" / "tiny", job.folder / "runs" / "tiny"
    lines, weights = quiet(job.lines()), job.weights()
    for newest in (2, 4):
        for state in (folder / "state").iterdir():
            if int(state.name.removeprefix("step_")) > newest:
                shutil.rmtree(state)
        for name in ("best.json", "finished.json"):
            (logs / name).unlink()
        assert run_job(job, ranks, resume=True, **settings) == last
        assert found(job, "best.json") == kept and found(job, "finished.json")["ended"] == ended["ended"]
        assert quiet(job.lines()) == lines and steps_of_exports(job) == [2, 3, 4]
        assert all(torch.equal(tensor, weights[name]) for name, tensor in job.weights().items())


def quiet(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without what depends on the clock."""
    return [{name: value for name, value in line.items() if "perf/" not in name} for line in lines]


def test_a_best_export_that_is_gone_is_not_named(
    job: TinyJob, ranks: Ranks, scripted: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Deleted by a person: a run that goes on says so, and best.json goes too."""
    run_job(job, ranks, epochs=1, early_stop=3)
    weights = Path(found(job, "best.json")["weights"])
    weights.unlink()
    run_job(job, ranks, epochs=1, early_stop=3, resume=True)
    assert f"{weights}: the best checkpoint (eval_loss 0.5 at step 2) is no longer there" in caplog.text
    assert not (job.folder / "runs" / "tiny" / "best.json").exists()


def test_an_early_stop_needs_held_out_pairs(job: TinyJob, ranks: Ranks) -> None:
    """Said by the dry run and by the run; without them there is no best."""
    config = DPOConfig(**{**job.settings, **QUICK, "early_stop": 1, "val_share": 0.0})
    inputs = load_inputs(config, ranks)
    assert "early_stop: expected held-out pairs" in describe(config, inputs, ranks)
    with pytest.raises(UserError, match="early_stop: expected held-out pairs"):
        train(config, inputs, ranks)
    run_job(job, ranks, val_share=0.0, epochs=1)
    assert not (job.folder / "runs" / "tiny" / "best.json").exists()
