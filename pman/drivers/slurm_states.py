"""What Slurm and a job's own folder say, as an Observation in the user's words.

States and reasons: squeue(1) and sacct(1), JOB STATE CODES and JOB REASON CODES.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from signal import Signals

from pman.jobs import Job, JobState, Observation


@dataclass(frozen=True)
class Row:
    """One job in an answer of squeue or sacct."""

    id: str
    name: str
    state: str
    """A state's name; sacct's may go on, as in ``CANCELLED by 1001``."""
    reason: str = ""
    start: str = ""
    """Seconds since the epoch, or anything else when there is none."""
    end: str = ""
    nodes: str = ""
    exit_code: str = ""
    """``code:signal``; squeue has none."""

    @property
    def placed(self) -> bool:
        """Whether it was ever given nodes. Its start is no sign of that: one that is cancelled
        while it waits starts when it ends."""
        return self.nodes.strip() not in ("", "(null)", "None assigned")


@dataclass(frozen=True)
class Evidence:
    """What a job left in its own folder on the shared disk."""

    exit: str = ""
    """Exit code and end time in seconds since the epoch, written by the script's trap."""
    owner: str = ""
    """The id of the job that took the lock."""
    reason: str = ""
    """Why the script did not run the plugin, in words for the user."""
    errors: str = ""
    """The last lines that Slurm itself wrote to the log."""

    @property
    def code(self) -> int | None:
        match = re.match(r"[0-9]{1,3}(?= |$)", self.exit)
        return int(match[0]) if match else None

    @property
    def ended_at(self) -> datetime | None:
        return _time(self.exit.partition(" ")[2])


WAITING = frozenset(
    "PENDING CONFIGURING EXPEDITING POWER_UP_NODE REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD "
    "SPECIAL_EXIT LAUNCH_FAILED REVOKED RECONFIG_FAIL".split()
)
RUNNING: Mapping[str, str] = {
    "RUNNING": "",
    "COMPLETING": "ending",
    "RESIZING": "",
    "SIGNALING": "",
    "STAGE_OUT": "ending: data is staged out",
    "STOPPED": "stopped by the cluster for a while",
    "SUSPENDED": "suspended by the cluster for a while",
    "UPDATE_DB": "ending",
}
ENDED = frozenset(
    "COMPLETED FAILED CANCELLED TIMEOUT OUT_OF_MEMORY NODE_FAIL BOOT_FAIL DEADLINE "
    "PREEMPTED".split()
)

_NEVER = "; it will not start unless the cluster's administrators change something"
_REASONS: Mapping[str, str] = {
    "None": "",
    "Resources": "for free nodes",
    "Priority": "jobs with a higher priority come first",
    "BeginTime": "it was put off by the cluster",
    "Dependency": "for another job",
    "Licenses": "for a licence",
    "ReqNodeNotAvail": "the nodes it needs are down or reserved",
    "Nodes required for job are DOWN": "the nodes it needs are down or reserved",
    "PartitionDown": "the partition is closed for now",
    "PartitionInactive": "the partition is closed for now",
    "PartitionTimeLimit": "it asks for more time than the partition allows" + _NEVER,
    "PartitionNodeLimit": "it asks for more nodes than the partition allows" + _NEVER,
    "PartitionConfig": "it asks for more than the partition allows" + _NEVER,
    "BadConstraints": "no node has what it asks for" + _NEVER,
    "JobHeldUser": "held; `scontrol release` lets it go",
    "JobHeldAdmin": "held by an administrator",
    "JobHoldMaxRequeue": "held after it was requeued too often",
    "launch failed requeued held": (
        "the node could not start it and Slurm holds it; an administrator must release it"
    ),
    "ReservationDeleted": "its reservation is gone" + _NEVER,
    "InvalidAccount": "the account is not valid" + _NEVER,
    "InvalidQOS": "the QOS is not valid" + _NEVER,
    "AssociationJobLimit": "the account has as many jobs as it may",
    "QOSJobLimit": "the QOS has as many jobs as it may",
}
_OOM = re.compile(r"oom[-_ ]?kill|Out Of Memory|exceeded memory limit", re.IGNORECASE)
_SIGNALS = {known.value: known.name for known in Signals}
_EXIT_CODES = {
    126: "exit code 126: the command can't be executed",
    127: "exit code 127: command not found",
}


def waiting(reason: str) -> str:
    """The message of a job that waits for ``reason``."""
    why = _REASONS.get(reason.partition(",")[0].replace("_", " "))
    if why is None:
        limit = re.match(r"(QOS|Assoc)(Max|Grp)", reason)
        why = f"a limit of the {limit[1]}" if limit else ""
    known = reason if reason not in ("", "None") else "Slurm has not looked at it yet"
    return f"waiting: {known}" + (f" ({why})" if why else "")


