"""Fields that clients of other servers send, and what becomes of each.

A field is accepted where ignoring it changes nothing that was asked for, and refused elsewhere: an
answer must be what was asked for. ``null`` always means nothing. `docs/serve.md` has these tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

# Every value is accepted: the field changes no answer.
ANY: Final = None


@dataclass(frozen=True, slots=True)
class Foreign:
    """Fields of other servers that share a fate.

    Attributes:
        names: of the fields.
        accepted: the values that mean nothing here, or ANY.
        reason: why these mean nothing, and why all others are refused, as the end of a sentence
            that begins with the field's name and value.
    """

    names: str
    accepted: tuple[Any, ...] | None
    reason: str

    def accepts(self, value: Any) -> bool:
        """Does a value mean nothing here?"""
        if value is None or self.accepted is None:
            return True
        return any(_equal(value, neutral) for neutral in self.accepted)


def _equal(value: Any, neutral: Any) -> bool:
    """Equal as in JSON, where 1 is 1.0, but not true."""
    if isinstance(neutral, bool) or isinstance(value, bool):
        return value is neutral
    if isinstance(neutral, int):
        return isinstance(value, int | float) and value == neutral
    return type(value) is type(neutral) and bool(value == neutral)


_NO_SAMPLER = "this server truncates by top_k, top_p and min_p, and by what samplers names"
_NO_GRAMMAR = "no answer is held to a format or a grammar; ask for the format in the prompt"
_NO_SEARCH = "answers are drawn, not searched for"
_NO_TOOLS = "no tools are called"
_TEXT_ALONE = "both models read and write text alone"
_BY_TEMPLATE = "the chat template decides; give it chat_template_kwargs"
_NOT_TOLD = "replies have no such entry"
_BY_BIAS = "give logit_bias"
_ELSEWHERE = "this belongs to another server's machinery"

# Of both endpoints.
COMMON = (
    # Accepted whatever they are.
    Foreign(
        "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_options "
        "prompt_cache_retention id chat_id session_id request_id rid extra_key cache_salt priority",
        ANY,
        "names the request or its sender, or says how it is billed, cached or put in order",
    ),
    Foreign(
        "cache_prompt id_slot n_keep n_discard num_ctx truncation_length truncation_side "
        "keep_alive speculative_ngram stream_interval timings_per_token return_progress "
        "return_mm_kwargs spaces_between_special_tokens routed_experts_start_len "
        "routed_experts_prompt_start "
        "routed_dp_rank data_parallel_rank guided_decoding_backend guided_whitespace_pattern "
        "api_type api_server legacy_api",
        ANY,
        "says how another server is to work; no answer changes",
    ),
    Foreign(
        "dynatemp_exponent dynatemp_low dynatemp_high dynatemp_min dynatemp_max smoothing_curve "
        "dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_threshold "
        "mirostat_tau mirostat_eta repeat_last_n rep_pen_slope adaptive_decay",
        ANY,
        "shapes a sampler of another server whose own switch is refused where it is on",
    ),
    # Accepted where they say what holds anyway.
    Foreign("skip_special_tokens", (True,), "special tokens are never part of a text"),
    Foreign(
        "include_stop_str_in_output no_stop_trim",
        (False,),
        "a stop string is cut off the answer",
    ),
    Foreign("ignore_eos ban_eos_token", (False,), "an end token of either model ends the answer"),
    Foreign(
        "min_tokens min_length minimum_message_content_tokens",
        (0,),
        "an answer may be as short as the models make it",
    ),
    Foreign("stop_token_ids", ([],), "an answer stops at strings (stop) and at end tokens"),
    Foreign("stop_regex", ("", []), "an answer stops at strings (stop) and at end tokens"),
    Foreign("use_beam_search early_stopping", (False,), _NO_SEARCH),
    Foreign("num_beams length_penalty", (1,), _NO_SEARCH),
    Foreign("penalty_alpha", (0,), _NO_SEARCH),
    Foreign("do_sample", (True,), "give temperature 0 for the most likely token"),
    Foreign(
        "repeat_penalty rep_pen encoder_repetition_penalty",
        (1,),
        "give repetition_penalty, which counts the whole prompt and answer",
    ),
    Foreign(
        "repetition_penalty_range rep_pen_range",
        (0, -1),
        "repetition_penalty counts the whole prompt and answer",
    ),
    Foreign(
        "repetition_decay no_repeat_ngram_size",
        (0,),
        "give repetition_penalty, presence_penalty or frequency_penalty",
    ),
    Foreign("repetition_detection", ({},), "give repetition_penalty or frequency_penalty"),
    Foreign("typical_p typical typ_p tfs tfs_z", (1,), _NO_SAMPLER),
    Foreign(
        "top_a epsilon_cutoff eta_cutoff dynatemp_range smoothing_factor mirostat mirostat_mode "
        "dry_multiplier xtc_probability skew max_tokens_second",
        (0,),
        _NO_SAMPLER,
    ),
    Foreign("top_n_sigma nsigma adaptive_target", (0, -1), _NO_SAMPLER),
    Foreign("dynamic_temperature temperature_last", (False,), _NO_SAMPLER),
    Foreign("sampler_priority sampler_order", ([],), _NO_SAMPLER),
    Foreign("guidance_scale", (1,), "no answer is guided by a second prompt"),
    Foreign("negative_prompt", ("",), "no answer is guided by a second prompt"),
    Foreign("response_format", ({"type": "text"},), _NO_GRAMMAR),
    Foreign(
        "grammar grammar_string json_schema regex ebnf guided_json guided_regex guided_choice "
        "guided_grammar structured_outputs",
        ("", [], {}),
        _NO_GRAMMAR,
    ),
    Foreign("grammar_lazy", (False,), _NO_GRAMMAR),
    Foreign(
        "bad_words banned_strings custom_token_bans logits_processors",
        ([], ""),
        _BY_BIAS,
    ),
    Foreign("allowed_token_ids", (), _BY_BIAS),
    Foreign("add_bos_token", (True,), "each model's own tokenizer opens the text"),
    Foreign(
        "truncate_prompt_tokens",
        (),
        "a prompt that does not fit is refused, not cut",
    ),
    Foreign(
        "prompt_logprobs logprob_token_ids",
        (),
        "give echo with logprobs to /v1/completions for the log-probabilities of a prompt",
    ),
    Foreign(
        "return_hidden_states return_routed_experts return_cached_tokens_details return_tokens "
        "return_prompt_token_ids return_meta_info return_token_offsets return_prompt_text "
        "post_sampling_probs verbose",
        (False,),
        _NOT_TOLD,
    ),
    Foreign("n_probs", (0,), "give logprobs"),
    Foreign("response_fields", ([],), _NOT_TOLD),
    Foreign("n_indent t_max_predict_ms", (0, -1), _ELSEWHERE),
    Foreign("watermarking", (False,), _ELSEWHERE),
    Foreign("lora lora_path", ([], ""), "the pair that is served answers; load an adapter with it"),
    Foreign(
        "vllm_xargs custom_params session_params kv_transfer_params ec_transfer_params "
        "media_io_kwargs mm_processor_kwargs images_config",
        ({},),
        _ELSEWHERE,
    ),
    Foreign(
        "custom_logit_processor bootstrap_host bootstrap_port bootstrap_room input_ids "
        "prompt_embeds moderation",
        (),
        _ELSEWHERE,
    ),
)

# Of conversations.
CHAT = (
    Foreign("parallel_tool_calls parse_tool_calls", ANY, _NO_TOOLS),
    Foreign("tools functions", ([],), _NO_TOOLS),
    Foreign("tool_choice function_call", ("none", "auto"), _NO_TOOLS),
    Foreign("web_search_options", (), _NO_TOOLS),
    Foreign("modalities", (["text"],), _TEXT_ALONE),
    Foreign("audio", (), _TEXT_ALONE),
    Foreign("prediction", (), "the server drafts by itself"),
    Foreign("reasoning_effort reasoning thinking enable_thinking task", (), _BY_TEMPLATE),
    Foreign("thinking_token_budget reasoning_budget", (-1,), _BY_TEMPLATE),
    Foreign("include_reasoning separate_reasoning stream_reasoning", (True,), _BY_TEMPLATE),
    Foreign("reasoning_format", ("auto",), _BY_TEMPLATE),
    Foreign("verbosity", (), "ask for it in the prompt"),
    Foreign("chat_template", (), "whoever runs the server gives the template"),
    Foreign("documents", ([],), "put them into the messages"),
    Foreign("echo", (False,), "echo belongs to /v1/completions"),
    Foreign(
        "return_token_ids return_tokens_as_token_ids",
        (False,),
        "token ids are told at /v1/completions",
    ),
    Foreign("add_special_tokens", (False,), "the chat template writes them"),
)

# Of texts to be continued.
COMPLETION = (
    Foreign("suffix", ("",), "texts are only continued"),
    Foreign("add_special_tokens", (True,), "each model's own tokenizer opens the text"),
    Foreign("chat_template_kwargs", ({},), "texts are read as they are; give messages"),
    Foreign(
        "continue_final_message add_generation_prompt",
        (False,),
        "texts are read as they are; give messages",
    ),
)

# Of a message of a conversation.
MESSAGE = (
    Foreign(
        "id name cache_control reasoning reasoning_content reasoning_details thinking "
        "thinking_blocks provider_specific_fields created_at createdAt timestamp weight",
        ANY,
        "no part of what the models read",
    ),
    Foreign("tool_calls", ([],), _NO_TOOLS),
    Foreign("function_call tool_call_id", (), _NO_TOOLS),
    Foreign("audio", (), _TEXT_ALONE),
    Foreign("images", ([],), _TEXT_ALONE),
    Foreign("annotations", ([],), "no annotations are read"),
    Foreign("refusal parsed", (), "a message is its content"),
)

# Of a part of a message.
PART = (Foreign("id cache_control", ANY, "no part of what the models read"),)

# Of stream_options.
STREAM = (
    Foreign("include_obfuscation", ANY, "streams are not padded"),
    Foreign("continuous_usage_stats", (False,), "a stream's last chunk tells the usage"),
)

# Other names of a field, as other servers have them.
ALIASES = {
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "sampler_seed": "seed",
    "stopping_strings": "stop",
}


def by_name(*tables: tuple[Foreign, ...]) -> Mapping[str, Foreign]:
    """The entries of tables, by each field's name."""
    return {name: entry for table in tables for entry in table for name in entry.names.split()}
