"""What the tests of whole runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from simple_llama.cluster.distributed import Ranks, close_ranks, init_ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """One process as a whole job. One group for all tests: DeepSpeed remembers the first group of a process."""
    yield init_ranks("cpu")
    close_ranks()
