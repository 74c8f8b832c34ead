"""What the real Slurm says of scripts that it is only asked about, through the driver over SSH."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pman.drivers.slurm import SlurmDriver
from pman.errors import Rejected, Unavailable
from pman.jobs import Job, JobSpec, Verdict
from pman.rendering import Renderer
from pman.shell import SSHShell
from pman.site import Site as Values
from tests.e2e.conftest import need_lab
from tests.e2e.site import Site
from tests.lab import conf
from tests.lab.slurm import SlurmLab

pytestmark = pytest.mark.lab

LIMITS = "MaxWall=5 MaxTRESPerJob=cpu=2,node=1,mem=200,gres/gpu=1"


def job(lab: SlurmLab, site: Mapping[str, Any] | None = None, number: int = 0, **spec: Any) -> Job:
    """A job, rendered by the real template with the values of ``site``."""
    name = f"verdict.{number}"
    whole = JobSpec(
        **{
            "jid": "verdict",
            "name": name,
            "auid": "cube",
            "type": "ds",
            "image": "image",
            "argv": ("true",),
            "env": {},
            "labels": {},
            "input_dir": str(lab.storebase / "in"),
            "output_dir": str(lab.storebase / "out"),
            "folder": str(lab.storebase / ".pman" / name),
            "cpu_limit": 1000,
            "memory_limit": 200,
            **spec,
        }
    )
    document = Renderer(site=Values(site or {})).render(whole, "sbatch", "bare")
    return Job(whole, document, content="{}", engine="slurm")


@contextmanager
def driver(lab: SlurmLab, command: str = "bash -l") -> Iterator[SlurmDriver]:
    shell = SSHShell(
        "127.0.0.1",
        port=lab.ports.sshd,
        user=lab.user,
        key_file=lab.root / "ssh" / "key",
        known_hosts=lab.root / "ssh" / "known_hosts",
        command=command,
    )
    slurm = SlurmDriver(shell, lab.storebase, lab.storebase / ".pman", 2.0)
    try:
        yield slurm
    finally:
        slurm.close()


def verdict(lab: SlurmLab, site: Mapping[str, Any] | None = None, **spec: Any) -> Verdict:
    asked = job(lab, site, **spec)
    with driver(lab) as slurm:
        return slurm.test([asked])[asked.name]


@contextmanager
def updated(lab: SlurmLab, what: str, change: str, back: str) -> Iterator[None]:
    lab.run("scontrol", "update", what, *change.split())
    try:
        yield
    finally:
        lab.run("scontrol", "update", what, *back.split())


@pytest.fixture(params=["plain_site", "accounting_site", "newest_site"])
def lab(request: pytest.FixtureRequest) -> SlurmLab:
    """A cluster without accounting, one with it, and the newest Slurm."""
    site: Site = request.getfixturevalue(request.param)
    return site.lab


@pytest.fixture
def plain(plain_site: Site) -> SlurmLab:
    return plain_site.lab


@pytest.fixture(scope="module")
def strict() -> Iterator[SlurmLab]:
    """A site that refuses at once what its partitions don't allow."""
    need_lab()
    with SlurmLab(extra_conf=["EnforcePartLimits=ALL"]) as cluster:
        yield cluster


@pytest.fixture
def books(accounting_site: Site) -> SlurmLab:
    return accounting_site.lab


def test_a_job_that_fits(lab: SlurmLab) -> None:
    found = verdict(lab, {"partition": "gpu"}, gpu_limit=1, time_limit=10, number_of_workers=2)
    assert found.accepted
    assert found.warnings == ()
    assert (found.partition, found.nodes) == ("gpu", "node[1-2]")
    assert found.start is not None
    assert abs(found.start - datetime.now(UTC)) < timedelta(hours=1)
    assert "to start at" in found.message
    assert "sbatch:" not in found.message


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"cpu_limit": 5000}, "asks for 1 node with 5 CPUs, 200 MiB each"),
        ({"memory_limit": 4001}, "asks for 1 node with 1 CPU, 4001 MiB each"),
        ({"gpu_limit": 3}, "asks for 1 node with 1 CPU, 200 MiB, gpu:3 each"),
    ],
    ids="cpu memory gpu".split(),
)
def test_a_job_that_never_fits_is_refused_with_the_sizes(
    lab: SlurmLab, spec: Mapping[str, Any], why: str
) -> None:
    found = verdict(lab, **spec)
    assert not found.accepted
    assert found.message.startswith("Requested node configuration is not available; it ")
    assert why in found.message
    assert "partition debug has nodes with 4 CPUs, 4000 MiB, gpu:2" in found.message


