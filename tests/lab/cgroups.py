"""Folders of the lab's own in the machine's cgroup hierarchies, for jobs that run out of memory."""

from __future__ import annotations

from pathlib import Path

MOUNTPOINT = Path("/sys/fs/cgroup")
CONTROLLERS = ("memory", "freezer")  # task/cgroup limits in the one, proctrack/cgroup in the other


def cgroup_problem() -> str | None:
    """Why jobs can't be confined with cgroup/v1 here; None when they can."""
    lacking = [name for name in CONTROLLERS if not (MOUNTPOINT / name / "tasks").exists()]
    if lacking:
        return f"no cgroup v1 hierarchy for {', '.join(lacking)} below {MOUNTPOINT}"
    if not (MOUNTPOINT / "memory/memory.memsw.limit_in_bytes").exists():
        return "the kernel doesn't count swap (memory.memsw is missing)"
    return None


def lab_cgroups(root: Path) -> list[Path]:
    """The cgroup folders of the lab in `root`."""
    unique = str(root).strip("/").replace("/", "-")
    return [MOUNTPOINT / name / unique for name in CONTROLLERS]


def mounts(folders: list[Path]) -> list[list[str]]:
    """Commands that make each folder the top of its hierarchy in our mount namespace."""
    commands = []
    for folder in folders:
        commands += [["mkdir", str(folder)], ["mount", "--bind", str(folder), str(folder.parent)]]
    return commands
