"""Jobs through Cromwell, end to end: pman, an emulated Cromwell with the example configuration, and
a real Slurm with the real Apptainer."""

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pman.drivers.cromwell import METADATA
from tests.e2e.cromwell_site import CromwellSite, without_ssh
from tests.e2e.server import Server, job, shell
from tests.e2e.site import Site
from tests.e2e.test_endings import logged, memory_hog
from tests.e2e.test_hostile import DUMP
from tests.e2e.test_outages import all_ended, counting, ran_once
from tests.hostile import HOSTILE
from tests.lab import apptainer
from tests.lab.cromwell import CromwellLab, Fault
from tests.lab.cromwell_engine import Workflow
from tests.waiting import wait_for

pytestmark = pytest.mark.lab


@pytest.fixture(scope="session")
def cromwell_site(newest_site: Site) -> Iterator[CromwellSite]:
    """The newest Slurm with the real Apptainer, behind a Cromwell that keeps its database."""
    with CromwellLab(newest_site.lab, visible_after=2, poll_rate=0.2) as cromwell:
        yield CromwellSite(newest_site.lab, cromwell)


@pytest.fixture
def with_stand_in(request: pytest.FixtureRequest) -> Iterator[CromwellSite]:
    """A site of the machine's own Slurm, behind Cromwell, with a stand-in for Apptainer."""
    lab = request.getfixturevalue(request.param).lab
    apptainer.install(lab)
    with CromwellLab(lab, visible_after=1, poll_rate=0.2) as cromwell:
        yield CromwellSite(lab, cromwell)


def slurm_id(server: Server, jid: str) -> str:
    """The id of the Slurm job, as pman knows it."""

    def found() -> str:
        notes: dict[str, str] = server.call("GET", f"/jobs/{jid}/")[1]["notes"]
        return notes.get("slurm", "")

    return wait_for(found, 30, f"the Slurm id of {jid}", every=0.1)


def workflow(site: CromwellSite, server: Server, jid: str) -> Workflow:
    """As Cromwell has it."""
    found = site.cromwell.engine.visible(server.call("GET", f"/jobs/{jid}/")[1]["engine_id"])
    assert found is not None
    return found


def runs(site: CromwellSite, name: str) -> str:
    """A file in the output folder, as the container sees it, that runs leave lines in."""
    (site.folder("out") / name).unlink(missing_ok=True)
    return f"/share/outgoing/{name}"


def lines(site: CromwellSite, name: str) -> Path:
    return site.folder("out") / name


# --- what arrives in the plugin ---


def test_arguments_and_variables_arrive_byte_for_byte(
    cromwell_site: CromwellSite, tmp_path: Path
) -> None:
    folder = cromwell_site.folder("hostile/wdl")
    relative = str(folder.relative_to(cromwell_site.lab.storebase))
    body = job(
        "hostile",
        *("python3", "-c", DUMP, *HOSTILE),
        type="fs",
        env=[f"HOSTILE_{number:03}={value}" for number, value in enumerate(HOSTILE)],
        input_dir=relative,
        output_dir=relative,
    )
    with cromwell_site.server(tmp_path) as server:
        server.post(body)
        ended = server.wait_end("hostile", timeout=120)
        assert ended["status"] == "finishedSuccessfully", ended
    wanted = [os.fsencode(value) for value in HOSTILE]
    assert (folder / "words").read_bytes().split(b"\0") == wanted
    assert (folder / "values").read_bytes().split(b"\0") == wanted