def test_more_nodes_than_there_are(lab: SlurmLab) -> None:
    found = verdict(lab, number_of_workers=3)
    assert not found.accepted
    assert "it asks for 3 nodes and partition debug has 2" in found.message


def test_an_unknown_partition_and_the_nearest_one(lab: SlurmLab) -> None:
    found = verdict(lab, {"partition": "gpuu"})
    assert not found.accepted
    assert found.message.endswith(
        "Invalid partition name specified: 'gpuu'; did you mean 'gpu'? There are: debug, gpu, short"
    )


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ({"account": "labb"}, ": 'labb'; did you mean 'lab'? There are: lab"),
        ({"qos": "norma"}, ": 'norma'; did you mean 'normal'? There are: "),
    ],
    ids="account qos".split(),
)
def test_an_unknown_account_or_qos_and_the_nearest_one(
    books: SlurmLab, site: Mapping[str, Any], words: str
) -> None:
    found = verdict(books, site)
    assert not found.accepted
    assert found.message.startswith("Invalid ")
    assert words in found.message


def test_a_wrong_directive_is_refused(lab: SlurmLab) -> None:
    found = verdict(lab, {"directives": ["--time=soon"]})
    assert (found.accepted, found.message) == (False, "Invalid --time specification")


def test_over_the_partitions_time_limit(lab: SlurmLab) -> None:
    found = verdict(lab, {"partition": "short"}, time_limit=90)
    assert found.accepted
    assert found.warnings == (
        "it would wait for ever: it asks for 1:30:00 and partition short allows 0:05:00 "
        "(PartitionTimeLimit): lower TIMELIMIT_MINUTES or choose another partition",
    )


def test_no_warning_where_another_partition_of_the_list_takes_it(plain: SlurmLab) -> None:
    assert verdict(plain, {"partition": "short,debug"}, time_limit=90).warnings == ()


def test_over_limits_where_slurm_enforces_them(strict: SlurmLab) -> None:
    found = verdict(strict, {"partition": "short"}, time_limit=90)
    assert not found.accepted
    assert found.message.startswith("Requested time limit is invalid")
    assert "partition short allows 0:05:00" in found.message
    assert verdict(strict, {"partition": "short"}, time_limit=5).accepted


def test_over_the_partitions_nodes_and_memory(lab: SlurmLab) -> None:
    change, back = "MaxNodes=1 MaxMemPerNode=150", "MaxNodes=UNLIMITED MaxMemPerNode=0"
    with updated(lab, "partitionname=short", change, back):
        nodes = verdict(lab, {"partition": "short"}, number_of_workers=2, memory_limit=100)
        memory = verdict(lab, {"partition": "short"})
    assert not nodes.accepted
    assert "it asks for 2 nodes and partition short allows 1 (PartitionNodeLimit)" in nodes.message
    assert memory.accepted
    assert len(memory.warnings) == 1
    assert "partition short allows 150 MiB (MaxMemPerLimit)" in memory.warnings[0]


@pytest.mark.parametrize("directive", ["--hold", "--priority=0"])
def test_a_held_job(lab: SlurmLab, directive: str) -> None:
    found = verdict(lab, {"directives": [directive]})
    assert found.accepted
    assert len(found.warnings) == 1
    assert "until somebody releases it" in found.warnings[0]


def test_a_partition_that_is_down(lab: SlurmLab) -> None:
    with updated(lab, "partitionname=short", "state=down", "state=up"):
        down = verdict(lab, {"partition": "short"})
        assert verdict(lab).warnings == ()
    with updated(lab, "partitionname=short", "state=inactive", "state=up"):
        inactive = verdict(lab, {"partition": "short"})
    assert down.accepted and inactive.accepted
    assert down.warnings == (
        "it would wait until its partition is open again: short is DOWN (PartitionDown)",
    )
    assert inactive.warnings[0].startswith("it waits for now")
    assert "Required partition not available" in inactive.warnings[0]


def test_nodes_that_are_away_are_no_refusal(lab: SlurmLab) -> None:
    """sbatch --test-only refuses it, and a real submission waits for the nodes."""
    with updated(lab, "nodename=node2", "state=drain reason=test", "state=resume"):
        away = verdict(lab, number_of_workers=2)
        here = verdict(lab, number_of_workers=1)
        big = verdict(lab, number_of_workers=2, cpu_limit=5000)
    assert away.accepted
    assert away.warnings == (
        "Slurm would take it and let it wait until nodes are back: "
        "of partition debug these are away: node2 (drain)",
    )
    assert here.accepted and not here.warnings
    assert not big.accepted


