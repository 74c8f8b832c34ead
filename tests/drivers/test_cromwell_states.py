"""What is said of a job for every status of Cromwell, row of Slurm and trace on the disk."""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pman.drivers import cromwell_states as cromwell
from pman.drivers import slurm_states as slurm
from pman.drivers.cromwell_api import Call, Workflow
from pman.drivers.cromwell_states import LAGS, Left, Traces
from pman.drivers.slurm_states import Evidence, Row
from pman.jobs import Document, Job, JobSpec, JobState, Observation

FOLDER = "/cromwell-executions/ChRISJob/1f5fe8a4/call-plugin_instance/execution"
NOTES = {"slurm": "7", "stdout": f"{FOLDER}/stdout", "stderr": f"{FOLDER}/stderr"}
JOB = Job(
    spec=JobSpec(
        jid="jid",
        name="jid.0",
        auid="cube",
        type="ds",
        image="image",
        argv=("true",),
        env={},
        labels={},
        input_dir="/in",
        output_dir="/out",
        folder="/folder",
        memory_limit=200,
        time_limit=60,
    ),
    document=Document("version 1.0\n", "wdl", "chris"),
    content="{}",
    engine="cromwell",
    state=JobState.RUNNING,
    engine_id="1f5fe8a4",
    notes=NOTES,
)
NEW = replace(JOB, state=JobState.QUEUED, notes={})
"""One of which no metadata are known yet."""

START = datetime(2026, 11, 22, 15, tzinfo=UTC)
END = datetime(2026, 11, 22, 16, tzinfo=UTC)
STATUSES = "On Hold,Submitted,Running,Aborting,Aborted,Succeeded,Failed".split(",")
ALIVE = sorted(slurm.WAITING | slurm.RUNNING.keys())
LATER = LAGS + 1
NOTHING = Traces()

# As Cromwell writes them.
WRONG_CODE = (
    "Job ChRISJob.plugin_instance:NA:1 exited with return code {} which has not been declared as a "
    "valid return code. See 'continueOnReturnCode' runtime attribute for more details."
)
TERMINATED = (
    "The compute backend terminated the job. If this termination is unexpected, examine likely "
    "causes such as preemption, running out of disk or memory on the compute instance, or "
    "exceeding the backend's maximum job duration."
)
NOT_STARTED = (
    f"Unable to start job. Check the stderr file for possible errors: {FOLDER}/stderr.submit"
)
NO_ID = (
    "Could not find job ID from stdout file.Check the stderr file for possible errors: "
    f"{FOLDER}/stderr.submit"
)
NOT_ALIVE = f"Unable to determine that 7 is alive, and {FOLDER}/rc does not exist."
PARSER = "ERROR: Finished parsing without consuming all tokens. task plugin_instance { ^ "
TIME_LIMIT = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-22T16:00:00 DUE TO TIME LIMIT"
OOM = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.batch."


def row(state: str, **values: str) -> Row:
    return replace(Row(id="7", name="cromwell_1f5fe8a4_plugin_instance", state=state), **values)


def flow(status: str) -> Workflow:
    return Workflow("1f5fe8a4", status, started_at=START, ended_at=END)


def failed(failure: str, code: int | None = None, id: str = "7") -> Call:
    return Call("Failed", id, code, NOTES["stdout"], NOTES["stderr"], failure)


def rc(code: int | str, **more: str) -> Left:
    return Left(Evidence(exit=f"{code} 1795363200", **more))


def said(
    status: str, traces: Traces = NOTHING, job: Job = JOB, asks_slurm: bool = True
) -> Observation:
    return cromwell.observation(job, flow(status), traces, asks_slurm)


# while it has not ended


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("Submitted", "waiting: Cromwell has not started it yet"),
        ("On Hold", "on hold in Cromwell; its administrator can release it"),
    ],
)
def test_what_cromwell_has_not_started_waits(status: str, message: str) -> None:
    seen = said(status, job=NEW)
    assert (seen.state, seen.message) == (JobState.QUEUED, message)


