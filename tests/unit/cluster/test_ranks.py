"""Which rank this is, from each launcher's variables, and the group of one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from simple_llama.cluster import distributed
from simple_llama.cluster.distributed import Ranks, init_ranks
from simple_llama.common.errors import UserError

VARIABLES = {"MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE"}.union(*distributed._LAUNCHER_VARIABLES)
MASTER = {"MASTER_ADDR": "host-a", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher's variables, whatever started the tests; torch's threads and the group as before afterwards."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")  # remembered, so that a value set by init_ranks is undone too
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    distributed.close_ranks()


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """As a launcher would."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host on which torch finds two CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_one_process_is_a_whole_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher: rank 0 of 1 with working collectives, all cores (as OMP_NUM_THREADS does not say), no port asked
    for."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    ranks = init_ranks("cpu", timeout_s=30)
    assert ranks == Ranks(0, 1, 0, 1, torch.device("cpu")) and ranks.is_main
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    assert os.environ["LOCAL_RANK"] == "0" and "MASTER_PORT" not in os.environ
    assert distributed.gather_objects("a", ranks) == ["a"] and distributed.broadcast_object("b", ranks) == "b"
    distributed.require_same("seed", 1, ranks)
    distributed.barrier(ranks)


@pytest.mark.parametrize(
    ("machines", "cores", "shares"),
    [
        ("aa", [[0, 1], [0, 1]], [1, 1]),  # two ranks on two cores, whatever their launchers call a host
        ("ab", [[0, 1], [0, 1]], [2, 2]),  # two machines
        ("aaa", [range(8)] * 3, [2, 2, 2]),  # 8 / 3
        ("aa", [[0, 1], [2, 3]], [2, 2]),  # a scheduler bound each to cores of its own
        ("aab", [[0, 1, 2, 3], [2, 3], [0]], [3, 1, 1]),  # 1 + 1 + 1/2 + 1/2; 1/2 + 1/2; 1
        ("aaa", [[0], [0], [0]], [1, 1, 1]),  # one at least
    ],
)
def test_cores_are_shared_by_those_who_may_use_them(machines: str, cores: list[list[int]], shares: list[int]) -> None:
    assert [distributed._share(rank, machines, cores) for rank in range(len(machines))] == shares


def test_ranks_and_hosts_in_words() -> None:
    """How many ranks on which hosts, in the order of ranks; of many hosts the first 16."""
    cpu = torch.device("cpu")
    assert str(Ranks(0, 1, 0, 1, cpu, ("gpu-1",))) == "1 rank on 1 host (gpu-1: 1), cpu"
    assert str(Ranks(0, 3, 0, 2, cpu, ("b", "b", "a"))) == "3 ranks on 2 hosts (b: 2, a: 1), cpu"
    many = str(Ranks(0, 20, 0, 1, cpu, tuple(f"node-{n}" for n in range(20))))
    assert many.startswith("20 ranks on 20 hosts (node-0: 1, ") and many.endswith(", node-15: 1, ...), cpu")


def test_the_sum_is_a_new_tensor() -> None:
    """The argument keeps its value, so the sum of a live metric does not change it."""
    init_ranks("cpu")
    tensor = torch.tensor([1.0, 2.0])
    total = distributed.all_reduce_sum(tensor)
    total += 1
    assert tensor.tolist() == [1.0, 2.0] and total.tolist() == [2.0, 3.0]


def test_closing_twice_is_fine() -> None:
    """The end of a run may be reached by two ways; a new group can be made after it."""
    init_ranks("cpu")
    distributed.close_ranks()
    distributed.close_ranks()
    assert not dist.is_initialized()
    assert init_ranks("cpu").world_size == 1


def test_a_launcher_with_one_rank_needs_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """`deepspeed` with one slot: the address it gives is not used, so it need not be free."""
    set_variables(monkeypatch, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MASTER})
    assert init_ranks("cpu", timeout_s=5).world_size == 1


