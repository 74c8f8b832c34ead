"""Slurm through Cromwell: workflows by its REST API; logs and reasons from the shared disk and,
where the login node can be asked, from Slurm.

A look at all jobs is one query of Cromwell for each 500 of them, one command for what Slurm has of
each ASKED, and one for each BATCH of those that seem to be over. What only the metadata of one
workflow tell is asked for jobs whose state changed, METADATA of them at a time.
"""

import logging
import posixpath
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from pman.drivers import cromwell_check, slurm_states
from pman.drivers import cromwell_states as states
from pman.drivers.cromwell_api import FINAL, LABEL, Call, CromwellServer, Workflow
from pman.drivers.cromwell_states import Left, Traces
from pman.drivers.slurm_queue import (
    ACCOUNTED,
    FIELD,
    NO_ACCOUNTING,
    QUEUED,
    RECORD,
    SQUEUE,
    answered,
    decoded,
    reason,
    rows,
)
from pman.drivers.slurm_states import Evidence, Row
from pman.errors import Ambiguous, EngineError, Unavailable
from pman.jobs import Finding, Job, JobState, Observation, Verdict
from pman.shell import Shell

log = logging.getLogger(__name__)

METADATA = 25
"""Workflows whose metadata are asked for in one look, at the most."""

ROUND_SECONDS = 10.0
"""Seconds after which no more requests about one workflow each are begun in a look or a removal:
each may take as long as a time-out, and the other jobs wait."""

BATCH = 500
"""Jobs whose traces are read by one command, at the most."""

ASKED = 5000
"""Ids that squeue is given at a time, at the most: more would be too long for one argument."""

LOG_BYTES = 256 << 10
"""Bytes of a log's tail, at the most."""

SHOWN_AT_LAST = 60.0
"""Seconds after which even a Cromwell that is busy shows it: what is not found by then is submitted
again."""

SHOWN_AFTER = 15.0
"""Seconds after which Cromwell shows a workflow that it has taken, at the latest: it writes every
5 s and summarises every second."""

_STDOUT = "call-plugin_instance/execution/stdout"
"""Where Cromwell leaves a task's stdout, below its folder of the workflow."""

_IDS = uuid.UUID("5a0f4a52-6b5c-5f0e-9f64-3f1f0c1f7d11")
"""The namespace of the workflows' ids (RFC 9562, version 5)."""

_QUEUE = SQUEUE + 'queue "$@"\n'

# A job can write into this folder. It may put a link in the place of the folder or of its files, or
# a pipe that nobody writes into; and whoever runs these commands may read more than the job may.
_READING = r"""
enter() {
    cd -P -- "$1" 2> /dev/null && [ "$PWD" = "$(cd -P -- "${1%/*}" && pwd -P)/${1##*/}" ]
}
start() { dd if="$1" bs="$2" count=1 iflag=nofollow,nonblock 2> /dev/null; }
end() {
    local size
    size=$(stat -c %s -- "$1" 2> /dev/null) || return
    dd if="$1" bs=65536 iflag=nofollow,nonblock,skip_bytes \
        skip="$((size > $2 ? size - $2 : 0))" 2> /dev/null | head -c "$2"
}
"""

_EVIDENCE = (
    SQUEUE
    + _READING
    + r"""
ids=$1
shift
[ -z "$ids" ] || account --jobs="$ids"
printf '\036%s\036' "$?"
part() { start "$1" 1000 | tr -d '\036\037'; printf '\037'; }
traces() {
    enter "$2" || return  # not known yet, or the disk that it is on is away
    printf '%s\037' "$1"
    if [ -f rc ]; then
        printf '%s %s' "$(start rc 10 | tr -cd 0-9)" "$(stat -c %Y rc)"
    fi
    printf '\037'
    [ ! -d pman-lock ] || printf begun
    printf '\037'
    part pman-reason
    part stderr.submit
    for file in slurm.log stderr; do
        end "$file" 65536 | grep -aE '^(slurmstepd|srun)[^ ]*: error: ' | tail -n 5
    done | tr -d '\036\037'
    printf '\036'
}
while [ "$#" -gt 0 ]; do
    (traces "$1" "$2")
    shift 2
done
exit 0
"""
)

