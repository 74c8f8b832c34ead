"""What Slurm says of a script that it is only asked about, and why it may be wrong.

``sbatch --test-only`` looks at less than the scheduler does. It says when a job would start that
would wait for ever (unless EnforcePartLimits is set), and it refuses one that would only wait for
its nodes to be back. So the partitions, nodes and limits are asked for too, and compared with what
the script asks for: the `defined options` that ``sbatch --verbose`` prints (22.05 to 26.05 do).

Facts: sbatch(1), slurm.conf(5), squeue(1) JOB REASON CODES, sacctmgr(1), and Slurm's guide
"Resource Limits" for which limit counts.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from pman.drivers.slurm_cluster import (
    FIELD,
    Cluster,
    Limits,
    Nodes,
    cluster,
    duration,
    gres_counts,
    mebibytes,
    number,
)
from pman.jobs import Verdict

RECORD, SECTION = "\x1e", "\x1d"

# $1: seconds for one sbatch, and after which no other one is begun. The scripts come as a tar on
# stdin, named 0, 1, 2 and so on. Each question that is not about a script is asked once,
# and its failure costs its answer alone.
TEST = r"""
unset "${!SINFO_@}" "${!SCONTROL_@}"
export SLURM_TIME_FORMAT=%Y-%m-%dT%H:%M:%S%z
seconds=$1
SECONDS=0
folder=$(mktemp -d) || exit
trap 'rm -rf -- "$folder"' EXIT
tar --extract --directory="$folder" --file=- || exit
number=0
while [ -f "$folder/$number" ]; do
    [ "$SECONDS" -le "$seconds" ] || exit 0
    timeout "$seconds" sbatch --test-only --verbose "$folder/$number" \
        < /dev/null > "$folder/said" 2>&1
    code=$?
    words=$(head -c 65536 -- "$folder/said" | tr -d '\035\036\037')
    printf '%s\037%s\036' "$code" "$words"
    case $code in 124|126|127) exit 0 ;; esac
    case $words in *'Unable to contact slurm controller'*) exit 0 ;; esac
    number=$((number + 1))
done
ask() { timeout 15 "$@" 2> /dev/null < /dev/null | tr -d '\035'; }
user=$(id -un)
enforced=$(ask scontrol show config | sed -n 's/^AccountingStorageEnforce *= *//p')
printf '\035%s\035' "$enforced"
ask scontrol --all --oneliner show partition
printf '\035'
ask sinfo --all --noheader --exact --format=$'%R\037%D\037%c\037%m\037%G\037%t\037%N'
printf '\035'
id -Gn
printf '\035'
# Without accounting sacctmgr has no answer, and with a slow one it costs its time each time.
case $enforced in ''|none) printf '\035'; exit 0 ;; esac
ask sacctmgr --noheader --parsable2 show user where user="$user" withassoc \
    format=defaultaccount,account,partition,qos,defaultqos,maxwall,maxtresperjob
