"""Turns a request's body into router, sampling parameters and prompts for a decoder."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from baco.api import Baco
from baco.decoder import Decoder
from baco.errors import BacoError
from baco.evaluation.methods import Draw, methods, needs_one_tokenizer
from baco.evaluation.methods.served import ServedMethod, served_examples, served_method
from baco.models.pair import Pair
from baco.models.weightless import WeightlessModel
from baco.routing.combiners import combiners
from baco.routing.parser import Entry, named_files
from baco.routing.router import Router
from baco.routing.two_vocabularies import catalogue_for
from baco.routing.word_boundaries import Switch
from baco.sampling.params import SamplingParams
from baco.sampling.structure import ANY_OBJECT
from baco.serve.errors import UnknownModelError, shown
from baco.serve.methods import MethodRequest
from baco.serve.request_models import (
    MAX_SPELLING,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from baco.serve.scoring import Echo
from baco.serve.settings import Settings
from baco.source import Source
from baco.text.prompts import (
    Conversation,
    Prompt,
    check_template_args,
    conversation,
    openai_message,
)

ROOT = "baco"
TokenIds = tuple[int, ...]
# Fields that have one name in requests and in SamplingParams.
_SAME = (
    "n",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "repetition_window",
    "samplers",
)
_DRY = ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_window", "dry_breakers")


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request for a decoder.

    Attributes:
        prompts: conversations; with ``raw`` texts or token ids, which both models continue as they
            are.
        params: seeded, so that every prompt can be decoded again.
        explain, switch, router, template_args, continue_final: see :meth:`Decoder.submit`.
        cache_salt: see :meth:`Decoder.submit_rendered`.
    """

    prompts: tuple[Conversation | TokenIds, ...]
    raw: bool
    params: SamplingParams
    router: Router
    switch: Switch
    explain: bool
    template_args: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool | None = None
    cache_salt: str = ""

    def size(self, index: int) -> int:
        """Approximate characters of a prompt; 0 for token ids."""
        prompt = self.prompts[index]
        if isinstance(prompt, tuple):
            return 0
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        return sum(map(len, texts))

    def render(self, index: int, pair: Pair, pause: Callable[[], None]) -> Prompt:
        """A prompt as both models read it; may be called in any thread.

        Args:
            index: of the prompt.
            pair: renders it.
            pause: called between pieces of work; an exception that it raises ends the work.

        Raises:
            BacoError: a template that fails, a prompt that is too long, or a structure that cannot
                be used.
        """
        prompt, limits = self.prompts[index], pair.limits(self.router, self.explain)
        if self.raw:
            rendered = pair.renderer.raw(prompt, limits=limits, pause=pause)  # type: ignore[arg-type]
        else:
            rendered = pair.renderer.render(
                prompt,  # type: ignore[arg-type]
                template_args=self.template_args,
                continue_final=self.continue_final,
                limits=limits,
                pause=pause,
            )
        if self.params.structure is not None:  # compiled here, so that the decoder finds it ready
            pair.constraints(self.params.structure, joining_space=rendered.joining_space)
        return rendered

    def submit(self, prompt: Prompt, decoder: Decoder) -> int:
        """Give a rendered prompt to a decoder; returns its ticket."""
        return decoder.submit_rendered(
            prompt,
            self.params,
            raw=self.raw,
            router=self.router,
            switch=self.switch,
            explain=self.explain,
            cache_salt=self.cache_salt,
        )


