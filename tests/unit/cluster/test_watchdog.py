"""Who is taken for lost, when, and how the others hear of it. Two processes that really die: tests/distributed."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from simple_llama.cluster import stopping, watchdog
from simple_llama.cluster.distributed import Ranks
from simple_llama.cluster.watch_links import Link
from simple_llama.cluster.watchdog import WatchConfig, _Peer, _Watchdog


def ranks_of(rank: int, world_size: int) -> Ranks:
    """A rank of a job on one CPU host."""
    return Ranks(rank, world_size, rank, world_size, torch.device("cpu"))


def peer_of(rank: int, host: str, link: socket.socket) -> _Peer:
    """A peer that was heard just now."""
    link.setblocking(False)
    return _Peer(Link(rank, host, link), time.monotonic())


@pytest.fixture
def dogs() -> Iterator[list[_Watchdog]]:
    """Three ranks' watchdogs, linked as in a job, not started: 20 s, 60 s and 1800 s, past the start."""
    links = [socket.socketpair() for _ in range(2)]
    main = _Watchdog(
        ranks_of(0, 3), [peer_of(i + 1, f"host-{i + 1}", pair[0]) for i, pair in enumerate(links)], WatchConfig()
    )
    others = [
        _Watchdog(ranks_of(i + 1, 3), [peer_of(0, "host-0", pair[1])], WatchConfig()) for i, pair in enumerate(links)
    ]
    for dog in (main, *others):
        dog.progress.starting = False
    yield [main, *others]
    for pair in links:
        for link in pair:
            link.close()


def turn(dog: _Watchdog, now: float) -> str:
    """What the thread does once a second, but for ending the process; gives the verdict."""
    dog.tell(place=dog.progress.place, beats=dog.progress.beats, allowed_s=dog.allowed_s())
    for peer in dog.peers:
        dog.hear(peer, now)
    dog.note_progress(now)
    dog.decide(dog.judge(now), now)
    return dog.verdict


def test_all_is_well_while_everybody_is_heard(dogs: list[_Watchdog]) -> None:
    """100 s in which each rank gets on every second: no verdict."""
    now = time.monotonic()
    for second in range(100):
        for dog in dogs:
            dog.beat("step 1")
            assert turn(dog, now + second) == ""


def test_a_closed_connection_is_a_lost_rank(dogs: list[_Watchdog]) -> None:
    """Rank 2 dies after it said where it was: rank 0 knows at once, and tells rank 1."""
    now = time.monotonic()
    dogs[2].beat("step 7")
    turn(dogs[2], now)
    assert turn(dogs[0], now) == ""
    dogs[2].peers[0].link.close()
    verdict = turn(dogs[0], now + 1)
    assert "rank 2 on host host-2 is gone" in verdict and "last heard in: step 7" in verdict
    assert turn(dogs[1], now + 1) == verdict


def test_a_lost_rank_0_is_found_by_every_other(dogs: list[_Watchdog]) -> None:
    """Nobody is there to pass it on."""
    now = time.monotonic()
    for peer in dogs[0].peers:
        peer.link.close()
    for dog in dogs[1:]:
        assert "rank 0 on host host-0 is gone" in turn(dog, now)


def test_silence_counts_from_the_last_word(dogs: list[_Watchdog]) -> None:
    """Rank 1 speaks at second 15 and never again: nothing at 35 s, a verdict at 36 s. (peer_timeout_s is 20.)"""
    now = time.monotonic()
    for second in range(16):
        for dog in reversed(dogs):
            turn(dog, now + second)
    for second in range(16, 36):
        turn(dogs[2], now + second)
        assert turn(dogs[0], now + second) == ""
    turn(dogs[2], now + 36)
    assert "rank 1 on host host-1 is silent for 21 s (peer_timeout_s)" in turn(dogs[0], now + 36)


def test_a_farewell_is_no_loss(dogs: list[_Watchdog]) -> None:
    """A rank that is done closes; also rank 0."""
    now = time.monotonic()
    dogs[2].close()
    assert turn(dogs[0], now) == ""
    dogs[0].close()
    assert turn(dogs[1], now) == ""


