"""The decoding loop for two models with different tokenizers, which share the text of answers.

Each row waits for the logits of one model at a time: of the active source, at a boundary of the
models that its router reads, then of the source that the router picked. A step runs the model that
most rows wait for, once, and decides all that follows from its logits. The model reads what it has
not read of these rows, at a boundary usually one word that the other model wrote.

While the aligned model thinks, it is read alone, and the base model gets no ids of the thinking.

Nothing is drafted.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from baco.device import tensor_on
from baco.engine.batch import Batch, padded_tokens
from baco.engine.engine import ScheduledEngine, Stats
from baco.engine.runner import ModelRunner
from baco.engine.scheduler import MANY_CHUNKS
from baco.engine.sequence import Request, SequenceState, Why
from baco.engine.verify import Verifier
from baco.errors import BacoError, Failure
from baco.kv_cache.prefix_cache import PrefixCache
from baco.models.pair import Pair
from baco.routing.router import Router, reads_structure
from baco.routing.signals import Allowed, Distribution, Signals
from baco.routing.two_vocabularies import check_router, is_boundary, read_model
from baco.sampling.constraint import Following, Mask, pack, unpack
from baco.sampling.noise import ROUTER, coin, noise_keys
from baco.sampling.sampler import SamplingTensors, draw, most_likely, penalise
from baco.sampling.sampler_chain import Context, apply_chains
from baco.source import MODELS, Source
from baco.text.shared_text import EncodingStats, OwnTokens, SharedText


@dataclass(slots=True)
class _NextToken:
    """What is known of a row's next token.

    Attributes:
        waits_for: the model whose logits are needed next.
        logits: by model, float32 [V].
        starts_word: by model, whether its most likely token is a word start.
        following: by model, what the structure of the answer allows; None where anything goes.
        boundary: whether the router decides; None where that is open.
        free: a boundary where nothing but the structure is masked.
        source: of the token; None where that is open.
    """

    waits_for: Source
    logits: dict[Source, Tensor] = field(default_factory=dict)
    starts_word: dict[Source, bool] = field(default_factory=dict)
    following: dict[Source, Following | None] = field(default_factory=dict)
    boundary: bool | None = None
    free: bool = False
    source: Source | None = None


@dataclass(slots=True)
class SharedTextStats(Stats):
    """Running totals, with those of texts that one model wrote and the other read.

    Attributes:
        encoding: how texts were encoded.
        read, rolled_back: tokens of answers that models have read, and those of them that were
            removed from a cache because other ids took their place.
    """

    encoding: EncodingStats = field(default_factory=EncodingStats)
    read: int = 0
    rolled_back: int = 0


class SharedTextEngine(ScheduledEngine):
    """Decodes requests on a pair of models with different tokenizers.

    Args:
        pair: the two models.
        max_rows: sequences decoded at once; more wait.
        memory: limit for caches and the step's tensors, as
            :func:`baco.engine.budget.cache_bytes` reads it.
        chunks_per_step: chunks of prompts that are read between two steps.
        prefix_cache: keeps what the models have read of prompts and answers; None to keep nothing.

    Raises:
        BacoError: a model's cache cannot be rolled back.
    """

    def __init__(
        self,
        pair: Pair,
        *,
        max_rows: int = 256,
        memory: int | float | str | None = None,
        chunks_per_step: int = MANY_CHUNKS,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        assert pair.own_vocabularies is not None
        self.pair, self._own = pair, pair.own_vocabularies
        device = pair.aligned.device
        models = {"base": pair.base, "aligned": pair.aligned}
        self._vocabularies = {name: own.vocabulary.to(device) for name, own in self._own.items()}
        self._banned = {name: own.banned.to(device) for name, own in self._own.items()}
        self._banned_ids = {name: banned.nonzero()[:, 0] for name, banned in self._banned.items()}
        self._words = {name: own.noise_words.to(device) for name, own in self._own.items()}
        width = max(own.vocabulary.size for own in self._own.values())
        batch = Batch(device, width)
        verifier = Verifier(self._vocabularies["aligned"], self._banned["aligned"])
        runner = ModelRunner(models, batch, verifier)
        for name, cache in runner.caches.items():
            if not cache.can_cut:
                raise BacoError(
                    f"the state of {models[name].name} cannot be rolled back to any place, which "
                    "two tokenizers need: use a model whose layers all have attention"
                )
        super().__init__(
            runner,
            batch,
            width,
            max_rows=max_rows,
            memory=memory,
            chunks_per_step=chunks_per_step,
            prefix_cache=prefix_cache,
        )
        self._packed_word_starts: dict[Source, Mask] = {}
        self._next: dict[SequenceState, _NextToken] = {}
        self._latest: dict[Source, Tensor] = {}  # of all rows, by the model that this step ran
        self.stats = SharedTextStats(self._runner.caches)

    @torch.inference_mode()
    def step(self) -> list[SequenceState]:
        """Run one model over the rows that wait for it; return the rows that got a token or ended.

        A bounded number of tokens of waiting prompts is read first.
        """
        self._scheduler.schedule()
        rows = self._batch.rows
        if not rows:
            return []
        begun = [row for row in rows if row not in self._next]
        self._next = {row: self._next.get(row) or _begin(row) for row in rows}
        self._find_sources(begun)
        waits = [self._next[row].waits_for for row in rows]
        model: Source = "base" if 2 * waits.count("base") >= len(waits) else "aligned"
        reading = [at for at, waited in enumerate(waits) if waited == model]
        lengths = [len(row.tokens) for row in rows]
        self._read(model, reading)
        running = [rows[at] for at in reading if rows[at].finish_reason is None]
        self._find_sources(running)
        self._keep_sources(running)
        for source in MODELS:
            ready = [at for at in reading if self._is_ready(rows[at], source)]
            if ready:
                self._draw(source, ready)
        self._latest.clear()
        for row in running:
            known = self._next.get(row)
            if known is not None and model in known.logits:  # a view of the logits of all rows
                known.logits[model] = known.logits[model].clone()
        none = [0] * len(rows)
        self.stats.update(rows, lengths, none, none)
        return [
            rows[at]
            for at in reading
            if len(rows[at].tokens) > lengths[at] or rows[at].finish_reason is not None
        ]

    # --- read -------------------------------------------------------------------------------------

    def _read(self, model: Source, reading: list[int]) -> None:
        """Let a model read some rows, and keep the logits after the last token of each."""
        rows, cache = self._batch.rows, self._runner.caches[model]
        lengths, unread = list(cache.lengths), [list[int]() for _ in rows]
        for at in reading:
            row = rows[at]
            prompt, own = len(row.request.ids(model)), _own(row, model)
            started = time.perf_counter()
            same = own.read(bytes(_text(row).data), self.stats.encoding)
            self.stats.encoding.seconds += time.perf_counter() - started
            kept = min(lengths[at], prompt + same)
            self.stats.rolled_back += lengths[at] - kept
            # The last token is read again where all have been: its logits are not kept.
            lengths[at] = min(kept, prompt + len(own.ids) - 1)
            if len(own.ids) > min(row.most_ids, self.pair.model(model).context - prompt):
                row.finish_reason = "length"
            else:
                unread[at] = [
                    *row.request.ids(model)[lengths[at] :],
                    *own.ids[max(lengths[at] - prompt, 0) :],
                ]
                self.stats.read += len(own.ids) - max(lengths[at] - prompt, 0)
        cache.roll_back(lengths)
        if not any(unread):
            return
        logits = self._latest[model] = self._runner.read_rows(model, unread)
        top = most_likely(logits)
        finite = logits.gather(1, top[:, None])[:, 0].isfinite().tolist()
        following: dict[int, Following | None] = {}
        for at in reading:
            row = rows[at]
            if row.finish_reason is not None:
                continue
            if not finite[at]:
                message = self.pair.model(model).damage_message
                row.finish_reason, row.error = "error", Failure("process", message)
                self._runner.clear([at])
                continue
            try:
                following[at] = row.following(model)
            except BacoError as error:
                row.finish_reason, row.error = "error", Failure("structure", str(error))
        if not following:
            return
        allowed = self._allowed(model, list(following.values()))
        if allowed is not None:
            index = tensor_on(self._batch.device, list(following))
            top[index] = allowed.top(Distribution(logits[index]))
        starts_word = self._vocabularies[model].word_start[top].tolist()
        for at, allows in following.items():
            known = self._next[rows[at]]
            known.logits[model], known.starts_word[model] = logits[at], starts_word[at]
            known.following[model] = allows

    # --- route ------------------------------------------------------------------------------------

    def _find_sources(self, rows: list[SequenceState]) -> None:
        """Decide the source of the rows' next tokens, or what each row waits for."""
        routed: dict[Router, list[SequenceState]] = {}
        for row in rows:
            known, router = self._next[row], row.request.router
            if known.boundary is None:
                active = row.sources[-1]
                assert active is not None  # combiners are refused
                following = known.following[active]
                known.free = following is not None and following.begins
                known.boundary = is_boundary(
                    first=known.free,
                    text_is_open=_text(row).is_open,
                    starts_word=known.starts_word[active],
                )
                if following is not None and following.forced:
                    known.boundary = False
                if not known.boundary:
                    known.source = active
            if known.source is None:
                missing = [m for m in MODELS if m in router.reads and m not in known.logits]
                if missing:
                    known.waits_for = missing[0]
                else:
                    routed.setdefault(router, []).append(row)
        for router, rows_of in routed.items():
            picks = self._route(router, rows_of)
            for row, base in zip(rows_of, picks, strict=True):
                self._next[row].source = "base" if base else "aligned"
        for row in rows:
            known = self._next[row]
            if known.source is not None:
                known.waits_for = known.source

    def _keep_sources(self, rows: list[SequenceState]) -> None:
        """Let the active source continue where the structure of an answer allows the source that
        the router picked no word start.
        """
        for row in rows:
            known = self._next[row]
            source, active = known.source, row.sources[-1] if row.sources else None
            following = None if source is None else known.following.get(source)
            if source is None or following is None or not self._must_start_word(row, source):
                continue
            if not (following.mask & self._word_starts(source, len(following.mask))).any():
                assert active is not None  # combiners are refused
                known.source = known.waits_for = active

    def _must_start_word(self, row: SequenceState, source: Source) -> bool:
        """Whether a source may write only word starts: it is new, inside the text of an answer."""
        inside = len(row.tokens) > row.num_thinking and not self._next[row].free
        return inside and row.sources[-1] != source

    def _word_starts(self, source: Source, words: int) -> Mask:
        """The word starts that a model may write, as a mask of int32 [words]."""
        if source not in self._packed_word_starts:
            tokens = self._vocabularies[source].word_start & ~self._banned[source]
            self._packed_word_starts[source] = pack(tokens.cpu().numpy(), words)
        return self._packed_word_starts[source]

    def _allowed(self, model: Source, following: Sequence[Following | None]) -> Allowed | None:
        """What the structures of some rows' answers allow a model; None where anything goes."""
        held = {at: each for at, each in enumerate(following) if each is not None}
        if not held:
            return None
        device, size = self._batch.device, self._vocabularies[model].size
        masks = torch.from_numpy(np.stack([each.mask for each in held.values()])).to(device)
        # What routers read of the structure is left open: `check_request` refuses these.
        none = torch.zeros(len(following), dtype=torch.bool, device=device)
        at = tensor_on(device, list(held), torch.int64)
        return Allowed(at, unpack(masks, size), none, ~none, none, lambda *_: False)

    def _allowed_next(self, model: Source, rows: list[SequenceState]) -> Allowed | None:
        """`_allowed` of rows whose next token the model has logits for."""
        return self._allowed(model, [self._next[row].following[model] for row in rows])

    def _route(self, router: Router, rows: list[SequenceState]) -> list[bool]:
        """What a router picks for some rows, True for the base model."""
        unread = torch.zeros(len(rows), 1, device=self._batch.device)
        logits = {
            model: torch.stack([self._next[row].logits[model] for row in rows])
            if model in router.reads
            else unread
            for model in MODELS
        }
        signals = Signals(
            logits["base"],
            logits["aligned"],
            self._vocabularies[read_model(router)],
            coin(self._keys(rows), ROUTER),
            self._vocabularies,
            own_allowed={model: self._allowed_next(model, rows) for model in router.reads},
        )
        picks: list[bool] = router(signals).tolist()
        return picks

    def _keys(self, rows: list[SequenceState]) -> Tensor:
        """The noise keys of the rows' next tokens, int64 [N, 2]."""
        numbers = [(row.request.noise_seed, row.sample, _text(row).position) for row in rows]
        seed, sample, position = tensor_on(self._batch.device, numbers, torch.int64).unbind(1)
        return noise_keys(seed, sample, position)

    # --- draw -------------------------------------------------------------------------------------

    def _is_ready(self, row: SequenceState, source: Source) -> bool:
        known = self._next[row]
        return row.finish_reason is None and known.source == source and source in known.logits

    def _draw(self, source: Source, ready: list[int]) -> None:
        """Draw and append the next tokens of some rows, all from one source."""
        rows = [self._batch.rows[at] for at in ready]
        logits = self._logits_to_change(source, rows)
        log_partition = Distribution(logits).log_partition
        tops = [_top(row, logits[at], log_partition[at]) for at, row in enumerate(rows)]
        logits.index_fill_(1, self._banned_ids[source], -torch.inf)
        new_source = [self._must_start_word(row, source) for row in rows]
        for at in (at for at, is_new in enumerate(new_source) if is_new):
            logits[at].masked_fill_(~self._vocabularies[source].word_start, -torch.inf)
        allowed = self._allowed_next(source, rows)
        if allowed is not None:
            logits = allowed.mask(logits)
        index, keys = tensor_on(self._batch.device, ready), self._keys(rows)
        params = self._batch.sampling.rows(index)
        shaped = self._run_samplers(
            source, rows, index, self._penalise(source, rows, logits, params), keys
        )
        token = draw(shaped, params, keys, self._words[source])
        logprob = logits.gather(1, token[:, None])[:, 0] - log_partition
        drawn = zip(rows, token.tolist(), logprob.tolist(), tops, strict=True)
        for row, token_id, logprob_of, top in drawn:
            if row.phase != "answer" and not row.think(token_id):
                # The answer begins in this token's place, and the router decides there.
                del self._next[row]
                continue
            self._append(row, source, token_id, logprob_of)
            if top is not None:
                row.top_logprobs.append(top)

    def _logits_to_change(self, source: Source, rows: list[SequenceState]) -> Tensor:
        """The logits of some rows, float32 [N, V]: no copy where nothing reads them afterwards."""
        latest = self._latest.get(source)
        explains = any(row.request.explain for row in rows)
        if latest is not None and len(rows) == len(latest) and not explains:
            return latest
        return torch.stack([self._next[row].logits[source] for row in rows])

    def _penalise(
        self, source: Source, rows: list[SequenceState], logits: Tensor, params: SamplingTensors
    ) -> Tensor:
        """Apply the rows' penalties, which count the ids that the source has of the answer."""
        if not params.any_penalty:
            return logits
        in_prompt = torch.zeros_like(logits, dtype=torch.bool)
        in_answer = torch.zeros_like(logits, dtype=torch.int32)
        for at, row in enumerate(rows):
            if row.request.params.penalises:
                prompt, ids = row.request.ids(source), _own(row, source).ids
                in_prompt[at, tensor_on(logits.device, list(prompt), torch.int64)] = True
                index = tensor_on(logits.device, ids, torch.int64)
                in_answer[at].scatter_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        return penalise(logits, in_prompt, in_answer, params)

    def _run_samplers(
        self,
        source: Source,
        rows: list[SequenceState],
        index: Tensor,
        logits: Tensor,
        keys: Tensor,
    ) -> Tensor:
        """Run the rows' samplers, which read the ids that the source has of the answer."""
        batch = self._batch
        if not any(batch.chains):
            return logits

        def tokens() -> Tensor:
            return padded_tokens([_own(row, source).ids for row in rows], batch.device)

        is_base = torch.full((len(rows),), source == "base", device=batch.device)
        context = Context(tokens, keys, is_base)
        return apply_chains(logits, batch.chains, batch.chain_index[index], context)

    def _append(self, row: SequenceState, source: Source, token: int, logprob: float) -> None:
        if row.request.explain:
            row.why.append(self._why(row, source, logprob))
        row.tokens.append(token)
        row.sources.append(source)
        row.logprobs.append(logprob)
        if row.phase == "answer":
            _text(row).append(source, token)
        else:
            _text(row).think(source, token)
        room = self.pair.model(source).context - len(row.request.ids(source))
        if token in self._own[source].end_ids:
            row.finish_reason = "stop"
        elif len(row.tokens) >= row.limit or len(_own(row, source).ids) >= min(row.most_ids, room):
            row.finish_reason = "length"
        only = row.router.only
        self._next[row] = _NextToken(source, source=only, boundary=None if only is None else True)

    def _why(self, row: SequenceState, source: Source, logprob: float) -> Why:
        """Why a token has its source; NaN for numbers that were not computed."""
        known, nan = self._next[row], float("nan")
        base = Distribution(known.logits["base"][None]) if "base" in known.logits else None
        allowed = None if base is None else self._allowed_next("base", [row])
        return Why(
            base_logprob=logprob if source == "base" else nan,
            aligned_logprob=logprob if source == "aligned" else nan,
            max_base=nan if base is None else float(base.max),
            entropy_base=nan if base is None else float(base.entropy),
            predicted=-1
            if base is None
            else int(base.top if allowed is None else allowed.top(base)),
            asked=bool(known.boundary),
            wanted=source,
        )

    # --- requests ---------------------------------------------------------------------------------

    def add(self, request: Request) -> list[SequenceState]:
        """Queue the n samples of a request.

        Raises:
            BacoError: it needs one tokenizer, its prompt fits no context window, or memory cannot
                hold one answer.
        """
        check_request(request)
        sequences = self._scheduler.add(request, self._runner.prompt_room(request))
        for sequence in sequences:
            own: dict[str, OwnTokens] = {
                model: OwnTokens(self._own[model].tokenizer) for model in MODELS
            }
            sequence.shared_text = SharedText(own)
        return sequences