@pytest.mark.parametrize("status", ["", "Starting", "None"])
@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
@pytest.mark.parametrize("asks_slurm", [True, False])
def test_a_status_that_nobody_knows_changes_nothing(
    status: str, state: JobState, asks_slurm: bool
) -> None:
    seen = said(status, job=replace(JOB, state=state), asks_slurm=asks_slurm)
    assert seen.state is state
    assert "Cromwell says" in seen.message


@pytest.mark.parametrize(
    ("traces", "state", "message"),
    [
        (
            Traces(queued=row("PENDING", reason="Resources")),
            JobState.QUEUED,
            "waiting: Resources (for free nodes)",
        ),
        (Traces(queued=row("RUNNING", nodes="n1")), JobState.RUNNING, "running on n1"),
        (Traces(queued=row("COMPLETING", nodes="n1")), JobState.RUNNING, "ending"),
        (
            Traces(queued=row("SUSPENDED")),
            JobState.RUNNING,
            "suspended by the cluster for a while",
        ),
        (
            Traces(queued=row("PENDING", reason="BeginTime"), accounted=row("NODE_FAIL")),
            JobState.QUEUED,
            "waiting: BeginTime (it was put off by the cluster)",
        ),
        (Traces(left=rc(0)), JobState.RUNNING, "ending"),
        (Traces(left=rc(3), queued=row("RUNNING", nodes="n1")), JobState.RUNNING, "running on n1"),
        # Cromwell itself looks at the exit code every five minutes in the end.
        (Traces(left=rc(3), queued=row("COMPLETED")), JobState.FAILED, "exit code 3"),
        (Traces(left=rc(0), queued=row("COMPLETED")), JobState.SUCCEEDED, "finished"),
        (Traces(left=rc(143), queued=row("TIMEOUT")), JobState.FAILED, "time limit of 60 min"),
        (
            Traces(queued=row("COMPLETED"), waited=LATER),
            JobState.RUNNING,
            "Cromwell says Running, and Slurm says COMPLETED: waiting for the exit code",
        ),
        (
            Traces(waited=LATER),
            JobState.RUNNING,
            "Cromwell says Running, and Slurm does not show it: waiting for the exit code",
        ),
        (
            Traces(queued=row("TIMEOUT", nodes="n1")),
            JobState.RUNNING,
            "Cromwell says Running, and Slurm says TIMEOUT: waiting for the exit code",
        ),
        (
            Traces(doubt="squeue does not answer on hpc", blind=True, waited=LATER),
            JobState.RUNNING,
            "Cromwell says Running; squeue does not answer on hpc",
        ),
        (Traces(left=Left(Evidence(errors=OOM)), waited=LATER), JobState.RUNNING, ""),
    ],
)
def test_while_cromwell_says_running(traces: Traces, state: JobState, message: str) -> None:
    seen = said("Running", traces)
    assert seen.state is state
    assert message in seen.message


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
def test_what_slurm_has_not_got_yet_changes_nothing(state: JobState) -> None:
    seen = said("Running", job=replace(NEW, state=state))
    assert (seen.state, seen.message) == (state, "Cromwell is handing it to Slurm")


def test_without_slurm_running_may_be_waiting() -> None:
    seen = said("Running", job=NEW, asks_slurm=False)
    assert seen.state is JobState.RUNNING
    assert "which Cromwell does not tell" in seen.message
    assert seen.started_at == START


@pytest.mark.parametrize("state", ALIVE)
def test_what_is_being_aborted_says_so(state: str) -> None:
    seen = said("Aborting", Traces(queued=row(state), left=rc(143)))
    assert not seen.state.final
    assert seen.message == "being aborted"


# how it ends while Cromwell has not noticed


