"""The store: what it keeps through crashes, and what it never lets happen."""

import dataclasses
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pman.errors import SettingsError, StoreError
from pman.jobs import Document, Job, JobSpec, JobState
from pman.store import Store
from tests.full_disk import no_room_beyond

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def make_job(jid: str = "j", name: str = "", **changes: object) -> Job:
    spec = JobSpec(
        *(jid, name or f"{jid}.0", "cube", "ds", "image", ("é\n", ""), {"A": "'"}, {"l": "m"}),
        *("/in", "/out", "/jobs"),
    )
    job = Job(
        spec, Document("text\r\n", "sbatch", "bare"), "content", "local", message="m", log=None
    )
    return dataclasses.replace(job, **{"accepted_at": NOW, **changes})  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "deep" / "state")
    yield opened
    opened.close()


def moved(job: Job, state: JobState, message: str = "m") -> Job:
    return dataclasses.replace(job, state=state, message=message)


def test_a_job_comes_back_as_it_was_after_a_restart(tmp_path: Path) -> None:
    job = make_job(
        state=JobState.FAILED,
        engine_id="7",
        started_at=NOW + timedelta(microseconds=123456),
        ended_at=NOW + timedelta(days=1),
        missing_since=NOW,
        notes={"stdout": "/é"},
    )
    store = Store(tmp_path)
    store.add(job)
    store.keep_log(job, "log\0\n")
    store.close()
    store = Store(tmp_path)
    assert store.get("j") == dataclasses.replace(job, log="log\0\n")
    store.close()


def test_a_job_is_on_the_disk_when_the_call_returns(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, tests.test_store as t\n"
        f"t.Store(pathlib.Path({str(tmp_path)!r})).add(t.make_job())\n"
        "os._exit(9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=False, timeout=60
    )
    assert done.returncode == 9
    store = Store(tmp_path)
    assert store.get("j") is not None
    store.close()


def test_a_commit_waits_for_the_disk(store: Store) -> None:
    """No process can tell a crash of the machine from a good end, so SQLite is asked."""
    answers = [
        store._db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous")
    ]
    assert answers == ["wal", 2]  # 2: FULL


def test_the_log_that_was_kept_survives_a_restart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for jid in ("one", "other"):
        store.add(make_job(jid, state=JobState.SUCCEEDED))
    store.keep_log(make_job("one"), "é\r\nlast line")
    store.close()
    store = Store(tmp_path)
    logs = [job.log for job in map(store.get, ("one", "other")) if job]
    store.close()
    assert logs == ["é\r\nlast line", None]


def test_a_list_of_jobs_is_light_and_a_claimed_job_is_whole(store: Store) -> None:
    job, gone = store.add(make_job()), store.add(make_job("gone"))
    for kept in (job, gone):
        store.keep_log(kept, "log")
    store.mark_removed(gone)
    empty = Document("", job.document.language, job.document.template)
    (listed,) = store.in_state(JobState.ACCEPTED)
    assert listed == dataclasses.replace(job, document=empty, content="")
    assert [(old.document, old.content, old.log) for old in store.removing()] == [(empty, "", None)]
    (claimed,) = store.claim([listed])
    assert (claimed.document, claimed.content) == (job.document, job.content)


def test_nobody_else_can_read_the_folder(store: Store, tmp_path: Path) -> None:
    assert (tmp_path / "deep" / "state").stat().st_mode & 0o777 == 0o700


def test_an_unknown_job_is_none(store: Store) -> None:
    assert [store.get(jid) for jid in ("", "j", "\0", "'", "%")] == [None] * 5


def test_a_new_run_of_a_jid_takes_the_place_of_the_old_one(store: Store) -> None:
    store.add(make_job(name="j.a", state=JobState.FAILED))
    second = store.add(make_job(name="j.b"))
    assert second.generation == 2
    assert store.get("j") == second
    assert [job.name for job in store.removing()] == ["j.a"]
    assert store.counts() == {JobState.ACCEPTED: 1}
    store.forget(store.removing())
    assert (store.removing(), store.get("j")) == ([], second)


def test_two_jobs_never_have_the_same_name(store: Store) -> None:
    store.add(make_job("a", "same.0"))
    with pytest.raises(sqlite3.IntegrityError):
        store.add(make_job("b", "same.0"))
    assert store.get("b") is None
    assert store.add(make_job("b", "other.0"))


