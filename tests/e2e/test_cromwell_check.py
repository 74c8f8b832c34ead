"""`pman check` as an operator runs it, with an emulated Cromwell before a real Slurm."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cromwell_site import CromwellSite
from tests.e2e.site import Site
from tests.e2e.test_check import Report, start
from tests.e2e.test_verdicts import updated
from tests.lab.cromwell import CromwellLab
from tests.lab.cromwell_config import EXAMPLE
from tests.waiting import wait_for

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def cromwell_site(newest_site: Site) -> Iterator[CromwellSite]:
    with CromwellLab(newest_site.lab, visible_after=2, poll_rate=0.2) as cromwell:
        yield CromwellSite(newest_site.lab, cromwell)


@pytest.fixture
def config(cromwell_site: CromwellSite) -> Path:
    """The example configuration, where the login node can read it."""
    file = cromwell_site.folder("etc") / "cromwell.conf"
    file.write_text(EXAMPLE.read_text())
    file.chmod(0o644)
    return file


def check(site: CromwellSite, folder: Path, *args: str, **settings: Any) -> Report:
    process, _ = start(site, folder, *args, "--json", JOBS_DIR="", **settings)
    out, err = process.communicate(timeout=240)
    assert err == ""
    assert site.slurm_ids() == []
    assert not list(site.lab.storebase.glob(".pman-check-*"))
    return Report(process.returncode, json.loads(out))


def test_a_site_that_is_well(cromwell_site: CromwellSite, config: Path, tmp_path: Path) -> None:
    report = check(cromwell_site, tmp_path, "--deep", CROMWELL_CONFIG=str(config))
    assert (report.code, report.worse_than_ok()) == (0, [])
    assert "Cromwell's parser takes it" in report.about("verdict")[0]["text"]
    assert "ran on " in report.about("pman-check")[0]["text"]
    assert any("can be written on" in finding["text"] for finding in report.about("STOREBASE"))
    assert report.about("scratch folder")
    # Its own test job is the newest one now.
    again = check(cromwell_site, tmp_path, CROMWELL_CONFIG=str(config))
    assert "can be read" in again.about("CROMWELL_PATHS", "ok")[0]["text"]


def test_a_test_job_that_waits_is_gone_after_an_interrupt(
    cromwell_site: CromwellSite, tmp_path: Path
) -> None:
    with updated(cromwell_site.lab, "partitionname=debug", "state=down", "state=up"):
        process, _ = start(cromwell_site, tmp_path, "--deep", "--json", JOBS_DIR="")
        wait_for(cromwell_site.slurm_ids, 60, "the test job in Slurm's queue", every=0.2)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
        assert cromwell_site.slurm_ids() == []
    assert process.returncode == 130
    (finding,) = Report(130, json.loads(out)).about("pman-check")
    assert finding["text"].startswith("stopped: ")


def test_cromwell_is_away(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    report = check(cromwell_site, tmp_path, "--deep", CROMWELL_URL="http://127.0.0.1:1")
    assert report.code == 1
    assert report.only("error")["subject"] == "Cromwell"
    assert "not run: there are errors" in report.about("test jobs")[0]["text"]
    assert report.about("login node", "ok")
