"""What SlurmDriver asks of the shell, and what it makes of each kind of answer."""

import io
import tarfile
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pman.drivers import slurm
from pman.drivers.slurm import BATCH, LOG_BYTES, SlurmDriver
from pman.errors import Ambiguous, EngineError, Rejected, Unavailable
from pman.jobs import Document, Job, JobSpec, JobState, Observation
from pman.shell import LIMIT, LocalShell, Result, Shell

FIELD, RECORD = "\x1f", "\x1e"


@dataclass(frozen=True)
class Call:
    script: str
    args: tuple[str, ...]
    stdin: bytes


class Scripted:
    """A Shell that gives back the results it was made with, one after the other."""

    where = "login.hpc.org"

    def __init__(self, *results: Result) -> None:
        self.calls: list[Call] = []
        self._results = deque(results)

    def run(
        self,
        script: str,
        *args: str,
        stdin: bytes = b"",
        timeout: float = 30.0,
        limit: int = LIMIT,
        repeatable: bool = True,
    ) -> Result:
        self.calls.append(Call(script, args, stdin))
        return self._results.popleft()

    def close(self) -> None: ...


def said(
    stdout: str | bytes = b"", *, code: int = 0, stderr: str = "", truncated: bool = False
) -> Result:
    out = stdout.encode() if isinstance(stdout, str) else stdout
    return Result(code, out, stderr.encode(), truncated)


def fields(*values: str) -> str:
    return FIELD.join(values)


def queued(number: str, name: str, state: str, nodes: str = "") -> str:
    """A row of squeue."""
    return fields(number, name, state, "None", "N/A", "N/A", nodes) + "\n"


def accounted(number: str, name: str, state: str, code: str = "0:0") -> str:
    """A row of sacct."""
    return fields(number, name, state, "None", "100", "200", "n1", code) + "\n"


def folder(name: str, exit: str = "", owner: str = "", reason: str = "", errors: str = "") -> str:
    """What a job's folder on the shared disk holds."""
    return fields(name, exit, owner, reason, errors) + RECORD


def evidence(*folders: str, sacct: str = "", code: str = "0") -> Result:
    return said(RECORD.join((sacct, code, "".join(folders))))


def found(squeue: str = "", sacct: str = "", owners: str = "") -> Result:
    return said(RECORD.join((squeue, sacct, owners)))


def job(number: int = 0, *, state: JobState = JobState.QUEUED, text: str = "#!/bin/bash\n") -> Job:
    """The job `jid.N`, which is Slurm's 70N."""
    return Job(
        spec=JobSpec(
            jid="jid",
            name=f"jid.{number}",
            auid="cube",
            type="ds",
            image="image",
            argv=("true",),
            env={},
            labels={},
            input_dir="/in",
            output_dir="/out",
            folder=f"/jobs/jid.{number}",
        ),
        document=Document(text, "sbatch", "bare"),
        content="{}",
        engine="slurm",
        state=state,
        engine_id=f"70{number}",
    )


def driver(shell: Shell) -> SlurmDriver:
    return SlurmDriver(shell, Path("/storebase"), Path("/jobs"), 2.0)


def observe(*results: Result, jobs: tuple[Job, ...] = (job(),)) -> Mapping[str, Observation]:
    return driver(Scripted(*results)).observe(jobs)


def find(result: Result, *jobs: Job) -> Mapping[str, str]:
    return driver(Scripted(result)).find(jobs or (job(),))


NO_ANSWER: Mapping[str, Callable[[Result], Result]] = {
    "failed": lambda whole: replace(whole, code=1, stderr=b"Unable to contact slurm controller"),
    "an-error-and-code-0": lambda whole: replace(whole, stderr=b"squeue: error: Socket timed out"),
    "a-part": lambda whole: replace(whole, truncated=True),
}
each_no_answer = pytest.mark.parametrize("spoilt", NO_ANSWER.values(), ids=list(NO_ANSWER))
CALLS: Mapping[str, Callable[[SlurmDriver], object]] = {
    "find": lambda driver: driver.find([job()]),
    "observe": lambda driver: driver.observe([job()]),
    "remove": lambda driver: driver.remove([job()]),
}


@each_no_answer
@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_queue_that_was_not_seen_whole_is_no_answer(
    spoilt: Callable[[Result], Result], call: Callable[[SlurmDriver], object]
) -> None:
    shell = Scripted(spoilt(found(queued("700", "jid.0", "RUNNING"))))
    with pytest.raises(Unavailable, match=r"login\.hpc\.org"):
        call(driver(shell))
    assert len(shell.calls) == 1


@each_no_answer
def test_traces_that_were_not_seen_whole_are_no_answer(
    spoilt: Callable[[Result], Result],
) -> None:
    with pytest.raises(Unavailable):
        observe(said(), spoilt(evidence(folder("jid.0", "0 200"))))


