"""`pman check` as an operator runs it, on a real Slurm site that is well or has one thing wrong."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pman import probing
from pman.drivers import ENGINES
from pman.settings import Settings
from pman.sources import read
from pman.worker import Worker
from tests.e2e.conftest import need_lab
from tests.e2e.server import free_port
from tests.e2e.site import Site
from tests.lab.slurm import SlurmLab
from tests.waiting import wait_for

pytestmark = pytest.mark.lab


@dataclass(frozen=True)
class Report:
    """What `pman check` printed, and how it ended."""

    code: int
    findings: list[dict[str, str]]

    def about(self, subject: str, severity: str = "") -> list[dict[str, str]]:
        return [
            finding
            for finding in self.findings
            if finding["subject"] == subject and severity in ("", finding["severity"])
        ]

    def only(self, severity: str) -> dict[str, str]:
        """The one finding of that severity."""
        (finding,) = [found for found in self.findings if found["severity"] == severity]
        return finding

    def worse_than_ok(self) -> list[dict[str, str]]:
        return [finding for finding in self.findings if finding["severity"] != "ok"]


def start(
    site: Site,
    folder: Path,
    *args: str,
    site_file: Mapping[str, Any] | None = None,
    **settings: str,
) -> tuple[subprocess.Popen[str], dict[str, str]]:
    values = site.settings(folder, site_file, **{"POLL_INTERVAL": "1", **settings})
    process = subprocess.Popen(
        [sys.executable, "-m", "pman", "check", *args],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder)} | values,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, values


def check(site: Site, folder: Path, *args: str, **settings: Any) -> Report:
    process, values = start(site, folder, *args, "--json", **settings)
    out, err = process.communicate(timeout=240)
    assert err == ""
    nothing_left(site, values)
    return Report(process.returncode, json.loads(out))


def nothing_left(site: Site, values: Mapping[str, str]) -> None:
    """No job that has not ended, and none of the check's own files."""
    queue = site.lab.run("squeue", "-h", "-o", "%T %j", check=False).stdout
    assert "pman-check" not in queue
    jobs = Path(values["JOBS_DIR"])
    assert not jobs.is_dir() or not list(jobs.iterdir())
    assert not list(site.lab.storebase.glob(".pman-check-*"))


# --- a site that is well ---


def test_a_site_that_is_well(plain_site: Site, tmp_path: Path) -> None:
    plain_site.lab.clear_calls()
    report = check(plain_site, tmp_path)
    assert (report.code, report.worse_than_ok()) == (0, [])
    assert {finding["subject"] for finding in report.findings} == {
        "settings",
        "TIMELIMIT_MINUTES",
        "STATE_DIR",
        "templates",
        "login node",
        "clock",
        "programs",
        "Slurm",
        "accounting",
        "limits",
        "STOREBASE",
        "JOBS_DIR",
        "verdict",
    }
    assert "300 s after its end (MinJobAge)" in report.about("accounting")[0]["text"]
    assert "EnforcePartLimits=NO" in report.about("limits")[0]["text"]
    # Nothing is submitted, and no job is touched.
    assert {words[0] for words in plain_site.lab.calls()} == {
        "sbatch",
        "scontrol",
        "sacct",
        "sinfo",
    }
    (tested,) = [words for words in plain_site.lab.calls() if "--test-only" in words]
    assert tested[0] == "sbatch"
    assert ["sbatch", "--version"] in plain_site.lab.calls()
    assert not Path(plain_site.settings(tmp_path)["STATE_DIR"]).exists()


def test_the_lines_that_an_operator_reads(plain_site: Site, tmp_path: Path) -> None:
    process, _ = start(plain_site, tmp_path, "--deep", LOST_AFTER="5")
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    lines = out.splitlines()
    assert [
        line for line in lines if not re.match(r"(ok     |warning) \w[\w -]{17} \S", line)
    ] == []
    assert re.search(r"^warning LOST_AFTER +5 s: .* → set it to 60 or more", out, re.M)
    assert re.search(r"^ok      login node +127.0.0.1: the account gets in$", out, re.M)
    assert re.search(r"^ok      pman-check +ran on node\d with bash 5", out, re.M)
    assert "\x1b" not in out


