"""Jobs on this machine, through the API and the gateway, down to real processes."""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pman import request
from pman.jobs import Job
from pman.rendering import Renderer
from pman.settings import Settings
from pman.store import Store
from tests.conftest import Client, StartServer, job_body
from tests.e2e.server import Server
from tests.waiting import wait_for, wait_until

SECONDS = 60
"""How long to wait for what takes a moment on an idle machine."""

ENDED = {"finishedSuccessfully", "finishedWithError", "undefined"}


def script_job(script: str, *args: object, **changes: Any) -> dict[str, Any]:
    """A job that runs ``script`` with bash."""
    entrypoint = ["bash", "-c", script, "plugin", *map(str, args)]
    return job_body(entrypoint=entrypoint, type="ts", **changes)


async def post(client: Client, body: Mapping[str, Any]) -> dict[str, Any]:
    answer = await client.post("/api/v1/", json=body)
    job: dict[str, Any] = await answer.json()
    assert answer.status == 201, job
    return job


async def read(client: Client, jid: str = "chris-jid-1") -> dict[str, Any]:
    answer = await client.get(f"/api/v1/{jid}/")
    job: dict[str, Any] = await answer.json()
    assert answer.status == 200, job
    return job


async def wait_status(client: Client, *statuses: str, jid: str = "chris-jid-1") -> dict[str, Any]:
    async def reached() -> dict[str, Any] | None:
        job = await read(client, jid)
        assert job["status"] in statuses or job["status"] not in ENDED, job
        return job if job["status"] in statuses else None

    job = await wait_until(reached, SECONDS, f"{jid} to be {' or '.join(statuses)}")
    assert job is not None
    return job


async def run(client: Client, body: Mapping[str, Any]) -> dict[str, Any]:
    await post(client, body)
    return await wait_status(client, *ENDED)


WAITS = (
    'echo begun; n=0; until [ -e "$1" ] || [ $((n += 1)) -gt 6000 ]; do sleep 0.02; done; echo over'
)
"""A plugin that goes on until the file $1 is there."""


async def test_a_job_reads_its_input_and_leaves_its_output(
    client: Client, settings: Settings
) -> None:
    (settings.storage / "in" / "text").write_text("hello\n")
    posted = await post(
        client,
        job_body(
            entrypoint=["bash", "-c", 'cat "$1/text"; echo err >&2; echo "$A$HOME" > "$2/out"'],
            args=["plugin"],
            env=["A=it's "],
        ),
    )
    assert posted["status"] == "notstarted"
    assert posted["logs"] == ""
    job = await wait_status(client, "finishedSuccessfully")
    assert (settings.storage / "out" / "out").read_text() == f"it's {os.environ['HOME']}\n"
    assert job["message"] == "finished"
    assert job["cmd"].endswith("plugin /share/incoming /share/outgoing")
    assert job["timestamp"]
    assert job["logs"].endswith("hello\nerr\n")


async def test_a_plugin_does_not_get_the_servers_environment(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_TOKEN", "secret-of-the-server")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    job = await run(client, script_job("env"))
    assert job["status"] == "finishedSuccessfully"
    assert "PATH=" in job["logs"]
    assert "secret-of-the-server" not in job["logs"]
    assert "SLURM_JOB_ID" not in job["logs"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", "exit code 3"),
        ("exit 126", "exit code 126: the command can't be executed"),
        ("exec nonesuch", "exit code 127: command not found"),
        ("kill -9 $$", "killed by signal 9 (SIGKILL)"),
        ("kill -TERM $$", "killed by signal 15 (SIGTERM)"),
        ("kill -9 $PPID", "killed by signal 9 (SIGKILL)"),  # the script around it
    ],
)
async def test_how_a_job_failed_is_told(client: Client, script: str, message: str) -> None:
    job = await run(client, script_job(script))
    assert (job["status"], job["message"]) == ("finishedWithError", message)


async def test_a_signal_reaches_the_plugin_and_its_own_exit_code_counts(
    client: Client, settings: Settings
) -> None:
    await post(client, script_job("trap 'echo caught; exit 7' TERM; echo ready; sleep 60 & wait"))

    async def ready() -> bool:
        return "ready" in (await read(client))["logs"]

    await wait_until(ready, SECONDS, "the plugin to be ready")
    (owner,) = settings.jobs_folder.glob("*/lock/owner")
    os.kill(int(owner.read_text()), signal.SIGTERM)
    job = await wait_status(client, "finishedWithError")
    assert job["message"] == "exit code 7"
    assert job["logs"].endswith("caught\n")


