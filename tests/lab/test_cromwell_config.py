"""The example configuration, and what Cromwell makes of a task's runtime attributes with it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import WDL

from tests.lab.cromwell_config import INPUTS, BadAttribute, Configuration

PATHS = {"sharedir": "/data", "incoming": "in", "outgoing": "out"}
FULL = {
    "docker": "localhost/plugin:1",
    "sharedir": "/data",
    "incoming": "feed/in",
    "outgoing": "feed/out",
    "cpu": 3,
    "memory": "200 MiB",
    "gpu_limit": 2,
    "number_of_workers": 4,
    "timelimit": 61,
    "slurm_partition": "long",
    "slurm_account": "lab",
    "slurm_qos": "low",
    "slurm_constraint": "fast",
    "slurm_reservation": "course",
}
SEEN = {
    "docker": 'image="localhost/plugin:1"',
    "sharedir": "/data/",
    "incoming": '"/data/feed/in:/share/incoming:ro"',
    "outgoing": '"/data/feed/out:/share/outgoing:rw"',
    "cpu": "--cpus-per-task=3 ",
    "memory": "--mem=200M ",
    "gpu_limit": "--gres=gpu:2\n",
    "number_of_workers": "--nodes=4 ",
    "timelimit": "--time=61 ",
    "slurm_partition": "--partition=long ",
    "slurm_account": "--account=lab ",
    "slurm_qos": "--qos=low ",
    "slurm_constraint": "--constraint=fast ",
    "slurm_reservation": "--reservation=course ",
}
OPTIONAL = [name for name in FULL if name not in PATHS and name not in ("docker", "gpu_limit")]


@pytest.fixture(scope="module")
def config() -> Configuration:
    return Configuration()


def wdl_values(values: dict[str, Any]) -> dict[str, WDL.Value.Base]:
    return {
        key: WDL.Value.Int(value) if isinstance(value, int) else WDL.Value.String(value)
        for key, value in values.items()
    }


def submit_script(config: Configuration, values: dict[str, Any]) -> str:
    attributes = config.attributes("plugin_instance", wdl_values(values))
    return config.script(
        "submit-docker", {**dict.fromkeys(INPUTS["submit-docker"], "x"), **attributes}
    )


def test_every_attribute_is_consumed(config: Configuration) -> None:
    script = submit_script(config, FULL)
    assert {name for name, text in SEEN.items() if text in script} == set(FULL)


@pytest.mark.parametrize("name", OPTIONAL)
def test_an_attribute_that_is_left_out_leaves_its_option_out(
    config: Configuration, name: str
) -> None:
    option = SEEN[name].partition("=")[0]
    script = submit_script(config, {key: value for key, value in FULL.items() if key != name})
    assert f"{option}=" in submit_script(config, FULL)
    assert f"{option}=" not in script or name == "number_of_workers"


@pytest.mark.parametrize("values", [FULL, PATHS | {"docker": "/image.sif"}])
def test_texts_are_scripts_for_bash(config: Configuration, values: dict[str, Any]) -> None:
    scripts = [submit_script(config, values)]
    scripts += [
        config.script(name, dict.fromkeys(INPUTS[name], "1"))
        for name in ("check-alive", "kill", "kill-docker")
    ]
    batch = scripts[0].partition("<<'BATCH'\n")[2].partition("\nBATCH\n")[0]
    node = scripts[0].partition("<<'NODE'\n")[2].partition("\nNODE\n")[0]
    assert batch.startswith("#!/bin/bash\n")
    assert "apptainer exec" in node
    for script in (*scripts, batch, node):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=30)


class Node:
    """The text that submits, run here: Slurm and Apptainer are scripts, and so is the plugin."""

    def __init__(self, folder: Path, config: Configuration, workers: int = 1) -> None:
        self.call = folder / "call"
        self.execution = self.call / "execution"
        self.execution.mkdir(parents=True)
        (self.execution / "script").touch()
        self._config, self._bin = config, folder / "bin"
        self._bin.mkdir()
        self._values = PATHS | {"docker": "/image.sif", "number_of_workers": workers}
        each = " & ".join(f'SLURM_PROCID={worker} "$@"' for worker in range(workers))
        for name, text in {
            "sbatch": f"echo 17; echo of Slurm > '{self.execution}/slurm.log'; exec bash >&2",
            "srun": f'while [[ $1 == -* ]]; do shift; done\n{each}\nwait "$!"; code=$?\n'
            'wait; exit "$code"',
        }.items():
            self._program(name, text)

    def _program(self, name: str, text: str) -> None:
        (self._bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (self._bin / name).chmod(0o755)

    def run(self, plugin: str) -> None:
        """`plugin` begins in Cromwell's folder, as the account that the batch script has."""
        enter = 'for word; do [[ $word != /*:x ]] || cd "${word%:x}/execution"; done'
        self._program("apptainer", f"{enter}\n(\n{plugin}\n) > stdout")
        attributes = self._config.attributes("plugin_instance", wdl_values(self._values))
        given = {**dict.fromkeys(INPUTS["submit-docker"], "x"), "cwd": str(self.call)}
        script = self._config.script("submit-docker", {**given, **attributes})
        path = f"{self._bin}:{os.environ['PATH']}"
        environment = {"PATH": path, "TMPDIR": str(self._bin)}
        run = subprocess.run(
            ["bash", "-c", script], env=environment, timeout=30, check=False, capture_output=True
        )
        assert run.stdout == b"17\n", run.stderr