@pytest.mark.parametrize(
    ("ended", "state", "message"),
    [
        ("TIMEOUT", JobState.FAILED, "time limit of 60 min"),
        ("OUT_OF_MEMORY", JobState.FAILED, "out of memory (asked for 200 MiB)"),
        (
            "CANCELLED by 1001",
            JobState.CANCELLED,
            "cancelled on the cluster by 1001 before it began on n1 (can that node start jobs?)",
        ),
        ("NODE_FAIL", JobState.FAILED, "node failure: n1 went down"),
        ("PREEMPTED", JobState.FAILED, "preempted by a job with a higher priority"),
        ("FAILED", JobState.FAILED, "exit code 255"),
    ],
)
@pytest.mark.parametrize("status", ["Running", "Aborting"])
def test_what_slurm_ended_without_an_exit_code_ends_in_time(
    status: str, ended: str, state: JobState, message: str
) -> None:
    over = row(ended, nodes="n1", exit_code="255:0")
    traces = Traces(accounted=over, waited=LATER)
    seen = said(status, traces)
    assert (seen.state, seen.message) == (state, message)
    assert not said(status, replace(traces, waited=1.0)).state.final


@pytest.mark.parametrize("nodes", ["", "(null)", "None assigned"])
def test_what_never_began_on_slurm_ends_at_once(nodes: str) -> None:
    row_of_squeue = row("CANCELLED", start="1795360000", nodes=nodes)  # it starts when it ends
    seen = said("Running", Traces(queued=row_of_squeue, accounted=row("CANCELLED by 1001")))
    assert (seen.state, seen.message) == (
        JobState.CANCELLED,
        "cancelled on the cluster by 1001",
    )


# how it ended, by Cromwell alone


@pytest.mark.parametrize("asks_slurm", [True, False])
@pytest.mark.parametrize(
    ("status", "state", "message"),
    [
        ("Succeeded", JobState.SUCCEEDED, "finished"),
        ("Aborted", JobState.CANCELLED, "aborted in Cromwell"),
    ],
)
def test_an_end_by_cromwell(status: str, state: JobState, message: str, asks_slurm: bool) -> None:
    seen = said(status, job=NEW, asks_slurm=asks_slurm)
    assert (seen.state, seen.message) == (state, message)
    assert (seen.started_at, seen.ended_at) == (START, END)


@pytest.mark.parametrize("state", ALIVE)
def test_what_cromwell_calls_aborted_has_not_ended_before_slurm_says_so(state: str) -> None:
    seen = said("Aborted", Traces(queued=row(state), left=rc(143)))
    assert not seen.state.final
    assert seen.message == "aborted in Cromwell, not yet as Slurm's 7"


@pytest.mark.parametrize("code", [0, 3, 143])
def test_an_exit_code_is_no_end_while_it_is_aborted(code: int) -> None:
    """Cromwell itself writes one before it ends the job."""
    traces = Traces(queued=row("COMPLETED"), left=rc(code))
    assert said("Aborting", traces).state is JobState.RUNNING
    assert said("Aborted", traces).state is JobState.CANCELLED


def test_the_start_that_slurm_told_stays() -> None:
    began = START.replace(minute=30)
    assert said("Succeeded", job=replace(JOB, started_at=began)).started_at == began


# why it failed


