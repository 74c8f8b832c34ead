"""`pman check` where it needs no cluster: settings, STATE_DIR, the template, and test jobs on this
machine."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from pman import check
from pman.cli import app
from pman.drivers.local import LocalDriver
from pman.jobs import Finding, Severity, Verdict
from pman.settings import Settings
from pman.sources import Sources
from pman.worker import Worker
from tests.waiting import wait_for

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR

Pman = Callable[..., Result]


@pytest.fixture
def pman(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Pman:
    """Runs `pman check` with the settings of a local server in the environment, or others."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def invoke(*args: str, **settings: str) -> Result:
        for name, value in {**values, **settings}.items():
            monkeypatch.setenv(name.upper(), str(value))
        try:
            return CliRunner().invoke(app, ["check", *args])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return invoke


def slurm(tmp_path: Path, **values: Any) -> Settings:
    return Settings(**{"container_env": "slurm", "storebase": tmp_path, **values})


def about(subject: str, findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


def worst(findings: Iterable[Finding]) -> Finding:
    return max(findings, key=lambda finding: (OK, WARNING, ERROR).index(finding.severity))


# --- the command ---


def test_a_line_a_finding_and_exit_code_0(pman: Pman) -> None:
    done = pman()
    assert done.exit_code == 0, done.output
    for line in done.stdout.splitlines():
        assert re.match(r"(ok     |warning|error  ) \S", line), line
    assert re.search(r"^ok      bash +it is /", done.stdout, re.M)
    assert "\x1b" not in done.stdout


def test_json_has_the_same_findings(pman: Pman) -> None:
    found = json.loads(pman("--json").stdout)
    assert all(set(finding) == {"severity", "subject", "text", "remedy"} for finding in found)
    assert [finding["subject"] for finding in found] == [
        line[8:26].strip() for line in pman().stdout.splitlines()
    ]


def test_every_wrong_setting_is_told(pman: Pman) -> None:
    done = pman(poll_interval="0", ssh_port="x", api_token="hidden", lost_after="-1")
    assert done.exit_code == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("error")]
    assert [re.sub(r"^error +settings +(\w+) has the value.*", r"\1", line) for line in lines] == [
        "SSH_PORT",
        "POLL_INTERVAL",
        "LOST_AFTER",
    ]
    assert "hidden" not in done.output


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"template": "nope"}, "error   templates          there is no sbatch template 'nope"),
        ({"template": "base"}, "no block `run`"),
        ({"site_file": "/nowhere"}, "/nowhere: it can't be read"),
        ({"templates_dir": "/nowhere"}, "TEMPLATES_DIR /nowhere: it is not a folder"),
    ],
)
def test_what_hinders_the_template_does_not_hide_the_engine(
    pman: Pman, settings: dict[str, str], words: str
) -> None:
    done = pman("--deep", **settings)
    assert done.exit_code == 1
    assert words in done.stdout
    assert "ok      bash" in done.stdout
    assert "Traceback" not in done.output


def test_control_characters_of_a_log_are_shown_not_obeyed(pman: Pman, tmp_path: Path) -> None:
    done = pman("--deep", site_file=site_file(tmp_path, setup=r"printf '\033[2Jfoo\rbar'; exit 7"))
    assert not set(done.stdout) & {"\x1b", "\r"}
    assert r"\x1b[2Jfoo" in done.stdout


def test_a_way_to_the_login_node_that_cannot_work(pman: Pman) -> None:
    done = pman(container_env="slurm", ssh_host="login", ssh_config_file="/nowhere/config")
    assert done.exit_code == 1
    assert re.search(r"^error   settings +the SSH config file /nowhere/config", done.stdout, re.M)


def test_a_locale_without_the_arrow_is_no_crash(values: dict[str, Any], tmp_path: Path) -> None:
    done = command(values | {"lost_after": 1}, tmp_path, PYTHONIOENCODING="ascii")
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 0
    assert rb"LOST_AFTER" in out
    assert rb"\u2192 set it to 60" in out