def unended(row: Row) -> Observation:
    """What squeue says of a job that has not ended."""
    if row.state in WAITING:
        return Observation(JobState.QUEUED, waiting(row.reason))
    if row.state in RUNNING:
        where = f"running on {row.nodes}" if row.nodes else "running"
        return Observation(
            JobState.RUNNING, RUNNING[row.state] or where, started_at=_time(row.start)
        )
    return Observation(JobState.QUEUED, f"Slurm says {row.state}")


def over(queued: Row | None, accounted: Row | None) -> Row | None:
    """What squeue's row and sacct's tell together of a job that has ended; None: neither does."""
    final = accounted if accounted and accounted.state.split(" ")[0] in ENDED else None
    if queued is None or queued.state not in ENDED:
        return final
    if final and final.state.split(" ")[0] == queued.state:
        return replace(queued, state=final.state, exit_code=final.exit_code)
    return queued


def ended(job: Job, row: Row, evidence: Evidence) -> Observation:
    """How a job ended of which Slurm says that it has."""
    state, _, words = row.state.partition(" ")
    code, signal = _exit_code(row, evidence)
    memory = _memory(job)
    oom = _OOM.search(evidence.errors) is not None
    ask = job.spec.time_limit
    messages: Mapping[str, tuple[JobState, str]] = {
        "COMPLETED": (
            JobState.SUCCEEDED,
            f"finished, although a part of it ran {memory}" if oom else "finished",
        ),
        "FAILED": (JobState.FAILED, f"{memory}" if oom else _exit_message(code, signal)),
        "CANCELLED": (JobState.CANCELLED, _cancelled(row, words, evidence)),
        "TIMEOUT": (
            JobState.FAILED,
            f"time limit of {ask} min" if ask is not None else "time limit of the partition",
        ),
        "OUT_OF_MEMORY": (JobState.FAILED, memory),
        "NODE_FAIL": (JobState.FAILED, f"node failure: {row.nodes or 'a node'} went down"),
        "BOOT_FAIL": (JobState.FAILED, f"node failure: {row.nodes or 'a node'} did not boot"),
        "DEADLINE": (JobState.FAILED, "its deadline on the cluster passed"),
        "PREEMPTED": (JobState.FAILED, "preempted by a job with a higher priority"),
    }
    result, message = messages[state]
    if evidence.reason and result is not JobState.SUCCEEDED:
        message = evidence.reason
    elif result is JobState.FAILED and "DUE TO JOB REQUEUE" in evidence.errors:
        # Slurm may also give up on the second start by itself: its words are the first run's then.
        message = "requeued by the cluster after it had begun; a plugin is never run twice"
    return Observation(
        result,
        message,
        started_at=_time(row.start),
        ended_at=evidence.ended_at or _time(row.end),
    )


def left(job: Job, evidence: Evidence) -> Observation | None:
    """How a job ended that neither squeue nor sacct knows; None if its folder does not tell."""
    if evidence.code is None and not evidence.errors:
        return None
    row = Row(
        id=job.engine_id, name=job.name, state="COMPLETED" if evidence.code == 0 else "FAILED"
    )
    for pattern, verdict in (
        ("DUE TO TIME LIMIT", "TIMEOUT"),
        ("DUE TO NODE FAILURE", "NODE_FAIL"),
        ("DUE TO PREEMPTION", "PREEMPTED"),
        ("CANCELLED AT", "CANCELLED"),
    ):
        # A script that ended by itself before it was cancelled has ended as its code says.
        if pattern in evidence.errors and evidence.code != 0:
            return ended(job, replace(row, state=verdict), evidence)
    if evidence.code is None and not _OOM.search(evidence.errors):
        return None
    return ended(job, row, evidence)


def _cancelled(row: Row, words: str, evidence: Evidence) -> str:
    message = f"cancelled on the cluster {words}".rstrip()
    if row.placed and not evidence.owner:
        # With --no-requeue this is also what becomes of a job that its node can't start.
        return f"{message} before it began on {row.nodes} (can that node start jobs?)"
    return message


def _memory(job: Job) -> str:
    asked = job.spec.memory_limit
    return "out of memory" + (f" (asked for {asked} MiB)" if asked is not None else "")


def _exit_code(row: Row, evidence: Evidence) -> tuple[int | None, int]:
    if evidence.code is not None:
        return evidence.code, 0
    code, _, signal = row.exit_code.partition(":")
    if code.isdigit() and signal.isdigit():
        return int(code), int(signal)
    return None, 0


def _exit_message(code: int | None, signal: int) -> str:
    if code is not None and code - 128 in _SIGNALS:
        signal = code - 128
    if signal:
        name = f" ({_SIGNALS[signal]})" if signal in _SIGNALS else ""
        return f"killed by signal {signal}{name}"
    if code is None:
        return "failed"
    return _EXIT_CODES.get(code, f"exit code {code}")


def _time(seconds: str) -> datetime | None:
    # Ten digits are enough until the year 2286.
    known = re.fullmatch(r"[1-9][0-9]{0,9}", seconds.strip())
    return datetime.fromtimestamp(int(known[0]), UTC) if known else None
