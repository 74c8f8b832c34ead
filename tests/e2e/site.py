"""A Slurm site for tests: the lab's cluster, its shared disk, and pman's settings for it."""

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.server import Server
from tests.lab.slurm import SlurmLab


class Site:
    """One cluster; every server on it has a STATE_DIR and folders of its own."""

    def __init__(self, lab: SlurmLab) -> None:
        self.lab = lab

    def folder(self, name: str) -> Path:
        """A folder of the store base that belongs to the account that submits."""
        path = self.lab.storebase / name
        path.mkdir(parents=True, exist_ok=True)
        owner = self.lab.storebase.stat()
        for part in (path, *path.parents):
            if part == self.lab.storebase:
                break
            os.chown(part, owner.st_uid, owner.st_gid)
        return path

    def settings(
        self, tmp_path: Path, site: Mapping[str, Any] | None = None, **settings: str
    ) -> dict[str, str]:
        self.folder("in")
        self.folder("out")
        site_file = tmp_path / "site.yaml"
        site_file.write_text(yaml.safe_dump(dict(site or {})))
        return {
            **self.lab.settings,
            "STATE_DIR": str(tmp_path / "state"),
            "JOBS_DIR": str(self.lab.storebase / ".pman" / uuid.uuid4().hex[:6]),
            "SITE_FILE": str(site_file),
            "TEMPLATE": "bare",
            "POLL_INTERVAL": "0.3",
            **settings,
        }

    @contextmanager
    def server(
        self, tmp_path: Path, site: Mapping[str, Any] | None = None, **settings: str
    ) -> Iterator[Server]:
        """A running server on this site."""
        with Server(self.settings(tmp_path, site, **settings), tmp_path / "pman.log") as server:
            yield server

    def jobs_dir(self, server: Server) -> Path:
        return Path(server.settings["JOBS_DIR"])
