"""The website of a study: a page per rater behind a secret link, and one for the operator.

No cookies for raters, no addresses in the log, nothing loaded from elsewhere. A link is the only
right that a rater has and needs. What a page shows follows from the store alone, so that a rater
continues on any device, and a server that was killed loses nothing that it acknowledged.
"""

import hmac
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal
from urllib.parse import parse_qs

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baco.errors import BacoError
from baco.study.rating import ClosedError, Progress, passed
from baco.study.schedule import Screen, schedule
from baco.study.status import comparisons, rater_rows
from baco.study.store import Rater
from baco.study.study import Study
from baco.text.invalid_characters import json_line, well_formed

log = logging.getLogger("baco.study")
access = logging.getLogger("baco.access")

MAX_BODY = 64 * 1024
OPERATOR_COOKIE = "operator"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address of a page is the rater's secret
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex, nofollow",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
FILES = {"study.css": "text/css", "study.js": "text/javascript"}

Crowd = Literal["prolific", "mturk"]
# The URL parameter that names a worker.
WORKER = {"prolific": "PROLIFIC_PID", "mturk": "workerId"}
PROLIFIC_RETURN = "https://app.prolific.com/submissions/complete?cc="


@dataclass(frozen=True, slots=True)
class WebsiteSettings:
    """How a study is served.

    Attributes:
        crowd: the platform that raters come from by ``/join``; None where every rater has a link.
        completion_code: shown at the end to all raters; by default each has a code of its own.
        key: of the operator's page.
        per_minute: requests per link that are served; more are answered 429.
        secure: whether raters reach the server by HTTPS, so that the operator's cookie needs it.
    """

    key: str
    crowd: Crowd | None = None
    completion_code: str | None = None
    per_minute: int = 240
    secure: bool = False


