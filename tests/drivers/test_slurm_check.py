"""What each answer of a login node means, and that the two scripts give these answers."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from pman.drivers import slurm_check
from pman.drivers.slurm_check import Answer, Answers
from pman.errors import Unavailable
from pman.jobs import Finding, Severity
from pman.shell import LocalShell, Result

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR

DISABLED = Answer(1, "Slurm accounting storage is disabled")


def config(**settings: str) -> Answer:
    """As `scontrol show config` prints it."""
    rows = {"ClusterName": "hpc", "MinJobAge": "300 sec", "PrivateData": "none"} | settings
    head = "Configuration data as of 2026-11-22T16:34:01\n"
    return Answer(0, head + "\n".join(f"{name:<23} = {value}" for name, value in rows.items()))


WELL, ANSWERS = config(), Answer(0, "")


def node(
    version: str = "slurm 24.11.5",
    config: Answer = WELL,
    accounting: Answer = ANSWERS,
    missing: str = "",
) -> Answers:
    """The answers of a site where all is well but for what is given."""
    return {
        "began": Answer(0, "1000"),
        "ended": Answer(0, "1000"),
        "missing": Answer(0, missing),
        "version": Answer(0, version),
        "config": config,
        "accounting": accounting,
    }


def worst(findings: Iterable[Finding]) -> Finding:
    return max(findings, key=lambda finding: (OK, WARNING, ERROR).index(finding.severity))


def about(subject: str, findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


# --- Slurm ---


def test_a_site_where_all_is_well() -> None:
    found = list(slurm_check.slurm(node(), 2))
    assert {finding.severity for finding in found} == {OK}
    assert [finding.text for finding in found] == [
        "version 24.11.5",
        "the controller of cluster hpc answers",
        "it is on and answers",
    ]


@pytest.mark.parametrize(
    ("version", "severity"),
    [
        ("slurm-wlm 22.05.8", OK),
        ("slurm 26.05.5", OK),
        ("slurm 23.02.0-0rc1", OK),
        ("slurm 22.04.9", WARNING),
        ("slurm 20.11.9", WARNING),
        ("no number", ERROR),
    ],
)
def test_the_version(version: str, severity: Severity) -> None:
    assert worst(slurm_check.slurm(node(version), 2)).severity is severity


@pytest.mark.parametrize(
    ("accounting", "age", "poll", "severity", "words"),
    [
        (Answer(0, ""), "3 sec", 2.0, OK, "on and answers"),
        (DISABLED, "300 sec", 2.0, OK, "off: 300 s after its end"),
        (DISABLED, "5 sec", 2.0, WARNING, "every 2 s (POLL_INTERVAL)"),
        (DISABLED, "300 sec", 60.0, WARNING, "every 60 s (POLL_INTERVAL)"),
        (DISABLED, "0 sec", 2.0, OK, "off: when Slurm has forgotten"),
        (Answer(1, "sacct: error: x\nConnection refused"), "300 sec", 2.0, WARNING, "refused"),
        (Answer(124, ""), "300 sec", 2.0, WARNING, "without a word"),
    ],
)
def test_accounting(
    accounting: Answer, age: str, poll: float, severity: Severity, words: str
) -> None:
    site = node(config=config(MinJobAge=age), accounting=accounting)
    (finding,) = about("accounting", slurm_check.slurm(site, poll))
    assert finding.severity is severity
    assert words in finding.text
    assert bool(finding.remedy) == (severity is not OK)


def test_a_controller_that_is_away_is_an_error_with_its_words() -> None:
    away = Answer(1, "slurm_load_ctl_conf error: Unable to contact slurm controller")
    (finding,) = about("Slurm", slurm_check.slurm(node(config=away), 2))[1:]
    assert finding.severity is ERROR
    assert "Unable to contact slurm controller" in finding.text


def test_nothing_is_said_twice_of_a_program_that_is_missing() -> None:
    gone = Answer(127, "timeout: failed to run command")
    site = {**node(missing="sbatch scontrol sacct"), "version": gone, "config": gone}
    assert list(slurm_check.slurm({**site, "accounting": gone}, 2)) == []
    found = list(slurm_check.programs(site, here=False))
    assert [finding.severity for finding in found] == [ERROR, WARNING, WARNING]
    assert "sbatch is not on the PATH" in found[0].text
    assert "SSH_SHELL" in found[0].remedy
    assert "SSH_SHELL" not in next(slurm_check.programs(site, here=True)).remedy


@pytest.mark.parametrize(
    ("parameters", "poll", "severity"),
    [
        ("rl_enable", 1.0, OK),
        ("rl_enable", 0.5, WARNING),
        ("idle_on_node_suspend,rl_enable,rl_refill_rate=10", 0.3, OK),
        ("rl_enable,rl_refill_rate=1,rl_refill_period=5", 2.0, WARNING),
    ],
)
def test_rate_limits_against_poll_interval(
    parameters: str, poll: float, severity: Severity
) -> None:
    site = node(config=config(SlurmctldParameters=parameters))
    (finding,) = about("rate limit", slurm_check.slurm(site, poll))
    assert finding.severity is severity
    if severity is WARNING:
        least = float(re.findall(r"[\d.]+", finding.remedy)[0])
        assert about("rate limit", slurm_check.slurm(site, least))[0].severity is OK


@pytest.mark.parametrize("parameters", ["(null)", "", "enable_rl", "cloud_dns"])
def test_without_rate_limits_there_is_no_word_of_them(parameters: str) -> None:
    site = node(config=config(SlurmctldParameters=parameters))
    assert about("rate limit", slurm_check.slurm(site, 0.1)) == []


def test_customs_that_do_pman_no_harm_are_no_warnings() -> None:
    found = list(slurm_check.slurm(node(config=config(PrivateData="jobs,usage")), 2))
    assert "jobs,usage of others are hidden" in about("PrivateData", found)[0].text
    found = list(slurm_check.slurm(node(config=config(EnforcePartLimits="NO")), 2))
    assert "EnforcePartLimits=NO" in about("limits", found)[0].text
    assert worst(found).severity is OK
    assert not about("limits", slurm_check.slurm(node(config=config(EnforcePartLimits="ALL")), 2))


# --- the clock ---


@pytest.mark.parametrize(
    ("began", "ended", "words"),
    [
        (1000, 1000, "agrees"),
        (1004, 1005, "agrees"),
        (1030, 1030, "30 s ahead of"),
        (970, 971, "30 s behind"),
        # The connection took 20 s before the clock was read, or the answers came late.
        (1020, 1020, "agrees"),
        (1000, 1001, "agrees"),
    ],
)
def test_clocks(began: int, ended: int, words: str) -> None:
    slow = 20 if (began, ended) in ((1020, 1020), (1000, 1001)) else 0
    seen = {"began": Answer(0, str(began)), "ended": Answer(0, str(ended))}
    (finding,) = slurm_check.clock(seen, 1000, 1000 + slow, "login")
    assert words in finding.text
    assert (finding.severity is OK) == (words == "agrees")


def test_a_clock_that_is_not_told_is_no_finding() -> None:
    assert list(slurm_check.clock({}, 1000, 1000, "login")) == []
    seen = {"began": Answer(127, "date: not found"), "ended": Answer(127, "")}
    assert list(slurm_check.clock(seen, 1000, 1000, "login")) == []


# --- the shared disk ---

SPACE = "Filesystem 1024-blocks Used Available Capacity Mounted on\n"


def shared(**answers: Answer) -> list[Finding]:
    well = {
        "there": Answer(0, "/data/."),
        "content": Answer(0, "/data/x"),
        "write": Answer(0, ""),
        "jobs": Answer(0, ""),
        "space": Answer(0, f"{SPACE}nas:/a b 100 50 4194304 1% /data"),
    }
    return list(slurm_check.disk(well | answers, "/data", "/data/.pman"))


def test_a_disk_where_all_is_well() -> None:
    assert [finding.severity for finding in shared()] == [OK, OK, OK]
    assert "4.0 GiB free" in shared()[2].text


@pytest.mark.parametrize(
    ("wrong", "severity", "words"),
    [
        ({"there": Answer(2, "ls: No such file or directory")}, ERROR, "can't be entered"),
        ({"content": Answer(1, "find: Permission denied")}, ERROR, "can't be read"),
        ({"content": Answer(0, "")}, ERROR, "is empty"),
        ({"write": Answer(1, "mktemp: Read-only file system")}, ERROR, "read-only"),
        ({"write": Answer(1, "mktemp: Permission denied")}, WARNING, "can't write /data"),
        ({"jobs": Answer(1, "mktemp: No space left on device")}, ERROR, "No space left"),
        ({"space": Answer(0, f"{SPACE}nas:/a 100 50 1048575 9% /data")}, WARNING, "1024 MiB free"),
        ({"space": Answer(0, f"{SPACE}nas:/a 100 100 0 100% /data")}, ERROR, "0 MiB free"),
        ({"space": Answer(0, f"{SPACE}nas:/a 100 105 -5 105% /data")}, ERROR, "free"),
    ],
)
def test_what_is_wrong_with_a_disk(
    wrong: dict[str, Answer], severity: Severity, words: str
) -> None:
    finding = worst(shared(**wrong))
    assert finding.severity is severity
    assert words in finding.text
    assert finding.remedy


def test_answers_that_are_missing_break_nothing() -> None:
    assert [finding.severity for finding in slurm_check.disk({}, "/data", "/jobs")] == [ERROR] * 2
    assert list(slurm_check.slurm({}, 2)) == []


# --- the way there ---


class Away:
    """A login node that can't be reached."""

    where = "login.hpc.org"

    def run(self, *_: object, **__: object) -> Result:
        raise Unavailable("login.hpc.org shows an unknown key. Add it by hand")

    def close(self) -> None: ...


