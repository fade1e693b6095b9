"""Two gloo ranks on one host run every collective once; the tests look at what each rank got."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_job import free_port

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]

WORKER = """
import json, os, socket, sys, torch
import numpy as np
from simple_llama.cluster import messages
from simple_llama.cluster.distributed import *
from simple_llama.cluster.watch_links import connect
from simple_llama.common.errors import UserError

def message_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def odd_body(rank):
    with fail_together(ranks):
        if rank == 1:
            raise OSError("disk\\nsecond line")

def fails(rank, who):
    with fail_together(ranks):
        if rank in who:
            raise UserError("no such file")

def said(call):
    try:
        call()
    except UserError as error:
        return [error.sharers, error.is_said, str(error).split(" on host")[0]]


def answers(address):
    try:
        socket.create_connection((address, int(os.environ["MASTER_PORT"])), 5).close()
    except ConnectionRefusedError:
        return False
    return True

ranks = init_ranks("cpu", timeout_s=60)
links = connect(ranks, 30)
rank, mine = ranks.rank, torch.tensor([1.0, 10.0]) * (ranks.rank + 1)
seen = {
    "place": [rank, ranks.world_size, ranks.local_rank, ranks.local_world_size],
    "threads": torch.get_num_threads(),
    "links": [[link.rank, link.host, *link.socket.getsockname(), *link.socket.getpeername()] for link in links],
    "sum": all_reduce_sum(mine).tolist(),
    "mine": mine.tolist(),
    "gathered": gather_objects({"rank": rank}, ranks),
    "broadcast": broadcast_object(f"from {rank}", ranks),
    "same": message_of(lambda: require_same("seed", 5, ranks)),
    "odd": message_of(lambda: require_same("reference store", "ab" if rank == 0 else "cd", ranks)),
    "odd_setting": message_of(lambda: require_same("config", {"beta": 0.5, "lr": 1.0 + rank}, ranks)),
    "failure": message_of(lambda: odd_body(rank)),
    "said": [said(lambda: fails(rank, who)) for who in ((0, 1), (0,), (1,))],
    "said_odd": said(lambda: require_same("seed", rank, ranks)),


    "long": [len(text) for text in gather_objects("x" * (3_000_000 * rank), ranks, str)],
    "too_long": message_of(lambda: gather_objects("x" * (messages._MOST * rank), ranks)),
    "other_kind": message_of(lambda: gather_objects([rank, "one"][rank], ranks, int)),
    "positions": broadcast_positions(np.array([2, 7]) if rank == 0 else np.array([1]), 8, ranks).tolist(),
    "bad_positions": message_of(lambda: broadcast_positions(np.array([2, 8]), 8, ranks)),
    "listens": [answers(address) for address in ("127.0.0.1", "127.0.0.2")],
    "described": str(ranks),
}
barrier(ranks)
close_ranks()
with open(sys.argv[1], "w") as file:
    json.dump(seen, file)
