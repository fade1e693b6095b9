"""Stopping on request: finish the micro-batch, save, end with status STOPPED; `--resume` goes on from there.

A request is a signal (SIGTERM and SIGUSR1 of a scheduler that preempts, SIGINT of a person, SIGHUP of a terminal that
closes) or the loss of the launcher that started this rank: then nobody would end it or read what it says.
"""

from __future__ import annotations

import os
import select
import signal
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from simple_llama.cluster.distributed import Ranks, gather_objects
from simple_llama.cluster.processes import ancestors

STOPPED = 75  # exit status EX_TEMPFAIL of sysexits.h: try again; here with --resume
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_ORPHAN_S = 10.0  # that a launcher is gone before the rank stops: a launcher that ends first sends SIGTERM

# A launcher's mark in the environment of the ranks that it starts. DeepSpeed's own parent matters too: on one host the
# `deepspeed` command, on several the remote shell.
_LAUNCHER_MARKS = {"CROSS_SIZE": 2, "TORCHELASTIC_RUN_ID": 1, "OMPI_COMM_WORLD_RANK": 1, "SLURM_PROCID": 1}


class Stopped(Exception):
    """The work was stopped on request; all that is needed to go on is on disk or was never begun."""


class _State:
    """Of this process: signals come to a process, not to an object."""

    reason = ""  # of the first request
    waits = False  # for `agree`; else a signal stops at once
    interrupts = 0  # SIGINTs that came to this process
    before: ClassVar[dict[int, Any]] = {}  # handlers that were there
    pending: tuple[torch.Tensor, Any] | None = None  # an agreement under way
    ancestors: tuple[int, ...] = ()
    orphan_since = 0.0


def install(world_size: int = 1) -> None:
    """Takes over the signals and remembers the launcher.

    A signal waits for `agree`, where all ranks stop together; until `begin`, that of a single process does not.
    A signal that is ignored stays so: nohup and shells in the background ask for that.
    """
    _State.reason, _State.pending, _State.orphan_since = "", None, 0.0
    _State.waits, _State.interrupts = world_size > 1, 0
    _State.ancestors = ancestors(max((n for mark, n in _LAUNCHER_MARKS.items() if mark in os.environ), default=0))
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            _State.before.setdefault(number, signal.signal(number, _on_signal))


def uninstall() -> None:
    """The signals do what they did before `install`."""
    while _State.before:
        signal.signal(*_State.before.popitem())


def _on_signal(number: int, frame: object) -> None:
    """Remembers the request; a second SIGINT, of a person who does not want to wait, ends at once."""
    _State.interrupts += number == signal.SIGINT
    if _State.interrupts > 1:
        raise KeyboardInterrupt
    request(signal.Signals(number).name)
    if not _State.waits:
        raise Stopped(_State.reason)


def request(reason: str) -> None:
    """Asks this rank to stop; the first reason counts."""
    _State.reason = _State.reason or reason


def requested() -> str:
    """Why this rank is asked to stop; empty when it is not."""
    return _State.reason


def begin() -> None:
    """From here on there is something to save: a request waits for `agree`."""
    _State.waits = True


def agree(ranks: Ranks, at_once: bool = False) -> None:
    """Raises Stopped on every rank at the same call, once any rank is asked to stop (collective).

    What all ranks said at the last call is read at this one, so that nobody waits for an answer; unless `at_once`.
    """
    if ranks.world_size == 1:
        if _State.reason:
            raise Stopped(_State.reason)
        return
    _read_agreement(ranks)
    asked = torch.tensor([1 if _State.reason else 0], dtype=torch.int32)  # on the CPU: no device waits
    _State.pending = asked, dist.all_reduce(asked, async_op=True)
    if at_once:
        _read_agreement(ranks)


def _read_agreement(ranks: Ranks) -> None:
    """Raises Stopped with the reasons of all ranks, if one was asked to stop when the agreement began.

    A rank that never agrees is the watchdog's to find.
    """
    if _State.pending is None:
        return
    (asked, work), _State.pending = _State.pending, None
    work.wait()
    if asked.item():
        reasons = gather_objects(_State.reason, ranks, str)
        raise Stopped("; ".join(dict.fromkeys(reason for reason in reasons if reason)))


def has_launcher() -> bool:
    """Whether a launcher started this process and is expected to outlive it."""
    return bool(_State.ancestors)


def lost_launcher(now: float) -> str:
    """What of the launcher is gone for _ORPHAN_S seconds: a process that started this one, or the reader of its output.

    `now` is time.monotonic(). Empty while all is there, and without a launcher.
    """
    if not _State.ancestors:
        return ""
    found = ""
    if ancestors(len(_State.ancestors)) != _State.ancestors:
        found = "loss of the launcher process"
    elif _nobody_reads():
        found = "loss of the launcher's connection"
    if not found:
        _State.orphan_since = 0.0
    elif not _State.orphan_since:
        _State.orphan_since = now
    elif now - _State.orphan_since >= _ORPHAN_S:
        return found
    return ""


def _nobody_reads() -> bool:
    """Whether stdout or stderr leads to a pipe, socket or terminal whose other end is closed.

    One is enough: a remote shell that lost its reader notices only on the stream that something is written to.
    """
    poll = getattr(select, "poll", None)
    if poll is None:
        return False
    closed = poll()
    for stream in (1, 2):
        closed.register(stream, 0)
    gone = [events & (select.POLLERR | select.POLLHUP) for _, events in closed.poll(0)]
    return any(gone)
