"""Where the server is, and who asks."""

from __future__ import annotations

import ipaddress
import os
import warnings

import httpx

from autoq.errors import InputError

TOKEN_VARIABLE = "AUTOQ_TOKEN"

_LOOPBACK_NAMES = ("localhost", "localhost.localdomain")


def checked_address(address: str) -> httpx.URL:
    """A server's URL, complete and without what does not belong there.

    Raises:
        InputError: it is not http or https, has no host, or holds a password or a query.
    """
    try:
        url = httpx.URL(address)
    except (httpx.InvalidURL, TypeError, ValueError):
        raise InputError(f"{address!r} is no URL; give one as http://127.0.0.1:8731") from None
    if url.userinfo:
        raise InputError(
            "a server's URL holds neither user nor password; give the token in the environment "
            f"variable {TOKEN_VARIABLE}"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(
            f"a server's URL begins with http:// or https://, got {address!r}; give one as "
            "http://127.0.0.1:8731"
        )
    if url.query or url.fragment:
        raise InputError(f"a server's URL ends with its host or a folder, got {address!r}")
    return url


def checked_token(token: str | None, url: httpx.URL) -> str | None:
    """The token that is given or that the environment has; None for none.

    Raises:
        InputError: it holds what no token holds; the message does not show it.
    """
    found = (os.environ.get(TOKEN_VARIABLE) if token is None else token) or None
    if found is None:
        return None
    found = found.strip()
    if not found.isascii() or not found.isprintable() or " " in found or not found:
        raise InputError(
            "the token is empty or holds blanks, line breaks or other signs that no token has; "
            "give what `autoq token create` printed"
        )
    if url.scheme == "http" and not is_loopback(url.host):
        warnings.warn(
            f"the token goes to {url.host} unencrypted, and whoever listens can use it; give an "
            "https:// URL",
            stacklevel=4,  # who makes the client
        )
    return found


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its name or number."""
    if host.lower() in _LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
