"""Shared by all models that score answers: loading, batches of similar length, a cache."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from baco.errors import one_line
from baco.evaluation.metrics.protocols import MetricUnavailable
from baco.models import hub
from baco.models.hub import NotHereError
from baco.models.loading import import_model_code

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def require(*libraries: str) -> dict[str, str]:
    """The versions of installed libraries, by their package names.

    Raises:
        MetricUnavailable: one is not installed.
    """
    missing = [name for name in libraries if find_spec(name.replace("-", "_")) is None]
    if missing:
        raise MetricUnavailable(
            f"{' and '.join(missing)} not installed: pip install 'baco[evaluation]'"
        )
    return {name: version(name) for name in libraries}


# Why models could not be loaded, by role and name.
_missing: dict[tuple[str, str], str] = {}


def load(role: str, name: str, read: Callable[..., V]) -> V:
    """Load a model from a hub id or folder with `read`.

    Args:
        role: of the model in a metric.
        name: hub id or folder.
        read: takes the name, and ``trust_remote_code``, which is False.

    Raises:
        MetricUnavailable: it does not exist, or is not such a model.
    """
    if (role, name) not in _missing:
        try:
            import_model_code()
            with hub.reading(name):
                return read(name, trust_remote_code=False)
        except NotHereError as error:
            _missing[role, name] = error.reason
        except Exception as error:  # damaged files make libraries raise errors of all kinds
            has_code = "trust_remote_code" in str(error)
            _missing[role, name] = (
                "it comes with Python code of its own, which metrics do not run"
                if has_code
                else one_line(error)
            )
    raise MetricUnavailable(
        f"the {role} model {name!r} cannot be loaded ({_missing[role, name]}): connect to the hub "
        f"once, or name another hub id or a folder for {role!r}"
    )


def read_model(kind: Any, name: str, *, trust_remote_code: bool) -> Any:
    """A `transformers` model in evaluation mode, on the accelerators where there are any."""
    import torch

    where = {"device_map": "auto"} if torch.accelerator.is_available() else {}
    model = kind.from_pretrained(name, dtype="auto", trust_remote_code=trust_remote_code, **where)
    return model.eval()


def origin(name: str, model: Any) -> dict[str, str]:
    """Name, version and revision of a `transformers` model, for the record of a run."""
    revision = getattr(model.config, "_commit_hash", None)
    entry = {"model": name, "transformers": version("transformers")}
    return entry | ({"revision": str(revision)} if revision else {})


def window(tokenizer: Any, model: Any) -> int:
    """The most tokens that a model reads."""
    if tokenizer.model_max_length < 10**6:  # transformers has 10**30 where it is unknown
        return int(tokenizer.model_max_length)
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 512
    return int(positions) - 2  # RoBERTa counts positions from 2


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, of at most `tokens` tokens each, padding included."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class Memory(Generic[K, V]):
    """A cache of the last results, so that metrics that share a model run it once per input.

    Beyond `limit` the oldest are dropped, so memory does not grow with what is scored.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._kept: OrderedDict[K, V] = OrderedDict()

    def get(self, keys: Sequence[K], compute: Callable[[list[K]], Iterable[V]]) -> list[V]:
        """The results of all keys; `compute` is called once with those that are new."""
        new = [key for key in dict.fromkeys(keys) if key not in self._kept]
        computed = dict(zip(new, compute(new), strict=True)) if new else {}
        results = [computed[key] if key in computed else self._kept[key] for key in keys]
        self._kept.update(computed)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return results
