"""The page at ``/``, and the endpoints under ``/baco`` that it uses beside OpenAI's."""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool

from baco.api import Baco
from baco.calibration.measure import open_prompts
from baco.calibration.store import Calibration
from baco.errors import BacoError
from baco.models.known_pairs import DEMO
from baco.routing.combiners import Combiner, combiners
from baco.routing.parser import logit_rule_of, needs_threshold, rules
from baco.routing.parser import router as parse
from baco.routing.rules import ContentRule, LogitRule
from baco.sampling.params import SamplingParams
from baco.serve.endpoints import ERRORS
from baco.serve.parse_request import RequestParser
from baco.serve.request_models import DiversityRequest, SchemaRequest
from baco.serve.response_models import Diversity, Info, Limits, RouterEntry
from baco.serve.settings import Settings
from baco.serve.stream import unless_disconnected
from baco.text.segmentation import distinct
from baco.version import __version__

T = TypeVar("T")

EXAMPLES = 8
DIAL_STEPS = 20
# From the demo pair's toy world, one of each kind.
DEMO_PROMPTS = (
    "Recommend a summer destination",
    "Give me a cosy dinner idea",
    "Give me a four-sentence story about a dragon.",
    "Give me a name for my puppy.",
    "Write a catchy slogan for a toy shop.",
    "Compose a four-line poem about winter.",
    "What outdoor hobby should I start?",
    "How can I enjoy a snowy weekend?",
)


class Playground:
    """The endpoints under ``/baco`` for one pair."""

    def __init__(self, baco: Baco, parser: RequestParser, settings: Settings) -> None:
        self._parser = parser
        demo = baco.pair.name == DEMO
        self._info = Info(
            pair=baco.pair.name,
            version=__version__,
            default_router=parser.default_router().spelling,
            examples=list(DEMO_PROMPTS) if demo else open_prompts()[:EXAMPLES],
            limits=Limits(n=settings.max_n, max_tokens=settings.max_tokens),
        )
        self._calibration = Calibration.load(baco.pair) or Calibration()
        self._baco = baco
        self._combines = baco.capabilities.combiners
        self._measuring, self._checking = asyncio.Semaphore(1), asyncio.Semaphore(1)

    def router(self) -> APIRouter:
        """The routes under ``/baco``."""
        routes = APIRouter(prefix="/baco", responses=ERRORS)
        routes.add_api_route("/info", self.info, response_model=Info)
        routes.add_api_route("/routers", self.routers, response_model=list[RouterEntry])
        routes.add_api_route(
            "/diversity", self.diversity, methods=["POST"], response_model=Diversity
        )
        routes.add_api_route("/schema", self.schema, methods=["POST"], status_code=204)
        return routes

    async def info(self) -> Info:
        """The pair, its default router, and the limits."""
        return self._info

    async def routers(self) -> list[RouterEntry]:
        """The routers that can decode the pair, then the combiners; those that the pair is
        calibrated for have a dial.
        """
        entries = [
            self._entry(entry.name, entry.example, entry.sentence)
            for entry in self._parser.routers()
        ]
        return entries + [_combiner_entry(combiner) for combiner in self._combiners()]

    def _combiners(self) -> Iterable[Combiner]:
        return combiners().values() if self._combines else ()

    async def diversity(self, request: Request, body: DiversityRequest) -> Diversity:
        """Measure how different the answers to one prompt are."""
        # One embedding model runs beside the two that decode.
        work = _in_turn(self._measuring, partial(measure, body.texts))
        return await unless_disconnected(request, work)

    async def schema(self, request: Request, body: SchemaRequest) -> None:
        """Refuse a JSON schema that answers cannot be held to; 204 for any other."""
        params = SamplingParams().updated({"schema": body.given})
        # Schemas are compiled one after the other. Those that wait occupy no thread.
        work = _in_turn(self._checking, partial(self._baco.check_structure, params))
        await unless_disconnected(request, work)

    def _entry(self, name: str, example: str, sentence: str) -> RouterEntry:
        takes = needs_threshold(name)
        curve = self._calibration.curves.get(name)
        low, high = _range(name) if takes else (None, None)
        dial = None
        if curve is not None:
            marks = [step / DIAL_STEPS for step in range(DIAL_STEPS + 1)]
            dial = [(mark, curve.at_diversity(mark)) for mark in marks]
        middle = self._calibration.threshold(name) if curve is not None else _gamma(example)
        rule = rules().get(name)
        return RouterEntry(
            name=name,
            example=example,
            sentence=sentence,
            takes_threshold=takes,
            low=low,
            high=high,
            default=middle if takes else None,
            dial=dial,
            page=(rule.page or None) if isinstance(rule, LogitRule) else None,
            compares=rule.compares if isinstance(rule, LogitRule) else None,
            keeps=rule.page if isinstance(rule, ContentRule) else None,
        )


async def _in_turn(turn: asyncio.Semaphore, work: Callable[[], T]) -> T:
    """The result of work in a thread, begun when its turn comes; not begun if cancelled before."""
    async with turn:
        return await run_in_threadpool(work)


def _combiner_entry(combiner: Combiner) -> RouterEntry:
    """A combiner; the page turns the first of its numbers."""
    turned = next(iter(combiner.parameters), None)
    return RouterEntry(
        name=combiner.name,
        example=combiner.example,
        sentence=combiner.help,
        takes_threshold=turned is not None,
        low=None if turned is None else turned.low,
        high=None if turned is None else turned.high,
        default=None if turned is None else turned.example,
        dial=None,
        page=None,
        compares=None,
        keeps=None,
    )


def add_page(app: FastAPI) -> None:
    """Serve the page at ``/``, and its files under ``/page``."""
    folder = Path(str(resources.files("baco").joinpath("serve", "page")))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(folder / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/page", StaticFiles(directory=folder), name="page")


def measure(texts: list[str]) -> Diversity:
    """How different texts are, by the metrics whose packages are installed."""
    nonempty = [text for text in texts if text.strip()]
    distance, why_not = None, None
    if len(nonempty) < 2:
        why_not = "needs two answers"
    else:
        try:
            distance = _embedding_distance(nonempty)
        except (BacoError, ImportError) as error:
            why_not = str(error)
    different = {" ".join(text.split()) for text in texts}
    return Diversity(
        distinct=len(different),
        distinct_2=distinct(texts, 2),
        embedding_distance=distance,
        why_not=why_not,
    )


def _embedding_distance(texts: list[str]) -> float:
    from baco.evaluation.metrics.embedding import embedder
    from baco.evaluation.metrics.semantic import embedding_distance

    return embedding_distance(embedder(), [texts])[0]


def _range(name: str) -> tuple[float | None, float | None]:
    """The range of γ that calibration tries."""
    rule = logit_rule_of(name)
    if rule is None or not rule.grid:
        return None, None
    return min(rule.grid), max(rule.grid)


def _gamma(example: str) -> float | None:
    return getattr(parse(example), "threshold", None)
