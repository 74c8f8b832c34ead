"""What in Cromwell's configuration bites, for `pman check`.

The names and defaults are those of Cromwell's core/src/main/resources/reference.conf and of its
backend for clusters (https://cromwell.readthedocs.io/en/stable/backends/HPC/).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pman.jobs import Finding, Severity

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR

SUBJECT = "CROMWELL_CONFIG"

_EXAMPLE = "see docs/examples/cromwell-slurm.conf"

STOCK_POLL_SECONDS = 20.0
"""Seconds between two starts of workflows, unless new-workflow-poll-rate says otherwise."""

SLOW_POLL_SECONDS, FEW_LAUNCHED, FEW_JOBS = 10.0, 10, 10
"""From these on down, or up, it is worth a warning."""

_LOOPBACK = re.compile(r"127\..*|localhost|::1")


@dataclass(frozen=True)
class _Attribute:
    """A runtime attribute of pman's WDL."""

    lost: str
    """What it is like when the backend does not use it."""
    severity: Severity = WARNING
    always: bool = True
    """Whether every job has it."""


_FOLDERS = "jobs work only where the input folder is `incoming` and the output folder `outgoing`"

_ATTRIBUTES: Mapping[str, _Attribute] = {
    "docker": _Attribute("jobs run without the plugin's image", ERROR),
    "sharedir": _Attribute("jobs have neither input nor output", ERROR),
    "incoming": _Attribute(f"{_FOLDERS} of one folder"),
    "outgoing": _Attribute(f"{_FOLDERS} of one folder"),
    "cpu": _Attribute("jobs have the CPUs that the partition gives by default", always=False),
    "memory": _Attribute("jobs have the memory that the partition gives by default", always=False),
    "gpu_limit": _Attribute("jobs have no GPUs"),
    "number_of_workers": _Attribute("each job has one worker"),
    "timelimit": _Attribute("jobs have the time limit of the partition, not TIMELIMIT_MINUTES"),
} | {
    f"slurm_{name}": _Attribute(f"`{name}` of SITE_FILE has no effect", always=False)
    for name in ("partition", "account", "qos", "constraint", "reservation")
}

_CROMWELLS_OWN = frozenset({"maxRetries", "failOnStderr", "continueOnReturnCode"})
"""Attributes of Cromwell's own that pman's WDL has too."""


# --- the file ---

_INCLUDE = re.compile(r"^[ \t]*include[ \t]+(.*?)[ \t]*$", re.M)
_DEFAULTS = re.compile(r"""(required\()?\s*classpath\(\s*"application(\.conf)?"\s*\)\s*\)?""")


def findings(text: str, file: str) -> Iterator[Finding]:
    """What is wrong with the configuration ``text``. Raises nothing."""
    try:
        from pyhocon import ConfigFactory, ConfigTree
    except ImportError:
        mend = "pip install 'pman[cromwell]', or leave CROMWELL_CONFIG out"
        yield Finding(WARNING, SUBJECT, "pyhocon, which reads it, is not installed", mend)
        return
    included = _INCLUDE.findall(text)
    try:
        # Its includes are files of Cromwell's machine, and of its jar.
        tree = ConfigFactory.parse_string(_INCLUDE.sub("", text))
    except Exception as error:  # its parsers raise whatever they meet
        yield Finding(WARNING, SUBJECT, f"{file}{_unreadable(error)}", "mend it there")
        return
    if not isinstance(tree, ConfigTree):
        yield Finding(WARNING, SUBJECT, f"{file} is no configuration: it has no names", "mend it")
        return
    tree = tree.as_plain_ordered_dict()
    found = [*_of_includes(included), *_of_server(tree), *_of_backend(tree)]
    yield from found
    if not found:
        text = f"{file} has what pman needs, and none of the defaults that bite"
        yield Finding(OK, SUBJECT, text)


def _unreadable(error: Exception) -> str:
    words = " ".join(str(error).split())
    line = re.search(r"\(line: ?(\d+)", words)
    # The rest of the parser's words is a list of what it would have taken.
    found = re.search(r"found .+?(?= \(at char|$)", words)
    why = found[0] if found else words.partition(" (line")[0][:120]
    return f"{f', line {line[1]},' if line else ''} can't be read: {why}"


def _of_includes(included: list[str]) -> Iterator[Finding]:
    if not any(_DEFAULTS.fullmatch(what) for what in included):
        yield Finding(
            WARNING,
            SUBJECT,
            "it does not include Cromwell's own settings",
            'begin it with: include required(classpath("application"))',
        )
    for what in included:
        if not _DEFAULTS.fullmatch(what):
            text = f"it includes {what[:200]}, which pman does not look into"
            yield Finding(WARNING, SUBJECT, text, "what follows may be settled there")


# --- the server ---


