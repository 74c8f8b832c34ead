"""A real server whose Cromwell is not well, or none: pfcon has its 201 at once, the job says why it
waits, and it goes out when Cromwell is back. What stands in the place of Cromwell is scripted."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Client, StartServer, job_body
from tests.drivers.scripted_cromwell import (
    VERSION,
    WORKFLOWS,
    Reply,
    Request,
    Scripted,
    certificate,
    fail,
    html,
)
from tests.waiting import wait_until


def always(reply: Reply) -> Callable[[Path], Scripted]:
    return lambda _: Scripted(lambda _: reply)


def untrusted(folder: Path) -> Scripted:
    return Scripted(lambda _: Reply(), certificate(folder)[1])


UNWELL = {
    "closed": (always(Reply()), "can't be reached: Connection refused"),
    "certificate": (untrusted, "REQUESTS_CA_BUNDLE names the file of the authorities to trust"),
    "500": (always(html(500, "<h1>Oops</h1>")), "500 Internal Server Error (text/html): Oops"),
    "502": (always(html(502, "<h1>nginx</h1>")), "502 Bad Gateway (text/html): nginx"),
    "html": (always(html(200)), "It works!; is that a Cromwell? check CROMWELL_URL"),
    "json": (always(Reply(200, [])), "is that a Cromwell? check CROMWELL_URL"),
    "404": (always(fail(404, "no such thing")), "404 Not Found: no such thing"),
    "401": (always(html(401, "Who?")), "a proxy wants a user and password"),
}


@pytest.fixture
def cromwell(tmp_path: Path) -> dict[str, Any]:
    """Settings for Cromwell: a folder with a blank can't go through it."""
    for name in ("in", "out"):
        (tmp_path / "store" / name).mkdir(parents=True)
    return {"container_env": "cromwell", "storebase": tmp_path / "store", "timelimit_minutes": 5}


async def message(client: Client, words: str) -> dict[str, Any]:
    """The job once its message has ``words``."""
    job: dict[str, Any] = {}

    async def there() -> bool:
        nonlocal job
        job = await (await client.get("/api/v1/chris-jid-1/")).json()
        return words in job["message"]

    await wait_until(there, 30, f"{words!r} in the message")
    return job


@pytest.mark.parametrize("kind", UNWELL)
async def test_a_job_waits_and_says_why(
    serve: StartServer, cromwell: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    make, words = UNWELL[kind]
    server = make(tmp_path)
    with nullcontext() if kind == "closed" else server:
        if kind == "closed":
            server.close()
        client = await serve(**cromwell, cromwell_url=server.url)
        assert (await client.post("/api/v1/", json=job_body())).status == 201
        job = await message(client, words)
        assert (job["status"], job["logs"]) == ("notstarted", "")
        assert server.url in job["message"]


def well(request: Request) -> Reply:
    """Just enough of a Cromwell."""
    if request.path == VERSION:
        return Reply(200, {"cromwell": "92-abc1234"})
    if request.path == WORKFLOWS:
        wanted = json.loads(request.parts["requestedWorkflowId"])
        return Reply(201, {"id": wanted, "status": "Submitted"})
    return Reply(200, {"results": [], "totalResultsCount": 0})


async def test_it_goes_out_when_cromwell_is_back_and_no_password_is_shown(
    serve: StartServer, cromwell: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with Scripted(lambda _: html(503, "busy")) as server:
        url = server.url.replace("//", "//pman:s3cret@")
        client = await serve(**cromwell, cromwell_url=url)
        assert (await client.post("/api/v1/", json=job_body())).status == 201
        await message(client, "503 Service Unavailable")
        health = await (await client.get("/health/")).text()
        server.answers = well
        job = await message(client, "submitted")
        assert job["status"] == "notstarted"
        assert len(server.asked(WORKFLOWS)) == 1
        details = await (await client.get("/jobs/chris-jid-1/")).text()
        for text in (health, details, json.dumps(job), caplog.text):
            assert "s3cret" not in text
        assert all("authorization" in request.headers for request in server.requests)
