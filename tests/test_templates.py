"""Templates are rendered as `transformers` renders them, within bounds, and fail in one line."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco, BacoError
from baco.cli import run
from baco.errors import MAX_MESSAGE
from baco.limited_process import EndedError, LimitedProcess
from baco.text import templates
from baco.text.prompts import Renderer
from baco.text.templates import Template
from tests.chat_templates import FAMILIES, NO_SYSTEM
from tests.fuzzing import budget
from tests.pairs import train_tokenizer, wrapped
from tests.serving import alive, served, wait_for

DAY = "2025-03-31"
QUESTION = {"role": "user", "content": "Where should I go?"}
BACKEND = train_tokenizer()
CONVERSATIONS = [
    [QUESTION],
    [{"role": "system", "content": " Be brief.\n"}, QUESTION],
    [QUESTION, {"role": "assistant", "content": "<think>\nx\n</think>\n\nThere."}, QUESTION],
]
# What a template may do to the process that renders it.
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}"
    "{% endfor %}",
    "a slow expression": "{{ 'a' in (['b' * 9999] * 99999)|join }}" * 99,
    "a doubled list": "{% set ns = namespace(x=[0]) %}{% for i in range(9999) %}"
    "{% set ns.x = ns.x + [i] * 999 %}{{ ns.x|sort|length }}{% endfor %}",
}
HUGE = {
    "multiplied": "{{ 'x' * 10**9 }}",
    "centred": "{{ 'x'.center(10**9) }}",
    "filled": "{{ '%1000000000d' % 1 }}",
    "formatted": "{{ '{:1000000000}'.format(1) }}",
    "indented": "{{ 'x'|indent(10**9, true) }}",
    "tabs": "{{ ('\t' * 10**6).expandtabs(10**6) }}",
    "replaced": "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}",
    "a list": "{{ [0] * 10**9 }}",
    "a doubled text": "{% set ns = namespace(x='x') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "long output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
}
FAILING = {
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "a large range": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
    "nothing's length": ("{% if tools|length > 0 %}x{% endif %}", "TypeError: object of type"),
    "a number in a text": ("{{ 'a' + messages|length }}", "TypeError: can only concatenate str"),
    "internals": ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "a missing entry": ("{{ messages[7].content.x }}", "UndefinedError"),
    "a missing filter": ("{{ 1|nope }}", "is not valid Jinja: line 1: No filter named 'nope'."),
    "open braces": ("{{ 1", "is not valid Jinja: line 1"),
    "nested brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
    "large numbers": ("{{ 10**5000 }}", "ValueError: Exceeds the limit"),
    "nothing": ("{# nothing #}", "renders this conversation as an empty text"),
    "a format": ("{{ 'x' % 1 }}", "TypeError: not all arguments converted"),
    "a module": ("{% include 'x' %}", "TypeError: no loader for this environment"),
}


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short time limit for templates that never end."""
    monkeypatch.setattr(templates, "SECONDS", 0.1)


def renderer(template: Any = FAMILIES["chatml"], **options: Any) -> Renderer:
    aligned = wrapped(BACKEND, aligned=True)
    aligned.chat_template = template
    aligned.bos_token = "<|endoftext|>"
    return Renderer(wrapped(BACKEND, aligned=False), aligned, **options)


def text(source: str, kind: templates.Kind = "chat", **variables: Any) -> str:
    given = {"messages": [QUESTION], "tools": None, **variables}
    return Template(kind, source, "the template").render(given, DAY).text


def refused(source: str, kind: templates.Kind = "chat", **variables: Any) -> str:
    with pytest.raises(BacoError) as caught:
        text(source, kind, **variables)
    message = str(caught.value)
    assert message.startswith("the template ")
    assert "\n" not in message
    assert len(message) < 2 * MAX_MESSAGE
    return message


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chat_templates_render_as_transformers_renders_them(
    family: str, messages: list[dict[str, str]]
) -> None:
    if family in NO_SYSTEM and messages[0]["role"] == "system":
        return
    both = renderer(FAMILIES[family])
    for options in ({}, {"enable_thinking": False, "date_string": "today"}):
        expected = both.aligned_tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )
        assert both.render(messages, template_args=options).aligned_text == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ {'b': 'é<', 'a': [1, none]}|tojson }} {{ {'a': 1}|tojson(indent=2, sort_keys=true) }}",
        "{% generation %}{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}{{ x }}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}\n"
        "{% if i == 5 %}{% break %}{% endif %}{% endfor %}",
        "  {% if true %}\n  x\n  {% endif %}\n y",
        "{{ strftime_now is defined }}{{ tools is none }}{{ documents is none }}{{ nothing }}",
        "{% set ns = namespace(self=1, b=2) %}{{ ns.self + ns.b }}{{ dict(a=1) }}",
        "{{ dict.fromkeys(['a'], 0) }}{{ bos_token }}{{ eos_token }}{{ pad_token }}",
    ],
)
def test_templates_can_use_everything_that_transformers_offers(source: str) -> None:
    both = renderer(source)
    expected = both.aligned_tokenizer.apply_chat_template(
        [QUESTION], tokenize=False, add_generation_prompt=True
    )
    assert both.render([QUESTION]).aligned_text == expected


