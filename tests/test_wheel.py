"""The wheel that a site installs carries the templates."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import job_body

ROOT = Path(__file__).parent.parent


def test_the_wheel_renders_without_the_checkout(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    (wheel,) = tmp_path.glob("pman-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    shipped = {f"pman/{path.relative_to(ROOT)}" for path in (ROOT / "templates").glob("*/*")}
    assert len(shipped) > 10
    assert shipped <= set(names)
    assert not [name for name in names if name.startswith(("tests", "docs"))]
    (tmp_path / "job.json").write_text(json.dumps(job_body()))
    done = subprocess.run(
        [sys.executable, "-m", "pman", "render", "job.json", "--env", "slurm"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": "site", "STOREBASE": "/data"},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH")
