"""Base-aligned model collaboration: decode with a base model and its aligned sibling at once.

    from baco import Baco

    for answer in Baco.load("demo").generate("Recommend a summer destination", n=4):
        print(answer.text)

Names are imported when they are first used, so that ``import baco`` itself is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from baco.errors import BacoError
from baco.version import __version__

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.calibration.measure import calibrate
    from baco.calibration.store import Curve
    from baco.integrations.transformers import as_transformers
    from baco.outputs import Chunk, Completion
    from baco.routing.combiners import register_combiner
    from baco.routing.parser import register_router, router
    from baco.sampling.params import SamplingParams
    from baco.sampling.sampler_chain import register_sampler

__all__ = [
    "Baco",
    "BacoError",
    "Chunk",
    "Completion",
    "Curve",
    "SamplingParams",
    "__version__",
    "as_transformers",
    "calibrate",
    "register_combiner",
    "register_router",
    "register_sampler",
    "router",
]

_HOMES = {
    "Baco": "baco.api",
    "Chunk": "baco.outputs",
    "Completion": "baco.outputs",
    "Curve": "baco.calibration.store",
    "SamplingParams": "baco.sampling.params",
    "as_transformers": "baco.integrations.transformers",
    "calibrate": "baco.calibration.measure",
    "register_combiner": "baco.routing.combiners",
    "register_router": "baco.routing.parser",
    "register_sampler": "baco.sampling.sampler_chain",
    "router": "baco.routing.parser",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'baco' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
