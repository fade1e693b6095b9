"""A short soak: three kills, and the job ends as if there had been none. `make soak` makes twenty."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace

import pytest

from crash_at import PLACES
from soak import ALL, Soak, stage
from tiny_job import ROOT

pytestmark = pytest.mark.dist


@pytest.mark.slow
def test_three_kills_leave_no_trace():
    """In the reference pass, between the first state and its `.pth`, and in the middle of a step after a resume."""
    places = "shard:half,weights:before,step"
    command = [sys.executable, "tests/soak.py", "--kills", "3", "--seed", "3", "--places", places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "\nPASS\n" in done.stdout, done.stdout + done.stderr


def test_twenty_kills_meet_every_place(tmp_path):
    """Each place once before any comes again, in an order in which it can be reached; the same for the same seed."""
    options = Namespace(seed=5, ranks=2, kills=20, config="fp32", change_ranks=False)
    in_pass, training = Soak(tmp_path / "a", options).plan(20, ALL)
    assert sorted(in_pass + training) == sorted(ALL) and len(ALL) == 20 and set(PLACES) < set(ALL)
    assert in_pass[0] == "reference" and training[0] == "records" and training[-1] == "end"
    assert Soak(tmp_path / "b", options).plan(20, ALL) == (in_pass, training)
    more = Soak(tmp_path / "c", options).plan(60, ALL)[1]
    assert len(more) == 57 and {more.count(place) for place in more if place in PLACES and stage(place) == 2} <= {4, 5}
