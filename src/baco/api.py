"""`Baco`: a loaded pair, and the ways to draw answers from it. All front ends use it."""

import datetime
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch

from baco import backends
from baco.backends.base import Backend, Capabilities
from baco.calibration import store as calibration
from baco.decoder import Decoder
from baco.engine.budget import cache_bytes
from baco.engine.engine import Engine
from baco.engine.isolation import IsolatingEngine
from baco.engine.scheduler import FEW_CHUNKS, MANY_CHUNKS
from baco.engine.shared_text_engine import SharedTextEngine
from baco.errors import BacoError
from baco.kv_cache.prefix_cache import PrefixCache
from baco.models.known_pairs import KnownPair, choose_pair
from baco.models.llama_cpp_pair import OPTIONS, load_llama_cpp_pair, suits
from baco.models.model import PairModel, compile_models
from baco.models.pair import Pair, load_draft, load_pair
from baco.outputs import Chunk, Completion
from baco.routing.parser import gives_threshold, needs_threshold, router_name
from baco.routing.parser import router as parse
from baco.routing.router import Router
from baco.routing.word_boundaries import Switch
from baco.sampling.params import SamplingParams
from baco.text import templates
from baco.text.prompts import Conversation, check_template_args
from baco.text.thinking import switch_variables

log = logging.getLogger("baco")

DEFAULT_ROUTER = "P-Punc"
# γ of the default router on a pair that has not been calibrated: the paper's middle of its range.
UNCALIBRATED = 0.4
# Options that only another backend has.
_ELSEWHERE = {
    **dict.fromkeys(("base_url", "aligned_url", "base_model", "aligned_model"), "remote"),
    "engine": "vllm",
}


