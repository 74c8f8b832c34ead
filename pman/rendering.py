"""Spec + template → Document.

In a template ``{{ value }}`` is quoted for the template's language. What a filter of RAW_FILTERS
makes, and what ``super()``, a block or a macro of the same file renders, is left as it is: its
values were quoted where they were written.
"""

import fnmatch
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import yaml
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

import pman
from pman.errors import SettingsError, TemplateError
from pman.jobs import INCOMING, OUTGOING, Document, JobSpec
from pman.quoting import misplaced_words, shell_word

MAX_DOCUMENT = 4 << 20
"""Bytes of a document, at the most: Slurm's default max_script_size (slurm.conf(5))."""


@dataclass(frozen=True)
class Language:
    """A language that documents are written in."""

    folder: str
    ending: str
    word: Callable[[str], str]
    """One value as one word of the language."""


LANGUAGES = {"sbatch": Language("sbatch", ".sbatch.j2", shell_word)}


def shipped_templates() -> Path:
    """The folder of the shipped templates: in the wheel beside the code, in a checkout above it."""
    package = Path(pman.__file__).parent
    inside = package / "templates"
    return inside if inside.is_dir() else package.parent / "templates"


# The marks around each value that was quoted; new ones for each document, so none can be forged.
_marks: ContextVar[tuple[str, str]] = ContextVar("_marks")

RAW_FILTERS = frozenset({"raw"})


def _raw(value: object) -> str:
    return str(value)


def _fail(reason: str) -> NoReturn:
    raise TemplateError(reason)


def _minutes(value: int) -> str:
    """Minutes as Slurm's D-HH:MM:SS (sbatch(1), --time)."""
    days, rest = divmod(int(value), 24 * 60)
    return f"{days}-{rest // 60:02}:{rest % 60:02}:00"


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
    "with_env": _with_env,
    "on_host": _on_host,
    "enroot_image": _enroot_image,
}


class _Environment(ImmutableSandboxedEnvironment):
    """Quotes each ``{{ … }}`` for one language."""

    def __init__(self, language: Language, folders: Sequence[Path]) -> None:
        super().__init__(
            loader=jinja2.FileSystemLoader([folder / language.folder for folder in folders]),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            auto_reload=False,
        )
        self.language = language
        self.filters.update(_FILTERS, word=self._word)
        self.globals.update(fail=_fail)

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

    def _word(self, value: object) -> str:
        begin, end = _marks.get()
        if isinstance(value, jinja2.Undefined):
            return str(value)  # raises the error that names it; an `if` without `else` is nothing
        if isinstance(value, (list, tuple, Iterator)):
            return " ".join(self._word(item) for item in value)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError(f"a value is {value!r}, which can't be written as text")
        text = str(value)
        if begin in text:
            raise ValueError("a value is quoted already: write it with `| raw`")
        return f"{begin}{self.language.word(text)}{end}"


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


@dataclass(frozen=True)
class Site:
    """The content of SITE_FILE: what templates see as ``site``, before and after its rules."""

    values: Mapping[str, Any] = field(default_factory=dict)
    source: str = "SITE_FILE"

    @classmethod
    def load(cls, path: Path | None) -> "Site":
        """Raises SettingsError when the file can't be read or is not the YAML it should be."""
        if path is None:
            return cls()
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"SITE_FILE {path} can't be read: {error}") from None
        except yaml.YAMLError as error:
            raise SettingsError(f"SITE_FILE {path} is no valid YAML: {error}") from None
        site = cls(values if values is not None else {}, str(path))
        site._check()
        return site

    def _check(self) -> None:
        if not isinstance(self.values, dict):
            raise SettingsError(f"{self.source}: it must be a mapping, such as `partition: debug`")
        for key, kind, example in (
            ("rules", list, "- match: {gpu: true}\n  set: {partition: gpu}"),
            ("images", dict, "docker.io/fnndsc/*: /containers/plugin.sif"),
            ("directives", list, "- --exclusive"),
        ):
            if not isinstance(self.values.get(key, kind()), kind):
                raise SettingsError(f"{self.source}: `{key}` must look like\n{example}")
        if "image" in self.values:
            raise SettingsError(f"{self.source}: `image` is pman's own; map images under `images`")
        for number, rule in enumerate(self.values.get("rules", []), 1):
            if (
                not isinstance(rule, dict)
                or not isinstance(rule.get("match"), dict)
                or not isinstance(rule.get("set"), dict)
                or set(rule) != {"match", "set"}
            ):
                raise SettingsError(
                    f"{self.source}: rule {number} must have `match` and `set`, each a mapping"
                )
            if unknown := set(rule["match"]) - {"image", "gpu"}:
                raise SettingsError(
                    f"{self.source}: rule {number} matches by {sorted(unknown)}; "
                    "`image` (a pattern) and `gpu` (true or false) are known"
                )
        rules = [rule["match"] for rule in self.values.get("rules", [])]
        for pattern in [*self.values.get("images", {}), *(rule.get("image", "") for rule in rules)]:
            if not isinstance(pattern, str):
                raise SettingsError(
                    f"{self.source}: the image pattern {pattern!r} is no text: put it in quotes"
                )

    def sample_image(self) -> str:
        """An image that SITE_FILE maps, if it maps any: some runtimes can't run another one."""
        return next(
            (re.sub(r"[*?\[\]]", "x", key) for key in self.values.get("images", {})), "image"
        )

    def for_job(self, spec: JobSpec) -> dict[str, Any]:
        """The values for one job: those of the rules that match it laid over the others."""
        values = {key: value for key, value in self.values.items() if key != "rules"}
        for rule in self.values.get("rules", []):
            match = rule["match"]
            if ("image" not in match or fnmatch.fnmatchcase(spec.image, match["image"])) and (
                "gpu" not in match or match["gpu"] == (spec.gpu_limit > 0)
            ):
                values |= rule["set"]
        values["image"] = next(
            (
                target
                for pattern, target in values.get("images", {}).items()
                if fnmatch.fnmatchcase(spec.image, pattern)
            ),
            None,
        )
        return values