@pytest.mark.parametrize("kind", ["chat", "base"])
@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_computes_too_long_is_refused(
    hurried: None, kind: templates.Kind, source: str
) -> None:
    assert "takes longer than 0.1 seconds of computing" in refused(source, kind)
    assert text("still here", kind) == "still here"


@pytest.mark.parametrize("source", HUGE.values(), ids=HUGE)
def test_memory_and_length_are_bounded(source: str) -> None:
    message = refused(source)
    bounds = ("needs more than 512 MiB", "writes more than 16,777,216 char", "takes longer than 2")
    assert any(f"the template {bound}" in message for bound in bounds)
    assert "(--chat-template, chat_template=)" in message


def test_bounds_hold_if_the_caller_ignores_and_blocks_signals() -> None:
    program = """
import signal
from baco.text import templates
signal.signal(signal.SIGPROF, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
templates.SECONDS = 0.1
try:
    templates.Template("chat", SOURCE, "t").render({}, "2025-01-01")
except ValueError as error:
    print(error)
"""
    program = program.replace("SOURCE", repr(ENDLESS["nested loops"]))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("t takes longer than 0.1 seconds"), done.stderr


def test_memory_is_refused_at_once() -> None:
    assert "needs more than 512 MiB of memory" in refused(HUGE["a list"])


def test_length_is_bounded_if_there_is_memory_for_it() -> None:
    longest = templates.CHARACTERS
    assert len(text("{{ 'x' * n }}", n=longest)) == longest
    assert "writes more than 16,777,216 characters" in refused("{{ 'x' * n }}", n=longest + 1)


@pytest.mark.parametrize("kind", ["chat", "base"])
@pytest.mark.parametrize(("source", "reason"), FAILING.values(), ids=FAILING)
def test_any_error_in_a_template_is_one_line(
    kind: templates.Kind, source: str, reason: str
) -> None:
    message = refused(source, kind)
    assert reason in message
    assert f"give another (--{kind}-template, {kind}_template=)" in message


def test_a_templates_own_message_is_shown_on_one_line() -> None:
    own_message = "Roles must\n alternate"
    assert refused("{{ raise_exception(x) }}", x=own_message) == (
        "the template refuses this conversation: Roles must alternate"
    )
    # Beyond 300 characters a message is left out.
    assert refused("{{ raise_exception(x * 101) }}", x="why") == (
        "the template refuses this conversation"
    )
    assert refused("{{ {}[x * 101] }}", "base", x="why").startswith(
        "the template fails on this conversation: UndefinedError; correct it"
    )


def test_a_failure_keeps_its_traceback() -> None:
    with pytest.raises(BacoError) as caught:
        text("{{ 1 / 0 }}")
    assert "ZeroDivisionError" in str(caught.value.__cause__)
    assert 'File "<template>", line 1' in str(caught.value.__cause__)


def test_a_template_that_ends_its_process_is_an_error() -> None:
    # A crash of the interpreter itself, which Jinja's sandbox has allowed before.
    process = LimitedProcess(templates._PROGRAM, templates.MEMORY, "renders")
    with pytest.raises(EndedError) as caught:
        process.ask({}, 1.0)
    assert caught.value.code == 1
    assert str(EndedError(-signal.SIGSEGV)) == "SIGSEGV"
    process.end()


def test_many_threads_render_at_once(hurried: None) -> None:
    def one(index: int) -> str:
        if index % 10 == 3:
            return refused(ENDLESS["nested loops"])
        return text("{{ index }}", index=index)

    with ThreadPoolExecutor(8) as pool:
        rendered = list(pool.map(one, range(30)))
    assert [t for i, t in enumerate(rendered) if i % 10 != 3] == [
        str(i) for i in range(30) if i % 10 != 3
    ]
    assert all("takes longer" in t for t in rendered[3::10])


def test_a_process_that_was_killed_is_replaced() -> None:
    text("x")
    assert templates._process._process is not None
    templates._process._process.kill()
    assert text("y") == "y"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
