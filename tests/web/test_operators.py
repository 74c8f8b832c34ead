"""The operators' calls over HTTP: the list of jobs, and all about one."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from yarl import URL

from pman.jobs import JobState
from pman.store import Store
from pman.web.api import GATEWAY
from tests.conftest import Client, StartServer, job_body
from tests.test_store import make_job
from tests.waiting import wait_until

LINE = (
    "jid state status engine engine_id template auid image message accepted_at started_at ended_at "
    "generation"
).split()
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def seed(values: dict[str, Any], *jobs: Any) -> None:
    """Put jobs of another engine into the store; the server leaves them as they are."""
    store = Store(values["state_dir"])
    for job in jobs:
        store.add(job)
    store.close()


def seed_every_state(values: dict[str, Any]) -> None:
    seed(
        values,
        *(
            make_job(
                f"j-{state}",
                state=state,
                engine="slurm",
                accepted_at=NOW + timedelta(seconds=number),
            )
            for number, state in enumerate(JobState)
        ),
    )


async def listed(client: Client, query: str = "") -> tuple[list[str], int]:
    answer = await client.get(f"/jobs/{query}")
    assert answer.status == 200, await answer.text()
    body = await answer.json()
    assert [*body] == ["jobs", "total"]
    return [job["jid"] for job in body["jobs"]], body["total"]


async def ended(client: Client, jid: str) -> dict[str, Any]:
    async def look() -> dict[str, Any] | None:
        job: dict[str, Any] = await (await client.get(f"/jobs/{jid}/")).json()
        return job if job["ended_at"] else None

    job = await wait_until(look, 60, f"{jid} to end")
    assert job is not None
    return job


async def test_without_jobs_the_list_is_empty(client: Client) -> None:
    assert await listed(client) == ([], 0)


async def test_the_list_has_the_newest_first_and_says_how_many_match(
    values: dict[str, Any], serve: StartServer
) -> None:
    seed_every_state(values)
    client = await serve()
    newest = [f"j-{state}" for state in reversed(JobState)]
    assert await listed(client) == (newest, 8)
    assert await listed(client, "?limit=3") == (newest[:3], 8)
    assert await listed(client, "?state=running&state=queued") == (["j-running", "j-queued"], 2)
    assert await listed(client, "?state=running&state=queued&limit=1") == (["j-running"], 2)
    assert await listed(client, "?auid=cube&limit=1000") == (newest, 8)
    assert await listed(client, "?auid=other") == ([], 0)
    assert await listed(client, "?auid=%ff%00'") == ([], 0)


async def test_where_no_limit_is_given_a_hundred_are_listed(
    values: dict[str, Any], serve: StartServer
) -> None:
    seed(values, *(make_job(f"j{number}", engine="slurm") for number in range(101)))
    jids, total = await listed(await serve())
    assert (len(jids), total) == (100, 101)


async def test_a_line_of_the_list_tells_what_get_tells(
    values: dict[str, Any], serve: StartServer
) -> None:
    """Here the server runs another engine than the job's, which every reader is told."""
    seed(
        values,
        make_job("q", state=JobState.QUEUED, engine="slurm", engine_id="4711", message="Resources"),
        make_job("e", state=JobState.FAILED, engine="slurm", started_at=NOW, ended_at=NOW),
    )
    client = await serve()
    done, waits = (await (await client.get("/jobs/")).json())["jobs"]
    assert [*waits] == LINE
    told = await (await client.get("/api/v1/q/")).json()
    assert waits.pop("message") == told["message"]
    assert told["message"].endswith("; last known: Resources")
    assert waits == {
        "jid": "q",
        "state": "queued",
        "status": "notstarted",
        "engine": "slurm",
        "engine_id": "4711",
        "template": "bare",
        "auid": "cube",
        "image": "image",
        "accepted_at": "2026-01-02T03:04:05+00:00",
        "started_at": None,
        "ended_at": None,
        "generation": 1,
    }
    assert (done["started_at"], done["ended_at"]) == (NOW.isoformat(), NOW.isoformat())
    assert done["message"] == "m"