def test_an_unreachable_login_node_is_one_finding_and_no_exception() -> None:
    (finding,) = slurm_check.check(Away(), "/data", "/jobs", 2)
    assert (finding.severity, finding.subject) == (ERROR, "login node")
    assert (finding.text, finding.remedy) == (
        "login.hpc.org shows an unknown key",
        "Add it by hand",
    )


def test_the_errors_own_words_count_not_when_it_is_tried_again() -> None:
    error = Unavailable("login node unreachable since 10:02:00: the host is down; next try in 2 s")
    error.__cause__ = Unavailable("the host is down")
    finding = slurm_check.unreachable(error, "login")
    assert finding.text == "the host is down"
    assert "ssh login" in finding.remedy


# --- the scripts, by a real bash ---

TOOLS = "bash sh ls date df rm".split()
PROGRAMS = {
    "sbatch": "echo slurm 24.11.5",
    "squeue": "",
    "scancel": "",
    "sacct": "echo Slurm accounting storage is disabled >&2; exit 1",
    "scontrol": "echo 'MinJobAge   = 300 sec'; echo 'ClusterName = hpc'",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that say what Slurm's say; returns STOREBASE."""
    (tmp_path / "bin").mkdir()
    for name in (*TOOLS, *slurm_check.PROGRAMS.tools):
        found = shutil.which(name)
        assert found, name
        (tmp_path / "bin" / name).symlink_to(found)
    for name, text in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    storebase = tmp_path / "store base"
    (storebase / "cube").mkdir(parents=True)
    return storebase


def looked(storebase: Path, jobs: Path | None = None) -> list[Finding]:
    jobs = jobs or storebase / ".pman"
    return list(slurm_check.check(LocalShell(), str(storebase), str(jobs), 2))


def test_the_scripts_give_these_answers_and_leave_nothing(site: Path) -> None:
    found = looked(site, site / "deep" / "er")
    severities = {finding.subject: finding.severity for finding in found}
    del severities["JOBS_DIR"]  # the space of this machine's disk
    assert set(severities.values()) == {OK}
    assert set(severities) == {"login node", "programs", "Slurm", "accounting"} | {"STOREBASE"}
    assert [path.name for path in site.iterdir()] == ["cube"]


def test_what_slurm_says_with_control_characters_in_it_spoils_nothing(
    site: Path, tmp_path: Path
) -> None:
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\nprintf 'x\\036y\\037z'; exit 1\n")
    found = looked(site)
    assert "xyz" in about("Slurm", found)[1].text
    assert about("STOREBASE", found)[0].severity is OK


@pytest.mark.parametrize("program", ["sbatch", "sacct", "scontrol", "tar"])
def test_a_program_that_is_not_there(site: Path, tmp_path: Path, program: str) -> None:
    (tmp_path / "bin" / program).unlink()
    finding = worst(about("programs", looked(site)))
    assert finding.severity is (WARNING if program in ("sacct", "scontrol") else ERROR)
    assert finding.text.startswith(f"{program} is not on the PATH")


def test_a_shell_function_is_no_program(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pman runs sbatch by `timeout`, which knows no functions."""
    (tmp_path / "bin" / "sbatch").unlink()
    monkeypatch.setenv("BASH_FUNC_sbatch%%", "() { echo slurm 24.11.5; }")
    assert worst(about("programs", looked(site))).severity is ERROR


def test_a_storebase_that_is_not_there_or_empty(site: Path, tmp_path: Path) -> None:
    assert "can't be entered" in about("STOREBASE", looked(tmp_path / "away"))[0].text
    (tmp_path / "empty").mkdir()
    assert "is empty" in about("STOREBASE", looked(tmp_path / "empty"))[0].text


def test_a_disk_that_hangs_does_not_hide_the_rest(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_check, "DISK_SECONDS", 1.0)
    (tmp_path / "bin" / "ls").unlink()
    (tmp_path / "bin" / "ls").write_text("#!/bin/sh\nread -r _ < /dev/zero\n")
    (tmp_path / "bin" / "ls").chmod(0o755)
    found = looked(site)
    assert found[-1].subject == "STOREBASE"
    assert found[-1].severity is ERROR
    assert "did not end within 1 s" in found[-1].text
    assert about("Slurm", found)[0].severity is OK


def test_a_file_in_the_place_of_jobs_dir(site: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = about("JOBS_DIR", looked(site, tmp_path / "file" / "x"))[0]
    assert finding.severity is ERROR
    assert "Not a directory" in finding.text