@pytest.mark.parametrize(
    ("traces", "state", "message"),
    [
        (
            Traces(failed(WRONG_CODE.format(3), 3), queued=row("COMPLETED"), left=rc(3)),
            JobState.FAILED,
            "exit code 3",
        ),
        (Traces(failed(WRONG_CODE.format(3), 3)), JobState.FAILED, "exit code 3"),
        (Traces(failed("Its output is lost", 0)), JobState.FAILED, "Cromwell: Its output is lost"),
        (Traces(failed(WRONG_CODE.format(127), 127)), JobState.FAILED, "command not found"),
        (Traces(failed(WRONG_CODE.format(139), 139)), JobState.FAILED, "signal 11 (SIGSEGV)"),
        (
            Traces(failed(TERMINATED), accounted=row("COMPLETED"), left=rc(137)),
            JobState.FAILED,
            "killed by signal 9 (SIGKILL)",
        ),
        (
            Traces(failed(TERMINATED), accounted=row("OUT_OF_MEMORY"), left=rc(137)),
            JobState.FAILED,
            "out of memory (asked for 200 MiB)",
        ),
        (
            Traces(failed(TERMINATED), accounted=row("FAILED"), left=rc(137, errors=OOM)),
            JobState.FAILED,
            "out of memory (asked for 200 MiB)",
        ),
        (
            Traces(failed(TERMINATED), queued=row("TIMEOUT"), left=rc(143)),
            JobState.FAILED,
            "time limit of 60 min",
        ),
        (
            Traces(failed(TERMINATED), left=rc(143, errors=TIME_LIMIT), waited=LATER),
            JobState.FAILED,
            "time limit of 60 min",
        ),
        (
            Traces(failed(TERMINATED), queued=row("CANCELLED"), left=rc(143)),
            JobState.CANCELLED,
            "cancelled on the cluster",
        ),
        (
            Traces(failed(TERMINATED), accounted=row("CANCELLED by 1001"), left=rc(143)),
            JobState.CANCELLED,
            "cancelled on the cluster by 1001",
        ),
        (
            Traces(failed(WRONG_CODE.format(79), 79), accounted=row("TIMEOUT"), left=rc(79)),
            JobState.FAILED,
            "time limit of 60 min",
        ),
        (
            Traces(failed(WRONG_CODE.format(79), 79), accounted=row("NODE_FAIL", nodes="n7")),
            JobState.FAILED,
            "node failure: n7 went down",
        ),
        (
            Traces(
                failed(WRONG_CODE.format(79), 79),
                queued=row("FAILED", exit_code="255:0"),
                left=rc(79),
            ),
            JobState.FAILED,
            "exit code 255",
        ),
        (
            Traces(failed(WRONG_CODE.format(79), 79), queued=row("COMPLETED"), left=rc(79)),
            JobState.FAILED,
            "exit code 79",
        ),
        (
            Traces(failed(WRONG_CODE.format(79), 79), left=rc(79), waited=LATER),
            JobState.FAILED,
            "exit code 79, or killed on the cluster",
        ),
        (
            Traces(failed(WRONG_CODE.format(79), 79), left=rc(79, errors=TIME_LIMIT), waited=LATER),
            JobState.FAILED,
            "time limit of 60 min",
        ),
        (
            Traces(
                failed(WRONG_CODE.format(1), 1),
                queued=row("COMPLETED"),
                left=rc(1, reason="/data/in is not there on n1"),
            ),
            JobState.FAILED,
            "/data/in is not there on n1",
        ),
        (
            # The reason is there before the exit code.
            Traces(
                failed(TERMINATED),
                queued=row("COMPLETED"),
                left=Left(Evidence(reason="/data/in is not there on n1")),
            ),
            JobState.FAILED,
            "/data/in is not there on n1",
        ),
        (
            Traces(failed(WRONG_CODE.format(3), 3), left=rc(3), doubt="hpc away", waited=LATER),
            JobState.FAILED,
            "exit code 3",
        ),
        (
            Traces(waited=LATER, queued=row("COMPLETED")),
            JobState.FAILED,
            "failed in Cromwell: it does not say why",
        ),
        (
            Traces(failed(NOT_ALIVE), waited=LATER),
            JobState.FAILED,
            f"failed in Cromwell: {NOT_ALIVE}",
        ),
        (
            # It ended well after Cromwell had given it up, but its output was not looked at.
            Traces(failed(NOT_ALIVE), queued=row("COMPLETED"), left=rc(0), waited=LATER),
            JobState.FAILED,
            f"failed in Cromwell: {NOT_ALIVE}",
        ),
    ],
)
def test_why_it_failed(traces: Traces, state: JobState, message: str) -> None:
    seen = said("Failed", traces)
    assert seen.state is state
    assert seen.message.endswith(message)


