"""SQLite (WAL): jobs, their documents, their history. What is written here survives a crash.

One connection, one lock: the calls are short, and the gateway makes them from its threads. A commit
is on the disk when it returns (``synchronous=FULL``): a job that was answered 201 is never lost.
"""

import fcntl
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pman.errors import SettingsError, StoreError
from pman.jobs import Document, Event, Job, JobSpec, JobState

_MIGRATIONS = (
    """
    CREATE TABLE jobs (
        jid TEXT NOT NULL,
        generation INTEGER NOT NULL,
        name TEXT NOT NULL UNIQUE,
        spec TEXT NOT NULL,
        content TEXT NOT NULL,
        document TEXT NOT NULL,
        language TEXT NOT NULL,
        template TEXT NOT NULL,
        engine TEXT NOT NULL,
        engine_id TEXT NOT NULL,
        state TEXT NOT NULL,
        message TEXT NOT NULL,
        accepted_at REAL,
        started_at REAL,
        ended_at REAL,
        missing_since REAL,
        log TEXT,
        removing INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (jid, generation)
    ) STRICT;
    CREATE UNIQUE INDEX jobs_current ON jobs (jid) WHERE NOT removing;
    CREATE INDEX jobs_state ON jobs (state) WHERE NOT removing;
    CREATE INDEX jobs_removing ON jobs (name) WHERE removing;
    CREATE TABLE events (
        name TEXT NOT NULL REFERENCES jobs (name) ON DELETE CASCADE,
        at REAL NOT NULL,
        state TEXT NOT NULL,
        message TEXT NOT NULL
    ) STRICT;
    CREATE INDEX events_name ON events (name);
    """,
    """
    CREATE INDEX jobs_listed ON jobs (accepted_at, state, json_extract(spec, '$.auid'))
        WHERE NOT removing;
    """,
    """
    ALTER TABLE jobs ADD COLUMN notes TEXT NOT NULL DEFAULT '{}';
    """,
)
"""The schema, step by step; SQLite's user_version counts the steps that a file has seen."""

_TIMES = ("accepted_at", "started_at", "ended_at", "missing_since")
_COLUMNS = (
    "jid generation name spec content document language template engine engine_id state message "
    "accepted_at started_at ended_at missing_since log notes"
).split()
_CHANGING = "state message engine_id started_at ended_at missing_since notes".split()
"""What ``update`` writes; the rest is written once."""

_LARGE = {"content": "''", "document": "''", "log": "NULL"}
_LIGHT = ", ".join(f"{_LARGE[name]} AS {name}" if name in _LARGE else name for name in _COLUMNS)
_UNSENT = (JobState.ACCEPTED, JobState.SUBMITTING)


