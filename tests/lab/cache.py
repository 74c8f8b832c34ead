"""What is slow to build and is kept between runs: root folders and container images.

`$XDG_CACHE_HOME/pman-lab`, else /var/cache/pman-lab and not ~/.cache: root's home is closed to
the ordinary user whose jobs read from here. Deleting the folder is safe when no lab is running.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path


def cache_folder() -> Path:
    """The folder, made if need be."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "/var/cache") / "pman-lab"
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    return folder


def built(name: str, recipe: Sequence[str], build: Callable[[Path], None]) -> Path:
    """The folder that `build` made from `recipe`, now or in an earlier run.

    A changed recipe is another folder. One process builds, the others wait; a build that fails
    or is killed leaves nothing that could be taken for a whole one.
    """
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:8]
    ready = cache_folder() / f"{name}-{digest}"
    if ready.is_dir():
        return ready
    with ready.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.is_dir():
            partial = ready.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            build(partial)
            partial.rename(ready)
    return ready
