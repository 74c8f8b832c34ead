"""The part of Cromwell's REST API that pman uses: one session, bounded answers, errors in words.

Source: https://cromwell.readthedocs.io/en/stable/api/RESTAPI/
"""

import json
import re
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import HTTPBasicAuth
from requests.utils import get_environ_proxies, select_proxy
from urllib3.exceptions import (
    HTTPError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
)

from pman.errors import Ambiguous, EngineError, Rejected, Unavailable
from pman.wdl import TASK, WORKFLOW

LABEL = "org.chrisproject.pman.name"
"""The label by which a workflow is found; pman has always used this key."""

FINAL = frozenset({"Succeeded", "Failed", "Aborted"})
"""The statuses that a workflow keeps."""

CONNECT_SECONDS, ANSWER_SECONDS = 10, 20

LARGEST = 64 << 20
"""Bytes of an answer, at the most."""

ASKED = 500
"""Workflows in one query, at the most: Cromwell makes one condition of all, each nested in the one
before, and for thousands its stack may be too small."""

FIRST_TO_TAKE_IDS = 75
"""The first version that lets the client choose a workflow's id, so that submission can be
repeated."""

OPTIONS = {"read_from_cache": False, "write_to_cache": False}
"""An identical job must run, and not be called done, where an administrator turned caching on."""

_NO_CROMWELL = "is that a Cromwell? check CROMWELL_URL"
_AWAY = "does it run, and is CROMWELL_URL right?"
_NO_USER = "a proxy wants a user and password: put them into CROMWELL_URL"
_WRONG_USER = "are the user and password in CROMWELL_URL right?"
_NO_TRUST = "REQUESTS_CA_BUNDLE names the file of the authorities to trust"
_NO_TLS = "does it speak TLS? check CROMWELL_URL"
_PROXY = "are HTTP_PROXY and HTTPS_PROXY right? NO_PROXY names the hosts that need no proxy"
HINTS = (_NO_CROMWELL, _AWAY, _NO_USER, _WRONG_USER, _NO_TRUST, _NO_TLS, _PROXY)
"""What to do about an error: its message may end with one, after a semicolon."""

_WORKFLOWS = "/api/workflows/v1"
_SHOWN, _TOLD = 300, 1000
"""Characters of an answer in a message, and of a reason, at the most."""
_UNREACHABLE = "Cromwell unreachable"
_ODD = "Cromwell does not answer as it should"
_NOT_LATIN = "a user name or password of the proxy has characters that can't be sent"
_REFUSES = "Error(s)"
"""How a 400 of Cromwell begins that is about what was sent; its database's trouble is a 400 too."""

_ID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
"""A workflow's id."""


@dataclass(frozen=True)
class Workflow:
    """A workflow as a query lists it."""

    id: str
    status: str
    started_at: datetime | None = None
    ended_at: datetime | None = None
    submitted_at: datetime | None = None


@dataclass(frozen=True)
class Call:
    """What the metadata tell of the plugin's task, and why the workflow failed."""

    status: str = ""
    """Cromwell's executionStatus."""
    job_id: str = ""
    """The backend's own id: Slurm's."""
    return_code: int | None = None
    stdout: str = ""
    stderr: str = ""
    failure: str = ""
    """The deepest causes."""