HARMFUL = {
    "rc.batch": "ln -s {victim} rc.batch",
    "rc.batch of no file": "ln -s {victim}.new rc.batch",
    "rc of no file": "ln -s {victim}.new rc",
    "rc": "ln -s {victim} rc",
    "rc of a folder": "ln -s {victim}s rc",
    "rc that waits": "mkfifo rc",
    "rc.first": "ln -s {victim} rc.first",
    "rc.first that waits": "mkfifo rc.first",
    "stderr": "ln -s {victim} stderr",
    "stderr that waits": "mkfifo stderr",
    "slurm.log": "rm -f slurm.log; ln -s {victim} slurm.log",
    "slurm.log that waits": "rm -f slurm.log; mkfifo slurm.log",
    "the folder": "cd ..; mv execution moved; ln -s {victim}s execution",
    "no number": "echo nonsense > rc.tmp; mv rc.tmp rc",
}


@pytest.mark.parametrize("how", HARMFUL)
@pytest.mark.parametrize("workers", [1, 2])
def test_no_link_of_a_plugin_is_followed_and_no_pipe_waited_for(
    config: Configuration, tmp_path: Path, workers: int, how: str
) -> None:
    node = Node(tmp_path, config, workers)
    victim, folder = tmp_path / "victim", tmp_path / "victims"
    victim.write_text("secret\n")
    folder.mkdir()
    for name in ("stdout", "stderr", "pman-reason"):
        (folder / name).write_text("secret\n")
    node.run(f"{HARMFUL[how].format(victim=victim)}; exit 3")
    assert victim.read_text() == "secret\n"
    assert not (tmp_path / "victim.new").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["pman-reason", "stderr", "stdout"]
    moved = how == "the folder" and workers == 1
    execution = node.call / "moved" if moved else node.execution
    for file in (execution / "rc", execution / "stderr"):
        assert not file.is_symlink()
        assert not file.exists() or (file.is_file() and "secret" not in file.read_text())
    if how != "no number":
        assert (execution / "rc").read_text() == "3\n"


def test_what_several_workers_wrote_is_put_together(config: Configuration, tmp_path: Path) -> None:
    node = Node(tmp_path, config, 2)
    node.run("echo out; echo err > stderr; echo 0 > rc")
    assert (node.execution / "stdout").read_text() == "out\nout\n"
    assert (node.execution / "stderr").read_text() == "err\nerr\n"
    assert (node.execution / "rc").read_text() == "0\n"


@pytest.mark.parametrize("name", ["stdout", "stderr", "pman-reason"])
def test_no_link_of_a_worker_is_read(config: Configuration, tmp_path: Path, name: str) -> None:
    (tmp_path / "victim").write_text("secret\n")
    node = Node(tmp_path, config, 2)
    node.run(f"rm -f {name}; ln -s {tmp_path}/victim {name}; exit 3")
    file = node.execution / name
    assert not file.exists() or "secret" not in file.read_text()


@pytest.mark.parametrize(
    ("squeue", "alive"),
    [
        ("echo alive:RUNNING", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", True),
        # As it does with several clusters.
        ("echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2", True),
        ("exit 1", True),
        ("true", False),
    ],
)
def test_what_squeue_says_of_a_job(config: Configuration, squeue: str, alive: bool) -> None:
    script = config.script("check-alive", {"job_id": "17"})
    text = f"squeue() ( {squeue} )\n{script}"
    done = subprocess.run(["bash", "-c", text], check=False, timeout=30)
    assert (done.returncode == 0) is alive


def test_a_task_without_an_image_is_refused(config: Configuration) -> None:
    values = config.attributes("plugin_instance", wdl_values(PATHS))
    script = config.script("submit", {**dict.fromkeys(INPUTS["submit"], "x"), **values})
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert "the runtime section needs docker" in done.stderr


def test_defaults_that_bite_are_changed(config: Configuration) -> None:
    assert config.poll_rate == 2
    assert config.launch_count == 50
    assert config.job_limit == 1000
    assert config.exit_code_timeout == 120


@pytest.mark.parametrize(
    ("memory", "mebibytes"),
    [
        ("200 MiB", 200),
        ("200 MB", 200),
        ("200 M", 200),
        ("2 GB", 2048),
        ("1.5GiB", 1536),
        (2**21, 2),
    ],
)
def test_memory(config: Configuration, memory: str | int, mebibytes: int) -> None:
    values = config.attributes("plugin_instance", wdl_values(PATHS | {"memory": memory}))
    assert values["memory_mb"].value == mebibytes


def test_attributes_are_coerced_and_unknown_ones_ignored(config: Configuration) -> None:
    given = wdl_values(PATHS | {"cpu": "2", "incoming": 7, "wrong": "x"})
    values = config.attributes("plugin_instance", given)
    assert (values["cpu"].value, values["incoming"].value) == (2, "7")
    assert values["number_of_workers"].value == 1
    assert values["timelimit"].value is None
    assert "wrong" not in values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sharedir": None}, "an invalid runtime attribute sharedir = !! NOT FOUND !!"),
        ({"cpu": "many"}, 'an invalid runtime attribute cpu = "many"'),
        ({"memory": "much"}, 'an invalid runtime attribute memory = "much"'),
    ],
)
def test_bad_attributes(config: Configuration, change: dict[str, Any], message: str) -> None:
    values = {key: value for key, value in (FULL | change).items() if value is not None}
    with pytest.raises(BadAttribute, match=f"^Task plugin_instance has {message}$"):
        config.attributes("plugin_instance", wdl_values(values))


@pytest.mark.parametrize(("printed", "id"), [("12\n", "12"), ("12;north\n", "12"), ("no\n", None)])
def test_job_id(config: Configuration, printed: str, id: str | None) -> None:
    assert config.job_id(printed) == id
