"""The client of Cromwell's REST API against scripted servers, because no Cromwell can be had here:
what is sent byte for byte, and what is made of every kind of answer and of none."""

import gzip
import json
import logging
import socket
import ssl
import threading
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pman.drivers import cromwell_api
from pman.drivers.cromwell_api import LABEL, Call, CromwellServer, Workflow
from pman.errors import Ambiguous, EngineError, Rejected, Unavailable
from tests.drivers import scripted_cromwell as scripted
from tests.drivers.scripted_cromwell import (
    DESCRIBE,
    QUERY,
    VERSION,
    WORKFLOWS,
    Behaviour,
    Reply,
    Request,
    Scripted,
    answer,
    certificate,
    fail,
    html,
    raw,
    read_request,
    rejection,
    until_gone,
)

ID = "1f5fe8a4-4b5c-5f0e-9f64-3f1f0c1f7d11"
OTHER = "2f5fe8a4-4b5c-5f0e-9f64-3f1f0c1f7d22"
WDL = 'version 1.0\n# grüß dich, 漢字\r\ntask t { command <<< echo "~{x}" >>> }\n'
PLUGIN = "ChRISJob.plugin_instance"
METADATA = f"{WORKFLOWS}/{ID}/metadata"
ABORT = f"{WORKFLOWS}/{ID}/abort"

CALLS: Mapping[str, Callable[[CromwellServer], object]] = {
    "version": lambda server: server.version(),
    "submit": lambda server: server.submit(WDL, {LABEL: "jid.0"}, ID),
    "workflows": lambda server: server.workflows([ID]),
    "labelled": lambda server: server.labelled(["jid.0"]),
    "newest": lambda server: server.newest(3),
    "call": lambda server: server.call(ID),
    "abort": lambda server: server.abort(ID),
    "describe": lambda server: server.describe(WDL),
}
each_call = pytest.mark.parametrize("name", CALLS)


def current(request: Request) -> Reply:
    """What a Cromwell of today answers that knows one workflow."""
    found = {"id": ID, "status": "Running", "labels": {LABEL: "jid.0"}}
    replies = {
        VERSION: Reply(body={"cromwell": "92-abc1234"}),
        WORKFLOWS: Reply(201, {"id": ID, "status": "Submitted"}),
        QUERY: Reply(body={"results": [found], "totalResultsCount": 1}),
        METADATA: Reply(body={"id": ID, "calls": {}}),
        ABORT: Reply(body={"id": ID, "status": "Aborting"}),
        DESCRIBE: Reply(body={"valid": True, "errors": []}),
    }
    return replies.get(request.path) or rejection(404, "The requested resource could not be found.")


@pytest.fixture
def cromwell() -> Iterator[Scripted]:
    with Scripted(current) as server:
        yield server


@pytest.fixture
def client(cromwell: Scripted) -> Iterator[CromwellServer]:
    server = CromwellServer(cromwell.url)
    yield server
    server.close()


def replying(reply: Reply, *paths: str) -> scripted.Answers:
    """``reply`` on ``paths`` (none: on all but the version's), and else like a current one."""

    def answers(request: Request) -> Reply:
        hit = request.path in paths if paths else request.path != VERSION
        return reply if hit else current(request)

    return answers


def raised(name: str, url: str) -> EngineError:
    server = CromwellServer(url)
    try:
        with pytest.raises(EngineError) as error:
            CALLS[name](server)
        return error.value
    finally:
        server.close()


# what is sent


def test_a_submission_has_each_part_byte_for_byte(
    cromwell: Scripted, client: CromwellServer
) -> None:
    labels = {"site": 'a "b": ü', LABEL: "jid.0"}
    assert client.submit(WDL, labels, ID) == ID
    (request,) = cromwell.asked(WORKFLOWS)
    assert request.method == "POST"
    parts = request.parts
    assert parts["workflowSource"] == WDL.encode()
    assert parts["requestedWorkflowId"] == f'"{ID}"'.encode()
    assert json.loads(parts["labels"]) == labels
    assert json.loads(parts["workflowOptions"]) == {
        "read_from_cache": False,
        "write_to_cache": False,
    }
    assert (parts["workflowType"], parts["workflowTypeVersion"]) == (b"WDL", b"1.0")
    assert len(parts) == 6  # Cromwell refuses what it does not know


def test_queries_are_one_request_with_a_pair_for_each(
    cromwell: Scripted, client: CromwellServer
) -> None:
    client.workflows([ID, OTHER])
    client.labelled(["jid.0", "jid:1"])
    client.newest(7)
    assert [(request.method, request.path) for request in cromwell.requests] == [
        ("POST", QUERY)
    ] * 3
    asked = [request.json for request in cromwell.requests]
    assert asked[0] == [{"id": ID}, {"id": OTHER}]
    assert asked[1] == [
        {"labelor": "org.chrisproject.pman.name:jid.0"},
        {"labelor": "org.chrisproject.pman.name:jid:1"},
        {"additionalQueryResultFields": "labels"},
    ]
    assert asked[2] == [{"page": "1"}, {"pageSize": "7"}]


