"""Nothing is lost, run twice or ended wrongly through crashes and outages."""

import time
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.server import Server, shell
from tests.e2e.site import Site
from tests.e2e.test_endings import logged
from tests.waiting import wait_for

pytestmark = pytest.mark.lab


def counting(jid: str, runs: Path, program: str = "true") -> dict[str, object]:
    """A job that leaves a line in ``runs`` each time it is run."""
    return shell(jid, f"echo {jid} >> {runs}; {program}")


def all_ended(server: Server, jids: list[str], timeout: float = 120) -> dict[str, str]:
    return {jid: server.wait_end(jid, timeout=timeout)["status"] for jid in jids}


def ran_once(runs: Path, jids: list[str]) -> None:
    assert Counter(runs.read_text().split()) == dict.fromkeys(jids, 1)


def test_many_at_once_run_once_each_with_few_calls(plain_site: Site, tmp_path: Path) -> None:
    lab = plain_site.lab
    runs = plain_site.folder("runs") / "many"
    jids = [f"many-{number}" for number in range(300)]
    lab.clear_calls()
    logins = lab.connections()
    began = time.monotonic()
    with plain_site.server(tmp_path, POLL_INTERVAL="2") as server:
        for jid in jids:
            server.post(counting(jid, runs))
        assert set(all_ended(server, jids, 180).values()) == {"finishedSuccessfully"}
        looks = server.log.read_text()
    ran_once(runs, jids)
    calls = Counter(argv[0] for argv in lab.calls())
    assert lab.connections() - logins <= 2
    assert calls["sbatch"] == 300
    assert "engine is away" not in looks
    # One look a tick, whatever the number of jobs; and one more when the first job arrived.
    assert calls["squeue"] <= (time.monotonic() - began) / 2 + 1
    assert calls["sacct"] <= 2
    assert set(calls) <= {"sbatch", "squeue", "sacct"}


@pytest.mark.parametrize("service", ["sshd", "slurmctld"])
def test_outage_changes_nothing(plain_site: Site, tmp_path: Path, service: str) -> None:
    """The service is away while a job runs to its end, another runs on, and a third arrives."""
    lab = plain_site.lab
    runs = plain_site.folder("runs") / f"outage-{service}"
    go = plain_site.folder("go") / f"outage-{service}"
    until = f"until [ -e {go} ]; do sleep .1; done"
    with plain_site.server(tmp_path) as server:
        server.post(counting("over", runs, f"{until}; exit 4"))
        server.post(counting("on", runs, f"{until}; sleep 15"))
        server.wait_status("over", "started")
        server.wait_status("on", "started")
        lab.stop_service(service)
        try:
            server.post(counting("new", runs))
            go.touch()
            away = server.wait_message("on", "; last known: running on node")["message"]
            assert away.startswith(
                ("login node 127.0.0.1 unreachable since ", "squeue does not answer on 127.0.0.1 ")
            )
            seen = {jid: server.get(jid)["status"] for jid in ("over", "on", "new")}
            assert seen == {"over": "started", "on": "started", "new": "notstarted"}
            # 20 s of silence, in which every answer must stay what it was
            with pytest.raises(TimeoutError):
                wait_for(
                    lambda: seen != {jid: server.get(jid)["status"] for jid in seen},
                    20,
                    "a status to change",
                    every=0.5,
                )
        finally:
            lab.start_service(service)
        assert all_ended(server, ["over", "on", "new"]) == {
            "over": "finishedWithError",
            "on": "finishedSuccessfully",
            "new": "finishedSuccessfully",
        }
        assert server.get("over")["message"] == "exit code 4"
        ran_once(runs, ["over", "on", "new"])


def test_server_killed_while_jobs_are_sent(plain_site: Site, tmp_path: Path) -> None:
    runs = plain_site.folder("runs") / "crash"
    jids = [f"crash-{number}" for number in range(40)]
    with plain_site.server(tmp_path) as server:
        for jid in jids:
            server.post(counting(jid, runs))
        wait_for(
            lambda: any(argv[0] == "sbatch" for argv in plain_site.lab.calls()),
            30,
            "the first sbatch",
        )
        server.stop(kill=True)
        server.start()
        assert set(all_ended(server, jids).values()) == {"finishedSuccessfully"}
    ran_once(runs, jids)


def test_line_lost_while_jobs_are_sent(plain_site: Site, tmp_path: Path) -> None:
    runs = plain_site.folder("runs") / "lost-line"
    jids = [f"lost-line-{number}" for number in range(40)]
    lab = plain_site.lab
    lab.clear_calls()
    with plain_site.server(tmp_path) as server:
        for jid in jids:
            server.post(counting(jid, runs))
        wait_for(lambda: any(argv[0] == "sbatch" for argv in lab.calls()), 30, "the first sbatch")
        lab.stop_service("sshd")
        lab.start_service("sshd")
        assert set(all_ended(server, jids).values()) == {"finishedSuccessfully"}
    ran_once(runs, jids)


