"""Fixtures for tests that need no cluster: CONTAINER_ENV=local, in a folder of their own."""

import os
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from aiohttp.test_utils import TestClient
from aiohttp.web import Application, Request

from pman.settings import Settings
from pman.web.app import make_app, make_gateway

# No time is asserted, and the machine may be busy.
hypothesis.settings.register_profile(
    "pman",
    deadline=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("pman")

Client = TestClient[Request, Application]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden",
        action="store_true",
        help="write the documents in tests/golden anew, for `git diff` to judge",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI nothing may be skipped: a missing engine is a failure, not a reason."""
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and CI is set: {report.longrepr}"
    return report


def job_body(**changes: Any) -> dict[str, Any]:
    """A body as pfcon POSTs it, changed; a field set to ``...`` is left out."""
    body = {
        "jid": "chris-jid-1",
        "args": [],
        "args_path_flags": [],
        "auid": "cube",
        "number_of_workers": "1",
        "cpu_limit": "1000",
        "memory_limit": "200",
        "gpu_limit": "0",
        "image": "fnndsc/pl-simpledsapp",
        "entrypoint": ["true"],
        "type": "ds",
        "env": [],
        "input_dir": "in",
        "output_dir": "out",
    }
    return {name: value for name, value in (body | changes).items() if value is not ...}


@pytest.fixture
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of pman's settings in the environment, and no ``.env``."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def values(tmp_path: Path, clean_environment: None) -> dict[str, Any]:
    """The settings of a local server whose store base has the folders ``in`` and ``out``."""
    storebase = tmp_path / "store base"
    for name in ("in", "out"):
        (storebase / name).mkdir(parents=True)
    return {
        "container_env": "local",
        "storebase": storebase,
        "state_dir": tmp_path / "state",
        "poll_interval": 0.1,
    }


@pytest.fixture
def settings(values: dict[str, Any]) -> Settings:
    return Settings(**values)


StartServer = Callable[..., Awaitable[Client]]


@pytest.fixture
def serve(values: dict[str, Any], aiohttp_client: Any) -> StartServer:
    """Starts a real server, its settings changed as asked, and gives a client of it."""

    async def start(**changes: Any) -> Client:
        app = make_app(make_gateway(Settings(**values | changes)))
        client: Client = await aiohttp_client(app)
        return client

    return start


@pytest.fixture
async def client(serve: StartServer) -> Client:
    return await serve()
