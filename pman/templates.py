"""The templates and SITE_FILE in use: always the last ones that were found good.

What is on disk is looked at again and again. A change is tried as a whole, with sample jobs, before
the first real job meets it; until then, and for ever if it is broken, the last good ones stay. They
are also kept in STATE_DIR, so a restart during the night does not depend on them.
"""

import logging
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pman.drivers import ENGINES
from pman.errors import Refusal, SiteError, SourceError, TemplateError
from pman.jobs import Document, JobSpec
from pman.request import JobRequest
from pman.samples import Sample
from pman.settings import Settings
from pman.sources import Sources, read
from pman.worker import Worker

log = logging.getLogger(__name__)

LOOK_AGAIN = 0.4
"""Seconds between two looks at the files. A change counts when two looks have seen the same: an
editor may be in the middle of writing."""

TRY_AGAIN = 60.0
"""Seconds after which what was found broken is tried again: it may have been an accident."""

HANGS = 20.0
"""Seconds after which a look that has not ended is told as a problem."""


@dataclass(frozen=True)
class Problem:
    """Why what is on disk is not in use."""

    since: datetime
    error: SourceError


@dataclass(frozen=True)
class _Tried:
    """What was tried last."""

    sources: Sources
    error: SourceError | None
    at: float
    """In time.monotonic()."""

    def holds(self, sources: Sources) -> bool:
        """Whether there is no need to try ``sources``."""
        fresh = self.error is None or time.monotonic() - self.at < TRY_AGAIN
        return fresh and self.sources == sources


