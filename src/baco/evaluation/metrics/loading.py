"""What every model that scores answers needs: loading, batches of even length, a short memory."""

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
    """The versions of libraries (as PyPI calls them).

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
    """What `read` makes of a model's hub id or folder.

    Args:
        role: of the model in a metric.
        name: hub id or folder.
        read: takes the name, and ``trust_remote_code``, which is False.

    Raises:
        MetricUnavailable: it is not there, or is no such model.
    """
    if (role, name) not in _missing:
        try:
            import_model_code()
            with hub.reading(name):
                return read(name, trust_remote_code=False)
        except NotHereError as error:
            _missing[role, name] = error.reason
        except Exception as error:  # damaged files lead libraries to errors of all kinds
            has_code = "trust_remote_code" in str(error)
            _missing[role, name] = (
                "it comes with Python code of its own, which no metric runs"
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
    """Where a `transformers` model comes from, for the record of a run."""
    revision = getattr(model.config, "_commit_hash", None)
    told = {"model": name, "transformers": version("transformers")}
    return told | ({"revision": str(revision)} if revision else {})


def window(tokenizer: Any, model: Any) -> int:
    """How many tokens a model reads at most."""
    if tokenizer.model_max_length < 10**6:  # transformers says 10**30 for "nobody told"
        return int(tokenizer.model_max_length)
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 512
    return int(positions) - 2  # RoBERTa counts positions from 2


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like length, at most `tokens` tokens each with their padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class Memory(Generic[K, V]):
    """Answers to the last questions, so that metrics that share a model ask it once.

    It forgets the oldest beyond `limit`: memory stays flat however much is scored.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._kept: OrderedDict[K, V] = OrderedDict()

    def ask(self, questions: Sequence[K], answer: Callable[[list[K]], Iterable[V]]) -> list[V]:
        """The answers to all questions; `answer` is asked once for each that is new."""
        new = [question for question in dict.fromkeys(questions) if question not in self._kept]
        found = dict(zip(new, answer(new), strict=True)) if new else {}
        answers = [found[q] if q in found else self._kept[q] for q in questions]
        self._kept.update(found)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return answers
