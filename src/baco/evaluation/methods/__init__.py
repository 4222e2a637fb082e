"""Methods: anything that turns a prompt into n samples. One file for each kind."""

from baco.evaluation.methods.method import Answer, Draw, Grid, Method
from baco.evaluation.methods.registry import (
    answer,
    groups,
    methods,
    needs_one_tokenizer,
    register_method,
    select_settings,
)

__all__ = [
    "Answer",
    "Draw",
    "Grid",
    "Method",
    "answer",
    "groups",
    "methods",
    "needs_one_tokenizer",
    "register_method",
    "select_settings",
]
