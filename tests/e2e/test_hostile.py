"""Arguments and environment values arrive byte for byte in the plugin."""

import os
from pathlib import Path

import pytest

from tests.e2e.server import job
from tests.e2e.site import Site
from tests.hostile import HOSTILE
from tests.lab.images import python_image

pytestmark = pytest.mark.lab

DUMP = """
import os, sys
*words, folder = map(os.fsencode, sys.argv[1:])
values = [v for k, v in sorted(os.environb.items()) if k.startswith(b"HOSTILE_")]
open(folder + b"/words", "wb").write(b"\\0".join(words))
open(folder + b"/values", "wb").write(b"\\0".join(values))
"""


def arrive(site: Site, tmp_path: Path, template: str) -> None:
    folder = site.folder(f"hostile/{template} 'a b', c")
    env = [f"HOSTILE_{number:03}={value}" for number, value in enumerate(HOSTILE)]
    body = job(
        "hostile",
        *("python3", "-c", DUMP, *HOSTILE),
        type="fs",
        env=env,
        input_dir=str(folder.relative_to(site.lab.storebase)),
        output_dir=str(folder.relative_to(site.lab.storebase)),
    )
    images = {"images": {"*": str(python_image())}}
    with site.server(tmp_path, images, TEMPLATE=template, ENABLE_HOME_WORKAROUND="yes") as server:
        server.post(body)
        ended = server.wait_end("hostile", timeout=120)
        assert ended["status"] == "finishedSuccessfully", ended
    wanted = [os.fsencode(value) for value in HOSTILE]
    assert (folder / "words").read_bytes().split(b"\0") == wanted
    assert (folder / "values").read_bytes().split(b"\0") == wanted


@pytest.mark.parametrize("template", ["bare", "charliecloud"])
def test_byte_for_byte(plain_site: Site, tmp_path: Path, template: str) -> None:
    arrive(plain_site, tmp_path, template)


def test_byte_for_byte_through_apptainer(newest_site: Site, tmp_path: Path) -> None:
    arrive(newest_site, tmp_path, "apptainer")


def test_home_workaround_and_read_only_input(newest_site: Site, tmp_path: Path) -> None:
    images = {"images": {"*": str(python_image())}}
    program = "echo home=$HOME; touch $0/x || echo read-only; env | grep -c ^SLURM_; touch $1/y"
    with newest_site.server(
        tmp_path, images, TEMPLATE="apptainer", ENABLE_HOME_WORKAROUND="yes"
    ) as server:
        server.post(job("home", "sh", "-c", program, env=["A=b"]))
        ended = server.wait_end("home")
        assert ended["status"] == "finishedSuccessfully", ended
        assert "home=/tmp\n" in ended["logs"]
        assert "read-only\n0\n" in ended["logs"]
    assert (newest_site.folder("out") / "y").exists()


def test_nul_is_refused_and_nothing_is_stored(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path) as server:
        for fields in ({"args": ["a\0b"]}, {"env": ["A=a\0b"]}, {"input_dir": "a\0b"}):
            status, answer = server.call("POST", "/api/v1/", job("nul", "true") | fields)
            assert status == 400
            (field,) = answer["message"]
            assert "NUL" in answer["message"][field]
        assert server.call("GET", "/api/v1/nul/")[0] == 404
