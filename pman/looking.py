"""What `pman jobs` and `pman job` do: ask a running server, and show what it says."""

import io
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pman.client import EVERY, Away, JobDetails, JobLine, Look, ask, looks
from pman.settings import ClientSettings
from pman.terminal import JobView, ListView, View, height, job_lines, one_line, printable

A = TypeVar("A", bound=BaseModel)

_LINE = tuple(JobLine.model_fields)


async def jobs(
    settings: ClientSettings,
    query: Sequence[tuple[str, str]],
    *,
    as_json: bool,
    watch: bool,
) -> None:
    """The jobs that ``query`` asks for. Raises PmanError."""
    look = partial(ask, settings, "/jobs/", query, ListView.kind)
    await _show(look, ListView(), as_json, watch)


async def job(settings: ClientSettings, jid: str, *, as_json: bool, watch: bool) -> None:
    """All about one job; with ``watch`` until it has ended. Raises PmanError."""
    look = partial(ask, settings, _path(jid), (), JobView.kind)
    await _show(look, JobView(), as_json, watch)


async def document(settings: ClientSettings, jid: str) -> None:
    """The document of a job, as it was sent. Raises PmanError."""
    text = (await ask(settings, _path(jid), (), JobDetails)).answer.document.text
    text = printable(text) if sys.stdout.isatty() else text
    sys.stdout.buffer.write(text.encode(errors="backslashreplace"))
    sys.stdout.flush()


def _path(jid: str) -> str:
    return f"/jobs/{quote(jid.lstrip('/'), safe='', errors='surrogateescape')}/"


async def _show(
    look: Callable[[], Awaitable[Look[A]]], view: View[A], as_json: bool, watch: bool
) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # no name breaks a plain locale
    screen = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not as_json
    if watch and screen:
        await _watch_on_screen(look, view, Console(highlight=False))
    elif watch:
        await _watch_in_lines(look, view, as_json)
    else:
        seen = await look()
        if as_json:
            print(json.dumps(seen.raw, indent=2))
        elif screen:
            _print_whole(view, seen.answer, Console(highlight=False))
        else:
            print("\n".join(view.lines(seen.answer)))
    sys.stdout.flush()  # here a closed pipe is still an error that the command line knows


def _print_whole(view: View[A], answer: A, console: Console) -> None:
    for part in view.whole(answer):
        # The terminal folds text, so that what is copied from it has no line ends of ours.
        console.print(part, soft_wrap=isinstance(part, Text))


async def _watch_on_screen(
    look: Callable[[], Awaitable[Look[A]]], view: View[A], console: Console
) -> None:
    notice = Text(style="bold yellow")
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        async with aclosing(looks(look)) as several:
            async for seen in several:
                if isinstance(seen, Away):
                    since = f"{datetime.now():%H:%M:%S}"
                    notice = notice or Text(f"{since}: {_again(seen)}", notice.style)
                else:
                    answer, notice = seen.answer, Text(style=notice.style)
                notices = [notice] if notice else []
                room = console.height - 1 - height(console, notices)
                live.update(Group(*notices, view.fitting(answer, console, room)), refresh=True)
                if view.over(answer):
                    live.transient = True  # the whole of it takes its place
                    break
    _print_whole(view, answer, console)


async def _watch_in_lines(
    look: Callable[[], Awaitable[Look[A]]], view: View[A], as_json: bool
) -> None:
    known: dict[str, Mapping[str, Any]] | None = None
    away = False
    async with aclosing(looks(look)) as several:
        async for seen in several:
            if isinstance(seen, Away):
                if not away:
                    print(f"pman: {_again(seen)}", file=sys.stderr, flush=True)
                away = True
                continue
            if away:
                print("pman: the server answers again", file=sys.stderr, flush=True)
                away = False
            now = {
                told["jid"]: told if as_json else {name: told[name] for name in _LINE}
                for told in view.objects(seen.raw)
            }
            changed = [told for jid, told in now.items() if (known or {}).get(jid) != told]
            if as_json:
                lines = [json.dumps(told) for told in changed]
            else:
                told_jobs = [JobLine.model_validate(told) for told in changed]
                lines = [*job_lines(told_jobs, header=known is None)]
            for line in lines:
                print(line)
            sys.stdout.flush()
            known = now
            if view.over(seen.answer):
                return


def _again(error: Away) -> str:
    return f"{one_line(str(error))}; asking again every {EVERY:g} s"