@pytest.mark.parametrize(("count", "queries"), [(0, 0), (1, 1), (500, 1), (501, 2), (1001, 3)])
def test_no_query_is_about_more_than_500(
    cromwell: Scripted, client: CromwellServer, count: int, queries: int
) -> None:
    """Cromwell nests a condition for each, and its stack is not endless."""

    def answers(request: Request) -> Reply:
        """Knows all that it is asked for."""
        names = [one["labelor"].split(":")[1] for one in request.json if "labelor" in one]
        by_label = [{"id": name, "labels": {LABEL: name}} for name in names]
        return Reply(body={"results": by_label or request.json})

    cromwell.answers = answers
    ids = [str(uuid.UUID(int=number)) for number in range(count)]
    assert [*client.workflows(ids)] == ids
    assert client.labelled(ids) == dict(zip(ids, ids, strict=True))
    assert len(cromwell.requests) == 2 * queries
    assert all(len(request.json) <= 501 for request in cromwell.requests)


def test_metadata_are_asked_for_by_key_alone(cromwell: Scripted, client: CromwellServer) -> None:
    client.call(ID)
    (request,) = cromwell.requests
    assert (request.method, request.path) == ("GET", METADATA)
    keys = "executionStatus backendStatus jobId returnCode stdout stderr failures".split()
    assert request.query == [("includeKey", key) for key in keys]


def test_abort_and_describe(cromwell: Scripted, client: CromwellServer) -> None:
    assert client.abort(ID) == "Aborting"
    assert client.describe(WDL) == []
    abort, describe = cromwell.requests
    assert (abort.method, abort.path, abort.body) == ("POST", ABORT, b"")
    assert (describe.method, describe.path) == ("POST", DESCRIBE)
    assert describe.parts == {
        "workflowSource": WDL.encode(),
        "workflowType": b"WDL",
        "workflowTypeVersion": b"1.0",
    }


def test_a_path_in_the_address_is_kept(cromwell: Scripted) -> None:
    cromwell.answers = lambda request: Reply(body={"cromwell": "92"})
    server = CromwellServer(f"{cromwell.url}/behind/a/proxy")
    assert server.version() == "92"
    server.close()
    assert cromwell.requests[0].path == f"/behind/a/proxy{VERSION}"


# which version it is


@pytest.mark.parametrize(
    ("version", "takes_ids"),
    [("74-1234567", False), ("75", True), ("92-abc1234", True), ("100", True), ("develop", True)],
)
def test_which_versions_take_ids(cromwell: Scripted, version: str, takes_ids: bool) -> None:
    cromwell.answers = replying(Reply(body={"cromwell": version}), VERSION)
    server = CromwellServer(cromwell.url)
    assert server.takes_ids is takes_ids
    server.submit(WDL, {}, ID)
    server.close()
    assert ("requestedWorkflowId" in cromwell.asked(WORKFLOWS)[0].parts) is takes_ids


def old(request: Request) -> Reply:
    """What version 74 answers."""
    if request.path == VERSION:
        return Reply(body={"cromwell": "74-1234567"})
    if request.path == WORKFLOWS and "requestedWorkflowId" in request.parts:
        return fail(400, "Error(s): Unexpected body part name: requestedWorkflowId")
    if request.path == WORKFLOWS:
        return Reply(201, {"id": OTHER, "status": "Submitted"})
    return current(request)


def test_an_older_version_that_comes_back_refuses_no_job(
    cromwell: Scripted, client: CromwellServer
) -> None:
    assert client.submit(WDL, {}, ID) == ID
    cromwell.answers = old
    with pytest.raises(Unavailable):
        client.submit(WDL, {}, ID)
    assert not client.takes_ids
    assert client.submit(WDL, {}, ID) == OTHER


def test_a_newer_version_is_seen_before_the_next_submission(
    cromwell: Scripted, client: CromwellServer
) -> None:
    cromwell.answers = old
    assert client.submit(WDL, {}, ID) == OTHER
    cromwell.answers = current
    assert client.submit(WDL, {}, ID) == ID
    assert "requestedWorkflowId" in cromwell.asked(WORKFLOWS)[-1].parts


def test_a_version_that_takes_ids_is_asked_for_once(
    cromwell: Scripted, client: CromwellServer
) -> None:
    for _ in range(3):
        client.submit(WDL, {}, ID)
    assert len(cromwell.asked(VERSION)) == 1


@pytest.mark.parametrize("reply", [fail(503, "Cromwell service is shutting down."), html(502)])
def test_after_trouble_the_version_is_asked_for_again(
    cromwell: Scripted, client: CromwellServer, reply: Reply
) -> None:
    client.submit(WDL, {}, ID)
    cromwell.answers = replying(reply, WORKFLOWS)
    with pytest.raises(Ambiguous):
        client.submit(WDL, {}, ID)
    cromwell.answers = old
    assert client.submit(WDL, {}, ID) == OTHER


# what is made of answers to a submission

