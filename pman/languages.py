"""The languages that documents are written in: where their templates lie, how a value becomes a
word of the language and where it may stand, and what is wrong with a document before any engine
has seen it."""

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from pman import quoting, wdl
from pman.jobs import Complaint
from pman.quoting import Misplaced, shell_word

_BASH_SECONDS = 20


@dataclass(frozen=True)
class Language:
    """A language that documents are written in."""

    folder: str
    ending: str
    word: Callable[[str | float], str]
    """One value as one word of the language. Raises ValueError for one that can't be."""
    settled: Callable[[str, str, str], str | Misplaced]
    """The document of a text whose words stand between two marks, each word as its place wants it;
    or the first one that can't stand where it does."""
    check: Callable[[str], Complaint | None]
    """The first thing that is wrong with a document; None: nothing is."""


def check_sbatch(text: str) -> Complaint | None:
    """By sbatch(1) and ``bash -n``: what sbatch refuses, what it would ignore, and the syntax."""
    lines = text.split("\n")
    if not text.startswith("#!"):
        return Complaint(1, "sbatch wants `#!` and the shell's path first, such as #!/bin/bash")
    commands = False
    for number, line in enumerate(lines, 1):
        if line.endswith("\r"):
            return Complaint(number, "the line ends with a carriage return, which sbatch refuses")
        if line.startswith("#SBATCH") and commands:
            return Complaint(
                number, "sbatch ignores an #SBATCH line after the first command: move it up"
            )
        commands = commands or not re.match(r"\s*(#|$)", line)
    return _bash(text)


def check_wdl(text: str) -> Complaint | None:
    """By miniwdl, and by ``bash -n`` for what stands in its commands."""
    complaint = wdl.check(text)
    if complaint is not None:
        return complaint
    for line, command in wdl.commands(text):
        wrong = _bash(command)
        if wrong is not None:
            return Complaint(line + wrong.line - 1 if wrong.line else 0, wrong.reason)
    return None


def _bash(text: str) -> Complaint | None:
    try:
        done = subprocess.run(
            ["bash", "--norc", "-n", "/dev/stdin"],  # by its name, bash counts the lines
            input=text.encode(),
            capture_output=True,
            check=False,
            timeout=_BASH_SECONDS,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},  # no word of locales
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Complaint(0, f"bash, which checks the script, can't be run here: {error}")
    words = done.stderr.decode(errors="replace").strip()
    if not words and not done.returncode:
        return None
    place = re.match(r"/dev/stdin: line (\d+): (.*)", words)
    return Complaint(int(place[1]), place[2]) if place else Complaint(0, words)


LANGUAGES = {
    "sbatch": Language("sbatch", ".sbatch.j2", shell_word, quoting.settled, check_sbatch),
    "wdl": Language("wdl", ".wdl.j2", wdl.literal, wdl.settled, check_wdl),
}
