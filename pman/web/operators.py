"""What people at a terminal ask of a running server: which jobs there are, and all about one."""

import re
import shlex
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from aiohttp import web
from multidict import MultiMapping

from pman.errors import RequestError
from pman.jobs import Job, JobState
from pman.web.api import GATEWAY

LIMIT = 100
"""How many jobs are listed where `limit` is not given."""

MOST = 1000
"""How many jobs are listed at the most."""

routes = web.RouteTableDef()


@routes.get("/jobs/")
async def list_jobs(request: web.Request) -> web.Response:
    limit, states, auid = listing(request.query)
    jobs, total = await request.app[GATEWAY].newest(limit, states, auid)
    return web.json_response({"jobs": [job_line(job) for job in jobs], "total": total})


@routes.get("/jobs/{jid:[^/]+}/")
async def show_job(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    job, log = await gateway.read(request.match_info["jid"])
    return web.json_response(
        {
            **job_line(job),
            "cmd": shlex.join(job.spec.argv),
            "notes": dict(job.notes),
            "history": [
                {"at": _iso(event.at), "state": event.state, "message": event.message}
                for event in await gateway.history(job)
            ],
            "document": {
                "text": job.document.text,
                "language": job.document.language,
                "template": job.document.template,
            },
            "log": log,
        }
    )


def job_line(job: Job) -> Mapping[str, Any]:
    """What a list tells of a job."""
    return {
        "jid": job.jid,
        "state": job.state,
        "status": job.state.chris,
        "engine": job.engine,
        "engine_id": job.engine_id,
        "template": job.document.template,
        "auid": job.spec.auid,
        "image": job.spec.image,
        "message": job.message,
        "accepted_at": _iso(job.accepted_at),
        "started_at": _iso(job.started_at),
        "ended_at": _iso(job.ended_at),
        "generation": job.generation,
    }


def listing(query: MultiMapping[str]) -> tuple[int, list[JobState], str | None]:
    """Limit, states (none: all) and user (None: all) that ``query`` asks for.

    Raises RequestError that names every wrong parameter.
    """
    wrong = {
        name: "is unknown; there are: state, auid, limit"
        for name in query
        if name not in {"state", "auid", "limit"}
    }
    for name in ("auid", "limit"):
        if len(query.getall(name, [])) > 1:
            wrong[name] = "is given more than once"
    states = query.getall("state", [])
    if unknown := [state for state in states if state not in [*JobState]]:
        wrong["state"] = f"{unknown[0]!r} is no state; there are: {', '.join(JobState)}"
    limit = query.get("limit", str(LIMIT))
    if not (re.fullmatch("[0-9]{1,4}", limit) and 1 <= int(limit) <= MOST):
        wrong["limit"] = f"{limit!r} is no whole number from 1 to {MOST}"
    if wrong:
        raise RequestError("the query is wrong", wrong)
    return int(limit), [JobState(state) for state in states], query.get("auid")


def _iso(time: datetime | None) -> str | None:
    return time.isoformat() if time else None