@pytest.mark.parametrize(
    ("call", "left", "message"),
    [
        (
            failed(NOT_STARTED, id=""),
            Left(
                refusal="sbatch: error: Batch job submission failed: Invalid partition name "
                "specified\n"
            ),
            "refused by Slurm: Invalid partition name specified",
        ),
        (
            failed(NOT_STARTED, id=""),
            Left(
                refusal="sbatch: error: The site's rule 7 says no\n\nsbatch: error: Batch job "
                "submission failed: Invalid qos specification"
            ),
            "refused by Slurm: The site's rule 7 says no; Invalid qos specification",
        ),
        (failed(NOT_STARTED, id=""), Left(), f"failed in Cromwell: {NOT_STARTED}"),
        (
            # sbatch took it, with a warning.
            failed(NO_ID, id=""),
            Left(refusal="sbatch: warning: the site says hello"),
            f"failed in Cromwell: {NO_ID}",
        ),
        (failed(PARSER, id=""), Left(), f"failed in Cromwell: {PARSER}"),
    ],
    ids=["refused", "refused in two lines", "no stderr", "no id", "no WDL"],
)
@pytest.mark.parametrize("asks_slurm", [True, False])
def test_why_it_never_began(call: Call, left: Left, message: str, asks_slurm: bool) -> None:
    seen = said("Failed", Traces(call, left=left), job=NEW, asks_slurm=asks_slurm)
    assert (seen.state, seen.message) == (JobState.FAILED, message)


@pytest.mark.parametrize("job", [JOB, replace(JOB, state=JobState.QUEUED)])
def test_a_warning_of_sbatch_is_no_refusal(job: Job) -> None:
    left = Left(refusal="sbatch: warning: the site says hello")
    for call in (None, failed("Job is odd")):
        seen = said("Failed", Traces(call, row("COMPLETED"), left=left, waited=LATER), job=job)
        assert "refused" not in seen.message


def test_what_has_an_id_was_not_refused_though_the_id_is_none_of_slurms() -> None:
    left = Left(refusal="sbatch: warning: the site says hello")
    seen = said("Failed", Traces(failed("Job is odd", id="pid 7"), left=left), job=NEW)
    assert seen.message == "failed in Cromwell: Job is odd"


@pytest.mark.parametrize(
    "traces",
    [
        Traces(queued=row("COMPLETED"), left=rc(3)),
        Traces(failed(TERMINATED), left=rc(130)),
        Traces(failed(TERMINATED), left=rc(137)),
        Traces(failed(TERMINATED), left=rc(143)),
        Traces(failed(TERMINATED)),
        Traces(failed(WRONG_CODE.format(79), 79), left=rc(79)),
        Traces(failed(WRONG_CODE.format(3), 3), left=rc(3), queued=row("COMPLETING")),
        Traces(failed(WRONG_CODE.format(3), 3), doubt="the shared disk does not answer on hpc"),
    ],
    ids="no-metadata interrupted killed ended no-code given-up completing doubt".split(),
)
@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
def test_the_reason_is_waited_for(traces: Traces, state: JobState) -> None:
    seen = said("Failed", traces, job=replace(JOB, state=state))
    assert seen.state is state
    assert seen.message == f"ended with an error; {traces.doubt or 'asking why'}"


def test_where_slurm_is_not_asked_it_is_not_waited_for() -> None:
    seen = said("Failed", Traces(failed(TERMINATED), left=rc(137)), asks_slurm=False)
    assert (seen.state, seen.message) == (JobState.FAILED, "killed by signal 9 (SIGKILL)")


def test_a_doubt_that_stays_is_told_with_the_end() -> None:
    seen = said("Failed", Traces(failed(TERMINATED), doubt="no accounting", waited=LATER))
    assert (seen.state, seen.message) == (
        JobState.FAILED,
        f"failed in Cromwell: {TERMINATED} (no accounting)",
    )


@pytest.mark.parametrize("left", [Left(), rc(79)])
def test_while_slurm_is_away_a_job_without_an_exit_code_may_go_on(left: Left) -> None:
    """Cromwell itself gives up jobs because it could not ask Slurm."""
    traces = Traces(failed(NOT_ALIVE), left=left, doubt="squeue away", blind=True, waited=LATER)
    assert said("Failed", traces).state is JobState.RUNNING
    assert said("Failed", replace(traces, left=rc(3))).state is JobState.FAILED
    assert said("Failed", traces, job=NEW).state is JobState.FAILED  # it never got there


def test_what_cromwell_gave_up_goes_on_on_slurm() -> None:
    traces = Traces(failed(NOT_ALIVE), queued=row("RUNNING", nodes="n1"), waited=LATER)
    seen = said("Failed", traces)
    assert seen.state is JobState.RUNNING
    assert seen.message == f"running on n1, although it failed in Cromwell: {NOT_ALIVE}"


