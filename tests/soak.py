"""The soak: a small job is killed (kill -9) again and again, and must end as one that never was, bit for bit.

    python tests/soak.py --kills 20 --seed 1 [--ranks 2] [--config bf16] [--places latest,prune] [--keep FOLDER]
    python tests/soak.py --kills 20 --change_ranks                       # 1 and 2 ranks by turns
    python tests/soak.py --changes 20 [--ranks 2] [--trainable lora]     # no kills: its inputs change under the run

Where it is killed is drawn from tests/crash_at.py's places without replacement, and from moments by the clock. After
each kill the command is what a person would type: the reference pass again, or training with --resume once there is
something to resume. With two ranks one of them is killed; the other one must end by itself. Where the number of ranks
changes, sums are made in another order, so the end is as near as that makes it (NOISES_ALLOWED in soak_run.py).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crash_at import PLACES
from soak_changes import TRAINABLE, Changes
from soak_run import CONFIGS, ENDS_BY_ITSELF_S, PRECOMPUTE, TOO_LONG_S, TRAIN, Failure, Twins, wait_for
from tiny_job import ENVIRONMENT

CRASH = "tests/crash_at.py"

# Beside the places in the code: moments by the clock, while a script starts and while steps are made.
CLOCK = ("clock_pass", "clock_start", "clock_steps")
ONLY_MAIN = {"reference", "records", "metrics", "samples", "weights", "state_json", "state_rename", "latest", "prune"}
ONLY_MAIN |= {"end"}
# Calls, of which one is drawn; one for all others.
SEVERAL = {"backward": 6, "step": 4, "metrics": 4, "shard": 2, "evaluate": 2, "samples": 2}
SEVERAL |= dict.fromkeys(("gather", "weights", "state_shard", "state_json", "state_rename", "latest", "prune"), 3)
ALL = [*PLACES, *CLOCK]


@dataclass
class Kill:
    """One kill, and what came of it."""

    place: str
    when: str
    rank: int
    call: int = 1
    delay_s: float = 0.0
    step: int = -1  # last one in metrics.jsonl
    others_ended_s: float = 0.0
    restart: str = ""

    def __str__(self) -> str:
        where = f"{self.place}, {self.when}"
        where += f" {self.delay_s:.2f} s" if self.place.startswith("clock") else f" call {self.call}"
        return f"{where}, rank {self.rank}"


class Soak(Twins):
    """A job that is killed, and its twin that is not."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.change_ranks = options.change_ranks
        self.kills = list[Kill]()
        super().__init__(folder, options, steps=6 * options.kills + 12)  # a kill takes place after six at most

    # === Starts ===

    def run_and_kill(self, script: str, kill: Kill) -> None:
        """A start in which one rank is killed; the others have to end by themselves, and not with success."""

        def stand_in(rank: int) -> tuple[str, dict[str, object]]:
            if rank != kill.rank or kill.place.startswith("clock"):
                return script, {}
            crash = {"script": script, "place": kill.place, "when": kill.when, "call": kill.call}
            return CRASH, {f"crash_{key}": value for key, value in crash.items()}

        before = self.lines_written("killed")
        ranks = self.start(script, "killed", stand_in)
        victim = ranks[kill.rank]
        if kill.place == "clock_steps":
            wait_for(lambda: victim.ended or self.lines_written("killed") > before, TOO_LONG_S)
        if kill.place.startswith("clock"):
            wait_for(lambda: victim.ended, kill.delay_s)
            victim.process.kill()
        wait_for(lambda: victim.ended or any(rank.ended for rank in ranks), TOO_LONG_S)
        died = time.monotonic()
        wait_for(lambda: all(rank.ended for rank in ranks), ENDS_BY_ITSELF_S)
        kill.others_ended_s = time.monotonic() - died
        hangs = [rank for rank in ranks if not rank.ended]
        for rank in ranks:
            rank.end()
        kill.restart, kill.step = said(ranks[0].output), self.last_step("killed")
        outputs = "\n".join(rank.output for rank in ranks)
        if hangs:
            raise Failure(f"{kill}: the other rank did not end within {ENDS_BY_ITSELF_S:g} s:\n{outputs}")
        if kill.place == "clock_pass" and not any(rank.process.returncode for rank in ranks):
            kill.restart += " (it ended before the clock)"
            return
        if kill.place == "reference" and not any(rank.process.returncode for rank in ranks):
            shutil.rmtree(self.folder("killed", "ref_cache_dir"))  # the other rank was the first to write it
            return self.run_and_kill(script, kill)
        if victim.process.returncode != -9:
            raise Failure(f"{kill}: was not reached, status {victim.process.returncode}:\n{outputs}")
        if any(rank.process.returncode == 0 for rank in ranks):
            raise Failure(f"{kill}: a rank ended with status 0 after another one was killed:\n{outputs}")

    # === The plan ===

    def draw(self, place: str) -> Kill:
        """The place's moment ("latest:half"), or one of its moments."""
        place, _, when = place.partition(":")
        rank = 0 if place in ONLY_MAIN else self.random.randrange(self.ranks)
        if place in PLACES:
            when = when or self.random.choice(sorted(PLACES[place]))
            return Kill(place, when, rank, self.random.randint(1, SEVERAL.get(place, 1)))
        longest = {"clock_pass": 0.5 * self.startup_s, "clock_start": 0.9 * self.startup_s, "clock_steps": 0.4}[place]
        return Kill(place, "after", rank, delay_s=self.random.uniform(0.0, longest))

    def plan(self, kills: int, places: Sequence[str]) -> tuple[list[str], list[str]]:
        """(places in the reference pass, places in training): each once before any comes again."""
        drawn = self.random.sample(places, min(kills, len(places)))
        again = [place for place in places if stage(place) == 2 and place not in CLOCK] or drawn
        while len(drawn) < kills:
            drawn += self.random.sample(again, min(kills - len(drawn), len(again)))
        drawn.sort(key=stage)  # stable: the order drawn within a stage
        return [place for place in drawn if stage(place) < 1], [place for place in drawn if stage(place) >= 1]

    def next_place(self, pending: list[str]) -> str:
        """Takes the next place; a resumed start cannot be killed before there is something to resume."""
        early = not self.has_state("killed")
        able = [place for place in pending if not (early and place.startswith("resume")) and stage(place) < 3]
        place = (able or pending)[0]
        pending.remove(place)
        return "state_rename" if early and place.startswith("resume") else place

    def go(self, kills: int, places: Sequence[str]) -> None:
        """Everything: the jobs that are not killed, the kills, the last start, the judgement."""
        for twin in ("other", "whole") if self.change_ranks else ("whole",):
            self.ranks = 1 if twin == "other" else self.ranks
            self.run_whole(twin)
            self.ranks = 2 if twin == "other" else self.ranks
        in_pass, in_training = self.plan(kills, places)
        for place in in_pass:
            self.strike(PRECOMPUTE, place)
        print(f"  the pass ends: {said(self.run_to_end(PRECOMPUTE, 'killed'))}", flush=True)
        while in_training:
            self.strike(TRAIN, self.next_place(in_training))
        print(f"  training ends: {said(self.run_to_end(TRAIN, 'killed'))}", flush=True)
        if self.change_ranks:
            self.judge_noise("whole", "other", "killed")
        else:
            self.judge("whole", "killed")

    def strike(self, script: str, place: str) -> None:
        """One kill, told."""
        if self.change_ranks:
            self.ranks = 3 - self.ranks
        kill = self.draw(place)
        self.kills.append(kill)
        self.run_and_kill(script, kill)
        print(
            f"kill {len(self.kills)}: {kill} of {self.ranks}; step {kill.step}; this start: {kill.restart}", flush=True
        )