# find


@pytest.mark.parametrize(
    "answer",
    [
        found(squeue=queued("12", "jid.0", "PENDING")),
        found(squeue=queued("12", "jid.0", "COMPLETED")),
        found(sacct=accounted("12", "jid.0", "CANCELLED by 1001")),
        found(sacct="sacct: error: Slurm accounting storage is disabled\n", owners="jid.0\x1f12\n"),
        found(owners="jid.0\x1f12\n"),
    ],
    ids="waiting ended accounted no-accounting lock".split(),
)
def test_find_takes_an_id_from_each_source(answer: Result) -> None:
    assert find(answer) == {"jid.0": "12"}


def test_find_gives_the_asked_jobs_alone() -> None:
    squeue = queued("12", "jid.1", "RUNNING") + queued("13", "other", "RUNNING")
    assert find(found(squeue, owners="jid.0\x1f\njid.1\x1f\n"), job(0), job(1)) == {"jid.1": "12"}


@pytest.mark.parametrize(
    "owner", ["", "x", "-1", "1.5", "7 8", "12\x1f13", "x\n12", "\x1f", "\ufffd", "²"]
)
def test_an_owner_that_is_no_id_is_ignored(owner: str) -> None:
    owners = f"jid.0\x1f{owner}\njid.1\x1f12\n"
    assert find(found(owners=owners), job(0), job(1)) == {"jid.1": "12"}


@pytest.mark.parametrize(
    ("content", "ids"),
    [(b"12\n", {"jid.0": "12"}), (b"12\n13\n", {}), (b"\n\n", {}), (b"\xff\n12\n", {})],
)
def test_an_owner_of_several_lines_is_ignored(
    tmp_path: Path, content: bytes, ids: Mapping[str, str]
) -> None:
    at = tmp_path / "jid.0"
    (at / "lock").mkdir(parents=True)
    (at / "lock/owner").write_bytes(content)
    script = "squeue() { :; }; sacct() { :; }\n" + slurm._FIND
    assert find(LocalShell().run(script, "jid.0", "60seconds", str(at))) == ids


# observe


def test_a_row_with_another_name_is_another_job() -> None:
    seen = observe(
        said(queued("700", "other", "RUNNING")),
        evidence(folder("jid.0"), sacct=accounted("700", "other", "COMPLETED")),
    )
    assert seen == {}


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"700\x1fjid.0\n",
        b"700\x1fjid.0\x1fFAILED\x1fNone\x1f0\x1f0\x1fn1\x1f0:0\x1fmore\x1fmore\n",
        b"\xff\xfe\x00\x80\n",
        b"slurm_load_jobs: a new kind of warning\n",
    ],
)
def test_a_strange_row_spoils_no_other(bad: bytes) -> None:
    rows = bad + queued("700", "jid.0", "RUNNING", "n1").encode() + bad
    ended = bad + accounted("701", "jid.1", "COMPLETED").encode() + bad
    answer = ended + b"\x1e0\x1e" + (folder("jid.0") + folder("jid.1")).encode()
    seen = observe(said(rows), said(answer), jobs=(job(0), job(1)))
    assert {name: one.state for name, one in seen.items()} == {
        "jid.0": JobState.RUNNING,
        "jid.1": JobState.SUCCEEDED,
    }


@pytest.mark.parametrize("exit", ["x", "0 x", "² ²", "0 " + "9" * 30, "9" * 1000, "\ufffd"])
def test_a_strange_exit_file_spoils_no_other_job(exit: str) -> None:
    seen = observe(
        said(), evidence(folder("jid.0", exit), folder("jid.1", "0 200")), jobs=(job(0), job(1))
    )
    assert seen["jid.1"].state is JobState.SUCCEEDED


def test_a_job_that_no_source_knows_is_left_out() -> None:
    assert observe(said(), evidence(folder("jid.0"))) == {}


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (
            evidence(folder("jid.0"), sacct="sacct: error: Connection refused\n", code="1"),
            "Connection refused",
        ),
        (evidence(), "/jobs/jid.0"),
    ],
    ids=["sacct fails", "the folder is away"],
)
def test_a_job_keeps_its_state_while_a_source_is_away(
    state: JobState, answer: Result, why: str
) -> None:
    seen = observe(said(), answer, jobs=(job(state=state),))["jid.0"]
    assert seen.state is state
    assert why in seen.message


def test_the_script_tells_a_folder_that_is_away_from_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "jid.0").mkdir()
    folders = (str(tmp_path / f"jid.{number}") for number in range(2))
    answer = LocalShell().run("sacct() { :; }\n" + slurm._EVIDENCE, "700,701", *folders)
    assert [*observe(said(), answer, jobs=(job(0), job(1)))] == ["jid.1"]


