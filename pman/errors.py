"""One tree of errors. Each knows the HTTP status it becomes and whether trying again can help.

    PmanError
    ├── SettingsError     the service is set up wrongly: it does not start
    ├── TemplateError     a template cannot be used, or cannot render this job
    ├── RequestError      400  the request can never work as it is
    │   ├── NotFound      404  no such job
    │   ├── Conflict      409  the jid is taken by another job
    │   └── TooLarge      413  the body is over the bound
    └── EngineError            what a driver or the shell below it may raise
        ├── Rejected      final: the engine said no, in words for the user
        ├── Unavailable   503  nothing happened; the same call may work later
        └── Ambiguous     503  it may or may not have happened: look before a second try

A message is a sentence for the person who meets it: it names the value and the remedy.
"""

from collections.abc import Mapping
from typing import ClassVar


class PmanError(Exception):
    """Root of every error that pman raises on purpose."""

    http_status: ClassVar[int] = 500
    retry_helps: ClassVar[bool] = False


class SettingsError(PmanError):
    """A setting, or what it points to, is wrong; pman does not start with it."""


class TemplateError(PmanError):
    """A template is missing, broken, or refuses this job."""

    http_status = 400


class RequestError(PmanError):
    """The request can never work. ``fields`` maps each wrong field to the reason, if any."""

    http_status = 400

    def __init__(self, message: str, fields: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.fields = dict(fields or {})


class NotFound(RequestError):
    http_status = 404


class Conflict(RequestError):
    http_status = 409


class TooLarge(RequestError):
    http_status = 413


class EngineError(PmanError):
    """What a driver may raise. ``summary`` is the short form for the ChRIS user, who can't mend it;
    the message has the details for the operator."""

    def __init__(self, message: str, summary: str = "") -> None:
        super().__init__(message)
        self.summary = summary or message


class Rejected(EngineError):
    """The engine refused this job for good. Its words reach the user."""

    http_status = 400


class Unavailable(EngineError):
    """The engine, or the way to it, is away and nothing was done. Try again later."""

    http_status = 503
    retry_helps = True


class Ambiguous(EngineError):
    """The command was handed over and no end was seen. Find the job before any second try."""

    http_status = 503
    retry_helps = True
