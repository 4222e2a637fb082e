"""vLLM's model runner for a pair: additions before and after a step, not the step itself.

Before a forward it sets each model's inputs, and the tables that rows of logits are routed by.
After it, the sources are sent with the tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed import get_pp_group
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, replace_as
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.utils import AttentionGroup

from baco.backends.vllm.folder import read_pair
from baco.backends.vllm.model_inputs import ModelInputs, Step
from baco.backends.vllm.options import PairOptions
from baco.backends.vllm.rows import RoutingTables, Rows
from baco.backends.vllm.sources import OutputWithSources, Sources
from baco.backends.vllm.structures import allowed_at
from baco.backends.vllm.table import RequestTable
from baco.engine.draft import Positions
from baco.source import MODELS, Source

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Runner
else:
    _Runner = object


class PairRunner(_Runner):
    """A mixin to be placed before a model runner of vLLM (V1).

    Attributes:
        table: the requests that this worker knows.
        routing_tables: what rows of logits are routed by.
    """

    table: RequestTable
    routing_tables: RoutingTables
    intermediate_tensors: Any
    execute_model_state: Any
    _rows: Rows | None
    _groups: list[tuple[int, Source, AttentionGroup]]

    def init_pair(self) -> None:
        """Create the pair's state beside vLLM's own."""
        self.table = RequestTable(self.max_model_len, self.device)
        model = self.model_config
        pair = read_pair(Path(model.model), model.trust_remote_code)
        self.routing_tables = RoutingTables(
            pair.vocabulary.to(self.device),
            pair.banned.to(self.device),
            pair.base.unknown_ids.to(self.device),
            tuple(sorted(pair.end_ids)),
        )
        self._rows = None
        self._groups = []

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As in vLLM, with buffers for the tensors of the previous pipeline stage. vLLM creates
        these in a warm-up, which it skips on CPUs.
        """
        super().load_model(*args, **kwargs)
        if not get_pp_group().is_first_rank and self.intermediate_tensors is None:
            self.intermediate_tensors = self.get_model().make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.dtype, device=self.device
            )

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """As in vLLM, but layers with a sliding window keep all blocks. vLLM frees those behind the
        window by its own count, which the model with the shorter prompt has not reached.
        """
        specs: dict[str, Any] = super().get_kv_cache_spec()
        for layer, spec in specs.items():
            if type(spec) is SlidingWindowSpec:
                specs[layer] = replace_as(
                    spec,
                    FullAttentionSpec,
                    drop=("extra_retained_tokens",),
                    block_size=self.cache_config.block_size,
                )
        return specs

    # --- inputs -----------------------------------------------------------------------------------

    def _update_states(self, scheduler_output: "SchedulerOutput") -> Callable[[], Any] | None:
        for request in scheduler_output.finished_req_ids:
            self.table.drop(request)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            options = PairOptions.read(params.extra_args if params else None)
            seed = params.seed if params else None
            self.table.add(new.req_id, new.prompt_token_ids or [], options, seed)
        correct: Callable[[], Any] | None = super()._update_states(scheduler_output)
        return correct

    def _prepare_inputs(
        self, scheduler_output: "SchedulerOutput", num_scheduled_tokens: np.ndarray
    ) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        logits_indices, drafts, _ = prepared
        requests = list(self.input_batch.req_ids)
        count, tokens = len(requests), int(num_scheduled_tokens.sum())
        step = Step(
            requests,
            num_scheduled_tokens,
            self.input_batch.num_computed_tokens_cpu[:count],
            self.req_indices.gpu[:tokens].long(),
            self.input_ids.gpu[:tokens],
            self.positions[:tokens],
            self.seq_lens[:count],
        )
        slot = torch.tensor(self.table.slots(requests)).to(self.device, non_blocking=True)
        model = self.get_model()
        model.inputs = {source: ModelInputs.of(step, source, self.table, slot) for source in MODELS}
        rows = self._rows_to_route(step, slot, logits_indices, drafts)
        rows.structured = scheduler_output.has_structured_output_requests
        model.rows = self._rows = rows
        return prepared

    def _rows_to_route(
        self, step: Step, slot: torch.Tensor, logits_indices: torch.Tensor, drafts: Any
    ) -> Rows:
        count = len(step.requests)
        counts = [1] * count if drafts is None else [n + 1 for n in drafts.num_draft_tokens]
        rules, rule = self.table.rules(step.requests)
        heads = np.cumsum([0, *counts[:-1]])
        return Rows(
            self.routing_tables,
            self.table,
            slot,
            rules,
            torch.tensor(rule).to(self.device, non_blocking=True),
            Positions.of(counts, torch.empty(0, device=self.device)),
            torch.from_numpy(heads).to(self.device, non_blocking=True),
            step.ids[logits_indices].long(),
            step.positions[logits_indices],
            self.discard_request_mask.gpu[:count],
        )

    def initialize_metadata_builders(
        self, kv_cache_config: Any, kernel_block_sizes: list[int]
    ) -> None:
        """Also create attention groups of one model's layers: inputs differ between the models."""
        super().initialize_metadata_builders(kv_cache_config, kernel_block_sizes)
        self._groups = []
        for gid, groups in enumerate(self.attn_groups):
            for group in groups:
                for source in MODELS:
                    layers = [name for name in group.layer_names if name.startswith(f"{source}.")]
                    if layers:
                        own = AttentionGroup(group.backend, layers, group.kv_cache_spec, gid)
                        own.create_metadata_builders(
                            self.vllm_config, self.device, kernel_block_sizes[gid]
                        )
                        self._groups.append((gid, source, own))

    def _shifted_inputs(self) -> dict[Source, ModelInputs]:
        """The inputs that differ from the step's own; none while memory is measured."""
        inputs: dict[Source, ModelInputs] = getattr(self.get_model(), "inputs", {})
        return {source: own for source, own in inputs.items() if own.shifted and len(own.counts)}

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> Any:
        by_group, by_layer = super()._get_slot_mappings(*args, **kwargs)
        shifted = self._shifted_inputs()
        for gid, source, group in self._groups:
            if source in shifted:
                slots = self._slots(gid, shifted[source])
                by_layer.update(dict.fromkeys(group.layer_names, slots))
        return by_group, by_layer

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        metadata, common = super()._build_attention_metadata(*args, **kwargs)
        shifted = self._shifted_inputs()
        for gid, source, group in self._groups:
            if source in shifted:
                inputs = shifted[source]
                blocks = self._blocks(gid)
                own = inputs.metadata(CommonAttentionMetadata, blocks, self._slots(gid, inputs))
                built = group.build_metadata(own)
                metadata.update(dict.fromkeys(group.layer_names, built))
        return metadata, common

    def _blocks(self, gid: int) -> torch.Tensor:
        table = self.input_batch.block_table[gid]
        blocks: torch.Tensor = table.get_device_tensor(self.input_batch.num_reqs)
        return blocks

    def _slots(self, gid: int, inputs: ModelInputs) -> torch.Tensor:
        return inputs.slots(self._blocks(gid), self.input_batch.block_table[gid].block_size)

    # --- outputs ----------------------------------------------------------------------------------

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().execute_model(*args, **kwargs)
        finally:
            self.get_model().inputs = {}

    def sample_tokens(self, grammar_output: "GrammarOutput | None") -> Any:
        rows, self._rows = self._rows, None
        if rows is not None and rows.held is not None:
            # Routed here, where the masks are known, and masked with that.
            self._route_held(rows, grammar_output)
            grammar_output = None
        output = super().sample_tokens(grammar_output)
        if rows is None or rows.source is None:
            return output
        requests = list(self.input_batch.req_ids)
        sources = Sources.of(requests, rows.layout.counts, rows.source)
        if isinstance(output, AsyncModelRunnerOutput):
            return OutputWithSources(output, sources)
        if isinstance(output, ModelRunnerOutput) and output.req_ids:
            sources.put(output)
        return output

    def _route_held(self, rows: Rows, grammar_output: "GrammarOutput | None") -> None:
        state, tables = self.execute_model_state, self.routing_tables
        allowed = allowed_at(
            grammar_output,
            state.scheduler_output,
            list(self.input_batch.req_ids),
            tables.vocabulary.size,
            self.device,
        )
        self.execute_model_state = state._replace(logits=rows.route_held(allowed))
