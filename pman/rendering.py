"""Spec + template → Document.

In a template ``{{ value }}`` is quoted for the template's language. What a filter of RAW_FILTERS
makes, and what ``super()``, a block or a macro of the same file renders, is left as it is: its
values were quoted where they were written.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

import pman
from pman.errors import Refusal, TemplateError
from pman.jobs import INCOMING, OUTGOING, Document, JobSpec
from pman.languages import LANGUAGES, Language
from pman.quoting import Misplaced
from pman.site import Site
from pman.sources import read as read_sources
from pman.wdl import split_folders, unquoted

MAX_DOCUMENT = 4 << 20
"""Bytes of a document, at the most: Slurm's default max_script_size (slurm.conf(5))."""

_MARKED = 2
"""How much longer than the document its text is, at the most, before the marks are taken out."""

SHIPPED = "shipped/"
"""Begins the name of a shipped template that a site's own of the same name hides."""


def shipped_templates() -> Path:
    """The folder of the shipped templates: in the wheel beside the code, in a checkout above it."""
    package = Path(pman.__file__).parent
    inside = package / "templates"
    return inside if inside.is_dir() else package.parent / "templates"


@dataclass(frozen=True)
class _Marks:
    """What stands around each value that was quoted, and the quoted values themselves.

    They are new for each document, so none can be forged.
    """

    begin: str
    end: str
    words: set[str] = field(default_factory=set)

    @classmethod
    def new(cls) -> "_Marks":
        nonce = secrets.token_hex(8)
        return cls(f"\x02{nonce}", f"\x03{nonce}")

    def around(self, word: str) -> str:
        self.words.add(word)
        return f"{self.begin}{word}{self.end}"

    def off(self, text: str) -> str:
        return text.replace(self.begin, "").replace(self.end, "")

    def check(self, text: str) -> None:
        """Raises ValueError when what is marked is not what was quoted."""
        rest = re.sub(
            f"{self.begin}([^\x02\x03]*){self.end}",
            lambda found: "" if found[1] in self.words else found[0],
            text,
        )
        if re.search("[\x02\x03]", rest):
            raise ValueError(
                "text with quoted values in it was changed by a filter: use the filter on each "
                "value, before it is quoted (or the template has the character \\x02 or \\x03)"
            )


_marks: ContextVar[_Marks] = ContextVar("_marks")

RAW_FILTERS = frozenset({"raw"})


def _raw(value: object) -> str:
    return str(value)


def _fail(reason: str) -> NoReturn:
    raise Refusal(reason)


def _minutes(value: int) -> str:
    """Minutes as Slurm's D-HH:MM:SS (sbatch(1), --time)."""
    days, rest = divmod(int(value), 24 * 60)
    return f"{days}-{rest // 60:02}:{rest % 60:02}:00"


_UNITS = {"bytes": -20, "K": -10, "M": 0, "G": 10, "T": 20}
"""Powers of two from MiB to each unit."""


def _mib_to(value: int, unit: str) -> int:
    """MiB in another unit, rounded up to a whole number: a limit never gets smaller."""
    if unit not in _UNITS:
        raise ValueError(f"{unit!r} is no unit of memory; there are: {', '.join(_UNITS)}")
    power = _UNITS[unit]
    return int(value) << -power if power < 0 else -(-int(value) >> power)


def _with_env(argv: Iterable[str], env: Mapping[str, str], **defaults: str) -> list[str]:
    """The command that runs ``argv`` with these variables: by env(1), which evaluates nothing."""
    settings = [f"{name}={value}" for name, value in {**defaults, **env}.items()]
    return [*(["env", *settings] if settings else []), *argv]


def _on_host(argv: Iterable[str], job: JobSpec) -> list[str]:
    """Arguments that are one of the mounted folders, or a path below, as the node's own path."""
    folders = {INCOMING: job.input_dir, OUTGOING: job.output_dir}

    def real(word: str) -> str:
        for mount, folder in folders.items():
            if word == mount or word.startswith(f"{mount}/"):
                return folder + word.removeprefix(mount)
        return word

    return [real(word) for word in argv]


