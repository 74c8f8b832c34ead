"""How Cromwell, the way to its files, and Slurm behind it are, for `pman check`."""

import posixpath
import statistics
from collections.abc import Callable, Generator, Iterator, Sequence
from ipaddress import ip_address

from pman.drivers import cromwell_config, slurm_check
from pman.drivers.cromwell_api import FIRST_TO_TAKE_IDS, HINTS, CromwellServer, Workflow
from pman.drivers.slurm_check import Answer, Answers, Programs
from pman.errors import EngineError
from pman.jobs import Finding, Severity
from pman.shell import Shell
from pman.wdl import WORKFLOW

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR

NEWEST, FEWEST = 20, 3
"""Workflows by which it is judged how long one waits for its start: so many, and not less."""

LONG = 5.0
"""Seconds of waiting for the start that are usual at a server with the stock settings: there the
half of a poll of 20 s, and more with several workflows."""

TRIED = 5
"""Workflows of pman that are asked where their files are, at the most."""

CONFIG_BYTES = 256 << 10
"""Bytes of CROMWELL_CONFIG, at the most."""

SECONDS = 30.0
"""How long a look at the disk may take."""

_TOOLS = ("dd", "head", "tail", "tr", "stat", "grep", "sed", "timeout")

WITH_SLURM = Programs(
    ("squeue", "sacct", "scancel", "scontrol"),
    _TOOLS,
    {
        "sacct": "of a job that Slurm has forgotten, only Cromwell tells how it ended",
        "scontrol": "pman does not need it, and this check can't see how Slurm is set up",
    },
)
WITHOUT_SLURM = Programs((), _TOOLS, {})

_READ = r"""
[ -f "$1" ] || { echo "there is no such file" >&2; exit 1; }
head -c "$2" -- "$1"
"""

_STOREBASE = (
    slurm_check.ANSWER
    + r"""
answer there ls -d -- "$1/."
answer content find "$1" -mindepth 1 -maxdepth 1 -print -quit
"""
)

_FOLDER = (
    slurm_check.ANSWER
    + r"""
answer there ls -- "$1/."
answer owner stat -c %U -- "$1"
answer user id -un
"""
)


def check(
    server: CromwellServer,
    shell: Shell,
    here: Callable[[str], str],
    *,
    asks_slurm: bool,
    config: str,
    storebase: str,
    poll_interval: float,
) -> Iterator[Finding]:
    """How Cromwell and what is behind it are. Raises nothing.

    ``here`` makes of a path of Cromwell's what it is behind the shell.
    """
    answers = yield from of_server(server)
    node = yield from _of_way(shell, asks_slurm)
    private = ""
    if node is not None and asks_slurm:
        settings = yield from slurm_check.cluster(node, poll_interval)
        private = slurm_check.private(settings)
        yield from _of_storebase(shell, storebase)
    if not config:
        yield _not_told()
    elif node is not None:
        yield from _of_config(shell, config)
    if answers and node is not None:
        yield from _of_files(server, shell, here, asks_slurm, private)


# --- Cromwell ---


def of_server(server: CromwellServer) -> Generator[Finding, None, bool]:
    """How Cromwell itself is; returns whether it answers."""
    try:
        yield from _of_version(server.where, server.version(), server.takes_ids)
        for part, why in server.ailing().items():
            text = f"it finds its part {part} unwell: {why or 'without a reason'}"
            yield Finding(WARNING, "Cromwell", text, "see Cromwell's own log")
        yield from _of_access(server)
        yield from of_starts(server.newest(NEWEST))
    except EngineError as error:
        yield _away(error)
        return False
    return True


def _away(error: EngineError) -> Finding:
    """Most of the errors end with what to do."""
    text = str(error)
    hint = next((hint for hint in HINTS if text.endswith(f"; {hint}")), "")
    remedy = hint or "see the log of Cromwell, and that of a proxy that stands before it"
    return Finding(ERROR, "Cromwell", text.removesuffix(f"; {hint}"), remedy)


def _of_version(where: str, version: str, takes_ids: bool) -> Iterator[Finding]:
    if takes_ids:
        yield Finding(OK, "Cromwell", f"{where}: version {version}")
        return
    yield Finding(
        WARNING,
        "Cromwell",
        f"{where}: version {version} lets no client choose a workflow's id, so pman looks each "
        "doubtful job up by its label before a second try, which takes up to a minute",
        f"update it to version {FIRST_TO_TAKE_IDS} or newer",
    )