class Renderer:
    """Renders specs by the templates of the given folders; the first folder that has one wins.

    Templates are read once, when they are first used.
    """

    def __init__(self, templates_dir: Path | None = None, site: Site | None = None) -> None:
        if templates_dir is not None and not templates_dir.is_dir():
            raise SettingsError(f"TEMPLATES_DIR {templates_dir} is not a folder")
        folders = [*([templates_dir] if templates_dir else []), shipped_templates()]
        self.site = site or Site()
        self._environments = {
            name: _Environment(language, folders) for name, language in LANGUAGES.items()
        }

    def names(self, language: str) -> list[str]:
        """The names of the templates of a language."""
        ending = LANGUAGES[language].ending
        found = self._environments[language].list_templates()
        return [name.removesuffix(ending) for name in found if name.endswith(ending)]

    def render(self, spec: JobSpec, language: str, template: str) -> Document:
        """The document for ``spec``.

        Raises TemplateError, with the template's file and line where there is one.
        """
        environment = self._environments[language]
        marks = _new_marks()
        token = _marks.set(marks)
        try:
            text = environment.get_template(f"{template}{LANGUAGES[language].ending}").render(
                job=spec, site=self.site.for_job(spec)
            )
        except jinja2.TemplateNotFound as error:
            known = ", ".join(self.names(language))
            raise TemplateError(
                f"there is no {language} template {error.name!r}; there are: {known}"
            ) from None
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{error.name}, line {error.lineno}: {error.message}") from None
        except TemplateError:
            raise
        except Exception as error:  # whatever an operator's expression raises
            raise TemplateError(f"{_place(error)}{error}") from error
        finally:
            _marks.reset(token)
        if _stray_mark(text, marks):
            raise TemplateError(
                f"{template}: text with quoted values in it was changed by a filter: "
                "use the filter on each value, before it is quoted"
            )
        for wrong in misplaced_words(text, *marks):
            line = text.split("\n")[wrong.line - 1]
            raise TemplateError(
                f"{template}: a value stands inside {wrong.where} in line {wrong.line} of the "
                f"document, `{_plain(line, marks).strip()}`: write it outside of them "
                "(it is quoted already), or into a variable first"
            )
        text = _plain(text, marks)
        if len(text.encode()) > MAX_DOCUMENT:
            raise TemplateError(
                f"the document is {len(text.encode())} bytes long; {MAX_DOCUMENT} are the most"
            )
        return Document(text, language, template)


def _new_marks() -> tuple[str, str]:
    nonce = secrets.token_hex(8)
    return f"\x02{nonce}", f"\x03{nonce}"


def _plain(text: str, marks: tuple[str, str]) -> str:
    return re.sub("|".join(map(re.escape, marks)), "", text)


def _stray_mark(text: str, marks: tuple[str, str]) -> bool:
    begin, end = map(re.escape, marks)
    return re.search("[\x02\x03]", re.sub(f"{begin}[^\x02\x03]*{end}", "", text)) is not None


def _place(error: Exception) -> str:
    """The template's file and line that an error came from."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file.endswith(".j2"):
            place = f"{Path(file).name}, line {trace.tb_lineno}: "
        trace = trace.tb_next
    return place
