"""Workflows of pman's shape, and a client that submits them and waits for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import requests

from tests.lab.cromwell import CromwellLab
from tests.lab.cromwell_engine import FINAL
from tests.lab.images import python_image
from tests.waiting import wait_for

TIMEOUT = 30  # s; the longest for one answer


def source(command: str, folders: dict[str, str], **attributes: Any) -> str:
    """A WDL as pman sends it; an attribute set to None is left out."""
    runtime = {
        "docker": str(python_image()),
        **folders,
        "cpu": 1,
        "memory": "100 MiB",
        "gpu_limit": 0,
        "number_of_workers": 1,
        "timelimit": 60,
        "maxRetries": 0,
        "failOnStderr": False,
        "continueOnReturnCode": 0,
    }
    lines = [
        f"    {name}: {json.dumps(value)}"
        for name, value in (runtime | attributes).items()
        if value is not None
    ]
    return "\n".join(
        [
            "version 1.0",
            "task plugin_instance {",
            "  command <<<",
            command,
            "  >>>",
            "  runtime {",
            *lines,
            "  }",
            "}",
            "workflow ChRISJob { call plugin_instance }",
            "",
        ]
    )


class Client:
    """Of one emulator. `submit` runs a command with folders of its own bound."""

    def __init__(self, cromwell: CromwellLab, storebase: Path) -> None:
        self.cromwell = cromwell
        self.storebase = storebase
        self._jobs = 0

    def folders(self) -> dict[str, str]:
        """The attributes of a new pair of folders; the input folder holds a file `a`."""
        self._jobs += 1
        feed = self.storebase / f"feed-{self._jobs}"
        for folder in (feed / "in", feed / "out"):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o777)
        (feed / "in/a").write_text("hello\n")
        return {"sharedir": str(feed), "incoming": "in", "outgoing": "out"}

    def get(self, path: str, **query: Any) -> requests.Response:
        return requests.get(f"{self.cromwell.url}{path}", params=query, timeout=TIMEOUT)

    def post(self, path: str, **parts: str) -> requests.Response:
        files = {name: (None, text) for name, text in parts.items()}
        return requests.post(f"{self.cromwell.url}{path}", files=files or None, timeout=TIMEOUT)

    def submit(self, command: str, **attributes: Any) -> str:
        return self.submit_source(source(command, self.folders(), **attributes))

    def submit_source(self, text: str, **parts: str) -> str:
        known = {"workflowType": "WDL", "workflowTypeVersion": "1.0"}
        answer = self.post("/api/workflows/v1", workflowSource=text, **known, **parts)
        assert answer.status_code == 201, answer.text
        id: str = answer.json()["id"]
        return id

    def status(self, id: str) -> str | None:
        """None as long as the workflow is not visible."""
        answer = self.get(f"/api/workflows/v1/{id}/status")
        if answer.status_code == 404:
            return None
        word: str = answer.json()["status"]
        return word

    def metadata(self, id: str, **query: Any) -> dict[str, Any]:
        answer = self.get(f"/api/workflows/v1/{id}/metadata", **query)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def wait(self, id: str, status: str, seconds: float = 60) -> None:
        wait_for(lambda: self.status(id) == status, seconds, f"{id} to be {status}", every=0.1)

    def end(self, id: str, seconds: float = 60) -> dict[str, Any]:
        """The metadata of a workflow that has ended."""
        wait_for(lambda: self.status(id) in FINAL, seconds, f"the end of {id}", every=0.1)
        return self.metadata(id)

    def call(self, id: str) -> dict[str, Any]:
        """What metadata says of the workflow's only call."""
        (shown,) = self.metadata(id)["calls"]["ChRISJob.plugin_instance"]
        return dict(shown)

    def job(self, id: str) -> str:
        """The Slurm id, as soon as there is one."""

        def found() -> str:
            if self.status(id) is None or not self.metadata(id)["calls"]:
                return ""
            return str(self.call(id).get("jobId", ""))

        return wait_for(found, 30, f"the Slurm job of {id}", every=0.1)

    def execution(self, id: str) -> Path:
        return Path(self.call(id)["callRoot"]) / "execution"
