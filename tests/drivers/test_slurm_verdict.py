"""What is read from sbatch --test-only and what is known of a cluster, and what is made of it."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from pman.drivers.slurm_cluster import FIELD, Association, Cluster, Limits
from pman.drivers.slurm_verdict import (
    RECORD,
    SECTION,
    Answer,
    Need,
    accepted,
    read,
    refused,
)
from pman.errors import Unavailable
from pman.shell import Result
from tests.drivers.test_slurm import Scripted, driver, job, said

VERBOSE = """\
sbatch: defined options
sbatch: -------------------- --------------------
sbatch: comment             : allocation failure: munge
sbatch: cpus-per-task       : 2
sbatch: gres                : gres:gpu:a100:1
sbatch: mem                 : 2G
sbatch: nodes               : 2
sbatch: ntasks-per-node     : 1
sbatch: partition           : short
sbatch: time                : 1-01:30:00
sbatch: -------------------- --------------------
sbatch: end of defined options
sbatch: select/cons_tres: common_init: select/cons_tres loaded
sbatch: Linear node selection plugin loaded with argument 20
"""
STARTS = (
    "sbatch: Job 31 to start at 2026-11-22T16:33:21+0100 using 1 processors on nodes node[1-2] "
    "in partition short\n"
)
PARTITION = (
    "PartitionName=short AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES Hidden=NO "
    "MaxNodes=UNLIMITED MaxTime=00:05:00 MinNodes=0 State=UP TotalNodes=2 MaxMemPerNode=UNLIMITED "
    "MaxCPUsPerNode=UNLIMITED QoS=N/A\n"
)
OTHER = PARTITION.replace("=short", "=other").replace("YES", "NO").replace("00:05:00", "UNLIMITED")
NODES = FIELD.join(("short", "2", "4", "4000", "gpu:a100:2(S:0-1)", "idle", "node[1-2]")) + "\n"
USER = "lab|lab||long,normal|normal|01:10:00|cpu=4,mem=2G\n"
QOS = "normal||||\nlong|DenyOnLimit,PartitionTimeLimit|2-00:00:00|gres/gpu=1\n"


def answer(words: str, code: str = "0") -> str:
    return code + FIELD + words + RECORD


def printed(*answers: str, enforced: str = "associations,limits,qos", nodes: str = NODES) -> str:
    facts = (enforced + "\n", PARTITION + OTHER, nodes, "users chris\n", USER, QOS)
    return SECTION.join(("".join(answers), *facts))


def known(**changes: object) -> Cluster:
    return replace(read(printed())[1], **changes)  # type: ignore[arg-type]


def asking(**options: str) -> Answer:
    return Answer("0", "", {name.replace("_", "-"): value for name, value in options.items()})


def warnings(cluster: Cluster, **options: str) -> tuple[str, ...]:
    return accepted(asking(**options), "", cluster).warnings


# what is read


def test_the_options_are_apart_from_the_words() -> None:
    ((found,), _) = read(printed(answer(VERBOSE + STARTS)))
    assert found.words == STARTS.strip()
    assert found.options["partition"] == "short"
    assert found.options["comment"] == "allocation failure: munge"
    assert not any("---" in name for name in found.options)


def test_what_a_script_asks_for() -> None:
    ((found,), _) = read(printed(answer(VERBOSE)))
    need = Need.of(found.options)
    assert (need.nodes, need.cpus, need.memory) == (2, 2, 2048)
    assert need.gres == {"gpu": 1, "gpu:a100": 1}
    assert need.time == timedelta(days=1, hours=1, minutes=30)
    assert need.tres == {"cpu": 4, "mem": 4096, "node": 2, "gres/gpu": 2, "gres/gpu:a100": 2}


@pytest.mark.parametrize(
    ("options", "need"),
    [
        ({}, Need(1, 1, 0, {}, None)),
        ({"nodes": "1-4", "time": "UNLIMITED"}, Need(1, 1, 0, {}, None)),
        ({"nodes": "2", "ntasks": "5", "cpus-per-task": "2"}, Need(2, 6, 0, {}, None)),
        ({"ntasks": "3", "mem-per-cpu": "500"}, Need(1, 3, 1500, {}, None)),
        ({"mem": "0?"}, Need(1, 1, 0, {}, None)),
        ({"nodes": "2", "gpus": "3"}, Need(2, 1, 0, {"gpu": 2}, None)),
        ({"ntasks": "2", "gpus-per-task": "1"}, Need(1, 2, 0, {"gpu": 2}, None)),
        ({"gpus-per-node": "v:2"}, Need(1, 1, 0, {"gpu": 2, "gpu:v": 2}, None)),
        ({"gres": "gres/gpu:2,gres/tape"}, Need(1, 1, 0, {"gpu": 2, "tape": 1}, None)),
        (
            {"time": "01:00:00", "time-min": "00:04:00"},
            Need(1, 1, 0, {}, timedelta(minutes=4)),
        ),
    ],
)
def test_each_way_to_ask(options: Mapping[str, str], need: Need) -> None:
    assert Need.of(options) == need


def test_what_is_known_of_a_cluster() -> None:
    _, cluster = read(printed())
    assert cluster.enforced == {"associations", "limits", "qos"}
    assert [*cluster.partitions] == ["short", "other"]
    (nodes,) = cluster.nodes["short"]
    assert (nodes.count, nodes.cpus, nodes.memory, nodes.names) == (2, 4, 4000, "node[1-2]")
    assert nodes.gres == {"gpu": 2, "gpu:a100": 2}
    assert cluster.groups == {"users", "chris"}
    assert cluster.default_account == "lab"
    (association,) = cluster.associations
    assert association.qos == ("long", "normal")
    assert association.limits.tres == {"cpu": 4, "mem": 2048}
    assert cluster.qos["long"].wall == timedelta(days=2)


@pytest.mark.parametrize("facts", ["", SECTION, SECTION * 6, SECTION + "\x00|||\n" * 3])
def test_a_cluster_of_which_nothing_is_known(facts: str) -> None:
    (one,), cluster = read(answer(VERBOSE + STARTS) + facts)
    found = accepted(one, one.words, cluster)
    assert (found.accepted, found.partition, found.warnings) == (True, "short", ())
    assert not refused(one, "Requested node configuration is not available", cluster).accepted


@pytest.mark.parametrize(
    ("state", "away"),
    [
        *((word, False) for word in "idle mix alloc comp idle~ alloc# mix+ idle- plnd".split()),
        *((word, True) for word in "down drain drng down* idle* maint resv fail inval".split()),
        ("idle$", True),
    ],
)
def test_which_nodes_are_away(state: str, away: bool) -> None:
    _, cluster = read(printed(nodes=NODES.replace("idle", state)))
    assert cluster.nodes["short"][0].away is away


# what is made of it


AFTERNOON = datetime(2026, 11, 22, 15, 33, 21, tzinfo=UTC)


@pytest.mark.parametrize(
    ("words", "start", "nodes", "partition"),
    [
        (STARTS, AFTERNOON, "node[1-2]", "short"),
        (STARTS.replace("00 using", "00 a using"), AFTERNOON, "node[1-2]", "short"),  # 26.05
        (STARTS.replace("+0100", ""), None, "node[1-2]", "short"),
        ("the site's own words", None, "", ""),
    ],
    ids="usual stray no-zone other".split(),
)
def test_the_start_of_a_job(words: str, start: datetime | None, nodes: str, partition: str) -> None:
    found = accepted(Answer("0", words), words, Cluster())
    assert (found.start, found.nodes, found.partition) == (start, nodes, partition)


def test_a_list_of_partitions_needs_one_that_takes_the_job() -> None:
    assert warnings(known(), partition="short,other", time="01:00:00") == ()
    assert len(warnings(known(), partition="short", time="01:00:00")) == 1


def test_without_a_partition_the_default_one_counts() -> None:
    assert "partition short allows 0:05:00" in warnings(known(), time="01:00:00")[0]


def test_a_partition_that_the_site_chose_instead_counts() -> None:
    words = STARTS.replace("partition short", "partition other")
    options = {"partition": "short", "time": "01:00:00"}
    assert accepted(Answer("0", words, options), words, known()).warnings == ()


def test_a_qos_may_lift_the_partitions_time_limit() -> None:
    assert warnings(known(), time="01:00:00", qos="long") == ()


@pytest.mark.parametrize(
    ("flags", "of_partition", "of_qos", "warned"),
    [
        ("", 10, 30, True),
        ("OverPartQOS", 10, 30, False),
        ("", 30, 10, False),
        ("", None, 10, True),
        ("", None, None, True),
    ],
)
def test_the_first_of_several_limits_counts(
    flags: str, of_partition: int | None, of_qos: int | None, warned: bool
) -> None:
    """The partition's QOS goes before the job's, and that before the association's (5 min)."""

    def limits(minutes: int | None, words: str = "") -> Limits:
        wall = None if minutes is None else timedelta(minutes=minutes)
        return Limits("QOS", wall, flags=frozenset(words.split(",")))

    _, cluster = read(printed())
    cluster = replace(
        cluster,
        partitions={"other": {**cluster.partitions["other"], "QoS": "whole"}},
        qos={"whole": limits(of_partition), "mine": limits(of_qos, flags)},
        associations=[Association("lab", "", ("mine",), "mine", limits(5))],
    )
    found = warnings(cluster, partition="other", time="00:20:00")
    assert any("MaxWall" in warning for warning in found) is warned


