"""Each way in which a Slurm job ends reads truthfully, with a message in the user's words."""

from pathlib import Path

import pytest

from tests.e2e.conftest import need_lab
from tests.e2e.server import Server, job, shell
from tests.e2e.site import Site
from tests.lab.images import python_image
from tests.lab.slurm import SlurmLab
from tests.waiting import wait_for

pytestmark = pytest.mark.lab


def slurm_id(site: Site, jid: str) -> str:
    """The id of the Slurm job of a ChRIS job."""

    def found() -> str:
        rows = site.lab.run("squeue", "-h", "-t", "all", "-o", "%i %j").stdout.splitlines()
        return next((row.split()[0] for row in rows if row.split()[1].startswith(f"{jid}.")), "")

    return wait_for(found, 20, f"{jid} in squeue")


@pytest.mark.parametrize(
    ("program", "status", "message"),
    [
        ("true", "finishedSuccessfully", "finished"),
        ("exit 3", "finishedWithError", "exit code 3"),
        ("kill -9 $$", "finishedWithError", "killed by signal 9 (SIGKILL)"),
        ("kill -11 $$", "finishedWithError", "killed by signal 11 (SIGSEGV)"),
        ("no-such-program-at-all", "finishedWithError", "exit code 127: command not found"),
    ],
)
def test_the_plugins_own_end(
    plain_site: Site, tmp_path: Path, program: str, status: str, message: str
) -> None:
    with plain_site.server(tmp_path) as server:
        server.post(shell("own-end", program))
        ended = server.wait_end("own-end")
        assert (ended["status"], ended["message"]) == (status, message)
        assert ended["timestamp"]


def test_batch_script_killed_outright(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path) as server:
        server.post(shell("shot", "echo began; sleep 60"))
        logged(server, "shot", "began")
        plain_site.lab.run("scancel", "--batch", "--signal=KILL", slurm_id(plain_site, "shot"))
        ended = server.wait_end("shot")
        assert ended["status"] == "finishedWithError"
        assert "failed" in ended["message"] or "signal 9" in ended["message"]


def test_time_limit(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path, TIMELIMIT_MINUTES="60") as server:
        server.post(shell("late", "sleep 600"))
        server.wait_status("late", "started")
        number = slurm_id(plain_site, "late")
        plain_site.lab.run("scontrol", "update", f"jobid={number}", "EndTime=now")
        ended = server.wait_end("late")
        assert (ended["status"], ended["message"]) == (
            "finishedWithError",
            "time limit of 60 min",
        )
        assert "DUE TO TIME LIMIT" in ended["logs"]


def test_cancelled_on_the_cluster(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path) as server:
        server.post(shell("stopped", "sleep 600"))
        server.wait_status("stopped", "started")
        plain_site.lab.run("scancel", slurm_id(plain_site, "stopped"))
        ended = server.wait_end("stopped")
        assert ended["status"] == "finishedWithError"
        assert ended["message"].startswith("cancelled on the cluster")


def test_node_failure(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path, site={"directives": ["--nodelist=node2"]}) as server:
        server.post(shell("fallen", "sleep 600"))
        server.wait_status("fallen", "started")
        plain_site.lab.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
        try:
            ended = server.wait_end("fallen")
        finally:
            plain_site.lab.run("scontrol", "update", "nodename=node2", "state=resume", check=False)
        assert ended["status"] == "finishedWithError"
        assert ended["message"] == "node failure: node2 went down"


def test_requeued_by_an_administrator_is_not_run_twice(plain_site: Site, tmp_path: Path) -> None:
    runs = plain_site.folder("runs") / "requeued"
    with plain_site.server(tmp_path) as server:
        server.post(shell("again", f"echo run >> {runs}; sleep 600"))
        server.wait_status("again", "started")
        wait_for(runs.exists, 20, "the plugin to run")
        number = slurm_id(plain_site, "again")
        plain_site.lab.run("scontrol", "update", f"jobid={number}", "Requeue=1")
        plain_site.lab.run("scontrol", "requeue", number)
        wait_for(
            lambda: (
                "PENDING" in plain_site.lab.run("squeue", "-h", "-o", "%T", "-j", number).stdout
            ),
            20,
            "the job to be pending again",
        )
        assert server.get("again")["status"] == "started"
        plain_site.lab.run("scontrol", "update", f"jobid={number}", "StartTime=now")
        ended = server.wait_end("again")
        assert ended["status"] == "finishedWithError"
        assert "never run twice" in ended["message"]
        assert runs.read_text() == "run\n"


@pytest.mark.parametrize(
    ("fields", "site", "words"),
    [
        ({"gpu_limit": 9}, {}, "Requested node configuration is not available"),
        ({}, {"partition": "nowhere"}, "invalid partition specified: nowhere"),
        ({}, {"constraint": "gold"}, "Invalid feature specification"),
    ],
)
def test_refused_with_the_words_of_sbatch(
    plain_site: Site, tmp_path: Path, fields: dict[str, int], site: dict[str, str], words: str
) -> None:
    with plain_site.server(tmp_path, site=site) as server:
        server.post(shell("refused", "true", **fields))
        ended = server.wait_end("refused")
        assert ended["status"] == "finishedWithError"
        assert words in ended["message"]