def _text(row: SequenceState) -> SharedText:
    assert row.shared_text is not None
    return row.shared_text


def _own(row: SequenceState, model: Source) -> OwnTokens:
    return _text(row).own[model]


def _begin(row: SequenceState) -> _NextToken:
    """The first token of a row. One that its structure forces is the aligned model's."""
    only = row.router.only
    if only is None:
        following = row.following("aligned")
        if following is not None and following.forced:
            return _NextToken("aligned", boundary=False, source="aligned")
    return _NextToken(only or "base", boundary=True, source=only)


def _top(row: SequenceState, logits: Tensor, log_partition: Tensor) -> dict[int, float] | None:
    """The most likely tokens of a row, where it wants any."""
    count = row.request.params.logprobs
    if not count:
        return None
    top = (logits - log_partition).topk(min(count, len(logits)))
    return dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def check_request(request: Request) -> None:
    """Raise BacoError for a request that needs one tokenizer."""
    params = request.params
    check_router(request.router)
    if request.switch == "token" and request.router.only is None:
        raise BacoError("models of different tokenizers change sources between words only")
    if params.structure is not None and reads_structure(request.router):
        raise BacoError(
            f"{request.router.spelling} with a {params.structure.kind} needs a pair with one "
            "tokenizer: use a router without Struct"
        )
    if params.reads_history:
        raise BacoError(
            "DRY and a repetition window count tokens of one tokenizer, and the models have two: "
            "leave dry_multiplier and repetition_window out"
        )
    if params.logit_bias:
        raise BacoError("logit_bias names tokens, which two tokenizers do not share: leave it out")
