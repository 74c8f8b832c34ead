"""The aiohttp application: routes, errors as JSON, redirects to the slashed path, health."""

import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

import pman
from pman.drivers import ENGINES
from pman.errors import PmanError
from pman.gateway import Gateway
from pman.request import MAX_BODY
from pman.settings import Settings
from pman.store import Store
from pman.templates import Templates
from pman.web import api, operators
from pman.web.api import GATEWAY, Handler

log = logging.getLogger(__name__)

routes = web.RouteTableDef()

OPEN = frozenset({"/health/"})
"""The paths that need no API_TOKEN."""


def make_gateway(settings: Settings) -> Gateway:
    """A gateway as the settings say. Raises SettingsError."""
    driver = ENGINES[settings.container_env].make(settings)
    return Gateway(settings, Store(settings.state_dir), driver, Templates(settings))


def make_app(gateway: Gateway) -> web.Application:
    """The application; the gateway starts and stops with it."""
    app = web.Application(
        middlewares=[errors_as_json, slash_appended, token_checked],
        client_max_size=MAX_BODY,
    )
    app[GATEWAY] = gateway
    app.add_routes(api.routes)
    app.add_routes(operators.routes)
    app.add_routes(routes)
    app.cleanup_ctx.append(_run_gateway)
    return app


async def _run_gateway(app: web.Application) -> AsyncIterator[None]:
    try:
        await app[GATEWAY].start()
        yield
    finally:
        await app[GATEWAY].stop()


@routes.get("/health/")
async def health(request: web.Request) -> web.Response:
    """200 while pman itself works; an outage of the engine is told, not hidden, and so is that the
    templates on disk are not those in use."""
    gateway = request.app[GATEWAY]
    outage = gateway.outage
    broken = "ok" if gateway.templates.problem is None else "templates broken"
    return web.json_response(
        {
            "status": broken if outage is None else "engine unavailable",
            "version": pman.__version__,
            "engine": gateway.engine,
            "outage": None
            if outage is None
            else {"since": outage.since.isoformat(), "reason": outage.reason},
            "templates": _templates(gateway.templates, api.trusted(request)),
            "jobs": await gateway.counts(),
            "removing": await gateway.removing(),
        }
    )


def _templates(templates: Templates, trusted: bool) -> Mapping[str, Any]:
    """The operator's own words are for those who may see jobs: SITE_FILE may have more in it."""
    problem = templates.problem
    told = problem and {
        "since": problem.since.isoformat(),
        "file": problem.error.file,
        "line": problem.error.line,
        **({"text": problem.error.text, "message": str(problem.error)} if trusted else {}),
    }
    loaded = templates.loaded_at
    return {"loaded_at": loaded.isoformat() if loaded else None, "problem": told}


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error as the contract's JSON; an unknown one as a 500 without its insides."""
    try:
        return await handler(request)
    except PmanError as error:
        return web.json_response(api.error_object(error), status=error.http_status)
    except web.HTTPRedirection:
        raise
    except web.HTTPException as error:
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        text = error.text or error.reason
        text = error.reason if text.startswith(f"{error.status}:") else text
        return web.json_response({"message": text}, status=error.status, headers=headers)
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return web.json_response(
            {"message": "pman met an error of its own; its log says which"}, status=500
        )


@web.middleware
async def slash_appended(request: web.Request, handler: Handler) -> web.StreamResponse:
    """308 to the path with a slash, where only that one is known; the method stays."""
    if isinstance(request.match_info.http_exception, web.HTTPNotFound) and not (
        request.path.endswith("/")
    ):
        slashed = request.rel_url.with_path(
            f"{request.rel_url.raw_path}/", encoded=True, keep_query=True
        )
        probe = await request.app.router.resolve(request.clone(rel_url=slashed))
        if not isinstance(probe.http_exception, web.HTTPNotFound):
            raise web.HTTPPermanentRedirect(slashed)
    return await handler(request)


@web.middleware
async def token_checked(request: web.Request, handler: Handler) -> web.StreamResponse:
    """401 for all but the open paths without API_TOKEN, where it is set."""
    if request.path not in OPEN and not api.trusted(request):
        return web.json_response(
            {"message": "send the header `Authorization: Bearer <API_TOKEN>`"},
            status=401,
            headers={"WWW-Authenticate": "Bearer"},
        )
    return await handler(request)
