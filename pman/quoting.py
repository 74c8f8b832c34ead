"""Values as words of a language, and where in a document such a word may stand.

Shell: a word is quoted so that it never holds a raw newline or any other control character. So it
can't leave a comment or an ``#SBATCH`` line either (bash(1), QUOTING).
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

_CONTROL = re.compile(r"[\x00-\x1f\x7f\u0080-\u009f\u2028\u2029]")


def shell_word(value: str | float) -> str:
    """``value`` as one word of bash.

    Raises ValueError for a NUL byte, which no word can hold.
    """
    text = no_nul(str(value))
    if not _CONTROL.search(text):
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _CONTROL.sub(_octal, escaped) + "'"


def no_nul(text: str) -> str:
    """``text``. Raises ValueError if it has a NUL byte."""
    if "\0" in text:
        raise ValueError(f"{text[:60]!r} has a NUL byte, which no command line can carry")
    return text


def _octal(match: re.Match[str]) -> str:
    return "".join(f"\\{byte:03o}" for byte in match[0].encode())


@dataclass(frozen=True)
class Misplaced:
    """A value that stands where its language would not read it as one word."""

    line: int
    where: str
    remedy: str = "write it outside of them (it is quoted already), or into a variable first"


_PLAIN = "plain text"
_COMMENT = "a comment"
_SINGLE = "single quotes"
_DOUBLE = "double quotes"
_DOLLAR = "$'…' quotes"
_BACKTICK = "`…`"
_BRACE = "${…}"
_DOUBLE_BRACE = "${…} in double quotes"
_ARITHMETIC = "((…))"
_OLD_ARITHMETIC = "$[…]"
_GLUED = "the reach of a backslash, a `$` or a `<<`"
_HERE = "a here-document"

_KEEP, _POP = "keep", "pop"
# \x02 begins the mark of a value: no escape may swallow it.
_ESCAPE = (r"\\[^\x02]", _KEEP)
_EXPANSIONS = (
    ("`", _BACKTICK),
    (r"\$\((?=\()", _ARITHMETIC),
    (r"\$\(", _PLAIN),
    (r"\$\[", _OLD_ARITHMETIC),
)
_RULES = {
    _PLAIN: (
        _ESCAPE,
        (r"<<<", _KEEP),
        (r"(?:[\\$]|<<-?[ \t]*)(?=\x02)", _GLUED),
        (r'"', _DOUBLE),
        (r"\$'", _DOLLAR),
        (r"'", _SINGLE),
        *_EXPANSIONS,
        (r"\$\{", _BRACE),
        (r"\((?=\()", _ARITHMETIC),
        (r"\(", _PLAIN),
        (r"\)", _POP),
        (r"(?<![^\s;&|()<>])#", _COMMENT),
    ),
    _DOUBLE: (_ESCAPE, *_EXPANSIONS, (r"\$\{", _DOUBLE_BRACE), (r'"', _POP)),
    _SINGLE: ((r"'", _POP),),
    _DOLLAR: (_ESCAPE, (r"'", _POP)),
    _BACKTICK: (_ESCAPE, ("`", _POP)),
    _BRACE: (
        _ESCAPE,
        (r'"', _DOUBLE),
        (r"'", _SINGLE),
        *_EXPANSIONS,
        (r"\$\{", _BRACE),
        (r"\}", _POP),
    ),
    # Quotes do not begin anew in there: bash keeps to the outer ones.
    _DOUBLE_BRACE: (_ESCAPE, *_EXPANSIONS, (r"\$\{", _DOUBLE_BRACE), (r"\}", _POP)),
    _ARITHMETIC: (_ESCAPE, *_EXPANSIONS, (r"\(", _ARITHMETIC), (r"\)", _POP)),
    _OLD_ARITHMETIC: (_ESCAPE, *_EXPANSIONS, (r"\[", _OLD_ARITHMETIC), (r"\]", _POP)),
    _COMMENT: ((r"(?=\n)", _POP),),
}
_SCANNERS = {
    place: re.compile("|".join(f"({pattern})" for pattern, _ in rules), re.DOTALL)
    for place, rules in _RULES.items()
}
_HEREDOC = re.compile(
    r"""<<(-?)[ \t]*((?:[^\s;&|<>()\\'"\x02$]|\$(?!\x02)|\\[^\x02]"""
    r"""|'[^'\n\x02]*'|"[^"\n\x02]*")+)"""
)


def misplaced_words(text: str, begin: str, end: str) -> Iterator[Misplaced]:
    """Each value, marked by ``begin`` and ``end``, that stands where its quotes do not hold.

    Inside quotes or a here-document its own quotes would be part of the text, or end the quotes
    around it; ``((…))`` evaluates them away, numbers excepted. This follows bash's quoting well
    enough for that question: bash(1), QUOTING, EXPANSION and REDIRECTION.
    """
    stack = [_PLAIN]
    awaited: list[re.Pattern[str]] = []  # the last lines of the here-documents that this line opens
    at = 0
    while at < len(text):
        place = stack[-1]
        if text.startswith(begin, at):
            stop = text.index(end, at)
            number = place is _ARITHMETIC and text[at + len(begin) : stop].isdecimal()
            if not number and place not in (_PLAIN, _COMMENT):
                yield Misplaced(_line(text, at), place)
            if place is _GLUED:
                stack.pop()
            at = stop + len(end)
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


def settled(text: str, begin: str, end: str) -> str | Misplaced:
    """The script without the marks; or the first value that is misplaced."""
    for wrong in misplaced_words(text, begin, end):
        return wrong
    return text.replace(begin, "").replace(end, "")


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
