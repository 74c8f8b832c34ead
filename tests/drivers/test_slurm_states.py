"""Every state, reason and trace that Slurm's manual pages name, in the user's words."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from pman.drivers import slurm_states as states
from pman.drivers.slurm_states import Evidence, Row
from pman.jobs import Document, Job, JobSpec, JobState

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
    document=Document("#!/bin/bash\n", "sbatch", "bare"),
    content="{}",
    engine="slurm",
    engine_id="7",
)
STATES = (
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING PREEMPTED "
    "RUNNING SUSPENDED TIMEOUT COMPLETING CONFIGURING EXPEDITING LAUNCH_FAILED POWER_UP_NODE "
    "RECONFIG_FAIL REQUEUED REQUEUE_FED REQUEUE_HOLD RESIZING RESV_DEL_HOLD REVOKED SIGNALING "
    "SPECIAL_EXIT STAGE_OUT STOPPED UPDATE_DB"
).split()


def row(state: str, **values: str) -> Row:
    return replace(Row(id="7", name="jid.0", state=state), **values)


@pytest.mark.parametrize("state", STATES)
def test_every_state_of_the_manual_is_known(state: str) -> None:
    kinds = [state in states.WAITING, state in states.RUNNING, state in states.ENDED]
    assert kinds.count(True) == 1


@pytest.mark.parametrize("state", sorted(states.ENDED))
def test_every_end_has_a_message(state: str) -> None:
    seen = states.ended(JOB, row(state, nodes="n1", exit_code="1:0"), Evidence(owner="7"))
    assert seen.state.final
    assert seen.message
    assert (seen.state is JobState.SUCCEEDED) == (state == "COMPLETED")


def test_a_state_that_nobody_knows_is_no_end() -> None:
    seen = states.unended(row("HIBERNATING"))
    assert seen.state is JobState.QUEUED
    assert seen.message == "Slurm says HIBERNATING"


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("Resources", "waiting: Resources (for free nodes)"),
        (
            "ReqNodeNotAvail, UnavailableNodes:n[1-2]",
            "waiting: ReqNodeNotAvail, UnavailableNodes:n[1-2] "
            "(the nodes it needs are down or reserved)",
        ),
        ("None", "waiting: Slurm has not looked at it yet"),
        ("QOSMaxJobsPerUserLimit", "waiting: QOSMaxJobsPerUserLimit (a limit of the QOS)"),
        ("AssocGrpCpuLimit", "waiting: AssocGrpCpuLimit (a limit of the Assoc)"),
        ("SomethingNew", "waiting: SomethingNew"),
    ],
)
def test_waiting_says_the_reason(reason: str, message: str) -> None:
    seen = states.unended(row("PENDING", reason=reason))
    assert (seen.state, seen.message) == (JobState.QUEUED, message)


@pytest.mark.parametrize(
    ("found", "evidence", "message"),
    [
        (row("FAILED", exit_code="3:0"), Evidence(), "exit code 3"),
        (row("FAILED", exit_code="0:9"), Evidence(), "killed by signal 9 (SIGKILL)"),
        (row("FAILED"), Evidence(exit="139 1700000000"), "killed by signal 11 (SIGSEGV)"),
        (row("FAILED"), Evidence(exit="200 1700000000"), "exit code 200"),
        (row("FAILED"), Evidence(), "failed"),
        (row("FAILED"), Evidence(reason="no folder"), "no folder"),
        (
            row("FAILED", exit_code="0:9"),
            Evidence(errors="slurmstepd: error: Detected 1 oom_kill event in StepId=7.batch."),
            "out of memory (asked for 200 MiB)",
        ),
        (row("CANCELLED by 1001"), Evidence(owner="7"), "cancelled on the cluster by 1001"),
        (row("TIMEOUT"), Evidence(exit="143 1700000000"), "time limit of 60 min"),
        (
            row("FAILED"),
            Evidence(
                exit="143 1700000000",
                errors="slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT x DUE TO JOB REQUEUE ***",
            ),
            "requeued by the cluster after it had begun; a plugin is never run twice",
        ),
        (row("NODE_FAIL", nodes="n7"), Evidence(), "node failure: n7 went down"),
    ],
)
def test_ends(found: Row, evidence: Evidence, message: str) -> None:
    assert states.ended(JOB, found, evidence).message == message


def test_an_end_has_its_times() -> None:
    found = row("COMPLETED", start="1700000000", end="1700000060")
    seen = states.ended(JOB, found, Evidence())
    assert seen.started_at == datetime.fromtimestamp(1700000000, UTC)
    assert seen.ended_at == datetime.fromtimestamp(1700000060, UTC)


@pytest.mark.parametrize(
    ("evidence", "state", "message"),
    [
        (Evidence(exit="0 1700000000"), JobState.SUCCEEDED, "finished"),
        (Evidence(exit="7 1700000000"), JobState.FAILED, "exit code 7"),
        (
            Evidence(
                exit="143 1700000000",
                errors="slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT x DUE TO TIME LIMIT ***",
            ),
            JobState.FAILED,
            "time limit of 60 min",
        ),
        (
            Evidence(
                owner="7", errors="slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01 ***"
            ),
            JobState.CANCELLED,
            "cancelled on the cluster",
        ),
        (
            # It ended well; the cancellation came as it was leaving.
            Evidence(exit="0 1700000000", errors="slurmstepd: error: *** JOB 7 CANCELLED AT x ***"),
            JobState.SUCCEEDED,
            "finished",
        ),
    ],
)
def test_ends_that_only_the_jobs_folder_tells(
    evidence: Evidence, state: JobState, message: str
) -> None:
    seen = states.left(JOB, evidence)
    assert seen is not None
    assert (seen.state, seen.message) == (state, message)


@pytest.mark.parametrize(
    "evidence",
    [Evidence(), Evidence(owner="7"), Evidence(errors="srun: error: something else")],
    ids=["nothing", "it began", "words that tell nothing"],
)
def test_a_folder_that_tells_nothing_is_no_end(evidence: Evidence) -> None:
    assert states.left(JOB, evidence) is None