async def test_the_log_can_be_read_while_the_job_runs(client: Client, tmp_path: Path) -> None:
    await post(client, script_job(WAITS, tmp_path / "go"))

    async def seen() -> bool:
        job = await read(client)
        return job["status"] == "started" and str(job["logs"]).endswith("begun\n")

    await wait_until(seen, SECONDS, "the first line of the log")
    (tmp_path / "go").touch()
    assert (await wait_status(client, "finishedSuccessfully"))["logs"].endswith("over\n")


@pytest.mark.parametrize(("tail", "logs"), [(0, ""), (2, "4\n5\n")])
async def test_no_more_lines_of_log_than_asked(serve: StartServer, tail: int, logs: str) -> None:
    client = await serve(job_logs_tail=tail)
    assert (await run(client, script_job("seq 5")))["logs"] == logs


async def test_a_log_that_is_no_text_can_be_read(client: Client) -> None:
    logs = (await run(client, script_job(r"printf 'a\xff\0b\033[0m'")))["logs"]
    assert logs.endswith("a\ufffd\0b\x1b[0m")


async def test_several_workers_are_refused_with_the_reason(client: Client) -> None:
    job = await run(client, job_body(number_of_workers=2))
    assert job["status"] == "finishedWithError"
    assert job["message"] == "local runs one worker, and the job asks for 2"
    assert job["timestamp"]


@pytest.mark.parametrize("field", ["input", "output"])
async def test_a_missing_folder_is_told_and_nothing_runs(
    client: Client, settings: Settings, field: str
) -> None:
    job = await run(client, job_body(entrypoint=["touch"], **{f"{field}_dir": "no such"}))
    assert job["status"] == "finishedWithError"
    assert f"the {field} folder {settings.storage}/no such is not on the node" in job["message"]


async def test_a_failed_job_is_run_again_and_a_finished_one_is_not(
    client: Client, settings: Settings
) -> None:
    body = script_job('echo run >> "$1/runs"; [ -e "$1/allowed" ]')
    runs, allowed = (settings.storage / "out" / name for name in ("runs", "allowed"))
    assert (await run(client, body))["status"] == "finishedWithError"
    allowed.touch()
    assert (await run(client, body))["status"] == "finishedSuccessfully"
    assert (await post(client, body))["status"] == "finishedSuccessfully"
    assert runs.read_text() == "run\n" * 2


# --- delete ---


async def delete(client: Client, jid: str = "chris-jid-1") -> None:
    assert (await client.delete(f"/api/v1/{jid}/")).status == 204


def folders(settings: Settings) -> list[Path]:
    return [*settings.jobs_folder.iterdir()] if settings.jobs_folder.exists() else []


async def gone(client: Client, settings: Settings) -> None:
    assert (await client.get("/api/v1/chris-jid-1/")).status == 404

    async def nothing_left() -> bool:
        return not folders(settings)

    await wait_until(nothing_left, SECONDS, "the job's folder to go")


async def test_deleting_a_running_job_ends_it(
    client: Client, settings: Settings, tmp_path: Path
) -> None:
    await post(client, script_job('echo $$ > "$2"; ' + WAITS, tmp_path / "go", tmp_path / "pid"))
    await wait_status(client, "started")

    async def pid_written() -> str:
        return (tmp_path / "pid").read_text() if (tmp_path / "pid").exists() else ""

    pid = int(await wait_until(pid_written, SECONDS, "the plugin's pid"))
    await delete(client)
    await gone(client, settings)

    async def ended() -> bool:
        return not alive(pid)

    await wait_until(ended, SECONDS, "the plugin to end")


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


async def test_deleting_a_finished_job_removes_what_is_its_own(
    client: Client, settings: Settings
) -> None:
    await run(client, script_job('touch "$1/kept"'))
    assert len(folders(settings)) == 1
    await delete(client)
    await gone(client, settings)
    assert (settings.storage / "out" / "kept").exists()


async def test_deleting_a_job_that_was_just_posted_leaves_nothing(
    client: Client, settings: Settings, tmp_path: Path
) -> None:
    for _ in range(10):  # wherever the submission is just then
        await post(client, script_job(WAITS, tmp_path / "go"))
        await delete(client)
    await gone(client, settings)
    assert not processes_about(tmp_path)


def processes_about(place: Path) -> list[Path]:
    commands = Path("/proc").glob("[0-9]*/cmdline")
    return [path for path in commands if str(place).encode() in content(path)]


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


