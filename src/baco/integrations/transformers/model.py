"""A pair with a router as one `transformers` model, for `generate()`, pipelines and harnesses.

It returns the logits of the model that the router picks, so every sampling loop of `transformers`
draws from BACo's distribution. The draws are that loop's own: `torch.manual_seed` repeats them, the
seed of `Baco.generate` does not.
"""

import copy
import inspect
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from baco.errors import BacoError
from baco.integrations.transformers.cache import Keys, PairCache
from baco.integrations.transformers.chat import ChatReader
from baco.integrations.transformers.config import BacoConfig, config_of
from baco.integrations.transformers.layout import Layout
from baco.integrations.transformers.next_turn import NextTurn
from baco.models.context import UNBOUNDED
from baco.models.model import PairModel
from baco.models.pair import Pair
from baco.routing.router import Router
from baco.routing.word_boundaries import NO_TOKEN, select
from baco.sampling.noise import ROUTER, coin, noise_keys
from baco.sampling.seeds import noise_seed
from baco.source import MODELS, Source

# The logit of a token that may not be written. It is finite, so that log-likelihoods of texts with
# such a token can be added and compared; e**-10000 is 0 in every floating-point format.
IMPOSSIBLE = -1e4
_USUAL_TOKENS = 20  # the default of `transformers`
# Arguments that a model's forward must take.
NEEDED = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep")