def test_a_job_is_run_on_a_node(plain_site: Site, tmp_path: Path) -> None:
    setup = 'echo "setup on $SLURMD_NODENAME as $SLURM_JOB_PARTITION" > ~/setup'
    report = check(
        plain_site,
        tmp_path,
        "--deep",
        site_file={"partition": "short", "setup": setup},
        TIMELIMIT_MINUTES="60",
    )
    assert report.code == 0
    (verdict,) = report.worse_than_ok()
    assert verdict["text"].startswith("a plain job is accepted, and it would wait for ever: ")
    assert "partition short allows 0:05:00" in verdict["text"]
    assert "ran on node" in report.about("pman-check")[0]["text"]
    (of_node,) = [found for found in report.about("STOREBASE") if " on node" in found["text"]]
    assert of_node["severity"] == "ok"
    assert "agrees" in report.about("clock")[1]["text"]
    assert f"{plain_site.lab.root}/tmp on node" in report.about("scratch folder")[0]["text"]
    # What the site's own template does before the plugin was really done.
    home = plain_site.lab.root / "home" / plain_site.lab.user
    assert re.fullmatch(r"setup on node\d as short\n", (home / "setup").read_text())


def test_a_site_with_accounting(accounting_site: Site, tmp_path: Path) -> None:
    """MinJobAge is 3 s there, which does no harm with accounting."""
    report = check(accounting_site, tmp_path, "--deep")
    assert (report.code, report.worse_than_ok()) == (0, [])
    assert report.about("accounting")[0]["text"] == "it is on and answers"


def test_the_newest_slurm_and_apptainer(newest_site: Site, tmp_path: Path) -> None:
    report = check(newest_site, tmp_path, "--deep", TEMPLATE="apptainer")
    assert (report.code, report.worse_than_ok()) == (0, [])
    assert "version 26.05" in report.about("Slurm")[0]["text"]
    assert "300 s after its end (MinJobAge)" in report.about("accounting")[0]["text"]


def test_on_the_login_node_itself(plain_site: Site, tmp_path: Path) -> None:
    values = plain_site.settings(tmp_path, SLURM_CONF=str(plain_site.lab.slurm_conf))
    own = {name: "" for name in values if name.startswith("SSH_")}
    report = check(plain_site, tmp_path, SLURM_CONF=str(plain_site.lab.slurm_conf), **own)
    assert (report.code, report.worse_than_ok()) == (0, [])
    assert "SSH_HOST is empty" in report.about("login node")[0]["text"]


# --- the way to the login node ---


def unreachable(site: Site, folder: Path, **settings: str) -> dict[str, str]:
    """The one error of a check that does not get to the login node."""
    report = check(site, folder, "--deep", **settings)
    assert report.code == 1
    assert not report.about("Slurm") + report.about("STOREBASE")
    assert "not run: there are errors" in report.about("test jobs")[0]["text"]
    finding = report.only("error")
    assert finding["subject"] == "login node"
    assert "next try" not in finding["text"] + finding["remedy"]
    return finding


def test_unknown_host_key(plain_site: Site, tmp_path: Path) -> None:
    (tmp_path / "known_hosts").write_text("")
    found = unreachable(plain_site, tmp_path, SSH_KNOWN_HOSTS=str(tmp_path / "known_hosts"))
    assert "is unknown: it shows ssh-ed25519 SHA256:" in found["text"]
    assert found["remedy"].startswith("Compare the fingerprint with the one that the site publish")
    port = plain_site.lab.ports.sshd
    assert f"ssh-keyscan -p {port} 127.0.0.1 >> {tmp_path}/known_hosts" in found["remedy"]


def test_changed_host_key(plain_site: Site, tmp_path: Path) -> None:
    other = (plain_site.lab.root / "ssh" / "key.pub").read_text()
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{plain_site.lab.ports.sshd} {other}")
    found = unreachable(plain_site, tmp_path, SSH_KNOWN_HOSTS=str(known))
    assert "has CHANGED" in found["text"]
    assert "ssh-keyscan" in found["remedy"]


def test_wrong_port(plain_site: Site, tmp_path: Path) -> None:
    found = unreachable(plain_site, tmp_path, SSH_PORT=str(free_port()))
    assert "refuses connections: does sshd run there, is the port right?" in found["text"]
    assert found["remedy"]


def test_refused_key(plain_site: Site, tmp_path: Path) -> None:
    key = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    found = unreachable(plain_site, tmp_path, SSH_KEY_FILE=str(key))
    assert "did not let user chris in" in found["text"]
    assert "authorized_keys" in found["remedy"]


