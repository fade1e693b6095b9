"""Where rank 0's store listens, with real sockets on this machine."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from simple_llama.cluster import rendezvous
from simple_llama.cluster.rendezvous import _choose, _listen, meet, meeting_place
from simple_llama.common.errors import UserError
from tiny_job import free_port

ELSEWHERE = "192.0.2.1"  # an address of documentation (RFC 5737): no host's


def listening(host: str, one_host: bool = False) -> str:
    """Where the store would listen; empty for all addresses."""
    server = _listen(host, free_port(), one_host, 2, time.monotonic())
    if server is None:
        return ""
    with server:
        return server.getsockname()[0]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    """Names that a test gives addresses."""
    known: dict[str, list[str]] = {}
    ask = socket.getaddrinfo

    def answer(host: str, *rest: Any, **options: Any) -> list[Any]:
        found = known.get(host, [host])
        return [one for address in found for one in ask(address, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    yield known


def test_a_number_is_listened_on_alone(caplog: pytest.LogCaptureFixture) -> None:
    """127.0.0.2 is this machine's as 127.0.0.1 is, and only it is open; no word is said."""
    assert [listening(address) for address in ("127.0.0.1", "127.0.0.2")] == ["127.0.0.1", "127.0.0.2"]
    assert listening("0.0.0.0") == "127.0.0.1"  # to connect to "all addresses" is to connect to this host
    assert not caplog.records


def test_ipv6() -> None:
    """Where this machine has it."""
    if not rendezvous._is_ours("::1"):
        pytest.skip("this machine has no IPv6")
    assert listening("::1") == listening("0:0:0:0:0:0:0:1") == "::1"


@pytest.mark.parametrize(
    ("addresses", "one_host", "expected"),
    [
        (["127.0.0.1"], True, "127.0.0.1"),  # localhost, and the launcher says that all ranks are here
        (["127.0.1.1"], False, ""),  # Debian's line for a host's own name: the others know another address
        ([ELSEWHERE], False, ""),  # a translated address, or a service
        ([ELSEWHERE, "127.0.0.3"], True, "127.0.0.3"),
    ],
)
def test_a_name_is_its_address_if_all_come_there(
    names: dict[str, list[str]], caplog: pytest.LogCaptureFixture, addresses: list[str], one_host: bool, expected: str
) -> None:
    """Else all addresses are open as with torch alone, and a warning says so."""
    names["node-1"] = addresses
    with caplog.at_level(logging.WARNING):
        assert listening("node-1", one_host) == expected
    assert ("MASTER_ADDR node-1 means" in caplog.text and "open on all" in caplog.text) is (not expected)


@pytest.mark.parametrize(
    ("ours", "alike", "expected"),
    [
        (["10.0.0.1"], False, "10.0.0.1"),
        (["127.0.1.1", "10.0.0.1"], False, "10.0.0.1"),
        (["fd00::1", "10.0.0.1"], False, "10.0.0.1"),  # who knows both tries both
        (["fd00::1", "::1"], False, "fd00::1"),
        (["10.0.0.1", "192.168.0.1"], False, ""),  # a rank may reach only one of them
        (["::1", "127.0.0.1"], True, "127.0.0.1"),
        (["::1", "127.0.0.1"], False, ""),
        ([], True, ""),
    ],
)
def test_which_address(ours: list[str], alike: bool, expected: str) -> None:
    assert _choose(ours, alike) == expected


def test_a_name_may_be_known_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a pod which has just started: asked again until the time is over, then an error with the name."""
    monkeypatch.setattr(rendezvous, "_AGAIN_S", 0.01)
    asked: list[str] = []

    def answer(host: str, *rest: Any, **options: Any) -> list[Any]:
        asked.append(host)
        if len(asked) < 3:
            raise socket.gaierror("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    assert rendezvous._addresses("dpo-0.dpo", time.monotonic() + 30) == ["127.0.0.1"] and len(asked) == 3
    asked.clear()
    with pytest.raises(OSError, match="no address for dpo-0.dpo: Name or service not known"):
        rendezvous._addresses("dpo-0.dpo", time.monotonic())


@pytest.mark.parametrize("port", ["0", "65536", "-1", "abc", "", "\u0663\u0663", "9" * 5000])
def test_a_port_is_a_number(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match="MASTER_PORT: expected a port from 1 to 65535"):
        meeting_place()


def test_two_ranks_meet_on_that_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 127.0.0.2: each reads the other's key, and at 127.0.0.1 the same port is closed, which torch alone opens."""
    port = free_port()
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.2")
    monkeypatch.setitem(os.environ, "MASTER_PORT", str(port))
    stores: dict[int, Any] = {}
    ranks = [threading.Thread(target=lambda n=n: stores.update({n: meet(n, 2, True, 20)})) for n in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    for rank in (0, 1):
        stores[rank].set(f"of {rank}", str(rank))
    assert [stores[1].get("of 0"), stores[0].get("of 1")] == [b"0", b"1"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)


def test_a_port_in_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another job, or another user of the machine."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
        monkeypatch.setitem(os.environ, "MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(OSError, match="Address already in use"):
            meet(0, 2, True, 5)
