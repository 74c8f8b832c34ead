"""What the emulated Cromwell does with a workflow: launch, submit, poll, abort. See cromwell.py."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import WDL

from tests.lab.cromwell_config import BadAttribute, Configuration, Values, instantiate
from tests.lab.slurm import SlurmLab

TICK = 0.05  # s
THREADS = 4  # calls of sbatch, squeue and scancel at a time
COMMAND_SECONDS = 60  # the longest that one of them may take
DOCKER_ROOT = "/cromwell-executions"

FINAL = ("Succeeded", "Failed", "Aborted")
ABORT_CODES = (130, 137, 143)
EXTERNALLY_KILLED = 79  # the code that Cromwell writes for a job that left none

TERMINATED = (
    "The compute backend terminated the job. If this termination is unexpected, examine likely"
    " causes such as preemption, running out of disk or memory on the compute instance, or"
    " exceeding the backend's maximum job duration."
)

# What the job runs, in the order in which Cromwell replaces the words in capitals. It does so one
# after the other, so a command that holds a later word is changed as well.
JOB_SCRIPT = """\
#!{shell}
DOCKER_OUTPUT_DIR_LINK
cd {folder}/execution
tmpDir=$(mktemp -d "{folder}/tmp.XXXXXX")
chmod 777 "$tmpDir"
export _JAVA_OPTIONS=-Djava.io.tmpdir="$tmpDir"
export TMPDIR="$tmpDir"
export HOME="{folder}"
(
cd {folder}/execution
SCRIPT_PREAMBLE
)
out_pipe="$tmpDir/out.$$" err_pipe="$tmpDir/err.$$"
mkfifo "$out_pipe" "$err_pipe"
trap 'rm "$out_pipe" "$err_pipe"' EXIT
tee '{folder}/execution/stdout' < "$out_pipe" &
tee '{folder}/execution/stderr' < "$err_pipe" >&2 &
(
cd {folder}/execution
ENVIRONMENT_VARIABLES
INSTANTIATED_COMMAND
) > "$out_pipe" 2> "$err_pipe"
echo $? > {folder}/execution/rc.tmp
(
cd {folder}/execution
find . -type d -empty -exec touch '{{}}/.file' ';'
)
(
cd {folder}/execution
SCRIPT_EPILOGUE
)
mv {folder}/execution/rc.tmp {folder}/execution/rc
"""


class Refused(Exception):
    """What a request asks for can't be done; the text goes to who asked."""


def failure(message: str, *causes: Any) -> dict[str, Any]:
    return {"causedBy": list(causes), "message": message}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class Pace:
    """How fast things happen, in seconds."""

    visible_after: float
    poll_rate: float
    launch_count: int
    exit_code_timeout: float
    abort_scan: float = 0.5  # the real one: up to 30


@dataclass
class Call:
    """One attempt of one call: what metadata shows of it, and what its script needs."""

    name: str
    folder: Path
    attributes: Values
    shown: dict[str, Any]
    check_at: float = 0.0
    dead: bool = False
    killed: bool = False

    @property
    def execution(self) -> Path:
        return self.folder / "execution"

    @property
    def rc(self) -> Path:
        return self.execution / "rc"


@dataclass
class Workflow:
    """One submission."""

    id: str
    parts: Mapping[str, str]
    labels: dict[str, str]
    status: str
    visible_at: float
    shown: dict[str, Any] = field(default_factory=dict)
    call: Call | None = None
    accepted: dict[str, WDL.Value.Base] = field(default_factory=dict)
    task: Future[None] | None = None  # what a thread does for it right now

    @property
    def busy(self) -> bool:
        return self.task is not None and not self.task.done()