def test_input_is_read_only_and_output_is_kept(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    (cromwell_site.folder("in") / "data").write_text("from pfcon\n")
    program = "cat $0/data > $1/copy; touch $0/new || echo read-only; env | grep -c ^SLURM_"
    with cromwell_site.server(tmp_path, ENABLE_HOME_WORKAROUND="yes") as server:
        server.post(shell("binds", f"{program}; echo home=$HOME"))
        ended = server.wait_end("binds")
    assert ended["status"] == "finishedSuccessfully", ended
    assert ended["logs"].startswith("read-only\n0\nhome=/tmp\n")
    assert (cromwell_site.folder("out") / "copy").read_text() == "from pfcon\n"


# --- ends ---


@pytest.mark.parametrize("ssh", [True, False], ids=["ssh", "no-ssh"])
@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("true", "finished"),
        ("exit 3", "exit code 3"),
        ("kill -9 $$", "killed by signal 9 (SIGKILL)"),
        ("kill -11 $$", "killed by signal 11 (SIGSEGV)"),
        ("no-such-program-at-all", "exit code 127: command not found"),
    ],
)
def test_the_plugins_own_end(
    cromwell_site: CromwellSite, tmp_path: Path, program: str, message: str, ssh: bool
) -> None:
    settings = cromwell_site.settings(tmp_path)
    with Server(settings if ssh else without_ssh(settings), tmp_path / "pman.log") as server:
        server.post(shell("own-end", f"echo said; echo cried >&2; {program}"))
        ended = server.wait_end("own-end")
        assert ended["message"] == message
        assert ended["status"] == f"finished{'Successfully' if program == 'true' else 'WithError'}"
        assert ended["timestamp"]
        assert ended["logs"].startswith("said\ncried\n")


