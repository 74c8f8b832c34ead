"""How a Slurm site is, for `pman check`: two commands on the login node, and what they tell.

Other drivers that go to a login node take from here what they share.

The first is about the machine and Slurm, the second about the shared disk: a disk that hangs must
not hide the rest.
"""

import re
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pman import findings
from pman.drivers.slurm_cluster import number
from pman.errors import EngineError, Unavailable
from pman.jobs import Finding, Severity
from pman.shell import Shell

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR

OLDEST = (22, 5)
"""The oldest version of Slurm that pman is tested with."""

REMEMBERED = 60.0
"""Seconds for which a site without accounting should remember an ended job, at the least: a restart
of pman takes that long."""

NODE_SECONDS, DISK_SECONDS = 120.0, 60.0
"""How long each of the two commands may take."""

_FIELD, _RECORD = "\x1f", "\x1e"

# By bash alone: any program may be what is missing.
ANSWER = r"""
export LC_ALL=C
answer() {
    local name=$1 words code
    shift
    words=$("$@" 2>&1 < /dev/null)
    code=$?
    words=${words//[$'\036\037']/}
    printf '%s\037%s\037%s\036' "$name" "$code" "${words:0:65536}"
}
"""
"""A function for a script; `answers` reads what it prints: records of a name, a command's exit code
and what that said on both streams."""

_NODE = (
    ANSWER
    + r"""
client=$1
shift
missing() {
    for program; do
        type -P "$program" > /dev/null || printf '%s ' "$program"
    done
}
answer began date +%s
answer missing missing "$@"
if [ -n "$client" ]; then
    answer version timeout 30 "$client" --version
    answer config timeout 30 scontrol show config
    answer accounting timeout 30 sacct --allocations --noheader --starttime=now --format=JobID
fi
answer ended date +%s
"""
)

_DISK = (
    ANSWER
    + r"""
storebase=$1 at=$2
write() { file=$(mktemp -- "$1/.pman-check-XXXXXX") && rm -f -- "$file"; }
answer there ls -d -- "$storebase/."
answer content find "$storebase" -mindepth 1 -maxdepth 1 -print -quit
answer write write "$storebase"
# JOBS_DIR is made with the first job: what counts is what is there of its path.
while [ ! -e "$at" ]; do at=${at%/*}; at=${at:-/}; done
answer jobs write "$at"
answer space df -P -k -- "$at"
"""
)


@dataclass(frozen=True)
class Programs:
    """What must be on the PATH of the login node."""

    slurm: tuple[str, ...]
    """Slurm's commands; the first one tells the version. Empty: Slurm is not asked."""
    tools: tuple[str, ...]
    dispensable: Mapping[str, str]
    """The programs that pman can do without, and what it is like then."""


PROGRAMS = Programs(
    ("sbatch", "squeue", "scancel", "sacct", "scontrol"),
    ("tar", "mktemp", "timeout", "find", "head", "tail", "grep", "tr"),
    {
        "sacct": "how a job ended that Slurm has forgotten, only its exit file tells",
        "scontrol": "pman does not need it, and this check can't see how Slurm is set up",
    },
)


@dataclass(frozen=True)
class Answer:
    """How one command of the check ended, and what it said."""

    code: int
    words: str


Answers = Mapping[str, Answer]


def check(shell: Shell, storebase: str, jobs_dir: str, poll_interval: float) -> Iterator[Finding]:
    """How the login node, Slurm and the shared disk are. Raises nothing."""
    here = shell.where == "this machine"
    way = "pman runs Slurm's commands here: SSH_HOST is empty" if here else "the account gets in"
    node = yield from login_node(shell, PROGRAMS, way)
    if node is None:
        return
    yield from slurm(node, poll_interval)
    try:
        result = shell.run(_DISK, storebase, jobs_dir, timeout=DISK_SECONDS)
    except EngineError as error:
        text = f"{storebase} could not be looked at: {error}"
        yield Finding(ERROR, "STOREBASE", text, f"does `ls {storebase}` hang on the login node?")
        return
    yield from disk(answers(result.stdout), storebase, jobs_dir)


def login_node(
    shell: Shell, wanted: Programs, way: str
) -> Generator[Finding, None, Answers | None]:
    """How the machine behind the shell is, and what it answers of Slurm; None: it is away."""
    before = time.time()
    try:
        client = wanted.slurm[0] if wanted.slurm else ""
        result = shell.run(_NODE, client, *wanted.slurm, *wanted.tools, timeout=NODE_SECONDS)
    except EngineError as error:
        yield unreachable(error, shell.where)
        return None
    after = time.time()
    node = answers(result.stdout)
    yield Finding(OK, "login node", f"{shell.where}: {way}")
    here = shell.where == "this machine"
    if not here:  # there is one clock only
        yield from clock(node, before, after, shell.where)
    yield from programs(node, here, wanted)
    return node