leave(0)
"""


def start(rank: int, code: str, *arguments: str, port: int, **variables: str) -> subprocess.Popen[str]:
    """One rank of two, with the variables of the deepspeed launcher; LOCAL_SIZE is left for the ranks to find out."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")}
    environment |= {name: str(value) for name, value in place.items()} | variables
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def results(folder: Path, **variables: str) -> list[dict[str, Any]]:
    """What each of two ranks got, which write it below `folder`."""
    port = free_port()
    processes = [start(rank, WORKER, str(folder / f"{rank}.json"), port=port, **variables) for rank in (0, 1)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of ranks that are told nothing of their host."""
    return results(tmp_path_factory.mktemp("ranks"))


def test_a_launcher_does_not_decide_on_threads(tmp_path: Path) -> None:
    """What torchrun says on each of two hosts that are one machine: one rank here, one thread. Their ranks share the
    cores as those of any other launcher do."""
    found = results(tmp_path, LOCAL_WORLD_SIZE="1", OMP_NUM_THREADS="1")
    assert [rank["place"] for rank in found] == [[0, 2, 0, 1], [1, 2, 1, 1]]
    assert {rank["threads"] for rank in found} == {max(1, len(os.sched_getaffinity(0)) // 2)}


def test_each_rank_knows_its_place(seen: list[dict[str, Any]]) -> None:
    """Two ranks of one host share its cores, also when the launcher does not say how many ranks a host has."""
    assert [rank["place"] for rank in seen] == [[0, 2, 0, 2], [1, 2, 1, 2]]
    assert {rank["threads"] for rank in seen} == {max(1, len(os.sched_getaffinity(0)) // 2)}


def test_the_watchdogs_are_connected_where_the_ranks_are(seen: list[dict[str, Any]]) -> None:
    """MASTER_ADDR is 127.0.0.1: each has a link to the other there, and both see the same two ends."""
    (of_0,), (of_1,) = (rank["links"] for rank in seen)
    assert of_0[:3] == [1, socket.gethostname(), "127.0.0.1"] and of_1[:3] == [0, socket.gethostname(), "127.0.0.1"]
    assert of_0[2:4] == of_1[4:6] and of_0[4:6] == of_1[2:4]


def test_the_sum_is_over_all_ranks(seen: list[dict[str, Any]]) -> None:
    """[1, 10] + [2, 20] = [3, 30] on both ranks, and each rank's own tensor is as before."""
    assert [rank["sum"] for rank in seen] == [[3.0, 30.0]] * 2
    assert [rank["mine"] for rank in seen] == [[1.0, 10.0], [2.0, 20.0]]


def test_objects_travel(seen: list[dict[str, Any]]) -> None:
    """Gathered in the order of ranks on every rank; broadcast from rank 0."""
    assert [rank["gathered"] for rank in seen] == [[{"rank": 0}, {"rank": 1}]] * 2
    assert [rank["broadcast"] for rank in seen] == ["from 0"] * 2


def test_require_same_names_the_odd_rank_on_every_rank(seen: list[dict[str, Any]]) -> None:
    """Equal values pass; else both ranks get one message with the host, the rank and what differs."""
    assert [rank["same"] for rank in seen] == [None, None]
    assert seen[0]["odd"] == seen[1]["odd"]
    assert seen[0]["odd"].startswith("UserError: reference store must be the same on all 2 ranks")
    assert f"rank 1 on host {socket.gethostname()}: expected 'ab', found 'cd'" in seen[0]["odd"]
    assert "expected {'lr': 1.0}, found {'lr': 2.0}" in seen[0]["odd_setting"]


def test_failure_on_one_rank_ends_all(seen: list[dict[str, Any]]) -> None:
    """Rank 1 raises its own error, rank 0 one that names rank 1; nobody waits for a timeout."""
    assert seen[1]["failure"] == "OSError: disk\nsecond line"
    assert seen[0]["failure"] == f"UserError: rank 1 on host {socket.gethostname()} failed: OSError: disk"


def test_who_says_an_error(seen: list[dict[str, Any]]) -> None:
    """[ranks that share it, whether another one says it, text]: one that both have is rank 0's to say, one of rank 0
    or of rank 1 alone is its own; rank 0 also says that rank 1 failed, rank 1 need not say that rank 0 did."""
    both, of_0, of_1 = zip(*(rank["said"] for rank in seen), strict=True)
    assert both == ([2, False, "no such file"], [2, True, "no such file"])
    assert of_0 == ([1, False, "no such file"], [1, True, "rank 0"])
    assert of_1 == ([1, False, "rank 1"], [1, False, "no such file"])
    assert [rank["said_odd"][:2] for rank in seen] == [[2, False], [2, True]]


def test_long_messages_and_wrong_ones(seen: list[dict[str, Any]]) -> None:
    """3 MB go in pieces of 1 MiB. What is too long, or of another kind, is refused by all, with the rank; what comes
    after it arrives."""
    assert [rank["long"] for rank in seen] == [[0, 3_000_000]] * 2
    for rank in seen:
        assert rank["too_long"].startswith("UserError: rank 1 sent one of 16,777,218, expected a message of at most")
        assert rank["other_kind"].startswith("UserError: rank 1 sent something else, expected <class 'int'>")
        assert rank["bad_positions"].startswith("UserError: rank 0 sent something else, expected positions from 0 to 7")
    assert [rank["positions"] for rank in seen] == [[2, 7]] * 2


def test_the_store_listens_where_the_ranks_are(seen: list[dict[str, Any]]) -> None:
    """At MASTER_ADDR, 127.0.0.1, and not at 127.0.0.2, which is this machine's too."""
    assert [rank["listens"] for rank in seen] == [[True, False]] * 2


def test_ranks_are_described(seen: list[dict[str, Any]]) -> None:
    assert {rank["described"] for rank in seen} == {f"2 ranks on 1 host ({socket.gethostname()}: 2), cpu"}


def test_a_rank_that_never_comes_is_a_user_error() -> None:
    """Rank 1 is not started: rank 0 ends after its second with the address and what to check."""
    port = free_port()
    code = "from simple_llama.cluster.distributed import init_ranks; init_ranks('cpu', timeout_s=1)"
    process = start(0, code, port=port)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "UserError: rank 0 of 2 on host" in errors and f"127.0.0.1:{port} within 1 s" in errors