def test_stuck_is_when_no_rank_gets_on(dogs: list[_Watchdog]) -> None:
    """All are heard. For 200 s rank 1 alone gets on, and no more: nothing until 60 s later (step_timeout_s)."""
    start = time.monotonic()
    for second in range(0, 260, 5):
        if second <= 200:
            dogs[1].progress.beats += 1
            dogs[1].progress.place = "saving"
        for dog in reversed(dogs):
            assert turn(dog, start + second) == "", second
    for dog in reversed(dogs):
        turn(dog, start + 265)
    assert "no rank got on for 65 s (step_timeout_s)" in dogs[0].verdict
    assert "rank 1 on host host-1: saving" in dogs[0].verdict and "rank 2 on host host-2: start" in dogs[0].verdict
    assert turn(dogs[1], start + 265) == dogs[0].verdict


def test_patience_of_one_rank_counts_for_all(dogs: list[_Watchdog], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 writes a checkpoint for 1,795 s, the others wait for it: no verdict before 1,800 s (io_timeout_s)."""
    monkeypatch.setattr(watchdog, "_watchdog", dogs[2])
    now = time.monotonic()
    with watchdog.patience("saving step 3"):
        for second in range(0, 1800, 5):
            for dog in reversed(dogs):
                assert turn(dog, now + second) == "", second
        for dog in reversed(dogs):
            turn(dog, now + 1805)
        assert "no rank got on for 1805 s (io_timeout_s)" in dogs[0].verdict
        assert "rank 2 on host host-2: saving step 3" in dogs[0].verdict
    assert dogs[2].allowed_s() == 60


def test_a_slow_machine_gets_more_time(monkeypatch: pytest.MonkeyPatch, dogs: list[_Watchdog]) -> None:
    """Micro-batches of 10 s: 60 s are allowed; once one took 40 s: 160 s. Reading and patience do not count."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog, "_watchdog", dog := dogs[0])
    dog.progress = watchdog._Progress()
    assert dog.allowed_s() == 1800
    clock[0] += 500
    watchdog.beat("step")
    watchdog.started()
    assert dog.allowed_s() == 60
    for seconds, allowed in ((10, 60), (40, 160), (5, 160)):
        clock[0] += seconds
        watchdog.beat("step")
        assert dog.allowed_s() == allowed
    with watchdog.patience("saving"):
        clock[0] += 1000
    clock[0] += 1
    watchdog.beat("step")
    assert dog.allowed_s() == 160


def test_a_rank_that_was_suspended_itself_begins_anew(dogs: list[_Watchdog], monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop that slept for an hour: the thread's first look after it blames nobody."""
    monkeypatch.setattr(watchdog, "_BEAT_S", 0.01)
    ended: list[str] = []
    monkeypatch.setattr(_Watchdog, "end", lambda self: ended.append(self.verdict))
    real, ahead = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])
    dogs[1].thread.start()
    time.sleep(0.1)
    ahead[0] = 3600
    time.sleep(0.1)
    assert dogs[1].verdict == "" and not ended
    dogs[1].closed.set()
    dogs[1].thread.join()


