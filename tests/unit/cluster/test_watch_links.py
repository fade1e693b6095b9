"""Where rank 0 listens, whom it lets in, and how long it waits: with real sockets on this machine."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from simple_llama.cluster import watch_links
from simple_llama.cluster.watch_links import Link, _accept, _Doors, _reach, _Way, _way_to
from simple_llama.common.errors import UserError

SECRET = "open sesame"
ELSEWHERE = "192.0.2.1"  # an address of documentation (RFC 5737): no host's


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A door on this machine."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield server


@pytest.fixture
def callers() -> Iterator[contextlib.ExitStack]:
    """Closes what a test connects."""
    with contextlib.ExitStack() as callers:
        yield callers


def call(server: socket.socket, callers: contextlib.ExitStack, said: bytes = b"") -> socket.socket:
    """A connection to the door that says something."""
    caller = callers.enter_context(socket.create_connection(server.getsockname()))
    caller.sendall(said)
    return caller


def greeting(rank: object, host: object = "host-b") -> bytes:
    """What a rank says first."""
    return SECRET.encode() + json.dumps([rank, host]).encode() + b"\n"


def accepted(server: socket.socket, callers: contextlib.ExitStack, count: int, timeout_s: float = 5) -> list[str]:
    """Who was let in, as "rank host"."""
    links = _accept([server], SECRET, count, timeout_s)
    for link in links:
        callers.callback(link.close)
    return [f"{link.rank} {link.host}" for link in links]


# === Where rank 0 listens ===


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_the_door_is_where_the_ranks_come_from(name: str) -> None:
    """One machine: the loopback address, nothing that another host could reach."""
    way = _way_to(name)
    with _Doors(2) as doors:
        route = doors.route(1, way)
        listening = {server.getsockname()[0] for server in doors.servers.values()}
        assert listening == {address for address, _ in route}
        assert "127.0.0.1" in listening and listening <= {"127.0.0.1", "::1"}
        with _reach(route, SECRET, 1, 5):
            pass


def test_each_rank_has_the_address_that_it_knows() -> None:
    """On rank 0's own host its name is 127.0.1.1, as Debian has it, to the others its real one, here 127.0.0.2."""
    with _Doors(3) as doors:
        routes = [doors.route(rank, _Way((address,), "")) for rank, address in ((1, "127.0.1.1"), (2, "127.0.0.2"))]
        assert [[address for address, _ in route] for route in routes] == [["127.0.1.1"], ["127.0.0.2"]]
        assert sorted(server.getsockname()[0] for server in doors.servers.values()) == ["127.0.0.2", "127.0.1.1"]
        assert [port for ((_, port),) in routes] == [doors.servers[a].getsockname()[1] for a in doors.servers]
        assert doors.route(3, _Way(("127.0.1.1",), "")) == routes[0]  # no second door


def test_a_name_with_a_foreign_address_too() -> None:
    """Only the one that is this host's is tried."""
    with _Doors(2) as doors:
        route = doors.route(1, _Way((ELSEWHERE, "127.0.0.1"), ""))
        assert [address for address, _ in route] == ["127.0.0.1"] and list(doors.servers) == ["127.0.0.1"]


def test_a_service_has_the_address_of_none() -> None:
    """MASTER_ADDR is a service of Kubernetes: rank 0 listens where it would answer that rank from, not on all. That
    address is tried first, then the service's own, which may be translated to it."""
    with _Doors(2) as doors:
        route = doors.route(1, _Way((ELSEWHERE,), "127.0.0.1"))
        assert [address for address, _ in route] == ["127.0.0.1", ELSEWHERE]
        assert list(doors.servers) == ["127.0.0.1"] and len({port for _, port in route}) == 1