TRANSIENT = "db - Connection is not available, request timed out after 3785ms."


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (fail(400, "Error(s): Invalid label: x : Labels must be strings."), Rejected),
        (fail(400, "Error(s): workflowSource or workflowUrl needs to be supplied"), Rejected),
        (html(413, "<h1>413 Request Entity Too Large</h1>"), Rejected),
        (fail(400, TRANSIENT), Ambiguous),
        (fail(400, "Lock wait timeout exceeded; try restarting transaction"), Ambiguous),
        (fail(400, f"Requested workflow IDs are already in use: {OTHER}"), Ambiguous),
        (fail(503, "Cromwell service is shutting down."), Ambiguous),
        (fail(500, "Ask timed out", "error"), Ambiguous),
        (html(502), Ambiguous),
        (html(504), Ambiguous),
        (html(200), Ambiguous),
        (Reply(200, {"id": ID}), Ambiguous),
        (Reply(201, {"status": "Submitted"}), Ambiguous),
        (Reply(201, {"id": None}), Ambiguous),
        (Reply(201, {"id": 7}), Ambiguous),
        (Reply(201, {"id": "../../engine/v1/version"}), Ambiguous),
        (Reply(201, [{"id": ID}]), Ambiguous),
        (Reply(201, "null"), Ambiguous),
        (Reply(201, "not JSON"), Ambiguous),
        (Reply(204, b""), Ambiguous),
        (html(400, "<h1>The plain HTTP request was sent to HTTPS port</h1>"), Unavailable),
        (rejection(400, "The request content was malformed"), Unavailable),
        (Reply(400, {"message": "no route"}), Unavailable),
        (html(401), Unavailable),
        (html(403), Unavailable),
        (rejection(404, "The requested resource could not be found."), Unavailable),
        (rejection(405, "HTTP method not allowed, supported methods: GET"), Unavailable),
        (html(407), Unavailable),
        (html(408), Unavailable),
        (rejection(415, "The request's Content-Type is not supported."), Unavailable),
        (html(421), Unavailable),
        (html(429), Unavailable),
    ],
    ids=lambda value: f"{value.status}" if isinstance(value, Reply) else value.__name__,
)
def test_what_an_answer_to_a_submission_means(
    cromwell: Scripted, client: CromwellServer, reply: Reply, kind: type[EngineError]
) -> None:
    cromwell.answers = replying(reply, WORKFLOWS)
    with pytest.raises(EngineError) as error:
        client.submit(WDL, {}, ID)
    assert type(error.value) is kind


def test_a_submission_that_was_there_already_is_a_success(
    cromwell: Scripted, client: CromwellServer
) -> None:
    words = f"Requested workflow IDs are already in use: {ID}"
    cromwell.answers = replying(fail(400, words), WORKFLOWS)
    assert client.submit(WDL, {}, ID) == ID


def test_a_refusal_has_cromwells_own_words(cromwell: Scripted, client: CromwellServer) -> None:
    cromwell.answers = replying(fail(400, "Error(s): Invalid\nlabel"), WORKFLOWS)
    with pytest.raises(Rejected, match=r"^refused by Cromwell: Error\(s\): Invalid label$"):
        client.submit(WDL, {}, ID)


@pytest.mark.parametrize("reply", [html(502), Reply(body=[])])
def test_without_its_version_nothing_is_submitted(
    cromwell: Scripted, client: CromwellServer, reply: Reply
) -> None:
    cromwell.answers = replying(reply, VERSION)
    with pytest.raises(Unavailable):
        client.submit(WDL, {}, ID)
    assert not cromwell.asked(WORKFLOWS)


# what is made of answers to the other calls

BAD = {
    "500": fail(500, "None.get", "error"),
    "502": html(502, "<html><title>Bad Gateway</title></html>"),
    "503": fail(503, "Cromwell service is shutting down."),
    "599": Reply(599, b""),
    "400": fail(400, "Unrecognized query keys: x"),
    "401": html(401),
    "403": html(403),
    "403 of a gateway in JSON": Reply(403, {"message": "Forbidden"}),
    "404 in plain text": rejection(404, "The requested resource could not be found."),
    "404 of a gateway in JSON": Reply(404, {"message": "no Route matched with those values"}),
    "405": rejection(405, "HTTP method not allowed"),
    "429": html(429),
    "204": Reply(204, b""),
    "HTML": html(200),
    "nothing": Reply(200, b""),
    "not UTF-8": Reply(200, b"\xff\xfe{}"),
    "half of it": Reply(200, b'{"results": ['),
    "null": Reply(200, "null"),
    "a number": Reply(200, "7"),
    "a string": Reply(200, '"ok"'),
    "a list": Reply(200, []),
    "an empty object": Reply(200, {}),
    "nested deeply": Reply(200, "[" * 100_000),
    "a number too long": Reply(200, '{"cromwell": ' + "9" * 5000 + "}"),
}


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        pytest.param(name, reply, id=f"{name}-{words}")
        for name in CALLS
        for words, reply in BAD.items()
        # Of a workflow that has just begun there may be no metadata.
        if (name, words) != ("call", "an empty object")
    ],
)
def test_an_answer_that_is_none_is_unavailable(cromwell: Scripted, name: str, reply: Reply) -> None:
    paths = {"version": [VERSION]}.get(name, [])
    cromwell.answers = replying(reply, *paths)
    error = raised(name, cromwell.url)
    if name == "submit":
        assert type(error) in (Unavailable, Ambiguous)
    else:
        assert type(error) is Unavailable
    assert f"127.0.0.1:{cromwell.port}" in str(error)
    assert error.summary in str(error) or error.summary.startswith("Cromwell ")


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (
            html(200),
            "answers 200 OK (text/html): It works!; is that a Cromwell? check CROMWELL_URL",
        ),
        (fail(500, "None.get"), "answers 500 Internal Server Error: None.get"),
        (html(401), "401 Unauthorized (text/html): It works!; a proxy wants a user and password"),
        (Reply(200, {"cromwell": None}), "an answer without its version; is that a Cromwell?"),
        (Reply(404, {"detail": "Not Found"}), "is that a Cromwell? check CROMWELL_URL"),
        (Reply(500, b""), "answers 500 Internal Server Error: nothing"),
        (fail(500, "a\n" * 10_000), "a a a a"),
    ],
)
def test_what_is_said_of_a_bad_answer(cromwell: Scripted, reply: Reply, words: str) -> None:
    cromwell.answers = replying(reply, VERSION)
    message = str(raised("version", cromwell.url))
    assert words in message
    assert len(message) < 1000
    assert "\n" not in message


