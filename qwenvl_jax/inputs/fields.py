"""Keys of requests, messages, items and records that programs write and that this package does not read: one table.

A key is passed over where its value changes nothing here. Any other value is refused by name, because it would change
the answer. The keys are those of OpenAI's chat completions, and of the servers that extend them (vLLM, SGLang).
"""

from collections.abc import Callable, Mapping
from typing import Any

from qwenvl_jax.errors import InputError, shown


def anything(value) -> bool:
    return True


def nothing(value) -> bool:
    return False


def only(*values) -> Callable[[Any], bool]:
    """Equal to one of these; true is not 1."""
    return lambda value: any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)


def _no_bias(value) -> bool:
    return value == [] or (isinstance(value, Mapping) and all(only(0)(bias) for bias in value.values()))


REQUEST: dict[str, Callable[[Any], bool]] = {
    # Who asks, how it is billed, cached, queued and sent: the answer is the same.
    **dict.fromkeys(("model", "messages", "stream", "stream_options", "user", "metadata", "store"), anything),
    **dict.fromkeys(("service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), anything),
    **dict.fromkeys(("prediction", "priority", "request_id", "rid", "cache_salt", "return_token_ids"), anything),
    **dict.fromkeys(("include_reasoning", "separate_reasoning", "stream_reasoning"), anything),
    **dict.fromkeys(("incremental_output", "timeout", "cache_prompt", "keep_alive", "session_id"), anything),
    **dict.fromkeys(("provider", "extra_headers", "extra_query", "usage", "use_cache", "routing_key"), anything),
    # Only of use with another key, which is refused, or with another tokenizer.
    **dict.fromkeys(("guided_decoding_backend", "guided_whitespace_pattern", "length_penalty"), anything),
    **dict.fromkeys(("spaces_between_special_tokens", "add_special_tokens"), anything),
    "chat_template_content_format": only("auto", "openai"),
    # How many answers, and what comes with them.
    **dict.fromkeys(("n", "best_of", "num_return_sequences", "num_beams"), only(1)),
    **dict.fromkeys(("return_hidden_states", "return_routed_experts", "background"), only(False)),
    "detokenize": only(True),
    "result_format": only("message"),
    "suffix": only(""),
    **dict.fromkeys(("logprobs", "echo", "use_beam_search", "return_tokens_as_token_ids"), only(False)),
    **dict.fromkeys(("include_stop_str_in_output", "no_stop_trim", "continue_final_message"), only(False)),
    **dict.fromkeys(("top_logprobs", "min_tokens"), only(0)),
    "add_generation_prompt": only(True),
    "modalities": only(["text"]),
    **dict.fromkeys(("prompt_logprobs", "audio", "truncate_prompt_tokens"), nothing),
    # What may be in the answer.
    "logit_bias": _no_bias,
    "response_format": only({"type": "text"}),
    "verbosity": only("medium"),
    "reasoning_effort": only("none", "minimal", "low"),  # the model does not reason
    "thinking": only({"type": "disabled"}),
    **dict.fromkeys(("enable_thinking", "enable_search"), only(False)),
    "thinking_budget": only(0),
    **dict.fromkeys(("typical_p", "repeat_penalty", "tfs_z"), only(1)),
    **dict.fromkeys(("no_repeat_ngram_size", "mirostat", "top_a"), only(0)),
    **dict.fromkeys(("bad_words", "logits_processors", "allowed_token_ids"), only([])),
    **dict.fromkeys(("structured_outputs", "guided_json", "json_schema"), only({}, "")),
    **dict.fromkeys(("guided_regex", "guided_choice", "guided_grammar", "regex", "ebnf", "grammar"), only("", [])),
    "thinking_token_budget": nothing,
    # What the model is shown.
    "tool_choice": only("auto"),
    "parallel_tool_calls": only(True),
    "functions": only([]),
    "function_call": only("auto", "none"),
    **dict.fromkeys(("documents", "plugins", "transforms"), only([])),
    **dict.fromkeys(("media_io_kwargs", "vllm_xargs", "kv_transfer_params", "extra_body"), only({})),
    "vl_high_resolution_images": only(False),
    "truncation": only("disabled", False),
    **dict.fromkeys(("chat_template", "web_search_options", "lora_path"), nothing),
}
GREEDY = {"do_sample": only(False)}  # with a temperature of 0
SAMPLED = {"do_sample": only(True)}  # with another temperature
WITHOUT_TOOLS = {"tool_choice": only("auto", "none"), "parallel_tool_calls": only(True, False)}
PROCESSOR_KWARGS = {
    "use_fast": anything,
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), only(True)),
}  # mm_processor_kwargs, beside the options of pictures and clips
TEMPLATE_KWARGS = {"add_generation_prompt": only(True), "enable_thinking": only(False)}  # chat_template_kwargs
MESSAGE = {
    **dict.fromkeys(("id", "annotations", "cache_control", "timestamp", "created", "created_at"), anything),
    **dict.fromkeys(("date", "time", "metadata", "model", "status", "finish_reason", "parsed"), anything),
    **dict.fromkeys(("refusal", "reasoning", "reasoning_content"), only("")),
    **dict.fromkeys(("prefix", "partial"), only(False)),
    "type": only("message"),
    **dict.fromkeys(("audio", "function_call"), only({})),
}
ITEM = dict.fromkeys(("id", "uuid", "annotations", "cache_control", "logprobs"), anything)
URL = {"format": anything}  # beside "url" and "detail"


