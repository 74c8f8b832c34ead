"""The lab itself: it runs what it says and leaves nothing behind."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import packages, problem
from tests.lab.cgroups import cgroup_problem
from tests.lab.debian import entries
from tests.lab.images import python_image
from tests.lab.slurm import SlurmLab
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
REASON = problem()

# In CI a lab that can't run is a failure, not a skip.
pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(bool(REASON) and not os.environ.get("CI"), reason=REASON or ""),
]

ENDED = ("COMPLETED", "FAILED", "OUT_OF_MEMORY", "TIMEOUT", "CANCELLED", "NODE_FAIL")


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    """A cluster of the machine's release, shared by the tests that leave it as it was."""
    with SlurmLab() as cluster:
        yield cluster


def submit(lab: SlurmLab, script: str, *options: str) -> str:
    """Submit a script as the lab's user; the job's id."""
    command = ("sbatch", "--parsable", "--output=%j.log", *options)
    return lab.run(*command, input=f"#!/bin/bash\n{script}\n", user=lab.user).stdout.strip()


def end_of(lab: SlurmLab, job: str) -> str:
    """The state in which a job ends."""

    def state() -> str | None:
        word = lab.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").stdout.strip()
        return word if word in ENDED else None

    return wait_for(state, timeout=30, what=f"the end of job {job}")


def log_of(lab: SlurmLab, job: str) -> str:
    """What a job printed."""
    return lab.run("cat", f"{job}.log", user=lab.user).stdout


