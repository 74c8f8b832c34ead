"""Ask a running server, once or again and again."""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any, Generic, TypeVar

import aiohttp
from pydantic import AfterValidator, AwareDatetime, BaseModel, ValidationError
from yarl import URL

from pman.errors import PmanError
from pman.jobs import JobState
from pman.settings import ClientSettings

TIMEOUT = 30.0
"""Seconds that an answer may take. The server itself waits for a log for 10 seconds."""

EVERY = 2.0
"""Seconds between two looks."""

LONGEST = 300
"""Characters of an unknown server's words that are repeated."""

REMEDY = "start one with `pman serve`, or give its address with --url or PMAN_URL"


def _for_a_clock(time: datetime) -> datetime:
    """``time``, if it is one here too: at the edges of the calendar it is only elsewhere."""
    try:
        time.astimezone()
    except OverflowError as error:
        raise ValueError(str(error)) from None
    return time


Time = Annotated[AwareDatetime, AfterValidator(_for_a_clock)]


class JobLine(BaseModel):
    """What a list tells of a job."""

    jid: str
    state: JobState
    status: str
    engine: str
    engine_id: str
    template: str
    auid: str
    image: str
    message: str
    accepted_at: Time | None
    started_at: Time | None
    ended_at: Time | None
    generation: int


class JobList(BaseModel):
    """The answer of ``GET /jobs/``."""

    jobs: Sequence[JobLine]
    total: int


class HistoryLine(BaseModel):
    at: Time
    state: JobState
    message: str


class DocumentText(BaseModel):
    text: str
    language: str
    template: str


class JobDetails(JobLine):
    """The answer of ``GET /jobs/JID/``."""

    cmd: str
    notes: Mapping[str, str] = {}
    history: Sequence[HistoryLine]
    document: DocumentText
    log: str


A = TypeVar("A", bound=BaseModel)


class Look(Generic[A]):
    """One answer: as the server gave it, and as this version understands it."""

    def __init__(self, raw: dict[str, Any], kind: type[A]) -> None:
        self.raw = raw
        self.answer = kind.model_validate(raw)


class ClientError(PmanError):
    """The server says no, or is no pman."""


class Away(PmanError):
    """There was no answer, or the server can't answer now."""

    retry_helps = True


async def ask(
    settings: ClientSettings,
    path: str,
    query: Sequence[tuple[str, str]],
    kind: type[A],
    patience: float = TIMEOUT,
) -> Look[A]:
    """What the server answers to a GET of ``path``, quoted, below its address.

    Raises Away where asking again may help, and ClientError where it does not.
    """
    url = settings.pman_url
    headers = {"Authorization": f"Bearer {settings.api_token}"} if settings.api_token else {}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=patience)) as session,
            session.get(
                URL(f"{url}{path}", encoded=True),
                params=query,
                headers=headers,
                allow_redirects=False,  # the token is for this address alone
            ) as response,
        ):
            body = await _body(response)
    except TimeoutError:
        raise Away(f"{url} has not answered within {patience:g} s: is it a pman?") from None
    except aiohttp.ClientConnectorCertificateError as error:
        raise ClientError(f"the certificate of {url} is not trusted: {error}") from None
    except aiohttp.ClientConnectorError as error:
        raise Away(f"no pman answers at {url}: {_reason(error.os_error)}; {REMEDY}") from None
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
        raise Away(f"{url} ended the connection: {error}") from None
    except aiohttp.ClientError as error:
        raise ClientError(f"{url} is no pman: {str(error)[:LONGEST]!r}; {REMEDY}") from None
    except ValueError as error:  # a token or a user of characters that HTTP can't carry
        raise ClientError(f"this can't be asked: {error}") from None
    if response.status != HTTPStatus.OK:
        raise _refusal(url, response, body, bool(settings.api_token))
    try:
        return Look(body, kind)
    except ValidationError:
        what = f"JSON without {' and '.join(kind.model_fields)}" if body else response.content_type
        raise ClientError(
            f"{url} is no pman of this version: it answers with {what}; {REMEDY}"
        ) from None


def _reason(error: OSError) -> str:
    """The system's words, where asyncio has put others into their place."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    return os.strerror(error.errno)


async def _body(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The JSON object; empty where there is none."""
    if response.content_type != "application/json":
        return {}
    try:
        body = await response.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _refusal(
    url: str, response: aiohttp.ClientResponse, body: dict[str, Any], with_token: bool
) -> PmanError:
    """What an answer other than 200 means."""
    words = body.get("message", "")
    if isinstance(words, dict):
        words = "; ".join(f"{name}: {reason}" for name, reason in words.items())
    words = str(words)
    status = f"{response.status} {response.reason or ''}".rstrip()
    if response.status == HTTPStatus.UNAUTHORIZED:
        if with_token:
            return ClientError(f"{url} refuses this API_TOKEN: set the server's")
        return ClientError(f"{url} wants a token: set API_TOKEN, in the environment or in .env")
    if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Away(f"{url} answers {status}{f': {words[:LONGEST]}' if words else ''}")
    if words and words != response.reason:
        return ClientError(words[:LONGEST])
    if response.status < HTTPStatus.BAD_REQUEST and "Location" in response.headers:
        there = response.headers["Location"][:LONGEST]
        return ClientError(f"{url} answers {status}, to {there}: give pman's own address")
    return ClientError(f"{url} is no pman of this version: it answers {status}; {REMEDY}")


async def looks(
    look: Callable[[], Awaitable[Look[A]]], every: float = EVERY
) -> AsyncGenerator[Look[A] | Away]:
    """What ``look`` gives, every so many seconds, for ever.

    Raises what ``look`` raises, but for an Away after the first answer: that is one of the looks.
    """
    yield await look()
    while True:
        await asyncio.sleep(every)
        try:
            seen: Look[A] | Away = await look()
        except Away as error:
            seen = error
        yield seen
