"""The application: one pair behind OpenAI's API, with a page to see it at work."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from baco.api import Baco
from baco.serve import errors
from baco.serve.connections import Connections
from baco.serve.endpoints import ERRORS, Endpoints
from baco.serve.engine_thread import EngineThread
from baco.serve.metrics import Metrics
from baco.serve.middleware import AccessLog, Auth
from baco.serve.parse_request import RequestParser
from baco.serve.playground import Playground, add_page
from baco.serve.response_models import Health
from baco.serve.settings import Settings
from baco.version import __version__


def create_app(baco: Baco, settings: Settings | None = None) -> FastAPI:
    """Create the application. The engine thread runs until the application shuts down.

    Raises:
        BacoError: this process may open too few files, or a calibration cannot be read.
    """
    settings = settings or Settings()
    connections = Connections(settings)
    parser = RequestParser(baco, settings)
    playground = Playground(baco, parser, settings)
    # After what may be refused: nothing would end the thread.
    engine_thread = EngineThread(baco.decoder, settings.max_open)
    metrics = Metrics(engine_thread, connections, baco.prefix_cache)
    # These read the whole vocabulary: do it now rather than during the first request.
    baco.pair.spelling(0)
    for encoder in baco.pair.renderer.encoders.values():
        encoder.prepare()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine_thread.close()
        baco.close()

    app = FastAPI(
        title="BACo",
        version=__version__,
        description="Base-aligned model collaboration behind OpenAI's API.",
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from another host
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.engine_thread, app.state.connections = engine_thread, connections
    errors.install(app)
    app.add_middleware(Auth, settings=settings, connections=connections)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(AccessLog, metrics=metrics)  # the last one added is the outermost
    app.include_router(Endpoints(baco, engine_thread, parser, settings, metrics).router())
    app.include_router(playground.router())
    add_page(app)

    @app.get("/health", response_model=Health, responses=ERRORS | {503: {"model": Health}})
    async def health() -> Any:
        """Whether the server answers: 503 while it shuts down, and once its engine has ended."""
        if engine_thread.closing:
            return JSONResponse(Health(status="closing").model_dump(), 503)
        if baco.backend is not None and baco.backend.ended is not None:
            return JSONResponse(Health(status="ended").model_dump(), 503)
        return Health(status="ok")

    @app.get("/metrics", response_class=PlainTextResponse, responses=ERRORS)
    async def scrape() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the 422 replies that FastAPI adds; this server sends none."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
