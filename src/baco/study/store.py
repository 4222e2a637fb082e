"""The judgments of a study, in one SQLite file that several processes may read and write.

SQLite runs in WAL mode with full synchronisation: an answer that `Store.save` returned from is on
the disk, and survives a kill of the process and of the machine. No addresses and no names of raters
are stored. The id that a crowd platform gives a rater is stored only to pay the rater, apart from
the judgments, and is in no export.
"""

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from baco.errors import BacoError, one_line
from baco.study.plan import Check, Kind, Plan, Side, Unit

NAME = "judgments.sqlite"
# Seconds that a writer waits for another one.
BUSY = 30.0
LINK_BYTES = 18  # 144 random bits

RaterOrigin = Literal["human", "simulated", "imported"]
State = Literal["invited", "consented", "rating", "finished", "withdrawn"]
# What a rater answered on an item, by question: a side, or the ratings of left and right.
Responses = Mapping[str, "Side | tuple[int, int]"]

# Deleted answers are overwritten in the file.
_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON")
_SCHEMA = """
CREATE TABLE plans (
    version INTEGER PRIMARY KEY, hash TEXT NOT NULL, plan TEXT NOT NULL, reason TEXT NOT NULL,
    adopted REAL NOT NULL
);
CREATE TABLE raters (
    id TEXT PRIMARY KEY, number INTEGER UNIQUE, link TEXT UNIQUE, crowd TEXT UNIQUE,
    code TEXT NOT NULL, origin TEXT NOT NULL, state TEXT NOT NULL, mistakes INTEGER NOT NULL,
    begun REAL, ended REAL
);
CREATE TABLE answers (
    rater TEXT NOT NULL REFERENCES raters ON DELETE CASCADE, item TEXT NOT NULL,
    position INTEGER NOT NULL, left TEXT NOT NULL, right TEXT NOT NULL, responses TEXT NOT NULL,
    seconds REAL NOT NULL, revisions INTEGER NOT NULL, version INTEGER NOT NULL,
    saved REAL NOT NULL, PRIMARY KEY (rater, item)
);
CREATE TABLE secrets (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class PlanVersion:
    """A plan that was in force.

    Attributes:
        version: from 1.
        hash: of the plan.
        plan: the whole plan.
        reason: why it took the place of the one before; empty for the first.
        adopted: in seconds since 1970.
    """

    version: int
    hash: str
    plan: Plan
    reason: str
    adopted: float


@dataclass(frozen=True, slots=True)
class Rater:
    """A rater, without anything that says who it is.

    Attributes:
        id: random.
        number: of the rater's schedule, from 0; None after a withdrawal.
        origin: ``human``, ``simulated`` or ``imported``.
        state: how far the rater is.
        mistakes: wrong answers to comprehension questions.
        begun, ended: in seconds since 1970; None where it has not happened.
        link: secret part of the rater's link; None where the rater has none.
        code: completion code for a crowd platform.
    """

    id: str
    number: int | None
    origin: RaterOrigin
    state: State
    mistakes: int = 0
    begun: float | None = None
    ended: float | None = None
    link: str | None = None
    code: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a rater answered on one item, as it is stored.

    Attributes:
        rater, item: their ids. A rater answers an item once; a later answer replaces it.
        position: of the item in the rater's schedule, from 0; training items come before, from -1
            downwards.
        left, right: ids of the stimuli as shown.
        responses: by question: ``left``, ``tie`` or ``right``, or the ratings of left and right.
        seconds: how long the item was visible, over all visits.
        version: of the plan.
        revisions: how often the answer was changed.
        saved: in seconds since 1970.
    """

    rater: str
    item: str
    position: int
    left: str
    right: str
    responses: Responses
    seconds: float
    version: int = 1
    revisions: int = 0
    saved: float = 0.0


@dataclass(frozen=True, slots=True)
class Judgment:
    """One rater's answer to one question about one item, with all that an analysis needs.

    Attributes:
        rater, item, question: their ids.
        origin: of the rater.
        kind, unit, check, prompt: of the item.
        left, right: ids of the stimuli as shown.
        left_method, right_method: labels; empty for texts of checks and training.
        side: the choice of a preference, None for a rating.
        left_rating, right_rating: from 1 to 5; None for a preference.
        expected: the right answer of a check; for a rating, the side with the higher number.
        position: in the rater's schedule.
        seconds: on the item.
        words: of the item.
        version: of the plan.
    """

    rater: str
    item: str
    question: str
    origin: RaterOrigin
    kind: Kind
    unit: Unit
    check: Check | None
    prompt: str
    left: str
    right: str
    left_method: str
    right_method: str
    side: Side | None
    left_rating: int | None
    right_rating: int | None
    expected: Side | None
    position: int
    seconds: float
    words: int
    version: int

    @property
    def passed(self) -> bool | None:
        """Whether a check was passed; None where nothing is expected."""
        return None if self.expected is None else self.direction == self.expected

    @property
    def direction(self) -> Side:
        """The side that is preferred or that has the higher rating."""
        if self.side is not None:
            return self.side
        assert self.left_rating is not None
        assert self.right_rating is not None
        return preferred_side((self.left_rating, self.right_rating))


