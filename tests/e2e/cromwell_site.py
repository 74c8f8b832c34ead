"""A Slurm site whose jobs go through an emulated Cromwell on the lab's login node."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.e2e.site import Site
from tests.lab.cromwell import CromwellLab
from tests.lab.images import python_image
from tests.lab.slurm import SlurmLab


class CromwellSite(Site):
    def __init__(self, lab: SlurmLab, cromwell: CromwellLab) -> None:
        super().__init__(lab)
        self.cromwell = cromwell

    def settings(
        self, tmp_path: Path, site: Mapping[str, Any] | None = None, **settings: str
    ) -> dict[str, str]:
        return super().settings(
            tmp_path,
            {"images": {"*": str(python_image())}, **(site or {})},
            **{
                "CONTAINER_ENV": "cromwell",
                "CROMWELL_URL": self.cromwell.url,
                "TIMELIMIT_MINUTES": "60",
                "TEMPLATE": "chris",
                **settings,
            },
        )

    def slurm_ids(self) -> list[str]:
        """The Slurm jobs that have not ended."""
        return self.lab.run("squeue", "--noheader", "--format=%i").stdout.split()


def without_ssh(settings: Mapping[str, str]) -> dict[str, str]:
    """pman can't ask Slurm, and reads files on this machine."""
    return {name: value for name, value in settings.items() if not name.startswith("SSH_")}
