"""What is answered while every thread that reads is taken by slow replies."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from httpx import ASGITransport, AsyncClient

from autoq.service.settings import ServiceSettings
from autoq.service.web.app import THREADS, create_app


def test_health_and_identity_take_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(ServiceSettings(store=f"sqlite:///{tmp_path / 'store.db'}"))
    waiting, release = threading.Semaphore(0), threading.Event()

    def slow(_name: str) -> str:
        waiting.release()
        assert release.wait(120)
        return ""

    monkeypatch.setattr(app.state.context.reader, "report", slow)

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(app.router.lifespan_context(app))
            clients = [await stack.enter_async_context(_client(app, n)) for n in range(1, 6)]
            reports = [
                asyncio.ensure_future(clients[number % 4].get("/v1/studies/any/report"))
                for number in range(THREADS)
            ]
            try:
                async with asyncio.timeout(50):
                    for _ in range(THREADS):
                        while not waiting.acquire(blocking=False):
                            await asyncio.sleep(0.01)
                for path in ("/v1/health", "/v1/me"):
                    async with asyncio.timeout(50):  # only there to end a broken test
                        assert (await clients[4].get(path)).status_code == 200
            finally:
                release.set()
            assert {(await report).status_code for report in reports} == {200}

    asyncio.run(scenario())


def _client(app: object, number: int) -> AsyncClient:
    """Each has an address of its own: one alone may not take all threads."""
    transport = ASGITransport(app, client=(f"127.0.0.{number}", 1))  # type: ignore[arg-type]
    return AsyncClient(transport=transport, base_url="http://127.0.0.1")