class Website:
    """The ASGI application of a study."""

    def __init__(self, study: Study, settings: WebsiteSettings) -> None:
        self.study, self.settings = study, settings
        self._links = Allowance(settings.per_minute)
        # One allowance for all requests without a link that exists, so that nobody guesses many.
        self._strangers = Allowance(settings.per_minute)
        self._schedule = cache(lambda number: schedule(study.plan, number))
        self._environment = Environment(
            loader=PackageLoader("baco.study", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=lambda value: well_formed(value) if type(value) is str else value,
        )
        self._environment.filters["paragraph"] = paragraph
        self._environment.globals["plan"] = study.plan
        self._files = {
            name: resources.files("baco.study").joinpath("page", name).read_bytes()
            for name in FILES
        }

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/", self.front),
            Route("/health", self.health),
            Route("/page/{name}", self.file),
            Route("/join", self.join),
            Route("/operator", self.operator, methods=["GET", "POST"]),
            Route("/r/{link}", self.current),
            Route("/r/{link}/consent", self.consent, methods=["POST"]),
            Route("/r/{link}/questions", self.questions, methods=["GET", "POST"]),
            Route("/r/{link}/answer", self.answer, methods=["POST"]),
            Route("/r/{link}/finish", self.finish, methods=["POST"]),
            Route("/r/{link}/withdraw", self.withdraw, methods=["GET", "POST"]),
            Route("/r/{link}/{position:int}", self.item),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(Log)],
            exception_handlers={
                HTTPException: self._problem,
                BacoError: self._unsaved,
                Exception: self._failed,
            },
        )

    # Pages for everybody.

    async def front(self, _: Request) -> Response:
        """What somebody without a link sees."""
        return self._page("front", crowd=self.settings.crowd)

    async def health(self, _: Request) -> Response:
        """Whether the server answers."""
        return JSONResponse({"status": "ok"}, headers=HEADERS)

    async def file(self, request: Request) -> Response:
        """The style and the script."""
        name = request.path_params["name"]
        if name not in FILES:
            raise HTTPException(404)
        headers = HEADERS | {"Cache-Control": "no-cache"}
        return Response(self._files[name], media_type=FILES[name], headers=headers)

    async def join(self, request: Request) -> Response:
        """Give a worker of a crowd platform a rater's link; the same worker gets the same one."""
        self._strangers.take("join")
        crowd = self.settings.crowd
        if crowd is None:
            raise HTTPException(404)
        worker = request.query_params.get(WORKER[crowd], "").strip()
        if not worker:
            preview = request.query_params.get("assignmentId") == "ASSIGNMENT_ID_NOT_AVAILABLE"
            name = WORKER[crowd]
            raise HTTPException(
                400,
                "Accept the task first. This is its preview."
                if preview
                else f"The address has no {name}. Open the link on the platform.",
            )
        rater = await run_in_threadpool(
            self.study.store.add_rater,
            at_most=self.study.plan.raters,
            crowd=f"{crowd}:{worker[:200]}",
        )
        if rater is None:
            raise HTTPException(
                409, "The study has enough participants. Thank you for your interest."
            )
        return self._to(f"/r/{rater.link}")

    # Pages of a rater.

    async def current(self, request: Request) -> Response:
        """What comes next for a rater."""
        return self._show(await self._progress(request))

    async def consent(self, request: Request) -> Response:
        """Note that a rater agreed."""
        progress = await self._progress(request)
        if progress.rater.state == "invited":
            await run_in_threadpool(self.study.store.update_rater, progress.rater.id, "consented")
        return self._to(f"/r/{progress.rater.link}")

    async def questions(self, request: Request) -> Response:
        """The comprehension questions; wrong answers are explained, and counted."""
        progress = await self._progress(request)
        rater = progress.rater
        if rater.state != "consented":
            return self._to(f"/r/{rater.link}")
        if request.method == "GET":
            return self._page("questions", rater, chosen={})
        form = await self._form(request)
        chosen = {
            number: option
            for number, question in enumerate(self.study.plan.comprehension)
            for option in range(len(question.options))
            if form.get(f"q{number}") == str(option)
        }
        asked = enumerate(self.study.plan.comprehension)
        wrong = sum(chosen.get(number) != question.right for number, question in asked)
        await run_in_threadpool(
            self.study.store.update_rater,
            rater.id,
            "consented" if wrong else "rating",
            rater.mistakes + wrong,
        )
        return (
            self._page("questions", rater, chosen=chosen) if wrong else self._to(f"/r/{rater.link}")
        )

    async def item(self, request: Request) -> Response:
        """An item that is open to the rater."""
        progress = await self._progress(request)
        screen = progress.at(request.path_params["position"])
        if screen is None:
            return self._to(f"/r/{progress.rater.link}")
        return self._item(progress, screen)

    async def answer(self, request: Request) -> Response:
        """Save the responses to an item so far. The reply means that they are on the disk."""
        progress = await self._progress(request)
        try:
            sent = json.loads(await _body(request))
            position = sent["position"]
            if type(position) is not int:
                raise TypeError
            # The sides that the page shows follow from its plan.
            if sent["plan"] != self.study.plan.hash:
                raise ClosedError("the plan has a new version: load the page again")
            answer = progress.answer(position, sent["responses"], sent["seconds"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, ClosedError):
                return self._refused(409, str(error))
            return self._refused(400, str(error) if isinstance(error, BacoError) else "bad request")
        try:
            await run_in_threadpool(self.study.store.save, [answer])
        except BacoError as error:
            log.error("%s", error)
            return self._refused(507, "the server cannot save answers at the moment")
        item = self.study.plan.item[answer.item]
        reply: dict[str, Any] = {"saved": True}
        if item.kind == "training":
            screen = next(s for s in progress.training if s.item.id == item.id)
            reply |= {"right": passed(screen, answer.responses), "feedback": item.feedback}
        return JSONResponse(reply, headers=HEADERS)

    async def finish(self, request: Request) -> Response:
        """Close the last block."""
        progress = await self._progress(request)
        if progress.place().step == "review":
            await run_in_threadpool(self.study.store.update_rater, progress.rater.id, "finished")
        return self._to(f"/r/{progress.rater.link}")

    async def withdraw(self, request: Request) -> Response:
        """Ask whether a rater wants to withdraw, and delete the rater's data."""
        rater = (await self._progress(request)).rater
        if rater.state == "withdrawn":
            return self._to(f"/r/{rater.link}")
        if request.method == "GET":
            return self._page("withdraw", rater)
        await run_in_threadpool(self.study.store.withdraw, rater.id)
        return self._to(f"/r/{rater.link}")

    # The operator's page.

    async def operator(self, request: Request) -> Response:
        """Progress and links of all raters, for whoever has the key."""
        if request.method == "POST":
            self._strangers.take("operator")
            form = await self._form(request)
            if not self._is_key(form.get("key", "")):
                return self._page("key", status=403, wrong=True)
            reply = self._to("/operator")
            reply.set_cookie(
                OPERATOR_COOKIE,
                self.settings.key,
                path="/operator",
                httponly=True,
                samesite="strict",
                secure=self.settings.secure,
            )
            return reply
        if not self._is_key(request.cookies.get(OPERATOR_COOKIE, "")):
            return self._page("key", wrong=False)
        rows = await run_in_threadpool(rater_rows, self.study)
        counts = await run_in_threadpool(comparisons, self.study)
        return self._page("operator", raters=rows, comparisons=counts, crowd=self.settings.crowd)

    def _is_key(self, given: str) -> bool:
        return hmac.compare_digest(given.strip().encode(), self.settings.key.encode())

    # Parts.

    async def _progress(self, request: Request) -> Progress:
        link = request.path_params["link"]
        rater = await run_in_threadpool(self.study.store.rater, link=link)
        if rater is None:
            self._strangers.take("link")
            raise HTTPException(404, "There is no such link. Check that you copied all of it.")
        self._links.take(rater.id)
        screens = [] if rater.number is None else self._schedule(rater.number)
        return await run_in_threadpool(Progress, self.study, rater, screens)

    def _show(self, progress: Progress) -> Response:
        place, rater = progress.place(), progress.rater
        match place.step:
            case "item":
                assert place.screen is not None
                return self._item(progress, place.screen)
            case "pause":
                assert place.screen is not None
                block = place.screen.block
                here = [screen for screen in progress.screens if screen.block == block]
                return self._page(
                    "pause",
                    rater,
                    screen=place.screen,
                    done=progress.done,
                    total=len(progress.screens),
                    block=block,
                    blocks=progress.screens[-1].block + 1,
                    items=len(here),
                    unit=here[0].item.unit,
                )
            case "review":
                return self._page("review", rater, last=progress.screens[-1].position)
            case "finished":
                return self._page("finished", rater, **self._completion(rater))
            case "questions":
                return self._page("questions", rater, chosen={})
            case step:
                return self._page(step, rater)

    def _completion(self, rater: Rater) -> dict[str, Any]:
        if self.settings.crowd is None and self.settings.completion_code is None:
            return {"code": None, "back": None}
        code = self.settings.completion_code or rater.code
        back = PROLIFIC_RETURN + code if self.settings.crowd == "prolific" else None
        return {"code": code, "back": back}

    def _item(self, progress: Progress, screen: Screen) -> Response:
        plan, answer = self.study.plan, progress.answers.get(screen.item.id)
        position = screen.position
        following = progress.screens[position + 1 : position + 2] if position >= 0 else []
        before = progress.before(screen)
        return self._page(
            "item",
            progress.rater,
            screen=screen,
            training=len(progress.training) + position + 1 if position < 0 else None,
            trainings=len(progress.training),
            total=len(progress.screens),
            done=progress.done,
            prompt=self.study.prompt_text(screen.item.prompt),
            sides=[
                (side, name, self.study.answers(plan.stimulus[id]))
                for side, name, id in (("left", "A", screen.left), ("right", "B", screen.right))
            ],
            questions=plan.asked(screen.item.unit),
            responses=dict(answer.responses) if answer else {},
            seconds=answer.seconds if answer else 0,
            before=before.position if before else None,
            # The next block begins with a pause.
            after=next((s.position for s in following if s.block == screen.block), None),
        )

    def _page(
        self, template: str, rater: Rater | None = None, *, status: int = 200, **values: Any
    ) -> Response:
        text = self._environment.get_template(f"{template}.html.jinja").render(
            step=template, link=rater.link if rater else None, rater=rater, **values
        )
        return HTMLResponse(text, status, headers=HEADERS)

    def _to(self, path: str) -> Response:
        return RedirectResponse(path, 303, headers=HEADERS)

    def _refused(self, status: int, reason: str) -> Response:
        return JSONResponse({"saved": False, "reason": reason}, status, headers=HEADERS)

    async def _form(self, request: Request) -> dict[str, str]:
        body = (await _body(request)).decode("utf-8", "replace")
        try:
            fields = parse_qs(body, max_num_fields=100)
        except ValueError as error:  # too many fields
            raise HTTPException(413) from error
        return {name: values[0] for name, values in fields.items()}

    # Errors.

    async def _problem(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        title, text = PROBLEMS.get(error.status_code, ("Something is wrong", ""))
        detail = error.detail if error.detail and error.detail[-1] == "." else text
        reply = self._page("problem", status=error.status_code, title=title, text=detail)
        reply.headers.update(error.headers or {})
        return reply

    async def _unsaved(self, _: Request, error: Exception) -> Response:
        log.error("%s", error)
        return self._page("problem", status=507, title=PROBLEMS[507][0], text=PROBLEMS[507][1])

    async def _failed(self, _: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return self._page("problem", status=500, title=PROBLEMS[500][0], text=PROBLEMS[500][1])


PROBLEMS = {
    404: ("There is no such page", "Check that you copied the whole link."),
    405: ("This does not work", "Go back and load the page again."),
    413: ("This is too long", "Go back and load the page again."),
    429: ("Too many requests", "Wait a minute, then load the page again."),
    500: ("Something went wrong", "Nothing that was saved is lost. Load the page again."),
    507: (
        "The answer could not be saved",
        "The server cannot write at the moment. Nothing that was saved before is lost. "
        "Try again later.",
    ),
}


class Allowance:
    """Bounds the rate of requests by key: a token bucket that holds one minute's requests."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens left, and when

    def take(self, key: str) -> None:
        """Count a request.

        Raises:
            HTTPException: 429, there were too many.
        """
        now = self._clock()
        left, then = self._buckets.get(key, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - then) * self._per_minute / 60)
        if left < 1:
            raise HTTPException(429, headers={"Retry-After": "10"})
        self._buckets[key] = left - 1, now


class Log:
    """Logs a line of JSON for every request: neither addresses nor links."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            entry = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "method": scope["method"],
                "path": _without_link(scope["path"]),
                "status": status,
                "seconds": round(time.perf_counter() - started, 4),
            }
            access.info("%s", json_line(entry))


def _without_link(path: str) -> str:
    """The path of a request without the rater's secret, and nothing of unknown paths."""
    if path in ("/", "/health", "/join", "/operator") or path.removeprefix("/page/") in FILES:
        return path
    match = re.fullmatch(
        r"/r/[^/]+(/(?:consent|questions|answer|finish|withdraw|-?\d{1,9}))?", path
    )
    return f"/r/…{match[1] or ''}" if match else "other"


def paragraph(text: str) -> Markup:
    """A paragraph of a plan's texts: a heading after ``# ``, and ``**bold**``."""
    heading = text.startswith("# ")
    shown = re.sub(
        r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(well_formed(text.removeprefix("# "))))
    )
    return Markup(f"<h2>{shown}</h2>" if heading else f"<p>{shown}</p>")


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413)
    return body