def test_without_any_address_all_are_open_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The rank goes to the address that it knows, by the port of the door for all."""
    with caplog.at_level(logging.WARNING), _Doors(2) as doors:
        assert doors.route(1, _Way((ELSEWHERE,), "")) == [(ELSEWHERE, doors.servers[""].getsockname()[1])]
        assert doors.servers[""].getsockname()[0] in ("::", "0.0.0.0")
    assert f"{ELSEWHERE}, which is MASTER_ADDR to rank 1, is none of this host's addresses" in caplog.text


def test_an_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "host..invalid")  # no name that one could ask for
    assert _way_to("host..invalid") == _Way((), "")
    with _Doors(2) as doors, pytest.raises(UserError, match=r"that of rank 1 has no address for host\.\.invalid"):
        doors.route(1, _way_to("host..invalid"))


# === Whom it lets in ===


def test_ranks_come_in_any_order(server: socket.socket, callers: contextlib.ExitStack) -> None:
    """They are sorted; what one says behind its greeting is not lost."""
    for rank in (3, 1, 2):
        call(server, callers, greeting(rank, f"host-{rank}") + b'{"beats": 4}\n')
    links = _accept([server], SECRET, 3, 5)
    assert [(link.rank, link.host) for link in links] == [(1, "host-1"), (2, "host-2"), (3, "host-3")]
    assert [link.receive()[1] for link in links] == [[{"beats": 4}]] * 3
    for link in links:
        link.close()


@pytest.mark.parametrize(
    "said",
    [
        b"hello\n",
        b"[" * 60000 + b"\n",
        b'wrong secret[1, "host-x"]\n',
        b'shut sesame[1, "host-x"]\n',  # as long as the right one
        SECRET.encode() + b"\n",
        SECRET.encode() + b"[" * 900 + b"\n",
        SECRET.encode() + b"\xff\xfe[]\n",
        SECRET.encode() + b'{"rank": 1}\n',
        greeting(0),
        greeting(3),
        greeting(True),
        greeting(1.0),
        greeting("1"),
        greeting(1, None),
        greeting(10**400),
        SECRET.encode() + b'[1, "host-x", 2]\n',
        SECRET.encode() + b'[1, "' + b"x" * 2000 + b'"]\n',
    ],
)
def test_strangers_are_not_let_in(server: socket.socket, callers: contextlib.ExitStack, said: bytes) -> None:
    """No secret, or the secret and no rank from 1 to 2: the connection is closed, and the ranks come in."""
    stranger = callers.enter_context(socket.create_connection(server.getsockname()))
    with contextlib.suppress(OSError):  # it may be closed before all is said
        threading.Thread(target=lambda: stranger.sendall(said), daemon=True).start()
    time.sleep(0.05)
    for rank in (1, 2):
        call(server, callers, greeting(rank))
    assert accepted(server, callers, 2) == ["1 host-b", "2 host-b"]
    stranger.settimeout(5)
    with contextlib.suppress(ConnectionError):
        assert stranger.recv(1) == b""


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        (b'[0, "host-x"]', "it says that it is rank 0 on host 'host-x', expected 1 to 2"),
        (b'[3, "host-x"]', "it says that it is rank 3 on host 'host-x', expected 1 to 2"),
        (b"[true, 1]", "it says b'[true, 1]', expected a rank and its host"),
        (b"\x80\x04junk", "it says b'\\x80\\x04junk', expected a rank and its host"),
        (b"9" * 5000, "it says b'99999"),
    ],
)
def test_who_knows_the_secret_and_is_no_rank_is_named(
    server: socket.socket, callers: contextlib.ExitStack, caplog: pytest.LogCaptureFixture, rest: bytes, words: str
) -> None:
    """A word for each, eight at the most, and none of the secret; a stranger without it is not worth one."""
    strangers = [call(server, callers, said) for said in (b"x\n", *[SECRET.encode() + rest + b"\n"] * 10)]
    threading.Timer(0.05, lambda: [call(server, callers, greeting(rank)) for rank in (1, 2)]).start()
    with caplog.at_level(logging.WARNING):
        assert accepted(server, callers, 2) == ["1 host-b", "2 host-b"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 8 and all(words in text and SECRET not in text and len(text) < 400 for text in said)
    for stranger in strangers:
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(1) == b""


def test_a_rank_comes_once(
    server: socket.socket, callers: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """The first counts, and a word is said."""
    call(server, callers, greeting(1, "first"))
    time.sleep(0.05)
    second = call(server, callers, greeting(1, "second"))
    call(server, callers, greeting(2))
    assert accepted(server, callers, 2) == ["1 first", "2 host-b"]
    second.settimeout(5)
    assert second.recv(1) == b""
    assert "it says that it is rank 1 on host 'second', which is connected already" in caplog.text


def test_a_greeting_in_pieces(server: socket.socket, callers: contextlib.ExitStack) -> None:
    caller = call(server, callers)
    said = greeting(1)

    def say() -> None:
        for position in range(len(said)):
            caller.sendall(said[position : position + 1])
            time.sleep(0.002)

    threading.Thread(target=say, daemon=True).start()
    assert accepted(server, callers, 1) == ["1 host-b"]


# === How long it waits ===


def test_silent_strangers_keep_nobody_waiting(server: socket.socket, callers: contextlib.ExitStack) -> None:
    """20 that say nothing, 20 that began to speak; then a rank: it is in at once, and they are out."""
    strangers = [call(server, callers, said) for said in (b"", SECRET.encode()) for _ in range(20)]
    call(server, callers, greeting(1))
    began = time.monotonic()
    assert accepted(server, callers, 1) == ["1 host-b"] and time.monotonic() - began < 1
    for stranger in strangers:
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""


def test_a_thousand_strangers(callers: contextlib.ExitStack) -> None:
    """At the door that rank 0 opens for 127.0.0.1: 1,000 connections that say nothing, half of a secret or junk, and
    two ranks among them, which are in within a second."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    callers.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    doors = callers.enter_context(_Doors(3))
    door = doors.servers[doors.route(1, _Way(("127.0.0.1",), ""))[0][0]]

    def come() -> None:
        for number in range(1000):
            said = (b"", SECRET.encode()[:5], b"junk\n", SECRET.encode() + b"junk\n")[number % 4]
            with contextlib.suppress(OSError):  # it may be sent away before it has spoken
                call(door, callers, greeting(number // 400) if number in (400, 800) else said)

    crowd = threading.Thread(target=come, daemon=True)
    began = time.monotonic()
    crowd.start()
    assert accepted(door, callers, 2, timeout_s=20) == ["1 host-b", "2 host-b"]
    assert time.monotonic() - began < 1
    crowd.join()


def test_silent_strangers_do_not_prolong_the_wait(server: socket.socket, callers: contextlib.ExitStack) -> None:
    """One of two ranks came, and 5 strangers; 1 s is 1 s."""
    for _ in range(5):
        call(server, callers)
    call(server, callers, greeting(2))
    began = time.monotonic()
    with pytest.raises(UserError, match="1 of 2 ranks did not connect within 1 s"):
        _accept([server], SECRET, 2, 1)
    assert 1 <= time.monotonic() - began < 2


def test_strangers_that_go_on_talking_do_not_prolong_the_wait(
    server: socket.socket, callers: contextlib.ExitStack
) -> None:
    """A byte every 10 ms, and a new caller with each: the wait ends when it should."""
    ended, talker = threading.Event(), call(server, callers)

    def talk() -> None:
        while not ended.wait(0.01):
            with contextlib.suppress(OSError):
                talker.sendall(b"x")
                socket.create_connection(server.getsockname()).close()

    thread = threading.Thread(target=talk)
    thread.start()
    began = time.monotonic()
    try:
        with pytest.raises(UserError, match="1 of 1 ranks did not connect within 0.5 s"):
            _accept([server], SECRET, 1, 0.5)
        assert time.monotonic() - began < 1.5
    finally:
        ended.set()
        thread.join()


def test_a_caller_that_hangs_up_is_forgotten(
    server: socket.socket, callers: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its closed connection would be ready at every look, thousands of times in the 0.3 s that are waited here."""
    call(server, callers, b"half a greet").close()
    looks, greetings = [], watch_links._Strangers.greetings
    monkeypatch.setattr(
        watch_links._Strangers, "greetings", lambda self, left_s: looks.append(1) or greetings(self, left_s)
    )
    with pytest.raises(UserError, match="1 of 1 ranks did not connect"):
        _accept([server], SECRET, 1, 0.3)
    assert len(looks) < 10


def test_of_too_many_strangers_the_oldest_go(
    server: socket.socket, callers: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 3 wait beside the one rank: of 6 that came before it, 2 had to go, and then it had room."""
    monkeypatch.setattr(watch_links, "_MAX_STRANGERS", 3)
    strangers = [call(server, callers) for _ in range(6)]
    kept = []

    class Watched(watch_links._Strangers):
        def greetings(self, timeout_s: float) -> list[tuple[socket.socket, bytes]]:
            kept.append(len(self.said))
            return super().greetings(timeout_s)

    monkeypatch.setattr(watch_links, "_Strangers", Watched)
    call(server, callers, greeting(1))
    assert accepted(server, callers, 1) == ["1 host-b"]
    assert max(kept) == 4
    assert strangers[0].recv(1) == b""


# === How a rank reaches rank 0 ===


def test_the_next_address_is_tried(server: socket.socket, callers: contextlib.ExitStack) -> None:
    """A port where nobody listens, then the door."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = gone.getsockname()
    callers.enter_context(_reach([nobody, server.getsockname()], SECRET, 1, 5))
    assert accepted(server, callers, 1) == [f"1 {socket.gethostname()}"]


def test_rank_0_out_of_reach_is_an_error_of_its_own() -> None:
    """A closed port: the address, and what hosts must allow."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with pytest.raises(UserError, match=f"cannot reach rank 0's watchdog at 127.0.0.1:{address[1]}.*any port"):
        _reach([address], SECRET, 1, 2)


def test_addresses_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 s for three addresses that do not answer: 4 s each. One that fails at once leaves its 4 s to the others."""
    clock, waited = [100.0], []

    def connect(address: tuple[str, int], timeout_s: float) -> socket.socket:
        waited.append(timeout_s)
        clock[0] += timeout_s if address[0] == "silent" else 0
        raise TimeoutError("timed out")

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(socket, "create_connection", connect)
    for first, expected in (("silent", [4, 4, 4]), ("closed", [4, 6, 6])):
        waited.clear()
        with pytest.raises(UserError, match="silent:2: timed out"):
            _reach([(first, 1), ("silent", 2), ("silent", 3)], SECRET, 1, 12)
        assert waited == pytest.approx(expected)


# === Lines ===


@pytest.fixture
def pair() -> Iterator[tuple[Link, socket.socket]]:
    """A link, and the other end."""
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        yield Link(1, "host-b", near), far


def test_lines_come_whole(pair: tuple[Link, socket.socket]) -> None:
    link, far = pair
    assert link.receive() == (False, [])
    far.sendall(b'{"a": 1}\n{"b"')
    assert link.receive() == (True, [{"a": 1}])
    far.sendall(b": 2}\n")
    assert link.receive() == (True, [{"b": 2}])
    far.close()
    assert link.is_open and link.receive() == (False, []) and not link.is_open
    link.send({"c": 3})  # to nobody


@pytest.mark.parametrize("said", [b"\n", b"[]\n", b"null\n", b"\xff\xfe\n", b'{"a"\n', b"[" * 60000 + b"\n"])
def test_what_is_no_line_is_left_out(pair: tuple[Link, socket.socket], said: bytes) -> None:
    link, far = pair
    far.sendall(said + b'{"a": 1}\n')
    assert link.receive() == (True, [{"a": 1}])


def test_a_peer_that_talks_without_end_holds_nobody_up() -> None:
    """Each read gives 64 KiB, and there is always more: 16 reads, 1 MiB, are enough for one look. What is no line by
    then is let go."""
    reads = []

    class Endless(socket.socket):
        def recv(self, size: int, flags: int = 0) -> bytes:
            reads.append(size)
            assert len(reads) <= 16
            return b"9" * size

    with Endless() as endless:
        link = Link(1, "host-b", endless)
        assert link.receive() == (True, []) and len(reads) == 16 and link.unread == b""