def test_sacct_is_not_asked_again_where_there_is_no_accounting() -> None:
    disabled = "Slurm accounting storage is disabled\n"
    nothing = folder("jid.0")
    shell = Scripted(
        said(), evidence(nothing, sacct=disabled, code="1"), said(), evidence(nothing, code="")
    )
    same = driver(shell)
    assert same.observe([job()]) == {}
    assert same.observe([job()]) == {}
    assert "700" in shell.calls[1].args
    assert "700" not in shell.calls[3].args


def test_all_ended_jobs_are_looked_at_in_batches() -> None:
    jobs = [job(number) for number in range(2 * BATCH + 1)]
    batches = [jobs[:BATCH], jobs[BATCH : 2 * BATCH], jobs[2 * BATCH :]]
    shell = Scripted(
        said(), *(evidence(*(folder(one.name, "0 200") for one in batch)) for batch in batches)
    )
    seen = driver(shell).observe(jobs)
    assert [*seen] == [one.name for one in jobs]
    assert all(one.state is JobState.SUCCEEDED for one in seen.values())
    asked = [call.args[0].split(",") for call in shell.calls[1:]]
    assert asked == [[one.engine_id for one in batch] for batch in batches]


def test_the_one_that_runs_is_followed_while_ours_waits() -> None:
    rows = queued("700", "jid.0", "PENDING") + queued("12", "jid.0", "RUNNING", "n1")
    assert observe(said(rows))["jid.0"].engine_id == "12"


def test_the_one_that_waits_too_is_not_followed() -> None:
    rows = queued("12", "jid.0", "PENDING") + queued("700", "jid.0", "RUNNING", "n1")
    seen = observe(said(rows))["jid.0"]
    assert (seen.state, seen.engine_id) == (JobState.RUNNING, "")


def test_the_one_that_took_the_lock_is_followed() -> None:
    seen = observe(
        said(queued("700", "jid.0", "COMPLETED")), evidence(folder("jid.0", owner="12"))
    )["jid.0"]
    assert (seen.state, seen.engine_id) == (JobState.QUEUED, "12")


# submit


def submitted(code: str, answer: str = "", words: str = "") -> str | EngineError:
    answers = said(fields("jid.0", code, answer, words) + RECORD)
    return driver(Scripted(answers)).submit([job()])["jid.0"]


@pytest.mark.parametrize("answer", ["12", "12;cluster", "Welcome!\nA hint: 99\n12", "\n12\n"])
def test_the_id_is_read(answer: str) -> None:
    assert submitted("0", answer, "sbatch: warning: the site says hello") == "12"


@pytest.mark.parametrize(
    ("code", "answer", "words"),
    [
        ("0", "", ""),
        ("0", "accepted", ""),
        ("0", "", "sbatch: lua: quota exceeded soon, see the wiki"),
        ("124", "", ""),
        ("124", "", "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying"),
        ("137", "", ""),
        ("137", "", "sbatch: lua: the site says hello"),
        ("1", "", ""),
    ],
)
def test_an_end_that_tells_nothing_is_ambiguous(code: str, answer: str, words: str) -> None:
    assert isinstance(submitted(code, answer, words), Ambiguous)


@pytest.mark.parametrize("code", ["126", "127"])
@pytest.mark.parametrize("words", ["", "timeout: failed to run command 'sbatch': No such file"])
def test_an_sbatch_that_cannot_run_is_unavailable(code: str, words: str) -> None:
    assert isinstance(submitted(code, "", words), Unavailable)


@pytest.mark.parametrize(("words", "kind"), slurm._VERDICTS)
def test_each_word_of_the_table_has_its_verdict(words: str, kind: type[EngineError]) -> None:
    assert type(submitted("1", "", f"sbatch: error: {words.upper()}: so it is")) is kind


FAILED = "sbatch: error: Batch job submission failed: "


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Unable to contact slurm controller (connect failure)", Unavailable),
        ("Job violates accounting/QOS policy (job submit limit, user's size)", Unavailable),
        ("Required partition not available (inactive or drain)", Unavailable),
        ("I/O error writing script/environment to file", Unavailable),
        ("Protocol authentication error", Unavailable),
        ("Slurm backup controller in standby mode", Unavailable),
        ("Socket timed out on send/recv operation", Ambiguous),
        ("Zero Bytes were transmitted or received", Ambiguous),
        ("Unexpected message received", Ambiguous),
        ("Communication connection failure", Ambiguous),
        ("Invalid partition name specified", Rejected),
        ("Invalid account or account/partition combination specified", Rejected),
        ("Requested node configuration is not available", Rejected),
        ("Requested time limit is invalid (missing or exceeds some limit)", Rejected),
        ("Memory specification can not be satisfied", Rejected),
    ],
)
def test_what_slurm_says_has_its_verdict(words: str, kind: type[EngineError]) -> None:
    assert type(submitted("1", "", FAILED + words)) is kind


