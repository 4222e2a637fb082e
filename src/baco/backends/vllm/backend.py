"""One vLLM engine behind BACo's decoders: token ids in, tokens and sources out.

vLLM samples with its own sampler and its own seeds. It sees no text; the decoder handles stop
strings.
"""

import json
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
from baco.errors import BacoError, Failure
from baco.models.pair import Pair
from baco.routing.parser import portable
from baco.sampling.params import MAX_SEED, SamplingParams
from baco.sampling.structure import Structure
from baco.source import MODELS, Source

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

log = logging.getLogger("baco")

# The most likely tokens that vLLM returns at a position by default.
_TOP_LOGPROBS = 20
CAPABILITIES = Capabilities(
    "vllm",
    replayable=False,
    explain=False,
    raw_logprobs=_TOP_LOGPROBS,
    combiners=True,
    structured=True,
)
# The source of a token that a combiner mixed is null.
_SOURCES: dict[str, Source | None] = {"b": "base", "a": "aligned", "m": None}
# vLLM draws alike for every request of one seed: each prompt and sample needs its own seed.
_SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(slots=True)
class DraftCounts:
    """Running totals of vLLM's draft tokens."""

    drafted: int = 0
    accepted: int = 0


@dataclass
class VllmBackend:
    """A vLLM engine that holds a pair, shared by any number of decoders.

    Attributes:
        pair: without its weights.
        llm: vLLM's own engine; it serves one caller at a time.
        folder: the pair directory, where one was made for this engine.
        ended: the error that ended the engine, in one line; None while it runs.
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
        """Submit a sequence to vLLM; if vLLM has ended, the sequence ends with its error.

        Raises:
            BacoError: vLLM refuses the request.
        """
        request = sequence.request
        ids, arguments = pair_prompt(request.base_ids, request.aligned_ids, request.digest)
        arguments |= {
            f"{PREFIX}router": request.router.spelling,
            f"{PREFIX}switch": request.switch,
            f"{PREFIX}seed": request.params.seed or 0,
            f"{PREFIX}sample": sequence.sample,
        }
        constraint = request.constraint
        if constraint is not None:
            arguments[f"{PREFIX}joining_space"] = int(constraint.joining_space)
        params = _sampling(request.params, sequence, self.pair.end_ids, arguments)
        with self._lock:
            name, self._next = f"baco-{self._next}", self._next + 1
            if self.ended is not None:
                engine.news.put((sequence, self.ended))
                return name
            try:
                known = self.llm.add_request(
                    name, {"prompt_token_ids": ids, "cache_salt": request.cache_salt}, params
                )
            except ValueError as error:
                raise BacoError(f"vLLM refuses the request: {error}") from error
            self._open[name] = (engine, sequence)
        assert known == name or known.startswith(name)
        return name

    def abort(self, names: Iterable[str]) -> None:
        """Abort requests; those that have ended are skipped."""
        with self._lock:
            running = [name for name in names if self._open.pop(name, None) is not None]
            if running:
                self.llm.abort_request(running)

    def step(self) -> None:
        """Run one step of vLLM and pass its outputs to the engines whose sequences they are."""
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
        """End all sequences: after a failed step the state of the engine is unknown."""
        log.error("a step of vLLM failed: %r", error, exc_info=error)
        self.ended = f"the vLLM engine ended ({first_line(error)}): start it again"
        for engine, sequence in self._open.values():
            engine.news.put((sequence, self.ended))
        self._open.clear()


@dataclass(eq=False)
class VllmEngine:
    """The engine of one decoder.

    Attributes:
        backend: the vLLM engine that decoders share.
        stats: totals of draft tokens, of answers that have ended.
        news: vLLM's outputs for these sequences, or the error that ended vLLM; the thread of
            another decoder may put them there.
    """

    backend: VllmBackend
    stats: DraftCounts = field(default_factory=DraftCounts)
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
        sequences = [
            SequenceState(request, sample, min(request.params.max_tokens, room))
            for sample in range(request.params.n)
        ]
        try:
            for sequence in sequences:
                self._names[sequence] = self.backend.submit(self, sequence)
        except BacoError:
            self.backend.abort(self._names.pop(s) for s in sequences if s in self._names)
            raise
        return sequences

    def step(self) -> list[SequenceState]:
        if self.news.empty():
            self.backend.step()
        grown: dict[SequenceState, None] = {}
        try:
            while True:
                sequence, output = self.news.get_nowait()
                if sequence in self._names:
                    self._take(sequence, output)
                    grown[sequence] = None
        except Empty:
            return list(grown)

    def stop(self, sequence: SequenceState, tokens: int) -> None:
        sequence.finish_reason = "stop"
        sequence.cut(tokens)
        name = self._names.pop(sequence, None)
        if name is not None:
            self.backend.abort([name])

    def _take(self, sequence: SequenceState, output: "RequestOutput | str") -> None:
        """Append vLLM's output to a sequence."""
        if isinstance(output, str):
            del self._names[sequence]
            sequence.finish_reason, sequence.error = "error", Failure("server", output)
            return
        completion = output.outputs[0]
        before = len(sequence.tokens)
        if completion.finish_reason == "error":
            structure = sequence.request.params.structure
            failure = Failure("server", "vLLM ended the answer in an error; the log says why")
            if structure is not None:
                message = f"the answer's {structure.kind} cannot be followed; the log says why"
                failure = Failure("structure", message)
            self._break_off(sequence, before, failure)
            return
        sequence.tokens += completion.token_ids
        letters = (output.kv_transfer_params or {}).get(f"{PREFIX}sources", "")
        sequence.sources += [_SOURCES[letter] for letter in letters[before:]]
        wanted = sequence.request.params.logprobs
        for token, top in zip(completion.token_ids, completion.logprobs or [], strict=True):
            if not isfinite(top[token].logprob):
                pair = self.backend.pair
                message = (
                    f"the logits of {pair.base.name} or {pair.aligned.name} are NaN or infinite: "
                    "its weights may be damaged, or float16 overflows; try --dtype float32"
                )
                self._break_off(sequence, before, Failure("server", message))
                return
            sequence.logprobs.append(top[token].logprob)
            if wanted:
                ranked = sorted(top.items(), key=lambda item: item[1].rank or 0)
                sequence.top_logprobs.append({t: p.logprob for t, p in ranked[:wanted]})
        if output.finished:
            self._names.pop(sequence, None)
            sequence.finish_reason = "length" if completion.finish_reason == "length" else "stop"
            drafts = completion.spec_decode_metrics
            if drafts is not None:
                self.stats.drafted += drafts.num_draft_tokens
                self.stats.accepted += sum(n * c for n, c in enumerate(drafts.histogram))

    def _break_off(self, sequence: SequenceState, tokens: int, failure: Failure) -> None:
        """End a sequence in an error; its first ``tokens`` tokens are kept."""
        self.stop(sequence, tokens)
        sequence.finish_reason, sequence.error = "error", failure

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
        for source in MODELS:
            self.backend.pair.model(source).check_prompt(source, request.ids(source), context)
        return context - max(len(request.ids(source)) for source in MODELS)


def _sampling(
    params: SamplingParams, sequence: SequenceState, ends: Iterable[int], arguments: dict[str, Any]
) -> Any:
    """The sampling parameters in vLLM's own class."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    return VllmParams(
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
        structured_outputs=_structured_outputs(params.structure),
        output_kind=RequestOutputKind.DELTA,
        extra_args=arguments,
    )


def _structured_outputs(structure: Structure | None) -> Any:
    """A structure in vLLM's own class."""
    from vllm.sampling_params import StructuredOutputsParams

    match structure:
        case None:
            return None
        case Structure("schema", text):
            return StructuredOutputsParams(json=text)
        case Structure("choice", text):
            return StructuredOutputsParams(choice=json.loads(text))
        case Structure(kind, text):
            return StructuredOutputsParams(**{kind: text})
