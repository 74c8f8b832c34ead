"""SITE_FILE: the values that templates see as ``site``, and the rules that choose for some jobs."""

import dataclasses
import fnmatch
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from pman import yaml_lines
from pman.errors import SiteError
from pman.jobs import JobSpec
from pman.yaml_lines import Problem


@dataclass(frozen=True)
class Rule:
    """What holds for the jobs that fit each of its matches; an empty one fits every job."""

    image: tuple[str, ...] = ()
    """Patterns of fnmatch; one of them is to fit."""
    gpu: bool | None = None
    type: tuple[str, ...] = ()
    auid: tuple[str, ...] = ()
    """Patterns of the ChRIS user's name."""
    values: Mapping[str, Any] = field(default_factory=dict)
    template: str = ""
    """The template's name, without folder and ending; empty: the rule chooses none."""
    line: int = 0
    """Where it stands in SITE_FILE."""

    @classmethod
    def of(cls, content: Mapping[str, Any], line: int) -> Self:
        """The rule of SITE_FILE's content, which was checked."""
        match = content["match"]
        patterns = {name: many(match.get(name, ())) for name in ("image", "type", "auid")}
        return cls(
            **patterns,
            gpu=match.get("gpu"),
            values=content.get("set", {}),
            template=content.get("template", ""),
            line=line,
        )

    def matches(self, spec: JobSpec) -> bool:
        return (
            (not self.image or _fits(spec.image, self.image))
            and self.gpu in (None, spec.gpu_limit > 0)
            and (not self.type or spec.type in self.type)
            and (not self.auid or _fits(spec.auid, self.auid))
        )

    def sample(self, spec: JobSpec) -> JobSpec:
        """``spec``, changed where it must be for this rule to match it."""
        changes: dict[str, Any] = {}
        if self.image and not _fits(spec.image, self.image):
            changes["image"] = example(self.image[0])
        if self.gpu not in (None, spec.gpu_limit > 0):
            changes["gpu_limit"] = int(spec.gpu_limit == 0)
        if self.type and spec.type not in self.type:
            changes["type"] = self.type[0]
        if self.auid and not _fits(spec.auid, self.auid):
            changes["auid"] = example(self.auid[0])
        return dataclasses.replace(spec, **changes)


def many(value: str | Iterable[str]) -> tuple[str, ...]:
    """One text, or several, as several."""
    return (value,) if isinstance(value, str) else tuple(value)


def _fits(text: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns)


def example(pattern: str) -> str:
    """A text that a pattern of fnmatch fits.

    Raises ValueError when there is none, such as for ``[z-a]``.
    """
    # The same parts that fnmatch.translate finds: a `[` that no `]` ends is itself.
    parts: list[str] = re.findall(r"\[!?+\]?+[^\]]*+\]|.", pattern, re.S)
    return "".join(_example_part(part) for part in parts)


def _example_part(part: str) -> str:
    if len(part) == 1:
        return "x" if part in "*?" else part
    for character in f"x{string.printable}{part}é":
        if fnmatch.fnmatchcase(character, part):
            return character
    raise ValueError(f"no text fits {part!r}")


@dataclass(frozen=True)
class Site:
    """The content of SITE_FILE: what templates see as ``site``, before and after its rules."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """Without ``rules`` and ``schema``."""
    rules: tuple[Rule, ...] = ()
    warnings: tuple[SiteError, ...] = ()
    """What can be meant as it is, and is more likely a slip."""

    @classmethod
    def parse(cls, text: str, source: str = "SITE_FILE") -> Self:
        """The site that a YAML text describes.

        Raises SiteError with all its ``problems``.
        """
        from pman import site_schema  # slow to import, and not needed without a SITE_FILE

        content = yaml_lines.read(text)
        values = {} if content.value is None else content.value
        rows = ["", *yaml_lines.rows(text)]

        def errors(found: Iterable[Problem]) -> list[SiteError]:
            in_order = sorted(set(found))
            return [SiteError(reason, source, line, rows[line]) for line, reason in in_order]

        if problems := errors([*content.problems, *site_schema.problems(values, content.lines)]):
            first = problems[0]
            raise SiteError(first.reason, source, first.line, first.text, problems)
        return cls(
            {key: value for key, value in values.items() if key not in ("rules", "schema")},
            tuple(
                Rule.of(rule, content.lines["rules", number])
                for number, rule in enumerate(values.get("rules", []))
            ),
            tuple(errors(site_schema.near_misses(values, content.lines))),
        )

    def for_job(self, spec: JobSpec) -> dict[str, Any]:
        """The values for one job: those of the rules that match it laid over the others."""
        values = dict(self.values)
        for rule in self.rules:
            if rule.matches(spec):
                values |= rule.values
        values["image"] = next(
            (
                target
                for pattern, target in values.get("images", {}).items()
                if fnmatch.fnmatchcase(spec.image, pattern)
            ),
            None,
        )
        return values

    def template_for(self, spec: JobSpec) -> str:
        """The template that the last matching rule with one names; empty: none does."""
        names = [rule.template for rule in self.rules if rule.template and rule.matches(spec)]
        return names[-1] if names else ""

    def sample_image(self) -> str:
        """An image that SITE_FILE maps, if it maps any: some runtimes can't run another one."""
        return next((example(pattern) for pattern in self.values.get("images", {})), "image")
