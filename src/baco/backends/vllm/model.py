"""Two of vLLM's own models side by side; their rows are routed when logits are computed."""

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

    from baco.backends.vllm.model_inputs import ModelInputs
    from baco.backends.vllm.rows import Rows


class BacoForCausalLM(nn.Module, SupportsPP):
    """A pair as vLLM loads it.

    Attributes:
        base, aligned: the models, any architecture that vLLM has.
        inputs: of each model for the next batch, where they are not the batch itself; set by the
            model runner before a forward.
        rows: routes the next rows of logits; None outside of real steps.
    """

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        folder = Path(model_config.model)
        widths = []
        for source in MODELS:
            config = get_config(folder / source, model_config.trust_remote_code)
            model = init_vllm_registered_model(
                vllm_config, prefix=f"{prefix}.{source}" if prefix else source, hf_config=config
            )
            setattr(self, source, model)
            widths.append(config.get_text_config().hidden_size)
        self.widths = widths
        self.vocab_size = model_config.get_vocab_size()
        # Where vLLM looks for weights: the top level of the folder has none.
        self.allow_patterns_overrides = ["base/*.safetensors"]
        self.inputs: dict[Source, ModelInputs] = {}
        self.rows: Rows | None = None
        self.secondary_weights = [
            DefaultModelLoader.Source(
                str(folder),
                None,
                prefix="aligned.",
                allow_patterns_overrides=["aligned/*.safetensors"],
            )
        ]

    def model_of(self, source: Source) -> Any:
        """One of the two models."""
        return getattr(self, source)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The aligned model's embeddings."""
        embedded: Tensor = self.model_of("aligned").embed_input_ids(input_ids)
        return embedded

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Buffers for the tensors that one pipeline stage sends to the next."""
        return IntermediateTensors(
            {
                f"{source}.{name}": tensor
                for source in MODELS
                for name, tensor in self.model_of(source)
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
        """Both models' last hidden states side by side, [T, base's width + aligned's width]."""
        assert inputs_embeds is None, "a pair reads token ids"
        read = {
            source: self._read(source, input_ids, positions, intermediate_tensors)
            for source in MODELS
        }
        if get_pp_group().is_last_rank:
            return torch.cat([read[source]["hidden"] for source in MODELS], dim=-1)
        return IntermediateTensors(
            {f"{source}.{name}": t for source in MODELS for name, t in read[source].items()}
        )

    def _read(
        self,
        source: Source,
        ids: Tensor | None,
        positions: Tensor,
        carried: IntermediateTensors | None,
    ) -> dict[str, Tensor]:
        """A model's outputs for a batch of T tokens, [T, ...]; zeros for tokens that it skips."""
        inputs = self.inputs.get(source)
        mine = None
        if carried is not None:
            mine = {
                name.removeprefix(f"{source}."): tensor
                for name, tensor in carried.tensors.items()
                if name.startswith(f"{source}.")
            }
            if inputs is not None and inputs.kept is not None:
                mine = {name: tensor[inputs.kept] for name, tensor in mine.items()}
        if inputs is not None:
            ids, own = (inputs.ids if ids is not None else None), inputs.positions
        else:
            own = positions
        if not len(own):  # not every model accepts an empty batch
            return self._nothing(source, positions)
        out = self.model_of(source)(ids, own, None if mine is None else IntermediateTensors(mine))
        outputs = dict(out.tensors) if isinstance(out, IntermediateTensors) else {"hidden": out}
        if inputs is None or inputs.kept is None:
            return outputs
        return {name: _spread(t, inputs.kept, len(positions)) for name, t in outputs.items()}

    def _nothing(self, source: Source, positions: Tensor) -> dict[str, Tensor]:
        """The result of `_read` where a model skips all tokens of a batch."""
        model, size = self.model_of(source), len(positions)
        dtype = next(model.parameters()).dtype
        if get_pp_group().is_last_rank:
            width = self.widths[MODELS.index(source)]
            return {"hidden": torch.zeros(size, width, dtype=dtype, device=positions.device)}
        empty = model.make_empty_intermediate_tensors(size, dtype, positions.device)
        return dict(empty.tensors)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The rows that tokens are drawn from, float32 [N, V]; the aligned model's rows outside of
        real steps.
        """
        rows, self.rows = self.rows, None
        logits = [
            self.model_of(source).compute_logits(part.contiguous())
            for source, part in zip(MODELS, hidden_states.split(self.widths, dim=-1), strict=True)
        ]
        if any(part is None for part in logits):
            return None  # another rank of the tensor-parallel group has them
        base, aligned = (_to_common_vocab(part, self.vocab_size) for part in logits)
        return aligned if rows is None else rows.route(base, aligned)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Weights of the aligned model have the prefix ``aligned.``, those of the base none."""
        named = (
            (name if name.startswith("aligned.") else f"base.{name}", tensor)
            for name, tensor in weights
        )
        return set(AutoWeightsLoader(self).load_weights(named))


def _spread(read: Tensor, kept: Tensor, tokens: int) -> Tensor:
    return read.new_zeros(tokens, *read.shape[1:]).index_copy_(0, kept, read)


def _to_common_vocab(logits: Tensor, width: int) -> Tensor:
    """Raw logits on the common vocabulary, float32 [N, width]."""
    logits = logits[:, :width].float()
    missing = width - logits.shape[1]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits
