"""A CT slice through the real server, sshd, Slurm and Apptainer."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from pman.demo import ctslice
from tests.e2e.server import job, shell
from tests.e2e.site import Site
from tests.lab.images import python_image

pytestmark = pytest.mark.lab

OPTIONS = ("--window-center=300", "--window-width=1500")


@pytest.fixture
def expected(tmp_path: Path) -> Path:
    """The output folder of the same plugin, run by this machine's own Python and libraries."""
    source, target = tmp_path / "expected-in", tmp_path / "expected"
    source.mkdir()
    shutil.copy(str(get_testdata_file("CT_small.dcm", download=False)), source)
    subprocess.run(
        [sys.executable, "-m", "pman.demo.ctslice", *OPTIONS, source, target], check=True
    )
    return target


def assert_same(found: Path, expected: Path) -> None:
    with Image.open(found / "CT_small.png") as one, Image.open(expected / "CT_small.png") as two:
        assert (np.asarray(one) == np.asarray(two)).all()
        assert (one.mode, one.size) == ("L", (128, 128))
    name = "CT_small.json"
    assert (found / name).read_text() == (expected / name).read_text()


def in_apptainer() -> dict[str, dict[str, str]]:
    return {"images": {"localhost/*": str(python_image())}}


def test_a_slice_through_slurm_and_apptainer(
    newest_site: Site, tmp_path: Path, expected: Path
) -> None:
    incoming, outgoing = newest_site.folder("ct-in"), newest_site.folder("ct-out")
    shutil.copy(str(get_testdata_file("CT_small.dcm", download=False)), incoming)
    shutil.copy(ctslice.__file__, incoming)
    with newest_site.server(tmp_path, in_apptainer(), TEMPLATE="apptainer") as server:
        server.post(
            job(
                "ct-slice",
                "python3",
                *OPTIONS,
                entrypoint=["python3", "/share/incoming/ctslice.py"],
                input_dir=incoming.name,
                output_dir=outgoing.name,
                memory_limit=500,
            )
        )
        ended = server.wait_end("ct-slice")
        assert (ended["status"], ended["message"]) == ("finishedSuccessfully", "finished"), ended
    assert_same(outgoing, expected)
    owners = {path.stat().st_uid for path in outgoing.iterdir()}
    assert owners == {newest_site.lab.storebase.stat().st_uid}


def test_the_input_is_read_only_in_the_container(newest_site: Site, tmp_path: Path) -> None:
    incoming = newest_site.folder("read-only")
    with newest_site.server(tmp_path, in_apptainer(), TEMPLATE="apptainer") as server:
        server.post(shell("writer", "touch /share/incoming/mark", input_dir=incoming.name))
        ended = server.wait_end("writer")
        assert (ended["status"], ended["message"]) == ("finishedWithError", "exit code 1")
        assert "Read-only file system" in server.get("writer")["logs"]
        server.post(shell("other-writer", "touch /share/outgoing/mark"))
        assert server.wait_end("other-writer")["status"] == "finishedSuccessfully"
    assert list(incoming.iterdir()) == []


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a path short enough for a lab's sockets, which pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize("cluster", ["named", "its own"])
def test_the_demo_on_slurm(
    newest_site: Site, tmp_path: Path, temporary: Path, expected: Path, cluster: str
) -> None:
    settings: Mapping[str, str] = {}
    if cluster == "named":
        site_file = tmp_path / "site.yaml"
        site_file.write_text("images: {'*': /nowhere}\n")
        settings = newest_site.lab.settings | {"SITE_FILE": str(site_file)}
    output = tmp_path / "pictures"
    done = subprocess.run(
        [sys.executable, "-m", "pman", "demo", "--slurm", "--output", str(output)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "TMPDIR": str(temporary), **settings},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert " apptainer exec " in done.stdout
    assert "succeeded" in done.stdout
    assert_same(output, expected)
    assert list(temporary.iterdir()) == []
    assert list(newest_site.lab.storebase.glob("pman-demo-*")) == []
    assert newest_site.lab.run("squeue", "--noheader", "--states=running").stdout == ""