@dataclass
class Baco:
    """A pair and the ways to draw answers from it.

    Attributes:
        pair: the two models.
        max_rows: answers decoded at once; more wait.
        memory: limit for KV caches and the tensors of a step; answers beyond it wait.
        draft: a small model of the pair's vocabulary that drafts; answers are the same without it.
        backend: where the pair decodes; None: in this process.
        enable_prefix_caching: keep what the models have read of prompts and answers, so that a
            later prompt with the same beginning is read from where it differs; answers are the
            same without. Kept prefixes give way to answers that need the memory.
    """

    pair: Pair
    max_rows: int = 256
    memory: int | float | str | None = None
    draft: PairModel | None = None
    backend: Backend | None = None
    enable_prefix_caching: bool = True
    prefix_cache: PrefixCache | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        local = self.backend is None and self.enable_prefix_caching
        self.prefix_cache = PrefixCache() if local else None

    @classmethod
    def load(
        cls,
        name: str | None = None,
        *,
        base: str | None = None,
        aligned: str | None = None,
        max_rows: int = 256,
        memory: int | float | str | None = None,
        draft: str | None = None,
        backend: str | None = None,
        compile: bool = False,
        enable_prefix_caching: bool = True,
        date: str | datetime.date | None = None,
        template_args: Mapping[str, Any] | None = None,
        thinking: bool | None = None,
        **options: Any,
    ) -> Self:
        """Load a pair.

        Args:
            name: ``demo``, the short name of a known pair, or a folder with base/ and aligned/.
            base, aligned: hub ids or folders instead; ``aligned`` may be a PEFT adapter.
            max_rows: answers decoded at once.
            memory: limit for KV caches and the tensors of a step: bytes, ``"2GiB"``, or a share of
                free memory as in ``"40%"``; by default 60%.
            draft: hub id or folder of a small model with the same vocabulary that drafts.
            compile: compile the forwards of a few tokens on a CPU, or record them as CUDA graphs
                on a GPU. Answers are the same tokens up to floating-point ties.
            enable_prefix_caching: keep what the models have read of prompts and answers for later
                prompts that begin alike, within ``memory``; by default in up to 10% of the free
                memory.
            date: the date for templates that read the clock, as YYYY-MM-DD; by default the day of
                each prompt.
            template_args: further variables for the templates, such as ``enable_thinking``; they
                override the pair's own.
            thinking: whether an aligned model that can think does so before it answers; by default
                as the pair and the chat template have it.
            backend: what the pair decodes with: ``local``, PyTorch in this process; ``llamacpp``,
                llama.cpp in this process, for GGUF files; ``vllm``, one vLLM engine; ``remote``,
                two servers; or the name of an installed package's backend. By default ``llamacpp``
                for GGUF files where llama-cpp-python is installed and no option asks for
                de-quantised weights, else ``local``. ``draft`` and ``compile`` are for ``local``
                only, ``memory`` and ``enable_prefix_caching`` for both of this process.
            options: for ``local``: ``dtype``, ``device``, ``quantize``, ``device_map``,
                ``quantization_config``, ``base_template``, ``chat_template``, ``function_words``,
                ``packed``, ``trust_remote_code``, ``separate_tokenizers``, and other arguments of
                ``from_pretrained``. For ``llamacpp``: ``device`` (cpu or gpu), and the templates
                and words of these. For another backend: that backend's options.

        Raises:
            BacoError: a pair that cannot be found or loaded, or models that do not fit together.
        """
        known = choose_pair(name, base, aligned)
        if max_rows < 1:
            raise BacoError(f"max_rows is {max_rows}: decode at least one answer at a time")
        if backend is None:
            chosen = suits(known, options) and draft is None and not compile
            backend = backends.LLAMA_CPP if chosen else backends.LOCAL
        backends.check_name(backend)
        day = None if date is None else templates.check_date(date)
        arguments = switch_variables(thinking) | dict(check_template_args(template_args or {}))
        templates.start()
        if backend not in backends.HERE:
            if memory is not None or draft is not None or compile or not enable_prefix_caching:
                raise BacoError(
                    "memory, draft, compile and enable_prefix_caching are options of the local "
                    f"backend, not of {backend}"
                )
            there, engines = backends.connect(backend, known, max_rows, options)
            there.renderer.set_defaults(day, arguments)
            return cls(there, max_rows, backend=engines)
        for option, home in _ELSEWHERE.items():
            if option in options:
                raise BacoError(
                    f"{option} is an option of the {home} backend: give backend {home} with it"
                )
        if memory is not None:
            cache_bytes(memory, [torch.device("cpu")])  # refused before two models are loaded
        if backend == backends.LLAMA_CPP:
            pair = _load_llama_cpp(known, draft, compile, options)
            pair.renderer.set_defaults(day, arguments)
            return cls(pair, max_rows, memory, enable_prefix_caching=enable_prefix_caching)
        pair = load_pair(known, **options)
        pair.renderer.set_defaults(day, arguments)
        drafting = None
        if draft is not None:
            pair.check_one_tokenizer("a draft model")
            drafting = load_draft(
                draft,
                pair,
                dtype=options.get("dtype"),
                packed=options.get("packed", True),
                trust_remote_code=options.get("trust_remote_code", False),
            )
        if compile:
            models = (pair.base, pair.aligned, drafting)
            compile_models(model for model in models if model is not None)
        return cls(pair, max_rows, memory, drafting, enable_prefix_caching=enable_prefix_caching)

    def router(self, spelling: str | Router | None = None) -> Router:
        """The router of a spelling; without a threshold, at the pair's calibrated middle.

        Raises:
            BacoError: no such router, or no threshold on a pair that was not calibrated for it.
        """
        if spelling is not None and not isinstance(spelling, str):
            if not callable(spelling):
                raise BacoError(
                    f"router {spelling!r}: give a spelling such as P-Punc:0.4, or a router"
                )
            return spelling
        name = spelling if spelling is not None else DEFAULT_ROUTER
        if not needs_threshold(name) or gives_threshold(name):
            return parse(name)
        middle = calibration.middle(self.pair, router_name(name))
        if middle is None and spelling is None:
            log.warning(
                "%s is not calibrated: using %s:%g; 'baco calibrate' finds its middle",
                self.pair.name,
                DEFAULT_ROUTER,
                UNCALIBRATED,
            )
            middle = UNCALIBRATED
        return parse(name, middle)

    def generate(
        self,
        prompt: Conversation,
        *,
        router: str | Router | None = None,
        system: str | None = None,
        switch: Switch = "word",
        template_args: Mapping[str, Any] | None = None,
        continue_final: bool | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Draw the n samples of one prompt.

        Arguments are those of [`stream_batch`][baco.Baco.stream_batch].
        """
        return self.generate_batch(
            [prompt],
            router=router,
            system=system,
            switch=switch,
            template_args=template_args,
            continue_final=continue_final,
            **sampling,
        )[0]

    def generate_batch(
        self,
        prompts: Sequence[Conversation],
        *,
        router: str | Router | None = None,
        system: str | None = None,
        switch: Switch = "word",
        template_args: Mapping[str, Any] | None = None,
        continue_final: bool | None = None,
        digests: Sequence[bytes] | None = None,
        **sampling: Any,
    ) -> list[list[Completion]]:
        """Draw the n samples of every prompt.

        Arguments are those of [`stream_batch`][baco.Baco.stream_batch].
        """
        answers: list[list[Completion]] = [[] for _ in prompts]
        for chunk in self.stream_batch(
            prompts,
            router=router,
            system=system,
            switch=switch,
            template_args=template_args,
            continue_final=continue_final,
            digests=digests,
            **sampling,
        ):
            if chunk.completion is not None:
                answers[chunk.prompt].append(chunk.completion)
        return [sorted(samples, key=lambda c: c.sample) for samples in answers]

    def stream(
        self,
        prompt: Conversation,
        *,
        router: str | Router | None = None,
        system: str | None = None,
        switch: Switch = "word",
        template_args: Mapping[str, Any] | None = None,
        continue_final: bool | None = None,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """Draw the n samples of one prompt and yield them as they grow.

        Arguments are those of [`stream_batch`][baco.Baco.stream_batch].
        """
        return self.stream_batch(
            [prompt],
            router=router,
            system=system,
            switch=switch,
            template_args=template_args,
            continue_final=continue_final,
            **sampling,
        )

    def stream_batch(
        self,
        prompts: Sequence[Conversation],
        *,
        router: str | Router | None = None,
        system: str | None = None,
        switch: Switch = "word",
        template_args: Mapping[str, Any] | None = None,
        continue_final: bool | None = None,
        digests: Sequence[bytes] | None = None,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """Draw n samples of every prompt, and yield their text with its sources as it grows.

        Args:
            prompts: texts, or conversations as lists of ``{"role": …, "content": …}``. If a
                conversation ends with an assistant's message, the answers continue that message.
            router: a spelling such as ``P-Punc:0.4`` or a router; by default P-Punc at the pair's
                calibrated middle.
            system: a system message put before every prompt.
            switch: ``word``, or ``token`` to let the source change inside words.
            template_args: further variables for the templates, such as ``enable_thinking``.
            continue_final: True refuses a conversation whose last message is not an assistant's,
                False one whose last message is; None accepts both.
            digests: one per prompt; they key the draws instead of the prompts' own digests. Prompts
                with equal digests share their noise.
            sampling: fields of [`SamplingParams`][baco.SamplingParams]; the others are the pair's
                defaults. ``schema=`` takes a mapping or a pydantic model and gives ``.parsed``.

        Raises:
            BacoError: an argument is wrong. Raised before anything is decoded.
        """
        if isinstance(prompts, str):
            raise BacoError("prompts is one text: give a list of prompts, or use generate/stream")
        if digests is not None and len(digests) != len(prompts):
            raise BacoError(
                f"{len(digests)} digests for {len(prompts)} prompts: give one for each prompt"
            )
        decoder, chosen = self.decoder(chunks_per_step=MANY_CHUNKS), self.router(router)
        params = self.pair.defaults.updated(sampling).seeded()  # one seed for all prompts
        keys = digests if digests is not None else [None] * len(prompts)
        try:
            for prompt, digest in zip(prompts, keys, strict=True):
                decoder.submit(
                    prompt,
                    params,
                    router=chosen,
                    system=system,
                    switch=switch,
                    template_args=template_args,
                    continue_final=continue_final,
                    digest=digest,
                )
        except BacoError:
            decoder.close()
            raise
        chunks = _run(decoder)
        next(chunks)
        return chunks

    @property
    def capabilities(self) -> Capabilities:
        """Which rules of decoding the backend keeps, and what it can report."""
        if self.backend is None:
            here = backends.backend_of(self.pair.weights_formats)
            one_tokenizer = self.pair.own_vocabularies is None
            return Capabilities(
                here,
                samplers=True,
                thinking=True,
                combiners=one_tokenizer,
                stateful=True,
                structured=True,
                hidden_states=one_tokenizer,
            )
        return self.backend.capabilities

    def check_structure(self, params: SamplingParams) -> None:
        """Check that answers can have the structure that sampling parameters name.

        Raises:
            BacoError: the backend cannot hold answers to it, or it cannot be compiled.
        """
        if params.structure is not None:
            self.capabilities.check_structure(params.structure)
            self.pair.constraints(params.structure)

    def close(self) -> None:
        """Close the backend's processes and connections, and drop kept prefixes."""
        self.reset_prefix_cache()
        if self.backend is not None:
            self.backend.close()

    def reset_prefix_cache(self) -> None:
        """Drop what is kept of earlier prompts and answers, and free its memory."""
        if self.prefix_cache is not None:
            self.prefix_cache.clear()

    def decoder(self, *, chunks_per_step: int = FEW_CHUNKS) -> Decoder:
        """A decoder that accepts requests while it decodes, for servers and other loops.

        Args:
            chunks_per_step: how many chunks of waiting prompts are read between two steps: few for
                smooth streams, many for throughput.
        """
        if self.backend is not None:
            structured = self.backend.capabilities.structured
            return Decoder(self.pair, self.backend.engine(), structured)
        options: dict[str, Any] = {
            "max_rows": self.max_rows,
            "memory": self.memory,
            "chunks_per_step": chunks_per_step,
            "prefix_cache": self.prefix_cache,
        }
        make: Callable[[], Engine | SharedTextEngine]
        if self.pair.own_vocabularies is None:
            make = partial(Engine, self.pair, draft=self.draft, **options)
        else:
            make = partial(SharedTextEngine, self.pair, **options)
        with self.pair.lock:  # the first engine tries ways to read rows
            return Decoder(self.pair, IsolatingEngine(make))


def _load_llama_cpp(
    known: KnownPair, draft: str | None, compile: bool, options: dict[str, Any]
) -> Pair:
    if draft is not None or compile:
        raise BacoError("draft and compile are options of the local backend, not of llamacpp")
    for option in options:
        if option not in OPTIONS:
            raise BacoError(
                f"the llamacpp backend takes no {option}: it runs the weights of a GGUF file as "
                "they are; leave it out, or give --backend local"
            )
    return load_llama_cpp_pair(known, **options)


def _run(decoder: Decoder) -> Iterator[Any]:
    """All chunks of a decoder, after one None. Once past that, the decoder is closed with the
    iterator, so that dropping a stream drops its answers even if it was never read.
    """
    try:
        yield None
        while decoder.busy:
            yield from decoder.step()
    finally:
        decoder.close()
