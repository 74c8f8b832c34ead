"""A CT slice through a server of its own, posted over HTTP as pfcon posts it."""

import asyncio
import contextlib
import importlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

from pman import sources
from pman.demo.screen import Screen
from pman.errors import PmanError
from pman.gateway import Gateway
from pman.jobs import JobState
from pman.settings import Settings, load
from pman.site import Site
from pman.web.app import make_app, make_gateway

PACKAGES = ("chris_plugin", "numpy", "PIL", "pydicom")
"""What the extra `demo` installs."""

PLUGIN = Path(__file__).with_name("ctslice.py")
SLICE = "CT_small.dcm"
PICTURE, STATISTICS = "CT_small.png", "CT_small.json"
BONE_WINDOW = ("--window-center=300", "--window-width=1500")
ENDS = {state.chris for state in JobState if state.final}
IMAGE = "localhost/pl-ctslice:1"

LOOK = 0.1
"""Seconds between two GETs."""
REMOVAL = 30.0
"""Seconds that the job's removal may take."""


class DemoError(PmanError):
    """The demo can't begin, or did not get its picture."""


@dataclass(frozen=True)
class Stage:
    """Where the job runs, and how the plugin is called there."""

    settings: Settings
    image: str
    entrypoint: Sequence[str]


def run(output: Path, *, slurm: bool = False, image: str = "") -> None:
    """Raises PmanError; whatever happens, nothing is left but what is in `output`."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise DemoError(f"the demo misses {', '.join(missing)}: pip install 'pman[demo]'")
    if image and not slurm:
        raise DemoError("--image goes with --slurm: on this machine no container is used")
    screen = Screen()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        _check_ours(output)
        with tempfile.TemporaryDirectory(prefix="pman-demo-") as scratch:
            stage = _on_slurm(Path(scratch), image, screen) if slurm else _local(Path(scratch))
            with stage as there, _folder(there.settings.storage) as folder:
                ended = asyncio.run(_play(there, folder, screen))
                _keep(ended, folder / "outgoing", output, screen)
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise DemoError("interrupted; the job and the temporary folders are removed") from None
    except aiohttp.ClientError as error:
        raise DemoError(f"the demo's server does not answer: {error}") from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise DemoError(f"{where}{error.strerror or error}") from None


def _check_ours(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise DemoError(f"{output} is no folder: choose another one with --output")
    if output.is_dir() and {path.name for path in output.iterdir()} - {PICTURE, STATISTICS}:
        raise DemoError(
            f"{output} holds files that are not the demo's: choose another folder with --output"
        )


# --- where it runs ---


def _fresh(**values: Any) -> Settings:
    """These settings and otherwise the defaults, whatever this process's environment says."""
    defaults = {name: field.get_default() for name, field in Settings.model_fields.items()}
    return load(**defaults | values)


@contextlib.contextmanager
def _local(scratch: Path) -> Iterator[Stage]:
    store = scratch / "store"
    store.mkdir()
    os.environ["TMPDIR"] = str(scratch)  # the job's own scratch folder goes with the rest
    settings = _fresh(
        container_env="local", storebase=store, state_dir=scratch / "state", poll_interval=LOOK
    )
    yield Stage(settings, IMAGE, [sys.executable, "-m", "pman.demo.ctslice"])


@contextlib.contextmanager
def _on_slurm(scratch: Path, image: str, screen: Screen) -> Iterator[Stage]:
    """The cluster that the environment describes, else one of its own where this is a checkout."""
    state = scratch / "state"
    with contextlib.ExitStack() as until_the_end:
        if {"SSH_HOST", "STOREBASE"} & set(os.environ) or Path(".env").exists():
            settings = load(container_env="slurm", state_dir=state, api_token="", remove_jobs=True)
            image = image or _known_image(settings)
            if not settings.storage.is_dir():
                raise DemoError(
                    f"STOREBASE {settings.storage} is not on this machine: the demo puts its slice "
                    "there; run it where the store is mounted"
                )
        else:
            lab = _lab()
            screen.text("Starting a Slurm cluster with a login node; the first time builds it...")
            try:
                cluster = until_the_end.enter_context(lab.slurm.SlurmLab(release="sid"))
            except (lab.errors.LabError, ValueError) as error:
                raise DemoError(f"the cluster can't be started: {error}") from None
            image = image or _labs_image(lab)
            values = {name.lower(): value for name, value in cluster.settings.items()}
            settings = _fresh(**values | {"state_dir": state, "poll_interval": 0.5})
        if image.startswith("/"):
            found = sources.read(None, settings.site_file)
            text = found.site or ""
            Site.parse(text, found.site_file)  # or it says what is wrong
            site = yaml.safe_load(text) or {}
            site["images"] = {IMAGE: image} | site.get("images", {})
            site_file = scratch / "site.yaml"
            site_file.write_text(yaml.safe_dump(site, sort_keys=False))  # the first match counts
            settings = settings.model_copy(update={"site_file": site_file})
            image = IMAGE
        yield Stage(settings, image, ["python3", f"/share/incoming/{PLUGIN.name}"])


def _lab() -> Any:
    """The tests' lab, which only a checkout has; pman does not depend on it."""
    try:
        lab = importlib.import_module("tests.lab")
        for name in ("slurm", "images", "errors"):
            importlib.import_module(f"tests.lab.{name}")
    except ModuleNotFoundError:
        raise DemoError(
            "no cluster is named: set SSH_HOST, STOREBASE and what else `pman serve` needs"
        ) from None
    if reason := lab.problem():
        raise DemoError(f"no cluster is named by SSH_HOST and STOREBASE, and {reason}")
    return lab


