"""Two of vLLM's own models side by side; their rows are routed when logits are computed."""

from collections.abc import Iterable, Iterator
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

from baco.backends.vllm.adapter import Adapter
from baco.backends.vllm.folder import has_adapter, is_one_model
from baco.backends.vllm.one_model import Split, has_plain_attention, split_attention
from baco.source import MODELS, Source

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from baco.backends.vllm.model_inputs import ModelInputs
    from baco.backends.vllm.rows import Rows

# The tokens that a model reads: ids, positions, tensors of the previous pipeline stage.
Inputs = tuple[Tensor | None, Tensor, dict[str, Tensor] | None]


class BacoForCausalLM(nn.Module, SupportsPP):
    """A pair as vLLM loads it.

    Attributes:
        base, aligned: the models, any architecture that vLLM has. If they are one model under two
            prompts, or a model and its adapter, both are the same object: one forward reads both.
        split: where such a forward passes from the base prompt's tokens to the aligned prompt's;
            None for two models.
        adapter: what it adds to the aligned prompt's rows; None without.
        inputs: of each model for the next batch, where they are not the batch itself; set by the
            model runner before a forward.
        rows: routes the next rows of logits; None outside of real steps.
    """

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        folder = Path(model_config.model)

        def create(source: Source) -> tuple[nn.Module, int]:
            config = get_config(folder / source, model_config.trust_remote_code)
            own = f"{prefix}.{source}" if prefix else source
            model = init_vllm_registered_model(vllm_config, prefix=own, hf_config=config)
            return model, config.get_text_config().hidden_size

        self.base, width = create("base")
        adapted = has_adapter(folder)
        self.split = self.adapter = None
        if (adapted or is_one_model(folder)) and has_plain_attention(self.base):
            self.split = split_attention(self.base, vllm_config)
            self.aligned, self.widths = self.base, [width, width]
            if adapted:
                self.adapter = Adapter(self.base, folder / "aligned", self.split)
        elif adapted:
            raise ValueError(f"{type(self.base).__name__} in vLLM cannot have BACo's adapter")
        else:
            self.aligned, aligned_width = create("aligned")
            self.widths = [width, aligned_width]
        self.vocab_size = model_config.get_vocab_size()
        # Where vLLM looks for weights: the top level of the folder has none.
        self.allow_patterns_overrides = ["base/*.safetensors"]
        self.inputs: dict[Source, ModelInputs] = {}
        self.rows: Rows | None = None
        aligned_weights = DefaultModelLoader.Source(
            str(folder),
            None,
            prefix="aligned.",
            allow_patterns_overrides=["aligned/*.safetensors"],
        )
        alone = self.split is not None and not adapted
        self.secondary_weights = [] if alone else [aligned_weights]

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
        inputs = {
            source: self._inputs_of(source, input_ids, positions, intermediate_tensors)
            for source in MODELS
        }
        if self.split is None:
            outputs = {source: self._run(source, *inputs[source], positions) for source in MODELS}
        else:
            outputs = self._run_both(self.split, inputs)
        read = {source: self._placed(source, outputs[source], len(positions)) for source in MODELS}
        if get_pp_group().is_last_rank:
            return torch.cat([read[source]["hidden"] for source in MODELS], dim=-1)
        return IntermediateTensors(
            {f"{source}.{name}": t for source in MODELS for name, t in read[source].items()}
        )

    def _inputs_of(
        self,
        source: Source,
        ids: Tensor | None,
        positions: Tensor,
        carried: IntermediateTensors | None,
    ) -> Inputs:
        """Of a batch's T tokens, those that a model reads: ids, positions, and the tensors of the
        previous pipeline stage.
        """
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
        if inputs is None:
            return ids, positions, mine
        return (inputs.ids if ids is not None else None), inputs.positions, mine

    def _run(
        self,
        source: Source,
        ids: Tensor | None,
        own: Tensor,
        carried: dict[str, Tensor] | None,
        positions: Tensor,
    ) -> dict[str, Tensor]:
        """A model's outputs for the tokens that it reads, [T', …]."""
        if not len(own):  # not every model accepts an empty batch
            return self._nothing(source, positions[:0])
        return _forward(self.model_of(source), ids, own, carried)

    def _run_both(
        self, split: Split, inputs: dict[Source, Inputs]
    ) -> dict[Source, dict[str, Tensor]]:
        """The outputs for both prompts of one model, by one forward."""
        ids, positions, carried = zip(*(inputs[source] for source in MODELS), strict=True)
        counts = [len(own) for own in positions]
        split.tokens = counts[0]
        joined = None
        if carried[0] is not None:
            joined = {name: torch.cat([each[name] for each in carried]) for name in carried[0]}
        out = _forward(
            self.base, None if ids[0] is None else torch.cat(ids), torch.cat(positions), joined
        )
        parts = {name: tensor.split(counts) for name, tensor in out.items()}
        return {
            source: {name: part[index] for name, part in parts.items()}
            for index, source in enumerate(MODELS)
        }

    def _placed(self, source: Source, read: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Outputs for all of a batch's tokens, [T, …]: zeros for those that the model skips."""
        inputs = self.inputs.get(source)
        if inputs is None or inputs.kept is None:
            return read
        return {name: _spread(tensor, inputs.kept, tokens) for name, tensor in read.items()}

    def _nothing(self, source: Source, positions: Tensor) -> dict[str, Tensor]:
        """The result of `_run` for no tokens."""
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
        hidden = hidden_states.split(self.widths, dim=-1)
        if self.split is None:
            logits = [
                self.model_of(source).compute_logits(part.contiguous())
                for source, part in zip(MODELS, hidden, strict=True)
            ]
        else:
            both = self.model_of("base").compute_logits(torch.cat(hidden))
            logits = [None] if both is None else list(both.chunk(2))
        if any(part is None for part in logits):
            return None  # another rank of the tensor-parallel group has them
        base, aligned = (_to_common_vocab(part, self.vocab_size) for part in logits)
        return aligned if rows is None else rows.of(base, aligned)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Weights of the aligned model or its adapter have the prefix ``aligned.``, those of the
        base none.
        """
        added: list[tuple[str, Tensor]] = []

        def of_models() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                if not name.startswith("aligned."):
                    yield f"base.{name}", weight
                elif self.adapter is None:
                    yield name, weight
                else:
                    added.append((name.removeprefix("aligned."), weight))

        loaded = set(AutoWeightsLoader(self).load_weights(of_models()))
        if self.adapter is not None:
            loaded.update(f"adapter.{name}" for name in self.adapter.load_weights(added))
        return loaded


def _forward(
    model: Any, ids: Tensor | None, positions: Tensor, carried: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    out = model(ids, positions, None if carried is None else IntermediateTensors(carried))
    return dict(out.tensors) if isinstance(out, IntermediateTensors) else {"hidden": out}


def _spread(read: Tensor, kept: Tensor, tokens: int) -> Tensor:
    return read.new_zeros(tokens, *read.shape[1:]).index_copy_(0, kept, read)


def _to_common_vocab(logits: Tensor, width: int) -> Tensor:
    """Raw logits on the common vocabulary, float32 [N, width]."""
    logits = logits[:, :width].float()
    missing = width - logits.shape[1]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits
