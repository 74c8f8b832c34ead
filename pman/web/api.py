"""pfcon's REST contract, to the letter: five calls below ``/api/v1/``."""

import hmac
import shlex
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

import pman
from pman.errors import RequestError, TooLarge
from pman.gateway import Gateway
from pman.jobs import Job
from pman.request import MAX_BODY

GATEWAY = web.AppKey("gateway", Gateway)

routes = web.RouteTableDef()

_JOB = "/api/v1/{jid:/*[^/]+}/"


def job_object(job: Job, logs: str) -> Mapping[str, Any]:
    """The job object of the contract."""
    at = job.ended_at or job.started_at
    return {
        "jid": job.jid,
        "image": job.spec.image,
        "cmd": shlex.join(job.spec.argv),
        "status": job.state.chris,
        "message": job.message,
        "timestamp": at.isoformat() if at else "",
        "logs": logs,
    }


@routes.get("/api/v1/")
async def server(request: web.Request) -> web.Response:
    settings = request.app[GATEWAY].settings
    return web.json_response(
        {
            "server_version": pman.__version__,
            "container_env": settings.container_env,
            "storage_type": settings.storage_type or "host",
        }
    )


@routes.post("/api/v1/")
async def post_job(request: web.Request) -> web.Response:
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(
            text=f"the body is {request.content_type}: send it as application/json"
        )
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise TooLarge(f"the body is too large: {MAX_BODY} bytes are the most") from None
    if request.query.get("dry_run") in ("true", "1", "yes"):
        document = await request.app[GATEWAY].preview(body)
        return web.json_response(
            {
                "document": document.text,
                "language": document.language,
                "template": document.template,
                "verdict": None,
            }
        )
    job = await request.app[GATEWAY].accept(body)
    return web.json_response(job_object(job, ""), status=201)


@routes.get(_JOB)
async def get_job(request: web.Request) -> web.Response:
    job, logs = await request.app[GATEWAY].read(request.match_info["jid"].lstrip("/"))
    return web.json_response(job_object(job, logs))


@routes.delete(_JOB)
async def delete_job(request: web.Request) -> web.Response:
    await request.app[GATEWAY].delete(request.match_info["jid"].lstrip("/"))
    return web.Response(status=204)


def authorised(request: web.Request, token: str) -> bool:
    """Whether ``request`` carries the bearer token (RFC 6750)."""
    given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
    return hmac.compare_digest(given, f"Bearer {token}".encode())


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def error_object(error: Exception) -> Mapping[str, Any]:
    """The body of an error: the wrong fields where there are some, else a sentence."""
    fields = error.fields if isinstance(error, RequestError) else {}
    return {"message": fields or str(error)}
