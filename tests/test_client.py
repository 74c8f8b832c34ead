"""What is said when a server does not answer as pman does, over real connections."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from pman.client import Away, ClientError, JobDetails, JobList, Look, ask, looks
from pman.settings import ClientSettings
from tests.conftest import Client, StartServer, job_body

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
Start = Callable[[Answer], Awaitable[ClientSettings]]


def server_at(port: int | None, token: str = "") -> ClientSettings:
    return ClientSettings(pman_url=f"http://127.0.0.1:{port}", api_token=token)


@pytest.fixture
def start(aiohttp_server: Any, clean_environment: None) -> Start:
    """Starts a server that answers everything alike, and gives the settings to ask it."""

    async def run(answer: Answer) -> ClientSettings:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        server = await aiohttp_server(app)
        return server_at(server.port, "secret")

    return run


async def list_of(settings: ClientSettings) -> Look[JobList]:
    return await ask(settings, "/jobs/", (), JobList, patience=60)


async def test_a_pman_is_understood(client: Client) -> None:
    await client.post("/api/v1/", json=job_body())
    seen = await list_of(server_at(client.port))
    assert [job.jid for job in seen.answer.jobs] == ["chris-jid-1"]
    assert seen.raw["total"] == 1
    details = await ask(server_at(client.port), "/jobs/chris-jid-1/", (), JobDetails)
    assert details.answer.document.language == "sbatch"
    assert details.answer.history[0].state == "accepted"


async def test_the_token_is_sent_and_asked_for(serve: StartServer) -> None:
    client = await serve(api_token="sécret")
    assert (await list_of(server_at(client.port, "sécret"))).answer.total == 0
    with pytest.raises(ClientError, match="wants a token: set API_TOKEN"):
        await list_of(server_at(client.port))
    with pytest.raises(ClientError, match="refuses this API_TOKEN") as caught:
        await list_of(server_at(client.port, "wröng"))
    assert "wröng" not in str(caught.value)


async def test_a_token_that_cannot_be_sent_is_told_and_not_shown(client: Client) -> None:
    with pytest.raises(ClientError, match="can't be asked") as caught:
        await list_of(server_at(client.port, "hid\nden"))
    assert "hid" not in str(caught.value)


async def test_a_wrong_question_is_answered_in_pmans_words(client: Client) -> None:
    with pytest.raises(ClientError, match="limit: '0' is no whole number") as caught:
        await ask(server_at(client.port), "/jobs/", [("limit", "0"), ("x", "y")], JobList)
    assert "x: is unknown" in str(caught.value)
    with pytest.raises(ClientError, match=r"^there is no job nope$"):
        await ask(server_at(client.port), "/jobs/nope/", (), JobDetails)


async def test_a_port_that_nobody_listens_on_is_named_with_the_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(Away) as caught:
            await list_of(server_at(port))
    assert str(caught.value) == (
        f"no pman answers at http://127.0.0.1:{port}: Connection refused; start one with "
        "`pman serve`, or give its address with --url or PMAN_URL"
    )


async def test_a_host_that_there_is_none_of_is_named() -> None:
    with pytest.raises(Away, match=r"no pman answers at http://no-host\.invalid: \w+"):
        await list_of(ClientSettings(pman_url="http://no-host.invalid", api_token=""))


@pytest.mark.parametrize(
    ("response", "kind", "words"),
    [
        ({"text": "<html>", "content_type": "text/html"}, ClientError, "no pman of this version"),
        ({"text": "", "content_type": "application/json"}, ClientError, "no pman"),
        ({"text": "{", "content_type": "application/json"}, ClientError, "no pman"),
        ({"text": "[1]", "content_type": "application/json"}, ClientError, "no pman"),
        ({"text": "{}", "content_type": "application/json"}, ClientError, "no pman"),
        (
            {"text": '{"jobs": [1], "total": 1}', "content_type": "application/json"},
            ClientError,
            "no pman of this version: it answers with JSON without jobs and total",
        ),
        (
            {"text": "[" * 200_000, "content_type": "application/json"},
            ClientError,
            "no pman of this version",
        ),
        ({"status": 404, "text": "<html>"}, ClientError, "answers 404 Not Found; start one"),
        ({"status": 403, "text": "no"}, ClientError, "it answers 403 Forbidden"),
        ({"status": 302, "headers": {"Location": "/login"}}, ClientError, "302 Found, to /login"),
        ({"status": 502, "text": "<html>"}, Away, "answers 502 Bad Gateway"),
        (
            {"status": 500, "text": '{"message": "its own"}', "content_type": "application/json"},
            Away,
            "answers 500 Internal Server Error: its own",
        ),
    ],
)  # fmt: skip
async def test_an_answer_that_is_not_pmans_is_told(
    start: Start, response: dict[str, Any], kind: type[Exception], words: str
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(**response)

    settings = await start(answer)
    with pytest.raises(kind) as caught:
        await list_of(settings)
    assert words in str(caught.value)
    assert settings.pman_url in str(caught.value)


@pytest.mark.parametrize(
    "time", ["2026-01-01T00:00:00", "0001-01-01T00:00:00+23:00", "9999-12-31T23:59:59-23:00"]
)
@pytest.mark.parametrize("name", ["accepted_at", "started_at", "ended_at", "at"])
async def test_a_time_that_is_none_on_the_clock_here_is_not_pmans(
    client: Client, start: Start, time: str, name: str
) -> None:
    await client.post("/api/v1/", json=job_body())
    body = await (await client.get("/jobs/chris-jid-1/")).json()
    (body["history"][0] if name == "at" else body)[name] = time

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(body)

    with pytest.raises(ClientError, match="no pman of this version"):
        await ask(await start(answer), "/jobs/chris-jid-1/", (), JobDetails)


async def test_the_token_never_goes_where_a_redirect_points(start: Start) -> None:
    heard: list[str] = []

    async def other(request: web.Request) -> web.Response:
        heard.append(request.path)
        return web.json_response({})

    there = await start(other)

    async def answer(_: web.Request) -> web.Response:
        raise web.HTTPPermanentRedirect(f"{there.pman_url}/jobs/")

    with pytest.raises(ClientError, match="give pman's own address"):
        await list_of(await start(answer))
    assert heard == []


async def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(start: Start) -> None:
    over = asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        await over.wait()
        return web.Response()

    settings = await start(answer)
    with pytest.raises(Away, match=r"has not answered within 0\.2 s"):
        async with asyncio.timeout(20):
            await ask(settings, "/jobs/", (), JobList, patience=0.2)
    over.set()


@pytest.mark.parametrize(
    ("sent", "kind"),
    [(b"SSH-2.0-OpenSSH_9.2\r\n\r\n", ClientError), (b"", Away), (b"HTTP/1.1 200 OK\r\n", Away)],
)
async def test_what_speaks_no_http_is_told(
    clean_environment: None, sent: bytes, kind: type[Exception]
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        settings = server_at(server.sockets[0].getsockname()[1])
        with pytest.raises(kind) as caught:
            await list_of(settings)
    assert settings.pman_url in str(caught.value)


async def test_looks_go_on_through_an_outage_but_not_into_one() -> None:
    seen = Look({"jobs": [], "total": 0}, JobList)
    script: list[Look[JobList] | Exception] = [seen, Away("a"), Away("b"), seen, ClientError("no")]

    async def look() -> Look[JobList]:
        item = script.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    told: list[str] = []
    with pytest.raises(ClientError, match="no"):
        async for item in looks(look, every=0):
            told.append(str(item) if isinstance(item, Away) else "seen")
    assert told == ["seen", "a", "b", "seen"]

    script[:] = [Away("never there")]
    with pytest.raises(Away, match="never there"):
        await anext(looks(look, every=0))