def test_a_group_that_may_not(lab: SlurmLab) -> None:
    with updated(lab, "partitionname=short", "AllowGroups=root", "AllowGroups=ALL"):
        found = verdict(lab, {"partition": "short"})
        others = verdict(lab, {"partition": "shorty"})
    said = found.warnings[0] if found.accepted else found.message  # Slurm 26.05 lets it wait
    assert "partition short is for the groups root" in said
    assert others.message.endswith("There are: debug, gpu")


@pytest.fixture(scope="module")
def limited(accounting_site: Site) -> Iterator[SlurmLab]:
    """Limits of a QOS, one that only keeps jobs waiting and one that denies them."""
    lab = accounting_site.lab
    lab.run(
        *("sacctmgr", "--immediate", "--quiet"),
        input=f"add qos walled {LIMITS}\nadd qos denied {LIMITS} flags=DenyOnLimit\n"
        f"modify user {lab.user} set qos+=walled,denied\n",
    )
    yield lab
    lab.run(
        *("sacctmgr", "--immediate", "--quiet"),
        input=f"modify user {lab.user} set qos-=walled,denied\nremove qos walled,denied\n",
    )


OVER: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "wall": ({"time_limit": 10}, "asks for 0:10:00 and QOS {} allows 0:05:00 (MaxWall)"),
    "cpu": ({"cpu_limit": 3000}, "asks for 3 CPUs and QOS {} allows 2 (MaxTRES)"),
    "node": (
        {"number_of_workers": 2, "memory_limit": 100},
        "asks for 2 nodes and QOS {} allows 1 (MaxTRES)",
    ),
    "mem": ({"memory_limit": 201}, "asks for 201 MiB and QOS {} allows 200 (MaxTRES)"),
    "gpu": ({"gpu_limit": 2}, "asks for 2 of gres/gpu and QOS {} allows 1 (MaxTRES)"),
}


@pytest.mark.parametrize("over", OVER)
def test_over_a_limit_of_the_qos(limited: SlurmLab, over: str) -> None:
    spec, words = OVER[over]
    waiting = verdict(limited, {"qos": "walled"}, **{"time_limit": 3, **spec})
    assert waiting.accepted
    assert [words.format("walled") in warning for warning in waiting.warnings] == [True]
    denied = verdict(limited, {"qos": "denied"}, **{"time_limit": 3, **spec})
    assert not denied.accepted
    assert "accounting/QOS policy" in denied.message
    assert words.format("denied") in denied.message


def test_within_the_limits_of_the_qos(limited: SlurmLab) -> None:
    found = verdict(limited, {"qos": "walled"}, time_limit=5, gpu_limit=1, cpu_limit=2000)
    assert found.accepted and not found.warnings


def test_a_job_over_a_limit_that_denies_is_refused_for_good(limited: SlurmLab) -> None:
    asked = job(limited, {"qos": "denied"}, time_limit=10)
    limited.run("mkdir", "-p", str(limited.storebase / "in"), user=limited.user)
    with driver(limited) as slurm:
        assert isinstance(slurm.submit([asked])[asked.name], Rejected)


def test_over_a_limit_of_the_account(books: SlurmLab) -> None:
    change = f"modify user {books.user} set maxwall={{}} maxtresperjob=cpu={{}}\n"
    books.run("sacctmgr", "--immediate", "--quiet", input=change.format(7, 1))
    try:
        found = verdict(books, time_limit=10, cpu_limit=2000)
    finally:
        books.run("sacctmgr", "--immediate", "--quiet", input=change.format(-1, -1))
    assert found.accepted
    assert len(found.warnings) == 2
    assert "account lab allows 0:07:00 (MaxWall)" in found.warnings[0]
    assert "asks for 2 CPUs and account lab allows 1 (MaxTRES)" in found.warnings[1]


@pytest.mark.parametrize(
    ("change", "back", "words"),
    [
        (
            "AllowAccounts=root",
            "AllowAccounts=ALL",
            "is lab and partition short allows root",
        ),
        ("DenyAccounts=lab", "DenyAccounts=", "account is lab, which partition short denies"),
        ("AllowQos=limited", "AllowQos=ALL", "qos is normal and partition short allows limited"),
        ("DenyQos=normal", "DenyQos=", "qos is normal, which partition short denies"),
    ],
)
def test_a_partition_that_is_not_for_everybody(
    books: SlurmLab, change: str, back: str, words: str
) -> None:
    with updated(books, "partitionname=short", change, back):
        found = verdict(books, {"partition": "short"})
    assert found.accepted
    assert [words in warning for warning in found.warnings] == [True]


def test_accounting_that_is_away_costs_its_warnings_alone(books: SlurmLab) -> None:
    books.stop_service("slurmdbd")
    try:
        found = verdict(books, {"partition": "short"}, time_limit=90)
    finally:
        books.start_service("slurmdbd")
    assert found.accepted
    assert "PartitionTimeLimit" in found.warnings[0]


