"""Names of this machine and of others: which `Host` is meant, and whether others reach it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from autoq.errors import InputError
from autoq.service.guard.tokens import read_tokens

_EVERYWHERE = ("0.0.0.0", "::", "")
_PORTS = {"http": 80, "https": 443}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there; names but "localhost" count as not."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def check_exposure(host: str, token_file: Path | None, tls: bool) -> list[str]:
    """What to warn of before a server starts.

    Args:
        host: that it listens on.
        tls: whether it has a certificate.
    Raises:
        InputError: others could use it without a token; or the token file is not as `read_tokens`
            says, or off loopback holds none.
    """
    entries = None if token_file is None else read_tokens(token_file)
    if is_loopback(host):
        if entries is None:
            return [
                f"everybody on this machine may use {host} without a token; --token-file asks one"
            ]
        return []
    if not entries:
        raise InputError(
            f"a server that others reach needs tokens, and {host!r} is not this machine alone; give "
            "--token-file with a token (`autoq token create` makes one), or --host 127.0.0.1"
        )
    if tls:
        return []
    warning = (
        f"tokens and data travel unencrypted to {host}: give --tls-cert and --tls-key, or "
        "put a proxy with TLS before it"
    )
    return [warning]


class HostRule:
    """Which names a request may call the server by.

    A page of somebody else's that is made to resolve to this machine (DNS rebinding) still sends
    its own name, and is refused.
    """

    def __init__(self, host: str, allowed: Iterable[str] = ()) -> None:
        """
        Args:
            host: that the server listens on.
            allowed: further names, of a proxy for example; without ports.
        """
        self._extra = frozenset(name.lower().strip("[]") for name in allowed)
        self._local_only = is_loopback(host)
        own = {"localhost", host.lower()} - set(_EVERYWHERE)
        if host in _EVERYWHERE:
            own.add(socket.gethostname().lower())
        self._names = self._extra | own

    def allows(self, header: str) -> bool:
        """Whether a `Host` header names the server. Ports do not matter.

        Addresses need no list where others reach the server: none can be made to resolve.
        """
        split = split_host(header)
        if split is None:
            return False
        name = split[0]
        address = _address(name)
        if address is not None and (address.is_loopback or not self._local_only):
            return True
        return name in self._names

    def is_same_origin(self, origin: str, header: str) -> bool:
        """Whether a page of this origin came from the server that `Host` names.

        Behind a proxy with TLS the scheme differs, and the port with it.
        """
        try:
            parts = urlsplit(origin)
            here, there = split_host(header), split_host(parts.netloc)
        except ValueError:
            return False
        if parts.scheme not in _PORTS or here is None or there is None:
            return False
        if there[0] in self._extra:
            return True
        ports = set(_PORTS.values()) if here[1] is None else {here[1]}
        return there[0] == here[0] and (there[1] or _PORTS[parts.scheme]) in ports


def split_host(header: str) -> tuple[str, int | None] | None:
    """Name, in small letters and without brackets, and port; None of what is no host."""
    if not header or not header.isascii() or set(header) & set("/?#@\\ \t,"):
        return None
    try:
        parts = urlsplit(f"//{header}")
        name, port = parts.hostname, parts.port
    except ValueError:
        return None
    return (name.rstrip("."), port) if name else None


def client_key(address: str) -> str:
    """What stands for a client's address: of IPv6 its network, which one client has all of."""
    parsed = _address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        mapped = parsed.ipv4_mapped
        return str(mapped or ipaddress.ip_network((int(parsed), 64), strict=False))
    return address


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.strip("[]").partition("%")[0])
    except ValueError:
        return None