_DISCOVER = (
    SQUEUE
    + r"""
[ -z "$1" ] || queue --name="$1" || exit
printf '\036'
shift
for folder; do [ ! -d "$folder" ] || printf '%s\n' "$folder"; done
"""
)

# Without the plugin's own words: what Slurm and sbatch wrote, by the names of the example
# configuration and of Cromwell.
_LOGS = (
    _READING
    + r"""
lines=$3 bytes=$4
enter "${1%/*}" || { echo "${1%/*} is not there" >&2; exit 1; }
show() {
    for file; do
        # The bytes first: a line without an end would have all of the file read.
        end "$file" "$bytes" | tail -n "$lines" | sed '$a\'
    done
}
if [ -s "${1##*/}" ] || [ -s "${2##*/}" ]; then
    show "${1##*/}" "${2##*/}"
else
    show slurm.log stderr.submit
fi | tail -n "$lines"
"""
)

_CANCEL = "scancel $1\n"


_Found = tuple[Mapping[str, Row], Mapping[str, Left], str]
"""The accounting's rows and what jobs left, by the jobs' names, and why something lacks."""


class CromwellDriver:
    """Workflows of ``server``; the files that it names lie behind ``shell``.

    ``paths`` maps beginnings of Cromwell's paths to what they are there; ``asks_slurm``: whether
    Slurm's commands are there too.
    """

    def __init__(
        self,
        server: CromwellServer,
        shell: Shell,
        paths: Mapping[str, str],
        *,
        asks_slurm: bool,
        config: str = "",
        storebase: str = "",
        poll_interval: float = 2.0,
    ) -> None:
        self._server = server
        self._shell = shell
        self._paths = paths
        self._asks_slurm = asks_slurm
        self._check = partial(
            cromwell_check.check,
            server,
            shell,
            self._here,
            asks_slurm=asks_slurm,
            config=config,
            storebase=storebase,
            poll_interval=poll_interval,
        )
        # By the jobs' names, in time.monotonic():
        self._stumbled: dict[str, float] = {}  # when its submission failed
        self._submitted: dict[str, float] = {}
        self._asked: dict[str, float] = {}  # when its metadata were asked for last
        self._over_since: dict[str, float] = {}  # since when it has seemed to be over
        self._root = ""  # Cromwell's folder of all workflows of pman, once a job has told
        self._told: dict[str, Call] = {}  # the metadata of those that failed

    def close(self) -> None:
        self._server.close()
        self._shell.close()

    # --- submit and find ---

    def submit(self, jobs: Sequence[Job]) -> Mapping[str, str | EngineError]:
        outcomes: dict[str, str | EngineError] = {}
        names = {job.name for job in jobs}
        self._stumbled = {name: at for name, at in self._stumbled.items() if name in names}
        # Last the one that failed last: it may be the only one that Cromwell stumbles over.
        for job in sorted(jobs, key=lambda job: self._stumbled.get(job.name, 0.0)):
            outcomes[job.name] = outcome = self._submit(job)
            self._stumbled.pop(job.name, None)
            if isinstance(outcome, (Unavailable, Ambiguous)):
                self._stumbled[job.name] = time.monotonic()
                # The others would wait as long, for nothing.
                later = Unavailable(str(outcome), outcome.summary)
                return dict.fromkeys((job.name for job in jobs), later) | outcomes
        return outcomes

    def _submit(self, job: Job) -> str | EngineError:
        labels = {**job.spec.labels, LABEL: job.name}
        try:
            number = self._server.submit(job.document.text, labels, workflow_id(job.name))
        except EngineError as error:
            return error
        self._submitted[job.name] = time.monotonic()
        return number

    def find(self, jobs: Sequence[Job]) -> Mapping[str, str]:
        names = [job.name for job in jobs]
        if self._server.takes_ids:  # then a second submission does no harm
            return self._server.labelled(names)
        until = time.monotonic() + SHOWN_AT_LAST
        while True:
            found = self._server.labelled(names)
            if len(found) == len(names) or time.monotonic() > until:
                return found
            time.sleep(1)

    # --- observe ---

    def observe(self, jobs: Sequence[Job]) -> Mapping[str, Observation]:
        began = time.monotonic()
        flows = self._server.workflows([job.engine_id for job in jobs])
        self._forget({job.name for job in jobs})
        calls = self._calls(jobs, flows)
        told = [_noted(job, calls.get(job.name)) for job in jobs]
        status = {job.name: _status(flows.get(job.engine_id)) for job in told}
        try:
            noted, doubt = self._discovered(told, status), ""
        except Unavailable as error:
            noted, doubt = told, error.summary
        traces = self._traces(noted, status, calls, began, doubt)
        seen: dict[str, Observation] = {}
        for job in noted:
            found = self._seen(job, flows.get(job.engine_id), traces.get(job.name, Traces()))
            if found is not None:
                seen[job.name] = replace(_forwards(job, found), notes=job.notes)
        return seen

    def _seen(self, job: Job, flow: Workflow | None, traces: Traces) -> Observation | None:
        if flow is not None:
            return states.observation(job, flow, traces, self._asks_slurm)
        if job.name in self._submitted and not job.notes:
            return Observation(job.state, "submitted; Cromwell does not show it yet")
        return states.forgotten(job, traces, self._asks_slurm)

    def _forget(self, names: set[str]) -> None:
        """What is kept of jobs that are not asked about any more, or are not new."""
        self._asked = {name: at for name, at in self._asked.items() if name in names}
        new = time.monotonic() - SHOWN_AFTER
        for name, at in dict(self._submitted).items():  # the submit loop adds to it meanwhile
            if at < new:
                del self._submitted[name]

    def _calls(self, jobs: Sequence[Job], flows: Mapping[str, Workflow]) -> Mapping[str, Call]:
        """The metadata of workflows that failed, and of those that have a Slurm job and a log by
        now; an end that went well does not wait for them."""
        known = {job.name: self._told[job.name] for job in jobs if job.name in self._told}
        status = {flow.id: flow.status for flow in flows.values()}
        needed = {"stdout", "slurm"} if self._asks_slurm else {"stdout"}
        failed = [
            job for job in jobs if status.get(job.engine_id) == "Failed" and job.name not in known
        ]
        begun, ended = (
            [job for job in jobs if status.get(job.engine_id) == kind and needed - job.notes.keys()]
            for kind in ("Running", "Succeeded")
        )
        # The same ones first in each look would keep the others from ever being asked for.
        turn = sorted([*failed, *begun, *ended], key=lambda job: self._asked.get(job.name, 0.0))
        found: dict[str, Call] = {}
        until = time.monotonic() + ROUND_SECONDS
        for job in turn[:METADATA]:
            if time.monotonic() > until:
                break
            self._asked[job.name] = time.monotonic()
            try:
                call = self._server.call(job.engine_id)
            except Unavailable as error:  # one that can't be told must not hide the others
                log.info("%s: its metadata can't be read: %s", job.jid, error)
                continue
            if call is not None:
                found[job.name] = call
        # What is told of a failed one stays as it is; Slurm and the disk may take their time.
        self._told = known | {job.name: found[job.name] for job in failed if job.name in found}
        return known | found

    def _discovered(self, jobs: Sequence[Job], status: Mapping[str, str]) -> list[Job]:
        """``jobs``; those of which Cromwell tells nothing with what Slurm and the disk show: by the
        name that Cromwell gives its Slurm jobs, and by its folder of the workflow.

        ``status``: Cromwell's, by the jobs' names. Raises Unavailable.
        """
        for job in jobs:
            root, found, rest = job.notes.get("stdout", "").partition(f"/{job.engine_id}/")
            if found and rest == _STDOUT:
                self._root = root
        unknown = {
            job.name: job
            for job in jobs
            if (status[job.name] == "Failed" and "slurm" not in job.notes)
            or (not status[job.name] and job.name not in self._submitted and not job.notes)
        }
        if not unknown or not (self._asks_slurm or self._root):
            return [*jobs]
        names = {slurm_name(job.engine_id): job.name for job in unknown.values()}
        files = {f"{self._root}/{job.engine_id}/{_STDOUT}": job.name for job in unknown.values()}
        result = self._shell.run(
            _DISCOVER,
            ",".join(names if self._asks_slurm else []),
            *((self._here(posixpath.dirname(file)) for file in files) if self._root else ()),
            timeout=60,
            limit=64 << 20,
        )
        answered(result, "squeue", self._shell.where)
        queue, folders = decoded(result.stdout).split(RECORD)
        notes: dict[str, dict[str, str]] = {name: {} for name in unknown}
        for row in rows(queue, QUEUED):
            # Of some jobs that it refuses, Slurm keeps a row.
            refused = row.state in slurm_states.ENDED and not row.placed
            if row.name in names and not refused:
                notes[names[row.name]]["slurm"] = row.id
        there = set(folders.splitlines())
        for file, name in files.items():
            if self._here(posixpath.dirname(file)) in there:
                notes[name] |= {"stdout": file, "stderr": f"{posixpath.dirname(file)}/stderr"}
        return [replace(job, notes={**notes.get(job.name, {}), **job.notes}) for job in jobs]

    def _traces(
        self,
        jobs: Sequence[Job],
        status: Mapping[str, str],
        calls: Mapping[str, Call],
        began: float,
        doubt: str,
    ) -> Mapping[str, Traces]:
        """What Slurm and the disk can add to what Cromwell says of ``jobs``.

        ``began``: when this look did; ``doubt``: why they could not be asked so far.
        """
        open_ = [job for job in jobs if status[job.name] not in _CLEAR]
        queued: Mapping[str, Row] = {}
        blind = False
        try:
            queued = self._queue(open_)
        except Unavailable as error:
            doubt, blind = error.summary, True
        over = [
            job
            for job in open_
            if status[job.name] in ("Failed", "")
            or (self._asks_slurm and not blind and not _alive(queued, job))
        ]
        begun = [job for job in over if "stdout" in job.notes]
        accounted, left, silent = self._evidence(begun)
        # The wait for what is lacking begins when it was asked for first.
        waited = self._waited(
            [
                job.name
                for job in over
                if job.name in self._over_since
                or status[job.name] != "Failed"
                or self._asked.get(job.name, 0.0) >= began
            ]
        )
        return {
            job.name: Traces(
                calls.get(job.name),
                queued.get(job.name),
                accounted.get(job.name),
                left.get(job.name, Left()),
                doubt or silent,
                waited.get(job.name, 0.0),
                blind,
            )
            for job in open_
        }

    def _waited(self, names: Iterable[str]) -> Mapping[str, float]:
        """The seconds since each of these seemed to be over first; the others do not any more."""
        now = time.monotonic()
        self._over_since = {name: self._over_since.get(name, now) for name in names}
        return {name: now - since for name, since in self._over_since.items()}

    def _queue(self, jobs: Sequence[Job]) -> Mapping[str, Row]:
        """Slurm's rows of those jobs whose id there is known, by the jobs' names."""
        owners = {job.notes["slurm"]: job for job in jobs if "slurm" in job.notes}
        ids = [*owners] if self._asks_slurm else []
        found: dict[str, Row] = {}
        for start in range(0, len(ids), ASKED):
            # Twice: one id alone that Slurm has forgotten is an error, of two it leaves it out.
            some = ",".join([ids[start], *ids[start : start + ASKED]])
            result = self._shell.run(_QUEUE, f"--jobs={some}", timeout=60, limit=64 << 20)
            answered(result, "squeue", self._shell.where)
            found |= _owned(rows(decoded(result.stdout), QUEUED), owners)
        return found

    def _evidence(self, jobs: Sequence[Job]) -> _Found:
        """What the accounting and the disk tell of jobs, and why one of them does not."""
        accounted: dict[str, Row] = {}
        left: dict[str, Left] = {}
        doubt = ""
        try:
            for start in range(0, len(jobs), BATCH):
                account, folders, silent = self._batch(jobs[start : start + BATCH])
                accounted |= account
                left |= folders
                doubt = doubt or silent
        except Unavailable as error:
            doubt = error.summary
        return accounted, left, doubt

    def _batch(self, jobs: Sequence[Job]) -> _Found:
        owners = {job.notes["slurm"]: job for job in jobs if "slurm" in job.notes}
        result = self._shell.run(
            _EVIDENCE,
            ",".join(owners if self._asks_slurm else []),
            *(part for job in jobs for part in (job.name, self._folder(job))),
            timeout=60,
            limit=64 << 20,
        )
        answered(result, "the shared disk", self._shell.where)
        account, code, *records = decoded(result.stdout).split(RECORD)
        left = {}
        for record in records[:-1]:
            name, exit_code, owner, why, refusal, errors = (
                part.strip() for part in record.split(FIELD, 5)
            )
            left[name] = Left(Evidence(exit_code, owner, why, errors), refusal)
        if code == "0" or NO_ACCOUNTING in account.lower():
            return _owned(rows(account, ACCOUNTED), owners), left, ""
        return {}, left, "the accounting does not answer"

    # --- logs, remove, test, check ---

    def logs(self, job: Job, tail: int) -> str:
        if "stdout" not in job.notes and not job.state.final:
            return ""  # the watch notes it as soon as it is there
        if "stdout" not in job.notes:
            call = self._server.call(job.engine_id)
            job = self._discovered([job], {job.name: ""})[0] if call is None else _noted(job, call)
            if "stdout" not in job.notes and call is None:
                raise Unavailable(f"Cromwell has forgotten {job.jid}, and where its log is")
        if "stdout" not in job.notes:
            return ""
        files = [self._here(job.notes.get(name, "")) for name in ("stdout", "stderr")]
        each = str(LOG_BYTES // 2 - 1)  # and the end of a line, if its last has none
        result = self._shell.run(_LOGS, *files, str(tail), each, timeout=20, limit=LOG_BYTES)
        if result.code:
            raise Unavailable(f"the log can't be read: {reason(result.stderr)}")
        return result.stdout.decode(errors="replace")

    def remove(self, jobs: Sequence[Job]) -> Mapping[str, str]:
        sent = self._sent([job for job in jobs if not job.state.final])
        if not sent:
            return {}
        flows = self._server.workflows([job.engine_id for job in sent])
        stay: dict[str, str] = {}
        until = time.monotonic() + ROUND_SECONDS
        for job in sent:
            # What is not shown may be new, and can be aborted all the same.
            if _status(flows.get(job.engine_id)) not in FINAL:
                late = time.monotonic() > until
                if why := "Cromwell is too slow" if late else self._abort(job):
                    stay[job.name] = why
        gone = [job for job in sent if job.name not in stay]
        return {**stay, **(self._cancel(gone) if self._asks_slurm else {})}

    def _abort(self, job: Job) -> str:
        """Why it has not ended then; empty: it has."""
        try:
            status = self._server.abort(job.engine_id)
        except Unavailable as error:  # it may be about this one alone
            return str(error)
        return "Cromwell is aborting it" if status and status not in FINAL else ""

    def _sent(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of ``jobs`` that Cromwell may have, each with its workflow's id."""
        doubtful = [job for job in jobs if not job.engine_id]
        if not doubtful:
            return [*jobs]
        if self._server.takes_ids:
            ids: Mapping[str, str] = {job.name: workflow_id(job.name) for job in doubtful}
        else:
            ids = self.find(doubtful)
        known = [replace(job, engine_id=job.engine_id or ids.get(job.name, "")) for job in jobs]
        return [job for job in known if job.engine_id]

    def _cancel(self, jobs: Sequence[Job]) -> Mapping[str, str]:
        """Some set-ups of Cromwell call a workflow aborted whose Slurm job runs on, and a Cromwell
        that has forgotten it aborts nothing: end what is left on Slurm."""
        stay: dict[str, str] = {}
        told: list[Job] = []
        for job in jobs:
            try:
                known = "slurm" in job.notes
                told.append(job if known else _noted(job, self._server.call(job.engine_id)))
            except Unavailable as error:  # it may be about this one alone
                stay[job.name] = str(error)
        noted = {job.name: job for job in self._discovered(told, dict.fromkeys(_names(told), ""))}
        queued = self._queue([*noted.values()])
        alive = [name for name, row in queued.items() if row.state not in slurm_states.ENDED]
        if alive:
            ids = {name: noted[name].notes["slurm"] for name in alive}
            result = self._shell.run(_CANCEL, " ".join(ids.values()), timeout=60)
            why = f": {reason(result.stderr)}" if result.code else ""
            for name, number in ids.items():
                stay[name] = f"Slurm's job {number} has not ended yet{why}"
        return stay

    def test(self, jobs: Sequence[Job]) -> Mapping[str, Verdict]:
        return {job.name: _verdict(self._server.describe(job.document.text)) for job in jobs}

    def check(self) -> Iterable[Finding]:
        return self._check()

    # --- paths ---

    def _folder(self, job: Job) -> str:
        """Cromwell's folder of the job, where stdout, stderr and rc lie."""
        return self._here(posixpath.dirname(job.notes.get("stdout", "")))

    def _here(self, path: str) -> str:
        """A path of Cromwell's as it is behind the shell: by the longest beginning that fits."""
        fits = [theirs for theirs in self._paths if f"{path}/".startswith(f"{theirs.rstrip('/')}/")]
        if not fits:
            return path
        theirs = max(fits, key=len)
        return self._paths[theirs].rstrip("/") + path.removeprefix(theirs.rstrip("/"))


def workflow_id(name: str) -> str:
    """The id of the workflow of the job of this name; the name is used once, and so is the id."""
    return str(uuid.uuid5(_IDS, name))


def slurm_name(workflow: str) -> str:
    """The name that Cromwell gives to the Slurm job of a workflow, unless a site's configuration
    gives another."""
    return f"cromwell_{workflow[:8]}_plugin_instance"


def _owned(found: Iterable[Row], owners: Mapping[str, Job]) -> dict[str, Row]:
    """Rows by the names of the jobs whose they are. A Slurm that begins anew gives ids again: a row
    that has the name of another workflow is another job's."""
    return {
        owners[row.id].name: row
        for row in found
        if row.id in owners
        and (
            not re.fullmatch(r"cromwell_[0-9a-f]{8}_.*", row.name)
            or row.name[9:17] == owners[row.id].engine_id[:8]
        )
    }


def _names(jobs: Iterable[Job]) -> list[str]:
    return [job.name for job in jobs]


def _noted(job: Job, call: Call | None) -> Job:
    """``job`` with what the metadata told."""
    if call is None:
        return job
    number = call.job_id if re.fullmatch(r"[0-9]{1,10}", call.job_id) else ""
    told = {"slurm": number, "stdout": call.stdout, "stderr": call.stderr}
    return replace(job, notes={**job.notes, **{key: text for key, text in told.items() if text}})


def _status(flow: Workflow | None) -> str:
    return flow.status if flow else ""


_CLEAR = frozenset({*states.WAITING, "Succeeded"})
"""The statuses of Cromwell to which nobody can add anything."""


def _alive(queued: Mapping[str, Row], job: Job) -> bool:
    row = queued.get(job.name)
    return row is not None and row.state not in slurm_states.ENDED


def _forwards(job: Job, found: Observation) -> Observation:
    """A state never goes back, as when Slurm queues a job again."""
    if job.state is JobState.RUNNING and found.state is JobState.QUEUED:
        return replace(found, state=JobState.RUNNING)
    return found


def _verdict(errors: Sequence[str]) -> Verdict:
    if errors:
        return Verdict(False, f"Cromwell's parser says: {'; '.join(errors)}")
    return Verdict(True, "Cromwell's parser takes it; what Slurm says is known at submission only")
