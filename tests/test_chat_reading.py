"""A prompt rendered by any chat template is read back into its conversation."""

import pytest

from baco.integrations.transformers.chat import ChatReader
from baco.text.prompts import Renderer
from tests.chat_templates import FAMILIES
from tests.pairs import train_tokenizer, wrapped

Conversation = list[dict[str, str]]

# The shapes of templates in use, cut to what matters here.
TEMPLATES = {
    # Qwen2.5: a system message of its own where none is given.
    "default system": """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- set messages = messages[1:] %}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    # Qwen3 without thinking: the generation prompt is not what stands before earlier answers.
    "empty thoughts": """\
{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}
{%- endif %}""",
    # Llama 3: today's date, contents trimmed.
    "dated": """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '[system]\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' + system + '<|im_end|>' }}
{%- for m in messages %}
    {{- '[' + m['role'] + ']\\n\\n' + m['content']|trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]\\n\\n' }}{%- endif %}""",
    # Gemma 2: no system message, another name for the assistant.
    "no system": """\
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{%- endif %}
{%- for m in messages %}
    {{- '[' + ('model' if m['role'] == 'assistant' else 'user') + ']\\n' }}
    {{- m['content']|trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[model]\\n' }}{%- endif %}""",
    # Mistral: the same closing mark ends a question and opens the answer.
    "instruction marks": """\
{%- for m in messages %}
    {%- if m['role'] == 'assistant' %}{{- ' ' + m['content'] + '<|im_end|>' }}
    {%- else %}{{- '[INST] ' + m['content'] + ' [/INST]' }}{%- endif %}
{%- endfor %}""",
}
CONVERSATIONS: list[Conversation] = [
    [{"role": "user", "content": "Where should I go this summer?"}],
    [{"role": "user", "content": "Two\n\nparagraphs [x], 春 and 🌊."}],
    [
        {"role": "user", "content": "Question: a"},
        {"role": "assistant", "content": "b [/c]\nd"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f"},
        {"role": "user", "content": "g"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}],
    [
        {"role": "system", "content": "Be brief.\n\nVery."},
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ],
]


def renderer(template: str | None) -> Renderer:
    backend = train_tokenizer()
    aligned = wrapped(backend, aligned=True)
    aligned.chat_template = template
    return Renderer(wrapped(backend, aligned=False), aligned)


# Two templates have no place of its own for a system message.
CASES = [
    (name, conversation)
    for name in TEMPLATES
    for conversation in CONVERSATIONS
    if conversation[0]["role"] == "user" or name not in ("no system", "instruction marks")
]


@pytest.mark.parametrize(("name", "conversation"), CASES)
def test_the_base_model_gets_its_own_rendering(name: str, conversation: Conversation) -> None:
    both = renderer(TEMPLATES[name])
    prompt = both.render(conversation)
    answer = tuple(both.aligned_tokenizer.encode(" I would", add_special_tokens=False))
    whole, begun = ChatReader(both).read([prompt.aligned_ids, prompt.aligned_ids + answer])
    assert whole is not None
    assert whole.ids == prompt.base_ids
    assert whole.start == len(prompt.aligned_ids)
    assert begun == whole


@pytest.mark.parametrize("name", TEMPLATES)
def test_anything_else_is_raw_text(name: str) -> None:
    both = renderer(TEMPLATES[name])
    prompt = both.render(CONVERSATIONS[0])
    raw = tuple(both.aligned_tokenizer.encode("Where should I go?"))
    assert ChatReader(both).read([raw, prompt.aligned_ids[1:]]) == [None, None]


def test_without_a_template_everything_is_raw_text() -> None:
    both = renderer(None)
    assert ChatReader(both).read([(1, 2, 3)]) == [None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("begun", ["Go there", "Go th", "Go there, "])
def test_a_prefilled_answer_is_part_of_the_bases_prompt(family: str, begun: str) -> None:
    both = renderer(FAMILIES[family])
    question = CONVERSATIONS[0]
    messages = [*question, {"role": "assistant", "content": begun}]
    prompt = both.render(messages)
    (reading,) = ChatReader(both).read([prompt.aligned_ids])
    assert reading is not None
    asking = both.render(question)
    assert reading.ids == asking.base_ids
    if (
        family != "mistral nemo"
    ):  # whose base prompt ends otherwise before an answer without a space
        assert reading.ids + prompt.aligned_ids[reading.start :] == prompt.base_ids


def test_a_date_that_the_pair_is_given_does_not_hide_todays() -> None:
    """Callers render with the tokenizer, which takes the day of the call."""
    both = renderer(TEMPLATES["dated"])
    for conversation in CONVERSATIONS:
        ids = tuple(
            both.aligned_tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, return_dict=False
            )
        )
        both.date = None
        expected = both.render(conversation)
        for day in ("2025-03-31", None):
            both.date = day
            (reading,) = ChatReader(both).read([ids])
            assert reading is not None
            assert reading.ids == expected.base_ids