ODD = "a\x1b[2Jb\u202ec\x9b1md"
ESCAPED = "a\\x1b[2Jb\\u202ec\\x9b1md"


@pytest.mark.parametrize(
    "reply",
    [
        fail(500, ODD),
        html(500, ODD),
        Reply(500, "", "text/\x1b[2J"),
        Reply(302, "", "text/plain", {"Location": "/a\x1b[2J\x9b1m"}),
    ],
    ids=["message", "text", "kind", "location"],
)
def test_what_a_terminal_would_obey_is_written_as_an_escape(
    cromwell: Scripted, reply: Reply
) -> None:
    cromwell.answers = replying(reply, VERSION)
    message = str(raised("version", cromwell.url))
    assert message.isprintable()
    assert "\\x1b[2J" in message


def test_whatever_is_shown_of_an_answer_is_printable(
    cromwell: Scripted, client: CromwellServer
) -> None:
    cromwell.answers = replying(Reply(body={"cromwell": ODD}), VERSION)
    assert client.version() == ESCAPED
    cromwell.answers = replying(Reply(body={"valid": False, "errors": [ODD]}), DESCRIBE)
    assert client.describe(WDL) == [ESCAPED]
    told = {ODD: {"ok": False, "messages": [ODD]}}
    cromwell.answers = replying(Reply(body=told), "/engine/v1/status")
    assert client.ailing() == {ESCAPED: ESCAPED}
    results = [{"id": ID, "status": ODD}]
    cromwell.answers = replying(Reply(body={"results": results}), QUERY)
    assert client.workflows([ID])[ID].status == ESCAPED
    calls = {PLUGIN: [{"executionStatus": ODD, "stdout": f"/{ODD}"}]}
    cromwell.answers = replying(Reply(body={"calls": calls}), METADATA)
    assert client.call(ID) == Call(ESCAPED, stdout=f"/{ODD}")  # a path is used, and not shown


@each_call
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(cromwell: Scripted, name: str, status: int) -> None:
    target = f"{cromwell.url}/elsewhere"
    reply = Reply(status, "moved", "text/plain", {"Location": target})
    cromwell.answers = replying(reply, VERSION) if name == "version" else replying(reply)
    error = raised(name, cromwell.url)
    assert type(error) is Unavailable
    assert f"points to {target}" in str(error)
    assert not cromwell.asked("/elsewhere")


@pytest.mark.parametrize("location", ["", "ftp://x", "http://[", "\xff\xfe", "//"])
def test_a_strange_redirect_is_a_bad_answer(cromwell: Scripted, location: str) -> None:
    cromwell.answers = replying(Reply(302, "", "text/plain", {"Location": location}), VERSION)
    assert type(raised("version", cromwell.url)) is Unavailable


# what is read


def test_what_is_read_of_workflows(cromwell: Scripted, client: CromwellServer) -> None:
    results: list[Any] = [
        {
            "id": ID,
            "name": "ChRISJob",
            "status": "Failed",
            "submission": "2026-11-22T15:00:00.000Z",
            "start": "2026-11-22T15:00:20.5Z",
            "end": "2026-11-22T17:00:00.000+01:00",
        },
        {"id": OTHER, "status": "Submitted"},
        {"status": "Running"},
        {"id": None},
        {"id": ["x"]},
        {"id": "7"},
        None,
        7,
    ]
    cromwell.answers = replying(Reply(body={"results": results}), QUERY)
    seen = client.workflows([ID, OTHER])
    assert seen == {
        ID: Workflow(
            ID,
            "Failed",
            started_at=datetime(2026, 11, 22, 15, 0, 20, 500_000, UTC),
            ended_at=datetime(2026, 11, 22, 16, tzinfo=UTC),
            submitted_at=datetime(2026, 11, 22, 15, tzinfo=UTC),
        ),
        OTHER: Workflow(OTHER, "Submitted"),
    }


@pytest.mark.parametrize(
    "time", [None, 7, "", "soon", "2026-11-22T15:00:00", "0001-01-01T00:00+23:59"]
)
def test_a_strange_time_is_none(cromwell: Scripted, client: CromwellServer, time: Any) -> None:
    results = [{"id": ID, "status": "Running", "start": time}]
    cromwell.answers = replying(Reply(body={"results": results}), QUERY)
    assert client.workflows([ID])[ID].started_at is None


def test_what_is_read_of_labels(cromwell: Scripted, client: CromwellServer) -> None:
    results: list[Any] = [
        {"id": ID, "labels": {LABEL: "jid.0", "cromwell-workflow-id": f"cromwell-{ID}"}},
        {"id": OTHER, "labels": {LABEL: "of somebody else"}},
        {"id": OTHER, "labels": {LABEL: ["jid.1"]}},
        {"id": OTHER, "labels": {"other": "jid.1"}},
        {"id": OTHER, "labels": [LABEL]},
        {"id": OTHER},
        {"labels": {LABEL: "jid.1"}},
    ]
    cromwell.answers = replying(Reply(body={"results": results}), QUERY)
    assert client.labelled(["jid.0", "jid.1"]) == {"jid.0": ID}


WRONG_CODE = (
    "Job ChRISJob.plugin_instance:NA:1 exited with return code 3 which has not been declared as a "
    "valid return code. See 'continueOnReturnCode' runtime attribute for more details."
)