class BacoForCausalLM(PreTrainedModel, GenerationMixin):
    """Both models of a pair and a router; from :func:`baco.as_transformers`.

    ``generate`` takes what any model's does: sampling arguments, beams, ``num_return_sequences``,
    left-padded batches, streamers, stopping criteria. After a call with
    ``return_dict_in_generate=True``, ``past_key_values.source`` has the source of every token.
    """

    config_class = BacoConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self, pair: Pair, router: Router, *, seed: int | None, reader: ChatReader | None
    ) -> None:
        for model in (pair.base, pair.aligned):
            _check_forward(model)
        super().__init__(config_of(pair, router))
        self.pair = pair
        self.router = router
        self.seed = seed
        self.reader = reader
        self.vocabulary = pair.vocabulary.to(pair.aligned.device)
        self.banned = pair.banned.to(pair.aligned.device)
        # Registered in this order, so that the device is the aligned model's.
        self.aligned_causal_lm = pair.aligned.model
        self.base_causal_lm = pair.base.model
        self.generation_config = GenerationConfig.from_dict(
            pair.aligned.model.generation_config.to_dict()
        )
        self.generation_config.eos_token_id = list(pair.end_ids)
        if self.generation_config.pad_token_id is None:
            self.generation_config.pad_token_id = pair.tokenizer.pad_token_id
        self.train(False)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """`transformers`' own ``generate``; the answer begins where ``inputs`` end.

        An answer to a chat prompt also ends where the base model opens its next turn (``Question:``
        on a new line, if the base model wrote the first letter). As with stop strings of
        `transformers`, the opening is part of the result. All answers of a batch end when its
        longest row reaches the end of either model's context window.

        Raises:
            BacoError: no prompt, or one that does not fit a context window.
        """
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is None:
            raise BacoError("generate() was given no prompt: pass token ids as input_ids")
        cached = kwargs.get("use_cache", getattr(generation_config, "use_cache", None))
        if cached is not False and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = self.new_cache()
        kwargs.setdefault("prompt_length", ids.shape[1])
        kwargs.setdefault("seed", self._coin_seed())
        mask = self._prompt_mask(ids, kwargs.get("attention_mask"))
        room = self._room(ids, mask, kwargs.get("past_key_values"), kwargs["prompt_length"])
        generation_config = _within(
            room, ids.shape[1], generation_config, self.generation_config, kwargs
        )
        opening = self.pair.renderer.turn_opening
        if opening and self.reader is not None and self.router.only != "aligned":
            routing = {name: kwargs[name] for name in ("prompt_length", "seed")}
            cache = kwargs.get("past_key_values")
            next_turn = NextTurn(self, opening, ids, mask, routing, cache)
            given = kwargs.get("stopping_criteria") or ()
            kwargs["stopping_criteria"] = StoppingCriteriaList([*given, next_turn])
        return super().generate(inputs, generation_config, **kwargs)

    def _room(self, ids: Tensor, mask: Tensor, cache: PairCache | None, prompt_length: int) -> int:
        """How many tokens every row can get before a context window ends."""
        if cache is not None and cache.batch_size:
            new = ids.shape[1] - cache.get_seq_length()
            masks = {"base": cache.base_mask, "aligned": cache.aligned_mask}
        else:
            layout, new = self._layout(ids, mask, prompt_length), 0
            masks = {"base": layout.base_mask, "aligned": layout.aligned_mask}
        rooms = []
        for source in MODELS:
            if self.router.only in (None, source):
                model = self.pair.model(source)
                length = int(masks[source].sum(dim=1).max()) + new
                model.check_length(source, length)
                rooms.append(model.context - length)
        return min(rooms)

    def _prompt_mask(self, ids: Tensor, given: Tensor | None) -> Tensor:
        """The prompts' mask; by default that of `transformers`."""
        pad = self.generation_config.pad_token_id
        if given is not None:
            return given
        return torch.ones_like(ids) if pad in self.pair.end_ids or pad is None else ids.ne(pad)

    @torch.no_grad()
    def sources(
        self, input_ids: Tensor, attention_mask: Tensor, *, prompt_length: int, seed: int
    ) -> Tensor:
        """The source of the token after each column, True for base: bool [B, T].

        Arguments as for :meth:`forward`. Values within prompts have no meaning.
        """
        layout = self._layout(input_ids, attention_mask, prompt_length)
        return self._route(layout, None, 1, seed)[1]

    def new_cache(self) -> PairCache:
        """An empty ``past_key_values`` for this pair."""
        return PairCache(self.pair.base.model.config, self.pair.aligned.model.config)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in `transformers`, without positions: each model has positions of its own."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("position_ids", None)
        return inputs

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: PairCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        prompt_length: int | None = None,
        seed: int | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Routed logits for every position, float32.

        If a row begins with a rendering of the aligned model's chat template, the answer starts
        after it, and logits within the prompt are the aligned model's. Raw text is routed from its
        first token on, or from ``prompt_length`` on.

        Args:
            input_ids: int64 [B, T]; with a cache, the new tokens only.
            attention_mask: 0 for padding, int64 [B, T] or, with a cache, [B, all columns].
            past_key_values: from an earlier call or :meth:`new_cache`.
            use_cache: return ``past_key_values``; by default only if one was passed.
            logits_to_keep: positions to return, counted from the end; 0 returns all T.
            prompt_length: columns of the longest prompt, padding included.
            seed: of the coins of a random router.
            unused: other arguments that `transformers` passes, such as ``return_dict``.

        Returns:
            ``logits`` [B, T or logits_to_keep, V] on the pair's common vocabulary; a token that may
            not be written has :data:`IMPOSSIBLE`.

        Raises:
            BacoError: for ``labels``, ``inputs_embeds``, a cache that is not this model's, or a
                prompt with tokens that the base model does not know.
        """
        for name in ("labels", "inputs_embeds"):
            if unused.get(name) is not None:
                raise BacoError(f"{name}: a pair can be decoded and scored by token ids only")
        cache = past_key_values
        if cache is None and use_cache:
            cache = self.new_cache()
        if not isinstance(cache, PairCache | None):
            raise BacoError(
                f"past_key_values is a {type(cache).__name__}: pass the one of an earlier call, "
                "or new_cache()"
            )
        input_ids = input_ids.to(self.pair.aligned.device)
        if cache is None or cache.get_seq_length() == 0:
            layout = self._layout(input_ids, attention_mask, prompt_length)
        else:
            layout = Layout.continued(input_ids, cache, self._base_rows)
        logits, source = self._route(layout, cache, logits_to_keep, self._coin_seed(seed))
        if cache is not None:
            cache.base_mask, cache.aligned_mask = layout.base_mask, layout.aligned_mask
            cache.keys = layout.keys
            cache.append(input_ids, layout.base_ids, source)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    @property
    def _base_rows(self) -> int:
        rows: int = self.pair.base.embedding_rows
        return rows

    def _layout(self, ids: Tensor, mask: Tensor | None, prompt_length: int | None) -> Layout:
        return Layout.of_prompts(
            ids,
            mask,
            reader=self.reader,
            prompt_length=prompt_length,
            base_rows=self._base_rows,
        )

    def _route(
        self, layout: Layout, cache: PairCache | None, keep: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Run both models over the new columns, then route: logits [B, keep, V], source [B, T]."""
        ids = layout.aligned_ids
        columns = ids.shape[1]
        routed = columns - layout.first  # columns from the first routed one
        base, logits = self._rows(layout, cache, routed, max(routed, keep or columns))
        source = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        active, toss = layout.active, _Coins(seed, layout.keys)
        for step, column in enumerate(range(layout.first, columns)):
            # The token after column `start` - 1 is the answer's first: it has no previous one.
            opening, answering = layout.start - 1 == column, layout.start - 1 <= column
            row = logits.shape[1] - routed + step
            routed_logits, token_source = select(
                base[:, step],
                logits[:, row],
                ids[:, column].masked_fill(opening, NO_TOKEN),
                active,
                router=self.router,
                vocabulary=self.vocabulary,
                banned=self.banned,
                coin=toss(layout.seen + column + 1),
            )
            logits[:, row] = torch.where(answering[:, None], routed_logits, logits[:, row])
            active = torch.where(answering, token_source, active)
            source[:, column] = active
        return logits[:, -keep:].clamp_min(IMPOSSIBLE), source

    def _rows(
        self, layout: Layout, cache: PairCache | None, routed: int, wanted: int
    ) -> tuple[Tensor, Tensor]:
        """The base model's logits of the last ``routed`` columns, the aligned model's of ``wanted``
        columns.

        A model that the router never picks is not run. The other model's logits take its place, and
        zeros where these do not reach, since the base model's prompt may be shorter.
        """
        only = self.router.only
        if only != "base":
            aligned = self._read("aligned", layout, cache, wanted)
            if only == "aligned":
                return aligned[:, -routed:], aligned
        base = self._read("base", layout, cache, routed)
        if only == "base":
            aligned = base.new_zeros(len(base), wanted, base.shape[2])
            aligned[:, -routed:] = base
        return base, aligned

    def _read(self, name: Source, layout: Layout, cache: PairCache | None, keep: int) -> Tensor:
        """Run one model over its new columns: logits of the last ``keep``, float32 [B, keep, V]."""
        model = self.pair.model(name)
        ids: Tensor = getattr(layout, f"{name}_ids")
        mask: Tensor = getattr(layout, f"{name}_mask")
        past: Cache | None = getattr(cache, name) if cache is not None else None
        device, rope, lengths = model.device, model.long_rope, mask.sum(dim=1).cpu()
        if cache is None or not cache.batch_size:
            model.check_length(name, int(lengths.max()) - 1)
            if model.ids_without_embedding:
                model.check_prompt(name, ids[mask.bool()].unique().tolist())
        long = lengths > (UNBOUNDED if rope is None else rope.original_length)
        if cache is not None:
            if cache.batch_size and not long.equal(getattr(cache, f"{name}_long")):
                # Cached keys depend on the length of the text: read all of it again.
                getattr(cache, name).reset()
                ids = torch.cat([cache.base_ids if name == "base" else cache.ids, ids], dim=1)
            setattr(cache, f"{name}_long", long)
        # Drafts of assisted decoding may reach beyond the context; they are not kept.
        positions = (mask.cumsum(dim=1) - 1).clamp(0, model.context - 1)[:, -ids.shape[1] :]
        with nullcontext() if rope is None else rope.per_row(long.tolist()):
            logits = model.run(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                past_key_values=past,
                use_cache=past is not None,
                logits_to_keep=keep,
            ).logits
        rows: Tensor = model.to_common_vocab(logits[:, -keep:])
        # This waits for the device, as `transformers` does at every step anyway.
        is_token = mask[:, -rows.shape[1] :].bool().to(rows.device)
        model.check_logits(rows.amax(dim=-1)[is_token])
        return rows.to(layout.aligned_ids.device)

    def _coin_seed(self, seed: int | None = None) -> int:
        """The seed given, else this object's, else a fresh one from torch's generator."""
        if seed is None:
            seed = self.seed
        return int(torch.randint(2**31, ())) if seed is None else seed

    def get_input_embeddings(self) -> Any:
        """The aligned model's."""
        return self.aligned_causal_lm.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The aligned model's."""
        return self.aligned_causal_lm.get_output_embeddings()

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Do nothing: the models' weights are tied already."""

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """A pair is not a checkpoint."""
        raise BacoError("a pair is not a checkpoint of its own: save or load its two models")


