"""The Debian releases whose Slurm a lab can run, and the mounts that make one its world.

`machine` is the packages of this machine with a few private files over them. The others are root
folders from the cache. One is entered by pivot_root and not by chroot: in a chroot the kernel
refuses user namespaces, without which Apptainer can't start. What a lab writes there goes into an
overlay in the lab's folder.
"""

from __future__ import annotations

from pathlib import Path

from tests.lab import debian
from tests.lab.cache import built, cache_folder

_SLURM = ("slurmctld", "slurmd", "slurm-client", "munge", "openssh-server", "mount")

RELEASES: dict[str, tuple[str, ...]] = {
    "machine": (),
    "trixie": _SLURM,
    "sid": (*_SLURM, "apptainer", "python3-minimal"),
}


def tree(release: str) -> Path:
    """The root folder of a release; the first use of one builds it (10-40 s)."""
    packages = RELEASES[release]
    if not packages:
        return Path("/")
    return built(
        release, packages, lambda target: debian.bootstrap(release, "essential", packages, target)
    )


def mounts(tree: Path, root: Path) -> list[list[str]]:
    """Commands that make `tree` the world of the lab in `root`, in a new mount namespace."""
    start = [["mount", "--make-rprivate", "/"]]
    if tree == Path("/"):
        return [*start, *_machine_mounts(root)]
    return [*start, *_tree_mounts(tree, root)]


def _run_mounts(world: str) -> list[list[str]]:
    """The parts that every world has new."""
    return [
        ["mount", "-t", "proc", "proc", f"{world}/proc"],
        ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", f"{world}/run"],
        ["mkdir", "-m", "755", f"{world}/run/sshd"],
    ]


def _machine_mounts(root: Path) -> list[list[str]]:
    private = [
        ["mount", "--bind", f"{root}/etc/{name}", f"/etc/{name}"]
        for name in ("passwd", "group", "shadow", "hosts")
    ]
    return [*_run_mounts(""), *private, ["mount", "--bind", f"{root}/slurm", "/etc/slurm"]]


def _tree_mounts(tree: Path, root: Path) -> list[list[str]]:
    world, cache = f"{root}/world", cache_folder()
    layers = f"lowerdir={tree},upperdir={world}/upper,workdir={world}/work"
    top = f"{world}/top"
    return [
        ["mkdir", "-p", f"{world}/upper", f"{world}/work", top],
        ["mount", "-t", "overlay", "-o", layers, "overlay", top],
        ["mkdir", "-p", f"{top}{root}", f"{top}{cache}", f"{top}/old"],
        ["cp", "-a", f"{root}/etc/.", f"{top}/etc"],
        ["cp", "-L", "/etc/localtime", f"{top}/etc/localtime"],  # Apptainer binds it
        *_run_mounts(top),
        ["mount", "--rbind", "/dev", f"{top}/dev"],
        ["mount", "--rbind", "/sys", f"{top}/sys"],
        ["mount", "--bind", str(root), f"{top}{root}"],
        ["mount", "--bind", f"{root}/slurm", f"{top}/etc/slurm"],
        ["mount", "--bind", str(cache), f"{top}{cache}"],
        ["mount", "-o", "remount,bind,ro", f"{top}{cache}"],
        ["pivot_root", top, f"{top}/old"],
        ["umount", "-l", "/old"],
    ]
