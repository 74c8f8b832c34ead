"""A Cromwell configuration for a cluster, read and used the way Cromwell does.

`submit`, `submit-docker`, `check-alive` and `kill` are commands of draft-2 tasks. Their inputs are
the declarations of `runtime-attributes` and names of Cromwell's own, all pasted as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyhocon
import WDL

EXAMPLE = Path(__file__).parents[2] / "docs/examples/cromwell-slurm.conf"
INCLUDE = 'include required(classpath("application"))'  # Cromwell's defaults: not for pyhocon

# What each text may use besides runtime attributes.
JOB = ("job_id",)
SUBMIT = ("job_name", "cwd", "out", "err", "script", "job_shell", *JOB)
DOCKER = ("docker_cwd", "docker_out", "docker_err", "docker_script", "docker_cid")
INPUTS = {
    "submit": SUBMIT,
    "submit-docker": SUBMIT + DOCKER,
    "check-alive": JOB,
    "kill": JOB,
    "kill-docker": (*JOB, "docker_cid"),
}

UNITS = {"": 1, "B": 1} | {
    unit: 2 ** (10 * power)
    for power, letter in enumerate("KMGT", 1)
    for unit in (letter, f"{letter}B", f"{letter}i", f"{letter}iB")
}

Values = dict[str, WDL.Value.Base]


class BadAttribute(ValueError):
    """A runtime attribute that fails the workflow before its job is submitted."""

    def __init__(self, task: str, name: str, value: object = None) -> None:
        shown = "!! NOT FOUND !!" if value is None else str(value)
        super().__init__(f"Task {task} has an invalid runtime attribute {name} = {shown}")


class Configuration:
    """The values of one file that the emulator obeys."""

    def __init__(self, path: Path = EXAMPLE) -> None:
        text = path.read_text()
        if INCLUDE not in text:
            raise ValueError(f"{path}: without `{INCLUDE}` Cromwell has no defaults")
        whole = pyhocon.ConfigFactory.parse_string(text.replace(INCLUDE, ""))
        self.backend_name: str = whole["backend.default"]
        provider = whole[f"backend.providers.{self.backend_name}"]
        if not provider["actor-factory"].endswith("ConfigBackendLifecycleActorFactory"):
            raise ValueError(f"{path}: {provider['actor-factory']} is no backend for clusters")
        self._config: Mapping[str, Any] = provider["config"]
        self.poll_rate = _seconds(whole["system.new-workflow-poll-rate"])
        self.launch_count = int(whole["system.max-workflow-launch-count"])
        self.job_limit = int(self._config["concurrent-job-limit"])
        self.exit_code_timeout = float(self._config["exit-code-timeout-seconds"])
        self.epilogue = str(self._config.get("script-epilogue", "sync"))
        self.job_shell = "/bin/bash"
        # In draft-2 declarations stand outside an input section.
        self.declarations = [*self._task("runtime_attributes", "").postinputs]
        self._tasks = {name: self._task(name, self._config[name], INPUTS[name]) for name in INPUTS}

    def _task(self, name: str, command: str, names: tuple[str, ...] = ()) -> WDL.Tree.Task:
        declared = self._config["runtime-attributes"] if name[0] not in "ck" else ""
        inputs = "".join(f"String {name}\n" for name in names)
        source = (
            f"task {name.replace('-', '_')} {{\n{inputs}{declared}\ncommand {{\n{command}\n}}\n}}"
        )
        document = WDL.parse_document(source, version="draft-2")
        document.typecheck()
        return document.tasks[0]

    def attributes(self, task: str, runtime: Values) -> Values:
        """The declared attributes of a task, from its runtime section. Others are ignored."""
        found: Values = {}
        for declaration in self.declarations:
            name, kind = declaration.name, declaration.type
            memory = name.startswith("memory_")
            key = "memory" if memory else name
            value = runtime.get(key)
            try:
                if value is None and declaration.expr:
                    value = declaration.expr.eval(WDL.Env.Bindings(), _library("draft-2"))
                elif value is None and not kind.optional:
                    raise BadAttribute(task, key)
                elif value is not None and memory:
                    value = WDL.Value.Int(_bytes(value) // UNITS[name.partition("_")[2].upper()])
                elif isinstance(value, WDL.Value.String) and isinstance(kind, WDL.Type.Int):
                    value = WDL.Value.Int(int(value.value))
                elif value is not None:
                    value = value.coerce(kind)
            except (ValueError, WDL.Error.RuntimeError, WDL.Error.EvalError) as error:
                if isinstance(error, BadAttribute):
                    raise
                raise BadAttribute(task, key, value) from error
            found[name] = value or WDL.Value.Null()
        return found

    def script(self, name: str, values: Mapping[str, str | WDL.Value.Base]) -> str:
        """One of the texts with its expressions filled in, as a script for bash."""
        task = self._tasks[name]
        bindings: WDL.Env.Bindings[WDL.Value.Base] = WDL.Env.Bindings()
        for key, value in values.items():
            bindings = bindings.bind(
                key, WDL.Value.String(value) if isinstance(value, str) else value
            )
        return f"#!/bin/bash\n{instantiate(task, bindings, 'draft-2')}\n"

    def job_id(self, printed: str) -> str | None:
        """The job's id in what `submit` printed."""
        match = re.fullmatch(self._config["job-id-regex"], printed.removesuffix("\n"))
        return match[1] if match else None


def instantiate(
    task: WDL.Tree.Task, bindings: WDL.Env.Bindings[WDL.Value.Base], version: str
) -> str:
    """A task's command, as Cromwell hands it on: one kind of line end, no common indentation."""
    library = _library(version)
    command = "".join(
        part if isinstance(part, str) else part.eval(bindings, library).value
        for part in task.command.parts
    )
    lines = command.replace("\r\n", "\n").split("\n")
    while lines and not lines[0].strip():
        lines.pop(0)
    while lines and not lines[-1].strip():
        lines.pop()
    indents = [len(line) - len(line.lstrip(" \t")) for line in lines if line.strip()]
    return "\n".join(line[min(indents, default=0) :] for line in lines)


def _library(version: str) -> WDL.StdLib.Base:
    return WDL.StdLib.Base(version)


def _bytes(value: WDL.Value.Base) -> int:
    """An amount of memory: M, MB, Mi and MiB are all 2^20 bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value.value))
    if not match or match[2] not in UNITS:
        raise ValueError(f"memory {value.value!r}: a number and a unit such as MiB")
    return int(float(match[1]) * UNITS[match[2]])


def _seconds(value: float | timedelta) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else float(value)
