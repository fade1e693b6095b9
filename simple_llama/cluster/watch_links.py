"""The watchdog's connections: TCP from every rank to rank 0, over which lines of JSON go, read as data only.

Rank 0 listens on the addresses by which the ranks know it, and on no other: what MASTER_ADDR means on each of their
hosts, as far as rank 0's own host has such an address. It has none where MASTER_ADDR is a service, which passes on
declared ports alone; then it listens on the one from which it would answer that rank, and where the system does not
tell that either, on all, with a warning.

Who connects must say a secret, which rank 0 gave out by a collective, then its rank and host. Rank 0 hears all callers
at once, so that a stranger who says nothing keeps nobody waiting. Every wait ends at the caller's timeout.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import selectors
import socket
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from simple_llama.cluster.distributed import Ranks, broadcast_object, fail_together, gather_objects
from simple_llama.cluster.rendezvous import NOT_OURS, THIS_HOST, family_of
from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.common.logging import LOGGER

_MAX_LINE = 1 << 16  # bytes of a line; more is none
_MAX_READ = 1 << 20  # bytes that are read from a peer at a time
_MAX_GREETING = 1 << 10  # bytes
_MOST_SAID = 8  # refusals that are said
_BACKLOG = 1024  # connections beside those of the ranks that wait to be taken on; one too many would try again in 1 s
_MAX_STRANGERS = 64  # connections that have not said yet who they are, beside those of the ranks
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_Address = tuple[str, int]  # numeric, and a port
_WAY, _ROUTES = tuple[list[str], str], list[list[_Address]]  # as they travel: of a `_Way`, of a route for each rank


@dataclass
class Link:
    """The connection to another rank."""

    rank: int
    host: str
    socket: socket.socket  # non-blocking
    unread: bytes = b""  # the beginning of a line
    is_open: bool = True  # until the other end was found closed

    def send(self, line: dict[str, object]) -> None:
        """Sends a line, or loses it where the other end does not take it now."""
        if self.is_open:
            with contextlib.suppress(OSError):
                self.socket.send(json.dumps(line).encode() + b"\n")

    def receive(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether anything came since the last call, and the lines of it; what is no line of ours is left out."""
        data = b""
        while self.is_open and len(data) < _MAX_READ:
            try:
                more = self.socket.recv(_MAX_LINE)
            except BlockingIOError:
                break
            except OSError:
                more = b""
            self.is_open = bool(more)
            data += more
        *lines, unread = (self.unread + data).split(b"\n")
        self.unread = unread if len(unread) <= _MAX_LINE else b""
        return bool(data), [line for text in lines if isinstance(line := _parsed(text), dict)]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()


@dataclass(frozen=True)
class _Way:
    """How a rank would go to rank 0. Addresses are numeric."""

    named: tuple[str, ...]  # what MASTER_ADDR means to it
    own: str  # its own address on that way; empty where there is none


def connect(ranks: Ranks, timeout_s: float) -> list[Link]:
    """The links of this rank: rank 0's to all others, the others' to rank 0 (collective).

    Raises:
        UserError: rank 0 cannot be reached, or a rank did not come within `timeout_s`.
    """
    mine = _way_to(os.environ["MASTER_ADDR"])
    ways = [_Way(tuple(named), own) for named, own in gather_objects((mine.named, mine.own), ranks, _WAY)]
    with _Doors(ranks.world_size) as doors:
        routes = []
        with fail_together(ranks):
            if ranks.is_main:
                routes = [doors.route(rank, ways[rank]) for rank in range(1, ranks.world_size)]
        offer = routes, secrets.token_hex(16), socket.gethostname()
        routes, secret, main_host = broadcast_object(offer, ranks, tuple[_ROUTES, str, str])
        with fail_together(ranks):
            if ranks.is_main:
                return _accept(list(doors.servers.values()), secret, ranks.world_size - 1, timeout_s)
            return [Link(0, main_host, _reach(routes[ranks.rank - 1], secret, ranks.rank, timeout_s))]


