"""An emulator of Cromwell, because Cromwell itself can't be had here.

It is not Cromwell: it was written from what was read in Cromwell's sources (develop, "93", commit
c805f3c5, and older versions where those were to be had), its documentation and its issues. What it
answers over HTTP, and how the files of a job come about, follows those. How fast it is does not.

What is real: the configuration that it reads is docs/examples/cromwell-slurm.conf. The texts
submit, submit-docker, check-alive and kill-docker of that file are evaluated by miniwdl and run on
the lab's login node as the lab's user, so every job is one of the lab's Slurm. Workflows are
parsed, checked and evaluated by miniwdl; they have one call without inputs.

The facts, in short:
- A workflow is not looked at when it is submitted; a bad one ends as Failed.
- Until it is visible, every read of a workflow is a 404, and a query does not list it.
- Values of runtime attributes are pasted into the texts as they are.
- A job has ended when the file `rc` is there. 130, 137 and 143 mean that it was aborted.
- Of a job that has not ended, check-alive is asked every exit-code-timeout-seconds; one that is
  dead and leaves no `rc` for as long again gets 79.
- After a restart a job whose check-alive says no and that left no `rc` has failed.
- An abort writes 143 into `rc` unless there is one, then runs the kill text.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

import WDL

from tests.lab.cromwell_config import EXAMPLE, Configuration
from tests.lab.cromwell_engine import Engine, Pace, Refused, Workflow
from tests.lab.slurm import SlurmLab

STATUSES = ("On Hold", "Submitted", "Running", "Aborting", "Aborted", "Succeeded", "Failed")
PARTS = {
    "workflowSource",
    "workflowInputs",
    "workflowOptions",
    "labels",
    "workflowType",
    "workflowTypeVersion",
    "workflowOnHold",
}
SINCE_75 = "requestedWorkflowId"
QUERY_KEYS = {
    "page",
    "pageSize",
    "id",
    "label",
    "labelor",
    "status",
    "name",
    "additionalQueryResultFields",
}
HANG_SECONDS = 300  # the longest that a request waits for a fault to end


@dataclass(frozen=True)
class Fault:
    """What every request meets while it is set, or each of the one kind `only`."""

    status: int = 500
    body: str = "Internal server error"
    type: str = "text/plain; charset=UTF-8"
    hang: bool = False  # no answer until the fault is taken away
    lose: bool = False  # the request is carried out, the line is lost before the answer
    only: tuple[str, str] | None = None  # method and path

    def meets(self, method: str, path: str) -> bool:
        return self.only in (None, (method, path))


class CromwellLab:
    """A Cromwell on a lab's login node, from `start()` to `stop()`, or as a context manager.

    - `version`: what it says it is; below 75 it does not know `requestedWorkflowId`.
    - `visible_after`: seconds until reads know a new workflow (the real one: up to 6).
    - `poll_rate`, `launch_count`, `exit_code_timeout`: instead of the configuration's values.
    """

    def __init__(
        self,
        lab: SlurmLab,
        *,
        version: str = "92-abc1234",
        visible_after: float = 1,
        poll_rate: float | None = None,
        launch_count: int | None = None,
        exit_code_timeout: float | None = None,
        configuration: Path = EXAMPLE,
    ) -> None:
        self.version = version
        self.fault: Fault | None = None
        self.root = lab.storebase / "cromwell-executions"
        self._lab = lab
        self._config = Configuration(configuration)
        self._pace = Pace(
            visible_after=visible_after,
            poll_rate=self._config.poll_rate if poll_rate is None else poll_rate,
            launch_count=launch_count or self._config.launch_count,
            exit_code_timeout=exit_code_timeout or self._config.exit_code_timeout,
        )
        self._calls: list[tuple[str, str]] = []
        self._port = 0
        self._server: Server | None = None
        self.engine = self._new_engine()

    # --- life ---

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        if error is None and self.engine.errors:
            raise self.engine.errors[0]

    def start(self) -> None:
        """Listen, on the same port as before, and go on with the workflows that are known."""
        self._server = Server(self, self._port)
        self._port = self._server.server_address[1]
        self.engine.start()

    def stop(self) -> None:
        """End every connection and thread. Slurm jobs go on."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self.engine.stop()

    def restart(self, *, empty: bool) -> None:
        """Stop and start; `empty` as with the default database, which is in memory."""
        self.stop()
        if empty:
            self.engine = self._new_engine()
        self.start()

    def _new_engine(self) -> Engine:
        return Engine(self._lab, self._config, self.root, self._pace)

    # --- what a test needs to know ---

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def calls(self) -> list[tuple[str, str]]:
        """The requests so far, oldest first: method, and path with its query."""
        return list(self._calls)

    def clear_calls(self) -> None:
        self._calls.clear()

    def received(self, method: str, path: str) -> None:
        self._calls.append((method, path))


