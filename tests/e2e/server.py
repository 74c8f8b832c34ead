"""A real `pman serve` in a process of its own, and pfcon's side of the conversation with it."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.waiting import wait_for

END = frozenset({"finishedSuccessfully", "finishedWithError", "undefined"})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def job(jid: str, *words: str, **fields: Any) -> dict[str, Any]:
    """A job as pfcon POSTs it, running the command ``words``."""
    entrypoint, *args = words
    return {
        "jid": jid,
        "args": args,
        "args_path_flags": [],
        "auid": "cube",
        "number_of_workers": 1,
        "cpu_limit": 1000,
        "memory_limit": 200,
        "gpu_limit": 0,
        "image": "localhost/plugin:1",
        "entrypoint": [entrypoint],
        "type": "ds",
        "env": [],
        "input_dir": "in",
        "output_dir": "out",
    } | fields


def shell(jid: str, program: str, **fields: Any) -> dict[str, Any]:
    """A job that runs a shell program; its input and output folders are $0 and $1."""
    return job(jid, "sh", "-c", program, **fields)


class Server:
    """`pman serve` with the given settings and nothing else of this process' environment."""

    def __init__(self, settings: Mapping[str, str], log: Path) -> None:
        self.settings = settings
        self.log = log
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.log.parent)}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pman", "serve", "--port", str(self.port)],
                cwd=self.log.parent,
                env=environment | dict(self.settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(self._answers, 30, "the server to answer", every=0.05)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self, kill: bool = False) -> None:
        """End it as systemd does, or with ``kill`` as a crash does."""
        if self._process is None:
            return
        if kill:
            self._process.kill()
        else:
            self._process.terminate()
        self._process.wait(60)
        self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"the server ended: {self.log.read_text()}")
        with contextlib.suppress(OSError):
            return self.call("GET", "/api/v1/")[0] == 200
        return False

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded body of one call."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        with contextlib.closing(connection):
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        return answer.status, json.loads(text) if text else None

    def post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        status, answer = self.call("POST", "/api/v1/", body)
        assert status == 201, answer
        result: dict[str, Any] = answer
        return result

    def get(self, jid: str) -> dict[str, Any]:
        status, answer = self.call("GET", f"/api/v1/{jid}/")
        assert status == 200, answer
        result: dict[str, Any] = answer
        return result

    def delete(self, jid: str) -> None:
        status, answer = self.call("DELETE", f"/api/v1/{jid}/")
        assert status == 204, answer

    def wait_status(self, jid: str, *wanted: str, timeout: float = 60) -> dict[str, Any]:
        """The job once it has one of the statuses."""

        found: dict[str, Any] = {}

        def there() -> bool:
            nonlocal found
            found = self.get(jid)
            assert found["status"] in wanted or found["status"] not in END, found
            return found["status"] in wanted

        try:
            wait_for(there, timeout, f"{jid} to be {' or '.join(wanted)}", every=0.05)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {found}\n{self.log.read_text()[-5000:]}") from None
        return found

    def wait_message(self, jid: str, text: str, timeout: float = 60) -> dict[str, Any]:
        """The job once its message holds ``text``."""

        def there() -> dict[str, Any] | None:
            found = self.get(jid)
            return found if text in found["message"] else None

        return wait_for(there, timeout, f"{jid} to say {text!r}", every=0.05) or {}

    def wait_end(self, jid: str, timeout: float = 60) -> dict[str, Any]:
        return self.wait_status(jid, *END, timeout=timeout)
