"""Clusters for the tests of this folder, each started once."""

import os
from collections.abc import Iterator

import pytest

from tests import lab as the_lab
from tests.e2e.site import Site
from tests.lab.slurm import SlurmLab


def need_lab() -> None:
    """Skip where the lab can't run, and say why; in CI that is a failure."""
    reason = the_lab.problem()
    if reason and os.environ.get("CI"):
        pytest.fail(f"in CI the lab must run: {reason}")
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def plain_site() -> Iterator[Site]:
    """A site without accounting."""
    need_lab()
    with SlurmLab() as lab:
        yield Site(lab)


@pytest.fixture(scope="session")
def forgetful_site() -> Iterator[Site]:
    """A site without accounting that forgets ended jobs within seconds."""
    need_lab()
    with SlurmLab(min_job_age=5) as lab:
        yield Site(lab)


@pytest.fixture(scope="session")
def accounting_site() -> Iterator[Site]:
    """A site with slurmdbd that forgets ended jobs within seconds."""
    need_lab()
    with SlurmLab(accounting=True, min_job_age=3) as lab:
        yield Site(lab)


@pytest.fixture(scope="session")
def memory_site() -> Iterator[Site]:
    """A site that kills jobs over their memory, by cgroups."""
    need_lab()
    with SlurmLab(cgroup=True) as lab:
        yield Site(lab)


@pytest.fixture(scope="session")
def newest_site() -> Iterator[Site]:
    """The newest Slurm, and the real Apptainer."""
    need_lab()
    with SlurmLab(release="sid") as lab:
        yield Site(lab)
