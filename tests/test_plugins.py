"""A package with one part of each kind, used in every place that lists or uses such parts."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, expect

from baco import Baco, BacoError, SamplingParams, register_router
from baco.backends.base import Capabilities
from baco.backends.vllm.backend import CAPABILITIES, VllmBackend, VllmEngine
from baco.cli import run
from baco.engine.sequence import Request
from baco.evaluation.tasks.catalogue import task_files
from baco.plugins import plugins
from baco.routing.parser import portable
from tests.pages import visit
from tests.registries import restored
from tests.remoting import remote
from tests.serving import PROMPT, served

SOURCE = '''
"""One part of each kind."""
from dataclasses import dataclass
from pathlib import Path

from baco import BacoError, register_combiner, register_sampler
from baco.backends.base import Capabilities
from baco.engine.engine import Engine
from baco.evaluation.methods.method import sampled
from baco.evaluation.metrics import register_metric
from baco.evaluation.records import Setting
from baco.routing.rules import logit_rule

TASK = Path(__file__).with_name("riddles.toml")


@logit_rule("Margin", low=0, high=1, grid=(0.0, 0.5, 1.0), sweep=(0.4,), example=0.4)
def margin(signals, gamma):
    """base where its two likeliest tokens are within the threshold of each other"""
    top = signals.base.softmax(-1).topk(2, dim=-1).values
    return top[:, 0] - top[:, 1] < gamma


@register_sampler("nudge", token=(0, 10**6), by=(0, 100))
def nudge(logits, context, token: int, by: float = 5.0):
    """raise one token where the answer does not have it yet"""
    raised = logits.clone()
    raised[:, token] += by * (context.tokens != token).all(dim=1)
    return raised


@register_combiner("Geometric", power=(0, 1))
def geometric(base, aligned, power: float = 0.5):
    """the aligned model, pulled to the base"""
    return aligned + power * base


@register_metric("shouting", kind="lexical")
def shouting(texts):
    """share of samples that end with an exclamation mark"""
    return sum(text.rstrip().endswith("!") for text in texts) / len(texts)


class Greeting:
    """The aligned model, greeted first."""

    name = "greeting"
    help = "the aligned model, greeted first"
    family = "prompting"

    def settings(self, grid):
        return [Setting("greeting", "greeting", None, {"kind": "greeting"})]

    def answer(self, baco, setting, prompts, draw):
        asked = [[{"role": "system", "content": "Hello."}, *p.messages] for p in prompts]
        return sampled(baco, "Aligned", asked, draw.n, draw.seed, draw.sampling)


class Bench(Engine):
    def add(self, request):
        CAPABILITIES.check(request)
        return super().add(request)


CAPABILITIES = Capabilities("workshop", explain=False)


@dataclass
class Workshop:
    """Decodes with the models of this process."""

    pair: object
    capabilities: Capabilities = CAPABILITIES
    ended: str | None = None

    def engine(self):
        return Bench(self.pair)

    def close(self):
        self.ended = "closed"


def connect(known, *, max_rows, tools="all"):
    from baco.models.pair import load_pair

    if tools != "all":
        raise BacoError(f"the workshop has no tools {tools!r}")
    pair = load_pair(known)
    return pair, Workshop(pair)
'''
ENTRY_POINTS = """
[baco.routers]
Margin = riddles:margin
[baco.metrics]
shouting = riddles:shouting
[baco.methods]
greeting = riddles:Greeting
[baco.tasks]
riddles = riddles:TASK
[baco.samplers]
nudge = riddles:nudge
[baco.combiners]
Geometric = riddles:geometric
[baco.backends]
workshop = riddles:connect
"""
TASK = """
help = "two riddles"
max_tokens = 12
[source]
published = "nowhere"
"""


def install(folder: Path, name: str, entry_points: str) -> Path:
    """Write the metadata that pip writes for a package."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return folder


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Inside, the packages of a folder are installed."""
    sys.path.insert(0, str(folder))
    plugins.cache_clear()
    task_files.cache_clear()
    try:
        with restored():
            yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("riddles", None)
        plugins.cache_clear()
        task_files.cache_clear()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the module path with the package in it."""
    folder = install(tmp_path_factory.mktemp("site"), "riddles", ENTRY_POINTS)
    (folder / "riddles.py").write_text(SOURCE, encoding="utf-8")
    (folder / "riddles.toml").write_text(TASK, encoding="utf-8")
    (folder / "prompts.jsonl").write_text(
        '{"prompt": "Recommend a gift."}\n{"prompt": "What hobby should I start?"}\n'
    )
    with importable(folder):
        yield folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``command(*arguments, code=0)``: the output of ``baco ARGUMENTS``."""

    def call(*arguments: str | Path, code: int = 0) -> str:
        capsys.readouterr()
        got = run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert got == code, printed.err
        return printed.out if code == 0 else printed.err

    return call


def test_a_packages_router_is_listed_generated_and_diagnosed(
    site: Path, command: Callable[..., str]
) -> None:
    listed = json.loads(command("routers", "--json"))
    assert {"Margin"} <= {entry["name"] for entry in listed}
    answer = json.loads(
        command("generate", "Recommend a gift.", "-r", "margin-punc:0.4", "--json", "-s", "1")
    )
    assert answer["router"] == "Margin-Punc:0.4"
    diagnosis = json.loads(
        command("diagnose", "--json", "--prompts", site / "prompts.jsonl", "--max-tokens", "8")
    )
    assert "Margin:0.4" in diagnosis["base_share"]


def test_a_packages_router_is_calibrated_once_and_used_by_the_dial(
    site: Path, tmp_path: Path, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACO_HOME", str(tmp_path))
    undialled = command("generate", "Hi", "-r", "Margin", "-d", "1", code=2)
    assert "not calibrated for Margin" in undialled
    command(
        "calibrate", "--router", "Margin", "--prompts", site / "prompts.jsonl",
        "--max-tokens", "8", "--samples", "2",
    )  # fmt: skip
    [kept] = (tmp_path / "calibration").glob("*.json")
    curve = json.loads(kept.read_text())["curves"]["Margin"]
    assert curve["thresholds"] == [0.0, 0.5, 1.0]
    dialled = json.loads(command("generate", "Hi", "-r", "Margin", "-d", "1", "--json", "-s", "1"))
    name, threshold = dialled["router"].split(":")
    assert name == "Margin"
    assert 0.0 <= float(threshold) <= 1.0


def test_a_packages_router_is_served_and_shown_on_the_page(
    site: Path, demo: Baco, browser: Browser
) -> None:
    expected = demo.generate(PROMPT, router="Margin:0.4", seed=1)[0].text
    with served(demo) as server:
        reply = server.ask(model="baco/Margin:0.4", router=None, seed=1).json()
        assert reply["choices"][0]["message"]["content"] == expected
        with server.client as client:
            models = client.get("/v1/models").json()["data"]
            [entry] = [e for e in client.get("/baco/routers").json() if e["name"] == "Margin"]
        assert "baco/Margin:0.4" in {model["id"] for model in models}
        assert (entry["example"], entry["low"], entry["high"]) == ("Margin:0.4", 0.0, 1.0)
        link = f"{server.url}/#{urlencode({'prompt': PROMPT, 'n': 1, 'seed': 1, 'compare': 0})}"
        with visit(browser, link) as seen:
            seen.settle()
            seen.page.get_by_text("Router:").click()
            seen.page.get_by_role("radio", name=f"Margin {entry['sentence']}").check()
            expect(seen.page.locator(".of-baco")).to_contain_text("Margin:0.4")
            seen.settle()
            assert seen.column("baco") == [expected]


def test_a_backend_that_cannot_supply_the_reads_of_a_packages_router_refuses_it(
    site: Path, demo: Baco
) -> None:
    refusal = pytest.raises(BacoError, match=r"Margin:0\.4 may read whole rows")
    with served(demo) as server, remote(server.url) as elsewhere, refusal:
        elsewhere.generate(PROMPT, router="Margin:0.4")


def test_a_rule_of_this_process_alone_is_refused_by_vllm(site: Path, demo: Baco) -> None:
    vllm = VllmEngine(cast(VllmBackend, SimpleNamespace(capabilities=CAPABILITIES)))
    register_router("Homemade", lambda signals: signals.max_base < 0.5)
    with pytest.raises(BacoError, match="router Homemade exists in this process only"):
        vllm.add(request_of(demo, "Homemade"))
    assert portable(demo.router("Margin:0.4"))


def test_a_sweep_and_its_report_use_a_packages_task_methods_and_metrics(
    site: Path, tmp_path: Path, command: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    command(
        "sweep", "--task", f"riddles={site / 'prompts.jsonl'}", "--method", "greeting",
        "--router", "Margin", "--metric", "shouting", "-n", "2", "--workers", "1", "--out", run,
    )  # fmt: skip
    rows = [json.loads(line) for line in (run / "scores" / "shouting.jsonl").open()]
    assert {row["setting"] for row in rows} == {"greeting", "Margin:0.4"}
    assert {row["task"] for row in rows} == {"riddles"}
    command("report", run)
    for page in ("report.md", "index.html"):
        report = (run / "report" / page).read_text(encoding="utf-8")
        assert all(name in report for name in ("greeting", "Margin", "shouting", "riddles"))


def test_a_packages_task_methods_and_metrics_are_listed(
    site: Path, command: Callable[..., str]
) -> None:
    for kind, name, help in (
        ("tasks", "riddles", "two riddles"),
        ("methods", "greeting", "the aligned model, greeted first"),
        ("metrics", "shouting", "share of samples that end with an exclamation mark"),
    ):
        [entry] = [e for e in json.loads(command(kind, "--json")) if e["name"] == name]
        assert entry["help"] == help
        assert name in command(kind)


def test_a_packages_sampler_is_listed_generated_swept_served_and_refused(
    site: Path, tmp_path: Path, command: Callable[..., str], demo: Baco
) -> None:
    [listed] = [s for s in json.loads(command("samplers", "--json")) if s["name"] == "nudge"]
    assert listed["example"] == "nudge:1,5.0"
    assert "raise one token" in listed["help"]

    word = demo.pair.tokenizer.encode(" gift", add_special_tokens=False)[0]
    spelling = f"nudge:{word},by=100"
    generate = ("generate", "Recommend a gift.", "--sampler", spelling, "--json", "-s", "1")
    answer = json.loads(command(*generate))
    assert answer["params"]["samplers"] == [f"nudge:{word},100.0"]
    assert answer["samples"][0]["token_ids"].count(word) == 1

    run = tmp_path / "run"
    command(
        "sweep", "--task", f"riddles={site / 'prompts.jsonl'}", "--router", "Aligned",
        "--metric", "shouting", "-n", "2", "--workers", "1", "--sampler", spelling, "--out", run,
    )  # fmt: skip
    samples = [json.loads(line) for line in (run / "samples.jsonl").open()]
    assert len(samples) == 4
    assert all("gift" in sample["text"] for sample in samples)

    with served(demo) as server:
        body = {"model": "baco/Margin:0.4", "router": None, "samplers": [spelling], "seed": 1}
        reply = server.ask(**body, n=2).json()
        assert all("gift" in choice["message"]["content"] for choice in reply["choices"])
        refused = server.ask(samplers=["nudge"])
        assert refused.status_code == 400
        assert "needs token, as in nudge:1,5.0" in refused.json()["error"]["message"]

    request = request_of(demo, samplers=(spelling,))
    for backend in ("vllm", "remote", "workshop"):
        with pytest.raises(BacoError, match=f"the {backend} backend cannot run nudge"):
            Capabilities(backend).check(request)


def test_a_packages_combiner_is_listed_generated_swept_served_and_refused(
    site: Path, tmp_path: Path, command: Callable[..., str], demo: Baco
) -> None:
    [listed] = [c for c in json.loads(command("combiners", "--json")) if c["name"] == "Geometric"]
    assert listed == {
        "name": "Geometric",
        "example": "Geometric:0.5",
        "help": "the aligned model, pulled to the base",
    }
    generate = ("generate", PROMPT, "-r", "geometric:power=0.3", "-s", "1", "--json")
    answer = json.loads(command(*generate))
    assert answer["router"] == "Geometric:0.3"
    assert answer["samples"][0]["base_share"] is None
    expected = demo.generate(PROMPT, router="Geometric:0.3", seed=1)[0].text
    assert answer["samples"][0]["text"] == expected

    run = tmp_path / "run"
    command(
        "sweep", "--task", f"riddles={site / 'prompts.jsonl'}", "--router", "Geometric:0.3",
        "--router", "P-Punc:0.4", "--metric", "shouting", "-n", "2", "--workers", "1", "--out", run,
    )  # fmt: skip
    samples = [json.loads(line) for line in (run / "samples.jsonl").open()]
    of_both = [sample for sample in samples if sample["setting"] == "Geometric:0.3"]
    assert len(of_both) == 4
    assert {sample["base_share"] for sample in of_both} == {None}
    assert {source for sample in of_both for _, source in sample["pieces"]} == {None}
    command("report", run)
    report = (run / "report" / "report.md").read_text(encoding="utf-8")
    [row] = [line for line in report.splitlines() if "| Geometric:0.3 |" in line]
    assert "| mixed |" in row

    with served(demo) as server:
        reply = server.ask(model="baco/Geometric:0.3", router=None, seed=1).json()
        assert reply["choices"][0]["message"]["content"] == expected
        with server.client as client:
            models = client.get("/v1/models").json()["data"]
        assert "baco/Geometric:0.5" in {model["id"] for model in models}

    request = request_of(demo, "Geometric")
    for backend in ("vllm", "remote", "workshop"):
        with pytest.raises(BacoError, match=f"the {backend} backend cannot run the combiner"):
            Capabilities(backend).check(request)


def request_of(baco: Baco, router: str = "Aligned", **sampling: Any) -> Request:
    prompt, params = baco.pair.renderer.render("Hello"), SamplingParams(seed=1, **sampling)
    chosen = baco.router(router)
    return Request(prompt.base_ids, prompt.aligned_ids, params, chosen, digest=prompt.digest)


def test_a_packages_backend_decodes_and_serves_and_its_refusal_is_one_line(
    site: Path, command: Callable[..., str], demo: Baco
) -> None:
    expected = demo.generate(PROMPT, router="P-Punc:0.4", seed=1)[0].text
    generate = ("generate", PROMPT, "-r", "P-Punc:0.4", "-s", "1", "--json")
    reply = json.loads(command(*generate, "--backend", "workshop"))
    assert reply["samples"][0]["text"] == expected
    with served(Baco.load("demo", backend="workshop", tools="all")) as server:
        assert server.ask(seed=1).json()["choices"][0]["message"]["content"] == expected
        refused = server.ask(seed=1, explain=True)
        assert refused.status_code == 400
        assert "the workshop backend cannot" in refused.json()["error"]["message"]
    with pytest.raises(BacoError, match="the workshop has no tools 'few'"):
        Baco.load("demo", backend="workshop", tools="few")
    with pytest.raises(BacoError, match=r"the workshop backend takes no paint; .* max_rows, tools"):
        Baco.load("demo", backend="workshop", paint="red")
    unknown = command("generate", "Hi", "--backend", "elsewhere", code=2)
    assert unknown.count("\n") == 1
    assert "workshop" in unknown


def test_a_package_that_cannot_be_loaded_is_named_in_one_line(
    tmp_path: Path, command: Callable[..., str]
) -> None:
    install(tmp_path, "broken", "[baco.routers]\nOdd = missing_module:odd\n")
    with importable(tmp_path):
        refused = command("routers", code=2)
    assert "broken brings 'Odd' in baco.routers" in refused
    assert "missing_module" in refused
    assert refused.count("\n") == 1


def test_importing_baco_loads_no_plugin(site: Path) -> None:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    script = textwrap.dedent("""
        import sys, baco
        assert "riddles" not in sys.modules and "importlib.metadata" not in sys.modules
    """)
    subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, check=True
    )