@dataclass(frozen=True)
class Answer:
    status: int
    kind: str
    """Its content type."""
    text: str
    location: str = ""
    """Where a redirect points to."""

    def json(self) -> Any:
        """Raises ValueError."""
        try:
            return json.loads(self.text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    @property
    def told(self) -> bool:
        """Whether an error comes from Cromwell itself, and not from what stands before it."""
        try:
            found = self.json()
        except ValueError:
            return False
        return isinstance(found, dict) and found.get("status") in ("fail", "error")

    @property
    def message(self) -> str:
        """Cromwell's own words, or else the beginning of what came."""
        words = _text(self.json().get("message")) if self.told else ""
        words = words or re.sub(r"<[^>]*>", " ", self.text[: 100 * _SHOWN])
        return _said(words) or "nothing"


class _Session(requests.Session):
    """Follows no redirect: Cromwell has none, and a submission that is redirected is none."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


class CromwellServer:
    """Cromwell at ``url``. Every call may raise Unavailable."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.where = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self.host = parts.hostname or ""
        self.has_password = parts.password is not None
        self._closed = False
        self._session = _Session()
        if parts.username is not None:
            # From an address requests would send them as Latin-1, which not all of them are.
            user, password = (unquote_to_bytes(w or "") for w in (parts.username, parts.password))
            self._session.auth = HTTPBasicAuth(user, password)
        adapter = HTTPAdapter(pool_maxsize=10)  # the gateway's loops, and those who read logs
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        self._takes_ids = False

    def close(self) -> None:
        """Nothing is asked any more; a request that is under way ends by itself."""
        self._closed = True
        self._session.close()

    def version(self) -> str:
        """Such as ``92-abc1234``."""
        told = self._object(self._get("/engine/v1/version"))
        version = _said(told.get("cromwell"))
        if not version:
            raise self._no_cromwell("an answer without its version")
        return version

    def ailing(self) -> Mapping[str, str]:
        """The parts of it that it finds unwell itself, and why."""
        try:
            told = _mapping(self._exchange("GET", "/engine/v1/status").json())
        except ValueError:
            return {}
        return {
            _said(name): _said("; ".join(map(_text, _items(part.get("messages")))))
            for name, part in told.items()
            if _mapping(part).get("ok") is False
        }

    @property
    def takes_ids(self) -> bool:
        """Whether this version lets the client choose a workflow's id."""
        if not self._takes_ids:  # asked each time: a newer one may have come
            number = re.match(r"[0-9]+", self.version())
            self._takes_ids = number is None or int(number[0]) >= FIRST_TO_TAKE_IDS
        return self._takes_ids

    def submit(self, wdl: str, labels: Mapping[str, str], wanted_id: str) -> str:
        """The id of the new workflow: ``wanted_id`` where this version takes it.

        With ``wanted_id`` it may be done again: what was submitted already is not run twice.
        Raises Rejected and Ambiguous.
        """
        takes_ids = self.takes_ids
        parts = {
            "workflowSource": wdl,
            "workflowOptions": json.dumps(OPTIONS),
            "labels": json.dumps(dict(labels)),
            "workflowType": "WDL",
            "workflowTypeVersion": "1.0",
        }
        if takes_ids:
            parts["requestedWorkflowId"] = json.dumps(wanted_id)
        files = {name: (None, text.encode()) for name, text in parts.items()}
        try:
            answer = self._ask("POST", _WORKFLOWS, changes=True, files=files)
        except EngineError:
            self._takes_ids = False  # an older version may come back
            raise
        if answer.status == HTTPStatus.CREATED:
            return self._new_id(answer)
        if answer.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            raise Rejected(f"the job is too large for Cromwell or a proxy: {answer.message}")
        if answer.status == HTTPStatus.BAD_REQUEST and answer.told:
            return self._refused(answer, wanted_id if takes_ids else "")
        if answer.status < 400:
            raise Ambiguous(str(self._odd(answer)), _ODD)
        raise self._odd(answer)

    def _new_id(self, answer: Answer) -> str:
        try:
            found = answer.json()["id"]
        except (ValueError, TypeError, KeyError):
            found = None
        if not isinstance(found, str) or not _ID.fullmatch(found):
            raise Ambiguous(str(self._odd(answer)), _ODD)
        return found

    def _refused(self, answer: Answer, wanted_id: str) -> str:
        """What a 400 means."""
        words = answer.message
        if wanted_id and "already in use" in words and wanted_id in words:
            return wanted_id
        if wanted_id and "requestedWorkflowId" in words:
            self._takes_ids = False  # an older version has come back
            raise Unavailable(f"Cromwell at {self.where}: {words}", _ODD)
        if words.startswith(_REFUSES):
            raise Rejected(f"refused by Cromwell: {words}")
        raise Ambiguous(f"Cromwell at {self.where} can't keep the job: {words}", _ODD)

    def workflows(self, ids: Sequence[str]) -> Mapping[str, Workflow]:
        """Those of the workflows that Cromwell shows, by their ids: one request for each ASKED.

        A new one is not shown for the first seconds.
        """
        flows: dict[str, Workflow] = {}
        for some in _chunks(ids):  # without any filter it would be all that there are
            flows |= {flow.id: flow for flow in self._query([{"id": one} for one in some])}
        return flows

    def labelled(self, names: Sequence[str]) -> Mapping[str, str]:
        """The ids of the workflows whose LABEL is one of ``names``, by it: one request for each
        ASKED."""
        named: dict[str, str] = {}
        for some in _chunks(names):
            wanted = [{"labelor": f"{LABEL}:{name}"} for name in some]
            fields = {"additionalQueryResultFields": "labels"}
            for one in self._results(self._post_query([*wanted, fields])):
                named[_text(_mapping(one.get("labels")).get(LABEL))] = str(one["id"])
        return {name: id for name, id in named.items() if name in names}

    def newest(self, count: int, name: str = "") -> Sequence[Workflow]:
        """The ``count`` workflows that were submitted last: those of this ``name``, or whosever
        they are."""
        named = [{"name": name}] if name else []
        return self._query([*named, {"page": "1"}, {"pageSize": str(count)}])

    def call(self, workflow: str) -> Call | None:
        """What the metadata tell, those that are asked for alone; None: it is not known (yet).

        A site's own template may have other tasks: what is told of those is not the plugin's.
        """
        keys = "executionStatus backendStatus jobId returnCode stdout stderr failures".split()
        answer = self._get(
            f"{_WORKFLOWS}/{workflow}/metadata", params=[("includeKey", key) for key in keys]
        )
        if answer.status == HTTPStatus.NOT_FOUND and answer.told:
            return None
        told = self._object(answer)
        attempts = _items(_mapping(told.get("calls")).get(f"{WORKFLOW}.{TASK}"))
        last = _mapping(attempts[-1]) if attempts else {}
        code = last.get("returnCode")
        return Call(
            status=_said(last.get("executionStatus")),
            job_id=_text(last.get("jobId")),
            return_code=code if type(code) is int else None,
            stdout=_text(last.get("stdout")),
            stderr=_text(last.get("stderr")),
            failure="; ".join(dict.fromkeys(_deepest(told.get("failures"))))[:_TOLD],
        )

    def abort(self, workflow: str) -> str:
        """The status that it has then; empty: Cromwell knows none that could be aborted."""
        answer = self._ask("POST", f"{_WORKFLOWS}/{workflow}/abort")
        if answer.status == HTTPStatus.NOT_FOUND and answer.told:
            return ""
        status = _text(self._object(answer).get("status"))
        if not status:
            raise self._no_cromwell("an answer without a status")
        return status

    def describe(self, wdl: str) -> Sequence[str]:
        """What Cromwell's own parser finds wrong with a document; nothing is run."""
        parts = {"workflowSource": wdl, "workflowType": "WDL", "workflowTypeVersion": "1.0"}
        files = {name: (None, text.encode()) for name, text in parts.items()}
        told = self._object(self._ask("POST", "/api/womtool/v1/describe", files=files))
        if not isinstance(told.get("valid"), bool):
            raise self._no_cromwell("an answer without a verdict")
        if told["valid"]:
            return []
        errors = [_said(error, _TOLD) for error in _items(told.get("errors"))]
        return [error for error in errors if error] or ["it is not valid"]

    # --- requests ---

    def _get(self, path: str, **more: Any) -> Answer:
        return self._ask("GET", path, **more)

    def _post_query(self, filters: Sequence[Mapping[str, str]]) -> Mapping[str, Any]:
        # By POST: hundreds of ids are longer than an address may be.
        return self._object(self._ask("POST", f"{_WORKFLOWS}/query", json=filters))

    def _query(self, filters: Sequence[Mapping[str, str]]) -> Sequence[Workflow]:
        return [
            Workflow(
                result["id"],
                _said(result.get("status")),
                _time(result.get("start")),
                _time(result.get("end")),
                _time(result.get("submission")),
            )
            for result in self._results(self._post_query(filters))
        ]

    def _results(self, told: Mapping[str, Any]) -> list[dict[str, Any]]:
        results = told.get("results")
        if not isinstance(results, list):
            raise self._no_cromwell("an answer without results")
        found = [result for result in results if isinstance(result, dict)]
        return [result for result in found if _ID.fullmatch(_text(result.get("id")))]

    def _ask(self, method: str, path: str, changes: bool = False, **more: Any) -> Answer:
        """An answer that is no error of the server's own.

        Raises Unavailable, and Ambiguous if it ``changes`` something and may have done so.
        """
        answer = self._exchange(method, path, changes, **more)
        if answer.status >= 500 and changes:
            raise Ambiguous(str(self._odd(answer)), "Cromwell has an error of its own")
        if answer.status >= 500 or 300 <= answer.status < 400:
            raise self._odd(answer)
        return answer

    def _exchange(self, method: str, path: str, changes: bool = False, **more: Any) -> Answer:
        if self._closed:
            raise Unavailable(f"Cromwell at {self.where}: pman is shutting down")
        until = time.monotonic() + ANSWER_SECONDS
        try:
            with self._session.request(
                method,
                f"{self.where}{path}",
                headers={"Accept": "application/json"},
                timeout=(CONNECT_SECONDS, ANSWER_SECONDS),
                stream=True,
                **more,
            ) as response:
                data = bytearray()
                # What has come, and not whole pieces: those of a server that drips may take days.
                while piece := response.raw.read1(1 << 16, decode_content=True):
                    data += piece
                    if len(data) > LARGEST:
                        raise requests.RequestException(f"its answer is over {LARGEST} bytes long")
                    if time.monotonic() > until:
                        raise requests.ReadTimeout
                kind = _said(response.headers.get("Content-Type", "").partition(";")[0])
                to = _said(response.headers.get("Location"))
                return Answer(response.status_code, kind, data.decode(errors="replace"), to)
        # An OSError of its own is what requests has to say of a wrong REQUESTS_CA_BUNDLE.
        except (requests.RequestException, HTTPError, OSError) as error:
            raise self._away(error, changes) from error
        except UnicodeError:  # which would tell the password
            message = f"Cromwell at {self.where} can't be asked: {_NOT_LATIN}; {_PROXY}"
            raise Unavailable(message, _UNREACHABLE) from None

    def _object(self, answer: Answer) -> Mapping[str, Any]:
        try:
            told = answer.json()
        except ValueError:
            told = None
        if answer.status != HTTPStatus.OK or not isinstance(told, dict):
            raise self._odd(answer)
        return told

    # --- what went wrong, in words ---

    def _away(self, error: Exception, changes: bool) -> EngineError:
        never_sent, why, remedy = isinstance(error, requests.ConnectTimeout), _why(error), ""
        if isinstance(error, requests.exceptions.SSLError):
            # Other errors of TLS may come with the answer.
            never_sent = _is_about_trust(_innermost(error))
            remedy = f"; {_NO_TRUST if never_sent else _NO_TLS}"
        elif isinstance(error, requests.exceptions.ProxyError):  # the way there was never open
            proxy = select_proxy(self.where, get_environ_proxies(self.where)) or ""
            name = proxy.rpartition("@")[2].rpartition("//")[2]
            never_sent, why, remedy = True, f"the proxy {name} refuses: {why}", f"; {_PROXY}"
        elif type(error) is OSError:  # requests', before anything is sent
            never_sent, remedy = True, f"; {_NO_TRUST}"
        cause = error.args[0] if error.args else None
        if isinstance(cause, MaxRetryError) and isinstance(cause.reason, NewConnectionError):
            never_sent, remedy = True, f"; {_AWAY}"
        message = f"Cromwell at {self.where} can't be reached: {why}{remedy}"
        kind = Ambiguous if changes and not never_sent else Unavailable
        return kind(message, _UNREACHABLE)

    def _odd(self, answer: Answer) -> Unavailable:
        """For an answer that this call never gets from a Cromwell that is well."""
        status = f"{answer.status} {_phrase(answer.status)}".rstrip()
        kind = f" ({answer.kind})" if answer.kind and "json" not in answer.kind else ""
        if answer.location:
            kind += f" and points to {answer.location}"
        if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            hint = f"; {_WRONG_USER if self.has_password else _NO_USER}"
        elif answer.status >= 500 or answer.told:
            hint = ""
        else:
            hint = f"; {_NO_CROMWELL}"
        return Unavailable(
            f"Cromwell at {self.where} answers {status}{kind}: {answer.message}{hint}", _ODD
        )

    def _no_cromwell(self, what: str) -> Unavailable:
        return Unavailable(f"Cromwell at {self.where} gives {what}; {_NO_CROMWELL}", _ODD)


def _innermost(error: Exception) -> Exception:
    """The cause of causes: requests wraps it in its own and urllib3's."""
    while True:
        below = getattr(error, "reason", None) or (error.args[-1] if error.args else None)
        if isinstance(error, NameResolutionError) or not isinstance(below, Exception):
            return error
        error = below


def _why(error: Exception) -> str:
    inner = _innermost(error)
    if isinstance(inner, NameResolutionError):
        return "its name is not known"
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {CONNECT_SECONDS} s"
    if isinstance(inner, (requests.ReadTimeout, ReadTimeoutError)):
        return f"no whole answer within {ANSWER_SECONDS} s"
    return _said(re.sub(r"^.*\[Errno -?\d+\] ", "", str(inner) or type(inner).__name__))


def _is_about_trust(error: Exception) -> bool:
    return isinstance(error, ssl.SSLCertVerificationError) or (
        isinstance(error, ssl.SSLError) and error.reason == "NO_CERTIFICATE_OR_CRL_FOUND"
    )


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _deepest(failures: object) -> Iterable[str]:
    """The messages of the causes that have no cause themselves."""
    left = _items(failures)
    while left:
        failure = _mapping(left.pop(0))
        if causes := _items(failure.get("causedBy")):
            left = causes + left
        elif message := _said(failure.get("message"), _TOLD):
            yield message


def _said(value: object, length: int = _SHOWN) -> str:
    """``value`` for people, as one line: what a terminal would obey, or draw in another order, is
    written as an escape."""
    words = " ".join(_text(value).split())
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in words[:length]
    )[:length]


def _text(value: object) -> str:
    """``value`` if it is a string; of JSON's, those may hold halves of characters."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""


def _chunks(names: Sequence[str]) -> Iterable[Sequence[str]]:
    return (names[start : start + ASKED] for start in range(0, len(names), ASKED))


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _time(value: object) -> datetime | None:
    try:
        time = datetime.fromisoformat(_text(value))
        return time.astimezone(UTC) if time.tzinfo else None
    except (ValueError, OverflowError):
        return None
