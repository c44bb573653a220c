"""The service as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import Lifespan

from autoq.service._version import VERSION
from autoq.service.guard.roots import Roots
from autoq.service.guard.security import Guard, SecurityMiddleware
from autoq.service.reading._cached_tables import Bounded
from autoq.service.reading.reader import StudyReader
from autoq.service.replies import handle_problems
from autoq.service.settings import ServiceSettings
from autoq.service.web.access_log import AccessLogMiddleware
from autoq.service.web.context import Context
from autoq.service.web.events import EventHub
from autoq.service.web.heads import HeadMiddleware
from autoq.service.web.job_views import StoreEvents
from autoq.service.web.metrics import Metrics, MetricsMiddleware
from autoq.service.web.routes import include_routes
from autoq.service.web.study_names import WholeNamesMiddleware
from autoq.studies import StudyStore

THREADS = 16
"""That read at once: more would wait for each other's turn in the interpreter."""

_TABLES = 16
"""Large replies that are kept as text: less than a megabyte each of 1,000 groups x 12 formats."""


def create_app(settings: ServiceSettings) -> FastAPI:
    """The service of one store; the store is opened now, and closed when the app's life ends.

    Raises:
        InputError: a root does not exist.
        StoreError: the store cannot be opened.
    """
    context = _context(settings)
    app = FastAPI(
        title="autoq",
        version=VERSION,
        summary="Decides, layer by layer, in which number format a language model is stored.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=_lifespan(context),
        generate_unique_id_function=_operation_id,
        redirect_slashes=False,
    )
    app.state.context = context
    handle_problems(app)
    include_routes(app)
    app.add_middleware(GZipMiddleware, minimum_size=1_000, compresslevel=4)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(WholeNamesMiddleware)
    app.add_middleware(SecurityMiddleware, guard=context.guard)
    app.add_middleware(MetricsMiddleware, metrics=context.metrics)
    app.add_middleware(AccessLogMiddleware)
    return app


def _context(settings: ServiceSettings) -> Context:
    roots = Roots(models=settings.models, data=settings.data, exports=settings.exports)
    guard = Guard(settings)
    store = StudyStore.open(settings.store)
    reader = StudyReader(store, roots.public)
    events, metrics = EventHub(StoreEvents(store)), Metrics()
    metrics.watch(
        jobs=lambda: {status.value: number for status, number in store.count_jobs().items()},
        tables=reader.cache_counts,
        events=lambda: events.streamed,
    )
    return Context(
        settings=settings,
        store=store,
        reader=reader,
        tables=Bounded(_TABLES),
        roots=roots,
        events=events,
        metrics=metrics,
        guard=guard,
    )


def _lifespan(context: Context) -> Lifespan[FastAPI]:
    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        try:
            yield
        finally:
            await context.events.close()
            context.store.close()

    return living


def _operation_id(route: APIRoute) -> str:
    """The function's name: what a generated client calls its method."""
    return route.name
