"""launch/evaluate.py: models against pairs, their answers, the judge's words, and the report of it all.

One model at a time is in memory: its log-probs go to the store, its answers are kept as text.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from simple_llama.cluster import stopping, watchdog
from simple_llama.cluster.distributed import Ranks, broadcast_object, fail_together, require_same
from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.common.logging import LOGGER
from simple_llama.interop.open_start import start_metadata
from simple_llama.reinforcement_learning.rlhf.assess.answers import (
    TRAINING,
    Questions,
    answer_all,
    prompt_text,
    questions_of,
)
from simple_llama.reinforcement_learning.rlhf.assess.evaluate_config import EvaluateConfig, beta_of, default_folder
from simple_llama.reinforcement_learning.rlhf.assess.judge import Duel, judge_all
from simple_llama.reinforcement_learning.rlhf.assess.scoring import (
    categories,
    check_same_pairs,
    log_probs,
    pairs_asked,
)
from simple_llama.reinforcement_learning.rlhf.data.pair_set import PairSet
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs, load_inputs
from simple_llama.reinforcement_learning.rlhf.report.evaluation import (
    HTML,
    JSON,
    Evaluation,
    Example,
    write_evaluation,
)
from simple_llama.reinforcement_learning.rlhf.report.evaluation_numbers import (
    START,
    Answers,
    ScoredPairs,
    extremes,
    judge_numbers,
)
from simple_llama.reinforcement_learning.rlhf.run.run_folder import environment
from simple_llama.reinforcement_learning.rlhf.run.saves import start_digest

_EXAMPLES = 5  # pairs with the largest gain, and as many with the largest loss


def assess(config: EvaluateConfig, ranks: Ranks) -> Path:
    """Evaluates the models and writes the report (collective); returns its folder.

    Raises UserError for what a person can put right, Stopped on request, with all log-probs so far in the store.
    """
    started = time.monotonic()
    folder = Path(broadcast_object(config.output or str(default_folder(time.strftime("%Y%m%d-%H%M%S"))), ranks, str))
    with fail_together(ranks):
        _check_free(folder)
    require_same("settings", asdict(config), ranks)
    first = load_inputs(config.inputs_of(config.model_path), ranks, ref_cache_dir=config.ref_cache_dir)
    with fail_together(ranks):
        doubts = _doubts(config, first)
        pairs, which = pairs_asked(config, first)
        questions = None
        if config.generate:
            questions = questions_of(first.data, pairs, first.chat, config.generate, config.ascii_text)
    stopping.agree(ranks, at_once=True)
    LOGGER.info("evaluating on %s", which)
    sums, answers, digests = {}, dict[str, dict[str, Answers]](), {}
    for name, path in _named(config).items():
        inputs = first
        if name != START:
            inputs = load_inputs(config.inputs_of(path, first.max_seq_len), ranks, first, config.ref_cache_dir)
            with fail_together(ranks):
                check_same_pairs(inputs, first)
        sums[name] = log_probs(config, inputs, pairs, ranks)
        digests[name] = {"path": str(inputs.start.path), **inputs.reference_id}
        if questions:
            answers[name] = _answers(config, inputs, questions, ranks)
    judged = _judge(config, questions, answers, ranks)
    with watchdog.patience("writing the report"), fail_together(ranks):
        if ranks.is_main:
            betas = {name: beta_of(config, path) for name, path in _named(config).items() if name != START}
            scored = ScoredPairs(pairs.keys["counts"], pairs.prompts, categories(pairs), sums, betas, config.seed)
            facts = _facts(config, first, pairs, digests, ranks, time.monotonic() - started) | {"doubts": doubts}
            examples = {name: _examples(first, pairs, scored, name) for name in scored.models}
            texts = questions.texts if questions else ()
            said = write_evaluation(folder, Evaluation(which, scored, facts, examples, texts, answers, judged))
            for sentence in said:
                LOGGER.info("%s", sentence)
    LOGGER.info("report: %s and %s", folder / HTML, folder / JSON)
    return folder


def _check_free(folder: Path) -> None:
    """UserError where a report lies already, or none can be written: before the work, not after it."""
    for name in (HTML, JSON):
        if os.path.lexists(folder / name):
            raise UserError(f"{folder / name}: expected no report there yet; choose another --output, or move it away")
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"output: {there}: expected a folder, or nothing there yet; found something else")


def _doubts(config: EvaluateConfig, first: Inputs) -> list[str]:
    """A warning for each model that says it was trained from another model than the start model; logged too."""
    found = []
    for path in config.paths:
        metadata = start_metadata(path)
        reference, began = metadata.get("reference"), start_digest(metadata)
        weights = reference.get("weights") if isinstance(reference, Mapping) else None
        if began not in (None, first.start.digest):
            found.append(
                f"{path} was not trained from {first.start.path}, but from a model with the digest {shown(began)}: "
                "its rewards are measured from another model than its training had"
            )
        elif weights not in (None, first.start.digest):
            found.append(
                f"{path} was trained from {first.start.path} against another reference, of the digest "
                f"{shown(weights)}: its rewards are measured from another model than its training had"
            )
    for doubt in found:
        LOGGER.warning("%s", doubt)
    return found


def _named(config: EvaluateConfig) -> dict[str, str]:
    """The paths of all models by the names that the report has for them: as short as tells them apart."""
    parts = [Path(path).parts for path in config.paths]
    for length in range(1, 1 + max(map(len, parts), default=0)):
        names = ["/".join(part[-length:]) for part in parts]
        if len({START, *names}) == len(names) + 1:
            break
    else:
        names = list(config.paths)
    return {START: config.model_path, **dict(zip(names, config.paths, strict=True))}


def _answers(config: EvaluateConfig, inputs: Inputs, questions: Questions, ranks: Ranks) -> dict[str, Answers]:
    """A model's answers by the form of the prompts (collective)."""
    LOGGER.info("answers of %s to %d prompts", inputs.start.path, len(questions.texts))
    with watchdog.patience("loading a model"):
        model = inputs.build_reference(ranks.device)
    return answer_all(model, inputs.chat, questions, config, config.seed, ranks)


