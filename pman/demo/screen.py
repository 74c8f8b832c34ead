"""What the demo shows: colours on a terminal, plain text everywhere else."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text

from pman.jobs import Event, JobState

PREVIEW = 64
"""Columns of the picture on a terminal."""

_STYLES = {JobState.SUCCEEDED: "bold green", JobState.RUNNING: "cyan"}


class Screen:
    def __init__(self) -> None:
        self._console = Console(soft_wrap=True, highlight=False)

    def heading(self, text: str) -> None:
        self._console.print(Text(f"\n{text}", style="bold"))

    def text(self, text: str) -> None:
        self._console.print(text, markup=False)

    def job(self, job: Mapping[str, Any]) -> None:
        """One field a line."""
        fields = ",\n".join(f"  {json.dumps(key)}: {json.dumps(job[key])}" for key in job)
        self.code(f"{{\n{fields}\n}}", "json")

    def code(self, text: str, language: str) -> None:
        if self._console.is_terminal:
            syntax = Syntax(text, language, theme="ansi_dark", background_color="default")
            self._console.print(syntax.highlight(text), end="")
        else:
            self.text(text.rstrip())

    def state(self, event: Event) -> None:
        failed = event.state.final and event.state is not JobState.SUCCEEDED
        style = "bold red" if failed else _STYLES.get(event.state, "")
        line = Text(f"{event.at.astimezone():%H:%M:%S}  ")
        line.append(f"{event.state:<11}", style=style)
        line.append(f"{event.state.chris:<22}", style="dim")
        self._console.print(line.append(event.message))

    def statistics(self, statistics: Mapping[str, Any]) -> None:
        for name, value in statistics.items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            words = ", ".join(f"{key} {_short(part)}".strip() for key, part in parts)
            self.text(f"{name.replace('_', ' '):<16}{words}")

    def picture(self, path: Path) -> None:
        """In half blocks, two pixels each, where the terminal has the room and the colours."""
        console = self._console
        if console.color_system not in {"256", "truecolor"} or console.width < PREVIEW:
            return
        from PIL import Image  # of the extra: `pman` without it must start

        with Image.open(path) as image:
            height = PREVIEW * image.height // image.width // 2 * 2
            grey = image.convert("L").resize((PREVIEW, height))
        shades = [Color.from_rgb(shade, shade, shade) for shade in grey.tobytes()]
        for row in range(0, height * PREVIEW, 2 * PREVIEW):
            line = Text()
            for upper, lower in zip(
                shades[row : row + PREVIEW], shades[row + PREVIEW : row + 2 * PREVIEW], strict=True
            ):
                line.append("▀", Style(color=upper, bgcolor=lower))
            console.print(line)


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