def _within(
    room: int, columns: int, given: GenerationConfig | None, usual: Any, kwargs: dict[str, Any]
) -> GenerationConfig | None:
    """The configuration for ``generate``, with at most ``room`` new tokens; changes ``kwargs``."""
    config = given or usual
    new = kwargs.get("max_new_tokens", config.max_new_tokens)
    longest = kwargs.get("max_length", config.max_length)
    wanted = new if new is not None else _USUAL_TOKENS if longest is None else longest - columns
    if wanted <= room:
        return given
    kwargs.pop("max_length", None)
    if given is None:
        kwargs["max_new_tokens"] = room
        return None
    kwargs.pop("max_new_tokens", None)
    given = copy.deepcopy(given)
    given.max_new_tokens, given.max_length = room, None
    return given


class _Coins:
    """The coins of a batch's rows, keyed by seed, prompt, sample and position."""

    def __init__(self, seed: int, keys: Keys) -> None:
        device = keys.start.device
        self._start = keys.start
        self._seed = torch.tensor(
            [noise_seed(seed, digest) for digest in keys.digests], device=device
        )
        self._sample = torch.tensor(keys.samples, device=device)

    def __call__(self, column: int) -> Tensor:
        """A uniform number for each row's token in a column of the aligned model, float32 [B]."""
        return coin(noise_keys(self._seed, self._sample, column - self._start), ROUTER)


def _check_forward(pair_model: PairModel) -> None:
    """Check that a model's forward takes positions and masks, which padded batches need."""
    module = pair_model.model
    if hasattr(module, "get_base_model"):
        module = module.get_base_model()
    known = inspect.signature(module.forward).parameters
    missing = [name for name in NEEDED if name not in known]
    if missing:
        raise BacoError(
            f"{pair_model.name} ({type(module).__name__}) takes no {' or '.join(missing)}: "
            "as_transformers needs a model with keys and values; Baco.generate takes this one"
        )


# Pipelines recognise the model by this; nothing can be loaded by the name.
AutoConfig.register(BacoConfig.model_type, BacoConfig)
AutoModelForCausalLM.register(BacoConfig, BacoForCausalLM)
