"""pfcon's JSON → JobSpec, or every wrong field named at once."""

import json
import posixpath
import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from pman.errors import RequestError, TooLarge
from pman.jobs import INCOMING, OUTGOING, JobSpec
from pman.settings import Settings, draw, parse_container_user

MAX_BODY = 1 << 20
"""Bytes of a request's body, at the most."""

MAX_ITEMS = 4096
"""Items of args, args_path_flags, entrypoint and env each, at the most."""

MAX_STRING = (128 << 10) - 1
"""Bytes of one argument, at the most: Linux's MAX_ARG_STRLEN (execve(2)), less the final NUL."""

MAX_NUMBER = 2**31 - 1

_JID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,511}", re.ASCII)
_ENV = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.ASCII | re.DOTALL)

_FOLDERS = ("input_dir", "output_dir")

_ENTRYPOINT_EMPTY = '"entrypoint" cannot be empty'
_ENV_WRONG = '"env" must be a list of "key=value" strings'
_SENTENCES = frozenset({_ENTRYPOINT_EMPTY, _ENV_WRONG})


def _carriable(text: str) -> str:
    if "\0" in text:
        raise ValueError(f"{_short(text)} has a NUL byte, which no command line can carry")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{_short(text)} has half a surrogate pair: it is no Unicode") from None
    if size > MAX_STRING:
        raise ValueError(f"{_short(text)} is {size} bytes long; {MAX_STRING} are the most")
    return text


def _jid(text: str) -> str:
    jid = text.lstrip("/")
    if not _JID.fullmatch(jid):
        raise ValueError(
            f"{_short(text)} can't name a job: use 1 to 200 letters, digits, '.', '_' and '-', "
            "beginning with a letter or a digit"
        )
    return jid


def _image(text: str) -> str:
    if not _IMAGE.fullmatch(text):
        raise ValueError(
            f"{_short(text)} is no image name: use one like ghcr.io/fnndsc/pl-simpledsapp:2.1.0"
        )
    return text


def _relative(text: str) -> str:
    _carriable(text)
    if text.startswith("/") or ".." in text.split("/"):
        raise ValueError(
            f"{_short(text)} leaves the store base: give a path relative to it, without '..'"
        )
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ValueError(f"{_short(text)} has a control character, which can't be mounted")
    path = posixpath.normpath(text)
    if path == ".":
        raise ValueError("is empty: give a folder below the store base")
    return path


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"{value} is no number")
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?\d+\s*", value, re.ASCII):
        raise ValueError(f"{_short(value)} is no whole number; give digits only, without a unit")
    return value


def _not_empty(words: list[str]) -> list[str]:
    if not words:
        raise ValueError(_ENTRYPOINT_EMPTY)
    if "=" in words[0]:
        raise ValueError(f"{_short(words[0])} has a '=': env(1) would take it for a variable")
    return words


def _assignment(text: str) -> str:
    name, equals, _ = text.partition("=")
    if not equals:
        raise ValueError(_ENV_WRONG)
    if not _ENV.fullmatch(text):
        raise ValueError(
            f"{_short(name)} is no name of an environment variable: use letters, digits and '_', "
            "not beginning with a digit"
        )
    return text


_Text = Annotated[str, AfterValidator(_carriable)]
_Words = Annotated[list[_Text], Field(max_length=MAX_ITEMS)]
_Optional = BeforeValidator(lambda value: [] if value is None else value)
_Number = Annotated[int, BeforeValidator(_number), Field(ge=0, le=MAX_NUMBER)]
_Path = Annotated[str, AfterValidator(_relative)]


