"""The words that everything else speaks: a job's spec, document, state, and what was seen of it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Self

INCOMING = "/share/incoming"
"""Where a plugin finds its input, read-only (ChRIS)."""

OUTGOING = "/share/outgoing"
"""Where a plugin leaves its output (ChRIS)."""


class JobState(StrEnum):
    """Where a job is. States only move forwards, in this order; the last four are final."""

    ACCEPTED = "accepted"
    SUBMITTING = "submitting"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"

    @property
    def final(self) -> bool:
        return _ORDER[self] == _FINAL

    def may_become(self, other: "JobState") -> bool:
        """Whether ``other`` is this state or a later one."""
        return self is other or _ORDER[self] < _ORDER[other]

    @property
    def chris(self) -> str:
        """The status that pfcon knows this state by."""
        return _CHRIS[self]


_FINAL = 4
_ORDER = {state: min(rank, _FINAL) for rank, state in enumerate(JobState)}
_CHRIS = {
    JobState.ACCEPTED: "notstarted",
    JobState.SUBMITTING: "notstarted",
    JobState.QUEUED: "notstarted",
    JobState.RUNNING: "started",
    JobState.SUCCEEDED: "finishedSuccessfully",
    JobState.FAILED: "finishedWithError",
    JobState.CANCELLED: "finishedWithError",
    JobState.LOST: "undefined",
}


@dataclass(frozen=True, slots=True)
class JobSpec:
    """All that a template may say of a job, under the name ``job``."""

    jid: str
    """The name that ChRIS knows the job by."""
    name: str
    """The name that the engine knows it by: the jid, a dot and a token used once."""
    auid: str
    """The ChRIS user."""
    type: str
    """The plugin's type: ds, fs or ts."""
    image: str
    """The OCI image as pfcon named it."""
    argv: tuple[str, ...]
    """The command that runs, entry point first; paths as inside the container."""
    env: Mapping[str, str]
    """The plugin's environment variables."""
    labels: Mapping[str, str]
    """JOB_LABELS."""
    input_dir: str
    """Absolute path of the input folder as the nodes see it; mounted read-only."""
    output_dir: str
    """Absolute path of the output folder as the nodes see it; mounted read-write."""
    folder: str
    """Absolute path of the job's own folder as the nodes see it: script, log, lock, exit file."""
    number_of_workers: int = 1
    cpu_limit: int | None = None
    """Millicores; None: no limit."""
    memory_limit: int | None = None
    """MiB; None: no limit."""
    gpu_limit: int = 0
    """GPUs for each worker."""
    time_limit: int | None = None
    """Minutes; None: the cluster's own default."""
    uid: int | None = None
    """The user id CONTAINER_USER asks for; None: the engine's own."""
    gid: int | None = None
    shm_size: int | None = None
    """MiB of /dev/shm; None: the runtime's own."""

    @property
    def cpus(self) -> int | None:
        """Whole CPUs that hold ``cpu_limit``; None: no limit."""
        return None if self.cpu_limit is None else math.ceil(self.cpu_limit / 1000)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        values: dict[str, Any] = json.loads(text)
        return cls(**values | {"argv": tuple(values["argv"])})


@dataclass(frozen=True, slots=True)
class Document:
    """What an engine is sent, and what it was made from."""

    text: str
    language: str
    """``sbatch``, ``wdl``, ``docker`` or ``kubernetes``."""
    template: str
    """The template's name, without folder and ending."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """What is wrong with a document, and in which of its lines; 0: in none alone."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the store keeps it."""

    spec: JobSpec
    document: Document
    content: str
    """The request in its canonical form: two requests for the same job have equal contents."""
    engine: str
    """The CONTAINER_ENV that it was given to."""
    generation: int = 1
    """How many times this jid has been run, this one included."""
    state: JobState = JobState.ACCEPTED
    message: str = ""
    engine_id: str = ""
    """The engine's own id; empty: not known yet."""
    accepted_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    missing_since: datetime | None = None
    """Since when the engine, asked and answering, has not known this job; None: it does."""
    log: str | None = None
    """The log's tail, once the job has ended and it was read."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What the driver wrote down for itself, such as where the engine keeps the job's files."""

    @property
    def jid(self) -> str:
        return self.spec.jid

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True, slots=True)
class Observation:
    """What an engine says of a job at one moment."""

    state: JobState
    message: str = ""
    engine_id: str = ""
    """Set when the job turned out to run under another id than the one known."""
    started_at: datetime | None = None
    ended_at: datetime | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    """What the driver wants to find in the job's notes from now on."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a scheduler says of a document that it was only asked about."""

    accepted: bool
    message: str
    """The scheduler's own words."""
    start: datetime | None = None
    """When it would start by the scheduler's estimate; None: no estimate."""
    partition: str = ""
    nodes: str = ""
    """In the scheduler's notation, such as Slurm's ``node[1-2]``."""
    warnings: tuple[str, ...] = ()
    """Why it may never start although it would be accepted, and what to do about it."""


class Severity(StrEnum):
    OK = "ok"
    WARNING = "warning"
    ERROR = "error"
    """pman can't run jobs like that."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of ``pman check``: what was found and what to do about it."""

    severity: Severity
    subject: str
    """What was looked at, in a word or two: ``login node``, ``STOREBASE``."""
    text: str
    remedy: str = ""
    """Empty where there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a job's history."""

    at: datetime
    state: JobState
    message: str = field(default="")
