"""Fields that clients of other servers send, and how this server treats each.

A value is accepted if ignoring it changes nothing that the client asks for, and refused otherwise.
``null`` means: not given. `docs/serve.md` has these tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

# All values are accepted: the field changes no answer.
ANY: Final = None


@dataclass(frozen=True, slots=True)
class ForeignField:
    """Fields of other servers that are treated alike.

    Attributes:
        names: of the fields.
        accepted: the values without effect here, or ANY.
        reason: why these have no effect and others are refused; ends a message that begins with
            the field's name and value.
    """

    names: str
    accepted: tuple[Any, ...] | None
    reason: str

    def accepts(self, value: Any) -> bool:
        """Whether a value is accepted."""
        if value is None or self.accepted is None:
            return True
        return any(_equal(value, neutral) for neutral in self.accepted)


def _equal(value: Any, neutral: Any) -> bool:
    """Equality as in JSON: 1 equals 1.0, but not true."""
    if isinstance(neutral, bool) or isinstance(value, bool):
        return value is neutral
    if isinstance(neutral, int):
        return isinstance(value, int | float) and value == neutral
    return type(value) is type(neutral) and bool(value == neutral)


_NO_SAMPLER = "this server truncates by top_k, top_p and min_p, and by what samplers names"
_NO_GRAMMAR = "give response_format or structured_outputs"
_NO_SEARCH = "answers are drawn, not searched for"
_NO_TOOLS = "no tools are called"
_TEXT_ALONE = "both models read and write text alone"
_BY_TEMPLATE = "the chat template decides; give it chat_template_kwargs"
_NO_ENTRY = "replies have no such entry"
_BY_BIAS = "give logit_bias"
_ELSEWHERE = "this belongs to another server's machinery"

# Of structured_outputs.
STRUCTURED = (
    ForeignField(
        "disable_any_whitespace disable_additional_properties",
        ANY,
        "JSON is written on one line, and a schema says which properties are allowed",
    ),
    ForeignField("disable_fallback", ANY, "there is one compiler of structures"),
)
# Of both endpoints.
COMMON = (
    # Any value.
    ForeignField(
        "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_options "
        "prompt_cache_retention id chat_id session_id request_id rid extra_key priority",
        ANY,
        "names the request or its sender, or says how it is billed, cached or put in order",
    ),
    ForeignField(
        "cache_prompt id_slot n_keep n_discard num_ctx truncation_length truncation_side "
        "keep_alive speculative_ngram stream_interval timings_per_token return_progress "
        "return_mm_kwargs spaces_between_special_tokens routed_experts_start_len "
        "routed_experts_prompt_start "
        "routed_dp_rank data_parallel_rank guided_decoding_backend guided_whitespace_pattern "
        "api_type api_server legacy_api",
        ANY,
        "says how another server is to work; no answer changes",
    ),
    ForeignField(
        "dynatemp_exponent dynatemp_low dynatemp_high dynatemp_min dynatemp_max smoothing_curve "
        "xtc_threshold mirostat_tau mirostat_eta repeat_last_n rep_pen_slope adaptive_decay",
        ANY,
        "shapes a sampler of another server whose own switch is refused where it is on",
    ),
    ForeignField(
        "penalize_nl",
        ANY,
        "line breaks count like other tokens for repetition_penalty, as in llama.cpp",
    ),
    # Values that say what holds anyway.
    ForeignField("skip_special_tokens", (True,), "special tokens are never part of a text"),
    ForeignField(
        "include_stop_str_in_output no_stop_trim",
        (False,),
        "a stop string is cut off the answer",
    ),
    ForeignField(
        "ignore_eos ban_eos_token", (False,), "an end token of either model ends the answer"
    ),
    ForeignField(
        "min_tokens min_length minimum_message_content_tokens",
        (0,),
        "an answer may be as short as the models make it",
    ),
    ForeignField("stop_token_ids", ([],), "an answer stops at strings (stop) and at end tokens"),
    ForeignField("stop_regex", ("", []), "an answer stops at strings (stop) and at end tokens"),
    ForeignField("use_beam_search early_stopping", (False,), _NO_SEARCH),
    ForeignField("num_beams length_penalty", (1,), _NO_SEARCH),
    ForeignField("penalty_alpha", (0,), _NO_SEARCH),
    ForeignField("do_sample", (True,), "give temperature 0 for the most likely token"),
    ForeignField(
        "repeat_penalty rep_pen encoder_repetition_penalty",
        (1,),
        "give repetition_penalty, with repetition_window where it is not to count all",
    ),
    ForeignField(
        "repetition_decay no_repeat_ngram_size",
        (0,),
        "give repetition_penalty, presence_penalty or frequency_penalty",
    ),
    ForeignField("repetition_detection", ({},), "give repetition_penalty or frequency_penalty"),
    ForeignField("typical_p typical typ_p tfs tfs_z", (1,), _NO_SAMPLER),
    ForeignField(
        "top_a epsilon_cutoff eta_cutoff dynatemp_range smoothing_factor mirostat mirostat_mode "
        "xtc_probability skew max_tokens_second",
        (0,),
        _NO_SAMPLER,
    ),
    ForeignField("top_n_sigma nsigma adaptive_target", (0, -1), _NO_SAMPLER),
    ForeignField("dynamic_temperature temperature_last", (False,), _NO_SAMPLER),
    ForeignField("sampler_priority sampler_order", ([],), _NO_SAMPLER),
    ForeignField("guidance_scale", (1,), "no answer is guided by a second prompt"),
    ForeignField("negative_prompt", ("",), "no answer is guided by a second prompt"),
    ForeignField(
        "grammar grammar_string json_schema regex ebnf guided_json guided_regex guided_choice "
        "guided_grammar",
        ("", [], {}),
        _NO_GRAMMAR,
    ),
    ForeignField("grammar_lazy", (False,), _NO_GRAMMAR),
    ForeignField(
        "bad_words banned_strings banned_tokens custom_token_bans logits_processors",
        ([], ""),
        _BY_BIAS,
    ),
    ForeignField("allowed_token_ids", (), _BY_BIAS),
    ForeignField("add_bos_token", (True,), "each model's own tokenizer opens the text"),
    ForeignField(
        "truncate_prompt_tokens",
        (),
        "a prompt that does not fit is refused, not cut",
    ),
    ForeignField(
        "prompt_logprobs logprob_token_ids",
        (),
        "give echo with logprobs to /v1/completions for the log-probabilities of a prompt",
    ),
    ForeignField(
        "return_hidden_states return_routed_experts return_cached_tokens_details return_tokens "
        "return_prompt_token_ids return_meta_info return_token_offsets return_prompt_text "
        "post_sampling_probs verbose",
        (False,),
        _NO_ENTRY,
    ),
    ForeignField("n_probs", (0,), "give logprobs"),
    ForeignField("response_fields", ([],), _NO_ENTRY),
    ForeignField("n_indent t_max_predict_ms", (0, -1), _ELSEWHERE),
    ForeignField("watermarking", (False,), _ELSEWHERE),
    ForeignField(
        "lora lora_path", ([], ""), "the pair that is served answers; load an adapter with it"
    ),
    ForeignField(
        "vllm_xargs custom_params session_params kv_transfer_params ec_transfer_params "
        "media_io_kwargs mm_processor_kwargs images_config",
        ({},),
        _ELSEWHERE,
    ),
    ForeignField(
        "custom_logit_processor bootstrap_host bootstrap_port bootstrap_room input_ids "
        "prompt_embeds moderation",
        (),
        _ELSEWHERE,
    ),
)

# Of conversations.
CHAT = (
    ForeignField("parallel_tool_calls parse_tool_calls", ANY, _NO_TOOLS),
    # A model may always answer without a tool, unless tool_choice says otherwise.
    ForeignField("tools functions", ANY, _NO_TOOLS),
    ForeignField("tool_choice function_call", ("none", "auto"), _NO_TOOLS),
    ForeignField("web_search_options", (), _NO_TOOLS),
    ForeignField("modalities", (["text"],), _TEXT_ALONE),
    ForeignField("audio", (), _TEXT_ALONE),
    ForeignField("prediction", (), "the server drafts by itself"),
    ForeignField("reasoning_effort reasoning thinking enable_thinking task", (), _BY_TEMPLATE),
    ForeignField("thinking_token_budget reasoning_budget", (-1,), _BY_TEMPLATE),
    ForeignField("include_reasoning separate_reasoning stream_reasoning", (True,), _BY_TEMPLATE),
    ForeignField("reasoning_format", ("auto",), _BY_TEMPLATE),
    ForeignField("verbosity", (), "ask for it in the prompt"),
    ForeignField("chat_template", (), "the operator of the server gives the template"),
    ForeignField("documents", ([],), "put them into the messages"),
    ForeignField("echo", (False,), "echo belongs to /v1/completions"),
    ForeignField(
        "return_token_ids return_tokens_as_token_ids",
        (False,),
        "/v1/completions returns token ids",
    ),
    ForeignField("add_special_tokens", (False,), "the chat template writes them"),
)

# Of texts to be continued.
COMPLETION = (
    ForeignField("suffix", ("",), "texts are only continued"),
    ForeignField("add_special_tokens", (True,), "each model's own tokenizer opens the text"),
    ForeignField("chat_template_kwargs", ({},), "texts are read as they are; give messages"),
    ForeignField(
        "continue_final_message add_generation_prompt",
        (False,),
        "texts are read as they are; give messages",
    ),
)

# Of a message of a conversation.
MESSAGE = (
    ForeignField(
        "id name cache_control reasoning reasoning_content reasoning_details thinking "
        "thinking_blocks provider_specific_fields created_at createdAt timestamp weight",
        ANY,
        "no part of what the models read",
    ),
    ForeignField("tool_calls", ([],), _NO_TOOLS),
    ForeignField("function_call tool_call_id", (), _NO_TOOLS),
    ForeignField("audio", (), _TEXT_ALONE),
    ForeignField("images", ([],), _TEXT_ALONE),
    ForeignField("annotations", ([],), "no annotations are read"),
    ForeignField("refusal parsed", (), "a message is its content"),
)

# Of a part of a message.
PART = (ForeignField("id cache_control", ANY, "no part of what the models read"),)

# Of stream_options.
STREAM = (
    ForeignField("include_obfuscation", ANY, "streams are not padded"),
    ForeignField("continuous_usage_stats", (False,), "a stream's last chunk has the usage"),
)

# Other names of a field, as other servers have them.
ALIASES = {
    "dry_penalty_last_n": "dry_window",
    "dry_sequence_breakers": "dry_breakers",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "rep_pen_range": "repetition_window",
    "repetition_penalty_range": "repetition_window",
    "sampler_seed": "seed",
    "stopping_strings": "stop",
}


def by_name(*tables: tuple[ForeignField, ...]) -> Mapping[str, ForeignField]:
    """The entries of tables, by each field's name."""
    return {name: entry for table in tables for entry in table for name in entry.names.split()}
