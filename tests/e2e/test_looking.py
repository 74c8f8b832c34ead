"""`pman jobs` and `pman job` as people run them: against a real `pman serve`, piped and on a
terminal."""

import asyncio
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from aiohttp import web

from pman.jobs import Document, JobState
from pman.store import Store
from tests.conftest import Client, StartServer, job_body
from tests.e2e.server import Server, shell
from tests.test_store import make_job
from tests.waiting import wait_for

PMAN = (sys.executable, "-m", "pman")
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7]m")

HOSTILE = "\x1b]0;owned\x07"
"""Gives a terminal another title."""

UNTIL_GO = (
    'n=0; until [ -e "$0/go" ] || [ $((n += 1)) -gt 2400 ]; do sleep 0.05; done; '
    'printf "caf\\303\\251 \\033[31m\\n"; exit 3'
)
"""A job that waits for the file ``go`` in its input folder."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("store/in", "store/out"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(settings(folder), folder / "pman.log") as running:
        yield running


@pytest.fixture(scope="module")
def of_all_states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a job in each state, which it leaves as it is: they are another engine's."""
    folder = tmp_path_factory.mktemp("states")
    store = Store(folder / "state")
    for state in JobState:
        job = make_job(f"j-{state}", state=state, engine="slurm", engine_id="4711")
        store.add(replace(job, message=HOSTILE, document=Document(HOSTILE, "sbatch", "bare")))
    store.close()
    with Server(settings(folder), folder / "pman.log") as running:
        yield running


def settings(folder: Path) -> Mapping[str, str]:
    return {
        "CONTAINER_ENV": "local",
        "STOREBASE": str(folder / "store"),
        "STATE_DIR": str(folder / "state"),
        "POLL_INTERVAL": "0.1",
    }


def environment(server: Server | None, **changes: str) -> Mapping[str, str]:
    url = {"PMAN_URL": f"http://127.0.0.1:{server.port}"} if server else {}
    return {"PATH": os.environ["PATH"], "TERM": "xterm-256color", **url, **changes}


