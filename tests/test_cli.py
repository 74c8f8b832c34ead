"""The command line: what goes to stdout, what to stderr, and the exit code."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pman import request
from pman.cli import app
from pman.gateway import render as render_document
from pman.rendering import Renderer
from pman.settings import Settings
from tests.conftest import job_body

Pman = Callable[..., Result]


@pytest.fixture
def pman(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Pman:
    """Runs the command line with the settings of a local server in the environment."""
    for name, value in values.items():
        monkeypatch.setenv(name.upper(), str(value))

    def invoke(*args: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, args, input=stdin)

    return invoke


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job_body(args=["é ☃", "it's"])))
    return path


def without_name(document: str) -> str:
    return re.sub(r"chris-jid-1\.[0-9a-f]{8}", "NAME", document)


@pytest.mark.parametrize("through_stdin", [True, False])
def test_render_prints_the_document_and_nothing_else(
    pman: Pman, job: Path, settings: Settings, through_stdin: bool
) -> None:
    done = pman("render", "-", stdin=job.read_text()) if through_stdin else pman("render", str(job))
    assert (done.exit_code, done.stderr) == (0, "")
    spec = request.parse(job.read_bytes()).spec(settings)
    expected = render_document(settings, Renderer(), spec).text
    assert without_name(done.stdout) == without_name(expected)
    assert "'é ☃'" in done.stdout


def test_render_writes_utf_8_whatever_the_locale(pman: Pman, job: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pman", "render", str(job)],
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=True,
    )
    assert "'é ☃'".encode() in done.stdout
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--env", "slurm"], "apptainer exec"),
        (["--env", "slurm", "--template", "podman"], "podman run"),
        (["--template", "bare"], 'exec "${launcher[@]}" true'),
    ],
)
def test_render_takes_the_engine_and_the_template(
    pman: Pman, job: Path, options: list[str], words: str
) -> None:
    done = pman("render", str(job), *options)
    assert done.exit_code == 0
    assert words in done.stdout


def test_render_stores_and_starts_nothing(pman: Pman, job: Path, settings: Settings) -> None:
    assert pman("render", str(job)).exit_code == 0
    assert not settings.state_dir.exists()
    assert not settings.jobs_folder.exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{", "no valid JSON"),
        ("[]", "must be a JSON object"),
        (json.dumps(job_body(cpu_limit="1000m")), "  cpu_limit: '1000m' is no whole number"),
        (json.dumps(job_body(jid=..., image="")), "  jid: is required\n  image: '' is no image"),
        (json.dumps(job_body(entrypoint=[])), 'pman: "entrypoint" cannot be empty'),
        (json.dumps(job_body(input_dir=".pman")), "meets JOBS_DIR"),
        (b"\xff\xfe", "no valid JSON"),
    ],
)
def test_a_broken_job_is_told_on_stderr(pman: Pman, body: str | bytes, words: str) -> None:
    done = pman("render", "-", stdin=body)
    assert (done.exit_code, done.stdout) == (1, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--template", "nope"], "there is no sbatch template 'nope"),
        (["--template", "base"], "no block `run`"),
        (["--env", "slurm", "--template", "charliecloud"], "`images` in SITE_FILE"),
        (["--env", "docker"], "set CONTAINER_ENV=slurm"),
        (["--env", "nope"], "CONTAINER_ENV has the value 'nope'"),
    ],
)
def test_what_cannot_be_rendered_is_told_on_stderr(
    pman: Pman, job: Path, options: list[str], words: str
) -> None:
    done = pman("render", str(job), *options)
    assert (done.exit_code, done.stdout) == (1, "")
    assert words in done.stderr


@pytest.mark.parametrize("path", ["/nowhere/job.json", "/"])
def test_a_job_that_cannot_be_read_is_told(pman: Pman, path: str) -> None:
    done = pman("render", path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch(f"pman: {path} can't be read: .+\n", done.stderr)


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("STOREBASE", "", "STOREBASE is not set"),
        ("STOREBASE", "relative", "give an absolute path"),
        ("CONTAINER_ENV", "kubernetes", "set CONTAINER_ENV=slurm"),
        ("TEMPLATE", "nope", "no sbatch template 'nope"),
        ("CONTAINER_USER", "1:1", "CONTAINER_USER is set, and this template's runtime"),
        ("TEMPLATES_DIR", "/nowhere", "TEMPLATES_DIR /nowhere is not a folder"),
        ("SITE_FILE", "/nowhere", "SITE_FILE /nowhere can't be read"),
        ("STATE_DIR", "/dev/null", "STATE_DIR /dev/null can't be used"),
        ("POLL_INTERVAL", "0", "POLL_INTERVAL has the value '0'"),
        ("JOBS_DIR", "/", "JOBS_DIR / holds STOREBASE"),
    ],
)
def test_serve_does_not_start_with_settings_that_cannot_work(
    pman: Pman, monkeypatch: pytest.MonkeyPatch, variable: str, text: str, words: str
) -> None:
    monkeypatch.setenv(variable, text)
    done = pman("serve", "--port", "0")
    assert done.exit_code == 1
    assert words in done.stderr
    assert done.stdout == ""


def test_serve_tells_that_the_port_is_in_use(pman: Pman) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = pman("serve", "--port", str(port))
    assert done.exit_code == 1
    assert f"can't listen on 127.0.0.1:{port}: " in done.stderr
    assert "in use" in done.stderr


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_serve_tells_that_a_port_is_none(pman: Pman, port: str) -> None:
    done = pman("serve", "--port", port)
    assert done.exit_code == 2
    assert "--port" in done.stderr


def test_without_a_command_the_help_is_shown(pman: Pman) -> None:
    done = pman()
    assert "serve" in done.output
    assert "render" in done.output
