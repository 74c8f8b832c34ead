"""Rendering in a process of its own: what it may not do, and what is left when it is stopped."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pman.errors import Refusal, SiteError, TemplateError, WorkerLost
from pman.sources import Sources
from pman.worker import CPU_SECONDS, Worker
from tests.test_rendering import PLAIN
from tests.waiting import wait_for

SBATCH = "sbatch"

ENDLESS = (
    "{% set n = 9999 %}{% set a = [[[0] * n] * n] * n %}{% set b = [[[0] * n] * n] * n %}"
    "{{ a == b }}"
)
"""One operation of Python's own, which no signal's handler interrupts."""


def worker(**templates: str) -> Worker:
    return Worker(Sources({f"sbatch/{name}.sbatch.j2": text for name, text in templates.items()}))


@pytest.fixture
def shipped() -> Iterator[Worker]:
    with worker() as started:
        yield started


def children() -> set[int]:
    """The processes of this one's that run or wait to be fetched."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "\n{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "sbatch/mine.sbatch.j2, line 2: it takes more than 2 s: does it loop for ever",
        ),
        (
            "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
            "{{ m(99) }}",
            "mine.sbatch.j2, line 1: it takes more than 2 s",
        ),
        (ENDLESS, "it was stopped: it takes more than 2 s"),
        ("\n{{ 'x' * 10 ** 10 }}", "mine.sbatch.j2, line 2: it needs too much memory"),
        ("{{ (0,) * 10 ** 10 }}", "mine.sbatch.j2, line 1: it needs too much memory"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x * 2 %}"
            "{% endfor %}",
            "mine.sbatch.j2, line 1: it needs too much memory",
        ),
        ("{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "is longer than 4194304 bytes"),
    ],
)
def test_what_has_no_bound_is_stopped_and_the_next_job_is_rendered(text: str, words: str) -> None:
    with worker(mine=text) as started:
        with pytest.raises(TemplateError) as caught:
            started.render(PLAIN, SBATCH, "mine")
        assert words in str(caught.value)
        assert started.render(PLAIN, SBATCH, "bare").text.startswith("#!/bin/bash\n")


def test_a_worker_that_somebody_kills_is_started_again(shipped: Worker) -> None:
    pid = shipped._process.pid
    os.kill(pid, 9)
    wait_for(lambda: shipped._process.poll() is not None, 30, "the worker's end")
    assert shipped.render(PLAIN, SBATCH, "bare").template == "bare"
    assert shipped._process.pid != pid


def test_no_process_is_left() -> None:
    before = children()
    with worker(mine=ENDLESS) as started:
        with pytest.raises(TemplateError):
            started.render(PLAIN, SBATCH, "mine")
        started.render(PLAIN, SBATCH, "bare")
    with pytest.raises(SiteError):
        Worker(Sources(site="- a"))
    assert children() == before


def killing(patch: pytest.MonkeyPatch, times: int) -> None:
    """Kill so many processes just as they are to answer, as the kernel does when memory is short:
    that is not the template's doing."""
    real = Worker._living
    left = iter(range(times))

    def living(self: Worker) -> subprocess.Popen[bytes]:
        process = real(self)
        if next(left, None) is not None:
            process.kill()
        return process

    patch.setattr(Worker, "_living", living)


