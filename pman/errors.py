"""One tree of errors. Each knows the HTTP status it becomes and whether trying again can help.

    PmanError
    ├── SettingsError     the service is set up wrongly: it does not start
    ├── SourceError       something that the operator wrote is wrong, at a file and line
    │   ├── SiteError     SITE_FILE is not what it should be
    │   ├── TemplateError 400  a template cannot be used, or cannot render this job
    │   │   └── Refusal   400  a template refuses this job on purpose
    │   └── WorkerLost    503  whoever renders was ended from outside: nothing is wrong with either
    ├── RequestError      400  the request can never work as it is
    │   ├── NotFound      404  no such job
    │   ├── Conflict      409  the jid is taken by another job
    │   └── TooLarge      413  the body is over the bound
    ├── StoreError        503  STATE_DIR can't be used now: nothing was changed there
    └── EngineError            what a driver or the shell below it may raise
        ├── Rejected      final: the engine said no, in words for the user
        ├── Unavailable   503  nothing happened; the same call may work later
        └── Ambiguous     503  it may or may not have happened: look before a second try

A message is a sentence for the person who meets it: it names the value and the remedy.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

_SHOWN, _TOLD = 200, 2000
"""Characters of an offending line, and of a reason, at the most: a template may make long ones."""


class PmanError(Exception):
    """Root of every error that pman raises on purpose."""

    http_status: ClassVar[int] = 500
    retry_helps: ClassVar[bool] = False


class SettingsError(PmanError):
    """A setting, or what it points to, is wrong; pman does not start with it."""


class SourceError(PmanError):
    """Something that the operator wrote is wrong.

    ``file``, ``line`` (0: not known) and ``text``, the offending line itself, say where.
    """

    def __init__(self, reason: str, file: str = "", line: int = 0, text: str = "") -> None:
        place = f"{file}, line {line}: " if line else f"{file}: " if file else ""
        reason, text = reason[:_TOLD], text[:_SHOWN]
        super().__init__(f"{place}{reason}{f': `{text.strip()}`' if text else ''}")
        self.reason = reason
        self.file = file
        self.line = line
        self.text = text


class SiteError(SourceError):
    """SITE_FILE can't be read, or is not what it should be.

    ``problems`` has an error for each thing that is wrong; the message is a line for each.
    """

    def __init__(
        self,
        reason: str,
        file: str = "",
        line: int = 0,
        text: str = "",
        problems: Sequence["SiteError"] = (),
    ) -> None:
        super().__init__(reason, file, line, text)
        self.problems = tuple(problems) or (self,)

    def __str__(self) -> str:
        return "\n".join(str(problem.args[0]) for problem in self.problems)


class TemplateError(SourceError):
    """A template is missing or broken, or can't render this job."""

    http_status = 400


class Refusal(TemplateError):
    """A template refuses this job on purpose, by ``fail``."""


class WorkerLost(SourceError):
    """The process that renders was ended from outside, more than once. Try again later."""

    http_status = 503
    retry_helps = True


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


class StoreError(PmanError):
    """The database can't be used now, such as on a full disk; what it held stays as it was."""

    http_status = 503
    retry_helps = True


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
