"""What the operator wrote, as it is on disk: the templates of TEMPLATES_DIR and SITE_FILE, read as
one value that can be compared, sent to another process and kept."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from pman.errors import SiteError, SourceError, TemplateError

ENDING = ".j2"
"""Files that end otherwise are no templates, and are left alone, as are those that begin with a
dot: editors and ConfigMaps make such files."""

MAX_FILE = 1 << 20
"""Bytes of one file, at the most."""

MAX_FILES = 200
"""Templates in TEMPLATES_DIR, at the most."""

MAX_TOTAL = 8 << 20
"""Characters of all of them together, at the most."""


@dataclass(frozen=True)
class Sources:
    templates: Mapping[str, str] = field(default_factory=dict)
    """The text of each template by its path below TEMPLATES_DIR, such as
    ``sbatch/mine.sbatch.j2``."""
    site: str | None = None
    """The text of SITE_FILE; None: there is none."""
    site_file: str = "SITE_FILE"
    """Its path, for messages."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


def read(templates_dir: Path | None, site_file: Path | None) -> Sources:
    """What is on disk now.

    Raises TemplateError or SiteError, with the file, for what can't be read or is no UTF-8, and for
    a template that a link leads out of the folder.
    """
    templates: dict[str, str] = {}
    if templates_dir is not None:
        try:
            templates = _templates(templates_dir)
        except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
            raise TemplateError(f"it can't be read: {error}", _name(templates_dir)) from None
    if site_file is None:
        return Sources(templates)
    return Sources(templates, _text(site_file, SiteError, str(site_file)), str(site_file))


def _name(templates_dir: Path) -> str:
    return f"TEMPLATES_DIR {templates_dir}"


def _templates(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        raise TemplateError("it is not a folder", _name(folder))
    found: dict[str, str] = {}
    total = 0
    for path in _paths(folder, folder.resolve(), set()):
        name = str(path.relative_to(folder))
        if not name.isprintable():
            raise TemplateError(f"{name!r} is no name for a template: rename it", _name(folder))
        found[name] = _text(path, TemplateError, name)
        total += len(found[name])
        if len(found) > MAX_FILES or total > MAX_TOTAL:
            raise TemplateError(
                f"it has more than {MAX_FILES} templates, or more than {MAX_TOTAL >> 20} MiB of "
                "them: is it the right folder?",
                _name(folder),
            )
    return found


def _paths(folder: Path, inside: Path, seen: set[Path]) -> Iterator[Path]:
    """The templates below ``folder``, links to folders followed once.

    Raises TemplateError for a link that leads out of ``inside``.
    """
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        is_folder = path.is_dir()
        if not is_folder and not path.name.endswith(ENDING):
            continue
        target = path.resolve()
        if not target.is_relative_to(inside):
            raise TemplateError(
                f"it is a link to {target}, which is not in TEMPLATES_DIR: copy it to there",
                str(path),
            )
        if not is_folder:
            yield path
        elif target not in seen:
            yield from _paths(path, inside, seen)


def _text(path: Path, kind: type[SourceError], place: str) -> str:
    try:
        if not path.is_file() and path.exists():
            raise kind("it is no file", place)
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise kind(f"it can't be read: {error.strerror}", place) from None
    if len(data) > MAX_FILE:
        raise kind(f"it is longer than {MAX_FILE} bytes", place)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"0x{data[error.start]:02x}"
        raise kind(f"it is no UTF-8: it has the byte {byte}", place, line) from None