def test_what_is_read_of_metadata(cromwell: Scripted, client: CromwellServer) -> None:
    first = {"executionStatus": "RetryableFailure", "jobId": "6", "returnCode": 1}
    last = {
        "executionStatus": "Failed",
        "backendStatus": "Done",
        "jobId": "7",
        "returnCode": 3,
        "stdout": "/x/execution/stdout",
        "stderr": "/x/execution/stderr",
        "failures": [{"message": WRONG_CODE, "causedBy": []}],
    }
    told = {
        "id": ID,
        "calls": {"ChRISJob.plugin_instance": [first, last]},
        "failures": [
            {"message": "Workflow failed", "causedBy": [{"message": WRONG_CODE, "causedBy": []}]},
            {"message": WRONG_CODE},
        ],
    }
    cromwell.answers = replying(Reply(body=told), METADATA)
    assert client.call(ID) == Call(
        "Failed", "7", 3, "/x/execution/stdout", "/x/execution/stderr", WRONG_CODE
    )


@pytest.mark.parametrize("begun", [True, False])
def test_only_the_plugins_own_task_is_read(
    cromwell: Scripted, client: CromwellServer, begun: bool
) -> None:
    """A site's own template may have others, before it and after it."""
    other = {"jobId": "6", "returnCode": 0, "stdout": "/other", "executionStatus": "Done"}
    calls = {
        "ChRISJob.stage_in": [other],
        **({PLUGIN: [{"jobId": "7", "stdout": "/x"}]} if begun else {}),
        "ChRISJob.stage_out": [other],
        "Other.plugin_instance": [other],
    }
    told = {"calls": calls, "failures": [{"message": "why"}]}
    cromwell.answers = replying(Reply(body=told), METADATA)
    plugin = Call(job_id="7", stdout="/x", failure="why")
    assert client.call(ID) == (plugin if begun else Call(failure="why"))


@pytest.mark.parametrize(
    ("failures", "words"),
    [
        (
            [
                {
                    "message": "Workflow input processing failed",
                    "causedBy": [
                        {"message": "Failed to process task definition", "causedBy": []},
                        {"message": "ERROR: Unexpected\n symbol\n (line 3)", "causedBy": []},
                    ],
                }
            ],
            "Failed to process task definition; ERROR: Unexpected symbol (line 3)",
        ),
        (
            [
                {
                    "message": "Runtime validation failed",
                    "causedBy": [
                        {
                            "message": "Task plugin_instance has an invalid runtime attribute "
                            "slurm_partition = !! NOT FOUND !!"
                        }
                    ],
                }
            ],
            "Task plugin_instance has an invalid runtime attribute slurm_partition = "
            "!! NOT FOUND !!",
        ),
        ([{"message": "alone", "causedBy": None}], "alone"),
        ([{"message": "x" * 9000}], "x" * 1000),
        ([{"message": "a\x1b[31mb\u202ec\x00é"}], "a\\x1b[31mb\\u202ec\\x00é"),
        ([{"message": "\x1b" * 9000}], "\\x1b" * 250),
        ([{"message": None}, None, 7, "text", {"causedBy": [None]}], ""),
        ({"message": "no list"}, ""),
        (None, ""),
    ],
)
def test_the_deepest_causes_are_told(
    cromwell: Scripted, client: CromwellServer, failures: Any, words: str
) -> None:
    cromwell.answers = replying(Reply(body={"failures": failures}), METADATA)
    call = client.call(ID)
    assert call is not None
    assert call.failure == words


def test_causes_may_be_nested_deeply(cromwell: Scripted, client: CromwellServer) -> None:
    nested = '{"causedBy":[' * 450 + '{"message":"at the bottom"}' + "]}" * 450
    cromwell.answers = replying(Reply(body=f'{{"failures":[{nested}]}}'), METADATA)
    call = client.call(ID)
    assert call is not None
    assert call.failure == "at the bottom"


@pytest.mark.parametrize("value", [None, 7, True, [], {}, 1.5])
def test_values_of_another_type_are_none(
    cromwell: Scripted, client: CromwellServer, value: Any
) -> None:
    keys = "executionStatus jobId stdout stderr".split()
    told = {"calls": {PLUGIN: [dict.fromkeys(keys, value)]}}
    cromwell.answers = replying(Reply(body=told), METADATA)
    assert client.call(ID) == Call()


@pytest.mark.parametrize(("code", "read"), [(0, 0), (3, 3), (True, None), ("3", None), (1.5, None)])
def test_a_return_code_is_a_number(
    cromwell: Scripted, client: CromwellServer, code: Any, read: int | None
) -> None:
    told = {"calls": {PLUGIN: [{"returnCode": code}]}}
    cromwell.answers = replying(Reply(body=told), METADATA)
    call = client.call(ID)
    assert call is not None
    assert call.return_code == read


def test_metadata_of_a_workflow_that_is_not_shown_yet(
    cromwell: Scripted, client: CromwellServer
) -> None:
    cromwell.answers = replying(fail(404, f"Unrecognized workflow ID: {ID}"), METADATA)
    assert client.call(ID) is None


def test_nothing_to_abort(cromwell: Scripted, client: CromwellServer) -> None:
    words = f"Couldn't abort {ID} because no workflow with that ID is in progress"
    cromwell.answers = replying(fail(404, words, "error"), ABORT)
    assert client.abort(ID) == ""