def answers(output: bytes) -> Answers:
    """The answers in what a script wrote; what is not one is left out."""
    found = {}
    for record in output.decode(errors="replace").split(_RECORD):
        name, *rest = record.split(_FIELD)
        if len(rest) == 2 and rest[0].isdecimal():
            found[name] = Answer(int(rest[0]), rest[1].strip())
    return found


def unreachable(error: EngineError, where: str) -> Finding:
    """Why no command could be run; the errors end with what to do, in a sentence of its own."""
    why = error.__cause__ if isinstance(error.__cause__, Unavailable) else error
    text, stop, remedy = str(why).rstrip(".").rpartition(". ")
    if stop:
        return Finding(ERROR, "login node", text, remedy)
    return Finding(ERROR, "login node", remedy, f"try `ssh {where}` by hand, as the user of pman")


def clock(node: Answers, before: float, after: float, where: str) -> Iterator[Finding]:
    """``before`` and ``after``: this machine's clock when the command was given and had ended."""
    try:
        began, ended = (float(node[name].words) for name in ("began", "ended"))
    except (KeyError, ValueError):
        return
    yield findings.clock(where, began - before, ended - after)


def programs(node: Answers, here: bool, wanted: Programs = PROGRAMS) -> Iterator[Finding]:
    missing = node["missing"].words.split() if "missing" in node else []
    whose = "pman's own environment" if here else "the account's profile"
    for program in missing:
        if program in wanted.tools:
            remedy = "install it there (coreutils, findutils, grep, sed, tar)"
        else:
            remedy = f"put Slurm on the PATH in {whose}"
            remedy += "" if here else ", and let SSH_SHELL read it (`bash -l`)"
        severity = WARNING if program in wanted.dispensable else ERROR
        text = f"{program} is not on the PATH"
        if program in wanted.dispensable:
            text += f": {wanted.dispensable[program]}"
        yield Finding(severity, "programs", text, remedy)
    if not missing:
        yield Finding(
            OK, "programs", f"{', '.join((*wanted.slurm, *wanted.tools))} are on the PATH"
        )


def slurm(node: Answers, poll_interval: float) -> Iterator[Finding]:
    """Slurm's version, controller, accounting, and those of its settings that matter to pman."""
    settings = yield from cluster(node, poll_interval)
    yield from _customs(settings)


def cluster(node: Answers, poll_interval: float) -> Generator[Finding, None, Mapping[str, str]]:
    """What matters wherever Slurm is asked; returns its settings, as far as it tells them."""
    version, config, accounting = (
        node.get(name, Answer(127, "")) for name in ("version", "config", "accounting")
    )
    if version.code != 127:
        yield _version(version)
    settings = _settings(config.words) if config.code == 0 else {}
    if config.code not in (0, 127):
        yield Finding(
            ERROR,
            "Slurm",
            f"its controller does not answer: {last(config.words)}",
            "is slurmctld up? Until it answers, jobs wait in pman",
        )
    elif settings:
        cluster = settings.get("ClusterName", "without a name")
        yield Finding(OK, "Slurm", f"the controller of cluster {cluster} answers")
    if accounting.code != 127:
        yield _accounting(accounting, settings.get("MinJobAge", ""), poll_interval)
    yield from _rate(settings, poll_interval)
    return settings


def _version(version: Answer) -> Finding:
    found = re.search(r"(\d+)\.(\d+)\S*", version.words)
    if version.code or found is None:
        return Finding(
            ERROR,
            "Slurm",
            f"its commands do not work: {last(version.words)}",
            "is this a login node of the cluster, with its slurm.conf (or SLURM_CONF)?",
        )
    if (int(found[1]), int(found[2])) < OLDEST:
        text = f"version {found[0]}; pman is tested with 22.05 to 26.05"
        return Finding(WARNING, "Slurm", text, "try `pman check --deep`, and plan an update")
    return Finding(OK, "Slurm", f"version {found[0]}")


def _settings(words: str) -> dict[str, str]:
    """What `scontrol show config` prints, by name."""
    rows = (line.partition("=") for line in words.splitlines())
    return {name.strip(): value.strip() for name, equals, value in rows if equals}