class Engine:
    """Workflows in memory, and threads that run them from `start` to `stop`."""

    def __init__(self, lab: SlurmLab, config: Configuration, root: Path, pace: Pace) -> None:
        self.lab, self.config, self.root, self.pace = lab, config, root, pace
        self.lock = threading.RLock()
        self.workflows: dict[str, Workflow] = {}
        self.errors: list[BaseException] = []  # of the emulator itself
        owner = lab.storebase.stat()
        self._owner = (owner.st_uid, owner.st_gid)

    # --- life ---

    def start(self) -> None:
        """Begin, or go on with the workflows that are known."""
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="cromwell-job")
        for workflow in self.workflows.values():
            if workflow.status not in FINAL and workflow.call and "jobId" in workflow.call.shown:
                self._spawn(workflow, self._reconnect)
        self._thread = threading.Thread(target=self._run, name="cromwell-engine")
        self._thread.start()

    def stop(self) -> None:
        """Return when no thread is left. Slurm jobs go on."""
        self._stopping.set()
        self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        launch_at = time.monotonic() + self.pace.poll_rate
        scan_at = 0.0
        while not self._stopping.wait(TICK):
            try:
                clock = time.monotonic()
                with self.lock:
                    if clock >= launch_at:
                        self._launch()
                        launch_at = clock + self.pace.poll_rate
                    scan = clock >= scan_at
                    if scan:
                        scan_at = clock + self.pace.abort_scan
                    for workflow in self.workflows.values():
                        if workflow.status not in FINAL and workflow.call and not workflow.busy:
                            self._look(workflow, workflow.call, clock, scan)
            except Exception as error:  # the tests ask for these at the end
                self.errors.append(error)

    def _spawn(self, workflow: Workflow, work: Callable[[Workflow], None]) -> None:
        def do() -> None:
            try:
                work(workflow)
            except Exception as error:
                self.errors.append(error)
                self._end(workflow, "Failed", failure(f"the emulator failed: {error!r}"))

        workflow.task = self._pool.submit(do)

    # --- what requests do ---

    def submit(
        self, parts: Mapping[str, str], labels: dict[str, str], wanted: str | None
    ) -> Workflow:
        with self.lock:
            if wanted in self.workflows:
                raise Refused(f"Requested workflow IDs are already in use: {wanted}")
            workflow = Workflow(
                id=wanted or str(uuid.uuid4()),
                parts=parts,
                labels=labels,
                status="On Hold" if parts.get("workflowOnHold") == "true" else "Submitted",
                visible_at=time.monotonic() + self.pace.visible_after,
                shown={"submission": now()},
            )
            workflow.labels["cromwell-workflow-id"] = f"cromwell-{workflow.id}"
            self.workflows[workflow.id] = workflow
            return workflow

    def abort(self, id: str) -> str:
        """The status that the answer tells."""
        with self.lock:
            workflow = self.workflows.get(id)
            if workflow is None or workflow.status in FINAL:
                raise Refused(
                    f"Couldn't abort {id} because no workflow with that ID is in progress"
                )
            if workflow.status in ("Submitted", "On Hold"):
                self._end(workflow, "Aborted")
            else:
                workflow.status = "Aborting"
            return workflow.status

    def visible(self, id: str) -> Workflow | None:
        """A workflow that reads know already."""
        workflow = self.workflows.get(id)
        return workflow if workflow and time.monotonic() >= workflow.visible_at else None

    # --- launching ---

    def _launch(self) -> None:
        active = sum(w.status in ("Running", "Aborting") for w in self.workflows.values())
        room = min(self.pace.launch_count, self.config.job_limit - active)
        waiting = [w for w in self.workflows.values() if w.status == "Submitted"]
        for workflow in waiting[: max(room, 0)]:
            workflow.status = "Running"
            workflow.shown["start"] = now()
            self._spawn(workflow, self._begin)

    def _begin(self, workflow: Workflow) -> None:
        try:
            document = WDL.parse_document(workflow.parts["workflowSource"])
            document.typecheck()
            workflow_name, name, task = _only_call(document)
        except (WDL.Error.SyntaxError, WDL.Error.ValidationError, ValueError) as error:
            words = failure("Workflow input processing failed", failure(str(error)))
            self._end(workflow, "Failed", words)
            return
        except WDL.Error.MultipleValidationErrors as errors:
            causes = [failure(str(error)) for error in errors.exceptions]
            self._end(workflow, "Failed", failure("Workflow input processing failed", *causes))
            return
        library = WDL.StdLib.Base(document.effective_wdl_version)
        nothing: WDL.Env.Bindings[WDL.Value.Base] = WDL.Env.Bindings()
        runtime = {key: value.eval(nothing, library) for key, value in task.runtime.items()}
        try:
            attributes = self.config.attributes(task.name, runtime)
        except BadAttribute as error:
            causes = [failure("Runtime validation failed", failure(str(error)))]
            self._end(workflow, "Failed", failure("Workflow failed", *causes))
            return
        folder = self.root / workflow_name / workflow.id / f"call-{task.name}"
        call = Call(
            name=f"{workflow_name}.{name}",
            folder=folder,
            attributes=attributes,
            shown={
                "attempt": 1,
                "shardIndex": -1,
                "backend": self.config.backend_name,
                "executionStatus": "Running",
                "start": now(),
                "callRoot": str(folder),
                "stdout": str(folder / "execution/stdout"),
                "stderr": str(folder / "execution/stderr"),
                "runtimeAttributes": {
                    key: str(value.value)
                    for key, value in runtime.items()
                    if key in attributes or key in ("memory", *STANDARD)
                },
                "callCaching": {
                    "allowResultReuse": False,
                    "effectiveCallCachingMode": "CallCachingOff",
                },
                "inputs": {},
            },
        )
        workflow.accepted = {key: runtime[key] for key in STANDARD if key in runtime}
        with self.lock:
            workflow.shown["workflowName"] = workflow_name
            workflow.shown["workflowRoot"] = str(folder.parent)
            workflow.call = call
        command = instantiate(task, nothing, document.effective_wdl_version)
        self._submit(workflow, call, command)

    def _submit(self, workflow: Workflow, call: Call, command: str) -> None:
        self._make_folders(call)
        with_docker = call.attributes["docker"].value is not None
        inside = (
            f"{DOCKER_ROOT}/{call.folder.relative_to(self.root)}" if with_docker else call.folder
        )
        script = JOB_SCRIPT.format(shell=self.config.job_shell, folder=inside)
        for word, text in (
            ("SCRIPT_PREAMBLE", ""),
            ("ENVIRONMENT_VARIABLES", ""),
            ("INSTANTIATED_COMMAND", command),
            ("SCRIPT_EPILOGUE", self.config.epilogue),
            ("DOCKER_OUTPUT_DIR_LINK", ""),
        ):
            script = script.replace(word, text)
        (call.execution / "script").write_text(script)
        code, printed, stderr = self._command(
            call,
            "submit",
            "submit-docker" if with_docker else "submit",
            job_name=f"cromwell_{workflow.id[:8]}_{call.name.partition('.')[2]}",
            cwd=str(call.folder),
            out=str(call.execution / "stdout"),
            err=str(call.execution / "stderr"),
            script=str(call.execution / "script"),
            job_shell=self.config.job_shell,
            job_id="",
            docker_cwd=str(inside),
            docker_out=f"{inside}/execution/stdout",
            docker_err=f"{inside}/execution/stderr",
            docker_script=f"{inside}/execution/script",
            docker_cid=str(call.execution / "docker_cid"),
        )
        job = None if code else self.config.job_id(printed)
        if job is None:
            words = "Unable to start job." if code else "Could not find job ID from stdout file."
            hint = f"{words} Check the stderr file for possible errors: {stderr}"
            self._end_call(workflow, call, "Failed", failure(hint))
            return
        with self.lock:
            call.shown |= {"jobId": job, "backendStatus": "Running"}
            call.check_at = time.monotonic() + self.pace.exit_code_timeout

    def _make_folders(self, call: Call) -> None:
        """The call's folders: everybody may write there, as with every task that has an image."""
        call.execution.mkdir(parents=True)
        for folder in (call.execution, *call.execution.parents):
            if folder == self.root.parent:
                break
            os.chown(folder, *self._owner)
        for folder in (call.folder, call.execution):
            folder.chmod(0o777)

    def _command(self, call: Call, suffix: str, name: str, **values: str) -> tuple[int, str, Path]:
        """Run one of the texts on the login node: its exit code, stdout, and file of stderr."""
        script = call.execution / f"script.{suffix}"
        submitting = name.startswith("submit")
        script.write_text(
            self.config.script(name, {**values, **(call.attributes if submitting else {})})
        )
        os.chown(script, *self._owner)  # so plugins, which run as the same account, may write it
        done = self.lab.run(
            "/bin/bash", str(script), user=self.lab.user, check=False, timeout=COMMAND_SECONDS
        )
        stderr = call.execution / f"stderr.{suffix}"
        (call.execution / f"stdout.{suffix}").write_text(done.stdout)
        stderr.write_text(done.stderr)
        return done.returncode, done.stdout, stderr

    # --- jobs that were submitted ---

    def _look(self, workflow: Workflow, call: Call, clock: float, scan: bool) -> None:
        if "jobId" not in call.shown:
            return
        if call.rc.exists() and not (workflow.status == "Aborting" and not call.killed):
            self._finish(workflow, call)
        elif workflow.status == "Aborting":
            if scan and not call.killed:
                self._spawn(workflow, self._kill)
        elif clock >= call.check_at and call.dead:
            _write_rc(call, EXTERNALLY_KILLED)
            self._finish(workflow, call, "Failed")
        elif clock >= call.check_at:
            self._spawn(workflow, self._check)

    def _alive(self, call: Call) -> bool:
        code, _, _ = self._command(call, "check", "check-alive", job_id=call.shown["jobId"])
        return code == 0

    def _check(self, workflow: Workflow) -> None:
        call = workflow.call
        assert call
        alive = self._alive(call)
        with self.lock:
            call.dead = not alive
            call.shown["backendStatus"] = "Running" if alive else "WaitingForReturnCode"
            call.check_at = time.monotonic() + self.pace.exit_code_timeout

    def _reconnect(self, workflow: Workflow) -> None:
        """After a restart: go on with a job that is alive or has ended with an exit code."""
        call = workflow.call
        assert call
        if not self._alive(call) and not call.rc.exists():
            job = call.shown["jobId"]
            words = f"Unable to determine that {job} is alive, and {call.rc} does not exist."
            self._end_call(workflow, call, "Failed", failure(words))

    def _kill(self, workflow: Workflow) -> None:
        call = workflow.call
        assert call
        _write_rc(call, 143)
        with_docker = call.attributes["docker"].value is not None
        extra = {"docker_cid": str(call.execution / "docker_cid")} if with_docker else {}
        name = "kill-docker" if with_docker else "kill"
        self._command(call, "kill", name, job_id=call.shown["jobId"], **extra)
        call.killed = True

    def _finish(self, workflow: Workflow, call: Call, backend_status: str = "Done") -> None:
        """The exit code's file is there."""
        words = call.rc.read_text()
        job = f"{call.name}:NA:1"
        call.shown["backendStatus"] = backend_status
        try:
            code = int(words)
        except ValueError:
            shown = f"exited with return code {words} which couldn't be converted to an Integer."
            text = (
                f"Job {job} {shown}" if words else f"The return code file for job {job} was empty."
            )
            self._end_call(workflow, call, "Failed", failure(text))
            return
        if _true(workflow, "failOnStderr") and (
            length := (call.execution / "stderr").stat().st_size
        ):
            call.shown["returnCode"] = code
            text = (
                f"stderr for job {job} has length {length} and"
                " 'failOnStderr' runtime attribute was true."
            )
            self._end_call(workflow, call, "Failed", failure(text))
        elif code in ABORT_CODES and workflow.status == "Aborting":
            self._end_call(workflow, call, "Aborted")
        elif code in ABORT_CODES:
            self._end_call(workflow, call, "Failed", failure(TERMINATED))
        elif _continues(workflow, code):
            call.shown |= {"returnCode": code, "outputs": {}}
            self._end_call(workflow, call, "Done")
        else:
            call.shown["returnCode"] = code
            text = (
                f"Job {job} exited with return code {code} which has not been declared as a valid"
                " return code. See 'continueOnReturnCode' runtime attribute for more details."
            )
            self._end_call(workflow, call, "Failed", failure(text))

    # --- ends ---

    def _end_call(self, workflow: Workflow, call: Call, status: str, *failures: Any) -> None:
        with self.lock:
            call.shown |= {"executionStatus": status, "end": now()}
            if failures:
                call.shown |= {"failures": list(failures), "retryableFailure": False}
            if workflow.status == "Aborting":
                self._end(workflow, "Aborted")
            elif failures:
                self._end(workflow, "Failed", failure("Workflow failed", *failures))
            else:
                self._end(workflow, "Succeeded")

    def _end(self, workflow: Workflow, status: str, *failures: Any) -> None:
        with self.lock:
            workflow.shown["end"] = now()
            if failures:
                workflow.shown["failures"] = list(failures)
            workflow.status = status