async def test_after_a_delete_the_jid_can_be_used_for_another_job(client: Client) -> None:
    assert (await run(client, script_job("echo first")))["logs"].endswith("first\n")
    await delete(client)
    assert (await run(client, script_job("echo second")))["logs"].endswith("second\n")


async def test_with_remove_jobs_no_nothing_is_removed(
    serve: StartServer, settings: Settings
) -> None:
    client = await serve(remove_jobs=False)
    await run(client, script_job("echo kept"))
    await delete(client)
    assert (await read(client))["logs"].endswith("kept\n")
    assert len(folders(settings)) == 1


# --- crashes ---


def serve_until_started(
    values: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]], log: Path
) -> None:
    """A server of its own that takes the jobs and is killed once they run."""
    server = Server({name.upper(): str(value) for name, value in values.items()}, log)
    server.start()
    try:
        for body in jobs:
            server.post(body)
        for body in jobs:
            server.wait_status(body["jid"], "started")
    finally:
        server.stop(kill=True)


async def test_jobs_outlive_a_killed_server_and_the_next_one_finds_them(
    serve: StartServer, values: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    first, second = (script_job(WAITS, tmp_path / jid, jid=jid) for jid in ("first", "second"))
    serve_until_started(values, [first, second], tmp_path / "pman.log")
    (tmp_path / "first").touch()
    (folder,) = settings.jobs_folder.glob("first.*")
    wait_for((folder / "exit").exists, SECONDS, "the first job to end without a server")
    client = await serve()
    assert (await wait_status(client, "finishedSuccessfully", jid="first"))["logs"].endswith(
        "over\n"
    )
    assert (await read(client, "second"))["status"] == "started"
    (tmp_path / "second").touch()
    assert (await wait_status(client, "finishedSuccessfully", jid="second"))["logs"].endswith(
        "over\n"
    )


def crashed_while_submitting(settings: Settings, body: Mapping[str, Any]) -> Job:
    """What a server leaves that died between its note that it will submit and the answer."""
    spec = request.parse(json.dumps(body).encode()).spec(settings)
    document = Renderer().render(spec, "sbatch", "bare")
    content = request.parse(json.dumps(body).encode()).content
    store = Store(settings.state_dir)
    job = store.add(Job(spec, document, content, "local"))
    store.claim([job])
    store.close()
    return job


RUNS_ONCE = 'echo run >> "$1/runs"'


def start_by_hand(job: Job) -> subprocess.Popen[bytes]:
    folder = Path(job.spec.folder)
    folder.mkdir(parents=True)
    (folder / "script").write_text(job.document.text)
    script = subprocess.Popen(["bash", folder / "script"], cwd=folder)
    wait_for((folder / "lock" / "owner").exists, SECONDS, "the script to take the lock")
    return script


@pytest.mark.parametrize("ended", [True, False])
async def test_a_job_whose_start_was_not_noted_is_not_started_twice(
    serve: StartServer, settings: Settings, tmp_path: Path, ended: bool
) -> None:
    go = tmp_path / "go"
    body = script_job(f'echo run >> "$2/runs"; {WAITS}', go)
    script = start_by_hand(crashed_while_submitting(settings, body))
    if ended:
        go.touch()
        script.wait()
    client = await serve()
    if not ended:
        await wait_status(client, "started")
        go.touch()
    await wait_status(client, "finishedSuccessfully")
    script.wait()
    assert (settings.storage / "out" / "runs").read_text() == "run\n"


async def test_a_job_that_was_not_started_before_the_crash_is_started(
    serve: StartServer, settings: Settings
) -> None:
    body = script_job(RUNS_ONCE)
    crashed_while_submitting(settings, body)
    client = await serve()
    await wait_status(client, "finishedSuccessfully")
    assert (settings.storage / "out" / "runs").read_text() == "run\n"


def test_a_script_that_is_started_twice_runs_the_plugin_once(settings: Settings) -> None:
    body = script_job(RUNS_ONCE)
    spec = request.parse(json.dumps(body).encode()).spec(settings)
    folder = Path(spec.folder)
    folder.mkdir(parents=True)
    document = Renderer().render(spec, "sbatch", "bare").text
    (folder / "script").write_text(document)
    starts = [subprocess.Popen(["bash", folder / "script"], stderr=subprocess.PIPE)
              for _ in range(8)]  # fmt: skip
    words = [start.communicate(timeout=SECONDS)[1] for start in starts]
    assert sorted(start.returncode for start in starts) == [0] + [1] * 7
    assert sum(b"has been started as another one before" in said for said in words) == 7
    assert (settings.storage / "out" / "runs").read_text() == "run\n"
    assert (folder / "exit").read_text().split()[0] == "0"