def test_the_thread_ends_the_process_after_a_grace(dogs: list[_Watchdog], monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread has _GRACE_S to say itself why it ends; then the status is LOST, after the last words."""
    monkeypatch.setattr(watchdog, "_BEAT_S", 0.01)
    monkeypatch.setattr(watchdog, "_GRACE_S", 0.3)
    order: list[object] = []
    left = threading.Event()

    def leave(status: int) -> None:
        order.append(status)
        left.set()
        dogs[1].closed.set()

    monkeypatch.setattr(os, "_exit", leave)
    dogs[1].last_words.append(lambda: order.append("unlocked"))
    dogs[1].peers[0].link.is_open = False
    started = time.monotonic()
    dogs[1].thread.start()
    assert left.wait(5) and time.monotonic() - started >= 0.3
    assert order == ["unlocked", watchdog.LOST]
    dogs[1].thread.join()


def test_last_words_that_hang_do_not_keep_the_process(dogs: list[_Watchdog], monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean-up on a dead disk: the process ends all the same."""
    monkeypatch.setattr(watchdog, "_LAST_WORDS_S", 0.1)
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    hang = threading.Event()
    dogs[0].last_words.append(lambda: hang.wait(10))
    dogs[0].end()
    hang.set()
    assert left == [3]


def test_a_failure_is_told_with_its_reason(dogs: list[_Watchdog], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's own error reaches rank 2 through rank 0; the first reason stays."""
    monkeypatch.setattr(watchdog, "_watchdog", dogs[1])
    now = time.monotonic()
    watchdog.fail("ValueError: broken")
    assert turn(dogs[0], now).endswith("failed: ValueError: broken") and "rank 1 on host" in dogs[0].verdict
    assert turn(dogs[2], now) == dogs[0].verdict
    dogs[2].peers[0].link.close()
    assert turn(dogs[0], now) == dogs[2].verdict


def test_a_request_to_stop_reaches_all(dogs: list[_Watchdog], monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank got the signal; within two turns all know. (In one process they share it: so look at what is sent.)"""
    asked: list[str] = []
    monkeypatch.setattr(stopping, "request", asked.append)
    monkeypatch.setattr(stopping, "requested", lambda: "SIGTERM")
    turn(dogs[1], time.monotonic())
    monkeypatch.setattr(stopping, "requested", lambda: "")
    turn(dogs[0], time.monotonic())
    assert asked == ["SIGTERM"]


@pytest.mark.parametrize(
    "data", [b"\n", b"[]\n", b"null\n", b'{"beats": "x"}\n', b"\xff\xfe\n", b'{"place"\n', b"9" * 70000]
)
def test_lines_that_are_none_do_no_harm(dogs: list[_Watchdog], data: bytes) -> None:
    """Only what a peer means counts; the thread goes on."""
    now = time.monotonic()
    dogs[1].peers[0].link.socket.setblocking(True)
    dogs[1].peers[0].link.socket.send(data)
    assert turn(dogs[0], now) == "" and dogs[0].peers[0].beats == 0


def test_what_is_sent_is_plain_json(dogs: list[_Watchdog]) -> None:
    """No pickles between processes here: a line is a JSON object."""
    turn(dogs[1], time.monotonic())
    line = dogs[0].peers[0].link.socket.recv(1000).splitlines()[0]
    assert json.loads(line) == {"place": "start", "beats": 0, "allowed_s": 60}


def test_without_a_watchdog_nothing_happens() -> None:
    """Library use: every call is free."""
    watchdog.close()
    watchdog.beat("x")
    watchdog.started()
    watchdog.fail("x")
    watchdog.await_verdict()
    watchdog.before_end(lambda: None)
    with watchdog.patience("x"):
        pass


def test_a_slow_first_step_counts(monkeypatch: pytest.MonkeyPatch, dogs: list[_Watchdog]) -> None:
    """All micro-batches take 70 s, the first step's too: when the start is over, 280 s are allowed, not 60."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog, "_watchdog", dog := dogs[0])
    dog.progress = watchdog._Progress()
    for _ in range(3):
        watchdog.beat("step 1")
        clock[0] += 70
    watchdog.beat("after step 1")
    watchdog.started()
    assert dog.allowed_s() == 280


def test_an_orderly_error_of_a_peer_waits_longer(dogs: list[_Watchdog], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is often the error of all ranks, and rank 2 tidies up before it says so: 30 s. A lost peer: 3 s."""
    monkeypatch.setattr(watchdog, "_watchdog", dogs[1])
    now = time.monotonic()
    watchdog.fail("disk full")
    for dog in (dogs[0], dogs[2]):
        turn(dog, now)
        assert dog.ends_at == now + watchdog._ORDERLY_S == now + 30
    dogs[0].verdict = ""
    dogs[0].peers[1].link.close()
    dogs[0].peers[1].link.is_open = False
    turn(dogs[0], now)
    assert dogs[0].ends_at == now + watchdog._GRACE_S
