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
from pman.drivers.local import LocalDriver
from pman.jobs import Verdict
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
    expected = Renderer().render(spec, "sbatch", "bare").text
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


def test_a_rule_of_site_file_chooses_the_template_and_the_option_goes_before_it(
    pman: Pman, job: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "site.yaml").write_text("rules: [{match: {type: ds}, template: podman}]\n")
    monkeypatch.setenv("SITE_FILE", str(tmp_path / "site.yaml"))
    assert "podman run" in pman("render", str(job), "--env", "slurm").stdout
    done = pman("render", str(job), "--env", "slurm", "--template", "bare")
    assert "podman" not in done.stdout


def test_render_test_only_adds_the_verdict_on_stderr(pman: Pman, job: Path) -> None:
    done = pman("render", str(job), "--test-only")
    assert done.exit_code == 0
    assert done.stdout.startswith("#!/bin/bash\n")
    assert done.stderr == "accepted: this machine has no queue: it would start at once\n"


def test_render_test_only_ends_with_1_when_the_scheduler_says_no(pman: Pman) -> None:
    done = pman("render", "-", "--test-only", stdin=json.dumps(job_body(number_of_workers=2)))
    assert done.exit_code == 1
    assert done.stdout.startswith("#!/bin/bash\n")
    assert done.stderr == "refused: local runs one worker, and the job asks for 2\n"


def test_render_test_only_shows_warnings_and_no_control_character(
    pman: Pman, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Verdict(accepted=True, message="yes\x1b[2J", warnings=("it\rwaits", "for ever"))
    monkeypatch.setattr(LocalDriver, "test", lambda _, jobs: {job.name: said for job in jobs})
    done = pman("render", str(job), "--test-only")
    assert done.exit_code == 0
    assert done.stderr == ("accepted: yes\\x1b[2J\nwarning: it\\rwaits\nwarning: for ever\n")


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
        ("TEMPLATES_DIR", "/nowhere", "TEMPLATES_DIR /nowhere: it is not a folder"),
        ("SITE_FILE", "/nowhere", "pman: /nowhere: it can't be read"),
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


def test_an_interrupt_while_pman_starts_ends_it_quietly(tmp_path: Path) -> None:
    """One of the modules that it imports sends it, so it comes in the middle of the imports."""
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-c", "from pman.__main__ import main; main()"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_without_a_command_the_help_is_shown(pman: Pman) -> None:
    done = pman()
    assert "serve" in done.output
    assert "render" in done.output