def test_an_interrupted_rendering_leaves_no_reply_behind() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupted() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        text(ENDLESS["nested loops"])

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert text("{{ 1 }}") == "1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_renders_by_itself_and_leaves_its_parents_alone() -> None:
    program = """
import os
from baco.text.templates import Template
def text(x): return Template("chat", "{{ x }}", "t").render({"x": x}, "2025-01-01").text
text("before")
child = os.fork()
for x in range(200):
    assert text(x) == str(x)
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert text("after") == "after"
    print("well")
else:
    os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("well\n", "")


def test_the_process_ends_with_its_parent() -> None:
    program = """
import os, signal
from baco.text import templates
templates.Template("chat", "x", "t").render({}, "2025-01-01")
print(templates._process._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    wait_for(lambda: not alive(int(done.stdout)))


def test_chance_in_a_template_is_the_same_each_time() -> None:
    source = "{{ range(1000)|list|random }} {{ lipsum() }}"
    first = text(source)
    templates._process.end()
    assert text(source) == first


# --- which template, and how it is named ----------------------------------------------------------


def test_errors_name_the_model_or_the_file(tmp_path: Path) -> None:
    both = renderer("{{ 1 / 0 }}")
    both.aligned_tokenizer.name_or_path = "org/chat-model"
    with pytest.raises(BacoError, match=r"^the chat template of org/chat-model fails on this"):
        both.render("Hi")
    file = tmp_path / "own.jinja"
    file.write_text("{{ 1 / 0 }}")
    with pytest.raises(BacoError, match=rf"^the chat template {file} fails on this conversation"):
        renderer(aligned_template=str(file)).render("Hi")
    with pytest.raises(BacoError, match=rf"^the base template {file} fails on this conversation"):
        renderer(base_template=str(file)).render("Hi")
    with pytest.raises(BacoError, match=r"^the chat template given fails on this conversation"):
        renderer(aligned_template="{{ 1 / 0 }}").render("Hi")


def test_of_several_templates_the_default_or_a_named_one_is_used() -> None:
    several = {"default": "D {{ eos_token }}", "rag": "R {{ eos_token }}"}
    assert renderer(several).render("Hi").aligned_text == "D <|im_end|>"
    assert renderer(several, aligned_template="rag").render("Hi").aligned_text == "R <|im_end|>"
    del several["default"]
    with pytest.raises(BacoError, match=r"several chat templates \(rag\) and none is the default"):
        renderer(several).render("Hi")


def test_a_file_of_several_templates_is_read_by_name(tmp_path: Path) -> None:
    file = tmp_path / "templates.json"
    file.write_text('[{"name":"rag","template":"x"},{"name":"tool_use","template":"y"}]')
    with pytest.raises(BacoError, match=r"templates.json has several chat templates \(rag, tool_"):
        renderer(aligned_template=str(file))
    file.write_text('[{"name":"default","template":"x"}]')
    assert renderer(aligned_template=str(file)).render("Hi").aligned_text == "x"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ none|length }}", "fails on this conversation: TypeError"),
        (FAILING["a number in a text"][0], "fails on this conversation: TypeError"),
        (ENDLESS["nested loops"], "takes longer than 0.1 seconds"),
        (HUGE["centred"], "needs more than 512 MiB of memory"),
        ("{{ raise_exception('no system role') }}", "refuses this conversation: no system role"),
    ],
)
def test_the_command_line_prints_one_line_and_exits_with_2(
    hurried: None, source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(source)
    for option in ("--chat-template", "--base-template"):
        assert run(["generate", "hi", option, str(file), "--max-tokens", "1"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"template {file} " in error
        assert message in error


@pytest.mark.parametrize("option", ["chat_template", "base_template"])
def test_a_server_refuses_prompts_that_a_template_cannot_render_and_continues(
    hurried: None, option: str
) -> None:
    bad = "{% if 'loop' in messages[-1].content %}" + ENDLESS["nested loops"] + "{% endif %}"
    bad += "{% if 'fail' in messages[-1].content %}{{ 1 / 0 }}{% endif %}"
    named = option.replace("_", " ")
    options: dict[str, Any] = {option: bad + "{{ messages[-1].content }}"}
    with served(Baco.load("demo", **options)) as server:
        for prompt, reason in (("loop", "takes longer than 0.1 seconds"), ("fail", "ZeroDivision")):
            for stream in (False, True):
                reply = server.ask(prompt=prompt, stream=stream)
                assert reply.status_code == 400
                error = reply.json()["error"]
                assert error["type"] == "invalid_request_error"
                assert error["message"].startswith(f"the {named} given ")
                assert reason in error["message"]
        assert server.ask(max_tokens=2).status_code == 200


# --- what a tokenizer may raise -------------------------------------------------------------------


class Failing:
    """A tokenizer that raises a given error."""

    name_or_path = "org/broken"
    chat_template = "{{ messages[0].content }}"
    eos_token_id = None

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise self.error

    decode = __call__


class PanicException(BaseException):
    """Stands for the error of the tokenizers library when it panics."""


@pytest.mark.parametrize(
    "error", [TypeError("TextInputSequence must be str\nreally"), PanicException("no entry found")]
)
def test_an_error_of_a_tokenizer_is_one_line(error: BaseException) -> None:
    shown = " ".join(str(error).split())
    with pytest.raises(BacoError) as caught:
        Renderer(Failing(error), Failing(error)).render("Hi")
    assert str(caught.value) == (
        f"the tokenizer of org/broken fails on this prompt: {type(error).__name__}: {shown}; "
        "change the prompt, or repair the tokenizer's files"
    )
    with pytest.raises(BacoError, match="the tokenizer of org/broken fails on this prompt"):
        Renderer(Failing(error), Failing(error)).raw((1, 2))
    with pytest.raises(KeyboardInterrupt):
        Renderer(Failing(KeyboardInterrupt()), Failing(KeyboardInterrupt())).render("Hi")


def test_a_lone_surrogate_is_refused_before_any_tokenizer_runs() -> None:
    both = renderer()
    for prompt in ("a\ud83d", [QUESTION, {"role": "assistant", "content": "\ud83d"}]):
        with pytest.raises(BacoError, match=r"message \d holds half a surrogate pair \('.ud83d'\)"):
            both.render(prompt)
    with pytest.raises(BacoError, match="the prompt holds half a surrogate pair"):
        both.raw("a\ud83d")


# --- arguments ------------------------------------------------------------------------------------


def test_arguments_reach_both_templates_and_override_the_pairs_own() -> None:
    source = "{{ tone|default('-') }}{{ pitch|default('-') }}"
    both = renderer(source, base_template=source, chat_options={"tone": "a", "pitch": "b"})
    assert both.render("Hi").aligned_text == both.render("Hi").base_text == "ab"
    prompt = both.render("Hi", template_args={"tone": "c"})
    assert prompt.aligned_text == prompt.base_text == "cb"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("enable-thinking", True, "give the name of a variable"),
        ("", True, "give the name of a variable"),
        ("messages", [], "BACo sets this one itself"),
        ("add_generation_prompt", False, "BACo sets this one itself"),
        ("tone", object(), "is object: give what JSON can hold"),
    ],
)
def test_invalid_template_arguments_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(BacoError, match=message):
        renderer().render("Hi", template_args={name: value})


# --- fuzzing --------------------------------------------------------------------------------------

VALUES = (
    *("messages", "m", "m.content", "m['role']", "messages[-1]['content']", "messages[0]", "loop"),
    *("x", "f(1)", "tools", "bos_token", "nothing", "ns", "loop.index0", "add_generation_prompt"),
    *("0", "7", "-1", "10**9", "1.5", "none", "true", "'a'", "'%s'", "'夏'", "''", "[]", "{}"),
    *("{'a': 1}", "range(5)", "range(99999)", "strftime_now('%d %b %Y')", "namespace(a=1)"),
    *("raise_exception('no')", "''.__class__", "dict(a=1)", "cycler(1)", "caller()", "self", "f"),
)
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "not in", "and", "or")
FILTERS = (
    *(
        "trim",
        "length",
        "join",
        "tojson",
        "list",
        "sort",
        "center(99)",
        "format(1)",
        "int",
        "upper",
    ),
    *("replace('a', 'b')", "random", "map(attribute='content')", "selectattr('role')", "batch(2)"),
    *("items", "first", "last", "indent(9)", "wordwrap(3)", "string", "default('d')", "xmlattr"),
    *("groupby('role')", "sum", "min", "reverse", "unique", "urlize", "slice(3)", "truncate(3)"),
)
METHODS = (
    *("content", "role", "split('a')", "strip()", "center(9)", "format(1)", "format_map({})"),
    *(
        "append(1)",
        "pop()",
        "items()",
        "keys()",
        "encode()",
        "__class__",
        "mro()",
        "index0",
        "upper",
    ),
    *("startswith('a')", "expandtabs(99)", "zfill(9)", "replace('', 'x')", "get('a')", "join([])"),
)
TESTS = ("defined", "none", "string", "mapping", "iterable", "odd", "sameas(1)", "undefined")