printf '\035'
ask sacctmgr --noheader --parsable2 show qos format=name,flags,maxwall,maxtresperjob
exit 0
"""


@dataclass(frozen=True)
class Answer:
    """What sbatch said of one script."""

    code: str
    """Its exit code."""
    words: str
    """What it wrote, without what --verbose adds."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The effective options of the script, by their long names; empty: sbatch did not get so far.
    """


@dataclass(frozen=True)
class Need:
    """What a script asks for, at the least."""

    nodes: int
    cpus: int
    """On each node."""
    memory: int
    """MiB on each node; 0: nothing is said, or all that the node has."""
    gres: Mapping[str, int]
    """On each node."""
    time: timedelta | None

    @classmethod
    def of(cls, options: Mapping[str, str]) -> "Need":
        nodes = max(1, number(options.get("nodes", "")))
        tasks = number(options.get("ntasks-per-node", "")) or math.ceil(
            max(1, number(options.get("ntasks", ""))) / nodes
        )
        cpus = tasks * max(1, number(options.get("cpus-per-task", "")))
        gres = gres_counts(options.get("gres", ""))
        shares = {"gpus-per-node": 1.0, "gpus-per-task": tasks, "gpus": 1 / nodes}
        for option, share in shares.items():
            for name, count in gres_counts(_gpus(options.get(option, ""))).items():
                gres[name] = gres.get(name, 0) + math.ceil(count * share)
        return cls(
            nodes=nodes,
            cpus=cpus,
            memory=mebibytes(options.get("mem", ""))
            or cpus * mebibytes(options.get("mem-per-cpu", "")),
            gres=gres,
            time=duration(options.get("time-min", "")) or duration(options.get("time", "")),
        )

    def fits(self, nodes: Nodes) -> bool:
        """Whether each of ``nodes`` has what it asks for."""
        return (
            self.cpus <= nodes.cpus
            and self.memory <= nodes.memory
            and all(count <= nodes.gres.get(name, 0) for name, count in self.gres.items())
        )

    @property
    def tres(self) -> Mapping[str, int]:
        """Of all nodes together, by the names that limits have."""
        each = {"cpu": self.cpus, "mem": self.memory, "node": 1}
        each |= {f"gres/{name}": count for name, count in self.gres.items()}
        return {name: count * self.nodes for name, count in each.items()}


# --- what the command printed ---


def read(text: str) -> tuple[Sequence[Answer], Cluster]:
    """The answers in the order of the scripts, and what is known of the cluster.

    There are fewer answers than scripts when sbatch could not be asked to the end.
    """
    said, *facts = text.split(SECTION)
    return [_answer(*record.split(FIELD, 1)) for record in said.split(RECORD)[:-1]], cluster(facts)


_OPTION = re.compile(r"sbatch: ([a-z][a-z0-9-]*) +: (.*)")
# What --verbose adds of the plugins that sbatch loads.
_PLUGIN = re.compile(r"sbatch: ([a-z_]+/[a-z_0-9]+: |.* plugin loaded\b)")


def _answer(code: str, text: str) -> Answer:
    options: dict[str, str] = {}
    words = []
    listing = False
    for line in text.splitlines():
        if line == "sbatch: defined options":
            listing = True
        elif line == "sbatch: end of defined options":
            listing = False
        elif listing and (option := _OPTION.fullmatch(line)):
            options.setdefault(option[1], option[2].strip())
        elif not listing and not _PLUGIN.match(line):
            words.append(line)
    return Answer(code, "\n".join(words), options)


def _gpus(text: str) -> str:
    """What ``--gpus`` and its kin take, as a gres."""
    return ",".join(f"gpu:{word}" for word in text.split(",") if word)


# --- what is made of it ---

_START = re.compile(
    r"Job \d+ to start at (\S+).* on nodes (\S+)(?: in partition (\S+))?", re.IGNORECASE
)


FAR = timedelta(days=365)
"""An estimate that is further away is none: Slurm counts as if jobs that can't start did."""


def accepted(answer: Answer, said: str, cluster: Cluster) -> Verdict:
    """The verdict on a script that sbatch has nothing against; ``said``: its words in one line."""
    found = _START.search(said)
    partition = (found[3] or "") if found else ""
    start = _moment(found[1]) if found else None
    warnings = [*_warnings(answer.options, partition, cluster)]
    if start is not None and start - datetime.now(UTC) > FAR:
        start = None
        warnings.append(
            "when it would start can't be told: by Slurm's estimate it is more than a year until "
            "then; see `squeue --start` for jobs that are before it and can't start"
        )
    return Verdict(
        True,
        said or "accepted",
        start=start,
        partition=partition,
        nodes=found[2] if found else "",
        warnings=tuple(warnings),
    )


