"""Root folders by mmdebstrap, from the mirror that this machine's own packages come from."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.lab.errors import LabError

SOURCES = Path("/etc/apt")  # sources.list and sources.list.d
BUILD_SECONDS = 1200  # the longest that a root folder may take
SHOWN = 3000  # characters of a failed build's output


def codename() -> str:
    """This machine's release, such as bookworm."""
    match = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.M)
    if not match:
        raise LabError("/etc/os-release names no VERSION_CODENAME")
    return match[1]


def mirror() -> str:
    """The address from which apt gets this machine's release."""
    release = codename()
    for address, suites in entries(SOURCES):
        if release in suites:
            return address
    raise LabError(f"no apt source for {release} below {SOURCES}")


def entries(sources: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, suites) of every source of packages, in both formats that apt reads."""
    folder = sources / "sources.list.d"
    for file in sorted(folder.glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", file.read_text()):
            fields = dict(re.findall(r"^([\w-]+):[ \t]*(.*)$", stanza, re.M))
            if "deb" in fields.get("Types", "").split():
                for address in fields.get("URIs", "").split():
                    yield address, fields.get("Suites", "").split()
    for file in [sources / "sources.list", *sorted(folder.glob("*.list"))]:
        if file.exists():
            lines = file.read_text()
            for address, suite in re.findall(r"^deb\s+(?:\[.*?\]\s+)?(\S+)\s+(\S+)", lines, re.M):
                yield address, [suite]


def bootstrap(suite: str, variant: str, packages: Sequence[str], target: Path) -> None:
    """Make `target` a root folder of `suite` with `packages`; see mmdebstrap(1) on `variant`."""
    done = subprocess.run(
        [
            "mmdebstrap",
            "--mode=root",
            f"--variant={variant}",
            "--aptopt=Acquire::Check-Valid-Until false",  # a mirror may be a snapshot
            f"--include={','.join(packages)}",
            suite,
            str(target),
            f"deb {mirror()} {suite} main",
        ],
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    if done.returncode:
        raise LabError(f"mmdebstrap {suite}: {done.stderr[-SHOWN:]}")