def joined(*parts: Any) -> st.SearchStrategy[str]:
    """The joined texts of the parts."""
    fixed = (st.just(part) if isinstance(part, str) else part for part in parts)
    return st.tuples(*fixed).map("".join)


expressions = st.recursive(
    st.sampled_from(VALUES),
    lambda inner: st.one_of(
        joined("(", inner, " ", st.sampled_from(OPERATORS), " ", inner, ")"),
        joined("(", inner, "|", st.sampled_from(FILTERS), ")"),
        joined("(", inner, ").", st.sampled_from(METHODS)),
        joined("(", inner, " is ", st.sampled_from(TESTS), ")"),
        joined(inner, "[", inner, "]"),
        joined("(", inner, " if ", inner, " else ", inner, ")"),
    ),
    max_leaves=4,
)
statements = st.recursive(
    st.text(max_size=3) | joined("{{ ", expressions, " }}") | st.just("{{ messages[0].content }}"),
    lambda inner: st.one_of(
        joined("{% for m in messages %}", inner, "{% endfor %}"),
        joined("{% for m in ", expressions, " %}", inner, "{% else %}", inner, "{% endfor %}"),
        joined("{% if ", expressions, " %}", inner, "{% else %}", inner, "{% endif %}"),
        joined("{% set x = ", expressions, " %}", inner),
        joined("{% set ns = namespace(x=", expressions, ") %}", inner),
        joined("{% set x %}", inner, "{% endset %}", inner),
        joined("{% macro f(x) %}", inner, "{% endmacro %}", inner),
        joined("{% call f(1) %}", inner, "{% endcall %}"),
        joined("{% filter ", st.sampled_from(FILTERS), " %}", inner, "{% endfilter %}"),
        joined("{% generation %}", inner, "{% endgeneration %}"),
        joined(inner, inner),
    ),
    max_leaves=5,
)
MARKS = ("{{", "}}", "{%", "%}", "{%-", "-%}", "{#", "#}", '"', "'", "(", ")", "|", "\n", " ", "\\")
WORDS = (
    "for m in messages",
    "endfor",
    "if",
    "endif",
    "set",
    "macro f(x)",
    "endmacro",
    "include 'x'",
)
soups = st.lists(st.sampled_from(MARKS + WORDS + VALUES) | st.text(max_size=2), max_size=9).map(
    "".join
)
sources = statements | statements | soups
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=20)}
)
begun = st.fixed_dictionaries({"role": st.just("assistant"), "content": st.text(max_size=9)})
conversations = st.tuples(st.lists(message, max_size=3), st.lists(begun, max_size=1)).map(
    lambda parts: [*parts[0], QUESTION, *parts[1]]
)
values = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers())
arguments = st.dictionaries(st.sampled_from(["x", "tools", "bos_token", "enable_thinking"]), values)
BOTH = renderer()


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    usual, templates.SECONDS = templates.SECONDS, 0.3
    yield
    templates.SECONDS = usual