def test_a_job_whose_worker_is_killed_has_its_document_from_the_next_one(
    shipped: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shipped._process.pid
    killing(monkeypatch, 1)
    assert shipped.render(PLAIN, SBATCH, "bare").template == "bare"
    assert shipped._process.pid != before


def test_a_job_whose_worker_is_killed_twice_may_be_sent_again(
    shipped: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    killing(monkeypatch, 2)
    with pytest.raises(WorkerLost, match=r"ended from outside .exit code -9.; try again"):
        shipped.render(PLAIN, SBATCH, "bare")
    assert shipped.render(PLAIN, SBATCH, "bare").template == "bare"


def test_a_worker_that_does_not_answer_is_stopped(
    shipped: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.kill(shipped._process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr("pman.worker._ANSWER_SECONDS", 0.2)
        with pytest.raises(TemplateError, match=r"it was stopped: no answer within 0.2 s"):
            shipped.render(PLAIN, SBATCH, "bare")
    assert shipped.render(PLAIN, SBATCH, "bare").template == "bare"


def test_the_bound_is_for_each_document_not_for_all_of_them() -> None:
    busy = "{% for i in range(9999) %}{% for j in range(300) %}{% endfor %}{% endfor %}"
    with worker(mine=busy) as started:
        pid = started._process.pid
        while cpu_seconds(pid) < 3 * CPU_SECONDS:
            started.render(PLAIN, SBATCH, "mine")
        assert started._process.pid == pid


def cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_signals_for_the_server_do_not_end_its_worker(shipped: Worker) -> None:
    """systemd sends SIGTERM to all of a service, and a terminal Ctrl-C to both."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(shipped._process.pid, number)
    pid = shipped._process.pid
    assert shipped.render(PLAIN, SBATCH, "bare").template == "bare"
    assert shipped._process.pid == pid


def test_constants_are_quoted_for_each_document_anew() -> None:
    """Jinja would compute them once, when it compiles the template."""
    with worker(mine="echo {{ 'a b' }} {{ 10 * 2 }} {{ ['c d'] }}") as started:
        for _ in range(3):
            assert started.render(PLAIN, SBATCH, "mine").text == "echo 'a b' 20 'c d'"


@pytest.mark.parametrize("limit", ["-t 3600", "-v 900000"])
def test_limits_of_a_login_node_are_kept(limit: str, tmp_path: Path) -> None:
    code = (
        "from pman.worker import CPU_SECONDS, Worker; from pman.sources import Sources\n"
        "with Worker(Sources()) as worker: print(worker.samples.__name__)"
    )
    done = subprocess.run(
        ["bash", "-c", f'ulimit {limit} && exec "$0" -c "$1"', sys.executable, code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("samples\n", "")


def test_a_site_file_that_takes_too_long_to_read_is_told_by_its_name() -> None:
    site = "schema: {properties: {a: {pattern: '(a+)+$'}}}\na: " + "a" * 40 + "b\n"
    with pytest.raises(SiteError, match=r"^site.yaml.*takes more than 2 s"):
        Worker(Sources(site=site, site_file="site.yaml"))


def test_a_worker_ends_with_its_server(shipped: Worker) -> None:
    assert shipped._process.stdin
    shipped._process.stdin.close()
    assert shipped._process.wait(30) == 0


def test_the_environment_of_the_server_is_not_the_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    with worker() as started:
        environment = Path(f"/proc/{started._process.pid}/environ").read_bytes()
    assert b"secret" not in environment
    assert b"PATH=" in environment


def test_errors_come_through_as_they_are() -> None:
    with worker(mine="\n{{ nope }}", no="{{ fail('not here') }}", bad="{% if %}") as started:
        with pytest.raises(TemplateError) as caught:
            started.render(PLAIN, SBATCH, "mine")
        error = caught.value
        assert (error.reason, error.file, error.line, error.text) == (
            "'nope' is undefined",
            "sbatch/mine.sbatch.j2",
            2,
            "{{ nope }}",
        )
        with pytest.raises(Refusal, match=r"^not here$"):
            started.render(PLAIN, SBATCH, "no")
        with pytest.raises(TemplateError, match=r"bad.sbatch.j2, line 1"):
            started.compile(SBATCH)


def test_all_that_is_wrong_in_site_file_comes_through() -> None:
    with pytest.raises(SiteError) as caught:
        Worker(Sources(site="partition: 5\nqos: 6\n", site_file="site.yaml"))
    assert [(one.file, one.line) for one in caught.value.problems] == [
        ("site.yaml", 1),
        ("site.yaml", 2),
    ]
    assert len(str(caught.value).splitlines()) == 2


def test_warnings_of_site_file_come_through() -> None:
    with Worker(Sources(site="partiton: cpu\n", site_file="site.yaml")) as started:
        (warning,) = started.warnings
    assert "site.yaml, line 1: 'partiton'" in warning


def test_the_chosen_template_goes_before_the_rules_and_they_before_the_default() -> None:
    site = "rules:\n- {match: {gpu: true}, template: apptainer}\n"
    with Worker(Sources(site=site)) as started:
        gpu = replace(PLAIN, gpu_limit=1)
        assert started.render(PLAIN, SBATCH, "bare").template == "bare"
        assert started.render(gpu, SBATCH, "bare").template == "apptainer"
        assert started.render(gpu, SBATCH, "bare", "podman").template == "podman"


def test_a_document_is_checked_when_that_is_asked_for() -> None:
    with worker(mine="#!/bin/bash\nif\n") as started:
        assert started.render(PLAIN, SBATCH, "mine").text == "#!/bin/bash\nif\n"
        words = r"^sbatch/mine.sbatch.j2: syntax error.* .line 3 of the document"
        with pytest.raises(TemplateError, match=words):
            started.render(PLAIN, SBATCH, "mine", check=True)
    with worker(mine="#!/bin/bash\necho )\n") as started:
        with pytest.raises(TemplateError) as caught:
            started.render(PLAIN, SBATCH, "mine", check=True)
        assert caught.value.text == "echo )"


def test_samples_are_of_each_kind_and_of_each_rule() -> None:
    site = (
        "images: {'docker.io/a/*': /a.sif}\n"
        "rules:\n"
        "- {match: {image: '*/big:*', gpu: true}, set: {partition: gpu}}\n"
        "- {match: {auid: 'dr-*', type: fs}, template: bare}\n"
    )
    with Worker(Sources(site=site)) as started:
        found = {sample.what: sample for sample in started.samples(PLAIN)}
    assert [what for what, sample in found.items() if sample.plain] == ["a plain job"]
    assert found["a plain job"].spec.image == "docker.io/a/x"
    assert found["a job with 4 GPUs"].spec.gpu_limit == 4
    assert found["a job with 8 workers"].spec.number_of_workers == 8
    assert found["a job with no argument"].spec.argv == ("simpledsapp",)
    first = found["a job that fits rule 1 of SITE_FILE (line 3)"].spec
    assert (first.image, first.gpu_limit) == ("x/big:x", 1)
    second = found["a job that fits rule 2 of SITE_FILE (line 4) with hostile values"].spec
    assert second.type == "fs"
    assert "two\nlines" in second.argv
