"""One vLLM engine behind BACo's decoders: requests go in as token ids, tokens and sources come out.

What vLLM draws is vLLM's: its sampler, its seeds. It knows no text either; stop strings are the
decoder's.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING, Any

from baco.backends.base import Capabilities
from baco.backends.vllm.launch import first_line
from baco.backends.vllm.options import PREFIX, pair_prompt
from baco.engine.sequence import Request, SequenceState
from baco.errors import BacoError
from baco.models.pair import Pair
from baco.routing.parser import portable
from baco.sampling.params import MAX_SEED, SamplingParams
from baco.source import MODELS

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

log = logging.getLogger("baco")

# What vLLM tells at a position unless it is started with more.
_TOP_LOGPROBS = 20
CAPABILITIES = Capabilities("vllm", replayable=False, explain=False, raw_logprobs=_TOP_LOGPROBS)
# vLLM's draws of one seed are alike for every request: prompts and samples need seeds apart.
_SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(slots=True)
class Drafts:
    """What vLLM's drafts came to."""

    drafted: int = 0
    accepted: int = 0


@dataclass
class VllmBackend:
    """A vLLM engine that holds a pair, shared by any number of decoders.

    Attributes:
        pair: without its weights.
        llm: vLLM's own engine; one caller at a time.
        folder: the pair directory, where one had to be made.
        ended: what ended the engine, in one line; None while it runs.
    """

    pair: Pair
    llm: "LLMEngine"
    folder: "TemporaryDirectory[str] | None" = None
    capabilities: Capabilities = CAPABILITIES
    ended: str | None = None
    _lock: Lock = field(default_factory=Lock)
    _open: dict[str, "tuple[VllmEngine, SequenceState]"] = field(default_factory=dict)
    _next: int = 0

    def engine(self) -> "VllmEngine":
        return VllmEngine(self)

    def close(self) -> None:
        with self._lock:
            self.llm.engine_core.shutdown()
            if self.folder is not None:
                self.folder.cleanup()
                self.folder = None

    def submit(self, engine: "VllmEngine", sequence: SequenceState) -> str:
        """Hand a sequence to vLLM; where that has ended, the sequence ends in an error too.

        Raises:
            BacoError: what vLLM has against it.
        """
        request = sequence.request
        ids, arguments, salt = pair_prompt(request.base_ids, request.aligned_ids, request.digest)
        arguments |= {
            f"{PREFIX}router": request.router.spelling,
            f"{PREFIX}switch": request.switch,
            f"{PREFIX}seed": request.params.seed or 0,
            f"{PREFIX}sample": sequence.sample,
        }
        params = _sampling(request.params, sequence, self.pair.end_ids, arguments)
        with self._lock:
            name, self._next = f"baco-{self._next}", self._next + 1
            if self.ended is not None:
                engine.news.put((sequence, self.ended))
                return name
            try:
                known = self.llm.add_request(
                    name, {"prompt_token_ids": ids, "cache_salt": salt}, params
                )
            except ValueError as error:
                raise BacoError(f"vLLM refuses the request: {error}") from error
            self._open[name] = (engine, sequence)
        assert known == name or known.startswith(name)
        return name

    def abort(self, names: Iterable[str]) -> None:
        """Give requests up; what has ended is no error."""
        with self._lock:
            going = [name for name in names if self._open.pop(name, None) is not None]
            if going:
                self.llm.abort_request(going)

    def step(self) -> None:
        """One step of vLLM's; what comes of it goes to the engines that asked."""
        with self._lock:
            if not self._open:
                return
            try:
                outputs = self.llm.step()
            except Exception as error:  # whatever a model, a device or a worker process raises
                self._end(error)
                return
            for output in outputs:
                engine, sequence = self._open.get(output.request_id, (None, None))
                if engine is None or sequence is None:
                    continue
                if output.finished:
                    del self._open[output.request_id]
                engine.news.put((sequence, output))

    def _end(self, error: Exception) -> None:
        """Tell all who wait. After a failed step nobody knows what the engine holds."""
        log.error("a step of vLLM failed: %r", error, exc_info=error)
        self.ended = f"the vLLM engine ended ({first_line(error)}): start it again"
        for engine, sequence in self._open.values():
            engine.news.put((sequence, self.ended))
        self._open.clear()