def stage(place: str) -> float:
    """Where in a job the place can be reached: files written once at the start of the pass, the pass, files written
    once at the start of training, training, its end."""
    place = place.partition(":")[0]
    return {"reference": 0, "shard": 0.5, "clock_pass": 0.75, "records": 1, "end": 3}.get(place, 2)


def said(output: str) -> str:
    """What a start said about what it found."""
    patterns = (
        r"resumed from \S+ (at step \d+)|(\d+ of \d+ pairs are there)|(state \S+ is not used.*)|(computed \d+ pairs)"
    )
    found = ["".join(match) for match in re.findall(patterns, output)]
    return ", ".join(found).replace("at step", "resumed at step") or "nothing yet"


def table(kills: list[Kill]) -> str:
    """The kills as a table."""
    rows = [("kill", "rank", "at step", "the start that was killed", "others ended after")]
    rows += [
        (
            f"{kill.place}, {kill.when}",
            str(kill.rank),
            str(kill.step) if kill.step >= 0 else "-",
            kill.restart,
            f"{kill.others_ended_s:.1f} s",
        )
        for kill in kills
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--changes", type=int, default=0, help="of inputs, in the place of kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--change_ranks", action="store_true", help="one and two ranks by turns")
    parser.add_argument("--config", choices=CONFIGS, default="fp32")
    parser.add_argument("--trainable", choices=TRAINABLE, default="all", help="with --changes")
    parser.add_argument("--places", default=",".join(ALL), help="only these; with a moment: latest:half,prune")
    parser.add_argument("--keep", type=Path, help="folder that is kept for a look; must not exist")
    options = parser.parse_args(arguments)
    places = options.places.split(",")
    known = {*ALL, *(f"{place}:{when}" for place in PLACES for when in PLACES[place])}
    if unknown := set(places) - known:
        parser.error(f"--places: expected some of {', '.join(sorted(known))}, found {', '.join(sorted(unknown))}")
    if options.keep and options.keep.exists():
        parser.error(f"--keep: {options.keep} exists")
    # threads that spin cost more than the work, on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ENVIRONMENT.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    started, verdict = time.monotonic(), "PASS"
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        soak = Changes(folder, options) if options.changes else Soak(folder, options)
        try:
            if isinstance(soak, Soak):
                soak.go(options.kills, places)
            else:
                soak.go(options.changes)
        except Failure as failure:
            verdict = f"FAIL: {failure}"
    if isinstance(soak, Soak):
        print(table(soak.kills))
    done = len(soak.kills) if isinstance(soak, Soak) else len(soak.changes)
    print(f"{verdict}\n{done} {'changes' if options.changes else 'kills'} in {time.monotonic() - started:.0f} s")
    return verdict != "PASS"


if __name__ == "__main__":
    sys.exit(main())