def pman(
    server: Server | None, *args: str, cwd: Path | None = None, **changes: str
) -> subprocess.CompletedProcess[str]:
    """One command, its output piped."""
    return subprocess.run(
        [*PMAN, *args],
        cwd=cwd or (server.log.parent if server else None),
        env=environment(server, **changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        check=False,
    )


class Piped:
    """A command that goes on, its output piped into files."""

    def __init__(self, server: Server, *args: str) -> None:
        self._files = [server.log.parent / name for name in ("watch.out", "watch.err")]
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(
                [*PMAN, *args],
                cwd=server.log.parent,
                env=environment(server),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait(60)

    @property
    def out(self) -> str:
        return self._files[0].read_text()

    @property
    def err(self) -> str:
        return self._files[1].read_text()

    def wait_out(self, words: str) -> None:
        wait_for(lambda: words in self.out, 60, f"{words!r} on stdout")

    def wait_err(self, words: str) -> None:
        wait_for(lambda: words in self.err, 60, f"{words!r} on stderr")


class Terminal:
    """A command on a terminal of 100 columns and 30 lines."""

    def __init__(self, server: Server, *args: str, **changes: str) -> None:
        pid, self._master = pty.fork()
        if pid == 0:
            os.chdir(server.log.parent)
            termios.tcsetwinsize(0, (30, 100))
            os.execve(PMAN[0], [*PMAN, *args], environment(server, **changes))
        self.pid = pid
        self.text = ""
        self._patience = time.monotonic() + 100

    def read(self) -> bool:
        """Whether there may be more."""
        left = max(0, self._patience - time.monotonic())
        if not select.select([self._master], [], [], left)[0] or not left:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise AssertionError(f"it goes on: {self.text}")
        try:
            found = os.read(self._master, 65536)
        except OSError:  # EIO: the command has ended (pty(7))
            return False
        self.text += found.decode(errors="replace")
        return bool(found)

    def wait(self, words: str) -> None:
        while words not in self.text:
            assert self.read(), f"it ended without {words!r}: {self.text}"

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def end(self) -> int:
        """Its exit code, once it has ended."""
        while self.read():
            pass
        os.close(self._master)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def columns(text: str) -> Sequence[Sequence[str]]:
    return [line.split(maxsplit=6) for line in text.splitlines()]


# --- piped ---


def test_jobs_of_all_states_are_a_line_each(of_all_states: Server) -> None:
    done = pman(of_all_states, "jobs")
    assert (done.returncode, done.stderr) == (0, "")
    header, *rows = columns(done.stdout)
    assert header == ["JID", "STATE", "ID", "TEMPLATE", "AGE", "RUN", "MESSAGE"]
    assert [row[:4] for row in rows] == [
        [f"j-{state}", str(state), "4711", "bare"] for state in reversed(JobState)
    ]
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
    running = next(row for row in rows if row[1] == "running")
    assert running[-1].endswith(r"this one is on slurm; last known: \x1b]0;owned\x07")


def test_a_list_is_cut_and_chosen(of_all_states: Server) -> None:
    cut = pman(of_all_states, "jobs", "--limit", "3").stdout.splitlines()
    assert (len(cut), cut[-1]) == (5, "3 of 8 jobs")
    chosen = pman(of_all_states, "jobs", "--state", "lost", "--state", "failed").stdout
    assert [row[0] for row in columns(chosen)[1:]] == ["j-lost", "j-failed"]
    assert pman(of_all_states, "jobs", "--auid", "nobody").stdout == "no jobs\n"


def test_json_is_the_servers_answer(of_all_states: Server) -> None:
    for args, path in (
        (["jobs", "--limit", "2"], "/jobs/?limit=2"),
        (["job", "j-lost"], "/jobs/j-lost/"),
    ):
        done = pman(of_all_states, *args, "--json")
        assert json.loads(done.stdout) == of_all_states.call("GET", path)[1]


@pytest.mark.parametrize("state", JobState)
def test_a_job_of_any_state_is_shown(of_all_states: Server, state: JobState) -> None:
    done = pman(of_all_states, "job", f"j-{state}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"state     {state} ({state.chris})\nmessage   ")
    assert "engine    slurm, id 4711\n" in done.stdout


def test_a_job_is_shown_with_all_that_happened_and_its_log_last(server: Server) -> None:
    (server.log.parent / "store/in/go").touch()
    server.post(shell("j", UNTIL_GO))
    server.wait_end("j")
    done = pman(server, "job", "/j")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["state     failed (finishedWithError)", "message   exit code 3"]
    assert lines[-1] == r"café \x1b[31m"
    for words in ("submitting  being submitted", "#SBATCH --job-name=j.", "user      cube"):
        assert words in done.stdout
    assert "\x1b" not in done.stdout
    plain = pman(server, "job", "j", PYTHONIOENCODING="ascii")
    assert (plain.returncode, plain.stdout.splitlines()[-1]) == (0, r"caf\xe9 \x1b[31m")


def test_the_document_alone_is_what_was_sent(server: Server) -> None:
    server.post(shell("j", "echo é"))
    done = pman(server, "job", "j", "--document", PYTHONIOENCODING="ascii")
    assert done.stdout == server.call("GET", "/jobs/j/")[1]["document"]["text"]
    assert "é" in done.stdout


async def test_a_document_that_is_no_utf_8_is_written_all_the_same(
    client: Client, aiohttp_server: Any, folder: Path
) -> None:
    await client.post("/api/v1/", json=job_body(jid="j"))
    body = await (await client.get("/jobs/j/")).json()
    body["document"]["text"] = "é \ud800\n"

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(body)

    foreign = web.Application()
    foreign.router.add_get("/jobs/j/", answer)
    url = str((await aiohttp_server(foreign)).make_url("/"))
    done = await asyncio.to_thread(pman, None, "job", "j", "--document", "--url", url, cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "é \\ud800\n", "")


def test_a_reader_that_leaves_early_is_no_error_to_tell(server: Server) -> None:
    with subprocess.Popen(
        [*PMAN, "jobs"],
        env=environment(server),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


# --- errors ---


def test_an_error_is_one_line_on_stderr_and_exit_code_1(server: Server, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.port}"
    for args, words in (
        (["job", "nope"], "there is no job nope"),
        (["job", "nope", "--watch"], "there is no job nope"),
        (["jobs", "--url", f"{url}/health"], f"{url}/health is no pman of this version"),
        (["jobs", "--url", "nonsense"], "PMAN_URL has the value 'nonsense'"),
    ):
        done = pman(server, *args)
        assert (done.returncode, done.stdout) == (1, ""), args
        assert done.stderr.startswith(f"pman: {words}")
        assert done.stderr.count("\n") == 1
    server.stop()
    for args in (["jobs"], ["job", "j", "--watch"]):
        done = pman(server, *args)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"pman: no pman answers at {url}: Connection refused; ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["jobs", "--state", "runing"], "'running'"),
        (["jobs", "--limit", "0"], "--limit"),
        (["job", ""], "the jid is empty"),
        (["job", "j", "--document", "--watch"], "--document goes without"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_asked(args: list[str], words: str) -> None:
    done = pman(None, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


async def test_the_token_comes_from_the_folders_env_file(serve: StartServer, folder: Path) -> None:
    client: Client = await serve(api_token="sécret")
    url = f"http://127.0.0.1:{client.port}"
    refused = await asyncio.to_thread(pman, None, "jobs", "--url", url, cwd=folder)
    assert (refused.returncode, refused.stderr) == (
        1,
        f"pman: {url} wants a token: set API_TOKEN, in the environment or in .env\n",
    )
    (folder / ".env").write_text("API_TOKEN=sécret\n")
    done = await asyncio.to_thread(pman, None, "jobs", "--url", url, cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "no jobs\n", "")


# --- watched ---


def test_a_watched_job_is_a_line_for_each_change_until_it_has_ended(server: Server) -> None:
    server.post(shell("j", UNTIL_GO))
    with Piped(server, "job", "j", "--watch") as watching:
        watching.wait_out(" running ")
        (server.log.parent / "store/in/go").touch()
        assert watching.process.wait(60) == 0
        rows = columns(watching.out)
        assert rows[0][0] == "JID"
        assert rows[-1][1] == "failed"
        assert rows[-1][-1] == "exit code 3"
        states = [row[1] for row in rows[1:]]
        assert len(states) == len(set(states)), watching.out
        assert watching.err == ""


def test_with_json_each_change_is_an_object_on_a_line(server: Server) -> None:
    server.post(shell("j", UNTIL_GO))
    server.wait_status("j", "started")
    with Piped(server, "job", "j", "--watch", "--json") as watching:
        watching.wait_out("\n")
        (server.log.parent / "store/in/go").touch()
        assert watching.process.wait(60) == 0
        objects = [json.loads(line) for line in watching.out.splitlines()]
    assert [told["state"] for told in objects][:: len(objects) - 1] == ["running", "failed"]
    assert objects[-1] == server.call("GET", "/jobs/j/")[1]
    assert all(one != other for one, other in itertools.pairwise(objects))


@pytest.mark.parametrize("as_json", [False, True])
def test_of_watched_jobs_only_those_that_changed_are_told(server: Server, as_json: bool) -> None:
    server.post(shell("stays", "sleep 600"))
    server.post(shell("ends", UNTIL_GO))
    for jid in ("stays", "ends"):
        server.wait_status(jid, "started")

    def told(text: str) -> list[tuple[str, str]]:
        if as_json:
            return [(job["jid"], job["state"]) for job in map(json.loads, text.splitlines())]
        return [(row[0], row[1]) for row in columns(text)[1:]]

    with Piped(server, "jobs", "--watch", *["--json"] * as_json) as watching:
        watching.wait_out("stays")
        (server.log.parent / "store/in/go").touch()
        watching.wait_out("failed")
        server.post(shell("new", "sleep 600"))
        watching.wait_out("new")
        found = told(watching.out)
        assert found[:3] == [("ends", "running"), ("stays", "running"), ("ends", "failed")]
        assert {jid for jid, _ in found[3:]} == {"new"}
        watching.process.send_signal(signal.SIGINT)
        assert watching.process.wait(60) == 130
        assert watching.err == ""
    for jid in ("stays", "new"):
        server.delete(jid)
    wait_for(lambda: not server.call("GET", "/health/")[1]["removing"], 60, "the jobs to end")


def test_a_server_that_goes_away_is_told_and_waited_for(server: Server) -> None:
    server.post(shell("j", UNTIL_GO))
    with Piped(server, "job", "j", "--watch") as watching:
        watching.wait_out(" running ")
        server.stop()
        watching.wait_err("asking again every 2 s")
        (server.log.parent / "store/in/go").touch()
        server.start()
        assert watching.process.wait(60) == 0
        away, back = watching.err.splitlines()
        assert away.startswith(f"pman: no pman answers at http://127.0.0.1:{server.port}: ")
        assert back == "pman: the server answers again"
        assert columns(watching.out)[-1][1] == "failed"


# --- on a terminal ---


def test_colours_are_for_a_terminal_and_only_there(of_all_states: Server) -> None:
    shown = Terminal(of_all_states, "jobs")
    assert shown.end() == 0
    assert COLOUR.search(shown.text)
    assert all(f"j-{state}" in shown.text for state in JobState)
    without = Terminal(of_all_states, "jobs", NO_COLOR="1")
    assert without.end() == 0
    assert not COLOUR.search(without.text)
    dumb = Terminal(of_all_states, "jobs", TERM="dumb")
    assert dumb.end() == 0
    assert "\x1b" not in dumb.text
    for args in (["jobs"], ["job", "j-failed"]):
        assert "\x1b" not in pman(of_all_states, *args, FORCE_COLOR="1").stdout


@pytest.mark.parametrize("args", [["jobs"], ["job", "j-failed"], ["job", "j-failed", "--document"]])
def test_nothing_of_a_job_gives_the_terminal_commands(
    of_all_states: Server, args: list[str]
) -> None:
    shown = Terminal(of_all_states, *args)
    assert shown.end() == 0
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown.text).replace("\r\n", "").isprintable()
    assert r"\x1b]0;owned\x07" in shown.text


def test_a_job_watched_on_a_terminal_is_shown_whole_when_it_has_ended(server: Server) -> None:
    server.post(shell("j", UNTIL_GO))
    server.wait_status("j", "started")
    shown = Terminal(server, "job", "j", "--watch")
    shown.wait("running")
    shown.wait("history")
    assert "#SBATCH" not in shown.text
    (server.log.parent / "store/in/go").touch()
    assert shown.end() == 0
    *_, last = shown.text.split("\x1b[?25h")  # the cursor is there again
    assert "\x1b[1A\x1b[2K" in last  # and what was watched is gone
    assert "#SBATCH --job-name=j." in last
    assert last.rstrip().endswith(r"café \x1b[31m")


@pytest.mark.parametrize("args", [["jobs", "--watch"], ["job", "j-running", "--watch"]])
def test_control_c_ends_watching_quietly(of_all_states: Server, args: list[str]) -> None:
    shown = Terminal(of_all_states, *args)
    shown.wait("j-running")
    shown.press("\x03")
    assert shown.end() == 130
    assert "Traceback" not in shown.text
    assert "Aborted" not in shown.text
    assert "\x1b[?25h" in shown.text


def test_a_server_that_goes_away_is_told_on_the_terminal_too(of_all_states: Server) -> None:
    shown = Terminal(of_all_states, "jobs", "--watch")
    shown.wait("j-accepted")
    of_all_states.stop()
    shown.wait("asking again every 2 s")
    assert "j-accepted" in shown.text.split("asking again every 2 s")[-2]
    of_all_states.start()
    seen = len(shown.text)
    while "JID" not in shown.text[seen:]:
        assert shown.read()
    shown.press("\x03")
    assert shown.end() == 130