def _enroot_image(image: str) -> str:
    """``image`` in enroot's way: ``REGISTRY#IMAGE`` (enroot import)."""
    registry, slash, rest = image.partition("/")
    if not slash or not (set(".:") & set(registry) or registry == "localhost"):
        return image
    return rest if registry == "docker.io" else f"{registry}#{rest}"


_FILTERS: Mapping[str, Callable[..., object]] = {
    "raw": _raw,
    "duration": _minutes,
    "mib_to": _mib_to,
    "with_env": _with_env,
    "on_host": _on_host,
    "enroot_image": _enroot_image,
    "unquoted": unquoted,
}


class _Environment(ImmutableSandboxedEnvironment):
    """Quotes each ``{{ … }}`` for one language, whose ``templates`` are given by name."""

    def __init__(self, language: Language, templates: Mapping[str, str]) -> None:
        super().__init__(
            loader=jinja2.FunctionLoader(
                lambda name: (templates[name], name, None) if name in templates else None
            ),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            auto_reload=False,
        )
        self.language = language
        self.filters.update(_FILTERS, word=self._word)
        self.globals.update(fail=_fail, split_folders=split_folders)

    def _generate(
        self,
        source: nodes.Template,
        name: str | None,
        filename: str | None,
        defer_init: bool = False,
    ) -> str:
        macros = {macro.name for macro in source.find_all(nodes.Macro)}
        for output in source.find_all(nodes.Output):
            output.nodes = [
                node if _is_text(node, macros) else _filtered(node, "word") for node in output.nodes
            ]
        return super()._generate(source, name, filename, defer_init)

    @jinja2.pass_context  # or Jinja would quote a constant once, when it compiles the template
    def _word(self, _: jinja2.runtime.Context, value: object) -> str:
        return self._quoted(value)

    def _quoted(self, value: object) -> str:
        marks = _marks.get()
        if isinstance(value, jinja2.Undefined):
            return str(value)  # raises the error that names it; an `if` without `else` is nothing
        if isinstance(value, (list, tuple, Iterator)):
            return " ".join(self._quoted(item) for item in value)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError(f"a value is {value!r}, which can't be written as text")
        if marks.begin in str(value):
            raise ValueError("a value is quoted already: write it with `| raw`")
        return marks.around(self.language.word(value))