class Templates:
    """What jobs are rendered by; safe for use by several threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kept = settings.state_dir / "last-good.json"
        self._rendering = threading.Lock()
        self._worker: Worker | None = None
        self._good = Sources()
        self._seen: Sources | None = None
        self._tried: _Tried | None = None
        self._problem: Problem | None = None
        self._looking_since: float | None = None
        self._over = threading.Event()
        # A daemon: a disk that hangs must not keep the server from ending.
        self._looker = threading.Thread(target=self._look, name="templates", daemon=True)
        self.loaded_at: datetime | None = None

    def load(self) -> None:
        """Begin with what is on disk or, if that is broken, with what was good last time.

        Raises SourceError when there is nothing good.
        """
        kept = _kept(self._kept)
        try:
            self._try(self._read_soon(), kept or Sources())
        except SourceError as wrong:
            if kept is None:
                raise
            try:
                self._try(kept, kept)
            except SourceError:
                raise wrong from None
            self._note(wrong)

    def watch(self) -> None:
        """From now on use what is changed on disk, once it was found good."""
        self._looker.start()

    def refresh(self) -> None:
        """Look at the files once more."""
        self._note(self._news())

    @property
    def problem(self) -> Problem | None:
        """What is wrong with what is on disk; None: it is in use."""
        since = self._looking_since
        seconds = 0.0 if since is None else time.monotonic() - since
        if self._problem is None and seconds > HANGS:
            return Problem(datetime.now(UTC) - timedelta(seconds=seconds), _hangs(self._settings))
        return self._problem

    def render(self, spec: JobSpec, check: bool = False) -> Document:
        """The document that the engine is sent for ``spec``; with ``check`` it is checked in its
        language.

        Raises TemplateError, and WorkerLost.
        """
        with self._rendering:
            assert self._worker is not None, "load() comes first"
            return render_by(self._worker, self._settings, spec, check=check)

    def close(self) -> None:
        self._over.set()
        if self._looker.is_alive():
            self._looker.join(5)
        with self._rendering:
            if self._worker is not None:
                self._worker.close()
                self._worker = None

    def _look(self) -> None:
        while not self._over.wait(LOOK_AGAIN):
            try:
                self.refresh()
            except Exception:  # a defect must not end the looks
                log.exception("the look at the templates met an error that it does not know")

    def _read_soon(self) -> Sources:
        """What is on disk, unless the disk hangs."""
        found: list[Sources | SourceError] = []

        def look() -> None:
            try:
                found.append(_read(self._settings))
            except SourceError as error:
                found.append(error)

        looker = threading.Thread(target=look, daemon=True)
        looker.start()
        looker.join(HANGS)
        if not found:
            raise _hangs(self._settings)
        if isinstance(found[0], SourceError):
            raise found[0]
        return found[0]

    def _news(self) -> SourceError | None:
        """What is wrong with what is on disk now, as far as it is known."""
        self._looking_since = time.monotonic()
        try:
            sources = _read(self._settings)
        except SourceError as unreadable:
            return unreadable
        finally:
            self._looking_since = None
        if self._tried is not None and self._tried.holds(sources):
            return self._tried.error
        if sources != self._seen:
            self._seen = sources
            return self._problem.error if self._problem else None
        try:
            self._try(sources, self._good)
        except SourceError as error:
            return error
        return None

    def _try(self, sources: Sources, before: Sources) -> None:
        """Use ``sources`` if they are good. Raises SourceError."""
        try:
            _not_vanished(self._settings, sources, before)
            worker = tried_out(sources, self._settings)
        except SourceError as error:
            self._tried = _Tried(sources, error, time.monotonic())
            raise
        self._tried = _Tried(sources, None, time.monotonic())
        for warning in worker.warnings:
            log.warning("%s", warning)
        with self._rendering:
            used, self._worker = self._worker, worker
        if used is not None:
            used.close()
            log.info("the changed templates are in use")
        self._good = sources
        self.loaded_at = datetime.now(UTC)
        _keep(self._kept, sources)

    def _note(self, error: SourceError | None) -> None:
        known = self._problem
        if error is None:
            if known is not None:
                log.warning("what is on disk is in use again")
            self._problem = None
        elif known is None or str(known.error) != str(error):
            log.error("the last good templates stay in use: %s", error)
            self._problem = Problem(known.since if known else datetime.now(UTC), error)


def _read(settings: Settings) -> Sources:
    return read(settings.templates_dir, settings.site_file)


def _hangs(settings: Settings) -> TemplateError:
    return TemplateError(
        f"TEMPLATES_DIR {settings.templates_dir} and SITE_FILE {settings.site_file} could not be "
        f"looked at within {HANGS:g} s: does their disk hang?"
    )


def _not_vanished(settings: Settings, sources: Sources, before: Sources) -> None:
    """Raises SourceError where there was something, and is nothing: a disk that is not mounted, or
    a file that was cut off."""
    mend = "and it is empty: is the disk mounted, and not full? If it is to be empty, unset"
    if settings.templates_dir and before.templates and not sources.templates:
        name = f"TEMPLATES_DIR {settings.templates_dir}"
        raise TemplateError(f"it had templates, {mend} TEMPLATES_DIR and start pman again", name)
    if settings.site_file and (before.site or "").strip() and not (sources.site or "").strip():
        reason = f"it had values, {mend} SITE_FILE and start pman again"
        raise SiteError(reason, sources.site_file)


def render(settings: Settings, spec: JobSpec, template: str = "") -> Document:
    """The document for ``spec`` by what is on disk now. Raises SourceError."""
    with Worker(_read(settings)) as worker:
        return render_by(worker, settings, spec, template, check=True)


def tried_out(sources: Sources, settings: Settings) -> Worker:
    """A worker for ``sources`` that has rendered a document of each kind, and checked it.

    Raises SourceError: ``sources`` can't be used as they are.
    """
    worker = Worker(sources)
    try:
        worker.compile(ENGINES[settings.container_env].language)
        for sample in worker.samples(plain_spec(settings)):
            _try(worker, settings, sample)
    except BaseException:
        worker.close()
        raise
    return worker


def _try(worker: Worker, settings: Settings, sample: Sample) -> None:
    try:
        render_by(worker, settings, sample.spec, sample.template, check=True)
    except Refusal:
        if sample.plain:
            raise
    except TemplateError as error:
        reason = f"{error.reason} (tried with {sample.what})"
        raise TemplateError(reason, error.file, error.line, error.text) from None


def render_by(
    worker: Worker, settings: Settings, spec: JobSpec, template: str = "", check: bool = False
) -> Document:
    """The document for ``spec`` by the sources of ``worker``. Raises TemplateError."""
    return worker.render(spec, *_language_and_default(settings), template, check)


def probe_by(worker: Worker, settings: Settings, sample: Sample) -> Document:
    """The document of a job that looks at its node as ``sample`` would meet it."""
    return worker.probe(sample.spec, *_language_and_default(settings), sample.template)


def _language_and_default(settings: Settings) -> tuple[str, str]:
    name = settings.container_env
    engine = ENGINES[name]
    return (
        engine.language,
        settings.template.get(name) or settings.template.get("") or engine.template,
    )


def plain_spec(settings: Settings) -> JobSpec:
    """The least job, with what the settings give to every job."""
    return JobRequest(
        jid="sample",
        args=[],
        auid="sample",
        number_of_workers=1,
        cpu_limit=1000,
        memory_limit=200,
        gpu_limit=0,
        image="sample",
        entrypoint=["true"],
        type="ds",
        input_dir="in",
        output_dir="out",
    ).spec(settings)


def _kept(path: Path) -> Sources | None:
    """What was good last time, if it is known."""
    try:
        return Sources.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _keep(path: Path, sources: Sources) -> None:
    """Write the file whole or not at all; without it pman only can't start from it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = path.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(sources.to_json(), encoding="utf-8")
        new.replace(path)
    except OSError as error:
        log.warning("the templates in use can't be kept for the next start: %s", error)
