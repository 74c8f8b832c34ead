"""What Cromwell, Slurm and the shared disk say of a job together, as an Observation in the user's
words.

Statuses: https://cromwell.readthedocs.io/en/stable/api/RESTAPI/. Cromwell's Running includes
waiting on Slurm, its Failed often does not say why, and its Running may outlive the job.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pman.drivers import slurm_states as states
from pman.drivers.cromwell_api import FINAL, Call, Workflow
from pman.drivers.slurm_queue import one_line
from pman.drivers.slurm_states import Evidence, Row
from pman.jobs import Job, JobState, Observation

LAGS = 60.0
"""Seconds that Cromwell, the accounting or the shared disk may need to show what another of them
shows already."""

WAITING: Mapping[str, str] = {
    "On Hold": "on hold in Cromwell; its administrator can release it",
    "Submitted": "waiting: Cromwell has not started it yet",
}
"""The statuses before a workflow runs, in the user's words."""

_DECIDED = states.ENDED - {"COMPLETED", "FAILED"}
"""Ends by Slurm that say more than an exit code."""

GIVEN_UP = 79
"""The exit code that Cromwell itself writes for a job that has gone without leaving one, after its
exit-code-timeout-seconds."""

_NO_ANSWER = re.compile("timed out|contact|communication|zero bytes", re.IGNORECASE)
"""sbatch's words when Slurm did not answer."""

_KILLED = frozenset({None, GIVEN_UP, 128 + 2, 128 + 9, 128 + 15})
"""Exit codes behind which there may be a reason that Slurm knows; Cromwell does not tell them."""

_NO_ID = "Could not find job ID"
"""What Cromwell says where sbatch took the job and its answer was not understood."""


@dataclass(frozen=True)
class Left:
    """What a job left in Cromwell's folder of it."""

    evidence: Evidence = field(default_factory=Evidence)
    refusal: str = ""
    """What the submission by Cromwell said on stderr."""


@dataclass(frozen=True)
class Traces:
    """What is known of a job besides its workflow."""

    call: Call | None = None
    queued: Row | None = None
    accounted: Row | None = None
    left: Left = field(default_factory=Left)
    doubt: str = ""
    """Why Slurm or the disk could not be asked; empty: they could."""
    waited: float = 0.0
    """Seconds for which it has seemed to be over, and not everyone asked has told so."""
    blind: bool = False
    """Slurm's queue is among what could not be asked, so the job may be there."""

    @property
    def alive(self) -> Row | None:
        return self.queued if self.queued and self.queued.state not in states.ENDED else None

    @property
    def over(self) -> Row | None:
        return None if self.alive else states.over(self.queued, self.accounted)

    @property
    def decided(self) -> Row | None:
        """Slurm's row, if it tells a reason for the end."""
        over = self.over
        return over if over and over.state.split(" ")[0] in _DECIDED else None


def observation(job: Job, flow: Workflow, traces: Traces, asks_slurm: bool) -> Observation:
    """What became of a job whose workflow Cromwell shows."""
    if flow.status in WAITING:
        return Observation(JobState.QUEUED, WAITING[flow.status])
    if flow.status == "Failed":
        return _failed(job, flow, traces, asks_slurm)
    if flow.status == "Aborted" and traces.alive:
        found = states.unended(traces.alive)
        return replace(found, message=f"aborted in Cromwell, not yet as Slurm's {traces.alive.id}")
    if flow.status in FINAL:
        return _ended(job, flow, *_ENDS[flow.status])
    if flow.status not in ("Running", "Aborting"):
        return Observation(job.state, f"Cromwell says {flow.status or 'nothing'} of it")
    found = _running(job, flow, traces, asks_slurm)
    aborting = flow.status == "Aborting" and not found.state.final
    return replace(found, message="being aborted") if aborting else found


_ENDS = {
    "Succeeded": (JobState.SUCCEEDED, "finished"),
    "Aborted": (JobState.CANCELLED, "aborted in Cromwell"),
}


def forgotten(job: Job, traces: Traces, asks_slurm: bool) -> Observation | None:
    """What became of a job that Cromwell has shown, and does not any more: its database was lost.
    None: nobody who was asked knows it. Without Slurm that proves nothing: it may run on."""
    says = "Cromwell has forgotten it (is its database kept on a disk?)"
    if traces.alive:
        found = states.unended(traces.alive)
        return replace(found, message=f"{found.message}; {says}: Slurm's job {traces.alive.id}")
    if traces.doubt:
        return Observation(job.state, f"{says}; {traces.doubt}")
    if traces.left.evidence.code is not None:
        return _by_exit_code(job, traces)
    if not asks_slurm and job.notes:
        return Observation(job.state, f"{says}; only its exit code can tell its end")
    return _by_slurm(job, traces)