def _of_access(server: CromwellServer) -> Iterator[Finding]:
    if server.has_password or _is_loopback(server.host):
        return
    yield Finding(
        WARNING,
        "CROMWELL_URL",
        f"nobody is asked for a password at {server.where}: whoever reaches it runs commands as "
        "Cromwell's account",
        "webservice.interface = 127.0.0.1 and an SSH tunnel, or a firewall, or a proxy that asks",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def of_starts(flows: Sequence[Workflow]) -> Iterator[Finding]:
    """How long workflows waited until Cromwell started them."""
    times = [
        (flow.submitted_at, flow.started_at)
        for flow in flows
        if flow.submitted_at and flow.started_at
    ]
    if len(times) < FEWEST:
        return
    usual = statistics.median((start - submitted).total_seconds() for submitted, start in times)
    since = min(submitted for submitted, _ in times).astimezone()
    text = (
        f"the newest {len(times)} workflows, since {since:%Y-%m-%d %H:%M}, waited {usual:.0f} s "
        "until Cromwell started them (median)"
    )
    if usual < LONG:
        yield Finding(OK, "start", text)
        return
    yield Finding(
        WARNING,
        "start",
        text,
        "new-workflow-poll-rate = 2 and max-workflow-launch-count = 50 in Cromwell's `system`; "
        "its defaults start as few as one workflow every 20 s",
    )


# --- its configuration ---


def _not_told() -> Finding:
    return Finding(
        WARNING,
        cromwell_config.SUBJECT,
        "not set, and Cromwell's API does not tell how it is set up: on which interface, how soon "
        "it starts a workflow, whether its database is on a disk, whether an abort ends the Slurm "
        "job (kill-docker), whether a killed job ends (exit-code-timeout-seconds), which of "
        "pman's runtime attributes it uses",
        "set it to Cromwell's configuration file, or compare that with docs/cromwell.md",
    )


def _of_config(shell: Shell, file: str) -> Iterator[Finding]:
    subject = cromwell_config.SUBJECT
    try:
        most = str(CONFIG_BYTES + 1)
        result = shell.run(_READ, file, most, timeout=SECONDS, limit=CONFIG_BYTES + 1)
    except EngineError as error:
        yield Finding(WARNING, subject, f"{file} can't be read: {error}", "try again")
        return
    if result.code:
        why = slurm_check.last(result.stderr.decode(errors="replace"))
        text = f"{file} can't be read on {shell.where}: {why}"
        yield Finding(WARNING, subject, text, "give its path there, and the right to read it")
    elif len(result.stdout) > CONFIG_BYTES:
        text = f"{file} is larger than {CONFIG_BYTES >> 10} KiB"
        yield Finding(WARNING, subject, text, "is that Cromwell's configuration file?")
    else:
        yield from cromwell_config.findings(result.stdout.decode(errors="replace"), file)


# --- the way to its files and to Slurm ---


def _of_way(shell: Shell, asks_slurm: bool) -> Generator[Finding, None, Answers | None]:
    if asks_slurm:
        way = "the account gets in"
        return (yield from slurm_check.login_node(shell, WITH_SLURM, way))
    node = yield from slurm_check.login_node(shell, WITHOUT_SLURM, "jobs' logs are read here")
    yield Finding(
        OK,
        "Slurm",
        "it is not asked: a job that waits reads as started, and fewer reasons are told",
        "set SSH_HOST to a login node",
    )
    return node


def _of_storebase(shell: Shell, storebase: str) -> Iterator[Finding]:
    try:
        result = shell.run(_STOREBASE, storebase, timeout=SECONDS)
    except EngineError as error:
        text = f"{storebase} could not be looked at: {error}"
        yield Finding(WARNING, "STOREBASE", text, f"does `ls {storebase}` hang there?")
        return
    seen = slurm_check.answers(result.stdout)
    there, content = (seen.get(name, Answer(1, "no answer")) for name in ("there", "content"))
    mount = "is the disk mounted there, under the path that the nodes and Cromwell have?"
    if there.code:
        text = f"{storebase} can't be entered on {shell.where}: {slurm_check.last(there.words)}"
        yield Finding(WARNING, "STOREBASE", text, mount)
    elif not content.words:
        yield Finding(WARNING, "STOREBASE", f"{storebase} is empty on {shell.where}", mount)
    else:
        yield Finding(OK, "STOREBASE", f"{storebase} is there on {shell.where}")


def _of_files(
    server: CromwellServer,
    shell: Shell,
    here: Callable[[str], str],
    asks_slurm: bool,
    private: str,
) -> Iterator[Finding]:
    """Whether the files of a job of late can be read. Without any job: nothing."""
    try:
        theirs = _folder(server)
        if not theirs:
            return
        result = shell.run(_FOLDER, here(theirs), timeout=SECONDS)
    except EngineError as error:
        text = f"a job's folder could not be looked at: {error}"
        yield Finding(WARNING, "CROMWELL_PATHS", text, "try again")
        return
    seen = slurm_check.answers(result.stdout)
    there, owner, user = (
        seen.get(name, Answer(1, "no answer")) for name in ("there", "owner", "user")
    )
    if there.code:
        ours = here(theirs)
        where = f"{ours} (for Cromwell {theirs})" if ours != theirs else theirs
        root = theirs.partition(f"/{WORKFLOW}/")[0]
        yield Finding(
            WARNING,
            "CROMWELL_PATHS",
            f"a job's folder {where} can't be read on {shell.where}, so logs can't be either: "
            f"{slurm_check.last(there.words)}",
            f"unless somebody has removed it, CROMWELL_PATHS={root}=ITS_PATH_THERE, or the right "
            "to read it",
        )
        return
    yield Finding(OK, "CROMWELL_PATHS", f"Cromwell's files can be read on {shell.where}")
    if asks_slurm and owner.code == user.code == 0 and owner.words != user.words:
        text = f"jobs are {owner.words}'s, and pman comes as {user.words}, who can't cancel them"
        hidden = f"; nor see them (PrivateData={private})" if "jobs" in private else ""
        remedy = f"set SSH_USER to the account of Cromwell, {owner.words}"
        yield Finding(WARNING, "SSH_USER", text + hidden, remedy)


def _folder(server: CromwellServer) -> str:
    """Cromwell's folder of the newest of pman's workflows that has one."""
    for flow in server.newest(TRIED, WORKFLOW):
        call = server.call(flow.id)
        if call is not None and call.stdout:
            return posixpath.dirname(call.stdout)
    return ""