def test_a_submit_limit_means_later(books: SlurmLab) -> None:
    first = job(books, {"qos": conf.LIMITED_QOS, "directives": ["--begin=now+1hour"]})
    with driver(books) as slurm:
        books.run("mkdir", "-p", str(books.storebase / "in"), user=books.user)
        assert isinstance(slurm.submit([first])[first.name], str)
        second = job(books, {"qos": conf.LIMITED_QOS}, number=1)
        found = slurm.test([second])[second.name]
        slurm.remove([first])
    assert found.accepted
    assert "it waits for now" in found.warnings[0]
    assert "QOSMaxSubmitJobPerUserLimit" in found.warnings[0]


def login_shell_with(lab: SlurmLab, name: str, commands: str) -> str:
    """A login shell on whose PATH there are these commands and no others."""
    tools = lab.root / name
    tools.mkdir()
    for command in commands.split():
        (tools / command).symlink_to(f"/usr/bin/{command}")
    return f"env PATH={tools} /bin/bash"


def test_a_controller_that_is_away_is_no_verdict(plain: SlurmLab) -> None:
    plain.stop_service("slurmctld")
    try:
        with driver(plain) as slurm, pytest.raises(Unavailable, match="contact slurm controller"):
            slurm.test([job(plain), job(plain, number=1)])
    finally:
        for name in ("slurmctld", "slurmd1", "slurmd2"):
            plain.start_service(name)


def test_a_login_node_without_sbatch_is_no_verdict(plain: SlurmLab) -> None:
    shell = login_shell_with(plain, "no-sbatch", "mktemp rm tar timeout head tr")
    with driver(plain, shell) as slurm, pytest.raises(Unavailable, match="sbatch can't be run"):
        slurm.test([job(plain)])


def test_without_scontrol_and_sinfo_there_is_still_a_verdict(plain: SlurmLab) -> None:
    shell = login_shell_with(plain, "sbatch-alone", "mktemp rm tar timeout head tr sed id sbatch")
    with driver(plain, shell) as slurm:
        found = slurm.test([job(plain)])["verdict.0"]
    assert (found.accepted, found.partition, found.warnings) == (True, "debug", ())


def test_nothing_is_left_behind(plain: SlurmLab) -> None:
    scratch = plain.storebase / "scratch"
    plain.run("mkdir", str(scratch), user=plain.user)
    jobs = [job(plain, number=number) for number in range(3)]
    with driver(plain, f"env TMPDIR={scratch} bash -l") as slurm:
        assert all(found.accepted for found in slurm.test(jobs).values())
    assert not list(scratch.iterdir())
    assert not Path(jobs[0].spec.folder).exists()
    assert "verdict." not in plain.run("squeue", "-h", "-t", "all", "-o", "%j").stdout


def test_the_calls_do_not_grow_with_the_jobs(lab: SlurmLab) -> None:
    def others(jobs: list[Job]) -> list[str]:
        lab.clear_calls()
        assert len(slurm.test(jobs)) == len(jobs)
        names = [argv[0] for argv in lab.calls()]
        assert names.count("sbatch") == len(jobs)
        return sorted(name for name in names if name != "sbatch")

    with driver(lab) as slurm:
        logins = lab.connections()
        one = others([job(lab)])
        ten = others([job(lab, number=number) for number in range(10)])
        assert lab.connections() == logins + 1
    assert one == ten
    books = ["sacctmgr", "sacctmgr"] if lab.options.accounting else []
    assert one == [*books, "scontrol", "scontrol", "sinfo"]


def test_each_job_has_its_own_verdict(plain: SlurmLab) -> None:
    jobs = [
        job(plain, number=0),
        job(plain, {"partition": "gpuu"}, number=1),
        job(plain, {"partition": "short"}, number=2, time_limit=90),
    ]
    with driver(plain) as slurm:
        found = slurm.test(jobs)
    assert [found[one.name].accepted for one in jobs] == [True, False, True]
    assert [len(found[one.name].warnings) for one in jobs] == [0, 0, 1]


def test_the_accounts_own_variables_do_not_change_the_verdict(plain: SlurmLab) -> None:
    profile = (
        "export SBATCH_PARTITION=none SBATCH_TIMELIMIT=99:00:00 SINFO_FORMAT=none; "
        "set -o noclobber; set -f; exec bash"
    )
    with driver(plain, f"bash -c '{profile}'") as slurm:
        found = slurm.test([job(plain, {"partition": "short"})])["verdict.0"]
    assert (found.accepted, found.partition, found.warnings) == (True, "short", ())