# --- the login node ---


@contextmanager
def program(site: Site, name: str, text: str) -> Iterator[None]:
    """A program before the real one on the PATH of the account's login shell."""
    path = site.lab.root / "bin" / name
    kept = path.read_text() if path.exists() else None
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    try:
        yield
    finally:
        path.unlink()
        if kept is not None:
            path.write_text(kept)
            path.chmod(0o755)


@pytest.mark.parametrize(("apart", "words"), [(60, "s ahead of"), (-3600, "s behind")])
def test_clocks_apart(plain_site: Site, tmp_path: Path, apart: int, words: str) -> None:
    with program(plain_site, "date", f"echo $(( $(/bin/date +%s) + {apart} ))"):
        report = check(plain_site, tmp_path)
    assert report.code == 0
    finding = report.only("warning")
    assert finding["subject"] == "clock"
    told = re.search(rf"(\d+) {words}", finding["text"])
    assert told and abs(int(told[1]) - abs(apart)) <= 2
    assert "NTP" in finding["remedy"]


def test_slurm_not_on_the_path(plain_site: Site, tmp_path: Path) -> None:
    report = check(plain_site, tmp_path, SSH_SHELL=f"env PATH={tools(plain_site)} /bin/bash")
    assert report.code == 1
    missing = [found["text"].split()[0] for found in report.about("programs")]
    assert missing == ["sbatch", "squeue", "scancel", "sacct", "scontrol"]
    assert {found["severity"] for found in report.about("programs")} == {"error", "warning"}
    assert "SSH_SHELL" in report.about("programs")[0]["remedy"]
    assert report.about("Slurm") == []
    assert report.about("STOREBASE", "ok")


def tools(site: Site) -> Path:
    """A folder with what a login node has besides Slurm."""
    folder = site.folder("tools")
    for name in "tar mktemp timeout find head tail grep tr date ls df rm".split():
        (folder / name).symlink_to(shutil.which(name) or name)
    return folder


def test_a_login_node_without_any_program(plain_site: Site, tmp_path: Path) -> None:
    report = check(plain_site, tmp_path, SSH_SHELL="env PATH=/nowhere /bin/bash")
    assert report.code == 1
    missing = [found["text"].split()[0] for found in report.about("programs")]
    assert {"sbatch", "tar", "mktemp", "grep"} <= set(missing)
    assert "can't be entered: " in report.about("STOREBASE", "error")[0]["text"]


def test_an_old_slurm(plain_site: Site, tmp_path: Path) -> None:
    with program(plain_site, "sbatch", "echo slurm 20.11.9"):
        finding = check(plain_site, tmp_path).only("warning")
    assert "version 20.11.9; pman is tested with 22.05 to 26.05" in finding["text"]


def test_rate_limits(plain_site: Site, tmp_path: Path) -> None:
    """As Slurm 23.02 and newer say it."""
    said = "SlurmctldParameters     = enable_configless,rl_enable,rl_refill_rate=1"
    with program(plain_site, "scontrol", f"/usr/bin/scontrol $@ && echo {said!r}"):
        assert "POLL_INTERVAL to 2 " in check(plain_site, tmp_path).only("warning")["remedy"]
        assert check(plain_site, tmp_path, POLL_INTERVAL="2").worse_than_ok() == []


# --- Slurm ---


def test_without_accounting_slurm_forgets_too_soon(forgetful_site: Site, tmp_path: Path) -> None:
    report = check(forgetful_site, tmp_path)
    assert report.code == 0
    finding = report.only("warning")
    assert finding["subject"] == "accounting"
    assert "5 s after its end (MinJobAge)" in finding["text"]
    assert "slurmdbd" in finding["remedy"]


def test_slurmctld_stopped(plain_site: Site, tmp_path: Path) -> None:
    plain_site.lab.stop_service("slurmctld")
    try:
        report = check(plain_site, tmp_path, "--deep")
    finally:
        plain_site.lab.start_service("slurmctld")
    assert report.code == 1
    finding = report.only("error")
    assert finding["subject"] == "Slurm"
    assert "Unable to contact slurm controller" in finding["text"]
    assert report.about("STOREBASE", "ok")
    assert not report.about("pman-check")