def test_pending_says_the_reason(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path, site={"partition": "short"}, TIMELIMIT_MINUTES="60") as server:
        server.post(shell("waits", "true"))
        found = server.wait_message("waits", "PartitionTimeLimit")
        assert found["status"] == "notstarted"
        assert "more time than the partition allows" in found["message"]
        server.delete("waits")


def test_missing_folder_is_said(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path) as server:
        server.post(shell("nowhere", "true", input_dir="not/there"))
        ended = server.wait_end("nowhere")
        assert ended["status"] == "finishedWithError"
        assert "the input folder" in ended["message"]
        assert "not/there is not on the node" in ended["message"]


def memory_hog(mib: int) -> str:
    return f"python3 -c 'x = bytearray({mib} << 20); print(len(x))'"


@pytest.mark.parametrize(
    "program",
    [memory_hog(500), f"{memory_hog(500)}; exit 0", f"{memory_hog(500)} & wait"],
    ids=["the plugin", "a part of it, and it goes on", "a child"],
)
def test_out_of_memory(memory_site: Site, tmp_path: Path, program: str) -> None:
    with memory_site.server(tmp_path) as server:
        server.post(shell("greedy", program, memory_limit=100))
        ended = server.wait_end("greedy")
        assert (ended["status"], ended["message"]) == (
            "finishedWithError",
            "out of memory (asked for 100 MiB)",
        )


def test_out_of_memory_on_two_workers(memory_site: Site, tmp_path: Path) -> None:
    with memory_site.server(tmp_path) as server:
        server.post(shell("greedy-pair", memory_hog(500), memory_limit=100, number_of_workers=2))
        ended = server.wait_end("greedy-pair")
        assert (ended["status"], ended["message"]) == (
            "finishedWithError",
            "out of memory (asked for 100 MiB)",
        )


def test_out_of_memory_without_cgroups(tmp_path: Path) -> None:
    """Slurm then looks now and then, kills the job, and calls it JobLaunchFailure."""
    need_lab()
    watched = (
        "JobAcctGatherType=jobacct_gather/linux",
        "JobAcctGatherParams=OverMemoryKill",
        "JobAcctGatherFrequency=1",
    )
    with SlurmLab(extra_conf=watched) as lab, Site(lab).server(tmp_path) as server:
        hog = "import time; x = bytearray(500 << 20); time.sleep(60)"
        server.post(job("greedy", "python3", "-c", hog, memory_limit=100))
        ended = server.wait_end("greedy")
        assert (ended["status"], ended["message"]) == (
            "finishedWithError",
            "out of memory (asked for 100 MiB)",
        )


def test_node_that_cannot_start_jobs(tmp_path: Path) -> None:
    need_lab()
    with SlurmLab(extra_conf=["Prolog=/bin/false"]) as lab, Site(lab).server(tmp_path) as server:
        server.post(shell("stillborn", "true"))
        ended = server.wait_end("stillborn")
        assert ended["status"] == "finishedWithError"
        assert ended["message"].startswith("cancelled on the cluster before it began on node")


def test_ignored_limits_let_it_have_the_memory(memory_site: Site, tmp_path: Path) -> None:
    with memory_site.server(tmp_path, IGNORE_LIMITS="yes") as server:
        server.post(shell("modest", memory_hog(60), memory_limit=20))
        assert server.wait_end("modest")["message"] == "finished"


def test_two_workers_run_on_two_nodes(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path) as server:
        server.post(shell("pair", "echo $SLURM_PROCID; pwd", number_of_workers=2))
        ended = server.wait_end("pair")
        assert ended["status"] == "finishedSuccessfully", ended
        scratch, again, *ranks = sorted(ended["logs"].split(), key=len, reverse=True)
        assert sorted(ranks) == ["0", "1"]
        assert scratch == again
        assert scratch.startswith(f"{plain_site.lab.root}/tmp/pair.")
        assert not Path(scratch).exists()


def test_gpus_are_asked_for(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path) as server:
        server.post(shell("gpus", "echo gpus=$CUDA_VISIBLE_DEVICES", gpu_limit=2))
        assert "gpus=0,1" in server.wait_end("gpus")["logs"]


def test_labels_are_the_comment(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path, JOB_LABELS="org.chris=yes,b=c d") as server:
        server.post(shell("labelled", "sleep 600"))
        server.wait_status("labelled", "started")
        number = slurm_id(plain_site, "labelled")
        shown = plain_site.lab.run("scontrol", "show", "job", number).stdout
        assert "Comment=b=c d,org.chris=yes" in shown
        server.delete("labelled")


def logged(server: Server, jid: str, text: str) -> None:
    wait_for(lambda: text in server.get(jid)["logs"], 20, f"{text!r} in the log", every=0.05)