def over_ssh(lab: SlurmLab, command: str, host: str = "login") -> subprocess.CompletedProcess[str]:
    """Run a command on the login node as a client would."""
    return subprocess.run(
        ["ssh", "-F", str(lab.ssh_config), host, command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def processes_with(text: str) -> list[str]:
    """The command lines of the machine's processes that contain a text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_text(errors="replace").replace("\0", " ")
        except OSError:  # it ended while we looked
            continue
        if text in line:
            found.append(line)
    return found


def machine() -> dict[str, str]:
    """The files of the machine that a lab has versions of its own of."""
    files = [Path(f"/etc/{name}") for name in ("passwd", "group", "shadow", "hosts")]
    return {str(file): file.read_text() for file in [*files, *Path("/etc/slurm").glob("*.conf")]}


@pytest.mark.parametrize("cgroup", [False, True])
def test_nothing_stays_behind(cgroup: bool) -> None:
    if cgroup and (reason := cgroup_problem()):
        pytest.skip(reason)
    before = machine()
    lab = SlurmLab(cgroup=cgroup)
    lab.start()
    root, name = str(lab.root), lab.root.name
    job = submit(lab, f"exec -a {root} sleep 600")
    running = ("squeue", "-h", "-j", job, "-t", "running")
    wait_for(lambda: lab.run(*running).stdout, timeout=30, what="the job to run")
    wait_for(lambda: processes_with(f"{root} 600"), timeout=10, what="the job's own process")
    lab.stop()
    assert not Path(root).exists()
    assert not processes_with(root)
    assert name not in Path("/proc/self/mounts").read_text()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/*{name}*"))
    assert machine() == before


def test_nothing_stays_behind_when_the_parent_is_killed() -> None:
    code = (
        "import sys\n"
        "from tests.lab.slurm import SlurmLab\n"
        "lab = SlurmLab()\n"
        "lab.start()\n"
        "print(lab.root, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        root = parent.stdout.readline().strip()
        assert processes_with(root)
        parent.kill()
    wait_for(lambda: not processes_with(root), timeout=20, what="the end of the lab")
    assert not Path(root).exists()


def test_a_job_runs_as_the_user(lab: SlurmLab) -> None:
    job = submit(lab, f"id -un; touch {lab.storebase}/by-a-job", "--gres=gpu:1")
    assert end_of(lab, job) == "COMPLETED"
    assert log_of(lab, job) == "chris\n"
    made = lab.storebase / "by-a-job"
    assert made.stat().st_uid == lab.storebase.stat().st_uid != 0


def test_two_at_once(lab: SlurmLab) -> None:
    with SlurmLab(extra_conf=["PartitionName=other Nodes=node1 State=UP"]) as other:
        assert "other" in other.run("sinfo", "-h", "-o", "%P").stdout
        assert "other" not in lab.run("sinfo", "-h", "-o", "%P").stdout
        assert other.settings["SSH_PORT"] != lab.settings["SSH_PORT"]


@pytest.mark.parametrize("shell", ["bash -c", "bash -l -c"])
def test_calls_are_counted_on_the_cluster(lab: SlurmLab, shell: str) -> None:
    awkward = ["squeue", "--format=%i\x1f|\x1e%j\t", "--name=a 'b\"\n$c", "--states="]
    lab.clear_calls()
    before = lab.connections()
    done = over_ssh(lab, f"{shell} {shlex.quote(shlex.join(awkward) + '; sinfo --version')}")
    assert "slurm" in done.stdout
    assert lab.calls() == [awkward, ["sinfo", "--version"]]
    assert lab.connections() == before + 1


def test_long_calls_at_once_are_all_counted(lab: SlurmLab) -> None:
    lab.clear_calls()
    ids = ",".join(str(number) for number in range(10000, 16000))
    over_ssh(lab, f"for n in 1 2 3 4 5 6 7 8; do squeue -h -j {ids} & done; wait")
    assert lab.calls() == [["squeue", "-h", "-j", ids]] * 8


def test_calls_of_jobs_and_of_the_admin_are_not_counted(lab: SlurmLab) -> None:
    lab.clear_calls()
    job = submit(lab, f"PATH={lab.root}/bin:$PATH squeue --version")
    assert end_of(lab, job) == "COMPLETED"
    assert log_of(lab, job).startswith("slurm")
    assert lab.calls() == []


def test_a_login_is_noisy(lab: SlurmLab) -> None:
    done = over_ssh(lab, "bash -l -c 'echo answer'")
    assert done.stdout.endswith("\nanswer\n") and done.stdout != "answer\n"
    assert done.stderr.count("\n") > 1


def test_one_can_log_in_through_a_jump(lab: SlurmLab) -> None:
    before = lab.connections()
    assert over_ssh(lab, "id -un", host="behind").stdout == "chris\n"
    assert lab.connections() == before + 2


def test_sshd_stops_with_its_connections_and_starts_again(lab: SlurmLab) -> None:
    with subprocess.Popen(
        ["ssh", "-F", str(lab.ssh_config), "login", "echo in; sleep 600"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as session:
        assert session.stdout is not None
        assert session.stdout.readline() == "in\n"
        lab.stop_service("sshd")
        assert session.wait(timeout=10) == 255
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(lab.settings["SSH_PORT"])), timeout=5)
    lab.start_service("sshd")
    assert over_ssh(lab, "id -un").stdout == "chris\n"


def test_servers_stop_and_start_again(lab: SlurmLab) -> None:
    job = submit(lab, "exit 3")
    assert end_of(lab, job) == "FAILED"
    lab.stop_service("slurmctld")
    assert "DOWN" in lab.run("scontrol", "ping", check=False).stdout
    lab.start_service("slurmctld")
    assert end_of(lab, job) == "FAILED"
    for name in ("slurmd1", "slurmd2"):
        lab.stop_service(name)
        lab.start_service(name)
    assert end_of(lab, submit(lab, "true", "--nodes=2")) == "COMPLETED"


def test_the_machines_own_commands_reach_it_from_outside(lab: SlurmLab) -> None:
    environment = {**os.environ, "SLURM_CONF": str(lab.slurm_conf)}
    command = ["sinfo", "--noheader", "--format=%P"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["debug*", "short", "gpu"]


def test_without_accounting_there_is_none(lab: SlurmLab) -> None:
    done = over_ssh(lab, "sacct")
    assert done.returncode == 1
    assert "accounting storage is disabled" in done.stderr


def test_accounting_knows_ended_jobs_and_limits_wait() -> None:
    with SlurmLab(accounting=True) as lab:
        first = submit(lab, "sleep 600", "--qos=limited")
        second = lab.run(*("sbatch", "--qos=limited", "--wrap=true"), user=lab.user, check=False)
        assert second.returncode == 1
        assert "QOSMaxSubmitJobPerUserLimit" in second.stderr
        lab.run("scancel", first)
        query = ("sacct", "-X", "-n", "-P", "-j", first, "-o", "State")
        wait_for(
            lambda: lab.run(*query).stdout.startswith("CANCELLED"),
            timeout=30,
            what="sacct to know the end",
        )
        lab.stop_service("slurmdbd")
        assert lab.run(*query, check=False).returncode == 1
        lab.start_service("slurmdbd")
        assert lab.run(*query).stdout.startswith("CANCELLED")


def test_a_job_really_runs_out_of_memory() -> None:
    if reason := cgroup_problem():
        pytest.skip(reason)
    with SlurmLab(cgroup=True) as lab:
        greedy = "exec tail /dev/zero"  # it keeps the line that never ends
        assert end_of(lab, submit(lab, greedy, "--mem=50M")) == "OUT_OF_MEMORY"


@pytest.mark.parametrize(
    ("release", "version"), [("trixie", "slurm-wlm 24."), ("sid", "slurm-wlm 2")]
)
def test_newer_releases(release: str, version: str, lab: SlurmLab) -> None:
    with SlurmLab(release=release) as newer:
        assert newer.run("sinfo", "--version").stdout.startswith(version)
        assert newer.run("sinfo", "--version").stdout != lab.run("sinfo", "--version").stdout
        assert end_of(newer, submit(newer, "true")) == "COMPLETED"
        assert "Unrecognized" not in over_ssh(newer, "squeue --me --only-job-state").stderr


@pytest.mark.parametrize(
    ("release", "container"),
    [
        (
            "sid",
            "apptainer exec --containall --bind '{data}/in:/share/incoming:ro'"
            " --bind '{data}/out:/share/outgoing:rw' {image}",
        ),
        (
            "machine",
            "ch-run --private-tmp --bind '{data}/in:/share/incoming'"
            " --bind '{data}/out:/share/outgoing' {image} --",
        ),
    ],
)
def test_containers_run_in_jobs(release: str, container: str) -> None:
    code = (
        "import chris_plugin, numpy, PIL, pydicom, pathlib, shutil\n"
        'shutil.copy("/share/incoming/a b", "/share/outgoing/copy")\n'
        'pathlib.Path("/share/incoming/new").touch()\n'
    )
    with SlurmLab(release=release) as lab:
        data = lab.storebase / "it's data"
        for name in ("in", "out"):
            (data / name).mkdir(parents=True)
        (data / "in" / "a b").write_text("hello")
        (data / "out").chmod(0o777)
        quoted = str(data).replace("'", "'\\''")
        command = container.format(data=quoted, image=shlex.quote(str(python_image())))
        job = submit(lab, f"{command} python3 -c {shlex.quote(code)}")
        assert end_of(lab, job) == "FAILED"
        assert log_of(lab, job).rstrip().endswith("'/share/incoming/new'")
        assert (data / "out" / "copy").read_text() == "hello"


def test_up_and_down() -> None:
    # Not the `up` of a person; and the paths of pytest's own folders are too long.
    temporary = Path(tempfile.mkdtemp(prefix="up-"))

    def command(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tests.lab", *argv],
            cwd=REPOSITORY,
            env={**os.environ, "TMPDIR": str(temporary)},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    try:
        settings = command("up").stdout
        assert all(line.startswith("export ") for line in settings.splitlines())
        assert "SSH_PORT" in settings
        again = command("up")
        assert again.stdout == settings and "already up" in again.stderr
        assert processes_with(str(temporary))
    finally:
        command("down")
    assert not processes_with(str(temporary))
    temporary.rmdir()  # empty


def test_install_has_nothing_to_do_where_the_lab_runs() -> None:
    assert packages.missing() == []
    packages.install()


def test_both_formats_of_apt_sources_are_read(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://no/ bookworm main\n"
        "deb-src http://no/ bookworm main\n"
        "deb [arch=amd64 trusted=yes] http://one/debian bookworm main contrib\n"
    )
    (tmp_path / "sources.list.d" / "x.sources").write_text(
        "Types: deb\nURIs: http://two/debian\n# a note\nSuites: bookworm bookworm-updates\n"
        "Components: main\n\nTypes: deb-src\nURIs: http://no/\nSuites: bookworm\n"
    )
    assert list(entries(tmp_path)) == [
        ("http://two/debian", ["bookworm", "bookworm-updates"]),
        ("http://one/debian", ["bookworm"]),
    ]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: SlurmLab(release="buster"), "known are machine, trixie, sid"),
        (lambda: SlurmLab(release="sid", accounting=True), "neither accounting nor cgroup"),
        (lambda: SlurmLab(Path("/tmp/" + "x" * 80)).start(), "longer than 60 bytes"),
    ],
)
def test_a_wrong_option_is_named(wrong: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrong()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="not empty"):
        SlurmLab(tmp_path).start()
    assert (tmp_path / "precious").exists()
