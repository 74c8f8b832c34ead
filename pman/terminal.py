"""How jobs and findings look: on a terminal with colours, and folded; everywhere else plain, a line
for each.

Messages, logs and documents come from elsewhere. Here they lose what a terminal would obey.
"""

import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pman.client import JobDetails, JobLine, JobList
from pman.jobs import Finding, JobState, Severity

_STYLES = {
    JobState.RUNNING: "cyan",
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "bold red",
    JobState.CANCELLED: "red",
    JobState.LOST: "bold red",
}

_UNITS = (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1))

RECENT = 8
"""Lines of history that are shown while a job is watched on a terminal."""

NARROWEST = 12
"""Columns of a message, at the least, where the other columns stay whole."""

A = TypeVar("A", bound=BaseModel)


class View(Protocol[A]):
    """How one kind of answer looks."""

    kind: type[A]

    def over(self, answer: A) -> bool:
        """Whether nothing of it will change any more."""

    def objects(self, raw: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """The jobs of the answer as the server gave it."""

    def lines(self, answer: A) -> Iterable[str]:
        """Plain, whole."""

    def whole(self, answer: A) -> Iterable[RenderableType]:
        """For a terminal."""

    def fitting(self, answer: A, console: Console, room: int) -> RenderableType:
        """For a terminal with ``room`` lines."""


def printable(text: str, keep: str = "\n\t") -> str:
    """``text`` with its control characters, and all that has no shape of its own, as Python's
    escapes; the line ends and tabs of ``keep`` stay."""
    return re.sub(
        r"[^ -~]",
        lambda found: (
            found[0] if found[0] in keep or found[0].isprintable() else _escaped(found[0])
        ),
        text,
    )


def one_line(text: str) -> str:
    return printable(text, keep="")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def duration(seconds: float) -> str:
    """In the two largest units, such as ``3m12s``."""
    whole = max(0, int(seconds))
    for large, size, small, part in _UNITS:
        if whole >= size:
            return f"{whole // size}{large}{whole % size // part:02}{small}"
    return f"{whole}s"


# --- pman jobs ---


def _age(job: JobLine, now: datetime) -> str:
    return duration((now - job.accepted_at).total_seconds()) if job.accepted_at else ""


def _run(job: JobLine, now: datetime) -> str:
    if job.started_at is None:
        return ""
    return duration(((job.ended_at or now) - job.started_at).total_seconds())


_COLUMNS: Mapping[str, Callable[[JobLine, datetime], str]] = {
    "JID": lambda job, _: job.jid,
    "STATE": lambda job, _: job.state,
    "ID": lambda job, _: job.engine_id,
    "TEMPLATE": lambda job, _: job.template,
    "AGE": _age,
    "RUN": _run,
    "MESSAGE": lambda job, _: job.message,
}


def _cells(job: JobLine) -> list[str]:
    now = datetime.now(UTC)
    return [one_line(value(job, now)) or "-" for value in _COLUMNS.values()]


def job_lines(jobs: Sequence[JobLine], header: bool) -> Iterator[str]:
    """A line for each job, whole, in columns."""
    rows = [[*_COLUMNS]] * header + [_cells(job) for job in jobs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()


@dataclass(frozen=True)
class _Table:
    """Columns as wide as the terminal; the message is folded, the others only where they must."""

    jobs: Sequence[JobLine]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        rows = [_cells(job) for job in self.jobs]
        widths = [max(map(cell_len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
        fits = sum(widths[:-1]) + 2 * len(widths[:-1]) + NARROWEST <= options.max_width
        rigid = _COLUMNS.keys() - {"MESSAGE"} if fits else {"STATE", "AGE", "RUN"}
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in _COLUMNS:
            table.add_column(name, overflow="fold", no_wrap=name in rigid)
        for job, row in zip(self.jobs, rows, strict=True):
            cells = dict(zip(_COLUMNS, map(Text, row), strict=True))
            cells["STATE"].stylize(_STYLES.get(job.state, ""))
            table.add_row(*cells.values())
        yield table


def cut(answer: JobList) -> str:
    """What a list does not show; empty where it shows all."""
    shown = len(answer.jobs)
    return f"{shown} of {answer.total} jobs" if shown < answer.total else ""


class ListView:
    """A list of jobs."""

    kind = JobList

    def over(self, answer: JobList) -> bool:
        return False

    def objects(self, raw: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        jobs: Sequence[Mapping[str, Any]] = raw["jobs"]
        return jobs

    def lines(self, answer: JobList) -> Iterator[str]:
        if not answer.jobs:
            yield "no jobs"
            return
        yield from job_lines(answer.jobs, header=True)
        if words := cut(answer):
            yield words

    def whole(self, answer: JobList) -> Iterable[RenderableType]:
        if not answer.jobs:
            return [Text("no jobs")]
        return [_Table(answer.jobs), *([Text(words, "dim")] if (words := cut(answer)) else [])]

    def fitting(self, answer: JobList, console: Console, room: int) -> RenderableType:
        """The newest jobs."""
        count = len(answer.jobs)
        while True:
            shown = [*self.whole(answer.model_copy(update={"jobs": answer.jobs[:count]}))]
            lines = height(console, shown)
            if lines <= room or count <= 1:
                return Group(*shown)
            count = max(1, min(count - 1, count * room // lines))


# --- pman job ---


def _moment(time: datetime) -> str:
    return time.astimezone().isoformat(" ", "seconds")


def _after(earlier: datetime | None, later: datetime) -> str:
    return f", after {duration((later - earlier).total_seconds())}" if earlier else ""


def _fields(job: JobDetails) -> Iterator[tuple[str, Text]]:
    yield (
        "state",
        Text.assemble(
            (job.state, _STYLES.get(job.state, "")), (f" ({one_line(job.status)})", "dim")
        ),
    )
    yield "message", Text(printable(job.message).replace("\n", f"\n{'':10}"))
    again = f", run {job.generation}" if job.generation > 1 else ""
    yield "job", Text(one_line(job.jid) + again)
    number = f", id {job.engine_id}" if job.engine_id else ""
    yield "engine", Text(one_line(job.engine + number))
    for name, value in job.notes.items():
        yield name, Text(one_line(value))
    yield "image", Text(one_line(job.image))
    yield "cmd", Text(one_line(job.cmd))
    yield "user", Text(one_line(job.auid))
    if job.accepted_at:
        yield "accepted", Text(_moment(job.accepted_at))
    if job.started_at:
        yield "started", Text(_moment(job.started_at) + _after(job.accepted_at, job.started_at))
    if job.ended_at:
        yield "ended", Text(_moment(job.ended_at) + _after(job.started_at, job.ended_at))


def _heading(text: str) -> Text:
    return Text(f"\n{one_line(text)}", "bold")


def _head(job: JobDetails, recent: int = 0) -> Iterator[Text]:
    """Fields and history; of the history the last ``recent`` lines, 0: all."""
    for name, value in _fields(job):
        yield Text.assemble((f"{one_line(name):<10}", "dim"), value)
    yield _heading("history")
    for event in job.history[-recent:]:
        yield Text.assemble(
            (f"{event.at.astimezone():%Y-%m-%d %H:%M:%S}  ", "dim"),
            (f"{event.state:<10}  ", _STYLES.get(event.state, "")),
            one_line(event.message),
        )


def _log(job: JobDetails) -> list[str]:
    return printable(job.log).splitlines() or ["nothing yet" if not job.state.final else "empty"]


class JobView:
    """One job: what became of it first, its log last."""

    kind = JobDetails

    def over(self, answer: JobDetails) -> bool:
        return answer.state.final

    def objects(self, raw: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return [raw]

    def lines(self, answer: JobDetails) -> Iterator[str]:
        for part in self.whole(answer):
            yield from part.plain.split("\n")

    def whole(self, answer: JobDetails) -> Iterable[Text]:
        document = answer.document
        return [
            *_head(answer),
            _heading(f"document: {document.language}, by the template {document.template}"),
            Text(printable(document.text).removesuffix("\n")),
            _heading("log, its last lines"),
            Text("\n".join(_log(answer))),
        ]

    def fitting(self, answer: JobDetails, console: Console, room: int) -> RenderableType:
        """Without the document, and with the end of the log."""
        head = [*_head(answer, RECENT), _heading("log, its last lines")]
        rest = max(1, room - height(console, head))
        log = Text("\n".join(_log(answer)[-rest:]), no_wrap=True, overflow="ellipsis")
        return Group(*head, log)


def height(console: Console, parts: Iterable[RenderableType]) -> int:
    """The lines that ``parts`` take on a terminal."""
    return len(console.render_lines(Group(*parts), pad=False))


# --- pman check ---

_SEVERITIES = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}


def show_findings(findings: Iterable[Finding], *, as_json: bool) -> list[Finding]:
    """The findings, once each was printed: a line as it comes, or all as one JSON array."""
    if as_json:
        found = list(findings)
        print(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
        return found
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale may lack the arrow
    console = Console(soft_wrap=True, highlight=False)
    found = []
    for finding in findings:
        line = Text(f"{finding.severity:<8}", style=_SEVERITIES[finding.severity])
        line.append(f"{finding.subject:<18} {one_line(finding.text)}", style="not bold default")
        if finding.remedy:
            line.append(f" → {one_line(finding.remedy)}", style="not bold default")
        console.print(line)
        found.append(finding)
    return found
