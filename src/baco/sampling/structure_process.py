"""The process that tries structures out; `baco.sampling.constraint` starts it.

No module imports it.

A schema, a regular expression or a grammar comes with a request. Some make the compiler compute for
hours, or overflow its stack, which ends the process. So each is first compiled here, without a
vocabulary.
"""

import json
import threading
from functools import partial
from typing import Any

from llguidance import LLMatcher, LLParserLimits, regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from baco.limited_process import reply_to_requests

# JSON is written as json.dumps writes it, so that all between values is forced.
JSON_FORMAT: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
# Bytes of the stack that compiling may take; the threads of other processes have more.
STACK = 2**20


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The structure as llguidance reads it (``grammar``) and what is wrong with it (``fault``)."""
    reply = dict[str, Any]()
    threading.stack_size(STACK)
    thread = threading.Thread(target=partial(_compile, request, reply))
    thread.start()
    thread.join()
    return reply


def _compile(request: dict[str, Any], reply: dict[str, Any]) -> None:
    try:
        grammar = grammar_of(request["kind"], request["text"], request["joining_space"])
        limits = LLParserLimits(verbose_errors=False)
        reply |= {"grammar": grammar, "fault": LLMatcher.validate_grammar(grammar, limits=limits)}
    except RecursionError:
        reply["fault"] = "it is nested too deeply"
    except Exception as error:  # llguidance raises Exception itself
        reply["fault"] = str(error) or type(error).__name__


def grammar_of(kind: str, text: str, joining_space: bool) -> str:
    """A structure as llguidance reads it."""
    if kind == "schema":
        schema = LLMatcher.grammar_from_json_schema(text, overrides=JSON_FORMAT)
        answer = json.loads(schema)["grammars"][0]
    elif kind == "regex":
        if (len(text) - len(text.rstrip("\\"))) % 2:
            raise ValueError("it ends with a backslash")
        # Digits and letters of ASCII, as in JSON schemas and JavaScript.
        answer = {"lark_grammar": f"start: /{regex_to_lark(text, 'dw')}/"}
    elif kind == "choice":
        choices = map(json.dumps, json.loads(text))
        answer = {"lark_grammar": f"start: {' | '.join(choices)}"}
    else:
        answer = {"lark_grammar": gbnf_to_lark(text) if "::=" in text else text}
    opening = {"name": "opening", "lark_grammar": 'start: " "? @answer'}
    grammars = [opening] if joining_space else []
    return json.dumps({"grammars": [*grammars, answer | {"name": "answer"}]})


if __name__ == "__main__":
    reply_to_requests(answer)