def rendered_or_refused(both: Callable[[], Renderer], *prompt: Any, **options: Any) -> None:
    """A rendering with text and tokens for both models, or a BacoError of one line."""
    try:
        rendered = both().render(*prompt, **options)
    except BacoError as error:
        outcome = str(error)
    else:
        outcome = "a rendering"
        assert rendered.aligned_text
        assert rendered.base_text
        assert rendered.base_ids
        assert rendered.aligned_ids
    assert len(outcome.splitlines()) == 1


@settings(max_examples=budget(250))
@given(sources, conversations, arguments)
def test_any_chat_template_gives_a_rendering_or_an_error_of_one_line(
    quick: None, source: str, messages: Any, arguments: dict[str, Any]
) -> None:
    BOTH.aligned_tokenizer.chat_template = source
    rendered_or_refused(lambda: BOTH, messages, template_args=arguments)


@settings(max_examples=budget(150))
@given(sources, conversations, arguments)
def test_any_base_template_gives_a_rendering_or_an_error_of_one_line(
    quick: None, source: str, messages: Any, arguments: dict[str, Any]
) -> None:
    chat = FAMILIES["chatml"]
    # A source without a brace would be taken for a file's name.
    rendered_or_refused(
        lambda: renderer(chat, base_template="{##}" + source), messages, template_args=arguments
    )


@given(st.lists(message | st.from_type(type(None)) | st.integers()) | st.text())
def test_any_conversation_gives_a_rendering_or_an_error_of_one_line(messages: Any) -> None:
    rendered_or_refused(renderer, messages)