class Server(ThreadingHTTPServer):
    """Serves in threads; `close` also ends the connections that clients keep open."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, cromwell: CromwellLab, port: int) -> None:
        self.cromwell = cromwell
        self.stopping = threading.Event()
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.05,), name="cromwell-server"
        )
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or a connection that `close` ended, is no news."""

    def close(self) -> None:
        self.stopping.set()
        self.shutdown()
        self._thread.join()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it has just ended
        self.server_close()


class Answer(Exception):
    """An answer to a request, good or bad."""

    def __init__(self, status: int, body: Any, type: str = "application/json") -> None:
        super().__init__(status, body)
        self.status = status
        self.type = type
        self.body = body if isinstance(body, str) else json.dumps(body, indent=2)


def failed(status: int, message: str, word: str = "fail") -> Answer:
    return Answer(status, {"status": word, "message": message})


def rejected(status: int, message: str) -> Answer:
    """What the web framework answers for requests that reach no part of Cromwell."""
    return Answer(status, message, "text/plain; charset=UTF-8")


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `CromwellLab.calls` has the requests."""

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _answer(self) -> None:
        cromwell = self.server.cromwell
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        cromwell.received(self.command, self.path)
        fault = cromwell.fault
        if fault and not fault.meets(self.command, self.path):
            fault = None
        if fault and fault.hang:
            end = time.monotonic() + HANG_SECONDS
            while cromwell.fault is fault and time.monotonic() < end:
                if self.server.stopping.wait(0.05):
                    break
            fault = None
        if fault and not fault.lose:
            answer = Answer(fault.status, fault.body, fault.type)
        else:
            try:
                answer = self._route(
                    Request(cromwell, self.command, self.path, dict(self.headers), body)
                )
            except Answer as raised:
                answer = raised
            except Refused as refused:
                answer = failed(400, str(refused))
        if fault and fault.lose:
            self.close_connection = True
            return
        content = answer.body.encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _route(self, request: Request) -> Answer:
        allowed = []
        for method, pattern, work in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and method == request.method:
                return work(request, *match.groups())
            if match:
                allowed.append(method)
        if allowed:
            words = f"HTTP method not allowed, supported methods: {', '.join(allowed)}"
            return rejected(405, words)
        return rejected(404, "The requested resource could not be found.")


@dataclass(frozen=True)
class Request:
    """One request, read but not understood."""

    cromwell: CromwellLab
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> list[tuple[str, str]]:
        return parse_qsl(urlsplit(self.target).query, keep_blank_values=True)

    @property
    def engine(self) -> Engine:
        return self.cromwell.engine

    def parts(self) -> dict[str, str]:
        """The parts of a multipart body by their names."""
        kind = next((v for k, v in self.headers.items() if k.lower() == "content-type"), "")
        match = re.search(r'boundary="?([^";]+)', kind)
        if not kind.startswith("multipart/form-data") or not match:
            words = "The request's Content-Type is not supported. Expected:\nmultipart/form-data"
            raise rejected(415, words)
        found = {}
        for piece in (b"\r\n" + self.body).split(b"\r\n--" + match[1].encode())[1:-1]:
            head, _, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
            name = re.search(rb'name="([^"]*)"', head)
            if name:
                found[name[1].decode()] = content.decode()
        return found

    def workflow(self, id: str) -> Workflow:
        """The workflow that a path names."""
        checked_id(id)
        found = self.engine.visible(id)
        if found is None:
            raise failed(404, f"Unrecognized workflow ID: {id}")
        return found


def checked_id(id: str) -> str:
    try:
        return str(uuid.UUID(id))
    except ValueError:
        raise failed(400, f"Invalid workflow ID: '{id}'.") from None


# --- the calls ---


def submit(request: Request) -> Answer:
    parts = request.parts()
    known = PARTS | ({SINCE_75} if int(request.cromwell.version.split("-")[0]) >= 75 else set())
    problems = [f"Unexpected body part name: {name}" for name in parts if name not in known]
    if "workflowSource" not in parts:
        problems.append("workflowSource needs to be supplied")
    for name, words in (
        ("workflowInputs", "Input file is not valid yaml nor json"),
        ("workflowOptions", "Invalid workflow options provided"),
        ("labels", "Workflow contains invalid labels JSON"),
    ):
        try:
            if not isinstance(json.loads(parts.get(name, "{}")), dict):
                problems.append(f"{words}: not an object")
        except ValueError as error:
            problems.append(f"{words}: {error}")
    if problems:
        raise failed(400, "Error(s): " + "\n".join(problems))
    labels = json.loads(parts.get("labels", "{}"))
    for key, value in labels.items():
        if not isinstance(value, str):
            problems.append(f"Invalid label {key}: {value} : Labels must be strings.")
        elif not 1 <= len(key) <= 255 or len(value) > 255:
            problems.append(f"Invalid label: `{key}: {value}`: 1 to 255 and 0 to 255 characters.")
    wanted = None
    if SINCE_75 in parts:
        try:
            wanted = str(uuid.UUID(json.loads(parts[SINCE_75])))
        except (ValueError, AttributeError, TypeError):
            problems.append(f"Invalid workflow ID: {parts[SINCE_75]}")
    if problems:
        raise failed(400, "Error(s): " + "\n".join(problems))
    workflow = request.engine.submit(parts, labels, wanted)
    on_hold = parts.get("workflowOnHold") == "true"
    return Answer(201, {"id": workflow.id, "status": "On Hold" if on_hold else "Submitted"})


def abort(request: Request, id: str) -> Answer:
    try:
        status = request.engine.abort(checked_id(id))
    except Refused as refused:
        raise failed(404, str(refused), "error") from None
    return Answer(200, {"id": id, "status": status})


def query_by_url(request: Request) -> Answer:
    return query(request, request.query)


def query_by_body(request: Request) -> Answer:
    try:
        pairs = [pair for item in json.loads(request.body) for pair in item.items()]
    except (ValueError, TypeError, AttributeError):
        words = "The request content was malformed:\nExpected List as JsArray"
        raise rejected(400, words) from None
    return query(request, pairs)


def query(request: Request, pairs: Sequence[tuple[str, str]]) -> Answer:
    wanted: dict[str, list[str]] = {}
    for key, value in pairs:
        wanted.setdefault(key, []).append(value)
    problems = [f"Unrecognized query keys: {key}" for key in wanted if key not in QUERY_KEYS]
    problems += [f"Unrecognized status: {s}" for s in wanted.get("status", ()) if s not in STATUSES]
    labels = [*wanted.get("label", ()), *wanted.get("labelor", ())]
    problems += [f"Invalid label: {label}: key:value" for label in labels if ":" not in label]
    if problems:
        raise failed(400, "\n".join(problems))
    for id in wanted.get("id", ()):
        checked_id(id)
    with_labels = "labels" in wanted.get("additionalQueryResultFields", ())

    def fits(workflow: Workflow) -> bool:
        have = {f"{key}:{value}" for key, value in workflow.labels.items()}
        return (
            ("id" not in wanted or workflow.id in wanted["id"])
            and ("status" not in wanted or workflow.status in wanted["status"])
            and ("name" not in wanted or workflow.shown.get("workflowName") in wanted["name"])
            and set(wanted.get("label", ())) <= have
            and ("labelor" not in wanted or bool(set(wanted["labelor"]) & have))
        )

    with request.engine.lock:
        known = [w for w in request.engine.workflows.values() if request.engine.visible(w.id)]
        results = [summary(w, with_labels) for w in reversed(known) if fits(w)]
    return Answer(200, {"results": results, "totalResultsCount": len(results)})


def summary(workflow: Workflow, with_labels: bool) -> dict[str, Any]:
    shown = {"id": workflow.id, "status": workflow.status, "metadataArchiveStatus": "Unarchived"}
    names = {"name": "workflowName", "submission": "submission", "start": "start", "end": "end"}
    shown |= {key: workflow.shown[name] for key, name in names.items() if name in workflow.shown}
    return shown | ({"labels": workflow.labels} if with_labels else {})


def status(request: Request, id: str) -> Answer:
    return Answer(200, {"id": id, "status": request.workflow(id).status})


def metadata(request: Request, id: str) -> Answer:
    workflow = request.workflow(id)
    include = [value for key, value in request.query if key == "includeKey"]
    exclude = [value for key, value in request.query if key == "excludeKey"]

    def kept(values: Mapping[str, Any], always: Sequence[str] = ()) -> dict[str, Any]:
        return {
            key: value
            for key, value in values.items()
            if key in always
            or (
                (not include or key.startswith(tuple(include)))
                and not (exclude and key.startswith(tuple(exclude)))
            )
        }

    with request.engine.lock:
        whole = {
            "status": workflow.status,
            "labels": workflow.labels,
            "inputs": {},
            "outputs": {},
            "metadataSource": "Unarchived",
            "submittedFiles": dict(workflow.parts),
            **workflow.shown,
        }
        call = workflow.call
        shown = kept(call.shown, ("attempt", "shardIndex")) if call else {}
        calls = {call.name: [shown]} if call and len(shown) > 2 else {}
        body = {
            "id": workflow.id,
            **kept(whole),
            **({"calls": calls} if calls or not include else {}),
        }
        return Answer(200, body)


def logs(request: Request, id: str) -> Answer:
    call = request.workflow(id).call
    names = ("stdout", "stderr", "attempt", "shardIndex")
    shown = {call.name: [{name: call.shown[name] for name in names}]} if call else {}
    return Answer(200, {"id": id, "calls": shown})


def labels(request: Request, id: str) -> Answer:
    return Answer(200, {"id": id, "labels": request.workflow(id).labels})


def describe(request: Request) -> Answer:
    source = request.parts().get("workflowSource")
    if source is None:
        raise failed(400, "Error(s): workflowSource needs to be supplied")
    errors: list[str] = []
    document = None
    try:
        document = WDL.parse_document(source)
        document.typecheck()
    except (WDL.Error.SyntaxError, WDL.Error.ValidationError) as error:
        errors = [str(error)]
    except WDL.Error.MultipleValidationErrors as several:
        errors = [str(error) for error in several.exceptions]
    valid = not errors
    workflow = document.workflow if document and valid else None
    body = {
        "valid": valid,
        "errors": errors,
        "validWorkflow": valid,
        "name": workflow.name if workflow else "",
        "inputs": [],
        "outputs": [],
        "images": [],
        "submittedDescriptorType": {"descriptorType": "WDL", "descriptorTypeVersion": "1.0"}
        if valid
        else {},
        "importedDescriptorTypes": [],
        "meta": {},
        "parameterMeta": {},
        "isRunnableWorkflow": workflow is not None,
    }
    return Answer(200, body)


def version(request: Request) -> Answer:
    return Answer(200, {"cromwell": request.cromwell.version})


def engine_status(request: Request) -> Answer:
    return Answer(200, {"Engine Database": {"ok": True}})


WORKFLOWS = "/api/workflows/[^/]+"
ROUTES: Sequence[tuple[str, str, Callable[..., Answer]]] = (
    ("GET", "/engine/[^/]+/version", version),
    ("GET", "/engine/[^/]+/status", engine_status),
    ("POST", "/api/womtool/[^/]+/describe", describe),
    ("GET", f"{WORKFLOWS}/query", query_by_url),
    ("POST", f"{WORKFLOWS}/query", query_by_body),
    ("POST", WORKFLOWS, submit),
    ("GET", f"{WORKFLOWS}/([^/]+)/status", status),
    ("GET", f"{WORKFLOWS}/([^/]+)/metadata", metadata),
    ("GET", f"{WORKFLOWS}/([^/]+)/logs", logs),
    ("GET", f"{WORKFLOWS}/([^/]+)/labels", labels),
    ("POST", f"{WORKFLOWS}/([^/]+)/abort", abort),
)
