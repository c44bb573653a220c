"""Whether the datasets hub can be reached, found out at once instead of after many tries."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

_SECONDS = 3.0
"""For the hub to accept a connection; one that takes longer is as good as none."""

_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def offline_reason() -> str | None:
    """Why nothing can be fetched, or None if it can be.

    A connection to the hub, or to the proxy before it, is opened and closed again.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(_first_stop(constants.ENDPOINT))
    host, port = address.hostname or "", address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError:
        return f"there is no network to {host}"
    return None


def _first_stop(endpoint: str) -> str:
    """The URL that connections to the hub go to: a proxy's, which may be given without a scheme."""
    proxies = getproxies()
    proxy = proxies.get("https") or proxies.get("all")
    if not proxy or proxy_bypass(urlsplit(endpoint).hostname or ""):
        return endpoint
    return proxy if "://" in proxy else f"http://{proxy}"


@contextmanager
def cache_only_when_offline() -> Iterator[str | None]:
    """Let `datasets` answer from its cache, at once, where nothing can be fetched.

    Without this it tries six times, for half a minute, before it says that there is no network.
    Yields the reason, or None where the hub can be reached.
    """
    import datasets
    from huggingface_hub import constants

    reason = offline_reason()
    if reason is None:
        yield None
        return
    places = [(place, name) for place in (constants, datasets.config) for name in _SWITCHES]
    before = [(place, name, getattr(place, name)) for place, name in places if hasattr(place, name)]
    try:
        for place, name, _ in before:
            setattr(place, name, True)
        yield reason
    finally:
        for place, name, value in before:
            setattr(place, name, value)
