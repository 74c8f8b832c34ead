"""Writes docs/settings.md from pman/settings.py: `.venv/bin/python docs/generate_settings.py`."""

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin
from unittest.mock import patch

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pman import settings
from pman.settings import BUILT_ENGINES, ClientSettings, Settings

PAGE = Path(__file__).with_name("settings.md")

HEAD = """\
<!-- Generated from pman/settings.py. Don't edit: run `.venv/bin/python docs/generate_settings.py`.
     tests/test_docs.py fails while this page is stale. -->
# Settings

pman reads its settings from its environment, then from a file `.env` in the folder that it is
started in; the environment wins. An empty value counts as not set. A variable that is not in these
tables is ignored. A wrong value is told at the start, one line for each, and pman ends with exit
code 1.

Yes-or-no settings take `yes`/`no`, `true`/`false`, `1`/`0` and `on`/`off`. Dictionaries are written
`key=value,key=value`. *required* means that pman does not start without it.
"""

UNITS = {
    "ssh_port": "",
    "timelimit_minutes": "minutes",
    "shm_size": "MiB",
    "job_logs_tail": "lines",
    "poll_interval": "seconds",
    "lost_after": "seconds",
}
"""The unit of each setting that is a number."""

KINDS = {
    # The other names are known, and refused by this version.
    "container_env": " or ".join(f"`{engine}`" for engine in BUILT_ENGINES),
    "template": "name, or dictionary",
}
"""The types that the annotations don't tell."""

ENOUGH = {"container_env": "slurm", "storebase": "/data"}
"""Values that pman starts with."""


def groups() -> Iterator[tuple[str, list[str]]]:
    """The settings' names, below the comment that each group of them has in the source."""
    title, names = "", list[str]()
    source = inspect.getsource(Settings) + inspect.getsource(ClientSettings)
    for line in source.splitlines():
        if comment := re.fullmatch(r"    # (.+)", line):
            if names:
                yield title, names
            title, names = comment[1], []
        elif (field := re.match(r"    (\w+):", line)) and field[1] in Settings.model_fields:
            names.append(field[1])
    yield title, names


def kind(annotation: Any) -> str:
    """A type in an operator's words."""
    if get_origin(annotation) in (Union, UnionType):
        return ", ".join(kind(part) for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is Mapping:
        return "dictionary"
    words = {str: "text", bool: "yes or no", int: "whole number", float: "number", Path: "path"}
    return words[annotation]


def bounds(field: FieldInfo) -> str:
    """The least and the most, as far as there are any."""
    words = {"ge": "at least", "le": "at most"}
    return "".join(
        f", {word} {getattr(item, name)}"
        for item in field.metadata
        for name, word in words.items()
        if hasattr(item, name)
    )


def required(name: str) -> bool:
    """Whether pman refuses to start without the setting."""
    values: dict[str, Any] = {key: value for key, value in ENOUGH.items() if key != name}
    with patch.dict(os.environ, clear=True):
        try:
            Settings(_env_file=None, **values)  # type: ignore[call-arg]
        except ValidationError:
            return True
    return False


def default(name: str, field: FieldInfo) -> str:
    if required(name):
        return "*required*"
    if field.default in (None, "") or field.default == {}:
        return "–"
    if isinstance(field.default, bool):
        return "`yes`" if field.default else "`no`"
    number = field.default
    return f"`{number:g}`" if isinstance(number, float) else f"`{number}`"


def row(name: str) -> str:
    field = Settings.model_fields[name]
    if not field.description:
        raise ValueError(f"the setting {name} has no description")
    numeric = {int, float} & {field.annotation, *get_args(field.annotation)}
    if bool(numeric) != (name in UNITS):
        raise ValueError(f"UNITS must say the unit of each number, and of nothing else: {name}")
    words = KINDS.get(name) or kind(field.annotation) + bounds(field)
    cells = [f"`{name.upper()}`", words, default(name, field), UNITS.get(name, "")]
    return "| " + " | ".join([*cells, field.description.replace("|", "\\|")]) + " |"


def page() -> str:
    """The text of docs/settings.md."""
    parts = [HEAD]
    listed: list[str] = []
    for title, names in groups():
        listed += names
        rows = "\n".join(row(name) for name in names)
        parts.append(
            f"\n## {title}\n\n| name | type | default | unit | meaning |\n"
            f"|---|---|---|---|---|\n{rows}\n"
        )
    if missing := set(Settings.model_fields) - set(listed):
        raise ValueError(f"not found in {settings.__file__}: {sorted(missing)}")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