class RequestParser:
    """Parses requests to one pair and checks them against the server's limits."""

    def __init__(self, baco: Baco, settings: Settings) -> None:
        self._baco, self._settings = baco, settings
        # Cached: finding the calibration takes a fingerprint of all weights.
        self._routers = lru_cache(maxsize=1024)(baco.router)
        self._files = frozenset(settings.router_files)

    def default_router(self) -> Router:
        """The router of requests that name none."""
        return self._routers(None)

    def models(self) -> list[str]:
        """The model names to list. Any spelling of a router, combiner or method is one too, after
        ``baco/``.
        """
        examples = [entry.example for entry in self.routers()]
        alone = ("Base", "Aligned")
        own = [f"{ROOT}/{example}" for example in examples if example not in alone]
        if self._baco.capabilities.combiners:
            own += [f"{ROOT}/{combiner.example}" for combiner in combiners().values()]
        two = self._baco.pair.own_vocabularies is not None
        own += [
            f"{ROOT}/{example}"
            for example in served_examples()
            if not (two and needs_one_tokenizer(served_method(example).setting))
        ]
        return [ROOT, f"{ROOT}/base", f"{ROOT}/aligned", *own]

    def routers(self) -> list[Entry]:
        """The routers of the catalogue that can decode this pair."""
        return catalogue_for(one_tokenizer=self._baco.pair.own_vocabularies is None)

    def method_of(self, model: str) -> ServedMethod | None:
        """The method of a model's name; None for another model, a router's if there is such one.

        Raises:
            UnknownModelError: a method that cannot be a model, or a threshold out of its range.
        """
        root, _, spelling = model.partition("/")
        if root != ROOT or len(model) > MAX_SPELLING:
            return None
        if spelling.partition(":")[0] not in methods():
            return None
        try:
            self._spelled(spelling)  # Base, Aligned and Ensemble are routers too
        except BacoError:
            pass
        else:
            return None
        try:
            return served_method(spelling)
        except BacoError as error:
            raise UnknownModelError(f"there is no model {model!r} here: {error}") from error

    def router_of(self, model: str) -> Router:
        """The router of a model's name.

        Raises:
            UnknownModelError: no such model.
        """
        root, slash, spelling = model.partition("/")
        if root != ROOT or bool(slash) != bool(spelling) or len(model) > MAX_SPELLING:
            raise UnknownModelError(
                f"there is no model {shown(model)} here: use {ROOT}, {ROOT}/base, {ROOT}/aligned "
                f"or a router as in {ROOT}/P-Punc:0.4"
            )
        if not slash:
            return self.default_router()
        try:
            return self._spelled(spelling)
        except BacoError as error:
            raise UnknownModelError(f"there is no model {model!r} here: {error}") from error

    def _spelled(self, spelling: str) -> Router:
        """A router that a request spells; it may name the files of the server's settings alone.

        Raises:
            BacoError: no such router, or a file that the server may not read.
        """
        if not self._files.issuperset(named_files(spelling)):
            raise BacoError(
                f"router {spelling!r} names a file: this server reads only those given to it with "
                "--router-file"
            )
        return self._routers(spelling)

    def method_chat(self, body: ChatRequest, method: ServedMethod) -> MethodRequest:
        """Parse a request of ``/v1/chat/completions`` to a method; errors as for `chat`."""
        for name in ("router", "switch", "explain", "logprobs", "chat_template_kwargs"):
            if getattr(body, name) not in (None, False, {}, "word"):
                raise BacoError(
                    f"{name} goes with a router, and {body.model} is a method: leave it out, or "
                    "name another model"
                )
        if _structure(body):
            raise BacoError(
                f"{body.model} is a method, whose answers cannot be held to a structure"
            )
        _continues(body)
        if body.messages[-1].role != "user":
            raise BacoError(
                f"{body.model} rewords the last message: end the conversation with a message of "
                "role 'user'"
            )
        if needs_one_tokenizer(method.setting):
            self._baco.pair.check_one_tokenizer(f"the method {method.spelling}")
        messages = [openai_message(message.model_dump()) for message in body.messages]
        conversation(messages)
        given = self._sampling(body, 1, self._longest_chat(body), None)
        params = self._baco.pair.defaults.updated(given).seeded()
        assert params.seed is not None
        sampling = {name: value for name, value in given.items() if name not in ("n", "seed")}
        draw = Draw(params.n, params.seed, sampling)
        return MethodRequest(method, tuple(messages), draw, body.cache_salt or "")

    def chat(self, body: ChatRequest) -> ParsedRequest:
        """Parse a request of ``/v1/chat/completions``.

        Raises:
            BacoError, UnknownModelError: a value that is out of its range or of this server's.
        """
        longest = self._longest_chat(body)
        if body.top_logprobs and not body.logprobs:
            raise BacoError("top_logprobs needs logprobs: true")
        logprobs = body.top_logprobs or 0 if body.logprobs else None
        continue_final = _continues(body)
        messages = [openai_message(message.model_dump()) for message in body.messages]
        conversation(messages, continue_final=continue_final)
        parsed = self._parsed(body, (messages,), False, longest, logprobs)
        template_args = check_template_args(body.chat_template_kwargs or {})
        return replace(parsed, template_args=template_args, continue_final=continue_final)

    def _longest_chat(self, body: ChatRequest) -> int | None:
        longest = _agree(
            body.max_tokens, body.max_completion_tokens, "max_tokens", "max_completion_tokens"
        )
        if longest == 0:
            raise BacoError("max_tokens is 0: give at least 1, or -1 for as many as there is room")
        return longest

    def completion(self, body: CompletionRequest) -> ParsedRequest:
        """Parse a request of ``/v1/completions``; errors as for `chat`."""
        if not body.echo and (body.max_tokens == 0 or body.echo_from is not None):
            raise BacoError("max_tokens 0 and echo_from go with echo: true")
        if body.best_of not in (None, body.n or self._baco.pair.defaults.n):
            raise BacoError(
                f"best_of is {shown(body.best_of)}: no answer is chosen here; ask for n answers"
            )
        if body.return_token_ids or body.return_tokens_as_token_ids:
            self._baco.pair.check_one_tokenizer("returning token ids")
        self._limit("logprobs", body.logprobs or 0, self._settings.max_logprobs)
        return self._parsed(body, _prompts(body.prompt), True, body.max_tokens, body.logprobs)

    def echo(self, body: CompletionRequest) -> Echo:
        """Parse a request with ``echo``.

        Raises:
            BacoError: it asks for more than scores, or the router is not a single model.
        """
        if body.logprobs is None or body.stream:
            raise BacoError("echo scores a prompt: give logprobs with it, and no stream")
        if body.max_tokens == 0 and (body.n or 1) > 1:
            raise BacoError(f"n is {shown(body.n)}: with max_tokens 0 there are no answers")
        source = self._router(body).only
        if source is None:
            raise BacoError(
                f"echo scores with one model: give {ROOT}/base or {ROOT}/aligned as the model; "
                "a prompt has no likelihood under a router"
            )
        self._limit("logprobs", body.logprobs, self._settings.max_logprobs)
        prompts = _prompts(body.prompt)
        self._limit("the number of prompts", len(prompts), self._settings.max_n)
        for prompt in prompts:
            if isinstance(prompt, tuple):
                self._check_known("prompt", prompt, source)
        if isinstance(self._baco.pair.base, WeightlessModel):
            raise BacoError("echo needs the weights in this process: serve with --backend local")
        return Echo(
            prompts,
            source,
            body.logprobs,
            body.echo_from or 0,
            bool(body.return_token_ids),
            bool(body.return_tokens_as_token_ids),
        )

    def _parsed(
        self,
        body: GenerationRequest,
        prompts: tuple[Conversation | TokenIds, ...],
        raw: bool,
        longest: int | None,
        logprobs: int | None,
    ) -> ParsedRequest:
        given = self._sampling(body, len(prompts), longest, logprobs)
        self._check_ids(prompts)
        params = self._baco.pair.defaults.updated(given)
        if params.structure is not None:
            self._baco.capabilities.check_structure(params.structure)
        return ParsedRequest(
            prompts,
            raw,
            params.seeded(),
            self._router(body),
            body.switch or "word",
            bool(body.explain),
            cache_salt=body.cache_salt or "",
        )

    def _sampling(
        self, body: GenerationRequest, prompts: int, longest: int | None, logprobs: int | None
    ) -> dict[str, Any]:
        """The sampling parameters that a request gives for a number of prompts."""
        if body.stream_options is not None and not body.stream:
            raise BacoError("stream_options goes with stream: true")
        # Checked before `SamplingParams`, whose bounds are wider.
        answers = (body.n or self._baco.pair.defaults.n) * prompts
        self._limit("the number of answers", answers, self._settings.max_n)
        given = {name: getattr(body, name) for name in _SAME}
        given |= {"max_tokens": self._longest(longest), "logprobs": logprobs}
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else body.stop
        if body.seed == -1:
            given["seed"] = None
        if body.dry_multiplier:
            given |= {name: getattr(body, name) for name in _DRY}
        elif body.dry_multiplier is not None:
            given["dry_multiplier"] = 0.0
        for name in ("top_k", "repetition_window", "dry_window"):
            if given.get(name) == -1:
                given[name] = 0
        if body.logit_bias:
            given["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
            self._check_known("logit_bias", given["logit_bias"])
        return {name: value for name, value in given.items() if value is not None} | _structure(
            body
        )

    def _router(self, body: GenerationRequest) -> Router:
        if self.method_of(body.model) is not None:
            raise BacoError(
                f"{body.model} is a method, which answers conversations: give messages to "
                "/v1/chat/completions"
            )
        by_model = self.router_of(body.model)
        if body.router is None:
            return by_model
        chosen = self._spelled(body.router)
        if body.model != ROOT and chosen.spelling != by_model.spelling:
            raise BacoError(
                f"model {body.model!r} and router {body.router!r} name two routers: "
                f"give the model {ROOT!r} with a router, or the model's name alone"
            )
        return chosen

    def _longest(self, asked: int | None) -> int:
        """The length limit of the answers; they also end at the end of the context."""
        most = self._settings.max_tokens
        if asked is None:
            return min(self._baco.pair.defaults.max_tokens, most)
        self._limit("max_tokens", asked, most)
        return most if asked == -1 else asked

    def _limit(self, name: str, asked: int, most: int) -> None:
        if asked > most:
            raise BacoError(f"{name} is {shown(asked)}: this server gives at most {most}")

    def _check_ids(self, prompts: tuple[Conversation | TokenIds, ...]) -> None:
        """Check the ids of all prompts first, since one wrong id refuses the whole request."""
        for prompt in prompts:
            if isinstance(prompt, tuple):
                self._baco.pair.check_one_tokenizer("a prompt of token ids")
                self._check_known("prompt", prompt)

    def _check_known(self, name: str, tokens: Collection[int], source: Source = "aligned") -> None:
        size, largest = self._baco.pair.vocabulary_of(source).size, max(tokens, default=0)
        if largest >= size:
            raise BacoError(f"{name} names token {largest}: the vocabulary has {size} tokens")


def _prompts(asked: str | list[str] | list[int] | list[list[int]]) -> tuple[str | TokenIds, ...]:
    """One prompt or several, each a text or token ids."""
    if isinstance(asked, str):
        return (asked,)
    prompts = [item for item in asked if not isinstance(item, int)]
    if not prompts:
        return (tuple(item for item in asked if isinstance(item, int)),)
    return tuple(item if isinstance(item, str) else tuple(item) for item in prompts)


def _agree(one: int | None, other: int | None, name: str, other_name: str) -> int | None:
    if one is not None and other is not None and one != other:
        raise BacoError(
            f"{name} is {shown(one)} and {other_name} is {shown(other)}: give one of them"
        )
    return other if one is None else one


def _continues(body: ChatRequest) -> bool | None:
    """Whether a request says that its last message is continued; None if it does not say.

    Raises:
        BacoError: fields contradict each other or the messages.
    """
    continues, opens = body.continue_final_message, body.add_generation_prompt
    if continues and opens:
        raise BacoError(
            "continue_final_message and add_generation_prompt are both true: give one of them"
        )
    *others, last = body.messages
    if any(message.prefix for message in others) or (last.prefix and last.role != "assistant"):
        raise BacoError("prefix is true: only a last message of role 'assistant' is continued")
    if opens is not None and opens != (last.role != "assistant"):
        raise BacoError(
            "add_generation_prompt is true, but a last message of role 'assistant' is continued: "
            "end the conversation with a message of role 'user'"
            if opens
            else "add_generation_prompt is false: end the conversation with a message of role "
            "'assistant', which is continued"
        )
    return continues if continues is not None else last.prefix


def _structure(body: GenerationRequest) -> dict[str, Any]:
    """The sampling parameters for what an answer has to be."""
    given: list[tuple[str, Any]] = []
    if (form := body.response_format) is not None:
        if form.json_schema is not None:
            given.append(("schema", form.json_schema.given))
        elif form.type == "json_object":
            given.append(("schema", ANY_OBJECT))
    if (outputs := body.structured_outputs) is not None:
        if outputs.json_object:
            given.append(("schema", ANY_OBJECT))
        named = (
            ("schema", outputs.given),
            ("regex", outputs.regex),
            ("choice", outputs.choice),
            ("grammar", outputs.grammar),
        )
        given += [(name, value) for name, value in named if value is not None]
    if len(given) > 1:
        raise BacoError(
            "response_format and structured_outputs name more than one structure: give one"
        )
    return dict(given)