def test_time_limit(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    with cromwell_site.server(tmp_path) as server:
        server.post(shell("late", "sleep 600"))
        server.wait_status("late", "started")
        number = slurm_id(server, "late")
        assert (
            "TimeLimit=01:00:00" in cromwell_site.lab.run("scontrol", "show", "job", number).stdout
        )
        cromwell_site.lab.run("scontrol", "update", f"jobid={number}", "EndTime=now")
        ended = server.wait_end("late")
        assert (ended["status"], ended["message"]) == (
            "finishedWithError",
            "time limit of 60 min",
        )


@pytest.mark.parametrize("with_stand_in", ["memory_site"], indirect=True)
@pytest.mark.parametrize(
    "program",
    [memory_hog(500), f"{memory_hog(500)}; exit 0", f"{memory_hog(500)} & wait; exit 1"],
    ids=["the plugin", "a part of it, and it goes on", "a child"],
)
def test_out_of_memory(with_stand_in: CromwellSite, tmp_path: Path, program: str) -> None:
    with with_stand_in.server(tmp_path) as server:
        server.post(shell("greedy", program, memory_limit=100))
        ended = server.wait_end("greedy")
        if "exit 0" in program:  # Cromwell goes by the exit code alone
            assert ended["status"] == "finishedSuccessfully"
        else:
            assert ended["status"] == "finishedWithError"
            assert ended["message"] == "out of memory (asked for 100 MiB)"


@pytest.mark.parametrize("with_stand_in", ["accounting_site"], indirect=True)
def test_what_slurm_has_forgotten_the_accounting_tells(
    with_stand_in: CromwellSite, tmp_path: Path
) -> None:
    """pman is away while a job reaches its time limit and leaves Slurm's memory."""
    lab = with_stand_in.lab
    with with_stand_in.server(tmp_path) as server:
        server.post(shell("late", "sleep 600"))
        server.wait_status("late", "started")
        number = slurm_id(server, "late")
        server.stop()
        lab.run("scontrol", "update", f"jobid={number}", "EndTime=now")
        wait_for(
            lambda: not lab.run("squeue", "-h", "-t", "all", "-j", f"{number},{number}").stdout,
            90,
            "Slurm to forget the job",
            every=0.5,
        )
        server.start()
        assert server.wait_end("late")["message"] == "time limit of 60 min"


def test_cancelled_on_the_cluster(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    """While it waits, when it never began, and while it runs."""
    with cromwell_site.server(tmp_path) as server:
        server.post(shell("stopped", "sleep 600"))
        server.wait_status("stopped", "started")
        cromwell_site.lab.run("scancel", slurm_id(server, "stopped"))
        ended = server.wait_end("stopped")
        assert ended["status"] == "finishedWithError"
        assert re.fullmatch(r"cancelled on the cluster( by \d+)?", ended["message"])
    with cromwell_site.server(tmp_path, {"partition": "short"}) as server:  # 60 min are too long
        server.post(shell("never", "true"))
        server.wait_message("never", "PartitionTimeLimit")
        cromwell_site.lab.run("scancel", slurm_id(server, "never"))
        ended = server.wait_end("never")
        assert re.fullmatch(r"cancelled on the cluster( by \d+)?", ended["message"])


def test_a_job_that_waits_on_slurm_is_not_started(
    cromwell_site: CromwellSite, tmp_path: Path
) -> None:
    with cromwell_site.server(tmp_path, {"partition": "short"}) as server:
        server.post(shell("waits", "true"))
        found = server.wait_message("waits", "PartitionTimeLimit")
        assert found["status"] == "notstarted"
        assert workflow(cromwell_site, server, "waits").status == "Running"
        number = slurm_id(server, "waits")
        server.delete("waits")
        wait_for(lambda: number not in cromwell_site.slurm_ids(), 60, "it to leave the queue")


@pytest.mark.parametrize(
    ("fields", "site", "words"),
    [
        ({"gpu_limit": 9}, {}, "refused by Slurm: Requested node configuration is not available"),
        ({}, {"partition": "nowhere"}, "refused by Slurm: invalid partition specified: nowhere"),
    ],
)
def test_refused_with_the_words_of_sbatch(
    cromwell_site: CromwellSite,
    tmp_path: Path,
    fields: dict[str, int],
    site: dict[str, str],
    words: str,
) -> None:
    with cromwell_site.server(tmp_path, site) as server:
        server.post(shell("refused", "true", **fields))
        ended = server.wait_end("refused")
        assert ended["status"] == "finishedWithError"
        assert words in ended["message"]


def test_image_that_is_not_there(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    with cromwell_site.server(tmp_path, {"images": {"*": "/nowhere/image.sif"}}) as server:
        server.post(shell("bare", "true"))
        ended = server.wait_end("bare")
        assert ended["message"] == "exit code 255"
        assert "/nowhere/image.sif" in ended["logs"]


def test_missing_folder_is_said(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    with cromwell_site.server(tmp_path) as server:
        server.post(shell("nowhere", "true", input_dir="not/there"))
        ended = server.wait_end("nowhere")
        assert ended["status"] == "finishedWithError"
        assert "not/there" in ended["logs"]


def test_folder_that_cromwell_cannot_carry_is_refused(
    cromwell_site: CromwellSite, tmp_path: Path
) -> None:
    with cromwell_site.server(tmp_path) as server:
        status, answer = server.call("POST", "/api/v1/", shell("spaced", "true", input_dir="a b"))
        assert status == 400
        assert "'a b'" in answer["message"] or "a b" in answer["message"]
        assert server.call("GET", "/api/v1/spaced/")[0] == 404


def test_a_requeued_job_is_not_run_twice(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    lab = cromwell_site.lab
    ran = runs(cromwell_site, "requeued")
    with cromwell_site.server(tmp_path) as server:
        server.post(shell("again", f"echo run >> {ran}; sleep 600"))
        wait_for(lines(cromwell_site, "requeued").exists, 60, "the plugin to run")
        number = slurm_id(server, "again")
        lab.run("scontrol", "update", f"jobid={number}", "Requeue=1")
        lab.run("scontrol", "requeue", number)
        wait_for(
            lambda: "PENDING" in lab.run("squeue", "-h", "-o", "%T", "-j", number).stdout,
            20,
            "the job to be pending again",
        )
        lab.run("scontrol", "update", f"jobid={number}", "StartTime=now")
        ended = server.wait_end("again")
        assert ended["status"] == "finishedWithError"
        assert lines(cromwell_site, "requeued").read_text() == "run\n"


def test_two_workers_run_on_two_nodes(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    ran = runs(cromwell_site, "pair")
    with cromwell_site.server(tmp_path) as server:
        server.post(shell("pair", f"echo run >> {ran}; echo here", number_of_workers=2))
        ended = server.wait_end("pair")
        assert ended["status"] == "finishedSuccessfully", ended
        assert ended["logs"] == "here\nhere\n"
        assert lines(cromwell_site, "pair").read_text() == "run\nrun\n"


def test_labels(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    with cromwell_site.server(tmp_path, JOB_LABELS="org.chris=yes,b=c d") as server:
        server.post(shell("labelled", "true"))
        server.wait_end("labelled")
        labels = dict(workflow(cromwell_site, server, "labelled").labels)
        name = labels.pop("org.chrisproject.pman.name")
        del labels["cromwell-workflow-id"]
        assert labels == {"org.chris": "yes", "b": "c d"}
        assert re.fullmatch(r"labelled\.[0-9a-f]{8}", name)


# --- logs and removal ---


@pytest.mark.parametrize("ssh", [True, False], ids=["ssh", "no-ssh"])
def test_log_while_it_runs_and_after(
    cromwell_site: CromwellSite, tmp_path: Path, ssh: bool
) -> None:
    go = lines(cromwell_site, "go-on")
    go.unlink(missing_ok=True)
    talk = "echo one; echo two >&2; until [ -e /share/outgoing/go-on ]; do sleep .1; done; seq 9"
    settings = cromwell_site.settings(tmp_path, JOB_LOGS_TAIL="3")
    with Server(settings if ssh else without_ssh(settings), tmp_path / "pman.log") as server:
        server.post(shell("talks", talk))
        logged(server, "talks", "one\ntwo\n")
        server.wait_status("talks", "started")
        go.touch()
        assert server.wait_end("talks")["logs"] == "8\n9\ntwo\n"


def test_paths_of_cromwell_are_mapped(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    """Where pman sees the shared disk under another path than Cromwell does."""
    (tmp_path / "elsewhere").symlink_to(cromwell_site.cromwell.root)
    wrong = {"CROMWELL_PATHS": f"{cromwell_site.cromwell.root}={tmp_path / 'nowhere'}"}
    right = {"CROMWELL_PATHS": f"{cromwell_site.cromwell.root}={tmp_path / 'elsewhere'}"}
    settings = without_ssh(cromwell_site.settings(tmp_path))
    with Server({**settings, **wrong}, tmp_path / "pman.log") as server:
        server.post(shell("mapped", "echo found"))
        assert server.wait_end("mapped")["logs"] == ""
    with Server({**settings, **right}, tmp_path / "pman.log") as server:
        assert server.get("mapped")["logs"] == "found\n"


@pytest.mark.parametrize("when", ["pending", "running", "ended"])
def test_delete(cromwell_site: CromwellSite, tmp_path: Path, when: str) -> None:
    output = lines(cromwell_site, f"kept-{when}")
    site = {"partition": "short"} if when == "pending" else {}
    touch = f"touch /share/outgoing/{output.name}"
    with cromwell_site.server(tmp_path, site) as server:
        server.post(shell("gone", f"{touch}; sleep {0 if when == 'ended' else 600}"))
        if when == "pending":
            server.wait_message("gone", "PartitionTimeLimit")
        if when == "running":
            server.wait_status("gone", "started")
            wait_for(output.exists, 30, "the plugin to run")
        if when == "ended":
            server.wait_end("gone")
        number = slurm_id(server, "gone")
        server.delete("gone")
        assert server.call("GET", "/api/v1/gone/")[0] == 404
        wait_for(lambda: server.call("GET", "/health/")[1]["removing"] == 0, 60, "it to be removed")
        assert number not in cromwell_site.slurm_ids()
        assert output.exists() == (when != "pending")
        if when != "pending":
            server.post(shell("gone", "echo new"))
            assert "new" in server.wait_end("gone")["logs"]


def test_aborted_by_somebody_else(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    with cromwell_site.server(tmp_path) as server:
        server.post(shell("theirs", "sleep 600"))
        server.wait_status("theirs", "started")
        cromwell_site.cromwell.engine.abort(workflow(cromwell_site, server, "theirs").id)
        ended = server.wait_end("theirs")
        assert (ended["status"], ended["message"]) == ("finishedWithError", "aborted in Cromwell")


# --- crashes and outages ---

SUBMISSION = ("POST", "/api/workflows/v1")


def test_many_at_once_run_once_each_with_few_calls(
    cromwell_site: CromwellSite, tmp_path: Path
) -> None:
    ran = runs(cromwell_site, "many")
    jids = [f"many-{number}" for number in range(100)]
    lab, cromwell = cromwell_site.lab, cromwell_site.cromwell
    lab.clear_calls()
    cromwell.clear_calls()
    logins = lab.connections()
    began = time.monotonic()
    with cromwell_site.server(tmp_path, POLL_INTERVAL="2") as server:
        for jid in jids:
            server.post(counting(jid, Path(ran)))
        assert set(all_ended(server, jids, 300).values()) == {"finishedSuccessfully"}
        looks = (time.monotonic() - began) / 2 + 2
        calls = Counter(
            f"{method} {path.partition('?')[0].rpartition('/')[2]}"
            for method, path in cromwell.calls()
        )
    ran_once(lines(cromwell_site, "many"), jids)
    assert calls["POST v1"] == 100
    assert calls["POST query"] <= looks
    assert calls["GET metadata"] <= METADATA * looks
    assert set(calls) <= {"POST v1", "POST query", "GET metadata", "GET version"}
    slurm = Counter(argv[0] for argv in lab.calls() if argv[0] != "sbatch")
    assert lab.connections() - logins <= 2
    assert slurm["sacct"] <= looks


def test_cromwell_is_away(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    """For 20 s, while a job runs to its end, another runs on, and a third arrives."""
    cromwell = cromwell_site.cromwell
    ran = runs(cromwell_site, "outage")
    go = lines(cromwell_site, "outage-go")
    go.unlink(missing_ok=True)
    until = f"until [ -e /share/outgoing/{go.name} ]; do sleep .1; done"
    with cromwell_site.server(tmp_path) as server:
        server.post(counting("over", Path(ran), f"{until}; exit 4"))
        server.post(counting("on", Path(ran), f"{until}; sleep 15"))
        server.wait_status("over", "started")
        server.wait_status("on", "started")
        cromwell.stop()
        try:
            server.post(counting("new", Path(ran)))
            go.touch()
            away = server.wait_message("on", "; last known: running on node")["message"]
            assert away.startswith("Cromwell unreachable since ")
            assert "127.0.0.1" in server.call("GET", "/health/")[1]["outage"]["reason"]
            seen = {jid: server.get(jid)["status"] for jid in ("over", "on", "new")}
            assert seen == {"over": "started", "on": "started", "new": "notstarted"}
            with pytest.raises(TimeoutError):
                wait_for(
                    lambda: seen != {jid: server.get(jid)["status"] for jid in seen},
                    20,
                    "a status to change",
                    every=0.5,
                )
        finally:
            cromwell.start()
        assert all_ended(server, ["over", "on", "new"]) == {
            "over": "finishedWithError",
            "on": "finishedSuccessfully",
            "new": "finishedSuccessfully",
        }
        assert server.get("over")["message"] == "exit code 4"
        ran_once(lines(cromwell_site, "outage"), ["over", "on", "new"])


def test_login_node_is_away(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    """Cromwell goes on telling of ends; what only Slurm knows stays as it was."""
    lab = cromwell_site.lab
    go = lines(cromwell_site, "login-go")
    go.unlink(missing_ok=True)
    with cromwell_site.server(tmp_path) as server:
        server.post(shell("on", f"until [ -e /share/outgoing/{go.name} ]; do sleep .1; done"))
        server.wait_status("on", "started")
        lab.stop_service("sshd")
        try:
            found = server.wait_message("on", "unreachable")
            assert found["status"] == "started"
            assert "Cromwell says Running; login node 127.0.0.1 unreachable" in found["message"]
            go.touch()
            assert server.wait_end("on")["message"] == "finished"
        finally:
            lab.start_service("sshd")


@pytest.mark.parametrize("fault", ["500", "html", "lost"])
def test_submissions_that_go_wrong_run_once(
    cromwell_site: CromwellSite, tmp_path: Path, fault: str
) -> None:
    """Refused by a proxy, answered by something else, and carried out without an answer."""
    cromwell = cromwell_site.cromwell
    faults = {
        "500": (Fault(500, only=SUBMISSION), "500 Internal Server Error"),
        "html": (
            Fault(200, "<html>Log in</html>", type="text/html", only=SUBMISSION),
            "is that a Cromwell?",
        ),
        "lost": (Fault(lose=True, only=SUBMISSION), "can't be reached"),
    }
    ran = runs(cromwell_site, f"fault-{fault}")
    cromwell.clear_calls()
    with cromwell_site.server(tmp_path) as server:
        cromwell.fault, words = faults[fault]
        try:
            server.post(counting("odd", Path(ran)))
            found = server.wait_message("odd", words)
            assert SUBMISSION in cromwell.calls()
            assert (found["status"], found["logs"]) == ("notstarted", "")
            assert found["message"].startswith("waiting: Cromwell at ")
        finally:
            cromwell.fault = None
        assert server.wait_end("odd", timeout=120)["message"] == "finished"
        ran_once(lines(cromwell_site, f"fault-{fault}"), ["odd"])


def test_server_killed_while_jobs_are_sent(cromwell_site: CromwellSite, tmp_path: Path) -> None:
    ran = runs(cromwell_site, "crash")
    jids = [f"crash-{number}" for number in range(20)]
    cromwell_site.cromwell.clear_calls()
    with cromwell_site.server(tmp_path) as server:
        for jid in jids:
            server.post(counting(jid, Path(ran)))
        wait_for(
            lambda: SUBMISSION in cromwell_site.cromwell.calls(),
            30,
            "the first submission",
        )
        server.stop(kill=True)
        server.start()
        assert set(all_ended(server, jids).values()) == {"finishedSuccessfully"}
    ran_once(lines(cromwell_site, "crash"), jids)


def test_a_version_that_takes_no_ids(newest_site: Site, tmp_path: Path) -> None:
    """An answer is lost: the label is looked up before the second try."""
    with CromwellLab(newest_site.lab, version="74", visible_after=6, poll_rate=0.2) as cromwell:
        site = CromwellSite(newest_site.lab, cromwell)
        ran = runs(site, "old")
        with site.server(tmp_path) as server:
            server.post(counting("before", Path(ran)))
            server.wait_end("before")
            cromwell.clear_calls()
            cromwell.fault = Fault(lose=True, only=SUBMISSION)
            server.post(counting("old", Path(ran)))
            server.wait_message("old", "can't be reached")
            assert SUBMISSION in cromwell.calls()
            assert server.wait_end("old", timeout=120)["message"] == "finished"
            assert cromwell.calls().count(SUBMISSION) == 1
        ran_once(lines(site, "old"), ["before", "old"])


def test_cromwell_that_forgets_everything(newest_site: Site, tmp_path: Path) -> None:
    """Jobs that run are followed on Slurm to their true ends; one that never began is not ended."""
    with CromwellLab(newest_site.lab, visible_after=1, poll_rate=0.2) as cromwell:
        site = CromwellSite(newest_site.lab, cromwell)
        go = lines(site, "forget-go")
        go.unlink(missing_ok=True)
        until = f"until [ -e /share/outgoing/{go.name} ]; do sleep .1; done"
        with site.server(tmp_path) as server:
            server.post(shell("well", f"{until}; echo done"))
            server.post(shell("badly", f"{until}; exit 5"))
            server.wait_status("well", "started")
            server.wait_status("badly", "started")
            cromwell.restart(empty=True)
            found = server.wait_message("well", "Cromwell has forgotten it")
            assert found["status"] == "started"
            assert f"Slurm's job {slurm_id(server, 'well')}" in found["message"]
            server.post(shell("after", "true"))
            assert server.wait_end("after")["message"] == "finished"
            go.touch()
            assert server.wait_end("well")["message"] == "finished"
            assert server.get("well")["logs"] == "done\n"
            assert server.wait_end("badly")["message"] == "exit code 5"


def test_a_forgotten_job_can_be_deleted(newest_site: Site, tmp_path: Path) -> None:
    with CromwellLab(newest_site.lab, visible_after=1, poll_rate=0.2) as cromwell:
        site = CromwellSite(newest_site.lab, cromwell)
        with site.server(tmp_path) as server:
            server.post(shell("left", "sleep 600"))
            server.wait_status("left", "started")
            cromwell.restart(empty=True)
            server.wait_message("left", "Cromwell has forgotten it")
            number = slurm_id(server, "left")
            server.delete("left")
            wait_for(lambda: number not in site.slurm_ids(), 60, "the Slurm job to end")


# --- dry runs ---


def test_the_verdict_is_of_cromwells_own_parser(
    cromwell_site: CromwellSite, tmp_path: Path
) -> None:
    with cromwell_site.server(tmp_path) as server:
        status, answer = server.call("POST", "/api/v1/?test_only=true", shell("dry", "true"))
        assert status == 200
        assert (answer["language"], answer["template"]) == ("wdl", "chris")
        assert answer["document"].startswith("version 1.0")
        assert answer["verdict"]["accepted"] is True
        assert server.call("GET", "/api/v1/dry/")[0] == 404