@pytest.mark.parametrize(
    "reply",
    [
        Reply(404, {"message": "no Route matched with those values"}),
        fail(403, "x", "error"),
        html(404),
        Reply(200, {"id": ID}),
        Reply(200, {"status": None}),
    ],
)
def test_what_tells_nothing_of_an_abort_is_not_nothing_to_abort(
    cromwell: Scripted, reply: Reply
) -> None:
    cromwell.answers = replying(reply, ABORT)
    assert type(raised("abort", cromwell.url)) is Unavailable


def test_the_parsers_verdict(cromwell: Scripted, client: CromwellServer) -> None:
    told = {"valid": False, "errors": ["ERROR: Unexpected symbol (line 3)", None]}
    cromwell.answers = replying(Reply(body=told), DESCRIBE)
    assert client.describe(WDL) == ["ERROR: Unexpected symbol (line 3)"]
    cromwell.answers = replying(Reply(body={"valid": False}), DESCRIBE)
    assert client.describe(WDL) == ["it is not valid"]


# no answer


def hangs_up_at_once(connection: socket.socket) -> None: ...


def hangs_up_when_asked(connection: socket.socket) -> None:
    read_request(connection)


def resets_when_asked(connection: socket.socket) -> None:
    read_request(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def hangs_up_in_the_head(connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Ty")


def hangs_up_in_the_body(connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(b'HTTP/1.1 201 Created\r\nContent-Length: 99\r\n\r\n{"id": ')


def hangs_up_in_a_chunk(connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(b'HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n{"id": ')


def breaks_the_chunks(connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n")


def breaks_the_gzip(connection: socket.socket) -> None:
    read_request(connection)
    head = b"HTTP/1.1 201 Created\r\nContent-Encoding: gzip\r\nContent-Length: 7\r\n\r\n"
    connection.sendall(head + b"no gzip")


def speaks_no_http(connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n")


def never_answers(connection: socket.socket) -> None:
    read_request(connection)
    until_gone(connection)


def answers_by_drops(connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(2000):  # the client gives up long before
        connection.sendall(b" ")
        threading.Event().wait(0.01)


def never_ends(connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(1000):
        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


SILENCES: Mapping[Behaviour, str] = {
    hangs_up_at_once: "",
    hangs_up_when_asked: "closed connection without response",
    resets_when_asked: "Connection reset by peer",
    hangs_up_in_the_head: "",
    hangs_up_in_the_body: "7 bytes read, 92 more expected",
    hangs_up_in_a_chunk: "",
    breaks_the_chunks: "",
    breaks_the_gzip: "",
    speaks_no_http: "SSH-2.0",
    never_answers: "no whole answer within 0.2 s",
    answers_by_drops: "no whole answer within 0.2 s",
    never_ends: "its answer is over 1048576 bytes long",
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cromwell_api, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(cromwell_api, "LARGEST", 1 << 20)


def tells_its_version(connection: socket.socket) -> None:
    answer(connection, b'{"cromwell": "92"}')


@pytest.mark.parametrize("silence", SILENCES, ids=lambda silence: silence.__name__)
@each_call
def test_no_answer(impatient: None, name: str, silence: Behaviour) -> None:
    before = [tells_its_version] if name == "submit" else []
    with raw(*before, silence) as url:
        error = raised(name, url)
    assert type(error) is (Ambiguous if name == "submit" else Unavailable)
    assert SILENCES[silence] in str(error)
    assert error.summary in (
        "Cromwell unreachable",
        "Cromwell does not answer as it should",
        "Cromwell has an error of its own",
    )


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def test_an_answer_that_a_proxy_packed_is_read() -> None:
    body = gzip.compress(b'{"cromwell": "92-abc1234"}')
    packed = Reply(body=body, headers={"Content-Encoding": "gzip"})
    with Scripted(lambda _: packed) as cromwell, closing(CromwellServer(cromwell.url)) as server:
        assert server.version() == "92-abc1234"


@each_call
def test_a_refused_port(name: str, closed_port: int) -> None:
    error = raised(name, f"http://127.0.0.1:{closed_port}")
    assert type(error) is Unavailable
    assert "Connection refused; does it run, and is CROMWELL_URL right?" in str(error)


@each_call
def test_an_unknown_name(name: str) -> None:
    error = raised(name, "http://cromwell.invalid:8000")
    assert type(error) is Unavailable
    assert "its name is not known; does it run, and is CROMWELL_URL right?" in str(error)


def test_a_server_that_takes_no_connection_was_sent_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cromwell_api, "CONNECT_SECONDS", 0.2)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        host, port = listener.getsockname()
        server = stack.enter_context(closing(CromwellServer(f"http://{host}:{port}")))
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(lambda: server.takes_ids)
            with listener.accept()[0] as connection:
                tells_its_version(connection)
            assert asked.result()
        for _ in range(4):  # nobody accepts them, and there is room for one
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((host, port))
        with pytest.raises(Unavailable, match=r"no connection within 0\.2 s"):
            server.submit(WDL, {}, ID)


def test_a_server_that_goes_between_version_and_submission() -> None:
    """What was certainly not sent is not in doubt."""
    with Scripted(current) as first:
        server = CromwellServer(first.url)
        assert server.takes_ids
    server._session.close()
    try:
        with pytest.raises(Unavailable, match="Connection refused"):
            server.submit(WDL, {}, ID)
    finally:
        server.close()


# TLS


def test_a_trusted_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, context = certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(cert))
    with Scripted(current, tls=context) as cromwell:
        server = CromwellServer(cromwell.url)
        assert server.submit(WDL, {}, ID) == ID
        server.close()


@each_call
def test_an_untrusted_certificate(tmp_path: Path, name: str) -> None:
    _, context = certificate(tmp_path)
    with Scripted(current, tls=context) as cromwell:
        error = raised(name, cromwell.url)
        assert not cromwell.requests
    assert type(error) is Unavailable
    assert "certificate verify failed: self-signed certificate" in str(error)
    assert "REQUESTS_CA_BUNDLE names the file of the authorities to trust" in str(error)


def test_a_certificate_that_comes_between_version_and_submission_is_no_doubt(
    tmp_path: Path,
) -> None:
    _, context = certificate(tmp_path)
    with Scripted(current, tls=context) as cromwell:
        server = CromwellServer(cromwell.url)
        server._takes_ids = True
        with pytest.raises(Unavailable):
            server.submit(WDL, {}, ID)
        server.close()


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("nowhere/ca.pem", "Could not find a suitable TLS CA certificate bundle, invalid path: "),
        ("nothing.pem", "no certificate or crl found"),
    ],
)
@each_call
def test_authorities_that_cannot_be_read_are_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, words: str
) -> None:
    _, context = certificate(tmp_path)
    (tmp_path / "nothing.pem").write_text("none\n")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / file))
    with Scripted(current, tls=context) as cromwell:
        error = raised(name, cromwell.url)
        assert not cromwell.requests
    assert type(error) is Unavailable
    assert words in str(error)
    assert "; REQUESTS_CA_BUNDLE names the file of the authorities to trust" in str(error)


def test_authorities_that_go_between_version_and_submission_are_no_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, context = certificate(tmp_path)
    with Scripted(current, tls=context) as cromwell:
        with closing(CromwellServer(cromwell.url)) as server:
            server._takes_ids = True
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "nowhere"))
            with pytest.raises(Unavailable):
                server.submit(WDL, {}, ID)
        assert not cromwell.requests