class Store:
    """The SQLite file of a study.

    Args:
        path: of the file. It is created where it does not exist, readable by its owner only.

    Raises:
        BacoError: it cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._database = sqlite3.connect(
                path, timeout=BUSY, isolation_level=None, check_same_thread=False
            )
        except OSError as error:
            raise BacoError(f"cannot write {path}: {error.strerror}") from error
        with self._errors():
            for pragma in _PRAGMAS:
                self._database.execute(f"PRAGMA {pragma}")
            with self._transaction():
                (tables,) = self._one("SELECT count(*) FROM sqlite_master WHERE type = 'table'")
                if not tables:
                    for statement in filter(str.strip, _SCHEMA.split(";")):
                        self._database.execute(statement)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    # Plans.

    def versions(self) -> list[PlanVersion]:
        """The plans so far, the one in force last."""
        rows = self._rows("SELECT version, hash, plan, reason, adopted FROM plans ORDER BY version")
        return [
            PlanVersion(version, hash, Plan.from_json(json.loads(plan)), reason, adopted)
            for version, hash, plan, reason, adopted in rows
        ]

    def adopt(self, plan: Plan, reason: str = "") -> int:
        """Make this plan the one in force, and return its version.

        Without answers it takes the place of all plans before, as version 1; else it is a new
        version.
        """
        text = json.dumps(plan.to_json(), ensure_ascii=False)
        with self._errors(), self._transaction():
            (answers,) = self._one("SELECT count(*) FROM answers")
            if not answers:
                self._database.execute("DELETE FROM plans")
            (version,) = self._one("SELECT coalesce(max(version), 0) + 1 FROM plans")
            self._database.execute(
                "INSERT INTO plans VALUES (?, ?, ?, ?, ?)",
                (version, plan.hash, text, reason, time.time()),
            )
        return int(version)

    # Raters.

    def raters(self) -> list[Rater]:
        """All raters, in the order of their numbers; withdrawn raters last."""
        rows = self._rows(f"SELECT {_RATER} FROM raters ORDER BY number IS NULL, number, id")
        return [Rater(*row) for row in rows]

    def rater(self, *, link: str) -> Rater | None:
        """The rater with this link."""
        rows = self._rows(f"SELECT {_RATER} FROM raters WHERE link = ?", (link,))
        return Rater(*rows[0]) if rows else None

    def add_rater(
        self,
        *,
        origin: RaterOrigin = "human",
        id: str | None = None,
        linked: bool = True,
        at_most: int | None = None,
        crowd: str | None = None,
    ) -> Rater | None:
        """Add a rater with the lowest free number.

        Args:
            origin: see `Rater`.
            id: of an imported rater; by default random.
            linked: whether the rater gets a link.
            at_most: None is returned where this many numbers are taken.
            crowd: name on a crowd platform. A rater who is known by it is returned again; only a
                keyed hash of it is stored.
        """
        mark = None if crowd is None else self._marked(crowd)
        link = secrets.token_urlsafe(LINK_BYTES) if linked else None
        with self._errors(), self._transaction():
            if mark is not None:
                known = self._database.execute(
                    f"SELECT {_RATER} FROM raters WHERE crowd = ?", (mark,)
                ).fetchone()
                if known:
                    return Rater(*known)
            taken = {n for (n,) in self._database.execute("SELECT number FROM raters")}
            number = next(n for n in range(len(taken) + 1) if n not in taken)
            if at_most is not None and number >= at_most:
                return None
            rater = Rater(
                id or f"r{secrets.token_hex(6)}",
                number,
                origin,
                "invited",
                link=link,
                code=secrets.token_hex(4).upper(),
            )
            self._database.execute(
                "INSERT INTO raters (id, number, link, crowd, code, origin, state, mistakes) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
                (rater.id, number, link, mark, rater.code, origin, rater.state),
            )
        return rater

    def update_rater(self, id: str, state: State, mistakes: int | None = None) -> None:
        """Note how far a rater is, and wrong answers to comprehension questions."""
        with self._errors(), self._transaction():
            now = time.time()
            self._database.execute(
                "UPDATE raters SET state = ?, mistakes = coalesce(?, mistakes), "
                "begun = CASE WHEN ? = 'consented' THEN coalesce(begun, ?) ELSE begun END, "
                "ended = CASE WHEN ? = 'finished' THEN coalesce(ended, ?) ELSE ended END "
                "WHERE id = ?",
                (state, mistakes, state, now, state, now, id),
            )

    def withdraw(self, id: str) -> None:
        """Delete all data of a rater, except that this link has withdrawn; its number is free."""
        with self._errors(), self._transaction():
            self._database.execute("DELETE FROM answers WHERE rater = ?", (id,))
            self._database.execute(
                "UPDATE raters SET state = 'withdrawn', number = NULL, crowd = NULL, mistakes = 0, "
                "begun = NULL, ended = NULL WHERE id = ?",
                (id,),
            )
        with self._errors(), self._lock:  # the log of writes holds deleted answers too
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # Answers.

    def save(self, answers: Iterable[Answer]) -> None:
        """Save answers, all or none of them; they are on the disk when this returns.

        An answer of the same rater to the same item is replaced, and its revisions are counted if
        the responses differ.

        Raises:
            BacoError: the disk is full, or the file cannot be written.
        """
        with self._errors(), self._transaction():
            self._insert(answers)

    def add_imported(self, raters: Mapping[str, RaterOrigin], answers: Iterable[Answer]) -> None:
        """Add raters by their ids, and answers, all or none of them.

        Raters get no number, so that they take no place of the schedule.
        """
        with self._errors(), self._transaction():
            self._database.executemany(
                "INSERT INTO raters (id, code, origin, state, mistakes) "
                "VALUES (?, '', ?, 'finished', 0)",
                list(raters.items()),
            )
            self._insert(answers)

    def _insert(self, answers: Iterable[Answer]) -> None:
        self._database.executemany(
            "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (rater, item) DO UPDATE SET position = excluded.position, "
            "left = excluded.left, right = excluded.right, responses = excluded.responses, "
            "seconds = excluded.seconds, version = excluded.version, saved = excluded.saved, "
            "revisions = revisions + (responses != excluded.responses)",
            [
                (
                    a.rater,
                    a.item,
                    a.position,
                    a.left,
                    a.right,
                    json.dumps(dict(a.responses), sort_keys=True),
                    a.seconds,
                    a.revisions,
                    a.version,
                    a.saved or time.time(),
                )
                for a in answers
            ],
        )

    def answers(self, rater: str | None = None) -> list[Answer]:
        """The answers of all raters or of one, in the order of raters and positions."""
        where, values = ("", ()) if rater is None else (" WHERE rater = ?", (rater,))
        rows = self._rows(f"SELECT {_ANSWER} FROM answers{where} ORDER BY rater, position", values)
        names = _ANSWER.split(", ")
        answers = [dict(zip(names, row, strict=True)) for row in rows]
        return [Answer(**row | {"responses": _responses(row["responses"])}) for row in answers]

    def judgments(self) -> Iterator[Judgment]:
        """All judgments of all raters; every answer is read with the plan of its version."""
        plans = {version.version: version.plan for version in self.versions()}
        origins = {rater.id: rater.origin for rater in self.raters()}
        for answer in self.answers():
            yield from as_judgments(plans[answer.version], answer, origins[answer.rater])

    # Secrets.

    def secret(self, name: str) -> str:
        """A random text that is kept with the study, made when it is first asked for."""
        with self._errors(), self._transaction():
            self._database.execute(
                "INSERT OR IGNORE INTO secrets VALUES (?, ?)", (name, secrets.token_urlsafe(24))
            )
            (value,) = self._one("SELECT value FROM secrets WHERE name = ?", (name,))
        return str(value)

    def _marked(self, crowd: str) -> str:
        key = self.secret("crowd").encode()
        return hmac.new(key, crowd.encode(), hashlib.sha256).hexdigest()

    # SQLite.

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            full = getattr(error, "sqlite_errorname", "") == "SQLITE_FULL"
            raise BacoError(
                f"cannot save to {self.path}: the disk is full; free some space and try again"
                if full
                else f"cannot use {self.path}: {one_line(error)}"
            ) from error

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._errors(), self._lock:
            return self._database.execute(query, values).fetchall()

    def _one(self, query: str, values: Sequence[Any] = ()) -> Any:
        return self._database.execute(query, values).fetchone()


def preferred_side(response: "Side | tuple[int, int]") -> Side:
    """The side that a response prefers or rates higher."""
    if isinstance(response, str):
        return response
    left, right = response
    return "tie" if left == right else "left" if left > right else "right"


_RATER = "id, number, origin, state, mistakes, begun, ended, link, code"
_ANSWER = "rater, item, position, left, right, responses, seconds, version, revisions, saved"


def as_judgments(plan: Plan, answer: Answer, origin: RaterOrigin) -> Iterator[Judgment]:
    """The judgments of one answer, in the order of the plan's questions."""
    item = plan.item[answer.item]
    for question in plan.asked(item.unit):
        if question.id not in answer.responses:
            continue
        response = answer.responses[question.id]
        side = response if isinstance(response, str) else None
        left_rating, right_rating = (None, None) if isinstance(response, str) else response
        yield Judgment(
            rater=answer.rater,
            item=item.id,
            question=question.id,
            origin=origin,
            kind=item.kind,
            unit=item.unit,
            check=item.check,
            prompt=item.prompt,
            left=answer.left,
            right=answer.right,
            left_method=plan.stimulus[answer.left].method,
            right_method=plan.stimulus[answer.right].method,
            side=side,
            left_rating=left_rating,
            right_rating=right_rating,
            expected=item.expected_side(question.id, swapped=answer.left == item.second),
            position=answer.position,
            seconds=answer.seconds,
            words=plan.words(item),
            version=answer.version,
        )


def _responses(text: str) -> dict[str, Any]:
    return {
        question: response if isinstance(response, str) else tuple(response)
        for question, response in json.loads(text).items()
    }