def test_limits_that_are_not_enforced_are_no_limits() -> None:
    loose = known(enforced=frozenset({"associations"}))
    assert len(warnings(known(), partition="other", time="02:00:00")) == 1
    assert warnings(loose, partition="other", time="02:00:00") == ()


def test_an_association_for_the_partition_goes_before_the_general_one() -> None:
    general, special = (
        Association("lab", partition, (), "", Limits(partition)) for partition in ("", "short")
    )
    for order in ([special, general], [general, special]):
        cluster = known(associations=order)
        assert cluster.association("lab", "short") is special
        assert cluster.association("lab", "other") is general
        assert cluster.association("else", "other") is None


def test_a_name_that_is_known_is_not_corrected() -> None:
    words = "Invalid account or account/partition combination specified"
    found = refused(asking(account="lab", partition="other"), words, known())
    assert found.message == words


def test_nodes_chosen_by_more_than_size_are_not_judged() -> None:
    words = "Requested node configuration is not available"
    big = {"partition": "short", "cpus-per-task": "5"}
    cluster = known(enforced=frozenset())
    assert "4 CPUs" in refused(Answer("1", words, big), words, cluster).message
    choosy = {**big, "constraint": "fast"}
    assert refused(Answer("1", words, choosy), words, cluster).message == words