def _accounting(accounting: Answer, min_job_age: str, poll_interval: float) -> Finding:
    if accounting.code == 0:
        return Finding(OK, "accounting", "it is on and answers")
    exit_file = "only its exit file on the shared disk tells how it ended"
    if "accounting storage is disabled" not in accounting.words.lower():
        return Finding(
            WARNING,
            "accounting",
            f"it does not answer: {last(accounting.words)}; of a job that squeue does not show "
            f"any more {exit_file} meanwhile, and one without it keeps its last state",
            "is slurmdbd up?",
        )
    age = number(min_job_age)
    if not age:  # slurm.conf(5): 0 is never
        return Finding(OK, "accounting", f"off: when Slurm has forgotten a job, {exit_file}")
    text = f"off: {age} s after its end (MinJobAge) Slurm forgets a job, and then {exit_file}"
    if age < max(REMEMBERED, 10 * poll_interval):
        text += (
            f"; pman looks every {poll_interval:g} s (POLL_INTERVAL), and a restart takes longer"
        )
        return Finding(WARNING, "accounting", text, "ask for MinJobAge=300, or for slurmdbd")
    return Finding(OK, "accounting", text)


def _customs(settings: Mapping[str, str]) -> Iterator[Finding]:
    if hidden := private(settings):
        text = f"{hidden} of others are hidden; pman looks at its own jobs alone"
        yield Finding(OK, "PrivateData", text)
    if settings.get("EnforcePartLimits") == "NO":
        yield Finding(
            OK,
            "limits",
            "Slurm takes jobs that a partition's limits never let start (EnforcePartLimits=NO)",
            "`pman render --test-only` warns of one",
        )


def private(settings: Mapping[str, str]) -> str:
    """What Slurm shows of nobody else's."""
    hidden = settings.get("PrivateData", "none")
    return "" if hidden in ("none", "(null)") else hidden


def _rate(settings: Mapping[str, str], poll_interval: float) -> Iterator[Finding]:
    """The buckets of slurm.conf(5), SlurmctldParameters: one an account, filled up again and again.

    One look of pman may be two calls of the controller.
    """
    options = dict(
        option.partition("=")[::2] for option in settings.get("SlurmctldParameters", "").split(",")
    )
    if "rl_enable" not in options:
        return
    tokens = number(options.get("rl_refill_rate", "")) or 2
    period = number(options.get("rl_refill_period", "")) or 1
    text = f"an account has {tokens} calls every {period} s (rl_enable)"
    least = 2 * period / tokens
    if poll_interval >= least:
        yield Finding(OK, "rate limit", f"{text}; a look every {poll_interval:g} s is within")
        return
    text += f"; a look every {poll_interval:g} s (POLL_INTERVAL) is too often"
    yield Finding(WARNING, "rate limit", text, f"set POLL_INTERVAL to {least:g} or more")


def disk(seen: Answers, storebase: str, jobs_dir: str) -> Iterator[Finding]:
    """The shared disk as the account sees it on the login node."""
    yield _storebase(seen, storebase)
    jobs = seen.get("jobs", Answer(1, "no answer"))
    if jobs.code:
        yield Finding(
            ERROR,
            "JOBS_DIR",
            f"{jobs_dir} can't be made or written: {last(jobs.words)}",
            "give the account the rights, or set JOBS_DIR to another folder of the shared disk",
        )
    else:
        yield Finding(OK, "JOBS_DIR", f"{jobs_dir} can be written")
    # The numbers of `df -P`: blocks, used, available, capacity (POSIX)
    numbers = re.search(r"\s\d+\s+\d+\s+(-?\d+)\s+\d+%", seen.get("space", Answer(1, "")).words)
    if numbers:
        yield findings.space(int(numbers[1]), "JOBS_DIR", "its disk")


def _storebase(seen: Answers, storebase: str) -> Finding:
    there, content, write = (
        seen.get(name, Answer(1, "no answer")) for name in ("there", "content", "write")
    )
    mount = "is the disk mounted on the login node, and under the path that the nodes have?"
    if there.code:
        text = f"{storebase} can't be entered: {last(there.words)}"
        return Finding(ERROR, "STOREBASE", text, mount)
    if content.code:
        text = f"{storebase} can't be read: {last(content.words)}"
        return Finding(ERROR, "STOREBASE", text, "give the account the rights to read it")
    if not content.words:
        text = f"{storebase} is empty: pman takes it for a disk that is not mounted"
        return Finding(ERROR, "STOREBASE", text, f"{mount} Else make a folder in it")
    if "read-only file system" in write.words.lower():
        text = f"{storebase} is on a disk that is mounted read-only"
        return Finding(ERROR, "STOREBASE", text, "have it mounted read-write")
    if write.code:
        text = f"the account can't write {storebase}: {last(write.words)}"
        remedy = "give it the rights, unless pfcon makes each job's output folder writable for it"
        return Finding(WARNING, "STOREBASE", text, remedy)
    return Finding(OK, "STOREBASE", f"{storebase} can be read and written")


def last(words: str) -> str:
    """The end of what a command said, in one line."""
    lines: Sequence[str] = [line.strip() for line in words.splitlines() if line.strip()]
    return "; ".join(lines[-3:])[:600] or "without a word"
