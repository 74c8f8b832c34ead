"""YAML text → plain values, the line of each, and all that is wrong with the text.

Values are those that JSON has too: text, numbers, true, false, null, lists and mappings from text.
What YAML 1.1 reads in a way that its author seldom means is a problem here, not a value: a key that
stands twice, a date, and a number that is not written as it is printed (``0123``, ``1.10``,
``12:30:00``).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

MAX_SIZE = 1 << 20
"""Characters of a text, at the most."""

MAX_VALUES = 100_000
"""Values of a text, at the most; one that aliases name counts each time."""

MAX_DEPTH = 50
"""Lists and mappings inside of each other, at the most."""

Path = tuple[str | int, ...]
"""Where a value stands: the keys and the positions (from 0) that lead to it."""


class Problem(NamedTuple):
    """What is wrong in a line; line 0 is the text as a whole."""

    line: int
    reason: str


@dataclass(frozen=True)
class Content:
    """What a text holds. With a problem the values are as near as can be to what was meant."""

    value: Any = None
    lines: Mapping[Path, int] = field(default_factory=dict)
    """The line of each value of a mapping (of its key), and of each item of a list; from 1."""
    problems: tuple[Problem, ...] = ()


def rows(text: str) -> list[str]:
    """The lines as YAML counts them (YAML 1.1, 5.4)."""
    return re.split("\r\n|[\n\r\x85\u2028\u2029]", text)


def read(text: str) -> Content:
    """All that ``text`` holds. It is never an exception: what can't be read is a problem."""
    if len(text) > MAX_SIZE:
        return _unreadable(0, f"it is longer than {MAX_SIZE} characters")
    try:
        return _Reader(text).content()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        return _unreadable(line, f"it is no valid YAML: {error.problem or error.context}")
    except yaml.reader.ReaderError as error:
        line = len(rows(text[: error.position]))
        return _unreadable(
            line, f"it is no valid YAML: the character {chr(error.character)!r} is not allowed"
        )
    except RecursionError:
        return _unreadable(0, "it is nested too deeply, or an alias stands inside of what it names")
    except _TooManyValues:
        return _unreadable(0, f"it has more than {MAX_VALUES} values, those of aliases included")


def _unreadable(line: int, reason: str) -> Content:
    return Content(problems=(Problem(line, reason),))


class _TooManyValues(Exception):
    pass


_TAG = "tag:yaml.org,2002:"
_SHOWN = 60  # characters of a value, in a message
_COLLECTIONS = {f"{_TAG}seq", f"{_TAG}map"}
_SCALARS = {f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null")}


class _Reader:
    def __init__(self, text: str) -> None:
        self.loader = yaml.SafeLoader(text)
        self.lines: dict[Path, int] = {}
        self.problems: dict[Problem, None] = {}  # what aliases name is met again
        self.values = 0

    def content(self) -> Content:
        root = self.loader.get_single_node()
        value = None if root is None else self.value(root, ())
        return Content(value, self.lines, tuple(self.problems))

    def problem(self, node: yaml.Node, reason: str) -> None:
        self.problems[Problem(_line(node), reason)] = None

    def count(self) -> None:
        self.values += 1
        if self.values > MAX_VALUES:
            raise _TooManyValues

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.count()
        if len(path) > MAX_DEPTH:
            raise RecursionError  # as the parser itself does for a deeper one
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if node.tag not in _COLLECTIONS:
            self.problem(node, f"the tag {_plain(node.tag)} has no meaning here")
        if isinstance(node, yaml.MappingNode):
            values = {}
            for key, item in self.pairs(node):
                at = (*path, key.value)
                self.lines[at] = _line(key)
                values[key.value] = self.value(item, at)
            return values
        items = []
        for number, item in enumerate(node.value):
            self.lines[*path, number] = _line(item)
            items.append(self.value(item, (*path, number)))
        return items

    def pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        """Those that ``<<`` merges go first, so that the mapping's own are laid over them."""
        own: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
        for key, item in node.value:
            self.count()
            if key.tag == f"{_TAG}merge":
                # Of several the first counts (https://yaml.org/type/merge.html).
                several = isinstance(item, yaml.SequenceNode)
                for merged in reversed(item.value if several else [item]):
                    if isinstance(merged, yaml.MappingNode):
                        yield from self.pairs(merged)
                    else:
                        self.problem(key, "`<<` merges mappings only")
            elif not isinstance(key, yaml.ScalarNode):
                self.problem(key, "a key must be text")
            else:
                if key.tag != f"{_TAG}str":
                    self.problem(key, f"the key {key.value!r} is no text: put it in quotes")
                if key.value in own:
                    line = _line(own[key.value][0])
                    self.problem(key, f"{key.value!r} stands in line {line} already")
                own[key.value] = (key, item)
        yield from own.values()

    def scalar(self, node: yaml.ScalarNode) -> Any:
        """The value, or the text that was written where YAML makes something else of it."""
        written = node.value
        if node.tag == f"{_TAG}str":
            return written
        shown = written if len(written) <= _SHOWN else f"{written[:_SHOWN]}…"
        if node.tag not in _SCALARS:
            self.problem(
                node, f"`{shown}` is read as a {_plain(node.tag)} by YAML: put it in quotes"
            )
            return written
        try:
            value = self.loader.construct_object(node)
            printed = written if value is None or isinstance(value, bool) else str(value)
        except (ValueError, KeyError, IndexError):
            self.problem(
                node, f"`{shown}` can't be read as {_plain(node.tag)} by YAML: put it in quotes"
            )
            return written
        if printed != written:
            self.problem(
                node,
                f"`{shown}` is read as the number {printed[:_SHOWN]} by YAML: put it in quotes",
            )
            return written
        return value


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _plain(tag: str) -> str:
    return tag.removeprefix(_TAG)
