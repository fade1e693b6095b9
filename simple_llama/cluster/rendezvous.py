"""Where the ranks meet: rank 0's store of keys, on the address that MASTER_ADDR names and on no other.

torch alone would listen on all addresses of the host, and for the whole run. Who reaches the store may read and set its
keys, so it is open no further than the ranks need. Under torchrun the agent has opened it already, everywhere.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER

NOT_OURS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)  # an address that this host does not have
THIS_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # what connecting to "all addresses" means
_AGAIN_S = 0.5  # between two questions for a name that is not known yet, as that of a pod that has just started


def meeting_place() -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT. UserError where the port is none."""
    host, text = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 1 << 16):
        raise UserError(f"environment variable MASTER_PORT: expected a port from 1 to 65535, found {text[:80]!r}")
    return host, int(text)


def meet(rank: int, world_size: int, one_host: bool, timeout_s: float) -> Store:
    """The store of this job, once all ranks have come to it (collective).

    Args:
        one_host: whether the launcher said that all ranks are on this host.

    Raises:
        OSError, RuntimeError: the port is taken, the name is not known, or not all came within `timeout_s`.
    """
    host, port = meeting_place()
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    server = _listen(host, port, one_host, world_size, time.monotonic() + timeout_s) if opens else None
    store = TCPStore(
        host,
        port,
        world_size,
        is_master=opens,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=server.detach() if server else None,  # torch's now
        use_libuv=os.environ.get("USE_LIBUV", "1") == "1",  # as torch reads it
    )
    return PrefixStore("ranks", store)


def _listen(host: str, port: int, one_host: bool, backlog: int, ends: float) -> socket.socket | None:
    """Listens on the one address of this host that all ranks reach; None, with a word, where that cannot be told."""
    found = _addresses(host, ends)
    address = _choose([address for address in found if _is_ours(address)], one_host or _is_number(host))
    if address:
        return socket.create_server((address, port), family=family_of(address), backlog=backlog)
    LOGGER.warning(
        "MASTER_ADDR %s means %s here, which is not one address of this host that all ranks reach: port %d is open on "
        "all of its addresses. To open it on one, give that one as a number",
        host,
        ", ".join(found),
        port,
    )
    return None


def _addresses(host: str, ends: float) -> list[str]:
    """What a name or number means here; asked again until `ends`, as torch does, where nothing is known of it."""
    while True:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(THIS_HOST.get(str(one[4][0]), str(one[4][0])) for one in found))
        except (OSError, UnicodeError) as error:
            if time.monotonic() + _AGAIN_S >= ends:
                raise OSError(f"no address for {host}: {error}") from error
        time.sleep(_AGAIN_S)


def family_of(address: str) -> socket.AddressFamily:
    """Of a numeric address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _is_ours(address: str) -> bool:
    """Whether this host has an address."""
    try:
        with socket.socket(family_of(address)) as probe:
            probe.bind((address, 0))
    except OSError as error:
        if error.errno in NOT_OURS or isinstance(error, socket.gaierror):
            return False
        raise
    return True


def _is_number(host: str) -> bool:
    """Whether it is an address, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _choose(ours: Sequence[str], alike: bool) -> str:
    """The one of this host's addresses by which all ranks come, IPv4 first; empty where there is none such.

    Args:
        alike: whether a loopback address will do: MASTER_ADDR means the same to all ranks. A name may be loopback here
            and not elsewhere, as Debian writes it for a host's own one.
    """
    outside = [address for address in ours if not ipaddress.ip_address(address.partition("%")[0]).is_loopback]
    if not outside:
        return min(ours, key=lambda address: ":" in address, default="") if alike else ""
    short = [address for address in outside if ":" not in address] or outside
    return short[0] if len(short) == 1 else ""
