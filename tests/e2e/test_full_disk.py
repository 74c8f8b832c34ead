"""STATE_DIR's disk is full, while a real `pman serve` runs and when it starts."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import END, Server, shell
from tests.full_disk import no_room_beyond
from tests.waiting import wait_for

FRAME = 4096 + 24
"""Bytes of a page in SQLite's WAL (https://sqlite.org/fileformat2.html#the_write_ahead_log)."""

RUNS = 'echo ran >> "$1/ran"'
RUNS_UNTIL_GO = (
    f'{RUNS}; n=0; until [ -e "$0/go" ] || [ $((n += 1)) -gt 2400 ]; do sleep 0.05; done'
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    for name in ("store/in", "store/out"):
        (tmp_path / name).mkdir(parents=True)
    settings = {
        "CONTAINER_ENV": "local",
        "STOREBASE": str(tmp_path / "store"),
        "STATE_DIR": str(tmp_path / "state"),
        "POLL_INTERVAL": "0.1",
    }
    with Server(settings, tmp_path / "pman.log") as running:
        yield running


def written(server: Server) -> int:
    """The size of the file that each commit grows."""
    return Path(server.settings["STATE_DIR"], "pman.sqlite-wal").stat().st_size


def folder(server: Server, jid: str) -> str:
    """An output folder for one job."""
    Path(server.settings["STOREBASE"], jid).mkdir()
    return jid


def runs(server: Server, jid: str) -> int:
    ran = Path(server.settings["STOREBASE"], jid, "ran")
    return ran.read_text().count("ran") if ran.exists() else 0


def complaints(server: Server, loop: str = "") -> int:
    """How often a loop has told that it can't write."""
    return server.log.read_text().count(f"{loop}: STATE_DIR ")


def test_a_full_disk_is_told_and_all_goes_on_when_there_is_room(server: Server) -> None:
    server.post(shell("early", RUNS_UNTIL_GO, output_dir=folder(server, "early")))
    server.wait_status("early", "started")
    late = shell("late", RUNS, output_dir=folder(server, "late"))
    words = f"STATE_DIR {server.settings['STATE_DIR']} can't be used now: "
    with no_room_beyond(written(server), server.pid):
        for call in (("POST", "/api/v1/", late), ("DELETE", "/api/v1/early/")):
            status, answer = server.call(*call)
            assert status == 503
            assert answer["message"].startswith(words)
            assert answer["message"].endswith("has room and can be written, then try again")
        Path(server.settings["STOREBASE"], "in", "go").touch()
        wait_for(lambda: complaints(server, "watch") > 1, 60, "the loop to go on trying")
        assert server.get("early")["status"] == "started"
        assert server.call("GET", "/api/v1/late/")[0] == 404
        assert server.call("GET", "/health/")[0] == 200
    assert server.wait_end("early")["status"] == "finishedSuccessfully"
    server.post(late)
    assert server.wait_end("late")["status"] == "finishedSuccessfully"
    assert (runs(server, "early"), runs(server, "late")) == (1, 1)
    server.delete("early")
    assert "Traceback" not in server.log.read_text()


def test_a_job_runs_once_wherever_the_room_ended(server: Server) -> None:
    """The room ends after each page that a job's way through the database writes."""
    states = set()
    for pages in range(40):
        if pages % 10 == 0:  # or SQLite begins its file anew, and writes where there is room
            server.stop()
            server.start()
            server.post(shell(f"first-{pages}", "true", output_dir=folder(server, f"a-{pages}")))
            server.wait_end(f"first-{pages}")
        jid = f"j-{pages}"
        body = shell(jid, RUNS, output_dir=folder(server, jid))
        before = complaints(server)
        with no_room_beyond(written(server) + pages * FRAME, server.pid):
            status, _ = server.call("POST", "/api/v1/", body)
            if status == 201:

                def stuck_or_over(jid: str = jid, before: int = before) -> bool:
                    return complaints(server) > before or server.get(jid)["status"] in END

                wait_for(stuck_or_over, 60, "the job to end, or its way")
                states.add(server.call("GET", f"/jobs/{jid}/")[1]["state"])
        if status != 201:
            assert status == 503
            assert runs(server, jid) == 0
            server.post(body)
            states.add("refused")
        assert server.wait_end(jid)["status"] == "finishedSuccessfully"
        assert runs(server, jid) == 1
    assert {"refused", "accepted"} < states, "the room ended at hardly any of a job's steps"
    assert states & {"queued", "running"}
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("first", [True, False])
def test_a_server_does_not_start_on_a_full_disk_and_says_so(
    server: Server, tmp_path: Path, first: bool
) -> None:
    server.stop()
    state = tmp_path / "new" if first else Path(server.settings["STATE_DIR"])
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 0; exec {sys.executable} -m pman serve --port 0"],
        env={**server.settings, "STATE_DIR": str(state)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        f"pman: STATE_DIR {state} can't be used now: .*; see that its disk has room .*\n",
        done.stderr,
    )
    server.start()