def test_a_refusal_has_the_words_of_sbatch_alone() -> None:
    words = f"sbatch: error: The site's rule 7 says no\n\n{FAILED}Invalid qos specification\n"
    error = submitted("1", "", words)
    assert type(error) is Rejected
    assert str(error).endswith("The site's rule 7 says no; Invalid qos specification")
    assert "sbatch" not in str(error)
    assert "error:" not in str(error)


def test_a_job_without_an_answer_was_not_handed_over() -> None:
    shell = Scripted(said(fields("jid.0", "0", "12", "") + RECORD))
    outcomes = driver(shell).submit([job(0), job(1)])
    assert outcomes["jid.0"] == "12"
    assert isinstance(outcomes["jid.1"], Unavailable)


def test_the_documents_are_handed_over_byte_for_byte() -> None:
    texts = ["#!/bin/bash\necho 'grüß dich'\r\n\n", "#!/bin/sh\n# no end of line"]
    shell = Scripted(said())
    driver(shell).submit([job(number, text=text) for number, text in enumerate(texts)])
    with tarfile.open(fileobj=io.BytesIO(shell.calls[0].stdin)) as tar:
        members = tar.getmembers()
        contents = [file.read() for member in members if (file := tar.extractfile(member))]
    assert [member.name.lstrip("/") for member in members] == [
        "jobs/jid.0/script",
        "jobs/jid.1/script",
    ]
    assert [member.mode for member in members] == [0o600, 0o600]
    assert contents == [text.encode() for text in texts]


def test_a_disk_that_cannot_be_written_takes_no_job() -> None:
    shell = Scripted(said(code=1, stderr="mkdir: cannot create directory: Read-only file system"))
    with pytest.raises(Unavailable, match="Read-only file system"):
        driver(shell).submit([job()])


# remove


def cancelled(*rows: str) -> list[str]:
    shell = Scripted(said("".join(rows)), said())
    assert driver(shell).remove([job(0), job(1)]) == {}
    ids, *folders = shell.calls[1].args
    assert folders == ["/jobs/jid.0", "/jobs/jid.1"]
    return ids.split()


def test_every_unended_job_of_the_name_is_cancelled() -> None:
    rows = [queued("700", "jid.0", "RUNNING"), queued("12", "jid.0", "PENDING")]
    assert cancelled(*rows, queued("13", "jid.0", "COMPLETED")) == ["700", "12"]


def test_no_job_of_another_name_is_cancelled() -> None:
    assert cancelled(queued("700", "other", "RUNNING"), queued("701", "jid.1", "FAILED")) == []


def test_what_is_left_is_told_with_its_reason() -> None:
    why = "rm: cannot remove '/jobs/jid.1/log': Permission denied\nrm: and another"
    shell = Scripted(said(), said(fields("jid.1", why) + RECORD))
    assert driver(shell).remove([job(0), job(1)]) == {"jid.1": why}


def test_a_scancel_that_fails_is_unavailable() -> None:
    shell = Scripted(
        said(queued("700", "jid.0", "RUNNING")), said(code=1, stderr="scancel: error: no answer")
    )
    with pytest.raises(Unavailable, match="no answer"):
        driver(shell).remove([job()])


# logs


def test_a_log_that_cannot_be_read_is_unavailable() -> None:
    shell = Scripted(said("half a", code=1, stderr="tail: error reading: Stale file handle"))
    with pytest.raises(Unavailable, match="Stale file handle"):
        driver(shell).logs(job(), 10)


LINES = "".join(f"line {number}\n" for number in range(1000))


@pytest.mark.parametrize(
    ("content", "tail", "end"),
    [
        (None, 10, ""),
        ("", 10, ""),
        ("one\ntwo", 10, "one\ntwo"),
        (LINES, 3, "line 997\nline 998\nline 999\n"),
        ("a" * 10 + "b" * LOG_BYTES, 10, "b" * LOG_BYTES),
        (LINES * 100, 10**6, (LINES * 100)[-LOG_BYTES:]),
    ],
    ids="missing empty short lines one-line bytes".split(),
)
def test_the_end_of_a_log_is_read(tmp_path: Path, content: str | None, tail: int, end: str) -> None:
    if content is not None:
        (tmp_path / "log").write_text(content)
    assert driver(LocalShell()).logs(_in(tmp_path), tail) == end


def test_a_folder_that_is_away_is_not_an_empty_log(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="not there"):
        driver(LocalShell()).logs(_in(tmp_path / "away"), 10)


def _in(folder: Path) -> Job:
    return replace(job(), spec=replace(job().spec, folder=str(folder)))