async def test_a_job_is_shown_with_history_document_and_log(client: Client) -> None:
    body = job_body(entrypoint=["sh"], args=["-c", "echo 'out put'; exit 3"], env=["A=secret"])
    assert (await client.post("/api/v1/", json=body)).status == 201
    job = await ended(client, "chris-jid-1")
    assert [*job] == [*LINE, "cmd", "notes", "history", "document", "log"]
    assert job["state"] == "failed"
    assert (
        job["cmd"] == "sh -c 'echo '\"'\"'out put'\"'\"'; exit 3' /share/incoming /share/outgoing"
    )
    assert [*job["history"][0]] == ["at", "state", "message"]
    states = [event["state"] for event in job["history"]]
    assert (states[0], states[-1]) == ("accepted", "failed")
    assert job["history"][-1]["message"] == job["message"] == "exit code 3"
    assert datetime.fromisoformat(job["history"][0]["at"]).tzinfo
    dry = await (await client.post("/api/v1/?dry_run=true", json=body)).json()
    assert [*job["document"]] == ["text", "language", "template"]
    assert job["document"]["text"].count("\n") == dry["document"].count("\n")
    assert (job["document"]["language"], job["document"]["template"]) == ("sbatch", "bare")
    assert job["log"].endswith("\nout put\n")


@pytest.mark.parametrize("jid", ["nope", "%2e%2e", "a%2Fb", "%00", "%C3%A9", "{jid}"])
async def test_an_unknown_job_is_a_404_that_says_so(client: Client, jid: str) -> None:
    answer = await client.get(URL(f"/jobs/{jid}/", encoded=True))
    assert answer.status == 404
    assert "there is no job" in (await answer.json())["message"]


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        (
            "state=runing",
            {"state": "'runing' is no state; there are: accepted, submitting, queued"},
        ),
        ("state=running&state=", {"state": "'' is no state"}),
        ("limit=0", {"limit": "'0' is no whole number from 1 to 1000"}),
        ("limit=1001", {"limit": "'1001'"}),
        ("limit=-1", {"limit": "'-1'"}),
        ("limit=", {"limit": "''"}),
        ("limit=1e2", {"limit": "'1e2'"}),
        ("limit=%D9%A1", {"limit": "'١'"}),
        ("limit=1&limit=2", {"limit": "more than once"}),
        ("auid=a&auid=b", {"auid": "more than once"}),
        ("stat=running", {"stat": "is unknown; there are: state, auid, limit"}),
        ("x=1&limit=x", {"x": "is unknown", "limit": "'x'"}),
    ],
)
async def test_a_wrong_query_is_a_400_that_names_every_wrong_value(
    client: Client, query: str, wrong: dict[str, str]
) -> None:
    answer = await client.get(f"/jobs/?{query}")
    assert answer.status == 400
    message = (await answer.json())["message"]
    assert message.keys() == wrong.keys()
    assert all(words in message[name] for name, words in wrong.items()), message


async def test_every_call_but_health_needs_the_token(serve: StartServer) -> None:
    client = await serve(api_token="secret")
    with_token = {"Authorization": "Bearer secret"}
    for path in ("/jobs/", "/jobs/x/", "/api/v1/", "/nope/", "/", "/health/x/", "/%68ealth/../x/"):
        url = URL(path, encoded=True)
        answer = await client.get(url)
        assert answer.status == 401, path
        assert (await client.get(url, headers=with_token)).status in {200, 404}
    assert (await client.get("/jobs/", headers=with_token)).status == 200
    assert (await client.get("/health/")).status == 200


async def test_the_operators_calls_only_read(client: Client) -> None:
    for path in ("/jobs/", "/jobs/x/"):
        for method in ("POST", "PUT", "DELETE"):
            assert (await client.request(method, path)).status == 405


async def test_a_list_asks_nothing_of_the_engine(client: Client) -> None:
    await client.post("/api/v1/", json=job_body())
    await ended(client, "chris-jid-1")
    asked: list[str] = []

    def logs(*_: object) -> str:
        asked.append("logs")
        return ""

    for name in ("submit", "find", "observe", "logs", "remove"):
        setattr(client.app[GATEWAY]._driver, name, logs)

    async def shown() -> bool:
        assert (await client.get("/jobs/chris-jid-1/")).status == 200
        return bool(asked)

    assert await listed(client) == (["chris-jid-1"], 1)
    assert asked == []
    await wait_until(shown, 60, "one job's log to be read anew")