class Store:
    """The jobs of one server, in ``folder``.

    Raises SettingsError when the folder can't be used, or another server uses it. Each call raises
    StoreError when the disk does not let it: then it has changed nothing, and may work later.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        path = folder / "pman.sqlite"
        with ExitStack() as opened:
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                claim = opened.enter_context((folder / "lock").open("w"))
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SettingsError(
                    f"STATE_DIR {folder} is in use by another pman; give each server its own"
                ) from None
            except OSError as error:
                raise SettingsError(f"STATE_DIR {folder} can't be used: {error}") from None
            try:
                self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
                opened.callback(self._db.close)
                self._db.row_factory = sqlite3.Row
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.execute("PRAGMA foreign_keys=ON")
                self._migrate()
            except sqlite3.DatabaseError as error:
                if _of_the_disk(error):
                    raise SettingsError(_words(folder, error)) from None
                raise SettingsError(
                    f"{path} is no database that this version can use: {error}; "
                    "put it aside and start again, or bring back a backup"
                ) from None
            self._opened = opened.pop_all()

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise SettingsError(
                f"the database has schema {version}, and this version of pman knows "
                f"{len(_MIGRATIONS)}: run the newer pman that wrote it"
            )
        for number, step in enumerate(_MIGRATIONS[version:], version + 1):
            self._db.executescript(f"BEGIN;{step};PRAGMA user_version={number};COMMIT")

    def close(self) -> None:
        with self._lock:
            self._opened.close()

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time."""
        with self._lock:
            try:
                yield self._db
            except sqlite3.DatabaseError as error:
                if _of_the_disk(error):
                    raise StoreError(_words(self._folder, error)) from error
                raise

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._database() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # a full disk rolls back by itself
                    db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[sqlite3.Row]:
        with self._database() as db:
            return db.execute(query, values).fetchall()

    def _read(self, where: str, *values: object, columns: str = "*") -> list[Job]:
        rows = self._rows(f"SELECT {columns} FROM jobs WHERE {where}", values)
        return [_job(row) for row in rows]

    def get(self, jid: str) -> Job | None:
        """The job that ``jid`` names now; a job being removed is gone already."""
        found = self._read("jid = ? AND NOT removing", jid)
        return found[0] if found else None

    def in_state(self, *states: JobState) -> list[Job]:
        """The jobs in any of ``states``, oldest first, without their requests and documents."""
        where = f"NOT removing AND state IN ({', '.join('?' * len(states))}) ORDER BY accepted_at"
        return self._read(where, *states, columns=_LIGHT)

    def newest(
        self, limit: int, states: Sequence[JobState] = (), auid: str | None = None
    ) -> tuple[list[Job], int]:
        """At most ``limit`` jobs, newest first, without their requests, documents and logs, and how
        many there are altogether. Only those in any of ``states``, if given, and of ``auid``."""
        where, values = "NOT removing", [*map(str, states)]
        if states:
            where += f" AND state IN ({', '.join('?' * len(states))})"
        if auid is not None:
            where += " AND json_extract(spec, '$.auid') = ?"
            values.append(auid)
        # The index has all that decides, so no more rows are read than are answered.
        chosen = f"FROM jobs INDEXED BY jobs_listed WHERE {where}"
        rows = self._rows(
            f"SELECT {_LIGHT}, (SELECT COUNT(*) {chosen}) AS total {chosen} "
            "ORDER BY accepted_at DESC, rowid DESC LIMIT ?",
            (*values, *values, limit),
        )
        return [_job(row) for row in rows], rows[0]["total"] if rows else 0

    def removing(self) -> list[Job]:
        """The jobs that were deleted and are still to be removed from their engine."""
        return self._read("removing", columns=_LIGHT)

    def counts(self) -> dict[JobState, int]:
        rows = self._rows("SELECT state, COUNT(*) FROM jobs WHERE NOT removing GROUP BY state")
        return {JobState(state): count for state, count in rows}

    def history(self, job: Job) -> list[Event]:
        rows = self._rows(
            "SELECT at, state, message FROM events WHERE name = ? ORDER BY rowid", (job.name,)
        )
        return [Event(_time(at), JobState(state), message) for at, state, message in rows]

    def add(self, job: Job) -> Job:
        """Accept ``job``; an ended job of the same jid makes way and is removed from its engine."""
        with self._write() as db:
            (generation,) = db.execute(
                "SELECT COALESCE(MAX(generation), 0) + 1 FROM jobs WHERE jid = ?", (job.jid,)
            ).fetchone()
            db.execute("UPDATE jobs SET removing = 1 WHERE jid = ? AND NOT removing", (job.jid,))
            job = replace(job, generation=generation)
            values = _values(job)
            names, marks = ", ".join(values), ", ".join("?" * len(values))
            db.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", [*values.values()])
            _note(db, job)
        return job

    def claim(self, jobs: Iterable[Job]) -> list[Job]:
        """Those of ``jobs`` that are neither sent nor deleted, whole; now ``submitting``."""
        claimed = []
        with self._write() as db:
            for job in jobs:
                first = job.state is JobState.ACCEPTED
                message = "being submitted" if first else job.message
                for row in db.execute(
                    "UPDATE jobs SET state = ?, message = ? "
                    "WHERE name = ? AND NOT removing AND state IN (?, ?) RETURNING *",
                    (JobState.SUBMITTING, message, job.name, *_UNSENT),
                ).fetchall():
                    claimed.append(_job(row))
                    if first:
                        _note(db, claimed[-1])
        return claimed

    def update(self, jobs: Iterable[Job]) -> list[Job]:
        """Write the changed ``jobs``, all or none, each with a line of history if it moved on.

        A job that was deleted meanwhile stays deleted, one that has ended stays as it ended, and a
        state never moves backwards. Returns the changed jobs as they are now.
        """
        changed = []
        with self._write() as db:
            for wanted in jobs:
                row = db.execute(
                    f"SELECT {', '.join(_CHANGING)} FROM jobs WHERE name = ?", (wanted.name,)
                ).fetchone()
                if row is None or (state := JobState(row["state"])).final:
                    continue
                job = wanted if state.may_become(wanted.state) else replace(wanted, state=state)
                values = [_column(job, name) for name in _CHANGING]
                if values == [*row]:
                    continue
                sets = ", ".join(f"{name} = ?" for name in _CHANGING)
                db.execute(f"UPDATE jobs SET {sets} WHERE name = ?", [*values, job.name])
                if (job.state, job.message) != (state, row["message"]):
                    _note(db, job)
                changed.append(job)
        return changed

    def keep_log(self, job: Job, log: str) -> None:
        """The log's tail of a job that has ended."""
        with self._write() as db:
            db.execute("UPDATE jobs SET log = ? WHERE name = ?", (log, job.name))

    def mark_removed(self, job: Job) -> None:
        """``job`` is deleted for its readers, and is to be removed from its engine."""
        with self._write() as db:
            db.execute("UPDATE jobs SET removing = 1 WHERE name = ?", (job.name,))

    def forget(self, jobs: Sequence[Job]) -> None:
        """``jobs`` are gone from their engine."""
        with self._write() as db:
            db.executemany("DELETE FROM jobs WHERE name = ?", [(job.name,) for job in jobs])