# Of generation_config.json, by transformers 4.51 to 5.24. The first three lines are obeyed (`infer.options`).
GENERATION: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"), anything),
    **dict.fromkeys(("max_new_tokens", "max_length", "eos_token_id", "stop_strings"), anything),
    "skip_special_tokens": anything,  # ours
    # Who wrote it, how it is computed, and what comes with the answer.
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"), anything),
    **dict.fromkeys(("_from_model_config", "_commit_hash", "_name_or_path", "dtype", "torch_dtype"), anything),
    **dict.fromkeys(("attn_implementation", "trust_remote_code", "use_cache", "cache_config"), anything),
    **dict.fromkeys(("max_cache_len", "return_legacy_cache", "prefill_chunk_size", "low_memory"), anything),
    **dict.fromkeys(("compile_config", "disable_compile", "continuous_batching_config"), anything),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), anything),
    **dict.fromkeys(("return_dict_in_generate", "use_model_defaults"), anything),
    "cache_implementation": lambda value: value != "quantized",
    # The large model checks the drafts of a smaller one, so the distribution stays.
    **dict.fromkeys(("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"), anything),
    **dict.fromkeys(("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"), anything),
    **dict.fromkeys(("assistant_ensemble_weight", "speculation_type", "target_lookbehind", "use_mtp"), anything),
    **dict.fromkeys(("prompt_lookup_num_tokens", "max_matching_ngram_size"), anything),
    # Only of use with num_beams, or before a softmax.
    **dict.fromkeys(("length_penalty", "early_stopping", "diversity_penalty", "renormalize_logits"), anything),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), only(1)),
    **dict.fromkeys(("typical_p", "guidance_scale", "encoder_repetition_penalty"), only(1)),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size"), only(0)),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"), only(0)),
    **dict.fromkeys(("remove_invalid_values", "token_healing"), only(False)),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "constraints", "forced_decoder_ids"), only([])),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), only([])),
    **dict.fromkeys(("sequence_bias", "watermarking_config", "generation_kwargs"), only({}, [])),
}  # any other: named


def unsupported(generation: Mapping) -> str:
    """The settings of generation_config.json that would change the answers and are not obeyed, in words; or ""."""
    given = {key: value for key, value in generation.items() if value is not None}
    return ", ".join(f"{key} {shown(value)}" for key, value in given.items() if not GENERATION.get(key, nothing)(value))


def read_keys(given: Mapping, table: Mapping[str, Callable[[Any], bool]], where: str) -> dict:
    """`given` without the keys of the table, which change nothing. Raises InputError for one that would."""
    for key, value in given.items():
        if key in table and not table[key](value):
            raise InputError(f"{where}: {key} is {shown(value)}, which would change the answer; it is not supported")
    return {key: value for key, value in given.items() if key not in table}