@dataclass(eq=False)
class VllmEngine:
    """What one decoder drives.

    Attributes:
        backend: the engine that it shares.
        stats: what drafts came to, once answers have ended.
        news: what vLLM tells of its sequences, or what ended it; another decoder's thread may put
            it there.
    """

    backend: VllmBackend
    stats: Drafts = field(default_factory=Drafts)
    news: "SimpleQueue[tuple[SequenceState, RequestOutput | str]]" = field(
        default_factory=SimpleQueue
    )
    _names: dict[SequenceState, str] = field(default_factory=dict)

    def add(self, request: Request) -> list[SequenceState]:
        self.backend.capabilities.check(request)
        if not portable(request.router):
            raise BacoError(
                f"router {request.router.spelling} exists in this process only: the vllm backend "
                "runs built-in rules and those of installed packages"
            )
        room = self._room(request)
        made = [
            SequenceState(request, sample, min(request.params.max_tokens, room))
            for sample in range(request.params.n)
        ]
        try:
            for sequence in made:
                self._names[sequence] = self.backend.submit(self, sequence)
        except BacoError:
            self.backend.abort(self._names.pop(s) for s in made if s in self._names)
            raise
        return made

    def step(self) -> list[SequenceState]:
        if self.news.empty():
            self.backend.step()
        grew: dict[SequenceState, None] = {}
        try:
            while True:
                sequence, output = self.news.get_nowait()
                if sequence in self._names:
                    self._take(sequence, output)
                    grew[sequence] = None
        except Empty:
            return list(grew)

    def stop(self, sequence: SequenceState, tokens: int) -> None:
        sequence.finish_reason = "stop"
        sequence.cut(tokens)
        name = self._names.pop(sequence, None)
        if name is not None:
            self.backend.abort([name])

    def _take(self, sequence: SequenceState, output: "RequestOutput | str") -> None:
        """Append what vLLM tells of a sequence."""
        if isinstance(output, str):
            del self._names[sequence]
            sequence.finish_reason, sequence.error = "error", output
            return
        completion = output.outputs[0]
        had = len(sequence.tokens)
        sequence.tokens += completion.token_ids
        told = (output.kv_transfer_params or {}).get(f"{PREFIX}sources", "")
        sequence.sources += ["base" if letter == "b" else "aligned" for letter in told[had:]]
        wanted = sequence.request.params.logprobs
        for token, each in zip(completion.token_ids, completion.logprobs or [], strict=True):
            if not isfinite(each[token].logprob):
                self._break_off(sequence, had)
                return
            sequence.logprobs.append(each[token].logprob)
            if wanted:
                ranked = sorted(each.items(), key=lambda item: item[1].rank or 0)
                sequence.top_logprobs.append({t: p.logprob for t, p in ranked[:wanted]})
        if output.finished:
            self._names.pop(sequence, None)
            sequence.finish_reason = "length" if completion.finish_reason == "length" else "stop"
            drafts = completion.spec_decode_metrics
            if drafts is not None:
                self.stats.drafted += drafts.num_draft_tokens
                self.stats.accepted += sum(n * c for n, c in enumerate(drafts.histogram))

    def _break_off(self, sequence: SequenceState, tokens: int) -> None:
        """End a sequence whose logits are NaN or infinite; what it had before is kept."""
        self.stop(sequence, tokens)
        pair = self.backend.pair
        sequence.finish_reason = "error"
        sequence.error = (
            f"the logits of {pair.base.name} or {pair.aligned.name} are NaN or infinite: its "
            "weights may be damaged, or float16 overflows; try --dtype float32"
        )

    @property
    def busy(self) -> bool:
        return bool(self._names)

    @property
    def waiting(self) -> int:
        return sum(not sequence.tokens for sequence in self._names)

    @property
    def running(self) -> int:
        return len(self._names) - self.waiting

    def _room(self, request: Request) -> int:
        context: int = self.backend.llm.model_config.max_model_len
        for half in MODELS:
            getattr(self.backend.pair, half).check_prompt(half, request.ids(half), context)
        return context - max(len(request.ids(half)) for half in MODELS)


def _sampling(
    params: SamplingParams, sequence: SequenceState, ends: Iterable[int], arguments: dict[str, Any]
) -> Any:
    """The same wishes, as vLLM takes them."""
    from vllm import SamplingParams as TheirParams
    from vllm.sampling_params import RequestOutputKind

    return TheirParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias) or None,
        seed=(sequence.request.noise_seed + sequence.sample * _SEED_STEP) % (MAX_SEED + 1),
        max_tokens=sequence.limit,
        logprobs=params.logprobs or 0,
        stop_token_ids=sorted(ends),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=arguments,
    )