class JobRequest(BaseModel):
    """The body of a POST, field by field as pfcon sends it. Unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, str_max_length=MAX_BODY)

    jid: Annotated[str, AfterValidator(_jid)]
    args: _Words
    args_path_flags: Annotated[_Words, _Optional] = []
    auid: _Text
    number_of_workers: Annotated[_Number, Field(ge=1)]
    cpu_limit: _Number
    memory_limit: _Number
    gpu_limit: _Number
    image: Annotated[str, AfterValidator(_image)]
    entrypoint: Annotated[_Words, AfterValidator(_not_empty)]
    type: Literal["ds", "fs", "ts"]
    env: Annotated[
        list[Annotated[_Text, AfterValidator(_assignment)]],
        Field(max_length=MAX_ITEMS),
        _Optional,
    ] = []
    input_dir: _Path
    output_dir: _Path

    @property
    def content(self) -> str:
        """The request in its canonical form: equal for two requests for the same job."""
        return json.dumps(self.model_dump(), sort_keys=True, ensure_ascii=False)

    @property
    def argv(self) -> tuple[str, ...]:
        """The command that runs, paths as inside the container."""
        flags = frozenset(self.args_path_flags)
        words = list(self.entrypoint)
        localise = False
        for word in self.args:
            words.append(INCOMING if localise else word)
            localise = not localise and word in flags
        if self.type == "ds":
            words.append(INCOMING)
        return (*words, OUTGOING)

    def spec(self, settings: Settings) -> JobSpec:
        """The spec of this job, under a name that is used once.

        Raises RequestError when a folder is, holds or lies in JOBS_DIR: no job may read or write
        another one's script and exit file.
        """
        folders = {field: settings.storage / getattr(self, field) for field in _FOLDERS}
        jobs = settings.jobs_folder
        if wrong := {
            field: f"{getattr(self, field)!r} meets JOBS_DIR, which is pman's own"
            for field, folder in folders.items()
            if folder.is_relative_to(jobs) or jobs.is_relative_to(folder)
        }:
            raise RequestError("some fields are wrong", wrong)
        uid, gid = parse_container_user(settings.container_user)
        limited = not settings.ignore_limits
        env = dict(pair.split("=", 1) for pair in self.env)
        if settings.enable_home_workaround:
            env["HOME"] = "/tmp"
        name = f"{self.jid}.{secrets.token_hex(4)}"
        return JobSpec(
            jid=self.jid,
            name=name,
            auid=self.auid,
            type=self.type,
            image=self.image,
            argv=self.argv,
            env=env,
            labels=dict(settings.job_labels),
            **{field: str(folder) for field, folder in folders.items()},
            folder=str(settings.jobs_folder / name),
            number_of_workers=self.number_of_workers,
            cpu_limit=self.cpu_limit or None if limited else None,
            memory_limit=self.memory_limit or None if limited else None,
            gpu_limit=self.gpu_limit,
            time_limit=settings.timelimit_minutes,
            uid=draw(uid),
            gid=draw(gid),
            shm_size=settings.shm_size,
        )


def parse(body: bytes) -> JobRequest:
    """The request in ``body``.

    Raises TooLarge over MAX_BODY bytes, and RequestError for malformed JSON or wrong fields, every
    wrong field in its ``fields``.
    """
    if len(body) > MAX_BODY:
        raise TooLarge(f"the body is {len(body)} bytes long; {MAX_BODY} are the most")
    try:
        data: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise RequestError(f"the body must be a JSON object, not a {type(data).__name__}")
    try:
        return JobRequest.model_validate(data)
    except ValidationError as error:
        fields: dict[str, str] = {}
        for wrong in error.errors(include_url=False):
            fields.setdefault(str(wrong["loc"][0]), _reason(wrong))
    # pman answered these two as a sentence, not as a field.
    if len(fields) == 1 and (sentences := _SENTENCES & set(fields.values())):
        raise RequestError(min(sentences))
    raise RequestError("some fields are wrong", fields)


_REASONS = {
    "missing": "is required",
    "string_type": "must be a string, not {got}",
    "string_unicode": "has half a surrogate pair: it is no Unicode",
    "int_parsing_size": "{got} is too large",
    "finite_number": "must be a whole number",
    "list_type": "must be a list, not {got}",
    "int_type": "must be a whole number, not {got}",
    "int_from_float": "must be a whole number, not {got}",
    "greater_than_equal": "{got} is too small: {ge} is the least",
    "less_than_equal": "{got} is too large: {le} is the most",
    "too_long": "has {actual_length} items; {max_length} are the most",
    "literal_error": "{got} is not one of {expected}",
}


def _reason(wrong: ErrorDetails) -> str:
    if wrong["type"] == "value_error":
        return str(wrong["ctx"]["error"])
    where = f"item {wrong['loc'][1]}: " if len(wrong["loc"]) > 1 else ""
    if wrong["loc"][0] == "env" and wrong["type"] in {"string_type", "list_type"}:
        return _ENV_WRONG
    text = _REASONS.get(wrong["type"], wrong["msg"])
    return where + text.format(got=_short(wrong["input"]), **wrong.get("ctx", {}))


def _short(value: object) -> str:
    if isinstance(value, (list, dict)):  # perhaps nested too deeply to be written out
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
