"""Parts that other packages register by entry points: ``baco.routers``, ``baco.metrics``, ….

A package announces its parts in its ``pyproject.toml``::

    [project.entry-points."baco.routers"]
    Margin = "my_package:margin"

They are loaded when a name of that kind is first looked up, and never by ``import baco``.
"""

from collections.abc import Callable, Container
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import UnionType
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


def register_plugins(
    kind: str,
    known: Container[str],
    types: type | UnionType,
    add: Callable[[Any], Any],
    register: Callable[[str], Callable[[Any], Any]],
    wanted: str,
) -> None:
    """Register the parts of a kind whose names are not known yet.

    Args:
        kind: as for `plugins`.
        known: the names of the parts that are registered.
        types: of a part that ``add`` takes as it is.
        add: registers such a part.
        register: takes a name and returns the decorator that registers a plain function.
        wanted: what an entry point should refer to, for the error.

    Raises:
        BacoError: as `plugins`, or a part is neither of the types nor a function.
    """
    for name, part in plugins(kind).items():
        if name in known:
            continue
        if isinstance(part, types):
            add(part)
        elif callable(part):
            register(name)(part)
        else:
            raise BacoError(f"entry point {name!r} in baco.{kind} is {part!r}: give {wanted}")


def _load(point: EntryPoint, kind: str) -> Any:
    try:
        return point.load()
    except Exception as error:
        package = point.dist.name if point.dist is not None else "an installed package"
        raise BacoError(
            f"{package} brings {point.name!r} in baco.{kind}, and {point.value} cannot be loaded "
            f"({type(error).__name__}: {error}): mend or uninstall it"
        ) from error
