"""Ends all ranks when one of them, its host or its link is gone, or when nothing moves any more.

Nothing else does: a collective waits half an hour or for ever for a peer that was stopped or cut off, and a launcher
waits for every host. In each rank a thread says once a second where the main thread is, by TCP: all to rank 0, rank 0
to all. Rank 0 judges the others, each of them judges rank 0:

    gone      its connection closed without a farewell: the process was killed, or crashed
    silent    nothing was heard for `peer_timeout_s`: a stopped process, a dead host, a cut link
    failed    it said itself that it ends with an error
    stuck     everybody is heard, but no main thread got on for `step_timeout_s` (`io_timeout_s` within `patience`)

Then every rank says why and ends at once with status LOST. How the ranks come to be connected, and what a line is:
watch_links.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from typing_extensions import Doc

from simple_llama.cluster import stopping
from simple_llama.cluster.distributed import Ranks, set_collective_timeout
from simple_llama.cluster.watch_links import Link, connect
from simple_llama.common.logging import LOGGER
from simple_llama.common.settings import Bounds, Settings

LOST = 3  # exit status: a rank, host or link is gone or stuck; what was saved is whole, `--resume` goes on from it

_BEAT_S = 1.0  # between two lines of a rank
_GRACE_S = 3.0  # in which a main thread that is ending may say so itself
_ORDERLY_S = 30.0  # the same after a rank's own error: often it is that of all ranks, and one of them tidies up longer
_LAST_WORDS_S = 5.0  # for the log and for clean-up, which may hang with the disk
_HONEST = 4.0  # a pause may be this many times as long as the longest one seen so far
_LATE_S = 5.0  # after the start's timeout, in which rank 0 says who did not come


@dataclass(frozen=True)
class WatchConfig(Settings):
    """How long ranks wait for each other."""

    # === Watchdog ===
    start_timeout_s: Annotated[
        float, Bounds(1.0, 1e6), Doc("seconds that a rank waits for the others to come at the start")
    ] = 35.0
    peer_timeout_s: Annotated[
        float,
        Bounds(5.0, 1e6),
        Doc("seconds that another rank's process may be silent before all end (hung or stopped, host down, link cut)"),
    ] = 20.0
    step_timeout_s: Annotated[
        float,
        Bounds(1.0, 1e6),
        Doc(
            "seconds without a finished micro-batch or sample on any rank before all end (hang); "
            "at least 4 times the longest so far"
        ),
    ] = 60.0
    io_timeout_s: Annotated[float, Bounds(1.0, 1e6), Doc("the same while data is read and checkpoints are written")] = (
        1800.0
    )


@dataclass
class _Peer:
    """What is known of another rank."""

    link: Link
    heard: float  # when, on this process's clock
    place: str = "start"  # where its main thread is
    beats: int = 0
    allowed_s: float = 0.0
    farewell: bool = False

    def __str__(self) -> str:
        return f"rank {self.link.rank} on host {self.link.host}"


@dataclass
class _Progress:
    """How far the main thread of this process is."""

    place: str = "start"
    beats: int = 0
    worked_at: float | None = None  # the last beat, where nothing but work came after it
    longest_s: float = 0.0  # from a beat to the next in work: a micro-batch, a step, a token of a sample
    starting: bool = True  # until the first micro-batch is done
    patience: int = 0  # depth of `patience`


class _Watchdog:
    """The thread of one rank; made by `start`."""

    def __init__(self, ranks: Ranks, peers: list[_Peer], config: WatchConfig):
        self.ranks, self.peers, self.config = ranks, peers, config
        self.progress = _Progress()
        self.moved = time.monotonic()  # when any main thread was last seen to get on
        self.seen_beats = 0
        self.verdict, self.ends_at = "", 0.0
        self.main_thread_failed = False  # it waits for the verdict: no grace then
        self.closed = threading.Event()
        self.last_words: list[Callable[[], object]] = []  # clean-up before the process is ended from here
        self.thread = threading.Thread(target=self.run, name="watchdog", daemon=True)

    # === The main thread's side ===

    def beat(self, place: str) -> None:
        """The main thread got on."""
        now, progress = time.monotonic(), self.progress
        if progress.worked_at is not None:
            progress.longest_s = max(progress.longest_s, now - progress.worked_at)
        progress.place, progress.worked_at = place, None if progress.patience else now
        progress.beats += 1

    def allowed_s(self) -> float:
        """Seconds that this rank's main thread may take until it gets on again."""
        if self.progress.starting or self.progress.patience:
            return self.config.io_timeout_s
        return max(self.config.step_timeout_s, _HONEST * self.progress.longest_s)

    def tell(self, **line: object) -> None:
        """Sends a line to all peers; one that cannot take it now is judged by its silence."""
        for peer in self.peers:
            peer.link.send(line)

    def close(self) -> None:
        """Says farewell and stops watching."""
        if not self.closed.is_set():
            self.closed.set()
            self.tell(farewell=True)
        for peer in self.peers:
            peer.link.close()

    # === The thread ===

    def run(self) -> None:
        """Once a second: say where we are, hear the others, judge."""
        last = time.monotonic()
        suspended_s = max(5 * _BEAT_S, self.config.peer_timeout_s / 4)
        self.forgive(last)  # the last rank may have come long after the first
        while not self.closed.wait(_BEAT_S):
            now = time.monotonic()
            if now - last > suspended_s:  # this process was stopped itself: begin anew
                self.forgive(now)
            last = now
            self.tell(place=self.progress.place, beats=self.progress.beats, allowed_s=self.allowed_s())
            for peer in self.peers:
                self.hear(peer, now)
            self.note_progress(now)
            self.decide(self.judge(now), now)
            if self.verdict and (now >= self.ends_at or self.main_thread_failed) and not self.closed.is_set():
                self.end()

    def forgive(self, now: float) -> None:
        """Counts all silences from now."""
        self.moved = now
        for peer in self.peers:
            peer.heard = now

    def hear(self, peer: _Peer, now: float) -> None:
        """Reads what a peer said since."""
        came, lines = peer.link.receive()
        if came:
            peer.heard = now
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, OverflowError):  # no number where one should be
                self.take(peer, line, now)

    def take(self, peer: _Peer, line: dict[str, Any], now: float) -> None:
        """Understands one line."""
        if "verdict" in line:
            self.decide(str(line["verdict"]), now, bool(line.get("orderly")))
        if "stop" in line:
            stopping.request(str(line["stop"]))
        peer.farewell = peer.farewell or bool(line.get("farewell"))
        peer.place = str(line.get("place", peer.place))
        peer.beats = int(line.get("beats", peer.beats))
        peer.allowed_s = float(line.get("allowed_s", peer.allowed_s))

    def note_progress(self, now: float) -> None:
        """Remembers when any rank got on; passes on that this rank is asked to stop."""
        beats = self.progress.beats + sum(peer.beats for peer in self.peers)
        if beats != self.seen_beats:
            self.seen_beats, self.moved = beats, now
        if loss := stopping.lost_launcher(now):
            stopping.request(f"{loss} of rank {self.ranks.rank} on host {socket.gethostname()}")
        if stopping.requested():
            self.tell(stop=stopping.requested())

    def judge(self, now: float) -> str:
        """What is wrong, or an empty string."""
        found = ""
        for peer in self.peers:
            if not peer.link.is_open and not peer.farewell:
                found = (
                    f"{peer} is gone: its process ended without a word (killed or crashed); last heard in: {peer.place}"
                )
            elif now - peer.heard > self.config.peer_timeout_s and peer.link.is_open:
                found = (
                    f"{peer} is silent for {now - peer.heard:.0f} s (peer_timeout_s): its process hangs or is stopped, "
                    f"its host is down or the link is cut; last heard in: {peer.place}"
                )
        limit = max([self.allowed_s(), *(peer.allowed_s for peer in self.peers)])
        if not found and self.ranks.is_main and self.peers and now - self.moved > limit:
            places = [f"rank 0 on host {socket.gethostname()}: {self.progress.place}"]
            places += [f"{peer}: {peer.place}" for peer in self.peers[:7]]
            setting = "io_timeout_s" if limit >= self.config.io_timeout_s else "step_timeout_s"
            found = f"no rank got on for {now - self.moved:.0f} s ({setting}); {'; '.join(places)}"
        return found

    def decide(self, verdict: str, now: float, orderly: bool = False) -> None:
        """The first verdict counts; rank 0 passes it on."""
        if verdict and not self.verdict:
            self.verdict, self.ends_at = verdict, now + (_ORDERLY_S if orderly else _GRACE_S)
            if self.ranks.is_main:
                self.tell(verdict=verdict, orderly=orderly)

    def end(self) -> None:
        """Says why, cleans up if that can be done at once, and ends the process."""
        words = threading.Thread(target=self.say_last_words, daemon=True)
        words.start()  # beside this one: the main thread may hold the log's lock, and the disk may hang
        words.join(_LAST_WORDS_S)
        os._exit(LOST)

    def say_last_words(self) -> None:
        """The reason, in the log or on the console; then the clean-up."""
        where = f"rank {self.ranks.rank} on host {socket.gethostname()}"
        LOGGER.error("%s ends: %s. What was saved is whole: --resume goes on from it", where, self.verdict)
        for word in self.last_words:
            word()