# ------------------------------------------------------------------------------------------ records


def without_nulls(value, depth: int = 0):
    """The value without keys that are None, in lists too: a table gives every row the keys of all rows.

    JSON text within it stays as it is, and so does what lies deeper than a hundred levels.
    """
    if depth > 100:
        return value
    if isinstance(value, Mapping):
        return {k: without_nulls(v, depth + 1) for k, v in value.items() if v is not None}
    return [without_nulls(v, depth + 1) for v in value] if isinstance(value, list) else value


def present(value: Mapping) -> dict:
    """Without keys that are None or empty: dataset rows have every key of every row."""
    return {
        k: v for k, v in value.items() if v is not None and not (isinstance(v, str | list | tuple | Mapping) and not v)
    }


# Keys that describe a record. They are passed over.
HARMLESS = frozenset(
    "id _id idx index uid uuid guid name key qid pid question_id image_id video_id prompt_id sample_id item_id "
    "conversation_id conv_id source sources dataset dataset_name data_source subset config split category categories "
    "subcategory topic domain type subject difficulty level tag tags keywords language lang license author "
    "title metadata meta info extra_info comment comments note notes model model_name generator annotator created "
    "created_at date time timestamp updated_at version hash md5 sha256 width height image_width image_height "
    "image_size num_tokens token_count length channel line score_chosen score_rejected chosen_score rejected_score "
    "chosen_model rejected_model margin question_type answer_type ds_name origin_dataset origin original_id "
    "data_id task_type parallel_tool_calls __index_level_0__ __key__ __url__".split()
)
# Keys that may hold a record's picture or clip, and those of them that do if their value is the name of one.
MAYBE_MEDIA = frozenset(
    "image_path image_paths image_file image_files image_name image_url image_urls img img_path img_url picture photo "
    "video_path video_file video_name video_url file file_name filename url path".split()
)
MEDIA_BY_VALUE = frozenset("file file_name filename url path".split())
HARMLESS_IN_MESSAGES = frozenset(
    "id _id idx index uid uuid source created created_at date time timestamp metadata model hash turn turn_id "
    "message_id parent_id".split()
)
_TOKENS = "tokens of another program cannot be checked against this model's; give the messages that they came from"
REFUSED = {
    "text": "raw text has no turns, and only the assistant's messages are trained on; write it as 'messages'",
    "segments": "parts of a text without turns cannot be trained on; write them as 'messages', with \"weight\": 0 for "
    "what is not to be learnt",
    "input_ids": _TOKENS,
    "token_ids": _TOKENS,
    "labels": "labels of tokens or steps are not trained on; write what is to be learnt as 'messages'",
    "completions": "rewards of steps are not trained on; write one 'completion'",
    "label": "records with a label (KTO, classification) are not trained on; keep the good ones, or write pairs of "
    "'chosen' and 'rejected' for DPO",
    "kto_tag": "KTO is not supported; keep the good records, or write pairs of 'chosen' and 'rejected' for DPO",
    "objects": "boxes beside the messages are not read; write them into the texts instead of <ref-object> and <bbox>",
    "audio": "the model cannot hear; leave records with sound out",
    "audios": "the model cannot hear; leave records with sound out",
    "chat_template": "the checkpoint's own chat template is used",
    "chat_template_kwargs": "the chat template takes no options from a record; write what they say into the messages",
    "weight": 'weights are of messages, not of records; write a "weight" of 0 or 1 into the messages',
    "loss": 'marks are of messages, not of records; write "loss": false into the messages',
    "train": 'marks are of messages, not of records; write "train": false into the messages',
    "train_on_eos": "the end of a learnt message is always learnt",
    "rejected_images": "both replies of a preference are about the same pictures; put them into 'images'",
}
CHAT = ("messages", "conversations", "conversation", "texts")
QUESTIONS = (*CHAT, "prompt", "query", "question", "instruction", "input")  # keys of which a record has one
# Who speaks in a message.
ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "system": "system", "developer": "system",
    "observation": "tool", "tool": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