def test_of_many_at_once_one_is_the_current_one(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        [*pool.map(store.add, [make_job(name=f"j.{number}") for number in range(40)])]
    assert len(store.removing()) == 39
    assert len(store.in_state(*JobState)) == 1


def test_the_newest_jobs_come_first_and_light(store: Store) -> None:
    for number in (3, 1, 2):
        store.add(make_job(f"j{number}", accepted_at=NOW + timedelta(seconds=number)))
    store.keep_log(make_job("j3"), "log")
    store.add(make_job("gone", accepted_at=NOW + timedelta(days=1)))
    store.mark_removed(make_job("gone"))
    jobs, total = store.newest(2)
    assert ([job.jid for job in jobs], total) == (["j3", "j2"], 3)
    assert [(job.document.text, job.content, job.log) for job in jobs] == [("", "", None)] * 2
    assert {job.document.template for job in jobs} == {"bare"}


def test_of_jobs_accepted_at_the_same_moment_the_later_one_comes_first(store: Store) -> None:
    for jid in "bac":
        store.add(make_job(jid))
    assert [job.jid for job in store.newest(2)[0]] == ["c", "a"]


@pytest.mark.parametrize(
    ("states", "auid", "wanted"),
    [
        ((), None, ["d", "c", "b", "a"]),
        ((JobState.RUNNING,), None, ["c", "a"]),
        ((JobState.RUNNING, JobState.LOST), None, ["d", "c", "a"]),
        ((), "it's", ["d", "c"]),
        ((), "", []),
        ((JobState.RUNNING,), "it's", ["c"]),
        ((JobState.QUEUED,), "cube", []),
    ],
)
def test_jobs_are_listed_by_state_and_user(
    store: Store, states: tuple[JobState, ...], auid: str | None, wanted: list[str]
) -> None:
    kept = {"a": JobState.RUNNING, "b": JobState.FAILED, "c": JobState.RUNNING, "d": JobState.LOST}
    for jid, state in kept.items():
        job = make_job(jid, state=state)
        user = "it's" if jid in "cd" else "cube"
        store.add(dataclasses.replace(job, spec=dataclasses.replace(job.spec, auid=user)))
    jobs, total = store.newest(1000, states, auid)
    assert ([job.jid for job in jobs], total) == (wanted, len(wanted))
    assert store.newest(1, states, auid)[1] == len(wanted)


def test_a_list_of_jobs_reads_no_more_of_them_than_it_tells(store: Store) -> None:
    """SQLite is asked how: a job that is not told must not cost the reading of its document."""
    asked: list[str] = []
    store._db.set_trace_callback(asked.append)
    store.newest(3, [JobState.RUNNING], "cube")
    store._db.set_trace_callback(None)
    (query,) = asked
    plan = [row[3] for row in store._db.execute(f"EXPLAIN QUERY PLAN {query}")]
    scans = [step for step in plan if "jobs" in step]
    assert len(scans) == 2
    assert all("INDEX jobs_listed" in step for step in scans), plan


def test_a_database_of_the_first_version_goes_on(tmp_path: Path) -> None:
    old = Store(tmp_path)
    old.add(make_job())
    old.close()
    with closing(sqlite3.connect(tmp_path / "pman.sqlite")) as db:
        db.executescript(
            "DROP INDEX jobs_listed; ALTER TABLE jobs DROP COLUMN notes; PRAGMA user_version=1"
        )
    store = Store(tmp_path)
    jobs, total = store.newest(1)
    store.close()
    assert ([(job.jid, job.notes) for job in jobs], total) == ([("j", {})], 1)


def test_jobs_come_oldest_first(store: Store) -> None:
    for number in (3, 1, 2):
        store.add(make_job(f"j{number}", accepted_at=NOW + timedelta(seconds=number)))
    assert [job.jid for job in store.in_state(JobState.ACCEPTED)] == ["j1", "j2", "j3"]


# --- claim: what may be sent ---


def test_a_claimed_job_is_submitting_and_may_be_claimed_again(store: Store) -> None:
    job = store.add(make_job())
    (claimed,) = store.claim([job])
    assert claimed.state is JobState.SUBMITTING
    assert store.claim([claimed]) == [claimed]
    assert [event.state for event in store.history(job)] == ["accepted", "submitting"]


def test_a_deleted_job_is_never_sent(store: Store) -> None:
    gone, stays = store.add(make_job("gone")), store.add(make_job("stays"))
    store.mark_removed(gone)
    assert [job.jid for job in store.claim([gone, stays])] == ["stays"]


@pytest.mark.parametrize("state", [state for state in JobState if state not in
                                   {JobState.ACCEPTED, JobState.SUBMITTING}])  # fmt: skip
def test_a_job_that_was_sent_is_never_claimed(store: Store, state: JobState) -> None:
    job = store.add(make_job())
    store.update([moved(job, state)])
    assert store.claim([job]) == []


# --- update: only forwards ---


@pytest.mark.parametrize("before", JobState)
@pytest.mark.parametrize("after", JobState)
def test_a_state_never_moves_backwards(store: Store, before: JobState, after: JobState) -> None:
    order = [*JobState]
    store.add(make_job(state=before))
    store.update([moved(make_job(), after)])
    kept = store.get("j")
    assert kept is not None
    assert kept.state is (before if before.final else max(before, after, key=order.index))


def test_a_job_stays_as_it_ended(store: Store) -> None:
    ended = store.add(make_job(state=JobState.FAILED, message="out of memory", ended_at=NOW))
    assert store.update([moved(make_job(), JobState.RUNNING, "running")]) == []
    assert store.update([moved(ended, JobState.FAILED, "other")]) == []
    assert store.get("j") == ended


def test_what_has_not_changed_is_not_written(store: Store) -> None:
    job = store.add(make_job())
    assert store.update([job]) == []
    assert len(store.history(job)) == 1


def test_the_history_has_a_line_for_each_change_of_state_or_message(store: Store) -> None:
    job = store.add(make_job(message="accepted"))
    store.update([moved(job, JobState.QUEUED, "a")])
    store.update([moved(job, JobState.QUEUED, "b")])
    store.update([dataclasses.replace(moved(job, JobState.QUEUED, "b"), engine_id="7")])
    assert [(event.state, event.message) for event in store.history(job)] == [
        *(("accepted", "accepted"), ("queued", "a"), ("queued", "b"))
    ]
    known = store.get("j")
    assert known is not None
    assert known.engine_id == "7"


def test_an_update_does_not_bring_a_deleted_job_back(store: Store) -> None:
    job = store.add(make_job())
    store.mark_removed(job)
    store.update([dataclasses.replace(job, state=JobState.QUEUED, engine_id="7")])
    assert store.get("j") is None
    assert [removed.engine_id for removed in store.removing()] == ["7"]
    store.forget([job])
    assert store.update([moved(job, JobState.RUNNING)]) == []
    assert store.history(job) == []


def test_an_update_leaves_the_log_that_was_kept(store: Store) -> None:
    job = store.add(make_job())
    store.keep_log(job, "log")
    store.update([moved(job, JobState.QUEUED)])
    kept = store.get("j")
    assert kept is not None
    assert kept.log == "log"


def test_what_the_driver_noted_is_kept(store: Store) -> None:
    job = store.add(make_job())
    store.update([dataclasses.replace(job, notes={"slurm": "7"})])
    kept = store.get("j")
    assert kept is not None
    assert kept.notes == {"slurm": "7"}


# --- a store that can't be used ---


def test_a_second_server_on_the_same_folder_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="in use by another pman"):
        Store(tmp_path / "deep" / "state")
    assert store.add(make_job())


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=f"STATE_DIR {tmp_path}/file can't be used"):
        Store(tmp_path / "file")


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "pman.sqlite").write_bytes(os.urandom(8192))
    for _ in range(2):  # and the folder is not held by the first try
        with pytest.raises(SettingsError, match="put it aside"):
            Store(tmp_path)


def test_a_database_of_a_newer_pman_is_told(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "pman.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(SettingsError, match="run the newer pman"):
        Store(tmp_path)


def test_a_full_disk_loses_nothing_and_is_over_when_there_is_room(
    store: Store, tmp_path: Path
) -> None:
    store.add(make_job("before"))
    big = make_job("big", content="x" * 10_000_000)
    words = f"^STATE_DIR {tmp_path}/deep/state can't be used now: .*(full|disk)"
    with no_room_beyond(1_000_000):
        with pytest.raises(StoreError, match=words):
            store.add(big)
        assert store.get("big") is None
        assert store.get("before") is not None
    assert store.add(big)


def test_a_defect_of_pman_is_not_taken_for_a_full_disk(store: Store) -> None:
    store._db.execute("DROP TABLE events")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        store.add(make_job())