def refused(answer: Answer, said: str, cluster: Cluster) -> Verdict:
    """The verdict on a script that sbatch refused: its words, why, and what there is instead.

    It refuses a job whose nodes are down or reserved as well, which it would take and let wait.
    """
    names = _nearest(answer.options, said, cluster)
    if names:
        return Verdict(False, f"{said}{names}")
    reasons = list(_never(answer.options, "", cluster))
    if "node configuration is not available" in said:
        away = "" if reasons else _away(answer.options, cluster)
        if away:
            return Verdict(True, said, warnings=(away,))
        reasons += _too_big(answer.options, cluster)
    return Verdict(False, "; ".join([said, *reasons]))


def later(said: str) -> Verdict:
    """The verdict on a script that a limit or a closed partition holds up for now."""
    return Verdict(
        True, said, warnings=(f"it waits for now, and pman submits it again until it goes: {said}",)
    )


def _moment(text: str) -> datetime | None:
    try:
        start = datetime.fromisoformat(text)
    except ValueError:
        return None
    return start if start.tzinfo else None


# Slurm's words, and the option whose value they are about.
_INVALID = (
    ("invalid partition", "partition"),
    ("invalid account", "account"),
    ("invalid qos", "qos"),
)


def _nearest(options: Mapping[str, str], said: str, cluster: Cluster) -> str:
    """Which name is not known, and which ones are; empty: that is not why."""
    option = next((name for words, name in _INVALID if words in said.lower()), "")
    known = {
        "partition": {
            name
            for name, words in cluster.partitions.items()
            if words.get("Hidden") != "YES" and _of_group(words, cluster)
        },
        "account": {one.account for one in cluster.associations},
        "qos": {name for one in cluster.associations for name in one.qos},
    }.get(option, set())
    unknown = [name for name in options.get(option, "").split(",") if name and name not in known]
    if not known or not unknown:
        return ""
    near = difflib.get_close_matches(unknown[0], known, 1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f": {unknown[0]!r}; {guess}There are: {', '.join(sorted(known))}"


def _warnings(options: Mapping[str, str], partition: str, cluster: Cluster) -> Iterator[str]:
    for reason in _never(options, partition, cluster):
        yield f"it would wait for ever: {reason}"
    if options.get("hold") == "set" or options.get("priority") == "0":
        yield (
            "it would wait until somebody releases it: it is submitted as held (JobHeldUser): "
            "take --hold or --priority=0 out of the template or SITE_FILE"
        )
    asked = _asked(options, partition, cluster)
    states = {name: cluster.partitions[name].get("State", "UP") for name in asked}
    if states and "UP" not in states.values():
        words = ", ".join(f"{name} is {state}" for name, state in states.items())
        yield f"it would wait until its partition is open again: {words} (PartitionDown)"


def _asked(options: Mapping[str, str], partition: str, cluster: Cluster) -> Sequence[str]:
    """The partitions that the job may start in, as far as they are known.

    sbatch's answer, ``partition``, names one of those asked for, unless the site moves jobs.
    """
    names = [name for name in options.get("partition", "").split(",") if name]
    if partition and partition not in names:
        names = [partition]
    if not names:
        names = [
            name for name, words in cluster.partitions.items() if words.get("Default") == "YES"
        ]
    return [name for name in names if name in cluster.partitions]


def _never(options: Mapping[str, str], partition: str, cluster: Cluster) -> Iterable[str]:
    """Why the job can't start in any partition that it may start in; nothing: it can in one."""
    if not options:
        return []
    need = Need.of(options)
    asked = _asked(options, partition, cluster)
    reasons = [[*_partition_reasons(need, options, name, cluster)] for name in asked]
    return [reason for one in reasons for reason in one] if all(reasons) else []


def _partition_reasons(
    need: Need, options: Mapping[str, str], name: str, cluster: Cluster
) -> Iterator[str]:
    partition = cluster.partitions[name]
    account = (options.get("account") or cluster.default_account).lower()  # as sacctmgr keeps it
    association = cluster.association(account, name)
    qos = options.get("qos") or (association.default_qos if association else "")
    limits = cluster.qos.get(qos, Limits(""))
    choose = "or choose another partition"

    wall = duration(partition.get("MaxTime", ""))
    if need.time and wall and need.time > wall and "PartitionTimeLimit" not in limits.flags:
        yield (
            f"it asks for {need.time} and partition {name} allows {wall} (PartitionTimeLimit): "
            f"lower TIMELIMIT_MINUTES {choose}"
        )
    most = number(partition.get("MaxNodes", ""))
    least = number(partition.get("MinNodes", ""))
    there = number(partition.get("TotalNodes", "")) or need.nodes
    if most and need.nodes > most and "PartitionMaxNodes" not in limits.flags:
        yield (
            f"it asks for {_count(need.nodes, 'node')} and partition {name} allows {most} "
            f"(PartitionNodeLimit): lower number_of_workers {choose}"
        )
    elif need.nodes > there:
        yield (
            f"it asks for {_count(need.nodes, 'node')} and partition {name} has {there}: "
            f"lower number_of_workers {choose}"
        )
    elif _most_nodes(options) < least and "PartitionMinNodes" not in limits.flags:
        yield (
            f"it asks for {_count(need.nodes, 'node')} and partition {name} wants at least "
            f"{least} (PartitionNodeLimit): choose another partition"
        )
    memory = mebibytes(partition.get("MaxMemPerNode", ""))
    if memory and need.memory > memory:
        yield (
            f"it asks for {need.memory} MiB on a node and partition {name} allows {memory} MiB "
            f"(MaxMemPerLimit): lower memory_limit {choose}"
        )
    cpus = number(partition.get("MaxCPUsPerNode", ""))
    if cpus and need.cpus > cpus:
        yield (
            f"it asks for {_count(need.cpus, 'CPU')} on a node and partition {name} allows {cpus} "
            f"(MaxCPUsPerNode): lower cpu_limit {choose}"
        )
    yield from _access_reasons(partition, name, account, qos, cluster)
    if {"limits", "safe"} & cluster.enforced:
        of_partition = cluster.qos.get(partition.get("QoS", ""), Limits(""))
        order = [of_partition, limits]
        if "OverPartQOS" in limits.flags:
            order.reverse()
        if association:
            order.append(association.limits)
        yield from _limit_reasons(need, order)


def _most_nodes(options: Mapping[str, str]) -> float:
    """The most that the job takes: of ``1-4`` it is 4."""
    return number(options.get("nodes", "").rpartition("-")[2]) or math.inf


def _access_reasons(
    partition: Mapping[str, str], name: str, account: str, qos: str, cluster: Cluster
) -> Iterator[str]:
    """Why this user, account or QOS may not use a partition: that of a QOS or account counts
    only where accounting enforces it."""
    if {"associations", "qos"} & cluster.enforced:
        # An account may be part of another one, which sacctmgr is not asked for here.
        part = f", unless {account} is part of one of them"
        for what, key, used, unless in (
            ("account", "Accounts", account, part),
            ("qos", "Qos", qos, ""),
        ):
            allowed = _list(partition, f"Allow{key}")
            if used and allowed and used not in allowed:
                yield (
                    f"its {what} is {used} and partition {name} allows {', '.join(allowed)}"
                    f"{unless}: set `{what}` or `partition` in SITE_FILE"
                )
            if used in _list(partition, f"Deny{key}"):
                yield (
                    f"its {what} is {used}, which partition {name} denies: "
                    f"set `{what}` or `partition` in SITE_FILE"
                )
    if not _of_group(partition, cluster):
        yield (
            f"partition {name} is for the groups {', '.join(_list(partition, 'AllowGroups'))}, and "
            "the account on the login node is in none of them: set `partition` in SITE_FILE"
        )


def _of_group(partition: Mapping[str, str], cluster: Cluster) -> bool:
    """Whether the login node's user is in a group that a partition is for."""
    groups = _list(partition, "AllowGroups")
    return not (groups and cluster.groups) or bool(cluster.groups & set(groups))


def _list(partition: Mapping[str, str], key: str) -> Sequence[str]:
    """The names that scontrol shows for a key; ALL and nothing are both no list."""
    text = partition.get(key, "")
    return [] if text in ("ALL", "(null)") else [word for word in text.split(",") if word]


# What a limit is about: the words for an amount, and what to lower.
_TRES = (
    ("cpu", "{} CPUs", "cpu_limit"),
    ("mem", "{} MiB", "memory_limit"),
    ("node", "{} nodes", "number_of_workers"),
    ("gres/", "{} of {}", "gpu_limit"),
)


def _limit_reasons(need: Need, order: Sequence[Limits]) -> Iterator[str]:
    """Limits that a single job is over; of several for one thing the first in ``order`` counts."""
    by_wall = next((limits for limits in order if limits.wall is not None), None)
    if need.time and by_wall and by_wall.wall is not None and need.time > by_wall.wall:
        yield (
            f"it asks for {need.time} and {by_wall.where} allows {by_wall.wall} (MaxWall): "
            "lower TIMELIMIT_MINUTES or choose another QOS"
        )
    for name, asked in need.tres.items():
        source = next((limits for limits in order if name in limits.tres), None)
        if source is None or asked <= source.tres[name]:
            continue
        words, lower = next(
            (words, lower) for prefix, words, lower in _TRES if name.startswith(prefix)
        )
        amount = words.format(asked, name)
        yield (
            f"it asks for {amount} and {source.where} allows {source.tres[name]} (MaxTRES): "
            f"lower {lower} or choose another QOS"
        )


# With one of these, size alone does not tell which nodes would do.
_CHOOSY = frozenset(
    "constraint nodelist exclude reservation licenses exclusive cluster-constraint batch".split()
)


def _away(options: Mapping[str, str], cluster: Cluster) -> str:
    """Which nodes that would do are away, if there are not enough without them."""
    if not options or _CHOOSY & set(options):
        return ""
    need = Need.of(options)
    for name in _asked(options, "", cluster):
        fitting = [nodes for nodes in cluster.nodes.get(name, ()) if need.fits(nodes)]
        up = sum(nodes.count for nodes in fitting if not nodes.away)
        if up < need.nodes <= sum(nodes.count for nodes in fitting):
            away = ", ".join(f"{one.names} ({one.state})" for one in fitting if one.away)
            return (
                "Slurm would take it and let it wait until nodes are back: "
                f"of partition {name} these are away: {away}"
            )
    return ""


def _too_big(options: Mapping[str, str], cluster: Cluster) -> Iterator[str]:
    """What it asks for, and what the nodes have."""
    if not options or _CHOOSY & set(options):
        return
    need = Need.of(options)
    wanted = [_count(need.cpus, "CPU")]
    wanted += [f"{need.memory} MiB"] if need.memory else []
    wanted += [f"{name}:{count}" for name, count in need.gres.items()]
    for name in _asked(options, "", cluster):
        kinds = cluster.nodes.get(name, ())
        if not kinds or sum(nodes.count for nodes in kinds if need.fits(nodes)) >= need.nodes:
            continue
        sizes = {
            ", ".join(
                [
                    _count(nodes.cpus, "CPU"),
                    f"{nodes.memory} MiB",
                    *(f"{gres}:{count}" for gres, count in nodes.gres.items()),
                ]
            )
            for nodes in kinds
        }
        yield (
            f"it asks for {_count(need.nodes, 'node')} with {', '.join(wanted)} each, and "
            f"partition {name} has nodes with {' or '.join(sorted(sizes)[:4])}"
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
