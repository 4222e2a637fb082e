"""Options of commands that work on a cluster, and the cluster they name."""

from typing import TYPE_CHECKING, Annotated

import typer

from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.batch.ray_cluster import Cluster

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Of --backend ray: auto, host:port or ray://host:port; by default this machine.",
    ),
]


def named_cluster(
    address: str | None,
    workers: int | None,
    device: str | None,
    *,
    threads: int = 1,
    gpus: float = 1,
) -> "Cluster":
    """The cluster of a command's options.

    Raises:
        BacoError: a number that is none.
    """
    from baco.batch.ray_cluster import Cluster

    if workers is not None and workers < 1:
        raise BacoError(f"workers is {workers}: give 1 or more")
    if gpus <= 0:
        raise BacoError(f"gpus-per-worker is {gpus:g}: give a number above 0")
    on_cpu = device is not None and "cuda" not in device
    return Cluster(address, workers, threads, gpus, on_cpu)