def test_log_while_it_runs_and_after(plain_site: Site, tmp_path: Path) -> None:
    go = plain_site.folder("go") / "on"
    with plain_site.server(tmp_path, JOB_LOGS_TAIL="3") as server:
        server.post(
            shell("talks", f"echo one; echo two >&2; until [ -e {go} ]; do sleep .1; done; seq 9")
        )
        logged(server, "talks", "one\ntwo\n")
        assert server.get("talks")["status"] == "started"
        go.touch()
        assert server.wait_end("talks")["logs"] == "7\n8\n9\n"


@pytest.mark.parametrize("when", ["pending", "running", "ended"])
def test_delete(plain_site: Site, tmp_path: Path, when: str) -> None:
    output = plain_site.folder("out") / f"kept-{when}"
    with plain_site.server(tmp_path) as server:
        number = ""
        if when == "pending":
            server.post(shell("gone", "true", cpu_limit=4000, number_of_workers=2))
            plain_site.lab.run("scontrol", "hold", number := slurm_id(plain_site, "gone"))
        if when == "running":
            server.post(shell("gone", f"touch {output}; sleep 600"))
            wait_for(output.exists, 20, "the plugin to run")
            server.wait_status("gone", "started")
        if when == "ended":
            server.post(shell("gone", f"touch {output}"))
            server.wait_end("gone")
        number = number or slurm_id(plain_site, "gone")
        server.delete("gone")
        assert server.call("GET", "/api/v1/gone/")[0] == 404
        folder = plain_site.jobs_dir(server)
        wait_for(lambda: not list(folder.iterdir()), 30, "the job's own folder to go")
        wait_for(
            lambda: not plain_site.lab.run("squeue", "-h", "-j", number, check=False).stdout,
            30,
            "the job to leave the queue",
        )
        assert output.exists() == (when != "pending")
        server.post(shell("gone", "echo new"))
        assert "new" in server.wait_end("gone")["logs"]


def test_remove_jobs_no(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path, REMOVE_JOBS="no") as server:
        server.post(shell("stays", "echo here"))
        server.wait_end("stays")
        server.delete("stays")
        assert "here" in server.get("stays")["logs"]


def test_output_of_the_plugin_has_its_usual_rights(plain_site: Site, tmp_path: Path) -> None:
    with plain_site.server(tmp_path) as server:
        server.post(job("rights", "touch", "/share/outgoing/rights"))
        server.wait_end("rights")
        assert (plain_site.folder("out") / "rights").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("signal", ["TERM", "INT", "USR1"])
def test_signals_reach_the_plugin(plain_site: Site, tmp_path: Path, signal: str) -> None:
    program = f"trap 'echo told to; exit 0' {signal}; echo ready; while true; do sleep .1; done"
    with plain_site.server(tmp_path) as server:
        jid = f"polite-{signal}"
        server.post(shell(jid, program))
        logged(server, jid, "ready")
        number = slurm_id(plain_site, jid)
        plain_site.lab.run("scancel", "--batch", f"--signal={signal}", number)
        ended = server.wait_end(jid)
        assert ended["message"] == "finished"
        assert "told to" in ended["logs"]


def test_container_user(plain_site: Site, tmp_path: Path) -> None:
    images = {"images": {"*": str(python_image())}}
    with plain_site.server(
        tmp_path, images, TEMPLATE="charliecloud", CONTAINER_USER="1234:5678"
    ) as server:
        server.post(job("whoami", "sh", "-c", "id -u; id -g"))
        assert server.wait_end("whoami")["logs"].splitlines() == ["1234", "5678"]


@pytest.mark.parametrize("release", ["trixie", "sid"])
def test_other_releases_of_slurm(tmp_path: Path, release: str) -> None:
    need_lab()
    with SlurmLab(release=release) as lab:
        site = Site(lab)
        with site.server(tmp_path, TIMELIMIT_MINUTES="60") as server:
            server.post(shell("well", "echo fine"))
            server.post(shell("badly", "exit 3"))
            server.post(shell("late", "sleep 600"))
            server.post(shell("refused", "true", gpu_limit=9))
            server.post(shell("pair", "echo $SLURM_PROCID", number_of_workers=2))
            server.wait_status("late", "started")
            lab.run("scontrol", "update", f"jobid={slurm_id(site, 'late')}", "EndTime=now")
            names = ("well", "badly", "late", "refused", "pair")
            ends = {jid: server.wait_end(jid) for jid in names}
            assert ends["well"]["message"] == "finished"
            assert ends["well"]["logs"] == "fine\n"
            assert ends["badly"]["message"] == "exit code 3"
            assert ends["late"]["message"] == "time limit of 60 min"
            assert ends["refused"]["message"].startswith("refused by Slurm: Requested node config")
            assert sorted(ends["pair"]["logs"].split()) == ["0", "1"]
            server.post(shell("gone", "sleep 600"))
            server.wait_status("gone", "started")
            server.delete("gone")
            wait_for(lambda: not lab.run("squeue", "-h").stdout, 30, "an empty queue")
