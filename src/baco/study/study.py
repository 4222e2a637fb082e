"""The directory of a study, and what is in force in it.

plan.json             everything that was decided before the first judgment
texts.json            the texts of prompts and answers, by their SHA-256
judgments.sqlite      plans, raters and answers
report/               what 'baco study report' writes
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from baco.batch.job import as_manifest, begin_folder
from baco.errors import BacoError, one_line
from baco.study.plan import Plan, Stimulus, read_plan, text_hash
from baco.study.schedule import texts_shown
from baco.study.store import NAME, Judgment, Store

PLAN, TEXTS = "plan.json", "texts.json"


@dataclass(frozen=True, slots=True)
class Study:
    """An existing study.

    Attributes:
        path: of its directory.
        plan: in force.
        version: of the plan.
        texts: of prompts and answers, by SHA-256.
        store: of raters and answers.
    """

    path: Path
    plan: Plan
    version: int
    texts: Mapping[str, str]
    store: Store

    @classmethod
    def open(cls, path: str | Path) -> "Study":
        """Open a study.

        Raises:
            BacoError: the directory holds no study, a text is missing or changed, or the plan was
                changed after the first answer.
        """
        folder = Path(path)
        plan = read_plan(folder / PLAN)
        texts = _read_texts(folder / TEXTS, plan)
        store = Store(folder / NAME)
        try:
            version = _version(folder, plan, store)
        except BaseException:
            store.close()
            raise
        return cls(folder, plan, version, texts, store)

    @classmethod
    def create(cls, path: Path, plan: Plan, texts: Mapping[str, str]) -> "Study":
        """Write a new study.

        Raises:
            BacoError: the directory holds something else, or another plan, or cannot be written.
        """
        files = {TEXTS: as_manifest(dict(sorted(texts.items()))), PLAN: as_manifest(plan.to_json())}
        if begin_folder(path, files, "study", "another --out"):
            there = read_plan(path / PLAN)
            if there.hash != plan.hash:
                raise BacoError(
                    f"{path} holds a study with another plan ({there.hash[:12]}): choose another "
                    "--out, or edit its plan.json"
                )
        return cls.open(path)

    def answers(self, stimulus: Stimulus) -> list[str]:
        """The texts of a stimulus."""
        return [self.texts[text] for text in stimulus.texts]

    def prompt_text(self, prompt: str) -> str:
        """The text of a prompt."""
        return self.texts[self.plan.prompt[prompt].text]

    def judgments(self) -> Iterator[Judgment]:
        """All judgments, those of simulated raters included."""
        return self.store.judgments()

    @property
    def simulated(self) -> bool:
        """Whether any rater is simulated; every output must say so."""
        return any(rater.origin == "simulated" for rater in self.store.raters())

    def close(self) -> None:
        """Close the store."""
        self.store.close()


def amend(path: Path, reason: str) -> Study:
    """Start a new version of a study whose ``plan.json`` was changed after the first answer.

    Raises:
        BacoError: no reason, or an unchanged plan.
    """
    if not reason.strip():
        raise BacoError("a new version of a plan needs a reason: give --reason TEXT")
    plan = read_plan(path / PLAN)
    _read_texts(path / TEXTS, plan)
    store = Store(path / NAME)
    try:
        versions = store.versions()
        if versions and versions[-1].hash == plan.hash:
            raise BacoError(f"{path / PLAN} is unchanged: edit it first")
        store.adopt(plan, reason.strip())
    finally:
        store.close()
    return Study.open(path)


def _version(folder: Path, plan: Plan, store: Store) -> int:
    versions = store.versions()
    if versions and versions[-1].hash == plan.hash:
        return versions[-1].version
    if versions and store.answers():
        raise BacoError(
            f"{folder / PLAN} was changed after the first answer (its hash was "
            f"{versions[-1].hash[:12]}, now {plan.hash[:12]}): change it back, or start a new "
            f"version with 'baco study amend {folder} --reason TEXT'"
        )
    return store.adopt(plan)


def _read_texts(path: Path, plan: Plan) -> dict[str, str]:
    try:
        texts: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BacoError(f"cannot read {path}: {one_line(error)}") from error
    for hash in texts_shown(plan):
        text = texts.get(hash)
        if not isinstance(text, str):
            raise BacoError(f"{path} has no text {hash[:12]}, which the plan shows: restore it")
        if text_hash(text) != hash:
            raise BacoError(f"{path}: text {hash[:12]} was changed after the plan: restore it")
    return texts
