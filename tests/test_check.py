"""`pman check` where it needs no cluster: settings, STATE_DIR, the template, and test jobs on this
machine."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from pman import check
from pman.cli import app
from pman.drivers.local import LocalDriver
from pman.errors import Ambiguous, EngineError, Unavailable
from pman.jobs import Finding, Job, JobSpec, JobState, Observation, Severity, Verdict
from pman.samples import Sample
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


RUNTIMES = ["apptainer", "bare", "charliecloud", "podman", "pyxis", "sarus", "shifter"]


@pytest.mark.parametrize("template", RUNTIMES)
def test_the_probe_is_the_sites_template_but_for_what_it_runs(
    clean_environment: None, tmp_path: Path, template: str
) -> None:
    settings = slurm(tmp_path, template=template)
    site = "setup: module load it\nimages: {'*': /i.sif}\npartition: debug\n"
    with Worker(Sources(site=site)) as worker:
        (job,) = check.probes(settings, worker)
        sent = worker.render(job.spec, "sbatch", template).text
    before, runs = sent.split("\nrun() {\n")
    assert job.document.text.startswith(before)
    assert runs.split("\n}\n")[-1] == job.document.text.split("\n}\n")[-1]
    assert "--time=0-00:01:00" in before
    assert "/share/outgoing" not in job.document.text
    subprocess.run(["bash", "-n"], input=job.document.text, text=True, check=True)


def test_each_rule_of_site_file_has_a_probe_of_its_own(
    clean_environment: None, tmp_path: Path
) -> None:
    rules = (
        "rules:\n- {match: {gpu: true}, set: {partition: gpu}}\n"
        "- {match: {auid: x}, template: podman}\n"
        "- {match: {type: fs}, template: mine}\n"
    )
    own = {"sbatch/mine.sbatch.j2": "{{ fail('no fs here') }}"}
    with Worker(Sources(own, rules)) as worker:
        plain, gpu, podman = check.probes(slurm(tmp_path), worker)
    assert [job.jid for job in (plain, gpu, podman)] == [
        "pman-check",
        "pman-check-rule-1",
        "pman-check-rule-2",
    ]
    assert len({job.name for job in (plain, gpu, podman)}) == 3
    assert "--partition=gpu\n" in gpu.document.text
    assert "runtime=(podman)" in podman.document.text


def test_the_probes_are_bounded(clean_environment: None, tmp_path: Path) -> None:
    rules = "rules:\n" + "- {match: {gpu: true}, set: {partition: gpu}}\n" * check.PROBES
    with Worker(Sources(site=rules)) as worker:
        assert len(check.probes(slurm(tmp_path), worker)) == check.PROBES


def test_a_probe_is_of_its_rules_template_though_a_later_rule_fits_it_too(
    clean_environment: None, tmp_path: Path
) -> None:
    rules = "- {match: {gpu: true}, template: podman}\n- {match: {type: ds}, template: bare}\n"
    with Worker(Sources(site=f"rules:\n{rules}")) as worker:
        _, gpu, _ = check.probes(slurm(tmp_path), worker)
    assert "runtime=(podman)" in gpu.document.text


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


RULES = (
    "rules:\n- {match: {gpu: true}, template: podman}\n"
    "- {match: {type: fs}, template: mine}\n- {match: {type: ds}, template: bare}\n"
)


@pytest.fixture
def asked(clean_environment: None, tmp_path: Path) -> Iterator[Mapping[str, tuple[Sample, Job]]]:
    own = {"sbatch/mine.sbatch.j2": "{{ fail('no fs here') }}"}
    with Worker(Sources(own, RULES)) as worker:
        yield check.sample_jobs(slurm(tmp_path), worker)


def test_each_sample_is_asked_about_as_its_rule_would_send_it(
    asked: Mapping[str, tuple[Sample, Job]],
) -> None:
    """But for the rule whose jobs the template refuses: they are not sent."""
    assert [(sample.rule, job.document.template) for sample, job in asked.values()] == [
        (0, "bare"),
        (1, "podman"),
        (3, "bare"),
    ]
    for name, (_, job) in asked.items():
        assert f"#SBATCH --job-name={name}\n" in job.document.text


def test_what_the_scheduler_says_of_each(asked: Mapping[str, tuple[Sample, Job]]) -> None:
    plain, gpu, late = asked
    verdicts = {
        plain: Verdict(accepted=True, message="it would start"),
        gpu: Verdict(accepted=False, message="refused by Slurm: no such partition"),
        late: Verdict(accepted=True, message="yes", warnings=("it waits", "it is dear")),
    }
    found = list(check.of_verdicts(Engine(test=verdicts), asked))
    assert [(finding.severity, finding.text) for finding in found] == [
        (OK, "a plain job is accepted: it would start"),
        (
            ERROR,
            "a job that fits rule 1 of SITE_FILE (line 2) is refused: refused by Slurm: no such "
            "partition",
        ),
        (WARNING, "a job that fits rule 3 of SITE_FILE (line 4) is accepted, and it waits"),
        (WARNING, "a job that fits rule 3 of SITE_FILE (line 4) is accepted, and it is dear"),
    ]
    assert "sinfo" in found[1].remedy


def test_a_scheduler_that_cannot_be_asked_is_a_warning(
    asked: Mapping[str, tuple[Sample, Job]],
) -> None:
    (finding,) = check.of_verdicts(Engine(test=Unavailable("slurmctld is away")), asked)
    assert finding.severity is WARNING
    assert "the scheduler can't be asked: slurmctld is away" in finding.text


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


# --- test jobs, on engines that don't behave ---


class Engine(LocalDriver):
    """An engine that does as it is told, and keeps what it was asked to remove."""

    def __init__(self, **answers: Any) -> None:
        super().__init__()
        self.answers = answers
        self.removed: list[str] = []

    def _answer(self, call: str, jobs: Sequence[Job]) -> Any:
        answer = self.answers.get(call)
        if isinstance(answer, EngineError):
            raise answer
        return {job.name: answer for job in jobs} if answer is not None else {}

    def test(self, jobs: Sequence[Job]) -> Mapping[str, Verdict]:
        answer = self.answers["test"]
        if isinstance(answer, EngineError):
            raise answer
        return {job.name: answer[job.name] for job in jobs}

    def submit(self, jobs: Sequence[Job]) -> Mapping[str, str | EngineError]:
        return self._answer("submit", jobs) or {job.name: "17" for job in jobs}

    def observe(self, jobs: Sequence[Job]) -> Mapping[str, Observation]:
        answer: Mapping[str, Observation] = self._answer("observe", jobs)
        return answer

    def logs(self, job: Job, tail: int) -> str:
        log = self._answer("logs", [job])
        return str(log.get(job.name, ""))

    def remove(self, jobs: Sequence[Job]) -> Mapping[str, str]:
        self.removed += [job.name for job in jobs]
        answer: Mapping[str, str] = self._answer("remove", jobs)
        return answer


@pytest.fixture
def job(settings: Settings) -> Job:
    with Worker(Sources()) as worker:
        (probe,) = check.probes(settings, worker)
    return probe


def run(engine: Engine, *jobs: Job, within: float = 0.2) -> list[Finding]:
    found = list(check.run(engine, jobs, 0.01, threading.Event(), within))
    assert engine.removed == [job.name for job in jobs]
    return found


def test_a_job_that_waits_says_for_what(job: Job) -> None:
    waits = Observation(JobState.QUEUED, "waiting: Resources (for free nodes)")
    (finding,) = run(Engine(observe=waits), job)
    assert finding.severity is WARNING
    assert finding.text == "not at its end after 0.2 s: waiting: Resources (for free nodes)"
    assert "squeue --start" in finding.remedy


@pytest.mark.parametrize(
    ("answers", "severity", "words"),
    [
        ({"submit": Unavailable("no way")}, ERROR, "not submitted: no way"),
        ({"submit": Ambiguous("cut off")}, ERROR, "not submitted: cut off"),
        ({"observe": Unavailable("squeue is away")}, WARNING, "0.2 s: squeue is away"),
        ({}, WARNING, "0.2 s: not seen yet"),
        (
            {"observe": Observation(JobState.FAILED, "out"), "logs": Unavailable("disk away")},
            ERROR,
            "out; its log ends with: disk away",
        ),
    ],
)
def test_engines_in_trouble(
    job: Job, answers: dict[str, Any], severity: Severity, words: str
) -> None:
    (finding,) = run(Engine(**answers), job)
    assert finding.severity is severity
    assert words in finding.text


@pytest.mark.parametrize("answer", ["busy", Unavailable("busy")])
def test_what_cannot_be_removed_is_told_with_the_way_to_do_it(job: Job, answer: Any) -> None:
    *_, finding = run(Engine(remove=answer), job)
    assert (finding.severity, finding.text) == (WARNING, "it could not be removed: busy")
    assert finding.remedy == f"scancel --name={job.name}; rm -r {job.spec.folder}"


def test_several_jobs_go_out_together_and_each_is_told(job: Job) -> None:
    other = replace(job, spec=replace(job.spec, jid="other", name="other.1"))
    failed = Observation(JobState.FAILED, "exit code 3")
    found = run(Engine(observe=failed), job, other)
    assert [finding.subject for finding in found] == [job.jid, "other"]


def test_nothing_is_begun_once_it_was_stopped(job: Job) -> None:
    stopped = threading.Event()
    stopped.set()
    engine = Engine()
    assert list(check.run(engine, [job], 0.01, stopped)) == []
    assert engine.removed == []


def test_jobs_are_removed_when_nobody_listens_any_more(job: Job) -> None:
    engine = Engine(observe=Observation(JobState.FAILED, "out"))
    findings = check.run(engine, [job], 0.01, threading.Event())
    next(findings)
    del findings
    assert engine.removed == [job.name]


# --- what a node tells ---

LOG = "noise\nnode=n1\nclock=1000\nbash=5.2\nwritable=yes\nscratch=/tmp\nfree=4194304\n"


@pytest.fixture
def ended(spec: JobSpec, job: Job) -> Job:
    return replace(job, spec=spec, state=JobState.SUCCEEDED)


@pytest.fixture
def spec(job: Job) -> JobSpec:
    return replace(job.spec, output_dir="/data")


def test_a_node_where_all_is_well(ended: Job) -> None:
    found = list(check.of_end(ended, LOG, 990, 1003))
    assert [(finding.severity, finding.subject) for finding in found] == [
        (OK, "pman-check"),
        (OK, "STOREBASE"),
        (OK, "clock"),
        (OK, "scratch folder"),
    ]


@pytest.mark.parametrize(
    ("line", "severity", "words"),
    [
        ("clock=1060", WARNING, "that of n1 is 57 s ahead of"),
        ("clock=900", WARNING, "that of n1 is 90 s behind"),
        ("writable=mktemp: Read-only file system", ERROR, "/data can't be written on n1: mktemp"),
        ("free=1000", WARNING, "/tmp on n1 has 1 MiB free"),
        ("free=0", ERROR, "/tmp on n1 has 0 MiB free"),
    ],
)
def test_what_is_wrong_with_a_node(ended: Job, line: str, severity: Severity, words: str) -> None:
    found = worst(check.of_end(ended, f"{LOG}{line}\n", 990, 1003))
    assert found.severity is severity
    assert words in found.text
    assert found.remedy