@pytest.mark.parametrize("kind", ["with accounting", "without accounting"])
def test_ended_and_forgotten_while_the_server_was_down(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    """squeue has forgotten the jobs (MinJobAge) when the server comes back."""
    name = "accounting_site" if kind == "with accounting" else "forgetful_site"
    site: Site = request.getfixturevalue(name)
    go = site.folder("go") / "forgotten"
    until = f"until [ -e {go} ]; do sleep .1; done"
    with site.server(tmp_path) as server:
        server.post(shell("well", f"echo began; {until}"))
        server.post(shell("badly", f"echo began; {until}; exit 7"))
        server.post(shell("cut", "echo began; sleep 600"))
        server.post(shell("never", "echo began; sleep 600"))
        for jid in ("well", "badly", "cut", "never"):
            # a job that is cancelled before its script began leaves nothing behind to be found
            logged(server, jid, "began")
        server.stop()
        go.touch()
        site.lab.run("scancel", *numbers(site, "cut"))
        late = numbers(site, "never")
        site.lab.run("scontrol", "update", f"jobid={late[0]}", "EndTime=now")
        wait_for(
            lambda: not site.lab.run("squeue", "-h", "-t", "all").stdout, 90, "squeue to be empty"
        )
        server.start()
        ends = {jid: server.wait_end(jid) for jid in ("well", "badly", "cut", "never")}
        assert ends["well"]["message"] == "finished"
        assert ends["badly"]["message"] == "exit code 7"
        assert ends["cut"]["message"].startswith("cancelled on the cluster")
        assert ends["never"]["message"].startswith("time limit")
        assert [end["status"] for end in ends.values()] == [
            "finishedSuccessfully",
            *["finishedWithError"] * 3,
        ]


def numbers(site: Site, jid: str) -> list[str]:
    """The Slurm ids of a ChRIS job."""
    rows = site.lab.run("squeue", "-h", "-o", "%i %j").stdout.splitlines()
    return [row.split()[0] for row in rows if row.split()[1].startswith(f"{jid}.")]


def test_accounting_away_is_no_end(accounting_site: Site, tmp_path: Path) -> None:
    """squeue has forgotten the job and slurmdbd is down: its exit file tells."""
    lab = accounting_site.lab
    with accounting_site.server(tmp_path) as server:
        server.post(shell("patient", "sleep 2; exit 5"))
        server.wait_status("patient", "started")
        lab.stop_service("slurmdbd")
        try:
            server.stop()
            wait_for(lambda: not lab.run("squeue", "-h", "-t", "all").stdout, 60, "an empty squeue")
            server.start()
            ended = server.wait_end("patient")
        finally:
            lab.start_service("slurmdbd")
        assert (ended["status"], ended["message"]) == ("finishedWithError", "exit code 5")


def test_unseen_job_keeps_its_state_and_is_lost_only_after_lost_after(
    forgetful_site: Site, tmp_path: Path
) -> None:
    """Gone from the queue, no accounting, no exit file, no word of Slurm in the log."""
    lab = forgetful_site.lab
    with forgetful_site.server(tmp_path, LOST_AFTER="8") as server:
        server.post(shell("vanished", "sleep 600"))
        server.wait_status("vanished", "started")
        server.stop()
        (folder,) = forgetful_site.jobs_dir(server).iterdir()
        lab.run("scancel", *numbers(forgetful_site, "vanished"))
        wait_for(lambda: not lab.run("squeue", "-h", "-t", "all").stdout, 90, "an empty squeue")
        for name in ("exit", "log"):  # there, unless it was cancelled before its first line
            (folder / name).unlink(missing_ok=True)
        server.start()
        assert server.wait_message("vanished", "its last state stays")["status"] == "started"
        lost = server.wait_status("vanished", "undefined")
        assert lost["message"].startswith("lost: not seen on slurm since")


def test_limits_mean_wait(accounting_site: Site, tmp_path: Path) -> None:
    """A QOS that takes one job at a time: the second one waits and then runs."""
    go = accounting_site.folder("go") / "limits"
    until = f"until [ -e {go} ]; do sleep .1; done"
    with accounting_site.server(tmp_path, site={"qos": "limited"}) as server:
        server.post(shell("first", until))
        server.wait_status("first", "started")
        server.post(shell("second", "true"))
        found = server.wait_message("second", "policy")
        assert found["status"] == "notstarted"
        go.touch()
        assert all_ended(server, ["first", "second"]) == {
            "first": "finishedSuccessfully",
            "second": "finishedSuccessfully",
        }


def test_shared_disk_away(plain_site: Site, tmp_path: Path) -> None:
    """The login node has an empty mount point where the shared disk was."""
    share = plain_site.lab.storebase
    aside = share.with_name("aside")
    with plain_site.server(tmp_path) as server:
        server.post(shell("before", "echo kept"))
        server.wait_end("before")
        share.rename(aside)
        share.mkdir()
        try:
            server.post(shell("during", "true"))
            found = server.wait_message("during", "the shared disk can't be written since")
            assert found["status"] == "notstarted"
            assert server.get("before")["status"] == "finishedSuccessfully"
            assert "is the disk mounted?" in server.call("GET", "/health/")[1]["outage"]["reason"]
            assert not list(share.iterdir())
        finally:
            share.rmdir()
            aside.rename(share)
        assert server.wait_end("during")["status"] == "finishedSuccessfully"
        assert server.get("before")["logs"] == "kept\n"


def test_the_accounts_own_slurm_variables_and_shell_options_do_no_harm(
    plain_site: Site, tmp_path: Path
) -> None:
    profile = (
        "export SBATCH_JOB_NAME=mine SBATCH_EXPORT=ALL SBATCH_OUTPUT=/dev/null SQUEUE_NAMES=none "
        "SQUEUE_PARTITION=none SECRET=visible; set -o noclobber; set -f; IFS=:; exec bash"
    )
    with plain_site.server(tmp_path, SSH_SHELL=f"bash -c '{profile}'") as server:
        server.post(shell("plain", "echo secret=$SECRET"))
        ended = server.wait_end("plain")
        assert (ended["message"], ended["logs"]) == ("finished", "secret=\n")
        jids = [f"twin-{number}" for number in range(3)]
        for jid in jids:
            server.post(shell(jid, "sleep 600"))
        for jid in jids:
            server.wait_status(jid, "started")
        for jid in jids:
            server.delete(jid)
        wait_for(
            lambda: "twin-" not in plain_site.lab.run("squeue", "-h", "-o", "%j").stdout,
            30,
            "the jobs to be cancelled",
        )