_watchdog: _Watchdog | None = None


def start(ranks: Ranks, config: WatchConfig) -> None:
    """Starts this rank's watchdog (collective).

    Raises UserError when rank 0 cannot be reached.
    """
    global _watchdog
    links: list[Link] = []
    if ranks.world_size > 1:
        set_collective_timeout(config.start_timeout_s + _LATE_S)
        links = connect(ranks, config.start_timeout_s)
    peers = [_Peer(link, time.monotonic()) for link in links]
    _watchdog = _Watchdog(ranks, peers, config)
    if ranks.world_size > 1:
        set_collective_timeout(2 * config.io_timeout_s)  # from here on it is the watchdog that ends a wait
    if peers or stopping.has_launcher():
        _watchdog.thread.start()


def beat(place: str) -> None:
    """Says that the main thread got on, and where it is now; without a watchdog nothing."""
    if _watchdog is not None:
        _watchdog.beat(place)


@contextlib.contextmanager
def patience(place: str) -> Iterator[None]:
    """Work of which no step can be seen, like reading and writing large files: `io_timeout_s` counts in it."""
    watchdog = _watchdog
    if watchdog is None:
        yield
        return
    watchdog.progress.patience += 1
    watchdog.beat(place)
    try:
        yield
    finally:
        watchdog.beat(f"after {place}")
        watchdog.progress.patience -= 1


