"""What was asked for and what has become of it, in one SQLite file."""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
UNFINISHED = (QUEUED, RUNNING)

_TABLE = """
CREATE TABLE IF NOT EXISTS videos (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, once TEXT, status TEXT NOT NULL, request TEXT NOT NULL,
    created_at REAL NOT NULL, started_at REAL, completed_at REAL,
    parts INTEGER NOT NULL, total INTEGER NOT NULL, error TEXT, UNIQUE (owner, once));
CREATE INDEX IF NOT EXISTS by_time ON videos (owner, created_at, id);
CREATE TABLE IF NOT EXISTS searches (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, once TEXT, status TEXT NOT NULL, request TEXT NOT NULL,
    created_at REAL NOT NULL, completed_at REAL, candidates TEXT NOT NULL, error TEXT, UNIQUE (owner, once));
CREATE TABLE IF NOT EXISTS actions (
    id TEXT NOT NULL, number INTEGER NOT NULL, keys TEXT NOT NULL, sequence INTEGER, PRIMARY KEY (id, number))
    WITHOUT ROWID;
"""


@dataclass
class Record:
    """One video. once: the key by which its owner asks for it once, however often the request is sent. request: as it
    was checked. parts: chunks that are done, of `total`. error: what a person is told.
    """

    id: str
    owner: str
    request: dict[str, Any]
    total: int
    once: str | None = None
    status: str = QUEUED
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    completed_at: float | None = None
    parts: int = 0
    error: str | None = None

    @property
    def progress(self) -> int:
        """Percent; of a live video, which nobody knows the length of, 0 until it is whole."""
        if self.status == COMPLETED:
            return 100
        return 100 * self.parts // self.total if self.total else 0

    @property
    def live(self) -> bool:
        """Whether its person says chunk by chunk where the camera goes; then `total` is 0."""
        return bool(self.request.get("live"))


@dataclass
class Search:
    """Videos of which the best are kept. candidates: of each its `video`, what it was asked for, its `scores` and their
    weighted `total` once it is whole, whether it is `kept`, and the video that is `refined` from it.
    """

    id: str
    owner: str
    request: dict[str, Any]
    candidates: list[dict[str, Any]]
    once: str | None = None
    status: str = QUEUED
    created_at: float = field(default_factory=time.time)
    completed_at: float | None = None
    error: str | None = None


_JSON = {"request", "candidates"}  # columns


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else value


Kept = TypeVar("Kept", Record, Search)


class Table(Generic[Kept]):
    """What one table keeps of each owner."""

    def __init__(self, db: sqlite3.Connection, name: str, kind: type[Kept]) -> None:
        self._db, self._name, self._kind = db, name, kind
        self._fields = [each.name for each in fields(kind)]

    def add(self, record: Kept) -> Kept:
        """The record, or the one that its owner asked for with the same `once` before."""
        values = [_plain(getattr(record, name)) for name in self._fields]
        places = ", ".join("?" * len(values))
        try:
            self._db.execute(f"INSERT INTO {self._name} ({', '.join(self._fields)}) VALUES ({places})", values)
        except sqlite3.IntegrityError:
            (before,) = self._select("WHERE owner = ? AND once = ?", record.owner, record.once)
            return before
        return record

    def get(self, id: str) -> Kept | None:
        found = self._select("WHERE id = ?", id)
        return found[0] if found else None

    def owned(self, owner: str, id: str) -> Kept | None:
        """What `get` gives to its owner, and to nobody else."""
        record = self.get(id)
        return record if record is not None and record.owner == owner else None

    def once(self, owner: str, once: str) -> Kept | None:
        found = self._select("WHERE owner = ? AND once = ?", owner, once)
        return found[0] if found else None

    def page(self, owner: str, limit: int, after: Kept | None, newest_first: bool) -> list[Kept]:
        """A page of an owner's, after one of them."""
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
        where, values = "WHERE owner = ?", [owner]
        if after is not None:
            where += f" AND (created_at, id) {sign} (?, ?)"
            values += [after.created_at, after.id]
        return self._select(f"{where} ORDER BY created_at {order}, id {order} LIMIT ?", *values, limit)

    def page_after(self, owner: str, limit: int, after: str | None, newest_first: bool) -> list[Kept] | None:
        """The same by its name; None when its owner has none of that name."""
        before = None if after is None else self.owned(owner, after)
        return None if after is not None and before is None else self.page(owner, limit, before, newest_first)

    def unfinished(self) -> list[Kept]:
        """The oldest first."""
        return self._select("WHERE status IN (?, ?) ORDER BY created_at, id", *UNFINISHED)

    def update(self, id: str, **values: Any) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        self._db.execute(f"UPDATE {self._name} SET {names} WHERE id = ?", [*map(_plain, values.values()), id])

    def remove(self, id: str) -> None:
        self._db.execute(f"DELETE FROM {self._name} WHERE id = ?", [id])

    def counts(self) -> dict[str, int]:
        """How many there are of each status."""
        return dict(self._db.execute(f"SELECT status, COUNT(*) FROM {self._name} GROUP BY status").fetchall())

    def _select(self, where: str, *values: Any) -> list[Kept]:
        rows = self._db.execute(f"SELECT {', '.join(self._fields)} FROM {self._name} {where}", values).fetchall()
        named = (dict(zip(self._fields, row, strict=True)) for row in rows)
        return [self._kind(**each | {name: json.loads(each[name]) for name in _JSON & each.keys()}) for each in named]


class Ledger(Table[Record]):
    """Of videos, with their `searches` beside them. Used by one process."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")  # what was accepted outlasts a power cut
        db.executescript(_TABLE)
        super().__init__(db, "videos", Record)
        self.searches = Table(db, "searches", Search)

    def remove(self, id: str) -> None:
        super().remove(id)
        self._db.execute("DELETE FROM actions WHERE id = ?", [id])

    def act(self, id: str, number: int, keys: str, sequence: int | None) -> None:
        """What is to be done in chunk `number` of a live video; sequence: how its person counts it."""
        self._db.execute("INSERT INTO actions VALUES (?, ?, ?, ?)", [id, number, keys, sequence])

    def actions(self, id: str, number: int) -> tuple[str, int | None] | None:
        """The keys and how their person counts them, if they were given."""
        row = "SELECT keys, sequence FROM actions WHERE id = ? AND number = ?"
        return self._db.execute(row, [id, number]).fetchone()

    def given(self, id: str) -> int:
        """How many chunks have actions."""
        (count,) = self._db.execute("SELECT COUNT(*) FROM actions WHERE id = ?", [id]).fetchone()
        return count

    def copy_actions(self, id: str, to: str, chunks: int) -> None:
        """The first ones, to another live video."""
        of = "SELECT ?, number, keys, sequence FROM actions WHERE id = ? AND number < ?"
        self._db.execute(f"INSERT INTO actions {of}", [to, id, chunks])