def test_the_end_is_when_the_exit_code_was_written() -> None:
    left = Left(Evidence(exit=f"3 {END.timestamp() - 60:.0f}"))
    traces = Traces(failed(WRONG_CODE.format(3), 3), queued=row("COMPLETED"), left=left)
    assert said("Failed", traces).ended_at == END - timedelta(seconds=60)
    assert said("Failed", replace(traces, left=Left())).ended_at == END


@pytest.mark.parametrize("state", ALIVE)
def test_what_the_accounting_says_of_an_earlier_run_is_no_end(state: str) -> None:
    traces = Traces(queued=row(state), accounted=row("NODE_FAIL"))
    assert (traces.over, traces.decided) == (None, None)


# forgotten by Cromwell


@pytest.mark.parametrize("state", ALIVE)
def test_a_forgotten_job_goes_on_on_slurm(state: str) -> None:
    seen = cromwell.forgotten(JOB, Traces(queued=row(state), left=rc(0), waited=LATER), True)
    assert seen is not None
    assert not seen.state.final
    assert "Cromwell has forgotten it" in seen.message
    assert seen.message.endswith("Slurm's job 7")


@pytest.mark.parametrize(
    ("traces", "state", "message"),
    [
        (Traces(left=rc(0)), JobState.SUCCEEDED, "finished"),
        (Traces(left=rc(0), queued=row("COMPLETED")), JobState.SUCCEEDED, "finished"),
        (Traces(left=rc(0), accounted=row("CANCELLED")), JobState.SUCCEEDED, "finished"),
        (Traces(left=rc(3), accounted=row("COMPLETED")), JobState.FAILED, "exit code 3"),
        (
            Traces(left=rc(137), accounted=row("OUT_OF_MEMORY")),
            JobState.FAILED,
            "out of memory (asked for 200 MiB)",
        ),
        (
            Traces(left=rc(79), accounted=row("FAILED", exit_code="255:0")),
            JobState.FAILED,
            "exit code 255",
        ),
        (Traces(left=rc(79)), JobState.FAILED, "exit code 79, or killed on the cluster"),
        (
            Traces(left=rc(1, reason="no such folder: /data/in")),
            JobState.FAILED,
            "no such folder: /data/in",
        ),
        (
            Traces(accounted=row("TIMEOUT", start="1795360000"), waited=LATER),
            JobState.FAILED,
            "time limit of 60 min",
        ),
        (Traces(accounted=row("CANCELLED")), JobState.CANCELLED, "cancelled on the cluster"),
        (
            Traces(doubt="squeue away", left=rc(0), waited=LATER),
            JobState.RUNNING,
            "Cromwell has forgotten it (is its database kept on a disk?); squeue away",
        ),
    ],
)
def test_what_becomes_of_a_forgotten_job(traces: Traces, state: JobState, message: str) -> None:
    seen = cromwell.forgotten(JOB, traces, True)
    assert seen is not None
    assert (seen.state, seen.message) == (state, message)


@pytest.mark.parametrize(
    "traces",
    [
        Traces(waited=LATER),
        Traces(accounted=row("COMPLETED"), waited=LATER),
        Traces(accounted=row("TIMEOUT", nodes="n1")),
        Traces(left=Left(Evidence(exit="rubbish")), waited=LATER),
        Traces(left=Left(refusal="sbatch: warning"), waited=LATER),
    ],
)
def test_a_forgotten_job_of_which_nobody_knows_has_not_ended(traces: Traces) -> None:
    assert cromwell.forgotten(JOB, traces, True) is None


# what must hold whatever comes together


def rows(states: Iterable[str]) -> st.SearchStrategy[Row]:
    return st.builds(
        row,
        st.sampled_from(sorted(states)),
        reason=st.sampled_from(["", "None", "Resources"]),
        start=st.sampled_from(["", "N/A", "1795360000"]),
        nodes=st.sampled_from(["", "n1"]),
        exit_code=st.sampled_from(["", "0:0", "1:0", "0:9"]),
    )


