"""An operator edits templates under a running server: no POST fails, and none is broken."""

import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import Server, job
from tests.e2e.site import Site
from tests.waiting import wait_for

EDITS = 200

GOOD = """\
{% extends "shipped/bare.sbatch.j2" %}
{% block directives %}
#SBATCH --comment=good-NUMBER
{% endblock %}
"""
BROKEN = [
    "#!/bin/bash\n#SBATCH --comment=broken\n{{ job.jid }\n",
    "#!/bin/bash\n#SBATCH --comment=broken\n{{ job.nope }}\n",
    "#!/bin/bash\n#SBATCH --comment=broken\nif true\n",
    '#!/bin/bash\n#SBATCH --comment=broken\necho "{{ job.argv }}"\n',
    "#!/bin/bash\n#SBATCH --comment=broken\n{% if job.gpu_limit %}{{ site.nope }}{% endif %}\n",
    "#SBATCH --comment=broken\n",
    "",
    '{% extends "nowhere.sbatch.j2" %}',
]
"""Each would make a document if it were used, or an error."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "templates" / "sbatch"
    path.mkdir(parents=True)
    (path / "mine.sbatch.j2").write_text(GOOD.replace("NUMBER", "0"))
    return path


@pytest.fixture
def server(tmp_path: Path, folder: Path) -> Iterator[Server]:
    for name in ("in", "out"):
        (tmp_path / "store" / name).mkdir(parents=True)
    settings = {
        "CONTAINER_ENV": "local",
        "STOREBASE": str(tmp_path / "store"),
        "STATE_DIR": str(tmp_path / "state"),
        "TEMPLATES_DIR": str(folder.parent),
        "TEMPLATE": "mine",
        "POLL_INTERVAL": "0.5",
    }
    with Server(settings, tmp_path / "pman.log") as started:
        yield started


def health(server: Server) -> dict[str, Any]:
    status, answer = server.call("GET", "/health/")
    assert status == 200
    found: dict[str, Any] = answer["templates"]
    return found


def shown(server: Server, number: int) -> str:
    """The comment in the document that a job is shown or sent as."""
    # Most are dry runs: it is the rendering that is under load, not this machine.
    if number % 10:
        status, answer = server.call("POST", "/api/v1/?dry_run=true", job(f"j{number}", "true"))
        assert status == 200, answer
        document = answer["document"]
    else:
        server.post(job(f"j{number}", "true"))
        status, answer = server.call("GET", f"/jobs/j{number}/")
        document = answer["document"]["text"]
    (comment,) = re.findall(r"^#SBATCH --comment=(.*)$", document, re.M)
    return str(comment)


def test_edits_good_and_broken_under_load(server: Server, folder: Path) -> None:
    chance = random.Random(4)
    over = threading.Event()
    comments: list[str] = []
    failures: list[BaseException] = []

    def load() -> None:
        try:
            number = 0
            while not over.is_set() and number < 100_000:
                comments.append(shown(server, number))
                number += 1
        except BaseException as error:
            failures.append(error)

    poster = threading.Thread(target=load)
    poster.start()
    try:
        for number in range(1, EDITS + 1):
            broken = chance.random() < 0.5
            text = chance.choice(BROKEN) if broken else GOOD.replace("NUMBER", str(number))
            (folder / "mine.sbatch.j2").write_text(text)
            # From too quick to be seen to long enough to be used.
            time.sleep(chance.choice([0.0, 0.05, 0.2, 1.0]))
    finally:
        (folder / "mine.sbatch.j2").write_text(GOOD.replace("NUMBER", "last"))
        wait_for(lambda: "good-last" in comments[-1:] or failures, 60, "the last edit to be used")
        over.set()
        poster.join(60)
    assert failures == []
    assert {comment.partition("-")[0] for comment in comments} == {"good"}
    assert len(set(comments)) > 10, "hardly any of the good edits was ever in use"
    assert health(server)["problem"] is None


def test_a_broken_template_is_in_the_log_and_a_restart_survives_it(
    server: Server, folder: Path
) -> None:
    (folder / "mine.sbatch.j2").write_text("#!/bin/sh\n{{ job.jid }\n")
    wait_for(lambda: health(server)["problem"], 30, "the problem to be told")
    words = "sbatch/mine.sbatch.j2, line 2: unexpected '}': `{{ job.jid }`"
    assert words in server.log.read_text()
    server.stop(kill=True)
    server.start()
    assert health(server)["problem"]["message"] == words
    assert shown(server, 1) == "good-0"
    (folder / "mine.sbatch.j2").write_text(GOOD.replace("NUMBER", "1"))
    wait_for(lambda: shown(server, 1) == "good-1", 30, "the mended template to be used")
    assert health(server)["problem"] is None


@pytest.mark.lab
def test_a_rule_that_comes_while_pman_runs_sends_jobs_elsewhere(
    plain_site: Site, tmp_path: Path
) -> None:
    with plain_site.server(tmp_path, {"partition": "debug"}) as server:
        site = Path(server.settings["SITE_FILE"])
        server.post(job("before", "true"))
        server.wait_end("before")
        site.write_text("partition: [debug]\n")
        wait_for(lambda: health(server)["problem"], 30, "the problem to be told")
        site.write_text(
            "partition: debug\nrules: [{match: {auid: cube}, set: {partition: short}}]\n"
        )
        wait_for(lambda: not health(server)["problem"], 30, "the rule to be in use")
        server.post(job("after", "true"))
        assert server.wait_end("after")["status"] == "finishedSuccessfully"
        for jid, partition in (("before", "debug"), ("after", "short")):
            answer = server.call("GET", f"/jobs/{jid}/")[1]
            shown = plain_site.lab.run("scontrol", "show", "job", answer["engine_id"]).stdout
            assert f"Partition={partition}" in shown


@pytest.mark.lab
def test_the_verdict_of_slurm_over_the_api(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path, {"partition": "short"}) as server:
        path = "/api/v1/?dry_run=true&test_only=true"
        status, answer = server.call("POST", path, job("fits", "true"))
        assert status == 200
        assert answer["verdict"]["accepted"]
        assert answer["verdict"]["partition"] == "short"
        assert answer["verdict"]["start"]
        status, answer = server.call("POST", path, job("big", "true", cpu_limit=10**6))
        assert (status, answer["verdict"]["accepted"]) == (200, False)
        assert "node configuration is not available" in answer["verdict"]["message"]
        assert server.call("GET", "/jobs/")[1]["total"] == 0
    with plain_site.server(tmp_path, SSH_PORT="1") as server:
        status, answer = server.call("POST", path, job("away", "true"))
        assert status == 503
        assert "refuses connections" in answer["message"]
