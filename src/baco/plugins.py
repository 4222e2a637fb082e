"""Parts that other packages register by entry points: ``baco.routers``, ``baco.metrics``, ….

A package announces its parts in its ``pyproject.toml``::

    [project.entry-points."baco.routers"]
    Margin = "my_package:margin"

They are loaded when a name of that kind is first looked up, and never by ``import baco``.
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from baco.errors import BacoError


@cache
def plugins(kind: str) -> dict[str, Any]:
    """The objects that the entry points of a kind, such as ``routers``, refer to, by name.

    Raises:
        BacoError: one cannot be imported, or two have the same name.
    """
    objects: dict[str, Any] = {}
    for point in entry_points(group=f"baco.{kind}"):
        if point.name in objects:
            raise BacoError(
                f"two installed packages bring {point.name!r} in baco.{kind}: uninstall one"
            )
        objects[point.name] = _load(point, kind)
    return objects


def _load(point: EntryPoint, kind: str) -> Any:
    try:
        return point.load()
    except Exception as error:
        package = point.dist.name if point.dist is not None else "an installed package"
        raise BacoError(
            f"{package} brings {point.name!r} in baco.{kind}, and {point.value} cannot be loaded "
            f"({type(error).__name__}: {error}): mend or uninstall it"
        ) from error