def _judge(
    config: EvaluateConfig,
    questions: Questions | None,
    answers: Mapping[str, Mapping[str, Answers]],
    ranks: Ranks,
) -> dict[str, Any]:
    """What the judge says of each model against the start model (collective); nothing without one."""
    names = [name for name in answers if name != START]
    if not (config.judge and questions and names):
        return {}
    duels = [
        Duel(*texts)
        for name in names
        for texts in zip(questions.texts, answers[name][TRAINING].texts, answers[START][TRAINING].texts, strict=True)
    ]
    verdicts, count = judge_all(config.judge, duels, config.judge_timeout_s, ranks), len(questions.texts)
    found = {}
    for number, name in enumerate(names):
        mine = verdicts[number * count :][:count]
        found[name] = judge_numbers([one.score for one in mine], [one.flipped for one in mine])
    return found


def _examples(first: Inputs, pairs: PairSet, scored: ScoredPairs, name: str) -> tuple[list[Example], list[Example]]:
    """The pairs that a model has moved furthest in the right and in the wrong direction."""
    found = []
    for places in extremes(scored.margins(name), _EXAMPLES):
        said = first.data.conversations(pairs.select(places))
        found.append(
            [
                Example(
                    pairs.origin(place),
                    prompt_text(text),
                    (text.chosen[-1], text.rejected[-1]),
                    _floats(scored.sums[START][place]),
                    _floats(scored.sums[name][place]),
                )
                for place, text in zip(places, said, strict=True)
            ]
        )
    return found[0], found[1]


def _floats(sums_2: np.ndarray) -> tuple[float, float]:
    """The sums of chosen and rejected."""
    return float(sums_2[0]), float(sums_2[1])


def _facts(
    config: EvaluateConfig,
    first: Inputs,
    pairs: PairSet,
    digests: Mapping[str, Any],
    ranks: Ranks,
    seconds: float,
) -> dict[str, Any]:
    """All that it takes to do it again, and what the data's reader said."""
    settings = asdict(replace(config, max_seq_len=first.max_seq_len))
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "settings": settings,
        "models": dict(digests),
        "data": {
            "path": config.rlhf_dataset_path,
            "digest": first.data_digest,
            "digest_of_these_pairs": pairs.digest.hex(),
            "report": first.data.report,
            "warnings": list(first.data.warnings),
        },
        "environment": environment(),
        "ranks": str(ranks),
        "seconds": round(seconds, 1),
    }