def _labs_image(lab: Any) -> str:
    try:
        return str(lab.images.python_image())
    except lab.errors.LabError as error:
        raise DemoError(f"the image can't be built: {error}") from None


def _known_image(settings: Settings) -> str:
    """An image for a cluster that the user named without one."""
    if "bare" in (settings.template.get("slurm"), settings.template.get("")):
        return IMAGE  # never looked at
    if settings.ssh_host == "127.0.0.1":  # `python -m tests.lab up`, as like as not
        with contextlib.suppress(DemoError):
            return _labs_image(_lab())
    raise DemoError(
        "give --image: the name of an image with python3, pydicom, numpy, pillow and chris_plugin, "
        "or the path of one (a SIF or a folder) as the nodes see it"
    )


@contextlib.contextmanager
def _folder(storebase: Path) -> Iterator[Path]:
    """A folder of the store with the plugin's input, and for its output; both readable there."""
    with tempfile.TemporaryDirectory(prefix="pman-demo-", dir=storebase) as name:
        folder = Path(name)
        incoming, outgoing = folder / "incoming", folder / "outgoing"
        for path in (incoming, outgoing):
            path.mkdir()
        from pydicom.data import get_testdata_file

        for source in (str(get_testdata_file(SLICE, download=False)), PLUGIN):
            Path(shutil.copy(source, incoming)).chmod(0o644)
        for path in (folder, incoming):
            path.chmod(0o755)
        if os.geteuid() == 0:
            owner = storebase.stat()
            os.chown(outgoing, owner.st_uid, owner.st_gid)
        else:
            outgoing.chmod(0o777)  # the account that submits may be another one
        yield folder


# --- what happens ---


async def _play(stage: Stage, folder: Path, screen: Screen) -> dict[str, Any]:
    """The job object as it was at the end."""
    job = _job(stage, folder)
    screen.heading("The job, as pfcon posts it")
    screen.job(job)
    gateway = make_gateway(stage.settings)
    async with _server(gateway) as address, aiohttp.ClientSession(address) as http:
        return await _through(http, gateway, job, screen)


def _keep(ended: Mapping[str, Any], outgoing: Path, output: Path, screen: Screen) -> None:
    """Show how the job ended, and copy what it made into `output`."""
    screen.heading("Its log")
    screen.text(ended["logs"].rstrip())
    if ended["status"] != JobState.SUCCEEDED.chris:
        raise DemoError(f"the job is {ended['status']}: {ended['message']}")
    output.mkdir(parents=True, exist_ok=True)
    for name in (PICTURE, STATISTICS):
        shutil.copyfile(outgoing / name, output / name)
    screen.heading("The slice")
    screen.statistics(json.loads((output / STATISTICS).read_text()))
    screen.picture(output / PICTURE)
    screen.text(f"\nThe picture is {output / PICTURE}, its statistics {output / STATISTICS}.")


def _job(stage: Stage, folder: Path) -> Mapping[str, Any]:
    return {
        "jid": f"demo-{secrets.token_hex(3)}",
        "args": [*BONE_WINDOW],
        "args_path_flags": [],
        "auid": "demo",
        "number_of_workers": 1,
        "cpu_limit": 1000,
        "memory_limit": 500,
        "gpu_limit": 0,
        "image": stage.image,
        "entrypoint": [*stage.entrypoint],
        "type": "ds",
        "env": [],
        "input_dir": f"{folder.name}/incoming",
        "output_dir": f"{folder.name}/outgoing",
    }


@contextlib.asynccontextmanager
async def _server(gateway: Gateway) -> AsyncIterator[str]:
    """The address of a real server on a free port."""
    runner = web.AppRunner(make_app(gateway), access_log=None)
    try:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def _through(
    http: aiohttp.ClientSession, gateway: Gateway, job: Mapping[str, Any], screen: Screen
) -> dict[str, Any]:
    """POST, GET until the end, DELETE; the job object as it was at the end."""
    path = f"/api/v1/{job['jid']}/"
    try:
        await _call(http, "POST", "/api/v1/", job)
        document = (await gateway.get(job["jid"])).document
        screen.heading(f"What the engine is sent, by the template {document.template}")
        screen.code(document.text, "bash")
        screen.heading("What becomes of it")
        return await _follow(http, path, gateway, job["jid"], screen)
    finally:
        await _remove(http, path, gateway)
        screen.text("The job is deleted, and its folder with it.")


async def _follow(
    http: aiohttp.ClientSession, path: str, gateway: Gateway, jid: str, screen: Screen
) -> dict[str, Any]:
    """Show each state until the last; the job object as it is then."""
    shown = 0
    while True:
        answer = await _call(http, "GET", path)
        history = await gateway.history(await gateway.get(jid))
        for event in history[shown:]:
            screen.state(event)
        shown = len(history)
        if answer["status"] in ENDS:
            return answer
        if gateway.outage is not None:
            raise DemoError(gateway.outage.reason)
        await asyncio.sleep(LOOK)


async def _remove(http: aiohttp.ClientSession, path: str, gateway: Gateway) -> None:
    """DELETE, and wait until it has happened: the server must live so long."""
    async with http.delete(path):
        pass
    last = asyncio.get_running_loop().time() + REMOVAL
    while await gateway.removing():
        if gateway.outage is not None or asyncio.get_running_loop().time() > last:
            why = gateway.outage.reason if gateway.outage else f"no end within {REMOVAL:g} s"
            raise DemoError(f"{why}; the job may be there still: squeue --me shows it")
        await asyncio.sleep(LOOK)


async def _call(
    http: aiohttp.ClientSession, method: str, path: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    async with http.request(method, path, json=body) as response:
        answer: dict[str, Any] = await response.json()
    if not response.ok:
        raise DemoError(f"{method} {path} is answered {response.status}: {answer['message']}")
    return answer
