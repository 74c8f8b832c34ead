"""SSH_HOST empty: the same commands, on this machine."""

from pathlib import Path

import pytest

from tests.e2e.server import Server, shell
from tests.e2e.site import Site
from tests.waiting import wait_for

pytestmark = pytest.mark.lab


def test_slurm_without_ssh(plain_site: Site, tmp_path: Path) -> None:
    lab = plain_site.lab
    logins = lab.connections()
    settings = plain_site.settings(tmp_path, SLURM_CONF=str(lab.slurm_conf))
    for name in list(settings):
        if name.startswith("SSH_"):
            del settings[name]
    with Server(settings, tmp_path / "pman.log") as server:
        server.post(shell("here", "echo here; exit 3"))
        ended = server.wait_end("here")
        assert (ended["message"], ended["logs"]) == ("exit code 3", "here\n")
        server.post(shell("gone", "sleep 600"))
        server.wait_status("gone", "started")
        server.delete("gone")
        wait_for(
            lambda: "gone." not in lab.run("squeue", "-h", "-o", "%j").stdout, 30, "scancel's work"
        )
    assert lab.connections() == logins


def test_account_without_slurm_says_so_and_the_job_waits(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path, SSH_SHELL="env PATH=/bin/nowhere /bin/bash") as server:
        server.post(shell("early", "true"))
        found = server.wait_message("early", "; last known:")
        assert found["status"] == "notstarted"
        assert " since " in found["message"]
        assert "command not found" in server.call("GET", "/health/")[1]["outage"]["reason"]