def _is_text(node: nodes.Expr, macros: Iterable[str]) -> bool:
    """Whether what ``node`` renders is part of the document as it is."""
    if isinstance(node, nodes.TemplateData):
        return True
    if isinstance(node, nodes.Filter):
        return node.name in RAW_FILTERS
    if not isinstance(node, nodes.Call):
        return False
    called = node.node
    if isinstance(called, nodes.Getattr):
        return isinstance(called.node, nodes.Name) and called.node.name == "self"
    return isinstance(called, nodes.Name) and called.name in {"super", "caller", *macros}


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Renderer:
    """Renders specs by a site's own ``templates``, each by its path such as
    ``sbatch/mine.sbatch.j2``, and by the shipped ones.

    A site's own template hides a shipped one of the same name, which can still be extended as
    ``shipped/NAME``.
    """

    def __init__(
        self, templates: Mapping[str, str] | None = None, site: Site | None = None
    ) -> None:
        self.site = site or Site()
        shipped = _shipped()
        self._templates: dict[str, Mapping[str, str]] = {}
        self._own: dict[str, list[str]] = {}
        for name, language in LANGUAGES.items():
            ours = _below(shipped, language.folder)
            own = _below(templates or {}, language.folder)
            hidden = {f"{SHIPPED}{path}": text for path, text in ours.items()}
            self._templates[name] = {**hidden, **ours, **own}
            self._own[name] = sorted(own)
        self._environments = {
            name: _Environment(language, self._templates[name])
            for name, language in LANGUAGES.items()
        }

    def names(self, language: str) -> list[str]:
        """The names of the templates of a language."""
        ending = LANGUAGES[language].ending
        return sorted(
            path.removesuffix(ending)
            for path in self._templates[language]
            if path.endswith(ending) and "/" not in path
        )

    def compile(self, language: str) -> None:
        """Read every one of the site's own templates, used or not.

        Raises TemplateError for the first with an error of syntax.
        """
        for path in self._own[language]:
            with self._places(language):
                self._environments[language].get_template(path)

    def render(self, spec: JobSpec, language: str, template: str, **names: str) -> Document:
        """The document for ``spec``; in the template ``names`` are known beside job and site.

        Raises TemplateError, with the template's file and line where there is one, and Refusal if
        the template refuses this job on purpose.
        """
        file = f"{template}{LANGUAGES[language].ending}"
        marks = _Marks.new()
        token = _marks.set(marks)
        try:
            with self._places(language):
                text = _bounded(
                    self._environments[language]
                    .get_template(file)
                    .generate(job=spec, site=self.site.for_job(spec), **names)
                )
        except Refusal as refusal:
            raise Refusal(marks.off(refusal.reason)) from None
        finally:
            _marks.reset(token)
        path = f"{LANGUAGES[language].folder}/{file}"
        try:
            marks.check(text)
        except ValueError as error:
            raise TemplateError(str(error), path) from None
        settled = LANGUAGES[language].settled(text, marks.begin, marks.end)
        if isinstance(settled, Misplaced):
            line = text.split("\n")[settled.line - 1]
            raise TemplateError(
                f"a value stands inside {settled.where} in line {settled.line} of the document: "
                f"{settled.remedy}",
                path,
                text=marks.off(line),
            )
        if len(settled.encode()) > MAX_DOCUMENT:
            raise _too_long()
        return Document(settled, language, template)

    def check(self, document: Document) -> None:
        """Raises TemplateError when ``document`` is wrong in its language."""
        language = LANGUAGES[document.language]
        complaint = language.check(document.text)
        if complaint is None:
            return
        file = f"{language.folder}/{document.template}{language.ending}"
        if not complaint.line:
            raise TemplateError(complaint.reason, file)
        lines = document.text.split("\n")
        raise TemplateError(
            f"{complaint.reason} (line {complaint.line} of the document)",
            file,
            text=lines[min(complaint.line, len(lines)) - 1],
        )

    @contextmanager
    def _places(self, language: str) -> Iterator[None]:
        """Whatever Jinja or an operator's expression raises becomes a TemplateError."""
        try:
            yield
        except jinja2.TemplateNotFound as error:
            known = ", ".join(self.names(language))
            raise TemplateError(
                f"there is no {language} template {error.name!r}; there are: {known}",
                *self._place(language, error),
            ) from None
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                str(error.message), *self._at(language, error.name or "", error.lineno)
            ) from None
        except TemplateError:
            raise
        except RecursionError as error:
            raise TemplateError(
                "it extends, includes or calls itself without end; the shipped template of the "
                f"same name is `{SHIPPED}NAME`",
                *self._place(language, error),
            ) from None
        except MemoryError as error:
            raise TemplateError("it needs too much memory", *self._place(language, error)) from None
        except Exception as error:
            raise TemplateError(str(error), *self._place(language, error)) from error

    def _place(self, language: str, error: Exception) -> tuple[str, int, str]:
        """The template, its line and the line's text that an error came from."""
        file, line = "", 0
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename in self._templates[language]:
                file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
            trace = trace.tb_next
        return self._at(language, file, line)

    def _at(self, language: str, name: str, line: int) -> tuple[str, int, str]:
        if not name:
            return "", 0, ""
        lines = self._templates[language].get(name, "").splitlines()
        text = lines[line - 1] if 0 < line <= len(lines) else ""
        return f"{LANGUAGES[language].folder}/{name}", line, text


@cache
def _shipped() -> Mapping[str, str]:
    return read_sources(shipped_templates(), None).templates


def _below(templates: Mapping[str, str], folder: str) -> dict[str, str]:
    start = f"{folder}/"
    return {
        path.removeprefix(start): text for path, text in templates.items() if path.startswith(start)
    }


def _bounded(pieces: Iterable[str]) -> str:
    parts, length = [], 0
    for piece in pieces:
        parts.append(piece)
        length += len(piece)
        if length > _MARKED * MAX_DOCUMENT:
            raise _too_long()
    return "".join(parts)


def _too_long() -> TemplateError:
    return TemplateError(f"the document is longer than {MAX_DOCUMENT} bytes")
