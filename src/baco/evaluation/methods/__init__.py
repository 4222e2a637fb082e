"""Methods: anything that turns a prompt into n samples. One file a kind, one seam for all."""

from baco.evaluation.methods.protocol import Answer, Draw, Grid, Method
from baco.evaluation.methods.registry import METHODS, answer, select_settings

__all__ = ["METHODS", "Answer", "Draw", "Grid", "Method", "answer", "select_settings"]
