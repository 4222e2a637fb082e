"""Small real runs of the demo pair with reports, for the tests of reports."""

from pathlib import Path

import pytest

from baco.cli import run as baco

# What a model or a prompt may say; none of it may act in a page or break a table.
EVIL = (
    "</script><script>window.evil=1</script><img src=x onerror=window.evil=1> | `a` *b* "
    "\x1b[2J\x9b\ufffe"
)


def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, aligned, mixing, Nudging and three routers on four prompts of two tasks, reported."""
    run = tmp_path_factory.mktemp("runs") / "run"
    options = ["-t", "demo", "-t", "demo-facts", "--limit", "4", "-n", "3", "--preset", "quick"]
    for method in ("base", "aligned", "mixing"):
        options += ["-m", method]
    for router in ("P-Punc", "Rand", "Rand:0.5", "FC", "Nudging"):
        options += ["-r", router]
    for metric in ("distinct_1", "self_rouge_l", "distinct_k", "reward", "accuracy"):
        options += ["--metric", metric]
    assert baco(["sweep", "-o", str(run), "--workers", "1", *options]) == 0
    assert baco(["report", str(run)]) == 0
    return run


def evil_run(folder: Path) -> Path:
    """One prompt with an HTML injection, one method, one metric, reported."""
    prompts = folder / "prompts.txt"
    prompts.write_text(EVIL + "\n", encoding="utf-8")
    run = folder / "run"
    options = ["-t", str(prompts), "-n", "2", "-m", "mixing", "--metric", "distinct_1"]
    assert baco(["sweep", "-o", str(run), "--workers", "1", *options]) == 0
    assert baco(["report", str(run)]) == 0
    return run
