"""Fixtures for all tests: one thread, no network, an own home for calibrations, and the pairs."""

import os
import signal

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_WAIT_POLICY="PASSIVE",
    OMP_NUM_THREADS="1",  # in commands that tests start too: sums keep their order
    NO_COLOR="1",
)

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import fuzzing
from tests.pairs import PairFolder, save_pair

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from baco import Baco
    from tests.fake_cuda_graphs import Cuda
    from tests.nodes import Nodes

# Jobs started in the background ignore Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # models this small lose time to threads, and sums keep their order


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz",
        metavar="N",
        type=int,
        default=1,
        help="try N times as many cases in fuzzers and property tests",
    )


def pytest_configure(config: pytest.Config) -> None:
    times: int = config.getoption("--fuzz")
    if times < 1:
        raise pytest.UsageError(f"--fuzz is {times}: give a whole number from 1 on")
    fuzzing.times = times
    if config.option.timeout is None:  # of one test
        config.option.timeout = times * float(config.getini("timeout"))
    settings.register_profile(
        "baco",
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],  # machines may be busy
        derandomize=True,
        print_blob=True,
        max_examples=fuzzing.budget(settings.get_profile("default").max_examples),
    )
    settings.load_profile("baco")


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep calibrations written by tests apart from the user's own."""
    os.environ["BACO_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def demo() -> "Baco":
    """The embedded pair."""
    from baco import Baco

    return Baco.load("demo")


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Headless Chromium."""
    from tests.pages import chromium

    with chromium() as launched:
        yield launched


@pytest.fixture(scope="module")
def server(demo: "Baco") -> Iterator[str]:
    """The address of a server of the embedded pair."""
    from tests.serving import served

    with served(demo) as running:
        yield running.url


@pytest.fixture(scope="session")
def cluster() -> "Iterator[Nodes]":
    """A Ray cluster of several nodes; a test that removes one restores it."""
    from tests.nodes import Nodes

    nodes = Nodes()
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="session")
def random_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PairFolder]:
    """``random_pair("llama", noise=0.05, …)``: a pair on disk, created once for equal arguments."""
    pairs: dict[tuple[object, ...], PairFolder] = {}

    def make(architecture: str = "llama", **options: float | None) -> PairFolder:
        key = (architecture, *sorted(options.items()))
        if key not in pairs:
            folder: Path = tmp_path_factory.mktemp(architecture)
            pairs[key] = save_pair(folder, architecture, **options)  # type: ignore[arg-type]
        return pairs[key]

    return make


@pytest.fixture(scope="session")
def loaded_pair(random_pair: Callable[..., PairFolder]) -> "Callable[..., Baco]":
    """``loaded_pair("llama", noise=0.3)``: such a pair, loaded once for equal arguments."""
    from baco import Baco

    @cache
    def load(architecture: str, noise: float) -> Baco:
        folder = random_pair(architecture, noise=noise)
        return Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="float32")

    return load


@pytest.fixture
def plain(loaded_pair: "Callable[..., Baco]") -> "Baco":
    """A pair of random weights; `recorded` is the same pair on a stand-in for a CUDA device."""
    return loaded_pair("llama", 0.2)


@pytest.fixture
def cuda() -> "Cuda":
    """The stand-in for torch's CUDA that `recorded` records on."""
    from tests.fake_cuda_graphs import Cuda

    return Cuda()


@pytest.fixture
def recorded(plain: "Baco", cuda: "Cuda") -> "Baco":
    """A pair with forwards that are recorded and replayed."""
    from tests.fake_cuda_graphs import recording

    base, aligned = (recording(model, cuda) for model in (plain.pair.base, plain.pair.aligned))
    return replace(plain, pair=replace(plain.pair, base=base, aligned=aligned))
