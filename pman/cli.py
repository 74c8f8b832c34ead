"""The command line: serve, render, check, demo, jobs, job."""

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from aiohttp import web

from pman import check as checks
from pman import looking, request, templates
from pman.demo.run import run as run_demo
from pman.drivers import ENGINES
from pman.errors import PmanError, RequestError
from pman.jobs import Document, Job, JobSpec, JobState, Severity, Verdict
from pman.settings import ClientSettings, Settings, load, load_client
from pman.terminal import printable, show_findings
from pman.web.app import make_app, make_gateway
from pman.web.operators import LIMIT, MOST

log = logging.getLogger(__name__)
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def fail(error: PmanError) -> NoReturn:
    """Say what is wrong on stderr and end with 1."""
    typer.echo(printable(f"pman: {error}"), err=True)
    if isinstance(error, RequestError):
        for name, reason in error.fields.items():
            typer.echo(printable(f"  {name}: {reason}"), err=True)
    raise typer.Exit(1)


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.", min=0, max=65535)] = 5010,
) -> None:
    """Run the server. Its settings come from the environment and `.env`."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        jobs = make_gateway(load())
        if jobs.engine == "local":
            log.warning(
                "CONTAINER_ENV=local runs each job on this machine, without a container and "
                "without limits: it is for trying things, not for users"
            )
        log.info("pman runs jobs on %s, listening on %s:%d", jobs.engine, host, port)
        web.run_app(make_app(jobs), host=host, port=port, print=None, shutdown_timeout=10)
    except PmanError as error:
        fail(error)
    except OSError as error:
        typer.echo(f"pman: can't listen on {host}:{port}: {error.strerror}", err=True)
        raise typer.Exit(1) from None


@app.command()
def render(
    job: Annotated[Path, typer.Argument(help="A job as pfcon POSTs it; `-` reads stdin.")],
    env: Annotated[str | None, typer.Option(help="The engine. Default: CONTAINER_ENV.")] = None,
    template: Annotated[
        str, typer.Option(help="Default: what SITE_FILE's rules choose, else TEMPLATE.")
    ] = "",
    test_only: Annotated[
        bool, typer.Option("--test-only", help="Also ask the scheduler; nothing is submitted.")
    ] = False,
) -> None:
    """Print the document that a job would be sent as; nothing is sent."""
    try:
        settings = load(**({"container_env": env} if env else {}))
        body = sys.stdin.buffer.read() if str(job) == "-" else job.read_bytes()
        spec = request.parse(body).spec(settings)
        document = templates.render(settings, spec, template)
        sys.stdout.buffer.write(document.text.encode())
        sys.stdout.buffer.flush()
        verdict = _verdict(settings, spec, document) if test_only else None
    except PmanError as error:
        fail(error)
    except OSError as error:
        typer.echo(f"pman: {job} can't be read: {error.strerror}", err=True)
        raise typer.Exit(1) from None
    if verdict is not None:
        word = "accepted" if verdict.accepted else "refused"
        typer.echo(printable(f"{word}: {verdict.message}"), err=True)
        for warning in verdict.warnings:
            typer.echo(printable(f"warning: {warning}"), err=True)
        raise typer.Exit(not verdict.accepted)


def _verdict(settings: Settings, spec: JobSpec, document: Document) -> Verdict:
    driver = ENGINES[settings.container_env].make(settings)
    try:
        job = Job(spec, document, content="", engine=settings.container_env)
        return driver.test([job])[job.name]
    finally:
        driver.close()


@app.command()
def check(
    deep: Annotated[bool, typer.Option("--deep", help="Run a job of one minute as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False,
) -> None:
    """Look at all that jobs need, and say what to do where something is wrong.

    Exit code 1: pman can't run jobs like that.
    """
    stopped = threading.Event()
    if deep:  # what was begun is removed first
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: stopped.set())
    found = show_findings(checks.check(deep, stopped), as_json=as_json)
    if stopped.is_set():
        raise typer.Exit(130)
    if any(finding.severity is Severity.ERROR for finding in found):
        raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="The folder that the picture and its statistics are left in.")
    ] = Path("pman-demo"),
    slurm: Annotated[
        bool,
        typer.Option("--slurm", help="On the cluster that the settings name, not on this machine."),
    ] = False,
    image: Annotated[
        str, typer.Option(help="With --slurm: the image, or its path on the nodes.")
    ] = "",
) -> None:
    """Send a CT slice through a server of its own, and show each step."""
    try:
        run_demo(output, slurm=slurm, image=image)
    except PmanError as error:
        fail(error)


Url = Annotated[
    str, typer.Option(help="The server's address. Default: PMAN_URL, else this machine's.")
]
AsJson = Annotated[bool, typer.Option("--json", help="As the server answers it.")]


@app.command("jobs")
def list_jobs(
    *,
    state: Annotated[
        list[JobState] | None, typer.Option(help="Only those in this state; may be repeated.")
    ] = None,
    auid: Annotated[str | None, typer.Option(help="Only those of this ChRIS user.")] = None,
    limit: Annotated[int, typer.Option(help="So many at the most.", min=1, max=MOST)] = LIMIT,
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on looking. With --json: a line for each change.")
    ] = False,
    url: Url = "",
) -> None:
    """List the jobs of a running server, newest first."""
    query = [("limit", str(limit)), *(("state", name.value) for name in state or ())]
    query += [] if auid is None else [("auid", auid)]
    _ask(url, lambda server: looking.jobs(server, query, as_json=as_json, watch=watch))


@app.command("job")
def show_job(
    jid: Annotated[str, typer.Argument(help="The job's jid.")],
    *,
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Until it has ended. With --json: a line a change.")
    ] = False,
    document: Annotated[
        bool, typer.Option("--document", help="The document alone, as it was sent.")
    ] = False,
    url: Url = "",
) -> None:
    """Show a job of a running server: state, history, document, log."""
    if not jid.strip("/"):
        raise typer.BadParameter("the jid is empty")
    if document and (as_json or watch):
        raise typer.BadParameter("--document goes without --json and --watch")
    if document:
        _ask(url, lambda server: looking.document(server, jid))
    else:
        _ask(url, lambda server: looking.job(server, jid, as_json=as_json, watch=watch))


def _ask(url: str, question: Callable[[ClientSettings], Coroutine[Any, Any, None]]) -> None:
    """Put ``question`` to the server. An interrupt becomes exit code 130, by typer."""
    try:
        asyncio.run(question(load_client(**({"pman_url": url} if url else {}))))
    except PmanError as error:
        fail(error)
