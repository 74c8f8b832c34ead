"""Container images as plain folders, for engines that run a root folder as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.lab import debian
from tests.lab.cache import built
from tests.lab.errors import LabError

PACKAGES = ("python3", "python3-numpy", "python3-pil", "python3-pydicom")
FROM_PYPI = ("chris_plugin",)  # pure Python

# Mount points and files that engines without an overlay can't make in a read-only image.
MOUNT_POINTS = ("share/incoming", "share/outgoing")
EMPTY_FILES = ("etc/hosts", "etc/resolv.conf", "etc/localtime")


def python_image() -> Path:
    """An image with Python 3, numpy, Pillow, pydicom and chris_plugin; the first use builds it.

    For `apptainer exec FOLDER COMMAND` and `ch-run FOLDER -- COMMAND`, for any user.
    """
    recipe = (debian.codename(), *PACKAGES, *FROM_PYPI, *MOUNT_POINTS, *EMPTY_FILES)
    return built("python", recipe, _build)


def _build(target: Path) -> None:
    # Not the smaller `extract`: without the packages' scripts there is no sh and no libblas.so.3.
    debian.bootstrap(debian.codename(), "essential", PACKAGES, target)
    for name in MOUNT_POINTS:
        (target / name).mkdir(parents=True, exist_ok=True)
    for name in EMPTY_FILES:
        if not (target / name).exists():
            (target / name).write_text("")
    interpreter = (target / "usr/bin/python3").readlink().name  # such as python3.11
    version = interpreter.removeprefix("python")
    packages = target / "usr/lib/python3/dist-packages"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-input"),
            *("--root-user-action=ignore", "--only-binary=:all:", f"--python-version={version}"),
            *("--target", str(packages), *FROM_PYPI),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise LabError(f"pip install {' '.join(FROM_PYPI)}: {done.stderr[-3000:]}")