STANDARD = ("failOnStderr", "continueOnReturnCode", "maxRetries")


def _only_call(document: WDL.Tree.Document) -> tuple[str, str, WDL.Tree.Task]:
    """A workflow of one call without inputs: its name, the call's name, and the called task."""
    if document.workflow is None:
        raise ValueError("Namespace contains no workflow")
    match document.workflow.body:
        case [WDL.Tree.Call(callee=WDL.Tree.Task() as task) as call] if not call.inputs:
            return document.workflow.name, call.name, task
    raise ValueError("this emulator runs workflows of one call without inputs")


def _write_rc(call: Call, code: int) -> None:
    """Leave an exit code unless there is one."""
    new = call.execution / "rc.kill"
    new.write_text(f"{code}\n")
    with contextlib.suppress(FileExistsError):
        os.link(new, call.rc)
    new.unlink()


def _true(workflow: Workflow, name: str) -> bool:
    value = workflow.accepted.get(name)
    return value is not None and str(value.value).lower() == "true"


def _continues(workflow: Workflow, code: int) -> bool:
    """Whether a job with this exit code has succeeded."""
    value = workflow.accepted.get("continueOnReturnCode")
    if value is None:
        return code == 0
    if isinstance(value, WDL.Value.Boolean):
        return value.value or code == 0
    items = value.value if isinstance(value, WDL.Value.Array) else [value]
    return code in [int(item.value) for item in items]
