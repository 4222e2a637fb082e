"""Two models of vLLM's own, read side by side; their rows are routed where logits are computed."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model
from vllm.sequence import IntermediateTensors
from vllm.transformers_utils.config import get_config

from baco.source import MODELS, Source

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from baco.backends.vllm.model_inputs import Lane
    from baco.backends.vllm.rows import Rows


class BacoForCausalLM(nn.Module, SupportsPP):
    """A pair as vLLM loads it.

    Attributes:
        base, aligned: the halves, any architecture that vLLM has.
        lanes: how each half reads the next batch where it does not read it as it stands; set by
            the model runner before a forward.
        rows: what the next rows of logits are routed by; None outside of real steps.
    """

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        folder = Path(model_config.model)
        widths = []
        for half in MODELS:
            config = get_config(folder / half, model_config.trust_remote_code)
            made = init_vllm_registered_model(
                vllm_config, prefix=f"{prefix}.{half}" if prefix else half, hf_config=config
            )
            setattr(self, half, made)
            widths.append(config.get_text_config().hidden_size)
        self.widths = widths
        self.vocabulary = model_config.get_vocab_size()
        # Where vLLM looks for weights: the folder's own top level has none.
        self.allow_patterns_overrides = ["base/*.safetensors"]
        self.lanes: dict[Source, Lane] = {}
        self.rows: Rows | None = None
        self.secondary_weights = [
            DefaultModelLoader.Source(
                str(folder),
                None,
                prefix="aligned.",
                allow_patterns_overrides=["aligned/*.safetensors"],
            )
        ]

    def model_of(self, half: Source) -> Any:
        """One of the two models."""
        return getattr(self, half)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """As the aligned half embeds them."""
        embedded: Tensor = self.model_of("aligned").embed_input_ids(input_ids)
        return embedded

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Room for what one pipeline stage hands to the next."""
        return IntermediateTensors(
            {
                f"{half}.{name}": tensor
                for half in MODELS
                for name, tensor in self.model_of(half)
                .make_empty_intermediate_tensors(batch_size, dtype, device)
                .tensors.items()
            }
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Both halves' last hidden states side by side, [T, base's width + aligned's width]."""
        assert inputs_embeds is None, "a pair reads token ids"
        read = {
            half: self._read(half, input_ids, positions, intermediate_tensors) for half in MODELS
        }
        if get_pp_group().is_last_rank:
            return torch.cat([read[half]["hidden"] for half in MODELS], dim=-1)
        return IntermediateTensors(
            {f"{half}.{name}": t for half in MODELS for name, t in read[half].items()}
        )

    def _read(
        self,
        half: Source,
        ids: Tensor | None,
        positions: Tensor,
        carried: IntermediateTensors | None,
    ) -> dict[str, Tensor]:
        """What a half makes of a batch of T tokens, [T, ...], zeros where it reads none."""
        lane = self.lanes.get(half)
        mine = None
        if carried is not None:
            mine = {
                name.removeprefix(f"{half}."): tensor
                for name, tensor in carried.tensors.items()
                if name.startswith(f"{half}.")
            }
            if lane is not None and lane.kept is not None:
                mine = {name: tensor[lane.kept] for name, tensor in mine.items()}
        if lane is not None:
            ids, own = (lane.ids if ids is not None else None), lane.positions
        else:
            own = positions
        if not len(own):  # not every model takes a batch of no tokens
            return self._nothing(half, positions)
        out = self.model_of(half)(ids, own, None if mine is None else IntermediateTensors(mine))
        made = dict(out.tensors) if isinstance(out, IntermediateTensors) else {"hidden": out}
        if lane is None or lane.kept is None:
            return made
        return {name: _spread(t, lane.kept, len(positions)) for name, t in made.items()}

    def _nothing(self, half: Source, positions: Tensor) -> dict[str, Tensor]:
        """What `_read` gives where a half reads none of a batch's tokens."""
        model, size = self.model_of(half), len(positions)
        dtype = next(model.parameters()).dtype
        if get_pp_group().is_last_rank:
            width = self.widths[MODELS.index(half)]
            return {"hidden": torch.zeros(size, width, dtype=dtype, device=positions.device)}
        empty = model.make_empty_intermediate_tensors(size, dtype, positions.device)
        return dict(empty.tensors)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The rows that tokens are drawn from, float32 [N, V]; outside of real steps, as while
        memory is measured, the aligned half's.
        """
        rows, self.rows = self.rows, None
        logits = [
            self.model_of(half).compute_logits(part.contiguous())
            for half, part in zip(MODELS, hidden_states.split(self.widths, dim=-1), strict=True)
        ]
        if any(each is None for each in logits):
            return None  # another rank of the tensor-parallel group has them
        base, aligned = (_fit(each, self.vocabulary) for each in logits)
        return aligned if rows is None else rows.route(base, aligned)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Weights of the aligned half come with its name before theirs, the base's do not."""
        named = (
            (name if name.startswith("aligned.") else f"base.{name}", tensor)
            for name, tensor in weights
        )
        return set(AutoWeightsLoader(self).load_weights(named))


def _spread(read: Tensor, kept: Tensor, tokens: int) -> Tensor:
    return read.new_zeros(tokens, *read.shape[1:]).index_copy_(0, kept, read)


def _fit(logits: Tensor, width: int) -> Tensor:
    """Raw logits on the common vocabulary, float32 [N, width]."""
    logits = logits[:, :width].float()
    missing = width - logits.shape[1]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits
