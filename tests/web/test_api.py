"""pfcon's REST contract, row by row, over HTTP."""

import asyncio
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import ClientResponse
from yarl import URL

import pman
from pman.errors import Unavailable
from pman.gateway import Gateway
from pman.jobs import Document, Verdict
from pman.request import MAX_BODY
from pman.settings import Settings
from pman.store import Store
from pman.templates import Templates
from pman.web.api import preview_object
from pman.web.app import make_app
from tests.conftest import Client, StartServer, job_body
from tests.test_gateway import ScriptedDriver
from tests.waiting import wait_until

JID = "chris-jid-1"
JOB_FIELDS = ["jid", "image", "cmd", "status", "message", "timestamp", "logs"]


async def post(client: Client, **changes: Any) -> ClientResponse:
    return await client.post("/api/v1/", json=job_body(**changes))


async def message(answer: ClientResponse, status: int) -> Any:
    """What an error says; every one is JSON with a ``message`` and nothing else."""
    assert answer.status == status, await answer.text()
    assert answer.content_type == "application/json"
    body = await answer.json()
    assert [*body] == ["message"]
    return body["message"]


async def ended(client: Client, jid: str = JID) -> dict[str, Any]:
    async def look() -> dict[str, Any] | None:
        job: dict[str, Any] = await (await client.get(f"/api/v1/{jid}/")).json()
        return None if job["status"] in {"notstarted", "started"} else job

    job = await wait_until(look, 60, "the job to end")
    assert job is not None
    return job


# --- the routes ---


async def test_the_server_says_what_it_is(client: Client) -> None:
    answer = await client.get("/api/v1/")
    assert answer.status == 200
    assert await answer.json() == {
        "server_version": pman.__version__,
        "container_env": "local",
        "storage_type": "host",
    }


async def test_post_answers_201_with_the_job_and_no_logs(client: Client) -> None:
    answer = await post(client, args=["--x", "a b"], entrypoint=["echo"])
    assert answer.status == 201
    job = await answer.json()
    assert [*job] == JOB_FIELDS
    assert job | {"message": ""} == {
        "jid": JID,
        "image": "fnndsc/pl-simpledsapp",
        "cmd": "echo --x 'a b' /share/incoming /share/outgoing",
        "status": "notstarted",
        "message": "",
        "timestamp": "",
        "logs": "",
    }
    assert isinstance(job["message"], str)


@pytest.mark.parametrize(
    ("entrypoint", "status"), [("true", "finishedSuccessfully"), ("false", "finishedWithError")]
)
async def test_get_answers_200_with_the_job_and_its_logs(
    client: Client, entrypoint: str, status: str
) -> None:
    await post(client, entrypoint=[entrypoint])
    job = await ended(client)
    assert [*job] == JOB_FIELDS
    assert job["status"] == status
    assert datetime.fromisoformat(job["timestamp"]).tzinfo
    assert isinstance(job["logs"], str)
    assert job["logs"]


async def test_a_dry_run_answers_the_document_and_stores_nothing(client: Client) -> None:
    answer = await client.post("/api/v1/?dry_run=true", json=job_body(entrypoint=["echo"]))
    assert answer.status == 200
    shown = await answer.json()
    assert [*shown] == ["document", "language", "template", "verdict"]
    assert (shown["language"], shown["template"], shown["verdict"]) == ("sbatch", "bare", None)
    assert shown["document"].startswith("#!/bin/bash\n#SBATCH --job-name=chris-jid-1.")
    assert (await client.get(f"/api/v1/{JID}/")).status == 404
    wrong = await client.post("/api/v1/?dry_run=true", json=job_body(cpu_limit="1000m"))
    assert [*await message(wrong, 400)] == ["cpu_limit"]


@pytest.mark.parametrize("query", ["test_only=true", "dry_run=true&test_only=1"])
async def test_test_only_adds_the_verdict_and_stores_nothing(client: Client, query: str) -> None:
    answer = await client.post(f"/api/v1/?{query}", json=job_body())
    assert answer.status == 200
    shown = await answer.json()
    assert shown["document"].startswith("#!/bin/bash\n")
    assert shown["verdict"] == {
        "accepted": True,
        "message": "this machine has no queue: it would start at once",
        "start": None,
        "partition": "",
        "nodes": "",
        "warnings": [],
    }
    refused = await client.post(f"/api/v1/?{query}", json=job_body(number_of_workers=2))
    verdict = (await refused.json())["verdict"]
    assert verdict["accepted"] is False
    assert verdict["message"] == "local runs one worker, and the job asks for 2"
    assert (await client.get(f"/api/v1/{JID}/")).status == 404


async def test_a_dry_run_tells_that_the_document_is_wrong_in_its_language(
    serve: StartServer, tmp_path: Any
) -> None:
    """Though the template was right for each sample."""
    (tmp_path / "mine" / "sbatch").mkdir(parents=True)
    (tmp_path / "mine" / "sbatch" / "bare.sbatch.j2").write_text(
        "#!/bin/sh\n{% if job.auid == 'odd' %}if{% endif %}\n"
    )
    client = await serve(templates_dir=tmp_path / "mine")
    answer = await client.post("/api/v1/?dry_run=true", json=job_body(auid="odd"))
    assert "bare.sbatch.j2: syntax error" in await message(answer, 400)


def test_the_answer_has_all_of_a_verdict() -> None:
    start = datetime(2026, 11, 22, 9, 12, tzinfo=UTC)
    verdict = Verdict(True, "yes", start, "cpu", "node[1-2]", ("it waits",))
    assert preview_object(Document("text", "sbatch", "bare"), verdict)["verdict"] == {
        "accepted": True,
        "message": "yes",
        "start": "2026-11-22T09:12:00+00:00",
        "partition": "cpu",
        "nodes": "node[1-2]",
        "warnings": ("it waits",),
    }


@pytest.mark.parametrize("yes", ["True", "TRUE", "1", "yes", "on"])
async def test_each_way_to_say_yes_is_a_dry_run(client: Client, yes: str) -> None:
    answer = await client.post(f"/api/v1/?dry_run={yes}", json=job_body())
    assert answer.status == 200
    assert (await client.get(f"/api/v1/{JID}/")).status == 404


@pytest.mark.parametrize("flag", ["dry_run", "test_only"])
@pytest.mark.parametrize("value", ["", "ture", "2", "yes please"])
async def test_what_is_neither_yes_nor_no_does_not_become_a_job(
    client: Client, flag: str, value: str
) -> None:
    answer = await client.post("/api/v1/", params={flag: value}, json=job_body())
    assert f"write {flag}=true or {flag}=false" in await message(answer, 400)
    assert (await client.get(f"/api/v1/{JID}/")).status == 404


@pytest.mark.parametrize(
    "query", ["dryrun=true", "dry-run=true", "Dry_Run=true", "dry_run=false&dry_run=true"]
)
async def test_a_dry_run_that_is_misspelt_does_not_become_a_job(client: Client, query: str) -> None:
    answer = await client.post(f"/api/v1/?{query}", json=job_body())
    assert "write dry_run=true or dry_run=false" in await message(answer, 400)
    assert (await client.get(f"/api/v1/{JID}/")).status == 404


@pytest.mark.parametrize("no", ["false", "0", "No", "off"])
async def test_each_way_to_say_no_is_a_job(client: Client, no: str) -> None:
    answer = await client.post(f"/api/v1/?dry_run={no}&test_only={no}", json=job_body())
    assert answer.status == 201


async def test_delete_answers_204_without_a_body(client: Client) -> None:
    await post(client)
    answer = await client.delete(f"/api/v1/{JID}/")
    assert (answer.status, await answer.read()) == (204, b"")
    assert await message(await client.get(f"/api/v1/{JID}/"), 404) == f"there is no job {JID}"
    assert await message(await client.delete(f"/api/v1/{JID}/"), 404) == f"there is no job {JID}"


async def test_with_remove_jobs_no_delete_answers_204_and_removes_nothing(
    serve: StartServer,
) -> None:
    client = await serve(remove_jobs=False)
    await post(client)
    assert (await client.delete(f"/api/v1/{JID}/")).status == 204
    assert (await client.get(f"/api/v1/{JID}/")).status == 200


@pytest.mark.parametrize(
    ("method", "path", "slashed"),
    [
        ("GET", "/api/v1", "/api/v1/"),
        ("HEAD", "/api/v1", "/api/v1/"),
        ("POST", "/api/v1", "/api/v1/"),
        ("POST", "/api/v1?dry_run=true&x=a%20b&y", "/api/v1/?dry_run=true&x=a%20b&y"),
        ("GET", f"/api/v1/{JID}", f"/api/v1/{JID}/"),
        ("DELETE", f"/api/v1/{JID}?a=1&a=2", f"/api/v1/{JID}/?a=1&a=2"),
        ("GET", "/api/v1/a%2Fb%20c", "/api/v1/a%2Fb%20c/"),
        ("GET", "/health", "/health/"),
    ],
)
async def test_without_the_last_slash_the_answer_is_308(
    client: Client, method: str, path: str, slashed: str
) -> None:
    url = URL(path, encoded=True)
    answer = await client.request(method, url, json={}, allow_redirects=False)
    assert answer.status == 308
    assert answer.headers["Location"] == slashed


async def test_a_redirected_post_and_delete_arrive(client: Client) -> None:
    assert (await client.post("/api/v1", json=job_body())).status == 201
    assert (await client.get(f"/api/v1/{JID}")).status == 200
    assert (await client.delete(f"/api/v1/{JID}")).status == 204


@pytest.mark.parametrize("path", ["/api/v1/", f"/api/v1/{JID}/", "/health/"])
async def test_head_answers_as_get_without_the_body(client: Client, path: str) -> None:
    await post(client)
    await ended(client)
    answer = await client.head(path)
    assert (answer.status, await answer.read()) == (200, b"")
    assert answer.content_type == "application/json"


@pytest.mark.parametrize("path", ["/", "/api/", "/api/v2/", "/api", "/nope", "/api/v1/a/b/"])
async def test_an_unknown_path_is_a_404_as_json(client: Client, path: str) -> None:
    assert await message(await client.get(path), 404) == "Not Found"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/api/v1/", "GET,HEAD,POST"),
        ("DELETE", "/api/v1/", "GET,HEAD,POST"),
        ("PATCH", f"/api/v1/{JID}/", "DELETE,GET,HEAD"),
        ("POST", f"/api/v1/{JID}/", "DELETE,GET,HEAD"),
        ("POST", "/health/", "GET,HEAD"),
    ],
)
async def test_a_wrong_method_is_a_405_that_says_which_are_right(
    client: Client, method: str, path: str, allowed: str
) -> None:
    answer = await client.request(method, path, json={})
    assert await message(answer, 405) == "Method Not Allowed"
    assert answer.headers["Allow"] == allowed


# --- jids ---


async def test_a_leading_slash_of_a_jid_is_dropped(client: Client) -> None:
    answer = await post(client, jid=f"/{JID}")
    assert (await answer.json())["jid"] == JID
    for path in (JID, f"/{JID}", f"//{JID}", f"%2F{JID}"):
        answer = await client.get(URL(f"/api/v1/{path}/", encoded=True))
        assert answer.status == 200
        assert (await answer.json())["jid"] == JID
    assert (await client.delete(f"/api/v1//{JID}/")).status == 204


@pytest.mark.parametrize(
    "jid",
    [
        *("nope", "%2e%2e", "%2e", "%00", "%2F", "%0d%0aX-Injected:%20yes", "é", "日本"),
        *("%ff", "%zz", "a'b", "%ed%a0%80", "a%2Fb", "' OR 1=1 --", "{jid}", "a" * 4000),
        "%F0%9F%98%80" * 300,
    ],
)
async def test_an_odd_jid_is_an_unknown_job(client: Client, jid: str) -> None:
    path = quote(jid, safe="%'{}=")
    for method in ("GET", "DELETE"):
        answer = await client.request(method, URL(f"/api/v1/{path}/", encoded=True))
        assert "there is no job" in await message(answer, 404)
        assert "X-Injected" not in answer.headers


async def raw(client: Client, request: bytes) -> bytes:
    """The answer to bytes that no client would send."""
    assert client.port
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(request + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /api/v1/../ HTTP/1.1", b"404"),
        (b"GET /api/v1/./ HTTP/1.1", b"404"),
        (b"GET /api/v1/\xff/ HTTP/1.1", b"400"),
        (b"GET /api/v1/" + b"a" * 20_000 + b"/ HTTP/1.1", b"400"),
        (b"GET //evil.example/api/v1 HTTP/1.1", b"404"),
        (b"GET /\\evil.example/ HTTP/1.1", b"404"),
        (b"rubbish", b"400"),
    ],
)
async def test_a_strange_request_is_the_clients_error(
    client: Client, request_line: bytes, status: bytes
) -> None:
    assert (await raw(client, request_line)).split()[1] == status


# --- the body ---


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_what_is_not_json_is_a_415(client: Client, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    answer = await client.post(
        "/api/v1/",
        data=json.dumps(job_body()).encode(),
        headers=headers,
        skip_auto_headers=["Content-Type"],
    )
    assert "send it as application/json" in await message(answer, 415)


async def test_json_with_a_charset_is_json(client: Client) -> None:
    answer = await client.post(
        "/api/v1/",
        data=json.dumps(job_body()),
        headers={"Content-Type": "application/json; charset=utf-8"},
    )
    assert answer.status == 201


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"jid":}', b"[" * 100_000])
async def test_malformed_json_is_a_400_with_a_sentence(client: Client, data: bytes) -> None:
    answer = await client.post("/api/v1/", data=data, headers={"Content-Type": "application/json"})
    assert "no valid JSON" in await message(answer, 400)


@pytest.mark.parametrize("data", [b"[]", b'"x"', b"1", b"null"])
async def test_json_that_is_no_object_is_a_400(client: Client, data: bytes) -> None:
    answer = await client.post("/api/v1/", data=data, headers={"Content-Type": "application/json"})
    assert "must be a JSON object" in await message(answer, 400)


async def test_a_body_over_the_bound_is_a_413(client: Client) -> None:
    answer = await client.post(
        "/api/v1/",
        data=io.BytesIO(b" " * (MAX_BODY + 1)),
        headers={"Content-Type": "application/json"},
    )
    assert str(MAX_BODY) in await message(answer, 413)


async def test_the_bound_holds_for_a_body_of_unknown_length(client: Client) -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 100_000

    answer = await client.post(
        "/api/v1/", data=chunks(), headers={"Content-Type": "application/json"}
    )
    assert str(MAX_BODY) in await message(answer, 413)


async def test_a_body_over_the_bound_is_not_read_to_its_end(client: Client) -> None:
    """Nothing more is sent, and the answer comes all the same."""
    assert client.port
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    head = "POST /api/v1/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {100 * MAX_BODY}\r\n\r\n".encode() + bytes(MAX_BODY + 1))
    async with asyncio.timeout(60):
        assert (await reader.readline()).split()[1] == b"413"
    writer.close()


async def test_all_wrong_fields_are_named_in_one_answer(client: Client) -> None:
    answer = await post(
        client,
        jid=...,
        args="x",
        number_of_workers=0,
        cpu_limit="1000m",
        memory_limit="200Mi",
        gpu_limit=None,
        image="",
        entrypoint=[],
        type="xs",
        env=["x"],
        input_dir="/etc",
        output_dir="../x",
    )
    fields = await message(answer, 400)
    assert [*fields] == [
        *("jid", "args", "number_of_workers", "cpu_limit", "memory_limit", "gpu_limit", "image"),
        *("entrypoint", "type", "env", "input_dir", "output_dir"),
    ]
    assert fields["jid"] == "is required"
    assert all(isinstance(reason, str) for reason in fields.values())


@pytest.mark.parametrize(("field", "value"), [("cpu_limit", "1000m"), ("memory_limit", "200Mi")])
async def test_a_limit_with_a_unit_is_a_400(client: Client, field: str, value: str) -> None:
    fields = await message(await post(client, **{field: value}), 400)
    assert fields == {field: f"'{value}' is no whole number; give digits only, without a unit"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"entrypoint": []}, '"entrypoint" cannot be empty'),
        ({"env": ["x"]}, '"env" must be a list of "key=value" strings'),
        ({"env": "x"}, '"env" must be a list of "key=value" strings'),
    ],
)
async def test_two_errors_are_a_sentence_when_alone(
    client: Client, changes: dict[str, Any], sentence: str
) -> None:
    assert await message(await post(client, **changes), 400) == sentence


async def test_a_refused_job_is_not_kept(client: Client) -> None:
    await post(client, cpu_limit="1000m")
    await message(await client.get(f"/api/v1/{JID}/"), 404)


async def test_a_template_that_refuses_a_job_is_a_400(serve: StartServer, tmp_path: Any) -> None:
    (tmp_path / "mine" / "sbatch").mkdir(parents=True)
    (tmp_path / "mine" / "sbatch" / "bare.sbatch.j2").write_text(
        "#!/bin/sh\n{% if job.gpu_limit %}{{ fail('no GPUs here') }}{% endif %}exit 0"
    )
    client = await serve(templates_dir=tmp_path / "mine")
    assert await message(await post(client, gpu_limit=1), 400) == "no GPUs here"
    assert (await post(client)).status == 201


async def test_an_unknown_field_is_ignored(client: Client) -> None:
    assert (await post(client, uid="1000", nonsense={"a": []})).status == 201


# --- POST again ---


async def test_the_same_post_again_is_the_same_job(client: Client) -> None:
    first = await (await post(client)).json()
    again = await post(client, cpu_limit=1000)
    assert again.status == 201
    assert (await again.json())["cmd"] == first["cmd"]
    job = await ended(client)
    again = await post(client)
    assert again.status == 201
    assert await again.json() == job | {"logs": ""}


async def test_a_post_with_other_fields_is_a_409_that_names_them(client: Client) -> None:
    await post(client)
    answer = await post(client, args=["x"], auid="other")
    assert "differs in args, auid" in await message(answer, 409)


# --- API_TOKEN ---


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer sécret2"},
        {"Authorization": "Basic sécret"},
        {"Authorization": "sécret"},
    ],
)
async def test_without_the_token_every_call_of_the_api_is_a_401(
    serve: StartServer, headers: dict[str, str]
) -> None:
    client = await serve(api_token="sécret")
    for method, path in [
        *(("GET", "/api/v1/"), ("POST", "/api/v1/"), ("GET", f"/api/v1/{JID}/")),
        *(("DELETE", f"/api/v1/{JID}/"), ("PUT", "/api/v1/"), ("GET", "/api/v9/")),
        *(("GET", "/%61pi/v1/"), ("GET", "/api/%76%31/")),
    ]:
        url = URL(path, encoded=True)
        answer = await client.request(method, url, headers=headers, json=job_body())
        assert "Authorization: Bearer" in await message(answer, 401)
        assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_a_token_of_broken_bytes_is_a_401_too(serve: StartServer) -> None:
    client = await serve(api_token="secret")
    answer = await raw(client, b"GET /api/v1/ HTTP/1.1\r\nAuthorization: Bearer \xff\xfe")
    assert answer.split()[1] == b"401"


async def test_with_the_token_the_api_answers_and_health_needs_none(serve: StartServer) -> None:
    client = await serve(api_token="sécret")
    headers = {"Authorization": "Bearer sécret"}
    assert (await client.get("/api/v1/", headers=headers)).status == 200
    assert (await client.get("/health/")).status == 200


# --- health ---


async def test_health_counts_the_jobs(client: Client) -> None:
    await post(client)
    await ended(client)
    answer = await client.get("/health/")
    assert answer.status == 200
    health = await answer.json()
    assert health["status"] == "ok"
    assert health["engine"] == "local"
    assert health["outage"] is None
    assert health["jobs"] == {"succeeded": 1}
    assert health["templates"]["problem"] is None
    assert datetime.fromisoformat(health["templates"]["loaded_at"]).tzinfo


async def test_health_tells_an_outage_before_broken_templates(
    settings: Settings, tmp_path: Path, aiohttp_client: Any
) -> None:
    (tmp_path / "mine" / "sbatch").mkdir(parents=True)
    settings = settings.model_copy(update={"templates_dir": tmp_path / "mine"})
    driver = ScriptedDriver()
    driver.errors["submit"] = Unavailable("away")
    gateway = Gateway(settings, Store(settings.state_dir), driver, Templates(settings))
    client = await aiohttp_client(make_app(gateway))
    await post(client)

    async def told() -> dict[str, Any] | None:
        health: dict[str, Any] = await (await client.get("/health/")).json()
        return health if health["outage"] else None

    assert await wait_until(told, 30, "health to tell the outage")
    health = await broken(client, tmp_path / "mine")
    assert health["status"] == "engine unavailable"
    assert health["outage"]["reason"] == "away"
    assert datetime.fromisoformat(health["outage"]["since"]).tzinfo


async def broken(client: Client, folder: Path) -> dict[str, Any]:
    """What health tells once a broken template was found."""
    text = "#!/bin/sh\n{% if %} # secret\n"
    (folder / "sbatch" / "bare.sbatch.j2").write_text(text)

    async def told() -> dict[str, Any] | None:
        health: dict[str, Any] = await (await client.get("/health/")).json()
        return health if health["templates"]["problem"] else None

    found = await wait_until(told, 30, "health to tell of the broken template")
    assert found is not None
    return found


async def test_health_tells_what_is_wrong_with_a_template(
    serve: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "mine" / "sbatch").mkdir(parents=True)
    client = await serve(templates_dir=tmp_path / "mine")
    health = await broken(client, tmp_path / "mine")
    assert health["status"] == "templates broken"
    problem = health["templates"]["problem"]
    assert datetime.fromisoformat(problem["since"]).tzinfo
    assert (problem["file"], problem["line"]) == ("sbatch/bare.sbatch.j2", 2)
    assert problem["text"] == "{% if %} # secret"
    assert problem["message"].startswith("sbatch/bare.sbatch.j2, line 2: ")
    assert problem["message"].endswith(": `{% if %} # secret`")
    assert (await post(client)).status == 201


async def test_where_a_token_is_set_health_shows_nobody_else_the_operators_words(
    serve: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "mine" / "sbatch").mkdir(parents=True)
    client = await serve(templates_dir=tmp_path / "mine", api_token="token")
    health = await broken(client, tmp_path / "mine")
    assert "secret" not in json.dumps(health)
    assert health["templates"]["problem"]["line"] == 2
    answer = await client.get("/health/", headers={"Authorization": "Bearer token"})
    assert "secret" in (await answer.json())["templates"]["problem"]["text"]
