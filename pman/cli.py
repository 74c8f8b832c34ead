"""The command line: serve, render, demo."""

import logging
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from aiohttp import web

from pman import gateway, request
from pman.demo.run import run as run_demo
from pman.errors import PmanError, RequestError
from pman.rendering import Renderer, Site
from pman.settings import load
from pman.web.app import make_app, make_gateway

log = logging.getLogger(__name__)
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def fail(error: PmanError) -> NoReturn:
    """Say what is wrong on stderr and end with 1."""
    typer.echo(f"pman: {error}", err=True)
    if isinstance(error, RequestError):
        for name, reason in error.fields.items():
            typer.echo(f"  {name}: {reason}", err=True)
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
        where = jobs.settings.ssh_host or "this machine"
        log.info("pman runs jobs on %s of %s, listening on %s:%d", jobs.engine, where, host, port)
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
    template: Annotated[str | None, typer.Option(help="Default: TEMPLATE.")] = None,
) -> None:
    """Print the document that a job would be sent as; nothing is sent."""
    try:
        settings = load(**({"container_env": env} if env else {}))
        body = sys.stdin.buffer.read() if str(job) == "-" else job.read_bytes()
        spec = request.parse(body).spec(settings)
        renderer = Renderer(settings.templates_dir, Site.load(settings.site_file))
        document = gateway.render(settings, renderer, spec, template or "")
    except PmanError as error:
        fail(error)
    except OSError as error:
        typer.echo(f"pman: {job} can't be read: {error.strerror}", err=True)
        raise typer.Exit(1) from None
    sys.stdout.buffer.write(document.text.encode())


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
