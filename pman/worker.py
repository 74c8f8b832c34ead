"""A process of its own for what operators wrote: a template that loops for ever, or eats all the
memory, costs one job its document and the server nothing.

``python -m pman.worker`` reads lines of JSON and answers each with one: first the sources, then the
calls. It ends with its standard input. It has nothing of pman's environment, which holds secrets.
"""

import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn, Self

from pman.errors import Refusal, SiteError, SourceError, TemplateError, WorkerLost
from pman.jobs import Document, JobSpec
from pman.rendering import Renderer
from pman.samples import Sample, samples
from pman.site import Site
from pman.sources import Sources

CPU_SECONDS = 2
"""Seconds of computing for one document, at the most; a usual one takes a few milliseconds."""

MEMORY = 1 << 30
"""Bytes of address space, at the most."""

_INHERITED = ("PATH", "LD_LIBRARY_PATH")
"""What Python and bash need of the environment."""

_ANSWER_SECONDS = 60
"""Seconds for an answer on a machine that is busy with other things."""


class WorkerDied(TemplateError):
    """The process ended in the middle of a call, by one of its bounds."""


class _Ended(Exception):
    """The process ended in the middle of a call, and not by a bound of its own."""


class Worker:
    """Renders by ``sources``. Its calls are for one thread at a time.

    Raises SiteError when SITE_FILE is wrong.
    """

    warnings: Sequence[str]
    """What is doubtful in SITE_FILE."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._process = self._started()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def compile(self, language: str) -> None:
        """Raises TemplateError for the first of the site's own templates that is none."""
        self._call("compile", language)

    def samples(self, spec: JobSpec) -> list[Sample]:
        """Variants of ``spec``."""
        answer = self._call("samples", dataclasses.asdict(spec))
        return [Sample(**sample | {"spec": _spec(sample["spec"])}) for sample in answer]

    def render(
        self, spec: JobSpec, language: str, default: str, chosen: str = "", check: bool = False
    ) -> Document:
        """The document for ``spec`` by the template ``chosen``, else by the one that SITE_FILE's
        rules choose, else by ``default``; with ``check`` it is checked in its language.

        Raises TemplateError.
        """
        values = dataclasses.asdict(spec)
        return Document(**self._call("render", values, language, default, chosen, check))

    def probe(self, spec: JobSpec, language: str, default: str, chosen: str = "") -> Document:
        """As ``render``, but what it runs in the place of the plugin looks at its node.

        Raises TemplateError.
        """
        return Document(**self._call("probe", dataclasses.asdict(spec), language, default, chosen))

    def close(self) -> None:
        _end(self._process)

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            env={name: os.environ[name] for name in _INHERITED if name in os.environ}
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self.warnings = _exchange(process, self._sources.to_json())
        except BaseException as error:
            _end(process)
            if isinstance(error, WorkerDied):  # so far it has read SITE_FILE, and nothing else
                raise SiteError(error.reason, self._sources.site_file) from None
            if isinstance(error, _Ended):
                raise _lost(error) from None
            raise
        return process

    def _call(self, name: str, *args: Any) -> Any:
        line = json.dumps([name, *args])
        try:
            return _exchange(self._living(), line)
        except _Ended:  # it happens to one in a night, hardly to its successor
            try:
                return _exchange(self._living(), line)
            except _Ended as error:
                raise _lost(error) from None

    def _living(self) -> subprocess.Popen[bytes]:
        if self._process.poll() is not None:
            self.close()
            self._process = self._started()
        return self._process


def _end(process: subprocess.Popen[bytes]) -> None:
    # Closes the pipes and waits for its end; what was not sent any more is lost with it.
    with contextlib.suppress(BrokenPipeError), process:
        process.kill()


def _lost(error: _Ended) -> WorkerLost:
    return WorkerLost(f"the process that renders was ended from outside ({error}); try again")


def _exchange(process: subprocess.Popen[bytes], line: str) -> Any:
    """Raises the error that the other side met, or why there is no answer."""
    assert process.stdin and process.stdout
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    bound = threading.Timer(_ANSWER_SECONDS, stop)
    bound.daemon = True
    bound.start()
    try:
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = b""
    finally:
        bound.cancel()
    if not answer:
        process.kill()
        raise _why(process.wait(), late.is_set())
    result, error = json.loads(answer)
    if error is not None:
        raise _error(*error)
    return result


