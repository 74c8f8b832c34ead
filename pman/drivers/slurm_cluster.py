"""What a Slurm cluster has and allows, as far as its commands tell: partitions, nodes, limits.

Facts: scontrol(1), sinfo(1) NODE STATE CODES, sacctmgr(1).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

FIELD = "\x1f"


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that are alike."""

    count: int
    cpus: int
    memory: int
    """MiB of each."""
    gres: Mapping[str, int]
    """Of each, such as ``{"gpu": 4, "gpu:a100": 4}``."""
    state: str
    """sinfo's compact word, such as ``idle`` or ``down*``."""
    names: str

    @property
    def away(self) -> bool:
        """Whether they can't take a job now, busy or not (sinfo(1), NODE STATE CODES)."""
        word = self.state.rstrip("*~#!%$@^+-")
        return word in _AWAY or bool({"*", "$"} & set(self.state))


_AWAY = frozenset("down drain drng fail failg maint resv unk inval".split())


@dataclass(frozen=True)
class Limits:
    """What one QOS or association allows a job; what is missing is not limited there."""

    where: str
    """In words, such as ``QOS long``."""
    wall: timedelta | None = None
    tres: Mapping[str, int] = field(default_factory=dict)
    """Of all nodes together, memory in MiB: ``{"cpu": 8, "mem": 4096, "gres/gpu": 1}``."""
    flags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Association:
    """An account, and perhaps a partition, that the login node's user may use."""

    account: str
    partition: str
    """Empty: all of them."""
    qos: tuple[str, ...]
    default_qos: str
    limits: Limits


@dataclass(frozen=True)
class Cluster:
    """What is known of a cluster; each part may be missing."""

    enforced: frozenset[str] = frozenset()
    """AccountingStorageEnforce (slurm.conf(5))."""
    partitions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The words of ``scontrol show partition`` by the partitions' names."""
    nodes: Mapping[str, Sequence[Nodes]] = field(default_factory=dict)
    """By the partitions' names."""
    groups: frozenset[str] = frozenset()
    """The user's, on the login node."""
    default_account: str = ""
    associations: Sequence[Association] = ()
    qos: Mapping[str, Limits] = field(default_factory=dict)

    def association(self, account: str, partition: str) -> Association | None:
        """The one that counts for a job: one for its partition goes before one for all."""
        fitting = [
            known
            for known in self.associations
            if known.account == account and known.partition in ("", partition)
        ]
        return max(fitting, key=lambda known: known.partition, default=None)


def cluster(facts: Sequence[str]) -> Cluster:
    """What the answers of scontrol, sinfo, id and sacctmgr tell; an empty one tells nothing."""
    enforced, partitions, nodes, groups, user, qos = [*facts, *[""] * 6][:6]
    rows = [line.split("|") for line in user.splitlines() if line.count("|") == 6]
    return Cluster(
        enforced=frozenset(enforced.strip().split(",")),
        partitions={
            words["PartitionName"]: words
            for line in partitions.splitlines()
            if "PartitionName" in (words := _words(line))
        },
        nodes=_nodes(nodes),
        groups=frozenset(groups.split()),
        default_account=rows[0][0] if rows else "",
        associations=[_association(row) for row in rows],
        qos={
            name: Limits(f"QOS {name}", duration(wall), _tres(tres), frozenset(flags.split(",")))
            for name, flags, wall, tres in (
                line.split("|") for line in qos.splitlines() if line.count("|") == 3
            )
        },
    )


def _words(line: str) -> Mapping[str, str]:
    """``Name=value Name=value`` of scontrol."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _nodes(text: str) -> Mapping[str, Sequence[Nodes]]:
    found: dict[str, list[Nodes]] = {}
    for line in text.splitlines():
        if line.count(FIELD) != 6:
            continue
        partition, count, cpus, memory, gres, state, names = line.split(FIELD)
        kind = Nodes(number(count), number(cpus), number(memory), gres_counts(gres), state, names)
        found.setdefault(partition, []).append(kind)
    return found


def _association(row: Sequence[str]) -> Association:
    _, account, partition, qos, default_qos, wall, tres = row
    names = tuple(name for name in qos.split(",") if name)
    limits = Limits(f"account {account}", duration(wall), _tres(tres))
    return Association(account, partition, names, default_qos, limits)


def number(text: str) -> int:
    """The number that ``text`` begins with, such as the least of ``1-4``; 0 if there is none."""
    match = re.match(r"[0-9]+", text)
    return int(match[0]) if match else 0


def duration(text: str) -> timedelta | None:
    """Slurm's ``D-HH:MM:SS``; None for UNLIMITED, NONE and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def mebibytes(text: str) -> int:
    """Slurm's amount of memory, MiB unless it ends in another unit."""
    match = re.match(r"([0-9.]+)([KMGTP]?)", text)
    if match is None:
        return 0
    return math.ceil(float(match[1]) * 1024.0 ** ("KMGTP".index(match[2] or "M") - 1))


def _tres(text: str) -> dict[str, int]:
    pairs = (word.split("=", 1) for word in text.split(",") if "=" in word)
    return {name: mebibytes(n) if name == "mem" else number(n) for name, n in pairs}


def gres_counts(text: str) -> dict[str, int]:
    """``gpu:2``, ``gres:gpu:a100:2``, ``gres/gpu:2(S:0-1)``: by name, and by name and type."""
    found: dict[str, int] = {}
    for word in re.sub(r"\([^)]*\)", "", text).split(","):
        name, *rest = re.sub(r"^gres[:/]", "", word.strip()).replace("=", ":").split(":")
        if name in ("", "null", "none"):
            continue
        count = int(rest.pop()) if rest and rest[-1].isdecimal() else 1
        for key in {name, ":".join([name, *rest])}:
            found[key] = found.get(key, 0) + count
    return found