def command(
    values: Mapping[str, Any], folder: Path, *args: str, **environment: str
) -> subprocess.Popen[bytes]:
    """`pman check` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pman", "check", *args],
        cwd=folder,
        env={name.upper(): str(value) for name, value in values.items()}
        | {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[1])}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


# --- settings ---


@pytest.mark.parametrize("place", ["environment", ".env"])
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("SSH_KEYFILE", "SSH_KEY_FILE"),
        ("STORE_BASE", "STOREBASE"),
        ("apitoken", "API_TOKEN"),
        ("TEMPLATE_DIR", "TEMPLATES_DIR"),
    ],
)
def test_a_misspelt_setting(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch, place: str, name: str, meant: str
) -> None:
    if place == ".env":
        Path(".env").write_text(f"# x\n  export {name} = 'secret'\nSTOREBASE=/data\n")
    else:
        monkeypatch.setenv(name, "secret")
    (finding,) = [found for found in check.misspelt() if name in found.text]
    assert finding.severity is WARNING
    assert place in finding.text
    assert meant in finding.remedy
    assert "secret" not in str(finding)


@pytest.mark.parametrize(
    "name", "SSH_AUTH_SOCK container STATE_DIRECTORY HOSTNAME ssh_key_file SECRET_KEY".split()
)
def test_other_names_are_none_of_pmans_business(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "x")
    assert [finding for finding in check.misspelt() if name in finding.text] == []


@pytest.mark.parametrize(
    ("values", "subject", "words"),
    [
        ({"ssh_user": "x"}, "SSH_HOST", "and SSH_USER has no effect"),
        ({"ssh_user": "x", "ssh_port": 2}, "SSH_HOST", "and SSH_PORT, SSH_USER have no effect"),
        ({"poll_interval": 0.9}, "POLL_INTERVAL", "0.9 s: sites ban"),
        ({"lost_after": 59}, "LOST_AFTER", "59 s: a job can be called lost"),
        ({"lost_after": 100, "poll_interval": 60}, "LOST_AFTER", "100 s"),
    ],
)
def test_settings_that_will_hardly_be_meant(
    clean_environment: None, tmp_path: Path, values: dict[str, Any], subject: str, words: str
) -> None:
    (finding,) = about(subject, check.of_settings(slurm(tmp_path, **values)))
    assert finding.severity is WARNING
    assert words in finding.text
    assert finding.remedy


def cromwell(tmp_path: Path, **values: Any) -> Settings:
    given = {"cromwell_url": "http://127.0.0.1:8000", "timelimit_minutes": 60}
    return slurm(tmp_path, **{"container_env": "cromwell", **given, **values})


@pytest.mark.parametrize(
    ("values", "subject", "words"),
    [
        ({"ssh_user": "x"}, "SSH_HOST", "so Slurm is not asked and SSH_USER has no effect"),
        ({"jobs_dir": "/x"}, "JOBS_DIR", "on cromwell JOBS_DIR has no effect"),
        ({"poll_interval": 0.9}, "POLL_INTERVAL", "0.9 s: sites ban"),
        (
            {"container_env": "slurm", "timelimit_minutes": None},
            "CROMWELL_URL",
            "on slurm CROMWELL_URL has no effect",
        ),
        (
            {"container_env": "local", "cromwell_url": "", "cromwell_config": "/x"},
            "CROMWELL_CONFIG",
            "on local CROMWELL_CONFIG has no effect",
        ),
    ],
)
def test_settings_of_cromwell_that_will_hardly_be_meant(
    clean_environment: None, tmp_path: Path, values: dict[str, Any], subject: str, words: str
) -> None:
    (finding,) = about(subject, check.of_settings(cromwell(tmp_path, **values)))
    assert finding.severity is WARNING
    assert words in finding.text
    assert finding.remedy


def test_settings_of_cromwell_that_are_well(clean_environment: None, tmp_path: Path) -> None:
    values = {"ssh_host": "login", "ssh_user": "x", "cromwell_config": "/x"}
    found = list(check.of_settings(cromwell(tmp_path, **values)))
    assert worst(found).severity is OK
    assert not about("TIMELIMIT_MINUTES", found)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"ssh_host": "login", "ssh_user": "x", "ssh_port": 2222},
        {"poll_interval": 1, "lost_after": 60, "timelimit_minutes": 9},
        {"lost_after": 0},
    ],
)
def test_settings_that_are_well(
    clean_environment: None, tmp_path: Path, values: dict[str, Any]
) -> None:
    found = list(check.of_settings(slurm(tmp_path, **values)))
    assert worst(found).severity is OK
    assert bool(about("TIMELIMIT_MINUTES", found)) == ("timelimit_minutes" not in values)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o604, 0o400])
def test_the_rights_of_the_key(clean_environment: None, tmp_path: Path, mode: int) -> None:
    key = tmp_path / "key"
    key.write_text("")
    key.chmod(mode)
    found = about(
        "SSH_KEY_FILE", check.of_settings(slurm(tmp_path, ssh_host="login", ssh_key_file=key))
    )
    assert [finding.severity for finding in found] == [WARNING] * bool(mode & 0o077)


def test_a_key_that_is_not_there(clean_environment: None, tmp_path: Path) -> None:
    settings = slurm(tmp_path, ssh_host="login", ssh_key_file=tmp_path / "none")
    assert about("SSH_KEY_FILE", check.of_settings(settings))[0].severity is ERROR


@pytest.mark.parametrize(
    ("text", "mode", "open"),
    [
        ("API_TOKEN=x", 0o644, True),
        ("api_token=x", 0o640, True),
        ("API_TOKEN=x", 0o600, False),
        ("#API_TOKEN=x", 0o644, False),
    ],
)
def test_the_rights_of_a_file_with_the_token(
    clean_environment: None, tmp_path: Path, text: str, mode: int, open: bool
) -> None:
    Path(".env").write_text(text)
    Path(".env").chmod(mode)
    found = about("API_TOKEN", check.of_settings(slurm(tmp_path)))
    assert [finding.severity for finding in found] == [WARNING] * open


# --- STATE_DIR ---


def test_a_state_dir_that_is_still_to_be_made(tmp_path: Path) -> None:
    found = about("STATE_DIR", check.of_state_dir(tmp_path / "a" / "b"))
    assert "can be used" in found[0].text
    assert not (tmp_path / "a").exists()


def test_a_state_dir_in_use(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        (finding, *_) = check.of_state_dir(tmp_path)
        assert (finding.severity, "in use by a running pman" in finding.text) == (OK, True)
    (finding, *_) = check.of_state_dir(tmp_path)
    assert "can be used" in finding.text


@pytest.mark.parametrize("folder", ["/dev/null", "/dev/null/x", "/proc/pman"])
def test_a_state_dir_that_cannot_be_used(folder: str) -> None:
    assert worst(check.of_state_dir(Path(folder))).severity is ERROR


@pytest.mark.parametrize(
    ("free", "severity"),
    [((1 << 30) - 1024, WARNING), (1 << 30, OK), (100 << 20, WARNING), ((100 << 20) - 1024, ERROR)],
)
def test_the_space_of_state_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, severity: Severity
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    (_, finding) = check.of_state_dir(tmp_path)
    assert finding.severity is severity


MOUNTS = r"""
/dev/sda1 / ext4 rw 0 0
nas:/home /home nfs4 rw 0 0
tmpfs /home/pman\040x tmpfs rw 0 0
gate:/ /mnt fuse.sshfs rw 0 0
scratch /mnt/over lustre rw 0 0
""".strip()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/pman", "ext4"),
        ("/home/state", "nfs4"),
        ("/homes", "ext4"),
        ("/home/pman x/state", "tmpfs"),
        ("/mnt/x", "fuse.sshfs"),
        ("/mnt/over", "lustre"),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str) -> None:
    assert check.file_system(Path(path), MOUNTS) == kind


@pytest.mark.parametrize(
    ("kind", "remote"),
    [
        *((kind, True) for kind in "nfs nfs4 lustre gpfs beegfs ceph cifs fuse.sshfs".split()),
        *((kind, False) for kind in "ext4 xfs tmpfs overlay fuseblk btrfs zfs".split()),
    ],
)
def test_network_disks_are_no_place_for_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, remote: bool
) -> None:
    monkeypatch.setattr(check, "file_system", lambda *_: kind)
    found = [finding for finding in check.of_state_dir(tmp_path) if "network disk" in finding.text]
    assert [finding.severity for finding in found] == [WARNING] * remote


# --- the template ---


@pytest.mark.parametrize(("template", "warned"), [("apptainer", True), ("podman", False)])
def test_shm_size_with_a_template_that_has_no_such_option(
    clean_environment: None, tmp_path: Path, template: str, warned: bool
) -> None:
    settings = slurm(tmp_path, shm_size=64, template=template)
    with Worker(Sources()) as worker:
        found = about("SHM_SIZE", check.of_templates(settings, Sources(), worker))
    assert [finding.severity for finding in found] == [WARNING] * warned
    assert all("podman" in finding.remedy for finding in found)


def test_shm_size_on_cromwell_is_left_out(clean_environment: None, tmp_path: Path) -> None:
    settings = slurm(tmp_path, container_env="cromwell", shm_size=64)
    with Worker(Sources()) as worker:
        (finding,) = about("SHM_SIZE", check.of_templates(settings, Sources(), worker))
    assert (finding.severity, finding.remedy) == (WARNING, "leave it out")


# --- templates and SITE_FILE ---


def mine(tmp_path: Path, text: str, path: str = "sbatch/own.sbatch.j2") -> dict[str, str]:
    """Settings for a template of the site's own."""
    file = tmp_path / "mine" / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return {"templates_dir": str(tmp_path / "mine"), "template": "own"}


