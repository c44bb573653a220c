"""The real service on a real socket, in a thread of the test's process; it runs no jobs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from autoq.service.settings import ServiceSettings
from autoq.service.web.app import create_app
from autoq.service.web.server import listening_socket

_START_SECONDS = 120.0  # only there to end a broken test


@contextmanager
def served(settings: ServiceSettings) -> Iterator[str]:
    """The URL of the service, which answers as long as the context lasts.

    Its address is that of the settings' host and a free port.
    """
    with listening_socket(settings.host, 0) as listening:
        port = listening.getsockname()[1]
        config = uvicorn.Config(create_app(settings), log_level="warning", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            _await_start(server)
            yield f"http://{settings.host}:{port}"
        finally:
            server.should_exit = True
            thread.join()


def _await_start(server: uvicorn.Server) -> None:
    begun = time.monotonic()
    while not server.started:
        if time.monotonic() - begun > _START_SECONDS:
            raise TimeoutError("the service did not start")
        time.sleep(0.01)
