"""How jobs look: plain lines, tables of any width, and nothing that a terminal would obey."""

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from pman.client import JobDetails, JobLine, JobList
from pman.jobs import JobState
from pman.terminal import JobView, ListView, duration, height, job_lines, one_line, printable

NOW = datetime.now(UTC)
HOSTILE = "\x1b]0;owned\x07\x1b[2J[bold red]x[/] :smile: \r\x7f\x9b31m\u202e\u2028é☃\ud800"
SHOWN = (
    r"\x1b]0;owned\x07\x1b[2J[bold red]x[/] :smile: \r\x7f\x9b31m\u202e\u2028é☃\ud800"  # as it is
)


def line(jid: str = "j", **changes: Any) -> JobLine:
    return JobLine.model_construct(**values(jid) | changes)


def values(jid: str = "j") -> dict[str, Any]:
    return {
        "jid": jid,
        "state": JobState.RUNNING,
        "status": "started",
        "engine": "slurm",
        "engine_id": "4711",
        "template": "apptainer",
        "auid": "cube",
        "image": "docker.io/library/debian:12",
        "message": "running on node1",
        "accepted_at": NOW - timedelta(days=2, minutes=1),
        "started_at": NOW - timedelta(seconds=192),
        "ended_at": NOW,
        "generation": 1,
    }


def details(**changes: Any) -> JobDetails:
    whole = {
        "cmd": "sh -c 'echo hi'",
        "notes": {"stderr": "/x/stderr"},
        "history": [{"at": NOW, "state": "accepted", "message": "accepted"}],
        "document": {"text": "#!/bin/bash\n\techo hi\n", "language": "sbatch", "template": "bare"},
        "log": "one\ntwo\n",
    }
    return JobDetails.model_validate(values() | whole | changes)


def on_screen(parts: Any, width: int) -> str:
    """What a terminal of ``width`` columns is sent, without colours."""
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, color_system=None, highlight=False
    )
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, Text))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((-5, "0s"), (0, "0s"), (59.9, "59s"), (60, "1m00s"), (192, "3m12s"), (3599, "59m59s")),
        *((3600, "1h00m"), (86399, "23h59m"), (86400, "1d00h"), (31536000, "365d00h")),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_a_terminal_would_obey_is_shown_as_escapes() -> None:
    assert printable(HOSTILE) == one_line(HOSTILE) == SHOWN
    assert printable("a\tb\nc\r\n") == "a\tb\nc\\r\n"
    assert one_line("a\tb\nc") == r"a\tb\nc"
    everything = "".join(map(chr, range(0x110000)))
    assert all(c.isprintable() or c in "\n\t" for c in printable(everything))


# --- plain ---


def test_a_plain_list_is_a_job_a_line_in_columns() -> None:
    jobs = [
        line("a" * 40, message="out of memory (asked for 200 MiB)" * 20),
        line(started_at=None, ended_at=None, engine_id="", state=JobState.ACCEPTED, message=""),
    ]
    header, first, second = ListView().lines(JobList.model_construct(jobs=jobs, total=2))
    assert header.split() == ["JID", "STATE", "ID", "TEMPLATE", "AGE", "RUN", "MESSAGE"]
    assert first.split(maxsplit=6) == [
        *("a" * 40, "running", "4711", "apptainer", "2d00h", "3m12s"),
        "out of memory (asked for 200 MiB)" * 20,
    ]
    assert second.split() == ["j", "accepted", "-", "apptainer", "2d00h", "-", "-"]
    assert header.index("STATE") == first.index("running") == second.index("accepted")


def test_plain_lines_have_no_trailing_blanks_and_no_other_line_ends() -> None:
    jobs = [line(message="a\nb\r\n"), line("long-jid", message="")]
    lines = [*ListView().lines(JobList.model_construct(jobs=jobs, total=9))]
    assert len(lines) == 4
    assert [text for text in lines if text != text.rstrip() or len(text.splitlines()) != 1] == []
    assert lines[1].endswith(r"a\nb\r\n")


@pytest.mark.parametrize(
    ("shown", "total", "last"), [(0, 0, "no jobs"), (2, 340, "2 of 340 jobs"), (2, 2, None)]
)
def test_a_list_that_is_cut_says_so_last(shown: int, total: int, last: str | None) -> None:
    answer = JobList(jobs=[line(f"j{number}") for number in range(shown)], total=total)
    plain = [*ListView().lines(answer)]
    screen = on_screen(ListView().whole(answer), 100).splitlines()
    assert (plain[-1] == last, screen[-1].rstrip() == last) == ((last is not None,) * 2)
    assert len(plain) == len(screen) == shown + (shown > 0) + (last is not None)


def test_only_the_first_lines_of_a_watched_list_have_a_header() -> None:
    assert len([*job_lines([line()], header=False)]) == 1
    assert len([*job_lines([], header=True)]) == 1
    assert [*job_lines([], header=False)] == []


def test_a_plain_job_tells_state_and_message_first_and_its_log_last() -> None:
    lines = [*JobView().lines(details(generation=2))]
    assert lines[:2] == ["state     running (started)", "message   running on node1"]
    assert lines[2:4] == ["job       j, run 2", "engine    slurm, id 4711"]
    assert lines[-2:] == ["one", "two"]
    text = "\n".join(lines)
    for words in (
        *("image     docker.io/library/debian:12", "cmd       sh -c 'echo hi'", "user      cube"),
        "stderr    /x/stderr",
        *(", after 3m12s", "accepted    accepted", "#!/bin/bash\n\techo hi\n"),
    ):
        assert words in text


@pytest.mark.parametrize(("state", "words"), [("running", "nothing yet"), ("failed", "empty")])
def test_a_log_without_a_line_says_so(state: str, words: str) -> None:
    assert [*JobView().lines(details(state=state, log=""))][-1] == words


def test_a_message_of_several_lines_stays_in_its_column() -> None:
    lines = [*JobView().lines(details(message="sbatch: error: a\nsbatch: error: b"))]
    assert lines[1:3] == ["message   sbatch: error: a", "          sbatch: error: b"]


# --- on a terminal ---


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_table_fits_the_terminal_and_loses_nothing(width: int) -> None:
    jobs = [
        line("chris-jid-123456", message="out of memory (asked for 200 MiB)"),
        line("j2", state=JobState.SUCCEEDED, engine_id="7465@1250336", message="x" * 150),
    ]
    answer = JobList.model_construct(jobs=jobs, total=2)
    text = on_screen(ListView().whole(answer), width)
    assert max(len(row.rstrip()) for row in text.splitlines()) <= width
    if width >= 80:
        assert [job.jid for job in jobs if f"\n{job.jid} " not in text] == []
    for job in jobs:
        for word in (job.jid, job.engine_id, job.template, *job.message.split(), job.state):
            assert all(text.count(c) >= word.count(c) for c in set(word)), word
    assert text.count("x") >= 150


@pytest.mark.parametrize("room", [8, 30])
@pytest.mark.parametrize("width", [80, 200])
def test_what_is_watched_has_room_on_the_terminal(room: int, width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=room)
    jobs = [line(f"j{number}", message="several words " * 5) for number in range(100)]
    answer = JobList.model_construct(jobs=jobs, total=340)
    shown = ListView().fitting(answer, console, room)
    assert room / 2 < height(console, [shown]) <= room
    assert "j0" in on_screen([shown], width)
    assert "of 340 jobs" in on_screen([shown], width)


def test_a_watched_job_shows_the_end_of_its_log_and_the_newest_history() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=40)
    history = [{"at": NOW, "state": "queued", "message": f"m{number}."} for number in range(50)]
    log = "\n".join(f"line {number}" + "x" * 200 for number in range(500))
    shown = JobView().fitting(details(history=history, log=log), console, 40)
    text = on_screen([shown], 80)
    assert height(console, [shown]) == len(text.splitlines()) == 40
    assert "line 499x" in text.splitlines()[-1]
    assert "m49." in text
    assert "m1." not in text
    assert "#!/bin/bash" not in text


def test_nothing_of_a_job_reaches_the_terminal_as_a_command_or_as_markup() -> None:
    """Neither the terminal's own language nor rich's."""
    hostile = dict.fromkeys(
        ("jid", "status", "engine", "engine_id", "template", "auid", "image", "message"), HOSTILE
    )
    job = JobDetails.model_construct(
        **details().__dict__
        | hostile
        | {"cmd": HOSTILE, "log": HOSTILE, "notes": {HOSTILE: HOSTILE}}
    )
    job.document.text = job.document.language = job.document.template = HOSTILE
    job.history[0].message = HOSTILE
    console = Console(file=io.StringIO(), force_terminal=True, width=4000, height=50)
    answer = JobList.model_construct(jobs=[job], total=1)
    shown = [
        on_screen(ListView().whole(answer), 4000),
        on_screen([ListView().fitting(answer, console, 50)], 4000),
        on_screen(JobView().whole(job), 4000),
        on_screen([JobView().fitting(job, console, 50)], 4000),
        "\n".join(ListView().lines(answer)),
        "\n".join(JobView().lines(job)),
    ]
    for text in shown:
        assert all(c.isprintable() or c in "\n\t" for c in text), text
        assert SHOWN in text
    assert [text.count(SHOWN) for text in shown] == [4, 4, 15, 12, 4, 15]