_OF_THE_DISK = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_PROTOCOL,
}
"""What passes without a change of the database or of pman (https://sqlite.org/rescode.html)."""


def _of_the_disk(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0)  # only what SQLite itself raises has one
    return code & 0xFF in _OF_THE_DISK  # the other bits say more of the same


def _words(folder: Path, error: sqlite3.DatabaseError) -> str:
    return (
        f"STATE_DIR {folder} can't be used now: {error}; "
        "see that its disk has room and can be written, then try again"
    )


def _note(db: sqlite3.Connection, job: Job) -> None:
    db.execute(
        "INSERT INTO events VALUES (?, ?, ?, ?)",
        (job.name, datetime.now(UTC).timestamp(), job.state, job.message),
    )


def _time(value: float) -> datetime:
    return datetime.fromtimestamp(value, UTC)


def _values(job: Job) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": job.name,
        "spec": job.spec.to_json(),
        "document": job.document.text,
        "language": job.document.language,
        "template": job.document.template,
    }
    for column in _COLUMNS:
        if column not in values:
            values[column] = _column(job, column)
    return values


def _column(job: Job, name: str) -> Any:
    value = getattr(job, name)
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True)
    return value.timestamp() if isinstance(value, datetime) else value


def _job(row: sqlite3.Row) -> Job:
    values = {name: row[name] for name in _COLUMNS if name not in {"jid", "name"}}
    for name in _TIMES:
        values[name] = None if values[name] is None else _time(values[name])
    return Job(
        spec=JobSpec.from_json(values.pop("spec")),
        document=Document(values.pop("document"), values.pop("language"), values.pop("template")),
        state=JobState(values.pop("state")),
        notes=json.loads(values.pop("notes")),
        **values,
    )