EVERY_ROW = rows([*ALIVE, *slurm.ENDED, "CANCELLED by 1001", "HIBERNATING"])
EVIDENCE = st.builds(
    Evidence,
    exit=st.sampled_from(["", "0 1795363200", "3 1795363200", "rubbish", "-1", "255"])
    | st.integers(0, 300).map(lambda code: f"{code} 1795363200"),
    reason=st.sampled_from(["", "no such folder"]),
    errors=st.sampled_from(["", OOM, TIME_LIMIT, "srun: error: x"]),
)
CALLS = st.none() | st.builds(
    Call,
    status=st.sampled_from(["", "Running", "Failed"]),
    job_id=st.sampled_from(["", "7"]),
    return_code=st.none() | st.integers(-1, 300),
    failure=st.sampled_from(["", WRONG_CODE, TERMINATED, NOT_STARTED, NO_ID, NOT_ALIVE, PARSER]),
)
TRACES = st.builds(
    Traces,
    call=CALLS,
    queued=st.none() | EVERY_ROW,
    accounted=st.none() | EVERY_ROW,
    left=st.builds(Left, EVIDENCE, st.sampled_from(["", "sbatch: error: no"])),
    doubt=st.sampled_from(["", "away"]),
    waited=st.sampled_from([0.0, LAGS, 1e6]),
    blind=st.booleans(),
)
JOBS = st.builds(
    lambda state, notes: replace(JOB, state=state, notes=notes),
    st.sampled_from([JobState.QUEUED, JobState.RUNNING]),
    st.sampled_from([{}, {"stdout": NOTES["stdout"]}, NOTES]),
)


@settings(max_examples=500)
@given(
    job=JOBS,
    status=st.sampled_from([*STATUSES, "", "Starting"]),
    traces=TRACES,
    asks_slurm=st.booleans(),
)
def test_no_wrong_end(job: Job, status: str, traces: Traces, asks_slurm: bool) -> None:
    seen = cromwell.observation(job, flow(status), traces, asks_slurm)
    assert seen.message.strip()
    assert seen.state is not JobState.LOST
    if status == "Succeeded":
        assert seen.state is JobState.SUCCEEDED
    elif traces.alive:
        assert not seen.state.final
    elif status == "Aborted":
        assert seen.state is JobState.CANCELLED
    elif seen.state is JobState.SUCCEEDED:
        assert status == "Running"
        assert traces.left.evidence.code == 0
        assert traces.over is not None
    if status in ("On Hold", "Submitted", "", "Starting"):
        assert not seen.state.final
    if status in ("Running", "Aborting") and seen.state.final:
        assert traces.over is not None
        by_slurm = traces.over.state != "COMPLETED" and not traces.doubt
        assert by_slurm or traces.left.evidence.code is not None
    if status == "Failed" and not traces.alive and traces.waited >= LAGS and not traces.blind:
        assert seen.state.final


@settings(max_examples=500)
@given(job=JOBS, traces=TRACES)
def test_no_wrong_end_of_a_forgotten_job(job: Job, traces: Traces) -> None:
    seen = cromwell.forgotten(job, traces, True)
    if seen is None:
        assert not traces.alive
        return
    assert seen.message.strip()
    assert seen.state is not JobState.LOST
    if traces.alive or traces.doubt:
        assert not seen.state.final
    if seen.state is JobState.SUCCEEDED:
        assert traces.left.evidence.code == 0
    if seen.state.final and seen.state is not JobState.SUCCEEDED:
        assert traces.left.evidence.code != 0
        assert traces.over or traces.left.evidence.code is not None


@pytest.mark.parametrize(
    ("status", "state"),
    [pair for pair in product(STATUSES, ALIVE) if pair[0] != "Succeeded"],
)
@pytest.mark.parametrize("waited", [0.0, LATER])
@pytest.mark.parametrize("left", [Left(), rc(0), rc(3), rc(79), rc(143)])
def test_nothing_has_ended_while_slurm_shows_it_alive(
    status: str, state: str, left: Left, waited: float
) -> None:
    traces = Traces(failed(TERMINATED), row(state), row("FAILED"), left, waited=waited)
    assert not said(status, traces).state.final