def test_slurmdbd_stopped(accounting_site: Site, tmp_path: Path) -> None:
    accounting_site.lab.stop_service("slurmdbd")
    try:
        report = check(accounting_site, tmp_path, "--deep")
    finally:
        accounting_site.lab.start_service("slurmdbd")
    assert report.code == 0
    finding = report.only("warning")
    assert finding["subject"] == "accounting"
    assert "does not answer" in finding["text"]
    assert "Connection refused" in finding["text"]


def test_other_customs(tmp_path: Path) -> None:
    need_lab()
    customs = ["EnforcePartLimits=ALL", "PrivateData=jobs,usage"]
    with SlurmLab(extra_conf=customs) as lab:
        report = check(Site(lab), tmp_path, "--deep")
    assert (report.code, report.worse_than_ok()) == (0, [])
    assert report.about("limits") == []
    assert "jobs,usage of others are hidden" in report.about("PrivateData")[0]["text"]


# --- the shared disk ---


def test_storebase_that_is_not_there(plain_site: Site, tmp_path: Path) -> None:
    report = check(plain_site, tmp_path, STOREBASE="/nowhere/at/all", JOBS_DIR="/nowhere/jobs")
    assert report.code == 1
    assert "/nowhere/at/all can't be entered" in report.about("STOREBASE", "error")[0]["text"]
    assert "Permission denied" in report.about("JOBS_DIR", "error")[0]["text"]


def test_storebase_that_is_empty(plain_site: Site, tmp_path: Path) -> None:
    (plain_site.folder("in") / "empty").mkdir(exist_ok=True)
    report = check(plain_site, tmp_path, STOREBASE=f"{plain_site.lab.storebase}/in/empty")
    assert report.code == 1
    assert "is empty" in report.only("error")["text"]
    assert "mounted" in report.only("error")["remedy"]


@contextmanager
def mounted(site: Site, *options: str) -> Iterator[None]:
    """The shared disk of login node and nodes, mounted another way."""
    share = str(site.lab.storebase)
    site.lab.run("mount", "--bind", share, share)
    try:
        site.lab.run("mount", "-o", ",".join(("remount", "bind", *options)), share)
        yield
    finally:
        site.lab.run("umount", "--lazy", share)


def test_storebase_that_is_read_only(plain_site: Site, tmp_path: Path) -> None:
    with mounted(plain_site, "ro"):
        report = check(plain_site, tmp_path, "--deep")
    assert report.code == 1
    assert "mounted read-only" in report.about("STOREBASE", "error")[0]["text"]
    assert "Read-only file system" in report.about("JOBS_DIR", "error")[0]["text"]


def test_storebase_that_belongs_to_another_account(plain_site: Site, tmp_path: Path) -> None:
    share = plain_site.lab.storebase
    (tmp_path / "jobs").mkdir(mode=0o777)
    owner = share.stat()
    jobs = plain_site.folder("jobs")
    os.chown(share, 0, 0)
    try:
        report = check(plain_site, tmp_path, JOBS_DIR=str(jobs))
        assert report.code == 0
        assert "Permission denied" in report.only("warning")["text"]
        share.chmod(0o700)
        report = check(plain_site, tmp_path, JOBS_DIR=str(jobs))
        assert report.code == 1
        assert report.about("STOREBASE", "error")
    finally:
        os.chown(share, owner.st_uid, owner.st_gid)
        share.chmod(owner.st_mode & 0o7777)


def test_a_full_disk(plain_site: Site, tmp_path: Path) -> None:
    """A small one, in the place of the shared disk of the login node."""
    share = str(plain_site.lab.storebase)
    plain_site.lab.run("mount", "-t", "tmpfs", "-o", "size=1m,mode=777", "none", share)
    try:
        plain_site.lab.run("mkdir", f"{share}/cube")
        report = check(plain_site, tmp_path)
        assert "its disk has 1 MiB free" in report.only("warning")["text"]
        plain_site.lab.run("sh", "-c", f"cat /dev/zero > {share}/fill", check=False)
        report = check(plain_site, tmp_path)
        assert report.code == 1
        assert "its disk has 0 MiB free" in report.about("JOBS_DIR", "error")[-1]["text"]
    finally:
        plain_site.lab.run("umount", "--lazy", share)


# --- the nodes, by --deep ---