def test_a_certificate_of_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, context = certificate(tmp_path, x509.DNSName("cromwell.hpc.org"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(cert))
    with Scripted(current, tls=context) as cromwell:
        error = raised("version", cromwell.url)
    assert "not valid for '127.0.0.1'" in str(error)


@each_call
def test_https_where_only_http_is_spoken(cromwell: Scripted, name: str) -> None:
    error = raised(name, cromwell.url.replace("http:", "https:"))
    assert type(error) is Unavailable
    assert "does it speak TLS? check CROMWELL_URL" in str(error)


def test_http_where_only_https_is_spoken(tmp_path: Path) -> None:
    _, context = certificate(tmp_path)
    with Scripted(current, tls=context) as cromwell:
        error = raised("version", cromwell.url.replace("https:", "http:"))
    assert type(error) is Unavailable


def test_tls_that_breaks_after_the_submission_was_sent_is_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, context = certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(cert))

    def breaks(connection: socket.socket) -> None:
        assert isinstance(connection, ssl.SSLSocket)
        read_request(connection)
        plain = socket.socket(fileno=connection.detach())
        with plain:
            plain.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

    with raw(tells_its_version, breaks, tls=context) as url:
        assert type(raised("submit", url)) is Ambiguous


# a proxy's password


@each_call
@pytest.mark.parametrize("how", ["refused", "500", "401", "redirect", "HTML", "hangs up"])
def test_the_password_is_sent_and_never_said(
    cromwell: Scripted, closed_port: int, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    caplog.set_level(logging.DEBUG)
    replies = {
        "500": fail(500, "None.get"),
        "401": html(401),
        "redirect": Reply(302, "", "text/plain", {"Location": "/elsewhere"}),
        "HTML": html(200),
    }
    if how in replies:
        cromwell.answers = lambda request: replies[how]
    port = closed_port if how == "refused" else cromwell.port
    secret = "s3cret%40word"
    if how == "hangs up":
        with raw(hangs_up_when_asked) as url:
            error = raised(name, url.replace("//", f"//chris:{secret}@"))
    else:
        error = raised(name, f"http://chris:{secret}@127.0.0.1:{port}")
    told = [str(error), repr(error), error.summary, caplog.text]
    below: BaseException | None = error.__cause__
    while below is not None:
        told += [str(below), repr(below)]
        below = below.__cause__ or below.__context__
    basic = b64encode(b"chris:s3cret@word").decode()
    assert not [text for text in told if "s3cret" in text or basic in text]
    sent = [request.headers.get("authorization") for request in cromwell.requests]
    assert set(sent) <= {f"Basic {basic}"}
    assert sent or how in ("refused", "hangs up")


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("chris:пароль", "chris:пароль".encode()),
        ("chris:%D0%BF%20%40", "chris:п @".encode()),
        ("chris:%e9%FF", b"chris:\xe9\xff"),
        ("ch%3Aris", b"ch:ris:"),
        ("chris:", b"chris:"),
    ],
)
def test_user_and_password_are_sent_as_utf_8(cromwell: Scripted, written: str, sent: bytes) -> None:
    with closing(CromwellServer(cromwell.url.replace("//", f"//{written}@"))) as server:
        server.version()
    (request,) = cromwell.requests
    assert request.headers["authorization"] == f"Basic {b64encode(sent).decode()}"


def test_without_a_user_none_is_sent(cromwell: Scripted, client: CromwellServer) -> None:
    client.version()
    assert "authorization" not in cromwell.requests[0].headers


