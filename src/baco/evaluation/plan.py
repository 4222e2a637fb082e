"""The plan of a run: its samples, their order, and the configuration that describes them."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import baco
from baco.backends import LLAMA_CPP, LOCAL
from baco.device import cores, processor
from baco.errors import BacoError
from baco.evaluation.methods import Draw, needs_one_tokenizer
from baco.evaluation.methods.routed import Routed
from baco.evaluation.records import Prompt, Setting
from baco.evaluation.tasks import Task
from baco.models.gguf import is_gguf
from baco.models.known_pairs import KnownPair, choose_pair
from baco.models.llama_cpp_pair import suits
from baco.models.pair import have_different_tokenizers
from baco.sampling.params import SamplingParams
from baco.sampling.seeds import NOISE_VERSION
from baco.text.templates import today
from baco.version import __version__

# Number of answers that are decoded together between two writes.
ANSWERS_A_JOB = 400


@dataclass(frozen=True, slots=True)
class PairSpec:
    """A pair as the user names it, and the options it is loaded with.

    Attributes:
        name: a short name, a folder, or ``BASE+ALIGNED``.
        options: keywords of :meth:`baco.Baco.load`.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> dict[str, Any]:
        """The pair's keywords for :meth:`baco.Baco.load`."""
        base, plus, aligned = (part.strip() for part in self.name.partition("+"))
        if plus and base and aligned and not Path(self.name).exists():
            return {"base": base, "aligned": aligned}
        return {"name": self.name}

    def known(self) -> KnownPair:
        """The pair that it names.

        Raises:
            BacoError: there is none of this name.
        """
        return choose_pair(*(self.where.get(key) for key in ("name", "base", "aligned")))

    def with_backend(self, begun: str | None) -> "PairSpec":
        """The same pair; of GGUF files with the backend that runs them, since this depends on what
        is installed.

        Args:
            begun: the backend with which the run was begun.
        """
        known = self.known()
        if "backend" in self.options or not (is_gguf(known.base) and is_gguf(known.aligned)):
            return self
        backend = begun or (LLAMA_CPP if suits(known, self.options) else LOCAL)
        return replace(self, options={**self.options, "backend": backend})

    def has_different_tokenizers(self) -> bool:
        """See `baco.models.pair.have_different_tokenizers`.

        Raises:
            BacoError: a tokenizer cannot be found or loaded.
        """
        forced = bool(self.options.get("separate_tokenizers"))
        trust = bool(self.options.get("trust_remote_code"))
        return forced or have_different_tokenizers(self.known(), trust_remote_code=trust)

    def bytes(self) -> int | None:
        """Bytes of both models' weights on this disk; None where they are not."""
        known = self.known()
        sizes = [
            sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
            for folder in (known.base, known.aligned)
        ]
        return sum(sizes) if all(sizes) else None


@dataclass(frozen=True, slots=True)
class Job:
    """Samples that are decoded and written together: some prompts of a task at one setting."""

    pair: PairSpec
    task: str
    setting: Setting
    prompts: tuple[Prompt, ...]
    draw: Draw


@dataclass(frozen=True, slots=True)
class Plan:
    """All samples of a run.

    Attributes:
        pairs, tasks, settings: all combinations of them.
        n: samples per prompt.
        seed: of all draws.
        sampling: keywords of :class:`baco.SamplingParams` over the pair's own.
    """

    pairs: Sequence[PairSpec]
    tasks: Sequence[Task]
    settings: Sequence[Setting]
    n: int
    seed: int
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Check everything that can be checked before a model is loaded.

        Raises:
            BacoError: no pair, a pair or task named twice, a parameter out of its range.
        """
        SamplingParams(n=self.n, seed=self.seed).updated(self.sampling)
        for what, names in (
            ("pair", [pair.name for pair in self.pairs]),
            ("task", [task.name for task in self.tasks]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise BacoError(f"{what} {twice[0]!r} is named twice: name every {what} once")
        for pair in self.pairs:
            pair.known()

    def check_tokenizers(self) -> None:
        """Check that every setting can be run on every pair; tokenizers are loaded for it.

        Raises:
            BacoError: a pair has different tokenizers, and a setting needs one.
        """
        refused = dict.fromkeys(_spelled(s) for s in self.settings if needs_one_tokenizer(s))
        if not refused:
            return
        rest = dict.fromkeys(_spelled(s) for s in self.settings if not needs_one_tokenizer(s))
        for pair in self.pairs:
            if pair.has_different_tokenizers():
                raise BacoError(
                    f"{pair.name} has two tokenizers, and these methods compare or mix the "
                    f"distributions of both models: {' '.join(refused)}; name the others alone: "
                    f"{' '.join(rest) or '-r P'}"
                )

    @property
    def prompts_a_job(self) -> int:
        """Number of prompts whose samples are decoded together."""
        return max(1, ANSWERS_A_JOB // self.n)

    def jobs(self) -> Iterator[Job]:
        """All jobs, in the order of the samples."""
        for pair in self.pairs:
            for task in self.tasks:
                longest = {} if task.max_tokens is None else {"max_tokens": task.max_tokens}
                draw = Draw(self.n, self.seed, longest | dict(self.sampling))
                for setting in self.settings:
                    for start in range(0, len(task.prompts), self.prompts_a_job):
                        prompts = task.prompts[start : start + self.prompts_a_job]
                        yield Job(pair, task.name, setting, prompts, draw)

    def config(self, command: str = "") -> dict[str, Any]:
        """The content of run.json: the plan, and under ``made`` versions, machine and date.

        The date on which a run began stays the date in prompts when the run continues.

        Args:
            command: the command line; empty where the run was begun from Python.
        """
        return {
            "pairs": [asdict(pair) for pair in self.pairs],
            "tasks": [_described(task) for task in self.tasks],
            "settings": [asdict(setting) for setting in self.settings],
            "n": self.n,
            "seed": self.seed,
            "noise": NOISE_VERSION,
            "sampling": dict(self.sampling),
            "prompts_a_job": self.prompts_a_job,
            "made": {"command": command, "date": today(), **provenance()},
        }


def _spelled(setting: Setting) -> str:
    """The option that names a setting's method."""
    kind = setting.options["kind"]
    return f"-r {setting.method}" if kind == Routed.name else f"-m {kind}"


def _described(task: Task) -> dict[str, Any]:
    prompts = json.dumps([asdict(prompt) for prompt in task.prompts], sort_keys=True)
    return {
        "name": task.name,
        "source": task.source,
        "prompts": len(task.prompts),
        "sha256": hashlib.sha256(prompts.encode()).hexdigest(),
        "max_tokens": task.max_tokens,
        "judge": task.judge,
        "verifier": task.verifier,
    }


def provenance() -> dict[str, Any]:
    """Versions, git revision and machine."""
    return {
        "baco": __version__,
        "git": git_revision(Path(baco.__file__).parent),
        "python": platform.python_version(),
        "machine": machine(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def machine() -> str:
    """This machine's processor, architecture and number of usable cores."""
    return f"{processor()}, {platform.machine()}, {cores()} core{'s' if cores() > 1 else ''}"


def git_revision(folder: Path) -> str | None:
    """The commit of the source tree in `folder`, ``-dirty`` where it was changed; None if none."""

    def git(*words: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        )
        return result.stdout.strip()

    try:
        # Fails where git does not track the folder.
        git("ls-files", "--error-unmatch", "__init__.py")
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None
