"""pfcon's REST contract, to the letter: five calls below ``/api/v1/``."""

import hmac
import re
import shlex
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

import pman
from pman.errors import RequestError, TooLarge
from pman.gateway import Gateway
from pman.jobs import Document, Job, Verdict
from pman.request import MAX_BODY

GATEWAY = web.AppKey("gateway", Gateway)

routes = web.RouteTableDef()

_JOB = "/api/v1/{jid:/*[^/]+}/"

_FLAGS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(
    ("false", "0", "no", "off"), False
)


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


def preview_object(document: Document, verdict: Verdict | None) -> Mapping[str, Any]:
    """The answer to a dry run."""
    return {
        "document": document.text,
        "language": document.language,
        "template": document.template,
        "verdict": verdict
        and {
            "accepted": verdict.accepted,
            "message": verdict.message,
            "start": verdict.start.isoformat() if verdict.start else None,
            "partition": verdict.partition,
            "nodes": verdict.nodes,
            "warnings": verdict.warnings,
        },
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
    gateway = request.app[GATEWAY]
    # sbatch's own --test-only submits nothing either, so it is a dry run by itself.
    test_only = _flag(request, "test_only")
    if _flag(request, "dry_run") or test_only:
        job = await gateway.preview(body)
        verdict = await gateway.verdict(job) if test_only else None
        return web.json_response(preview_object(job.document, verdict))
    job = await gateway.accept(body)
    return web.json_response(job_object(job, ""), status=201)


def _flag(request: web.Request, name: str) -> bool:
    """A yes or no of the query; what is neither must not become a real job."""
    given = [
        (key, value)
        for key, value in request.query.items()
        if re.sub("[-_]", "", key.lower()) == name.replace("_", "")
    ]
    if not given:
        return False
    key, text = given[0]
    value = _FLAGS.get(text.lower())
    if key != name or value is None or len(given) > 1:
        wrong = "&".join(f"{key}={text}" for key, text in given)
        raise RequestError(f"{wrong!r} is not understood: write {name}=true or {name}=false")
    return value


@routes.get(_JOB)
async def get_job(request: web.Request) -> web.Response:
    job, logs = await request.app[GATEWAY].read(request.match_info["jid"].lstrip("/"))
    return web.json_response(job_object(job, logs))


@routes.delete(_JOB)
async def delete_job(request: web.Request) -> web.Response:
    await request.app[GATEWAY].delete(request.match_info["jid"].lstrip("/"))
    return web.Response(status=204)


def trusted(request: web.Request) -> bool:
    """Whether ``request`` carries API_TOKEN as a bearer token (RFC 6750), where it is set."""
    token = request.app[GATEWAY].settings.api_token
    given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
    return not token or hmac.compare_digest(given, f"Bearer {token}".encode())


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def error_object(error: Exception) -> Mapping[str, Any]:
    """The body of an error: the wrong fields where there are some, else a sentence."""
    fields = error.fields if isinstance(error, RequestError) else {}
    return {"message": fields or str(error)}
