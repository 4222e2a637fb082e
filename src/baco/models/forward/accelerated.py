"""Experimental: a `DenseForward` that runs without Python, by ``--compile``.

On a CPU it is compiled (`baco.models.forward.compiled`), on a GPU recorded as CUDA graphs
(`baco.models.forward.cuda_graphs`). The CUDA graphs have been tested against a simulated device
only: nobody has run them on a GPU yet. Nothing but this module creates either of them.
"""

import logging

from baco.models.forward.compiled import CompiledForward
from baco.models.forward.cuda_graphs import CudaGraphForward
from baco.models.forward.dense import DenseForward

log = logging.getLogger("baco")
progress = logging.getLogger("baco.compiling")


def accelerated(forward: DenseForward, name: str) -> CompiledForward | CudaGraphForward | str:
    """The fast form of a forward, tried out; or the reason why there is none, in one line.

    Args:
        forward: of the model.
        name: of the model, for messages.
    """
    kind = forward.device.type
    try:
        if kind == "cpu":
            progress.info("compiling %s, which takes a minute the first time", name)
            compiled = CompiledForward(forward)
            compiled.warm_up()
            return compiled
        if kind == "cuda":
            log.warning("CUDA graphs (--compile) are experimental: never run on a GPU by the tests")
            recorded = CudaGraphForward(forward)
            recorded.warm_up()
            return recorded
    except Exception as error:  # whatever the compiler, and what it calls, raises
        return next(iter(str(error).splitlines()), type(error).__name__)
    return f"forwards are compiled on a CPU and recorded on a CUDA device, not on {kind}"
