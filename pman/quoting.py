"""Values as words of a language, and where in a document such a word may stand.

Shell: a word is quoted so that it never holds a raw newline or any other control character. So it
can't leave a comment or an ``#SBATCH`` line either (bash(1), QUOTING).
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

_CONTROL = re.compile(r"[\x00-\x1f\x7f\u0080-\u009f\u2028\u2029]")


def shell_word(text: str) -> str:
    """``text`` as one word of bash.

    Raises ValueError for a NUL byte, which no word can hold.
    """
    if "\0" in text:
        raise ValueError(f"{text[:60]!r} has a NUL byte, which no command line can carry")
    if not _CONTROL.search(text):
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _CONTROL.sub(_octal, escaped) + "'"


def _octal(match: re.Match[str]) -> str:
    return "".join(f"\\{byte:03o}" for byte in match[0].encode())


@dataclass(frozen=True)
class Misplaced:
    """A value that stands where the shell would not read it as one word."""

    line: int
    where: str


_PLAIN = "plain text"
_COMMENT = "a comment"
_SINGLE = "single quotes"
_DOUBLE = "double quotes"
_DOLLAR = "$'…' quotes"
_HERE = "a here-document"

_KEEP, _POP = "keep", "pop"
_RULES = {
    _PLAIN: (
        (r"\\.", _KEEP),
        (r'"', _DOUBLE),
        (r"\$'", _DOLLAR),
        (r"'", _SINGLE),
        (r"\$?\(", _PLAIN),
        (r"\)", _POP),
        (r"(?<![^\s;&|(])#", _COMMENT),
        (r"<<<", _KEEP),
    ),
    _DOUBLE: ((r"\\.", _KEEP), (r'"', _POP), (r"\$\(", _PLAIN)),
    _SINGLE: ((r"'", _POP),),
    _DOLLAR: ((r"\\.", _KEEP), (r"'", _POP)),
    _COMMENT: ((r"(?=\n)", _POP),),
}
_SCANNERS = {
    place: re.compile("|".join(f"({pattern})" for pattern, _ in rules), re.DOTALL)
    for place, rules in _RULES.items()
}
_HEREDOC = re.compile(r"(?<![\d<])<<(-?)[ \t]*([\w'\"\\.-]+)")


def misplaced_words(text: str, begin: str, end: str) -> Iterator[Misplaced]:
    """Each value, marked by ``begin`` and ``end``, that stands inside quotes or a here-document.

    There its own quotes would be part of the text, or end the quotes around it. This follows
    bash's quoting well enough for that question: quotes, ``$'…'``, comments, command
    substitutions and here-documents (bash(1), QUOTING and REDIRECTION).
    """
    stack = [_PLAIN]
    awaited: list[re.Pattern[str]] = []  # the last lines of the here-documents that this line opens
    at = 0
    while at < len(text):
        place = stack[-1]
        if text.startswith(begin, at):
            if place not in (_PLAIN, _COMMENT):
                yield Misplaced(_line(text, at), place)
            at = text.index(end, at) + len(end)
        elif match := _SCANNERS[place].match(text, at):
            action = _RULES[place][(match.lastindex or 1) - 1][1]
            if action is _POP:
                del stack[max(1, len(stack) - 1) :]
            elif action is not _KEEP:
                stack.append(action)
            at = match.end()
        elif place is _PLAIN and (match := _HEREDOC.match(text, at)):
            word = re.escape(re.sub(r"['\"\\]", "", match[2]))
            indent = r"\t*" if match[1] else ""
            awaited.append(re.compile(f"^{indent}{word}$", re.MULTILINE))
            at = match.end()
        elif place is _PLAIN and text[at] == "\n" and awaited:
            last = awaited.pop(0).search(text, at + 1)
            stop = last.end() if last else len(text)
            for mark in re.finditer(re.escape(begin), text[at:stop]):
                yield Misplaced(_line(text, at + mark.start()), _HERE)
            at = stop
        else:
            at += 1


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