def _way_to(address: str) -> _Way:
    """How this host would go to `address`, a name or a number; the name server's own time limits bound the question."""
    named: list[str] = []
    with contextlib.suppress(OSError, UnicodeError):
        named = [str(found[4][0]) for found in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)]
    named = [THIS_HOST.get(one, one) for one in named]
    return _Way(tuple(dict.fromkeys(named)), next((own for one in named if (own := _source_to(one))), ""))


def _source_to(address: str) -> str:
    """The address of this host from which it would send to a numeric one; empty without a way there. Sends nothing."""
    with contextlib.suppress(OSError), socket.socket(family_of(address), socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # any port
        return str(probe.getsockname()[0])
    return ""


class _Doors:
    """Where rank 0 listens, until the end of `with`."""

    def __init__(self, world_size: int):
        self.servers: dict[str, socket.socket] = {}  # by address; empty: all addresses
        self.backlog = world_size + _BACKLOG

    def __enter__(self) -> _Doors:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers.values():
            server.close()

    def route(self, rank: int, way: _Way) -> list[_Address]:
        """Opens a door for a rank; gives what it may try, in order."""
        if not way.named:
            raise UserError(
                f"watchdog: expected that every host knows MASTER_ADDR, but that of rank {rank} has no address for "
                f"{os.environ['MASTER_ADDR']}; give all hosts one name or number of rank 0's"
            )
        found = [address for address in way.named if self._open(address)]
        towards = _source_to(way.own) if way.own and not found else ""
        if towards and self._open(towards):  # by its own address first, then by the name, which may be translated
            port = self._port(towards)
            return [(towards, port), *((address, port) for address in way.named)]
        if found:
            return [(address, self._port(address)) for address in found]
        LOGGER.warning(
            "watchdog: %s, which is MASTER_ADDR to rank %d, is none of this host's addresses: listening on all of them",
            way.named[0],
            rank,
        )
        self._open("")
        return [(address, self._port("")) for address in way.named]

    def _open(self, address: str) -> bool:
        """Listens on an address; False where it is none of this host's."""
        if address not in self.servers:
            both = not address and socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else family_of(address)
            try:
                server = socket.create_server((address, 0), family=family, backlog=self.backlog, dualstack_ipv6=both)
            except OSError as error:
                if address and (error.errno in NOT_OURS or isinstance(error, socket.gaierror)):
                    return False
                raise UserError(f"watchdog: cannot listen on {address or 'all addresses'}: {error}") from error
            self.servers[address] = server
        return True

    def _port(self, address: str) -> int:
        return self.servers[address].getsockname()[1]


def _reach(route: Sequence[_Address], secret: str, rank: int, timeout_s: float) -> socket.socket:
    """Connects to rank 0 at the first address that answers in its share of the time, and says who we are."""
    ends, failures = time.monotonic() + timeout_s, []
    for tried, address in enumerate(route):
        now = time.monotonic()
        link, share_ends = None, now + (ends - now) / (len(route) - tried)
        try:
            link = socket.create_connection(address, _left_s(share_ends))
            link.settimeout(_left_s(share_ends))
            link.sendall(secret.encode() + json.dumps([rank, socket.gethostname()]).encode() + b"\n")
            link.setblocking(False)
            return link
        except OSError as error:
            failures.append(f"{address[0]}:{address[1]}: {error}")
            if link is not None:
                link.close()
    raise UserError(
        f"rank {rank} on host {socket.gethostname()} cannot reach rank 0's watchdog at {'; '.join(failures)}; "
        "expected that hosts of a job may connect to each other on any port"
    )


def _left_s(ends: float) -> float:
    """Seconds until then; a little where it is past, since 0 would mean something else to a socket."""
    return max(0.001, ends - time.monotonic())


def _accept(servers: Sequence[socket.socket], secret: str, count: int, timeout_s: float) -> list[Link]:
    """Waits for the greetings of ranks 1 to `count`; who says anything else is dropped, with a word if it knows the
    secret. Of strangers nothing is said: they may be many."""
    links: dict[int, Link] = {}
    refused = 0
    ends = time.monotonic() + timeout_s
    with _Strangers(servers, count + _MAX_STRANGERS) as strangers:
        while len(links) < count:
            if time.monotonic() >= ends:
                for link in links.values():
                    link.close()
                missing = f"{count - len(links)} of {count} ranks did not connect within {timeout_s:g} s"
                raise UserError(f"watchdog: {missing}")
            for connection, said in strangers.greetings(_left_s(ends)):
                link, why_not = _greeted(connection, said, secret, links, count)
                if link is not None:
                    links[link.rank] = link
                    continue
                if why_not and refused < _MOST_SAID:
                    LOGGER.warning("watchdog: refused a connection that knows this job's secret: it %s", why_not)
                refused += bool(why_not)
                connection.close()
    return [links[rank] for rank in sorted(links)]


class _Strangers:
    """Connections that have not said yet who they are: at most `most`, closed at the end of `with`."""

    def __init__(self, servers: Sequence[socket.socket], most: int):
        self.servers, self.most = servers, most
        self.said: dict[socket.socket, bytes] = {}  # by connection, the oldest first
        self.selector = selectors.DefaultSelector()
        for server in servers:
            server.setblocking(False)
            self.selector.register(server, selectors.EVENT_READ)

    def __enter__(self) -> _Strangers:
        return self

    def __exit__(self, *_: object) -> None:
        self.selector.close()
        for stranger in self.said:
            stranger.close()

    def greetings(self, timeout_s: float) -> list[tuple[socket.socket, bytes]]:
        """Waits until something happens; gives those who have said a line, or too much, with what they said."""
        ready = {key.fileobj for key, _ in self.selector.select(timeout_s)}
        done = []
        for stranger in [stranger for stranger in self.said if stranger in ready]:
            there, said = self._hear(stranger), self.said[stranger]
            if b"\n" in said or len(said) >= _MAX_GREETING:
                done.append((self._forget(stranger), said))
            elif not there:
                self._forget(stranger).close()
        for server in self.servers:
            turns = self.most if server in ready else 0
            while turns and self._let_in(server):
                turns -= 1  # those that came meanwhile wait for the next look
        return done

    def _let_in(self, server: socket.socket) -> bool:
        """Takes one connection on; where there are too many, the one goes that has kept silent longest. False where
        none waits."""
        try:
            stranger, _ = server.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise UserError(f"watchdog: cannot take a connection on: {error}") from error
            return False  # also where it has gone already
        stranger.setblocking(False)
        if len(self.said) >= self.most:
            self._forget(next(iter(self.said))).close()
        self.said[stranger] = b""
        self.selector.register(stranger, selectors.EVENT_READ)
        return True

    def _hear(self, stranger: socket.socket) -> bool:
        """Adds to what it has said; False once it is gone."""
        try:
            more = stranger.recv(_MAX_GREETING)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.said[stranger] += more
        return bool(more)

    def _forget(self, stranger: socket.socket) -> socket.socket:
        """Lets go of a connection, which is the caller's now."""
        self.selector.unregister(stranger)
        del self.said[stranger]
        return stranger


def _greeted(
    connection: socket.socket, said: bytes, secret: str, known: Container[int], count: int
) -> tuple[Link | None, str]:
    """The link to a rank from 1 to `count`, not `known` yet, that said the secret and who it is.

    For anybody else none; and what is wrong, where the secret was right.
    """
    greeting, _, unread = said.partition(b"\n")
    if not secrets.compare_digest(greeting[: len(secret)], secret.encode()):
        return None, ""
    match _parsed(greeting[len(secret) :]):
        case [int(rank), str(host)] if not isinstance(rank, bool):
            if not 1 <= rank <= count:
                return None, f"says that it is rank {shown(rank)} on host {shown(host)}, expected 1 to {count}"
            if rank in known:
                return None, f"says that it is rank {rank} on host {shown(host)}, which is connected already"
            return Link(rank, host, connection, unread), ""
    return None, f"says {shown(greeting[len(secret) :])}, expected a rank and its host"


def _parsed(text: bytes) -> Any:
    """What a piece of JSON says; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