def test_a_broken_template_is_an_error_with_its_line(pman: Pman, tmp_path: Path) -> None:
    done = pman(**mine(tmp_path, "#!/bin/sh\n{{ job.jid }\n"))
    assert done.exit_code == 1
    words = r"sbatch/own.sbatch.j2, line 2: unexpected '}': `{{ job.jid }` → mend it there"
    assert re.search(rf"^error   templates +{re.escape(words)}", done.stdout, re.M)


def test_a_template_that_is_broken_for_some_jobs_only_is_an_error(
    pman: Pman, tmp_path: Path
) -> None:
    done = pman(**mine(tmp_path, "#!/bin/sh\n{% if job.gpu_limit %}{{ site.gpus }}{% endif %}\n"))
    assert done.exit_code == 1
    assert "(tried with a job with 4 GPUs)" in done.stdout


def test_each_mistake_in_site_file_is_an_error_of_its_own(pman: Pman, tmp_path: Path) -> None:
    done = pman(site_file=site_file(tmp_path, partition=5, qos=6))
    assert done.exit_code == 1
    assert len(re.findall(r"^error   SITE_FILE .*site.yaml, line [12]: ", done.stdout, re.M)) == 2


def test_a_slip_in_site_file_and_a_template_in_no_folder_are_warnings(
    pman: Pman, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.sbatch.j2").write_text("x")
    done = pman(site_file=site_file(tmp_path, partiton="cpu"), templates_dir=str(tmp_path / "mine"))
    assert done.exit_code == 0
    assert re.search(r"^warning SITE_FILE .*line 1: 'partiton'", done.stdout, re.M)
    assert re.search(r"^warning templates +a.sbatch.j2 .* → move it to sbatch/", done.stdout, re.M)


# --- what the scheduler says ---


def test_a_plain_job_and_one_for_each_rule_is_asked_about(pman: Pman, tmp_path: Path) -> None:
    rules = [{"match": {"gpu": True}, "set": {"partition": "gpu"}}]
    done = pman(site_file=site_file(tmp_path, rules=rules))
    assert re.search(r"^ok      verdict +a plain job is accepted: this machine", done.stdout, re.M)
    assert "a job that fits rule 1 of SITE_FILE (line 2) is accepted" in done.stdout


def test_a_refused_sample_is_the_exit_code_and_no_test_job_is_run(
    pman: Pman, monkeypatch: pytest.MonkeyPatch
) -> None:
    no = Verdict(accepted=False, message="no")
    monkeypatch.setattr(LocalDriver, "test", lambda _, jobs: {job.name: no for job in jobs})
    done = pman("--deep")
    assert done.exit_code == 1
    assert re.search(r"^error   verdict +a plain job is refused: no", done.stdout, re.M)
    assert "not run: there are errors" in done.stdout
    assert "ran on" not in done.stdout


def test_warnings_of_the_scheduler_are_no_reason_not_to_run_the_test_job(
    pman: Pman, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Verdict(accepted=True, message="yes", warnings=("it waits",))
    monkeypatch.setattr(LocalDriver, "test", lambda _, jobs: {job.name: said for job in jobs})
    done = pman("--deep")
    assert done.exit_code == 0
    assert re.search(r"^warning verdict +a plain job is accepted, and it waits", done.stdout, re.M)
    assert "ran on" in done.stdout


def test_an_engine_that_cannot_run_jobs_is_not_asked_about_them(
    pman: Pman, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = [Finding(ERROR, "engine", "it is away")]
    monkeypatch.setattr(LocalDriver, "check", lambda _: away)
    done = pman()
    assert done.exit_code == 1
    assert "verdict" not in done.stdout


# --- test jobs, on this machine ---


def test_a_job_is_run_and_removed(pman: Pman, values: dict[str, Any]) -> None:
    done = pman("--deep")
    assert done.exit_code == 0, done.output
    assert re.search(r"^ok      pman-check +ran on \S+ with bash \d", done.stdout, re.M)
    assert re.search(r"^ok      STOREBASE .* can be written on", done.stdout, re.M)
    assert re.search(r"^ok      clock ", done.stdout, re.M)
    assert {path.name for path in values["storebase"].iterdir()} == {"in", "out", ".pman"}
    assert list((values["storebase"] / ".pman").iterdir()) == []


def site_file(tmp_path: Path, **values: Any) -> str:
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_a_job_that_fails_says_why_with_the_end_of_its_log(pman: Pman, tmp_path: Path) -> None:
    done = pman("--deep", site_file=site_file(tmp_path, setup="echo no such module >&2\nexit 7"))
    assert done.exit_code == 1
    assert "exit code 7; its log ends with: " in done.stdout
    assert "no such module" in done.stdout


def test_a_runtime_that_is_not_there_is_said_with_a_remedy(pman: Pman, tmp_path: Path) -> None:
    done = pman("--deep", template="shifter")
    assert done.exit_code == 1
    assert re.search(
        r"^error   pman-check +shifter is not on the node \S+; .* → .*`setup`", done.stdout, re.M
    )


def test_a_template_that_does_not_extend_base_is_said(pman: Pman, tmp_path: Path) -> None:
    (tmp_path / "mine" / "sbatch").mkdir(parents=True)
    (tmp_path / "mine" / "sbatch" / "own.sbatch.j2").write_text(
        '#!/bin/sh\nmkdir {{ job.folder }}/lock\necho "0 1" > {{ job.folder }}/exit\n'
    )
    done = pman("--deep", template="own", templates_dir=str(tmp_path / "mine"))
    assert done.exit_code == 0
    assert "did not look at its node: does the template extend base?" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_was_begun_is_removed_when_it_is_stopped(
    values: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    here = tmp_path / "here"
    setup = f"echo $$ > {here}.new; mv {here}.new {here}; sleep 600 & wait"
    done = command(values, tmp_path, "--deep", SITE_FILE=site_file(tmp_path, setup=setup))
    wait_for(here.exists, 30, "the job to begin")
    done.send_signal(number)
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 130
    assert b"stopped: " in out
    assert list((values["storebase"] / ".pman").iterdir()) == []
    assert not Path(f"/proc/{here.read_text().strip()}").exists()
