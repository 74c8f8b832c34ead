"""The emulated Cromwell and the example configuration, on real Slurm with the real Apptainer."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.lab import apptainer, problem
from tests.lab.cgroups import cgroup_problem
from tests.lab.cromwell import CromwellLab, Fault
from tests.lab.cromwell_client import Client, source
from tests.lab.cromwell_config import Configuration
from tests.lab.slurm import SlurmLab
from tests.waiting import wait_for

REASON = problem()
pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(bool(REASON) and not os.environ.get("CI"), reason=REASON or ""),
]

WRONG_CODE = (
    "Job ChRISJob.plugin_instance:NA:1 exited with return code {} which has not been declared as a"
    " valid return code. See 'continueOnReturnCode' runtime attribute for more details."
)
API = "/api/workflows/v1"
GATE = "until [ -e /share/incoming/gate ]; do sleep 0.1; done"


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    with SlurmLab(release="sid") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared(lab: SlurmLab) -> Iterator[Client]:
    """For tests that leave the emulator as it is."""
    with CromwellLab(lab, visible_after=0.5, poll_rate=0.1, exit_code_timeout=1) as cromwell:
        yield Client(cromwell, lab.storebase)


def client_of(lab: SlurmLab, cromwell: CromwellLab) -> Client:
    return Client(cromwell, lab.storebase / uuid.uuid4().hex[:8])


def slurm(lab: SlurmLab, job: str) -> dict[str, str]:
    """What Slurm says of a job."""
    words = lab.run("scontrol", "show", "job", job).stdout.split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait_state(lab: SlurmLab, job: str, state: str) -> None:
    wait_for(lambda: slurm(lab, job)["JobState"] == state, 30, f"job {job} to be {state}", 0.1)


def causes(failures: list[dict[str, Any]]) -> list[str]:
    """Every message of a tree of failures."""
    found = []
    for one in failures:
        found += [one["message"], *causes(one["causedBy"])]
    return found


# --- jobs ---


def test_success(lab: SlurmLab, shared: Client) -> None:
    command = """
        pwd
        cat /share/incoming/a
        touch /share/incoming/b || echo input is read-only
        cp /share/incoming/a /share/outgoing/copied
        [ "$(df --output=size -k /tmp | tail -1)" -gt 65536 ] && echo /tmp is large
        echo complaint >&2
    """
    folders = shared.folders()
    id = shared.submit_source(source(command, folders))
    assert shared.end(id)["status"] == "Succeeded"
    call = shared.call(id)
    assert (call["executionStatus"], call["backendStatus"]) == ("Done", "Done")
    assert call["returnCode"] == 0
    assert call["attempt"] == 1 and call["shardIndex"] == -1
    assert Path(call["stdout"]).read_text().splitlines() == [
        f"/cromwell-executions/ChRISJob/{id}/call-plugin_instance/execution",
        "hello",
        "input is read-only",
        "/tmp is large",
    ]
    assert Path(call["stderr"]).read_text().endswith("complaint\n")
    out = Path(folders["sharedir"]) / "out"
    assert (out / "copied").read_text() == "hello\n"
    assert (out / "copied").stat().st_uid == lab.storebase.stat().st_uid
    job = slurm(lab, call["jobId"])
    assert job["JobName"] == f"cromwell_{id[:8]}_plugin_instance"
    assert job["StdOut"] == f"{shared.execution(id)}/slurm.log"
    assert job["Requeue"] == "0"
    assert "complaint" in (shared.execution(id) / "slurm.log").read_text()
    wait_state(lab, call["jobId"], "COMPLETED")
    assert not list((lab.root / "tmp").glob("tmp.*"))  # the scratch folder


def test_nonzero_exit(lab: SlurmLab, shared: Client) -> None:
    id = shared.submit("echo why >&2; exit 3")
    ended = shared.end(id)
    assert ended["status"] == "Failed"
    assert causes(ended["failures"]) == ["Workflow failed", WRONG_CODE.format(3)]
    call = shared.call(id)
    assert (call["executionStatus"], call["returnCode"]) == ("Failed", 3)
    assert Path(call["stderr"]).read_text() == "why\n"
    wait_state(lab, call["jobId"], "FAILED")


def test_exit_code_of_a_signal_is_not_recorded(shared: Client) -> None:
    id = shared.submit("exit 137")
    ended = shared.end(id)
    assert ended["status"] == "Failed"
    assert causes(ended["failures"])[1].startswith("The compute backend terminated the job.")
    assert "returnCode" not in shared.call(id)
    assert (shared.execution(id) / "rc").read_text() == "137\n"


def test_time_limit(lab: SlurmLab, shared: Client) -> None:
    id = shared.submit("echo began; sleep 600")
    job = shared.job(id)
    wait_state(lab, job, "RUNNING")
    wait_for((shared.execution(id) / "stdout").exists, 30, "the plugin's output")
    lab.run("scontrol", "update", f"jobid={job}", "EndTime=now")
    ended = shared.end(id)
    assert ended["status"] == "Failed"
    assert "DUE TO TIME LIMIT" in (shared.execution(id) / "slurm.log").read_text()
    assert causes(ended["failures"])[1].startswith("The compute backend terminated the job.")
    assert (shared.execution(id) / "stdout").read_text() == "began\n"


def test_an_end_without_an_exit_code(shared: Client) -> None:
    id = shared.submit("chmod a-w .")
    ended = shared.end(id)
    assert causes(ended["failures"])[1] == WRONG_CODE.format(79)
    call = shared.call(id)
    assert (call["backendStatus"], call["returnCode"]) == ("Failed", 79)


def test_an_image_that_is_not_there(shared: Client) -> None:
    id = shared.submit("true", docker="/no/such/image.sif")
    ended = shared.end(id)
    assert causes(ended["failures"])[1] == WRONG_CODE.format(255)
    assert "/no/such/image.sif" in (shared.execution(id) / "stderr").read_text()


def test_refused_by_sbatch(shared: Client) -> None:
    id = shared.submit("true", slurm_partition="nowhere")
    ended = shared.end(id)
    (_, words) = causes(ended["failures"])
    file = shared.execution(id) / "stderr.submit"
    assert words == f"Unable to start job. Check the stderr file for possible errors: {file}"
    assert "invalid partition specified: nowhere" in file.read_text()
    assert "jobId" not in shared.call(id)


def test_refused_without_an_image(shared: Client) -> None:
    id = shared.submit("true", docker=None)
    assert causes(shared.end(id)["failures"])[1].startswith("Unable to start job.")
    words = (shared.execution(id) / "stderr.submit").read_text()
    assert "the runtime section needs docker" in words


def test_missing_attribute(shared: Client) -> None:
    ended = shared.end(shared.submit("true", incoming=None))
    assert causes(ended["failures"]) == [
        "Workflow failed",
        "Runtime validation failed",
        "Task plugin_instance has an invalid runtime attribute incoming = !! NOT FOUND !!",
    ]


def test_every_attribute_reaches_slurm(lab: SlurmLab, shared: Client) -> None:
    lab.run("scontrol", "update", "nodename=node2", "AvailableFeatures=fast", "ActiveFeatures=fast")
    lab.run(
        *("scontrol", "create", "reservation", "reservationname=course", f"users={lab.user}"),
        *("starttime=now", "duration=60", "nodes=node2"),
    )
    try:
        id = shared.submit(
            "true",
            cpu=2,
            memory="300 MiB",
            gpu_limit=1,
            timelimit=17,
            slurm_partition="gpu",
            slurm_account="lab",
            slurm_qos="normal",
            slurm_constraint="fast",
            slurm_reservation="course",
        )
        job = slurm(lab, shared.job(id))
        assert shared.end(id)["status"] == "Succeeded", shared.metadata(id)
        job = slurm(lab, shared.job(id)) | {"Reservation": job["Reservation"]}
    finally:
        lab.run("scontrol", "delete", "reservationname=course")
    wanted = {
        "Partition": "gpu",
        "Account": "lab",
        "Features": "fast",
        "Reservation": "course",
        "TimeLimit": "00:17:00",
        "NumNodes": "1",
        "CPUs/Task": "2",
        "MinMemoryNode": "300M",
        "NodeList": "node2",
        "TresPerNode": "gres/gpu:1",
    }
    assert {name: job[name] for name in wanted} == wanted
    assert "--qos=normal " in (shared.execution(id) / "script.submit").read_text()
    assert '[ "1" -eq 0 ] || set -- --nv' in (shared.execution(id) / "script.submit").read_text()


def test_without_limits(lab: SlurmLab, shared: Client) -> None:
    id = shared.submit("true", cpu=None, memory=None, gpu_limit=None, number_of_workers=None)
    assert shared.end(id)["status"] == "Succeeded"
    job = slurm(lab, shared.job(id))
    assert (job["Partition"], job["NumNodes"], job["CPUs/Task"]) == ("debug", "1", "1")
    assert "TresPerNode" not in job


def test_account_and_qos_with_accounting() -> None:
    with SlurmLab(accounting=True) as books:
        apptainer.install(books)
        with CromwellLab(books, visible_after=0, poll_rate=0.1) as cromwell:
            client = client_of(books, cromwell)
            command = "touch /share/incoming/b || cat /share/incoming/a"
            id = client.submit(command, slurm_account="lab", slurm_qos="limited")
            assert client.end(id)["status"] == "Succeeded"
            job = slurm(books, client.job(id))
            assert (job["Account"], job["QOS"]) == ("lab", "limited")
            assert (client.execution(id) / "stdout").read_text() == "hello\n"
            refused = client.submit("true", slurm_account="nobody")
            assert "Unable to start job." in causes(client.end(refused)["failures"])[1]
            words = (client.execution(refused) / "stderr.submit").read_text()
            assert "Invalid account" in words


@pytest.mark.skipif(bool(cgroup_problem()), reason=cgroup_problem() or "")
def test_out_of_memory() -> None:
    with SlurmLab(cgroup=True) as memory:
        apptainer.install(memory)
        with CromwellLab(memory, visible_after=0, poll_rate=0.1, exit_code_timeout=1) as cromwell:
            client = client_of(memory, cromwell)
            id = client.submit("""python3 -c 'x = b"x" * 300_000_000'""", memory="100 MiB")
            ended = client.end(id)
            assert causes(ended["failures"])[1].startswith("The compute backend terminated the job")
            assert (client.execution(id) / "rc").read_text() == "137\n"
            log = client.execution(id) / "slurm.log"
            wait_for(lambda: "oom" in log.read_text().lower(), 30, "Slurm's word of it")
            wait_state(memory, client.job(id), "OUT_OF_MEMORY")


# --- plugins that are up to something ---


def test_a_plugin_gives_no_commands_outside_of_its_container(lab: SlurmLab, shared: Client) -> None:
    outside = lab.storebase / uuid.uuid4().hex
    id = shared.submit(f"""
        for file in script.*; do
            start=$(grep -abF 'code=$?' "$file" | head -n 1 | cut -d: -f1)
            [ -z "$start" ] || printf 'touch {outside}\nexit 0\n' |
                dd of="$file" bs=1 seek="$start" conv=notrunc
        done
        exit 5
    """)
    ended = shared.end(id)
    assert causes(ended["failures"])[1] == WRONG_CODE.format(5)
    wait_state(lab, shared.job(id), "FAILED")
    assert not outside.exists()


def test_a_plugin_gives_no_commands_to_the_script_that_submits_it(
    lab: SlurmLab, shared: Client
) -> None:
    folders = shared.folders()
    ready, outside = Path(folders["sharedir"]) / "out/ready", lab.storebase / uuid.uuid4().hex
    command = f"echo 'touch {outside}' >> script.submit; touch /share/outgoing/ready; exit 5"
    wait = f'for _ in $(seq 300); do [ ! -e "{ready}" ] || break; sleep 0.1; done'
    with sbatch(lab, f'/usr/bin/sbatch "$@"; code=$?\n{wait}\nexit "$code"'):
        id = shared.submit_source(source(command, folders))
        ended = shared.end(id)
    assert causes(ended["failures"])[1] == WRONG_CODE.format(5)
    assert f"touch {outside}" in (shared.execution(id) / "script.submit").read_text()
    assert not outside.exists()


# --- sbatch that gives no answer ---


@contextmanager
def sbatch(lab: SlurmLab, text: str) -> Iterator[None]:
    """A script of bash instead of sbatch."""
    file = "/usr/local/bin/sbatch"
    lab.run("sh", "-c", f"cat > {file} && chmod 755 {file}", input=f"#!/bin/bash\n{text}\n")
    try:
        yield
    finally:
        lab.run("rm", file)


TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


def test_a_job_whose_submission_was_not_answered_is_found(lab: SlurmLab, shared: Client) -> None:
    with sbatch(lab, f'/usr/bin/sbatch "$@" > /dev/null; echo "{TIMED_OUT}" >&2; exit 1'):
        id = shared.submit("exit 5")
        ended = shared.end(id)
    assert causes(ended["failures"])[1] == WRONG_CODE.format(5)
    assert slurm(lab, shared.job(id))["JobName"] == f"cromwell_{id[:8]}_plugin_instance"


def test_a_submission_that_was_not_answered_and_left_no_job_is_refused(
    lab: SlurmLab, shared: Client
) -> None:
    with sbatch(lab, f'echo "{TIMED_OUT}" >&2; exit 7'):
        id = shared.submit("exit 5")
        ended = shared.end(id)
    assert causes(ended["failures"])[1].startswith("Unable to start job.")
    assert TIMED_OUT in (shared.execution(id) / "stderr.submit").read_text()


# --- several workers ---


def test_workers_run_on_each_node(lab: SlurmLab, shared: Client) -> None:
    command = """
        mkdir lock || exit 9
        echo out
        echo err >&2
        mktemp /share/outgoing/XXXXXX > /dev/null
    """
    folders = shared.folders()
    id = shared.submit_source(source(command, folders, number_of_workers=2))
    assert shared.end(id)["status"] == "Succeeded", shared.metadata(id)
    call = shared.call(id)
    assert Path(call["stdout"]).read_text() == "out\nout\n"
    assert Path(call["stderr"]).read_text() == "err\nerr\n"
    assert len(list((Path(folders["sharedir"]) / "out").iterdir())) == 2
    job = slurm(lab, call["jobId"])
    assert (job["NumNodes"], job["NodeList"]) == ("2", "node[1-2]")


def test_first_worker_to_fail_tells_the_exit_code(lab: SlurmLab, shared: Client) -> None:
    command = """
        mkdir /share/outgoing/first && sleep 600
        printf '%s' 'a reason' > pman-reason
        exit 4
    """
    id = shared.submit(command, number_of_workers=2)
    ended = shared.end(id)
    assert causes(ended["failures"])[1] == WRONG_CODE.format(4)
    assert (shared.execution(id) / "pman-reason").read_text() == "a reason"
    wait_state(lab, shared.job(id), "FAILED")


# --- aborts ---


def test_abort_while_pending(lab: SlurmLab, shared: Client) -> None:
    lab.run("scontrol", "update", "partitionname=short", "state=down")
    try:
        id = shared.submit("true", slurm_partition="short", timelimit=1)
        job = shared.job(id)
        assert slurm(lab, job)["JobState"] == "PENDING"
        answer = shared.post(f"{API}/{id}/abort")
        assert (answer.status_code, answer.json()) == (200, {"id": id, "status": "Aborting"})
        assert shared.end(id)["status"] == "Aborted"
        wait_state(lab, job, "CANCELLED")
    finally:
        lab.run("scontrol", "update", "partitionname=short", "state=up")
    assert shared.call(id)["executionStatus"] == "Aborted"


def test_abort_while_running(lab: SlurmLab, shared: Client) -> None:
    id = shared.submit("sleep 600")
    job = shared.job(id)
    wait_state(lab, job, "RUNNING")
    assert shared.post(f"{API}/{id}/abort").json()["status"] == "Aborting"
    assert shared.end(id)["status"] == "Aborted"
    wait_state(lab, job, "CANCELLED")
    again = shared.post(f"{API}/{id}/abort")
    words = f"Couldn't abort {id} because no workflow with that ID is in progress"
    assert (again.status_code, again.json()) == (404, {"status": "error", "message": words})


def test_abort_before_the_launch(lab: SlurmLab) -> None:
    with CromwellLab(lab, visible_after=0, poll_rate=3600) as cromwell:
        client = client_of(lab, cromwell)
        for parts, status in (({}, "Submitted"), ({"workflowOnHold": "true"}, "On Hold")):
            id = client.submit_source(source("true", client.folders()), **parts)
            assert client.status(id) == status
            assert client.post(f"{API}/{id}/abort").json() == {"id": id, "status": "Aborted"}
            assert client.metadata(id)["calls"] == {}


# --- submitting ---


def test_requested_id_is_used_once(shared: Client) -> None:
    wanted = str(uuid.uuid4())
    text = source("true", shared.folders())
    assert shared.submit_source(text, requestedWorkflowId=json.dumps(wanted)) == wanted
    again = shared.post(API, workflowSource=text, requestedWorkflowId=json.dumps(wanted))
    words = f"Requested workflow IDs are already in use: {wanted}"
    assert (again.status_code, again.json()) == (400, {"status": "fail", "message": words})


def test_version_74_has_no_requested_ids(lab: SlurmLab) -> None:
    with CromwellLab(lab, version="74-b7b4d1e") as cromwell:
        client = client_of(lab, cromwell)
        assert client.get("/engine/v1/version").json() == {"cromwell": "74-b7b4d1e"}
        wanted = json.dumps(str(uuid.uuid4()))
        answer = client.post(API, workflowSource="x", requestedWorkflowId=wanted)
        words = "Error(s): Unexpected body part name: requestedWorkflowId"
        assert (answer.status_code, answer.json()["message"]) == (400, words)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"wdl": "x"}, "Unexpected body part name: wdl"),
        ({"labels": "{}"}, "workflowSource needs to be supplied"),
        ({"workflowSource": "x", "labels": "{"}, "invalid labels JSON"),
        ({"workflowSource": "x", "labels": '{"a": 1}'}, "Labels must be strings"),
        ({"workflowSource": "x", "workflowOptions": "[]"}, "Invalid workflow options provided"),
        ({"workflowSource": "x", "requestedWorkflowId": "1"}, "Invalid workflow ID"),
    ],
)
def test_bad_submissions(shared: Client, parts: dict[str, str], words: str) -> None:
    answer = shared.post(API, **parts)
    assert answer.status_code == 400
    assert answer.json()["status"] == "fail" and words in answer.json()["message"]


def test_invalid_wdl_is_accepted_and_fails(shared: Client) -> None:
    id = shared.submit_source("version 1.0\nworkflow ChRISJob { call nothing }\n")
    ended = shared.end(id)
    (top,) = ended["failures"]
    assert (ended["status"], top["message"]) == ("Failed", "Workflow input processing failed")
    assert "nothing" in top["causedBy"][0]["message"]
    assert ended["calls"] == {}


def test_visible_after_a_while(lab: SlurmLab) -> None:
    with CromwellLab(lab, visible_after=3600, poll_rate=0.1) as cromwell:
        client = client_of(lab, cromwell)
        id = client.submit("true")
        for path in ("status", "metadata", "logs", "labels"):
            answer = client.get(f"{API}/{id}/{path}")
            body = {"status": "fail", "message": f"Unrecognized workflow ID: {id}"}
            assert (answer.status_code, answer.json()) == (404, body)
        found = client.get(f"{API}/query", id=id).json()
        assert found == {"results": [], "totalResultsCount": 0}
        assert client.post(f"{API}/{id}/abort").status_code == 200


def test_what_cromwell_does_to_a_command(shared: Client) -> None:
    id = shared.submit("  echo 'a SCRIPT_EPILOGUE'\r\n  printf '<%s>' '1\n    2'")
    shared.end(id)
    assert (shared.execution(id) / "stdout").read_text() == "a sync\n<1\n  2>"


# --- reading ---


def test_query(shared: Client) -> None:
    mark = uuid.uuid4().hex
    text = source("true", shared.folders())
    ids = [
        shared.submit_source(text, labels=json.dumps({"mark": mark, "number": str(number)}))
        for number in range(3)
    ]
    for id in ids:
        shared.end(id)

    def results(**query: Any) -> list[str]:
        body = shared.get(f"{API}/query", **query).json()
        assert body["totalResultsCount"] == len(body["results"])
        return sorted(result["id"] for result in body["results"])

    assert results(id=ids[:2]) == sorted(ids[:2])
    assert results(label=[f"mark:{mark}", "number:1"]) == [ids[1]]
    assert results(label=f"mark:{mark}", labelor=["number:0", "number:2"]) == sorted(
        [ids[0], ids[2]]
    )
    assert results(label=f"mark:{mark}", status="Failed") == []
    assert results(label=f"mark:{mark}", name="ChRISJob") == sorted(ids)
    (plain,) = shared.get(f"{API}/query", id=ids[0]).json()["results"]
    assert {"id", "name", "status", "submission", "start", "end"} <= set(plain)
    assert "labels" not in plain
    body = [{"id": ids[0]}, {"additionalQueryResultFields": "labels"}]
    answer = requests.post(f"{shared.cromwell.url}{API}/query", json=body, timeout=10).json()
    assert answer["results"][0]["labels"] == {
        "mark": mark,
        "number": "0",
        "cromwell-workflow-id": f"cromwell-{ids[0]}",
    }


def test_metadata_by_key(shared: Client) -> None:
    id = shared.submit("exit 2")
    shared.end(id)
    few = shared.metadata(id, includeKey=["status", "executionS", "returnCode"])
    call = {"attempt": 1, "shardIndex": -1, "executionStatus": "Failed", "returnCode": 2}
    assert few == {
        "id": id,
        "status": "Failed",
        "calls": {"ChRISJob.plugin_instance": [call]},
    }
    assert shared.metadata(id, includeKey="status") == {"id": id, "status": "Failed"}
    whole = shared.metadata(id)
    assert whole["calls"]["ChRISJob.plugin_instance"][0]["runtimeAttributes"]["cpu"] == "1"
    assert "failures" not in shared.metadata(id, excludeKey="failures")
    logs = shared.get(f"{API}/{id}/logs").json()["calls"]["ChRISJob.plugin_instance"][0]
    assert Path(logs["stdout"]).exists() and Path(logs["stderr"]).exists()


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/", 404, "The requested resource could not be found."),
        ("GET", f"{API}/{uuid.UUID(int=7)}", 404, "The requested resource could not be found."),
        ("GET", API, 405, "HTTP method not allowed, supported methods: POST"),
        ("POST", API, 415, "multipart/form-data"),
        ("GET", f"{API}/nobody/status", 400, "Invalid workflow ID: 'nobody'."),
        ("POST", f"{API}/nobody/abort", 400, "Invalid workflow ID: 'nobody'."),
        ("GET", f"{API}/query?colour=red", 400, "Unrecognized query keys: colour"),
        ("GET", f"{API}/query?status=Gone", 400, "Unrecognized status: Gone"),
    ],
)
def test_errors(shared: Client, method: str, path: str, status: int, words: str) -> None:
    answer = requests.request(method, shared.cromwell.url + path, timeout=10)
    assert answer.status_code == status
    assert words in answer.text
    kind = "application/json" if status == 400 else "text/plain"
    assert answer.headers["Content-Type"].startswith(kind)


def test_describe(shared: Client) -> None:
    good = shared.post("/api/womtool/v1/describe", workflowSource=source("true", {})).json()
    assert (good["valid"], good["errors"], good["name"]) == (True, [], "ChRISJob")
    bad = shared.post("/api/womtool/v1/describe", workflowSource="version 1.0\ntask {").json()
    assert bad["valid"] is False and bad["errors"]


# --- outages ---


def test_calls_and_faults(lab: SlurmLab) -> None:
    with CromwellLab(lab) as cromwell:
        client = client_of(lab, cromwell)
        cromwell.fault = Fault(502, "<html>Bad Gateway</html>", "text/html")
        answer = client.get("/engine/v1/version")
        assert (answer.status_code, answer.text) == (502, "<html>Bad Gateway</html>")
        cromwell.fault = Fault(hang=True)
        with pytest.raises(requests.ReadTimeout):
            requests.get(f"{cromwell.url}/engine/v1/status", timeout=0.2)
        cromwell.fault = Fault(lose=True)
        wanted = str(uuid.uuid4())
        with pytest.raises(requests.ConnectionError):
            client.post(API, workflowSource="x", requestedWorkflowId=json.dumps(wanted))
        cromwell.fault = None
        again = client.post(API, workflowSource="x", requestedWorkflowId=json.dumps(wanted))
        assert "already in use" in again.json()["message"]
        assert cromwell.calls() == [
            ("GET", "/engine/v1/version"),
            ("GET", "/engine/v1/status"),
            ("POST", API),
            ("POST", API),
        ]
        cromwell.clear_calls()
        assert cromwell.calls() == []


def test_stop_and_start(lab: SlurmLab) -> None:
    with CromwellLab(lab, visible_after=0, poll_rate=0.1, exit_code_timeout=1) as cromwell:
        client = client_of(lab, cromwell)
        url = cromwell.url
        with requests.Session() as session:
            assert session.get(f"{url}/engine/v1/version", timeout=10).ok
            folders = client.folders()
            ends = client.submit_source(source(f"{GATE}; exit 6", folders))
            fails = client.submit_source(source(f"chmod a-w .; {GATE}", folders))
            jobs = [client.job(ends), client.job(fails)]
            for job in jobs:
                wait_state(lab, job, "RUNNING")
            rc = client.execution(fails) / "rc"
            cromwell.stop()
            with pytest.raises(requests.ConnectionError):
                session.get(f"{url}/engine/v1/version", timeout=10)
            (Path(folders["sharedir"]) / "in/gate").touch()
            for job in jobs:
                wait_state(lab, job, "FAILED")
            cromwell.start()
            assert cromwell.url == url
            assert causes(client.end(ends)["failures"])[1] == WRONG_CODE.format(6)
            words = f"Unable to determine that {jobs[1]} is alive, and {rc} does not exist."
            assert causes(client.end(fails)["failures"])[1] == words
        assert client.job(ends) == jobs[0]


def test_restart_that_keeps_goes_on_with_the_same_job(lab: SlurmLab) -> None:
    with CromwellLab(lab, visible_after=0, poll_rate=0.1, exit_code_timeout=1) as cromwell:
        client = client_of(lab, cromwell)
        folders = client.folders()
        gate = Path(folders["sharedir"]) / "in/gate"
        id = client.submit_source(source(GATE, folders))
        job = client.job(id)
        wait_state(lab, job, "RUNNING")
        cromwell.restart(empty=False)
        assert client.status(id) == "Running"
        gate.touch()
        assert client.end(id)["status"] == "Succeeded"
        assert client.job(id) == job


def test_restart_that_forgets_leaves_the_slurm_job(lab: SlurmLab) -> None:
    with CromwellLab(lab, visible_after=0, poll_rate=0.1) as cromwell:
        client = client_of(lab, cromwell)
        id = client.submit("sleep 600")
        job = client.job(id)
        wait_state(lab, job, "RUNNING")
        cromwell.restart(empty=True)
        assert client.get(f"{API}/{id}/status").status_code == 404
        assert client.post(f"{API}/{id}/abort").status_code == 404
        assert client.get(f"{API}/query").json()["totalResultsCount"] == 0
        assert slurm(lab, job)["JobState"] == "RUNNING"
        lab.run("scancel", job)


def test_check_alive(lab: SlurmLab) -> None:
    """Slurm that gives no answer is no sign of a dead job."""

    def alive(job: str) -> bool:
        script = config.script("check-alive", {"job_id": job})
        done = lab.run("bash", input=script, user=lab.user, check=False, timeout=60)
        return done.returncode == 0

    config = Configuration()
    with CromwellLab(lab, visible_after=0, poll_rate=0.1) as cromwell:
        client = client_of(lab, cromwell)
        id = client.submit("sleep 600")
        job = client.job(id)
        wait_state(lab, job, "RUNNING")
        assert alive(job)
        assert not alive("999999")
        lab.stop_service("slurmctld")
        try:
            assert alive(job)
        finally:
            lab.start_service("slurmctld")
        lab.run("scancel", job)
        wait_state(lab, job, "CANCELLED")
        assert not alive(job)


def test_launches_are_as_rare_as_configured(lab: SlurmLab) -> None:
    with CromwellLab(lab, visible_after=0, poll_rate=0.4, launch_count=1) as cromwell:
        client = client_of(lab, cromwell)
        ids = [client.submit("true") for _ in range(3)]
        starts = sorted(datetime.fromisoformat(client.end(id)["start"]) for id in ids)
        gaps = [(later - one).total_seconds() for one, later in pairwise(starts)]
        assert min(gaps) > 0.3


def test_many_at_once(lab: SlurmLab) -> None:
    with CromwellLab(lab, poll_rate=0.1, exit_code_timeout=5) as cromwell:
        client = client_of(lab, cromwell)
        text = source("exit 5", client.folders())
        ids = [client.submit_source(text) for _ in range(40)]

        def ended() -> bool:
            found = client.get(f"{API}/query", id=ids, status="Failed").json()
            return bool(found["totalResultsCount"] == len(ids))

        wait_for(ended, 180, "the end of all", every=0.5)
        assert {client.call(id)["returnCode"] for id in ids} == {5}
        assert len({client.call(id)["jobId"] for id in ids}) == len(ids)


def test_nothing_survives(lab: SlurmLab) -> None:
    before = set(threading.enumerate())
    with CromwellLab(lab, visible_after=0, poll_rate=0.1) as cromwell:
        client = client_of(lab, cromwell)
        port = int(re.sub(r".*:", "", cromwell.url))
        cromwell.fault = Fault(hang=True)
        with pytest.raises(requests.ReadTimeout):
            requests.get(f"{cromwell.url}/engine/v1/status", timeout=0.2)
        cromwell.fault = None
        job = client.job(client.submit("sleep 600"))
        with socket.create_connection(("127.0.0.1", port)):
            cromwell.stop()
        cromwell.stop()  # twice is no harm
    lab.run("scancel", job)
    assert set(threading.enumerate()) <= before
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