def started() -> None:
    """The slow start is over: from now on `step_timeout_s` counts."""
    if _watchdog is not None:
        _watchdog.progress.starting = False


def before_end(word: Callable[[], object]) -> None:
    """Registers a clean-up for the case that the watchdog ends this process."""
    if _watchdog is not None:
        _watchdog.last_words.append(word)


def await_verdict() -> None:
    """After an error that may come from a lost peer: if so, the watchdog ends this process with the reason.

    Returns after three beats without a verdict; with one, the thread ends the process at its next beat.
    """
    watchdog, deadline = _watchdog, time.monotonic() + 3 * _BEAT_S
    if watchdog is not None:
        watchdog.main_thread_failed = True
    while watchdog is not None and watchdog.thread.is_alive() and (watchdog.verdict or time.monotonic() < deadline):
        time.sleep(_BEAT_S / 10)


def fail(reason: str) -> None:
    """Tells the other ranks why this one ends, and stops watching."""
    global _watchdog
    if _watchdog is not None:
        where = f"rank {_watchdog.ranks.rank} on host {socket.gethostname()}"
        _watchdog.tell(verdict=f"{where} failed: {reason}", orderly=True)
        close()


def close() -> None:
    """Stops watching, with a farewell to the peers."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.close()
        _watchdog = None