def failed(report: Report) -> dict[str, str]:
    """The test job's finding, the only error."""
    assert report.code == 1
    finding = report.only("error")
    assert finding["subject"] == "pman-check"
    return finding


def test_runtime_missing_on_the_node(plain_site: Site, tmp_path: Path) -> None:
    settings = {"site_file": {"apptainer": "no-such-apptainer"}, "TEMPLATE": "apptainer"}
    finding = failed(check(plain_site, tmp_path, "--deep", **settings))
    assert re.fullmatch(r"no-such-apptainer is not on the node \S+", finding["text"])
    assert "`setup` in SITE_FILE" in finding["remedy"]


def test_partition_that_is_not_there(plain_site: Site, tmp_path: Path) -> None:
    report = check(plain_site, tmp_path, "--deep", site_file={"partition": "debgu"})
    assert report.code == 1
    finding = report.only("error")
    assert finding["subject"] == "verdict"
    assert "a plain job is refused: " in finding["text"]
    assert "did you mean 'debug'? There are: debug, gpu, short" in finding["text"]
    assert "sinfo" in finding["remedy"]
    assert report.about("test jobs")[0]["text"] == "not run: there are errors"


def test_queue_that_is_long(plain_site: Site, tmp_path: Path, clean_environment: None) -> None:
    values = plain_site.settings(tmp_path, {"directives": ["--begin=now+600"]})
    settings = Settings(**{name.lower(): value for name, value in values.items()})  # type: ignore[arg-type]
    with Worker(read(None, settings.site_file)) as worker:
        (job,) = probing.probes(settings, worker)
    driver = ENGINES["slurm"].make(settings)
    with contextlib.closing(driver):
        (finding,) = probing.run(driver, [job], 0.3, threading.Event(), within=3)
    assert (finding.severity, finding.subject) == ("warning", "pman-check")
    assert finding.text.startswith("not at its end after 3 s: waiting: BeginTime")
    assert "squeue --start" in finding.remedy
    nothing_left(plain_site, values)


def test_setup_that_fails(plain_site: Site, tmp_path: Path) -> None:
    setup = "module load nothing || exit 4"
    finding = failed(check(plain_site, tmp_path, "--deep", site_file={"setup": setup}))
    assert finding["text"].startswith("exit code 4; its log ends with: ")
    assert "module: command not found" in finding["text"]


def test_storebase_that_nodes_do_not_have(plain_site: Site, tmp_path: Path) -> None:
    """The login node sees it, and by the time that the job runs it is away."""
    away = plain_site.folder("away")
    (away / "cube").mkdir(exist_ok=True)
    os.chown(away / "cube", away.stat().st_uid, away.stat().st_gid)
    directive = {"directives": ["--begin=now+3"]}
    process, _ = start(
        plain_site, tmp_path, "--deep", "--json", site_file=directive, STOREBASE=str(away)
    )
    wait_for(
        lambda: "pman-check" in plain_site.lab.run("squeue", "-h", "-o", "%j").stdout,
        60,
        "the test job in the queue",
    )
    away.rename(away.with_name("was-away"))
    out, _ = process.communicate(timeout=240)
    finding = failed(Report(process.returncode, json.loads(out)))
    assert re.search(rf"the input folder {away} is not on the node \S+", finding["text"])
    assert "have STOREBASE mounted there" in finding["remedy"]


def test_what_was_begun_is_removed_on_ctrl_c(plain_site: Site, tmp_path: Path) -> None:
    setup = {"setup": "sleep 600 & wait"}
    process, values = start(plain_site, tmp_path, "--deep", site_file=setup)
    wait_for(
        lambda: "RUNNING pman-check" in plain_site.lab.run("squeue", "-h", "-o", "%T %j").stdout,
        60,
        "the test job to run",
    )
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped: " in out
    wait_for(
        lambda: "pman-check" not in plain_site.lab.run("squeue", "-h", "-o", "%j").stdout,
        30,
        "the queue without it",
    )
    nothing_left(plain_site, values)


# --- beside a server ---


def test_a_server_that_runs_is_seen_and_not_disturbed(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path) as server:
        report = check(plain_site, tmp_path, STATE_DIR=server.settings["STATE_DIR"])
        assert (report.code, report.worse_than_ok()) == (0, [])
        assert "is in use by a running pman" in report.about("STATE_DIR")[0]["text"]
        assert server.call("GET", "/health/")[1]["status"] == "ok"
