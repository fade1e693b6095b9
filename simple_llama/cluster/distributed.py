"""Who am I among the ranks, and the few collectives that are not the engine's: plain torch.distributed.

Every function that takes or gives something of all ranks is a collective: all ranks call it, in the same order. It
waits at most the timeout of `init_ranks`, later that of `set_collective_timeout`; for a lost rank the watchdog ends it.
What travels between ranks, and how it is checked: messages.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from simple_llama.cluster import messages
from simple_llama.cluster.hostfile import check_own_hostfile
from simple_llama.cluster.processes import boot_id, raise_file_limit
from simple_llama.cluster.rendezvous import meet, meeting_place
from simple_llama.common.errors import UserError
from simple_llama.common.files import shown

# Names of (rank, world size, local rank, local world size) per launcher; the first set found wins.
_LAUNCHER_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun; deepspeed says LOCAL_SIZE for the last
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)
_LATE_S = 5.0  # after the start's timeout, in which torch may say itself what is wrong
_FLUSH_S = 30.0  # for what was said and is not written yet: the disk may hang, or nobody may read
_MOST_NAMED = 8  # differing ranks shown in one message
_MOST_HOSTS = 16  # named in the first line of a run
_FAILURE = tuple[str, str, bool] | None  # host and reason of a rank that failed, and whether by a UserError

SomeError = TypeVar("SomeError", bound=UserError)


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job. `local_*` count the ranks of this host only."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    hosts: tuple[str, ...] = field(default=(), compare=False)  # of each rank

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        """As `2 ranks on 1 host (gpu-1: 2), cpu`."""
        counts = Counter(self.hosts)
        named = [f"{host}: {count}" for host, count in list(counts.items())[:_MOST_HOSTS]]
        more = ["..."] if len(counts) > _MOST_HOSTS else []
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        hosts = f"{len(counts)} host{'s' * (len(counts) > 1)} ({', '.join(named + more)})"
        return f"{ranks} on {hosts}, {self.device.type}"


def init_ranks(device: str = "auto", timeout_s: float = 600.0) -> Ranks:
    """Join the job's process group and say which rank this is.

    The place comes from the launcher's variables (deepspeed, torchrun, mpirun, srun); without any, or with a world of
    one, this process is the whole job and opens no port. Groups: gloo on the CPU, nccl on CUDA (gloo for CPU tensors).

    On the CPU torch gets its threads here, as many as this rank's share of the cores, whatever the launcher and
    OMP_NUM_THREADS say (torchrun sets it): how sums are rounded depends on threads, but not on who started the ranks.

    Args:
        device: "auto" (CUDA when there is one), "cpu" or "cuda".
        timeout_s: seconds that a rank waits for the others, here and, until `set_collective_timeout`, in collectives.

    Raises:
        UserError: variables missing or impossible, a hostfile that is none, no CUDA device for this rank, too low a
            limit of open files (it is raised as far as the system lets), or the others did not come in time.
    """
    rank, world_size, local_rank, local_world_size = _place()
    check_own_hostfile()
    raise_file_limit(world_size, local_rank)
    torch_device = device_of(device, local_rank, local_world_size)
    _join(rank, world_size, world_size == local_world_size, torch_device, timeout_s)
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed reads it even where a group exists already
    place = socket.gethostname(), boot_id() or socket.gethostname(), _own_cores()
    hosts, machines, cores = zip(*messages.gather(place, tuple[str, str, list[int]]), strict=True)
    if local_world_size is None:
        local_world_size = Counter(hosts)[socket.gethostname()]
    if torch_device.type == "cpu":
        torch.set_num_threads(_share(rank, machines, cores))
    return Ranks(rank, world_size, local_rank, local_world_size, torch_device, hosts)


def set_collective_timeout(seconds: float) -> None:
    """Lets a collective wait longer than the start did: for a rank that writes a checkpoint, say."""
    c10d._set_pg_timeout(timedelta(seconds=seconds))
    c10d._get_default_store().set_timeout(timedelta(seconds=seconds))  # NCCL makes its communicators late, through it


def close_ranks() -> None:
    """Leave the process group, if there is one. Waits for collectives under way, so at most for their timeout."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> None:
    """Ends this process at once, since everything is written and said.

    A process was seen to abort in C++ destructors on its way out, one rank alone too ("terminate called without an
    active exception", status -6), which a launcher takes for a failure of the whole job.
    """
    words = threading.Thread(target=_flush, daemon=True)
    words.start()
    words.join(_FLUSH_S)
    os._exit(status)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` over all ranks, on every rank, as a new tensor of the same shape and dtype."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def rows_of_all_ranks(rows: torch.Tensor, places: Sequence[int], count: int) -> torch.Tensor:
    """`count` rows of all ranks, fp64, of which this rank gives those at `places` (collective); rows of no rank are 0.

    A sum of one number and zeros is that number, in whatever order ranks add.
    """
    table = torch.zeros(count, rows.shape[1], dtype=torch.float64, device=rows.device)
    table[torch.tensor(list(places), dtype=torch.int64, device=rows.device)] = rows.double()
    return all_reduce_sum(table)


def of_rank_0(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor of this shape (collective)."""
    dist.broadcast(tensor, 0)
    return tensor


def broadcast_object(obj: Any, ranks: Ranks, kind: Any = Any) -> Any:
    """Rank 0's `obj`, plain data, on every rank; what the others pass does not matter. `kind` as in messages.gather."""
    return messages.broadcast(obj, kind)


def gather_objects(obj: Any, ranks: Ranks, kind: Any = Any) -> list[Any]:
    """Each rank's `obj`, plain data, in the order of ranks, on every rank. `kind` as in messages.gather."""
    return messages.gather(obj, kind)


def broadcast_positions(positions: np.ndarray, count: int, ranks: Ranks) -> np.ndarray:
    """Rank 0's positions in a sequence of `count` items, int64 (P,), on every rank; see messages.py."""
    return messages.broadcast_positions(positions, count)


def barrier(ranks: Ranks) -> None:
    """Return when every rank has come here."""
    dist.barrier(device_ids=[ranks.local_rank] if ranks.device.type == "cuda" else None)


def require_same(what: str, value: Any, ranks: Ranks) -> None:
    """Raise the same UserError on every rank, naming the hosts and ranks whose `value` differs from rank 0's.

    `value` is plain data; of dicts only the keys that differ are shown.
    """
    seen = gather_objects((socket.gethostname(), value), ranks, tuple[str, Any])
    main_host, expected = seen[0]
    odd = [(rank, host, found) for rank, (host, found) in enumerate(seen) if _differ(found, expected)]
    if not odd:
        return
    lines = [f"{what} must be the same on all {ranks.world_size} ranks, but differs from rank 0 (host {main_host}):"]
    for rank, host, found in odd[:_MOST_NAMED]:
        lines.append(f"  rank {rank} on host {host}: {_difference(expected, found)}")
    if len(odd) > _MOST_NAMED:
        lines.append(f"  and {len(odd) - _MOST_NAMED} more ranks")
    lines.append("Give all hosts the same files and settings (a shared disk, or equal copies) and start again.")
    raise shared(UserError("\n".join(lines)), ranks)


def shared(error: SomeError, ranks: Ranks) -> SomeError:
    """`error`, which every rank raises at this moment: rank 0 says it for all."""
    error.sharers, error.is_said, error.everywhere = ranks.world_size, not ranks.is_main, True
    return error


@contextlib.contextmanager
def fail_together(ranks: Ranks) -> Iterator[None]:
    """Run the body on every rank; if it fails on one, fail on all, at once and not at a collective's timeout.

    The failing rank raises its own error, the others a UserError that names it. The body holds no collectives.
    Of ranks with the same error one says it for all, and of those without an error rank 0.
    """
    host = socket.gethostname()
    try:
        yield
    except Exception as error:
        reason = _one_line(error)
        failures = gather_objects((host, reason, isinstance(error, UserError)), ranks, _FAILURE)
        if isinstance(error, UserError):
            same = [rank for rank, failure in enumerate(failures) if failure is not None and failure[1] == reason]
            error.sharers, error.is_said = len(same), same[0] != ranks.rank
            error.everywhere = _all_foreseen(failures)
        raise
    failures = gather_objects(None, ranks, _FAILURE)
    for rank, failure in enumerate(failures):
        if failure is not None:
            error = UserError(f"rank {rank} on host {failure[0]} failed: {failure[1]}")
            error.is_said, error.everywhere = not ranks.is_main, _all_foreseen(failures)
            raise error


def _all_foreseen(failures: Sequence[_FAILURE]) -> bool:
    """Whether no rank failed by a bug: then each of them raises a UserError."""
    return all(failure is None or failure[2] for failure in failures)


def _flush() -> None:
    """Writes what the log and the two streams still hold."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


def _place() -> tuple[int, int, int, int | None]:
    """(rank, world size, local rank, local world size or None when unknown) by the launcher's variables."""
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError("RANK is set but WORLD_SIZE is not; set both, or neither for one process")
    for names in _LAUNCHER_VARIABLES:
        if names[0] in os.environ and names[1] in os.environ:
            break
    else:
        return 0, 1, 0, 1
    rank, world_size = _integer(names[0]), _integer(names[1])
    if not 0 <= rank < world_size:
        raise UserError(f"{names[0]} is {rank}, expected 0 to {world_size - 1} ({names[1]} is {world_size})")
    if world_size == 1:
        return 0, 1, 0, 1
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"{names[1]} is {world_size} but {name} is not set; start with deepspeed or torchrun, export the "
                f"address and a free port of the first host, or unset {names[0]} and {names[1]} for one process"
            )
    if names[2] not in os.environ:
        raise UserError(f"{names[0]} is set but {names[2]} is not; set it to this rank's number on its host, from 0")
    local_names = [name for name in (names[3], "LOCAL_SIZE") if name in os.environ]
    return rank, world_size, _integer(names[2]), _integer(local_names[0]) if local_names else None


def _integer(name: str) -> int:
    """An environment variable as an integer."""
    try:
        return int(os.environ[name])
    except ValueError:
        raise UserError(f"environment variable {name}: expected a number, found {os.environ[name]!r}") from None


def device_of(wanted: str, local_rank: int = 0, local_world_size: int | None = 1) -> torch.device:
    """The device of a rank, or of a process that is none. Found out before the group is made, so that no rank waits for
    one that cannot come."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: expected auto, cpu or cuda, found {wanted!r}")
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("device is cuda, but torch finds no CUDA device; check the driver, or set device to cpu")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    needed, found = max(local_rank + 1, local_world_size or 0), torch.cuda.device_count()
    if needed > found:
        raise UserError(
            f"host {socket.gethostname()} has {needed} ranks but shows {found} CUDA devices; start one rank per device "
            "(slots= in the hostfile), and let each rank see all devices of its host (CUDA_VISIBLE_DEVICES)"
        )
    return torch.device("cuda", local_rank)


def _own_cores() -> list[int]:
    """The cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _share(rank: int, machines: Sequence[str], cores: Sequence[Sequence[int]]) -> int:
    """How many cores a rank has to itself, at least one; a core is shared by all ranks that may run on it.

    By rank: the machine that it is on, and its cores there. Launchers count otherwise: two torchruns on one machine, or
    two of its containers, each say one rank a host.
    """
    users = Counter((machine, core) for machine, own in zip(machines, cores, strict=True) for core in own)
    return max(1, int(sum(Fraction(1, users[machines[rank], core]) for core in cores[rank])))


def _join(rank: int, world_size: int, one_host: bool, device: torch.device, timeout_s: float) -> None:
    """Make the default process group; returns when every rank is there. `one_host`: all are known to be on this one."""
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_s)
    if world_size == 1:  # a store in memory: no port, so any number of single runs share a machine
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    host, port = meeting_place()
    failed = (
        f"rank {rank} of {world_size} on host {socket.gethostname()} could not join the others at {host}:{port} within "
        f"{timeout_s:g} s: %s\nCheck that every host started, that the port is free and reachable, "
        "and that host names do not resolve to 127.0.1.1 (else set GLOO_SOCKET_IFNAME to the network interface)"
    )
    limit = threading.Timer(timeout_s + _LATE_S, _give_up, [failed % "nobody answers"])
    limit.daemon = True
    limit.start()  # torch's client tries twice, gloo's five times, each with the whole timeout
    try:
        store = meet(rank, world_size, one_host, timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (OSError, RuntimeError) as error:  # torch's DistError and gloo's own
        raise UserError(failed % _one_line(error)) from error
    finally:
        limit.cancel()


def _give_up(message: str) -> None:
    """Ends a process whose main thread cannot be woken, as `UserError` would."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def _difference(expected: Any, found: Any) -> str:
    """`found` beside `expected`, shortened; of two dicts only the keys that differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        missing = "nothing"
        keys = [key for key in {**expected, **found} if _differ(expected.get(key, missing), found.get(key, missing))]
        expected = {key: expected.get(key, missing) for key in keys}
        found = {key: found.get(key, missing) for key in keys}
    return f"expected {shown(expected)}, found {shown(found)}"


def _differ(one: Any, other: Any) -> bool:
    """Whether two values are not the same plain data."""
    return messages.encoded(one, ordered=True) != messages.encoded(other, ordered=True)


def _one_line(error: Exception) -> str:
    """An error's first line; with its type unless it is written for people."""
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