def _by_exit_code(job: Job, traces: Traces) -> Observation | None:
    """How it ended by what Cromwell's script left as its last act."""
    evidence = traces.left.evidence
    if traces.decided and evidence.code != 0:
        return states.ended(job, traces.decided, evidence)
    return _left(job, traces, evidence)


def _running(job: Job, flow: Workflow, traces: Traces, asks_slurm: bool) -> Observation:
    if not asks_slurm:
        text = "running (or waiting on Slurm, which Cromwell does not tell)"
        return Observation(JobState.RUNNING, text, started_at=flow.started_at)
    if traces.alive:
        return states.unended(traces.alive)
    if traces.left.evidence.code is not None and flow.status == "Running":
        # Cromwell reads it too, but looks less and less often: in the end every five minutes.
        ended = _by_exit_code(job, traces) if traces.over else None
        return ended or Observation(JobState.RUNNING, "ending")
    if "slurm" not in job.notes:
        return Observation(job.state, "Cromwell is handing it to Slurm")
    if traces.doubt:
        return Observation(job.state, f"Cromwell says {flow.status}; {traces.doubt}")
    says = f"says {traces.over.state}" if traces.over else "does not show it"
    text = f"Cromwell says {flow.status}, and Slurm {says}: waiting for the exit code"
    return _by_slurm(job, traces) or Observation(job.state, text)


def _by_slurm(job: Job, traces: Traces) -> Observation | None:
    """How it ended by Slurm alone, once nobody else is likely to tell.

    None: not yet. COMPLETED tells nothing: Cromwell's script ends well whatever the plugin did.
    """
    if traces.over is None or traces.over.state == "COMPLETED":
        return None
    ended = states.ended(job, traces.over, traces.left.evidence)
    return ended if not traces.over.placed or traces.waited >= LAGS else None


def _failed(job: Job, flow: Workflow, traces: Traces, asks_slurm: bool) -> Observation:
    """Why it failed, by who knows best: the script, Slurm, the exit code, sbatch, Cromwell."""
    call, evidence = traces.call or Call(), traces.left.evidence
    why = f"failed in Cromwell: {call.failure or 'it does not say why'}"
    if traces.alive and traces.waited >= LAGS:  # it gave up a job that it could not look after
        going_on = states.unended(traces.alive)
        return replace(going_on, message=f"{going_on.message}, although it {why}")
    if evidence.code is None and call.return_code is not None:
        evidence = replace(evidence, exit=str(call.return_code))
    noted = "slurm" in job.notes
    untold = asks_slurm and noted and not traces.over and evidence.code in _KILLED
    # Cromwell too gives up jobs because it could not ask Slurm.
    maybe_alive = traces.blind and noted and evidence.code in (None, GIVEN_UP)
    # Slurm may have taken a job without being able to say so.
    in_doubt = not noted and _NO_ANSWER.search(traces.left.refusal)
    lacking = traces.call is None or traces.doubt or traces.alive or untold or in_doubt
    if maybe_alive or (lacking and traces.waited < LAGS):
        return Observation(job.state, f"ended with an error; {traces.doubt or 'asking why'}")
    if evidence.reason:
        return _ended(job, flow, JobState.FAILED, evidence.reason)
    found = (
        states.ended(job, traces.decided, evidence)
        if traces.decided
        else _left(job, traces, evidence)
    )
    if found is not None and found.state is not JobState.SUCCEEDED:
        ended = _ended(job, flow, found.state, found.message)
        return replace(ended, ended_at=found.ended_at or ended.ended_at)
    taken = noted or call.job_id or _NO_ID in call.failure
    if traces.left.refusal and not taken:
        text = f"refused by Slurm: {one_line(traces.left.refusal)}"
        return _ended(job, flow, JobState.FAILED, text)
    doubt = f" ({traces.doubt})" if traces.doubt else ""
    return _ended(job, flow, JobState.FAILED, f"{why}{doubt}")


def _left(job: Job, traces: Traces, evidence: Evidence) -> Observation | None:
    """How it ended by the disk, where Slurm tells no reason."""
    over = traces.over
    if evidence.code != GIVEN_UP or (over and over.state == "COMPLETED"):
        return states.left(job, evidence)  # of a script that ended, the code is the plugin's own
    unwritten = replace(evidence, exit="")
    if over:
        return states.ended(job, over, unwritten)
    text = f"exit code {GIVEN_UP}, or killed on the cluster"
    return states.left(job, unwritten) or Observation(JobState.FAILED, text)


def _ended(job: Job, flow: Workflow, state: JobState, message: str) -> Observation:
    start = job.started_at or flow.started_at
    return Observation(state, message, started_at=start, ended_at=flow.ended_at)