def _of_server(tree: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _interface(_at(tree, "webservice", "interface"))
    yield from _starts(
        _at(tree, "system", "new-workflow-poll-rate"),
        _at(tree, "system", "max-workflow-launch-count"),
    )
    urls = list(_urls(_at(tree, "database")))
    if not urls or any(":mem:" in url for url in urls):
        yield Finding(
            WARNING,
            "database",
            "it is in memory: a restart of Cromwell forgets every workflow, and nobody follows "
            "their Slurm jobs but pman"
            if urls
            else "none is given: it is in memory, and a restart of Cromwell forgets every workflow",
            f"keep it on a disk: {_EXAMPLE}",
        )
    summary = _at(tree, "services", "MetadataService", "config")
    if str(_at(summary, "metadata-summary-refresh-interval")).lower() == "inf":
        yield Finding(
            ERROR,
            "services",
            "metadata-summary-refresh-interval is Inf: Cromwell never shows a job, and pman never "
            "learns how one is",
            "leave it out of services.MetadataService.config: its default is 1 second",
        )
    if _true(_at(tree, "system", "abort-jobs-on-terminate")):
        text = "abort-jobs-on-terminate: when Cromwell is stopped it cancels every job"
        yield Finding(WARNING, "system", text, "set it to false")
    if not _false(_at(tree, "docker", "hash-lookup", "enabled")):
        yield Finding(
            WARNING,
            "docker",
            "hash-lookup is on: Cromwell asks a registry about each image, and nodes may have "
            "their own",
            "docker.hash-lookup.enabled = false",
        )


def _interface(address: Any) -> Iterator[Finding]:
    if _LOOPBACK.fullmatch(str(address)):
        return
    what = "is not given, so it is 0.0.0.0" if address is None else f"is {address}"
    yield Finding(
        WARNING,
        "webservice",
        f"interface {what}: whoever reaches that address runs commands as Cromwell's account",
        "webservice.interface = 127.0.0.1, and an SSH tunnel or a proxy that asks who calls",
    )


def _starts(rate: Any, count: Any) -> Iterator[Finding]:
    if isinstance(rate, (timedelta, str)) and not str(rate).isdecimal():
        yield Finding(
            WARNING,
            "system",
            "new-workflow-poll-rate has a unit: Cromwell reads a whole number of seconds, and "
            "does not start with anything else",
            "new-workflow-poll-rate = 2",
        )
        return
    seconds = _number(rate, STOCK_POLL_SECONDS)
    launched = _number(count, 1)
    if seconds < SLOW_POLL_SECONDS and launched >= FEW_LAUNCHED:
        return
    many = f"{launched:g}" if count is not None else "as few as one, by the version's default,"
    yield Finding(
        WARNING,
        "system",
        f"every {seconds:g} s it starts {many} of the workflows that wait",
        "new-workflow-poll-rate = 2 and max-workflow-launch-count = 50",
    )


def _urls(database: Any) -> Iterator[str]:
    if isinstance(database, Mapping):
        for name, value in database.items():
            if name == "url":
                yield str(value)
            else:
                yield from _urls(value)


# --- the backend ---


def _of_backend(tree: Mapping[str, Any]) -> Iterator[Finding]:
    name = _at(tree, "backend", "default")
    if name is None:
        text = "no default is given: jobs run on Cromwell's own machine (Local)"
        yield Finding(ERROR, "backend", text, f"backend.default = SLURM, {_EXAMPLE}")
        return
    provider = _at(tree, "backend", "providers", str(name))
    config = _at(provider, "config")
    if not isinstance(config, Mapping):
        text = f"the default, {name}, is not configured here: backend.providers.{name}.config"
        yield Finding(ERROR, "backend", text, _EXAMPLE)
        return
    factory = str(_at(provider, "actor-factory"))
    if not factory.endswith("ConfigBackendLifecycleActorFactory"):
        text = f"{name} is not the backend for clusters: its actor-factory is {factory}"
        yield Finding(ERROR, "backend", text, _EXAMPLE)
        return
    if _true(config.get("run-in-background")):
        text = f"run-in-background: jobs of {name} run on Cromwell's own machine, not on Slurm"
        yield Finding(ERROR, "backend", text, f"submit them by sbatch, {_EXAMPLE}")
        return
    yield from _of_commands(config)
    yield from _of_attributes(config)


_COMMANDS: Mapping[str, tuple[Severity, str, str]] = {
    "submit-docker": (ERROR, "no job with an image can be submitted", _EXAMPLE),
    "job-id-regex": (ERROR, "Cromwell does not find Slurm's id of any job", 'as "(\\\\d+).*"'),
    "kill-docker": (
        WARNING,
        "Cromwell calls a workflow aborted while its Slurm job runs on",
        'kill-docker = "scancel ${job_id}"',
    ),
    "check-alive": (
        WARNING,
        "after a restart Cromwell can't tell which jobs still run",
        _EXAMPLE,
    ),
    "exit-code-timeout-seconds": (
        WARNING,
        "for Cromwell a job that Slurm killed stays Running for ever",
        "exit-code-timeout-seconds = 120",
    ),
}
"""What a backend needs, what it is like without, and what to write."""


def _of_commands(config: Mapping[str, Any]) -> Iterator[Finding]:
    for name, (severity, without, remedy) in _COMMANDS.items():
        if not str(config.get(name) or "").strip():
            yield Finding(severity, "backend", f"{name} is missing: {without}", remedy)
    pattern, submit = (str(config.get(name) or "") for name in ("job-id-regex", "submit-docker"))
    if pattern and submit:
        yield from _job_id(pattern, submit)
    if _BARE_SQUEUE.fullmatch(str(config.get("check-alive") or "")):
        yield Finding(
            WARNING,
            "backend",
            "check-alive fails when Slurm gives no answer: while its controller restarts, jobs "
            "that run count as dead",
            _EXAMPLE,
        )
    if submit and "--no-requeue" not in submit:
        yield Finding(
            WARNING,
            "backend",
            "submit-docker lets Slurm queue a job again that has begun: it then ends without the "
            "plugin, which never runs twice",
            "sbatch --no-requeue",
        )
    yield from _root(str(config.get("root") or ""))
    limit = config.get("concurrent-job-limit")
    if limit is not None and _number(limit, 0) < FEW_JOBS:
        text = f"concurrent-job-limit is {limit}: Slurm gets no more jobs than that at a time"
        yield Finding(WARNING, "backend", text, "concurrent-job-limit = 1000")


_BARE_SQUEUE = re.compile(r"\s*squeue(\s+[\w=-]+)*?\s+(-j|--jobs?)\s*=?\s*\"?[$~]\{job_id\}\"?\s*")
"""What most examples have for check-alive. Its exit code is all that Cromwell looks at."""


def _root(root: str) -> Iterator[Finding]:
    if not root.startswith("/"):
        yield Finding(
            WARNING,
            "backend",
            "root is no absolute path: jobs' folders lie wherever Cromwell was started",
            "root: a folder of the shared disk, under the path that the nodes have",
        )
    elif odd := re.search("[,:]", root):
        yield Finding(
            WARNING,
            "backend",
            f"root has a `{odd[0]}`: {root}; Apptainer takes what follows it for something else",
            "root: a folder without `,` and `:` in its path",
        )


def _job_id(pattern: str, submit: str) -> Iterator[Finding]:
    """Whether the id is found in what sbatch prints; Cromwell wants the whole of it to match."""
    printed = "1234" if "--parsable" in submit else "Submitted batch job 1234"
    try:
        match = re.fullmatch(pattern, printed)
    except re.error:  # Java knows more than Python
        return
    if match is None or match.groups() != ("1234",):
        yield Finding(
            WARNING,
            "backend",
            f"job-id-regex {pattern} does not find the one id in `{printed}`, which is all that "
            "sbatch prints",
            'as "(\\\\d+).*" with --parsable, or "Submitted batch job (\\\\d+).*"',
        )


_DECLARATION = re.compile(
    r"^[ \t]*(?:String|Int|Float|Boolean)[ \t]*(\?)?[ \t]+(\w+)[ \t]*(=)?", re.M
)


def _of_attributes(config: Mapping[str, Any]) -> Iterator[Finding]:
    text = str(config.get("runtime-attributes") or "")
    declared = {
        name: bool(optional or default) for optional, name, default in _DECLARATION.findall(text)
    }
    submit = str(config.get("submit-docker") or "")
    for name, attribute in _ATTRIBUTES.items():
        here = [other for other in declared if other == name or _is_amount(name, other)]
        if not here:
            why = "is not declared in runtime-attributes"
        elif submit and not any(_used(other, submit) for other in here):
            why = "is not used in submit-docker"
        else:
            continue
        yield Finding(attribute.severity, "backend", f"{name} {why}: {attribute.lost}", _EXAMPLE)
    for name, may_be_missing in declared.items():
        if not may_be_missing:
            yield from _of_mandatory(name)


def _is_amount(name: str, declared: str) -> bool:
    """Whether ``declared`` is how a backend asks for memory in one unit, such as memory_mb."""
    return name == "memory" and declared.startswith("memory_")


def _used(name: str, submit: str) -> bool:
    return re.search(rf"[$~]\{{[^}}]*\b{name}\b", submit) is not None


def _of_mandatory(name: str) -> Iterator[Finding]:
    known = "memory" if _is_amount("memory", name) else name
    if known in _CROMWELLS_OWN or (known in _ATTRIBUTES and _ATTRIBUTES[known].always):
        return
    remedy = f"declare it with a question mark, as in `String? {name}`, or with a default"
    if known not in _ATTRIBUTES:
        text = f"{name} is mandatory, and pman does not send it: every job fails"
        yield Finding(ERROR, "backend", text, remedy)
    else:
        when = "with IGNORE_LIMITS" if known in ("cpu", "memory") else "unless SITE_FILE has it"
        text = f"{name} is mandatory: {when} every job fails"
        yield Finding(WARNING, "backend", text, remedy)


# --- values ---


def _at(tree: Any, *path: str) -> Any:
    """The value at ``path``; None: there is none."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _number(value: Any, default: float) -> float:
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        return default


def _true(value: Any) -> bool:
    return str(value).lower() in ("true", "yes", "on")


def _false(value: Any) -> bool:
    return str(value).lower() in ("false", "no", "off")