def _error(kind: str, told: dict[str, Any], problems: list[dict[str, Any]]) -> SourceError:
    if kind == SiteError.__name__:
        return SiteError(**told, problems=[SiteError(**problem) for problem in problems])
    return {"Refusal": Refusal}.get(kind, TemplateError)(**told)


def _why(code: int, late: bool) -> Exception:
    """Why a process ended that was to answer."""
    if late:
        return WorkerDied(f"it was stopped: no answer within {_ANSWER_SECONDS} s")
    if code == -signal.SIGXCPU:
        return WorkerDied(f"it was stopped: it takes more than {CPU_SECONDS} s")
    if code in (-signal.SIGSEGV, -signal.SIGABRT):
        return WorkerDied("it was stopped: it needs too much memory, or is nested too deeply")
    return _Ended(f"exit code {code}")


# --- the other side ---


class _Calls:
    """What can be called; arguments and answers are JSON."""

    def __init__(self, sources: Sources) -> None:
        site = Site() if sources.site is None else Site.parse(sources.site, sources.site_file)
        self.warnings = [str(warning) for warning in site.warnings]
        self._renderer = Renderer(sources.templates, site)

    def compile(self, language: str) -> None:
        self._renderer.compile(language)

    def samples(self, spec: dict[str, Any]) -> list[dict[str, Any]]:
        return [dataclasses.asdict(sample) for sample in samples(_spec(spec), self._renderer.site)]

    def render(
        self, values: dict[str, Any], language: str, default: str, chosen: str, check: bool
    ) -> dict[str, Any]:
        spec = _spec(values)
        template = self._template(spec, default, chosen)
        document = self._renderer.render(spec, language, template)
        if check:
            self._renderer.check(document)
        return dataclasses.asdict(document)

    def probe(
        self, values: dict[str, Any], language: str, default: str, chosen: str
    ) -> dict[str, Any]:
        spec = _spec(values)
        template = self._template(spec, default, chosen)
        document = self._renderer.render(spec, language, "probe", probed=template)
        return dataclasses.asdict(document)

    def _template(self, spec: JobSpec, default: str, chosen: str) -> str:
        return chosen or self._renderer.site.template_for(spec) or default


def _spec(values: dict[str, Any]) -> JobSpec:
    return JobSpec(**values | {"argv": tuple(values["argv"])})


class _TookTooLong(Exception):
    """Raised in the middle of a template, so that its line is known."""


def _too_long(number: int, frame: FrameType | None) -> NoReturn:
    raise _TookTooLong(f"it takes more than {CPU_SECONDS} s: does it loop for ever?")


def _bound_time() -> None:
    """For one call: first the exception; for what no exception stops, the end of the process."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + 2 * CPU_SECONDS)


def _limit(kind: int, amount: int) -> None:
    """Set the soft limit; a hard one that the process was started with stays."""
    _, most = resource.getrlimit(kind)
    amount = amount if most == resource.RLIM_INFINITY else min(amount, most)
    resource.setrlimit(kind, (amount, most))


def _answer(line: bytes, calls: _Calls | None) -> tuple[_Calls | None, Any]:
    if calls is None:
        calls = _Calls(Sources.from_json(line.decode()))
        return calls, calls.warnings
    name, *args = json.loads(line)
    return calls, getattr(calls, name)(*args)


def _told(error: SourceError) -> dict[str, Any]:
    return {name: getattr(error, name) for name in ("reason", "file", "line", "text")}


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the server, which ends this one
    signal.signal(signal.SIGPROF, _too_long)
    _limit(resource.RLIMIT_AS, MEMORY)
    calls: _Calls | None = None
    for line in sys.stdin.buffer:
        result, error = None, None
        _bound_time()
        try:
            calls, result = _answer(line, calls)
        except SiteError as wrong:
            error = "SiteError", _told(wrong), [_told(problem) for problem in wrong.problems]
        except SourceError as wrong:
            error = type(wrong).__name__, _told(wrong), []
        except (MemoryError, _TookTooLong) as wrong:
            place = "" if calls else Sources.from_json(line.decode()).site_file
            kind = "TemplateError" if calls else "SiteError"
            reason = str(wrong) or "it needs too much memory"
            error = kind, {"reason": reason, "file": place}, []
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(f"{json.dumps([result, error])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