# the driver's call


def test_all_jobs_are_asked_about_at_once() -> None:
    shell = Scripted(said(printed(answer(STARTS), answer("allocation failure: No", "1"))))
    found = driver(shell).test([job(0), job(1)])
    assert [found[name].accepted for name in ("jid.0", "jid.1")] == [True, False]
    assert found["jid.1"].message == "No"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("allocation failure: Unable to contact slurm controller (connect failure)", "1"),
        ("allocation failure: Socket timed out on send/recv operation", "1"),
        ("allocation failure: Protocol authentication error", "1"),
        ("", "124"),
        ("timeout: failed to run command 'sbatch': No such file or directory", "127"),
        ("", "137"),
    ],
)
def test_an_outage_is_no_verdict(words: str, code: str) -> None:
    with pytest.raises(Unavailable):
        driver(Scripted(said(printed(answer(VERBOSE + words, code))))).test([job()])


@pytest.mark.parametrize(
    "result",
    [
        said(printed(answer(STARTS))),
        said(printed(answer(STARTS), answer(STARTS)), code=1, stderr="mktemp: No space left"),
        said(printed(answer(STARTS), answer(STARTS)), truncated=True),
    ],
    ids="too-few failed cut".split(),
)
def test_an_answer_that_is_not_whole_is_no_verdict(result: Result) -> None:
    with pytest.raises(Unavailable, match=r"login\.hpc\.org"):
        driver(Scripted(result)).test([job(0), job(1)])


def test_a_comment_with_the_words_of_an_outage_is_no_outage() -> None:
    shell = Scripted(said(printed(answer(VERBOSE + "allocation failure: No", "1"))))
    found = driver(shell).test([job()])["jid.0"]
    assert not found.accepted
    assert found.message.startswith("No; it asks for 1 day, 1:30:00 and partition short allows")


@pytest.mark.parametrize(("year", "told"), [(2027, True), (3047, False)])
def test_an_estimate_that_is_centuries_away_is_none(year: int, told: bool) -> None:
    shell = Scripted(said(printed(answer(VERBOSE + STARTS.replace("2026", str(year))))))
    verdict = driver(shell).test([job()])["jid.0"]
    assert (verdict.start is not None) == told
    assert any("can't be told" in warning for warning in verdict.warnings) != told