def test_own_error_passes_fail_together() -> None:
    """With one rank the body's error comes out as it is."""
    ranks = init_ranks("cpu")
    with pytest.raises(KeyError), distributed.fail_together(ranks):
        raise KeyError("mine")


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (3, 4, 1, 2)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, (3, 4, 1, 2)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
            },
            (1, 2, 0, 1),
        ),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, (5, 8, 1, None)),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURM_PROCID": "7", "SLURM_NTASKS": "8"},
            (0, 2, 0, None),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1, 0, 1)),
    ],
)
def test_each_launcher_is_understood(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: tuple[int, int, int, int | None]
) -> None:
    """torchrun, deepspeed, mpirun, srun, torchrun inside a Slurm job, one Slurm task."""
    set_variables(monkeypatch, {**variables, **MASTER})
    assert distributed._place() == place


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE is not"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MASTER}, r"RANK is 2, expected 0 to 1 \(WORLD_SIZE is 2\)"),
        ({"RANK": "one", "WORLD_SIZE": "2", **MASTER}, "RANK: expected a number, found 'one'"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MASTER}, "LOCAL_RANK is not"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "SLURM_NTASKS is 2 but MASTER_ADDR is not set"),
    ],
)
def test_impossible_places_are_user_errors(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    """Each message names the variable; none waits for ranks that will not come."""
    set_variables(monkeypatch, variables)
    with pytest.raises(UserError, match=expected):
        init_ranks("cpu")


def test_more_ranks_than_gpus_fail_before_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks on a host with two devices: every rank of that host says so, none joins the group."""
    two_gpus(monkeypatch)
    for local_rank in ("0", "2"):
        set_variables(monkeypatch, {"RANK": local_rank, "WORLD_SIZE": "3", "LOCAL_RANK": local_rank, **MASTER})
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        with pytest.raises(UserError, match="has 3 ranks but shows 2 CUDA devices"):
            init_ranks("auto")
    assert not dist.is_initialized()


def test_device_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto takes CUDA where there is one, by local rank; cpu never does; a wrong word is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.device_of("auto", 0, 1) == torch.device("cpu")
    with pytest.raises(UserError, match="torch finds no CUDA device"):
        distributed.device_of("cuda", 0, 1)
    with pytest.raises(UserError, match="expected auto, cpu or cuda, found 'gpu'"):
        distributed.device_of("gpu", 0, 1)
    two_gpus(monkeypatch)
    assert distributed.device_of("auto", 1, None) == torch.device("cuda", 1)
    assert distributed.device_of("cpu", 7, 8) == torch.device("cpu")


def test_a_difference_shows_only_what_differs() -> None:
    """Of two dicts the equal keys are left out, a key on one side only is shown; long values are cut."""
    shown = distributed._difference({"same": 1, "lr": 0.1}, {"same": 1, "lr": 0.2, "more": 3})
    assert shown == "expected {'lr': 0.1, 'more': 'nothing'}, found {'lr': 0.2, 'more': 3}"
    assert len(distributed._difference("a" * 10_000, "b")) < 250


def test_an_error_in_one_line() -> None:
    """Of an error for people only the text is told to the other ranks; of any other also its type."""
    assert distributed._one_line(UserError("no file\nmore")) == "no file"
    assert distributed._one_line(RuntimeError()) == "RuntimeError: "


def test_leaving_waits_for_what_is_said_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log's disk hangs for a minute: the process ends after _FLUSH_S all the same, here 0.1 s, with its status."""
    left: list[int] = []
    hang = threading.Event()
    monkeypatch.setattr(distributed, "_FLUSH_S", 0.1)
    monkeypatch.setattr(distributed.logging, "shutdown", lambda: hang.wait(60))
    monkeypatch.setattr(os, "_exit", left.append)
    distributed.leave(75)
    hang.set()
    assert left == [75]