# a proxy on the way


@pytest.fixture
def behind_proxy(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def set_proxy(address: str) -> None:
        for variable in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        for variable in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(variable, address)

    return set_proxy


@each_call
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("begin", ["http://", "http://me:s3cret@", ""])
def test_a_proxy_that_is_not_there_is_named(
    behind_proxy: Callable[[str], None], closed_port: int, name: str, scheme: str, begin: str
) -> None:
    behind_proxy(f"{begin}127.0.0.1:{closed_port}")
    error = raised(name, f"{scheme}://cromwell.invalid:8000")
    assert type(error) is Unavailable
    assert f"the proxy 127.0.0.1:{closed_port} refuses: Connection refused" in str(error)
    assert "are HTTP_PROXY and HTTPS_PROXY right? NO_PROXY names the hosts" in str(error)
    assert "s3cret" not in str(error)


def test_a_proxy_that_opens_no_way_was_sent_nothing(behind_proxy: Callable[[str], None]) -> None:
    def refuses(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    with raw(refuses) as proxy, closing(CromwellServer("https://cromwell.invalid")) as server:
        behind_proxy(proxy)
        server._takes_ids = True
        with pytest.raises(Unavailable, match=r"the proxy 127.* refuses: .*403 Forbidden"):
            server.submit(WDL, {}, ID)


@each_call
def test_a_password_of_the_proxy_that_cannot_be_sent_is_told(
    behind_proxy: Callable[[str], None], closed_port: int, name: str
) -> None:
    behind_proxy(f"http://me:пароль@127.0.0.1:{closed_port}")
    error = raised(name, "http://cromwell.invalid:8000")
    assert type(error) is Unavailable
    assert "of the proxy has characters that can't be sent; are HTTP_PROXY" in str(error)
    assert "пароль" not in str(error)


def test_the_password_is_not_in_where() -> None:
    server = CromwellServer("https://chris:p@ss:word@cromwell.hpc.org:8000/x")
    assert server.where == "https://cromwell.hpc.org:8000/x"
    server.close()


# threads


def test_one_client_serves_eight_threads(cromwell: Scripted, client: CromwellServer) -> None:
    """Each gets the answer to its own question."""

    def answers(request: Request) -> Reply:
        if request.path == QUERY:
            return Reply(body={"results": [{**one, "status": "Running"} for one in request.json]})
        if request.path == WORKFLOWS:
            return Reply(201, {"id": json.loads(request.parts["requestedWorkflowId"])})
        if request.path.endswith("/metadata"):
            return Reply(body={"calls": {PLUGIN: [{"jobId": request.path.split("/")[4]}]}})
        return current(request)

    cromwell.answers = answers

    def work(number: int) -> None:
        for round in range(25):
            id = str(uuid.UUID(int=number * 1000 + round))
            assert client.submit(WDL, {}, id) == id
            assert [*client.workflows([id])] == [id]
            assert client.call(id) == Call(job_id=id)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


# any JSON

KEYS = [
    *"id status results labels calls failures causedBy message cromwell valid errors".split(),
    *"executionStatus jobId returnCode stdout stderr start end submission ChRISJob.x".split(),
    LABEL,
]
TEXTS = st.sampled_from([ID, "fail", "error", "Running", "jid.0", "92", "\ud800", "\x00"])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXTS
    | st.text(st.characters(exclude_categories=()))
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=6)
    ),
    max_leaves=25,
)


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.items() for text in strings(item)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in strings(item)]
    return []


@pytest.fixture(scope="module")
def shared() -> Iterator[Scripted]:
    with Scripted(current) as server:
        yield server


@each_call
@settings(max_examples=60)
@given(status=st.sampled_from([200, 200, 201, 400, 404, 500]), body=ANYTHING)
@example(status=201, body={"id": "\ud800"})
@example(status=200, body={"results": [{"id": ["x"]}, {"id": {"x": 1}}]})
@example(status=200, body={"results": [{"id": ID, "labels": {LABEL: ["x"]}}]})
@example(status=200, body={"cromwell": "9" * 5000})
@example(status=200, body={"calls": {"x": None}, "failures": [{"message": "\ud800"}]})
@example(status=200, body={"calls": {"x": [{"stdout": "\ud800"}]}})
@example(status=400, body={"status": "fail", "message": ["x"]})
@example(status=400, body={"status": ["fail"], "message": "x"})
def test_any_json_is_an_answer_or_an_engine_error(
    shared: Scripted, name: str, status: int, body: Any
) -> None:
    shared.answers = replying(Reply(status, body), *([VERSION] if name == "version" else []))
    server = CromwellServer(shared.url)
    try:
        found: Any = CALLS[name](server)
    except EngineError as error:
        found = [str(error), error.summary]
    finally:
        server.close()
    values = [
        asdict(one) if isinstance(one, (Call, Workflow)) else one
        for one in (found.values() if isinstance(found, dict) else [found])
    ]
    for text in strings(values):
        text.encode()  # it can be stored
    if isinstance(found, list):
        assert all(text.isprintable() for text in strings(found))


def test_nothing_is_asked_after_the_end() -> None:
    with Scripted(lambda _: Reply(200, {"cromwell": "92"})) as server:
        cromwell = CromwellServer(server.url)
        assert cromwell.version() == "92"
        cromwell.close()
        with pytest.raises(Unavailable, match="shutting down"):
            cromwell.version()
        assert len(server.requests) == 1
