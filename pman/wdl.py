"""WDL 1.0 as Cromwell reads it: values as its literals, and as words of bash in a task's command.

Cromwell changes a command before bash sees it: placeholders ``~{…}`` are filled in, carriage
returns and blank lines go, what all lines are indented by goes, and some words of Cromwell's own
script are replaced wherever they stand. So no word holds anything of that. A literal has no more
than ``\\uXXXX`` beside plain characters: Cromwell's other escapes differ from miniwdl's.
"""

import json
import posixpath
import re
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pman.errors import Refusal
from pman.jobs import Complaint
from pman.quoting import Misplaced, misplaced_words, no_nul

if TYPE_CHECKING:
    import WDL

TASK, WORKFLOW = "plugin_instance", "ChRISJob"
"""The names that drivers and sites' configurations of Cromwell know."""


# --- values ---

_NOT_IN_A_LITERAL = re.compile(r"[^A-Za-z0-9_./:@ ,=+-]")
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_NOT_IN_QUOTES = re.compile(r"""[^A-Za-z0-9_ @%+=:,./!"#&()*;<?\[\]^{}|-]""")
_REPLACED = re.compile("(SCRIPT|ENVIRONMENT|INSTANTIATED|DOCKER_OUTPUT)_")
"""Begins each word that Cromwell replaces in its script, the command in it included."""


def literal(value: str | float) -> str:
    """``value`` as a literal of WDL, which is JSON too.

    Raises ValueError for what no literal can hold.
    """
    if isinstance(value, str):
        return f'"{_NOT_IN_A_LITERAL.sub(_utf_16, no_nul(value))}"'
    text = str(value)
    if not re.fullmatch(r"-?\d+(\.\d+)?", text):  # Cromwell knows no other form
        raise ValueError(f"{text} is no number that WDL can have: write it as text")
    return text


def _utf_16(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code <= 0xFFFF:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"


def command_word(text: str, apart: bool = True) -> str:
    """``text`` as one word of bash in a command. A word that is not ``apart`` from other text is
    never without quotes: the two could make a word that Cromwell replaces."""
    if apart and _PLAIN_WORD.fullmatch(text) and not _REPLACED.search(text):
        return text
    quoted = _REPLACED.sub(r"\1\\137", _NOT_IN_QUOTES.sub(_escaped, text))
    return f"'{quoted}'" if quoted == text else f"$'{quoted}'"


def _escaped(match: re.Match[str]) -> str:
    if match[0] in "\\'":
        return f"\\{match[0]}"
    return "".join(f"\\{byte:03o}" for byte in match[0].encode())


# --- where they stand ---

_OUTSIDE = "the document"
_COMMENT = "a comment"
_KEYWORD = "what stands between `command` and its text"
_COMMAND = "a command"
_FILLED = "a command, after a placeholder ~{…}"
_BRACES = "command { … }"
_STRING, _OTHER_STRING = '"…"', "'…'"
_PLACEHOLDER = "a placeholder ~{…}"

_REMEDIES = {
    _FILLED: "what bash makes of it depends on what WDL fills in; write {{ … }} in its place",
    _BRACES: "write the command as `command <<< … >>>`, where it can be quoted",
    _STRING: "leave out the quotes around it (it is quoted already), and join texts by {{ a ~ b }}",
    _PLACEHOLDER: "write {{ … }} in its place",
}
_REMEDIES[_OTHER_STRING] = _REMEDIES[_STRING]

_VALUE, _VALUE_ENDS = "\x02", "\x03"
_KEEP, _POP, _END = "keep", "pop", "end"
_STRINGS = ((r'"', (_STRING,)), (r"'", (_OTHER_STRING,)))
# \x02 is a value: no escape may swallow it.
_INSIDE_STRING = ((r"\\[^\x02]", _KEEP), (r"[~$]\{", (_PLACEHOLDER,)))
_RULES: dict[str, tuple[tuple[str, str | tuple[str, ...]], ...]] = {
    _OUTSIDE: (
        (r"#", (_COMMENT,)),
        *_STRINGS,
        (r"(?<![A-Za-z0-9_])command(?![A-Za-z0-9_])", (_KEYWORD,)),
        (r"<<<", (_COMMAND,)),
    ),
    _COMMENT: ((r"(?=[\r\n])", _POP),),
    _KEYWORD: (
        (r"#", (_COMMENT,)),
        (r"\s+", _KEEP),
        (r"\{", (_BRACES,)),
        (r"(?=.)", _POP),
    ),
    _COMMAND: ((r"~\{", (_FILLED, _PLACEHOLDER)), (r">>>", _END)),
    _FILLED: ((r"~\{", (_PLACEHOLDER,)), (r">>>", _END)),
    _BRACES: ((r"[~$]\{", (_PLACEHOLDER,)), (r"\}", _END)),
    _STRING: (*_INSIDE_STRING, (r'"', _POP)),
    _OTHER_STRING: (*_INSIDE_STRING, (r"'", _POP)),
    _PLACEHOLDER: (*_STRINGS, (r"\{", (_PLACEHOLDER,)), (r"\}", _POP)),
}
_SCANNERS = {
    place: re.compile("|".join([*(f"({pattern})" for pattern, _ in rules), _VALUE]), re.DOTALL)
    for place, rules in _RULES.items()
}


def settled(text: str, begin: str, end: str) -> str | Misplaced:
    """The document: each literal between ``begin`` and ``end`` as what its place wants, a literal
    or a word of bash; or where the first value is that can't stand where it does.

    Raises Refusal for a value that no literal can hold.
    """
    pieces = re.split(f"{begin}([^\x02\x03]*){end}", text)
    shape, values = _VALUE.join(pieces[::2]), pieces[1::2]
    places, commands = _scan(shape)
    for number, ((at, place), value) in enumerate(zip(places, values, strict=True)):
        if place in _REMEDIES:
            return Misplaced(_line(shape, at), place, _REMEDIES[place])
        if place is _COMMAND:
            word = json.loads(value) if value.startswith('"') else value
            values[number] = command_word(word, _is_apart(shape, at))
        elif place is _OUTSIDE:
            _refuse_pairs(value)
    for start, stop in commands:
        inside = values[shape.count(_VALUE, 0, start) :]
        # A here-document ends where bash sees its last line: without what all are indented by.
        command = textwrap.dedent(_filled_in(shape[start:stop], inside, _VALUE, _VALUE_ENDS))
        for wrong in misplaced_words(command, _VALUE, _VALUE_ENDS):
            return Misplaced(wrong.line + _line(shape, start) - 1, wrong.where)
    return _filled_in(shape, values)


def _scan(shape: str) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """Where each value stands, and from where to where each command goes."""
    places: list[tuple[int, str]] = []
    commands: list[tuple[int, int]] = []
    begun = 0
    for place, match, action in _walk(shape):
        if action is None:
            places.append((match.start(), place))
        elif action is _END and place is not _BRACES:
            commands.append((begun, match.start()))
        elif action == (_COMMAND,):
            begun = match.end()
    return places, commands


def _walk(shape: str) -> Iterator[tuple[str, re.Match[str], str | tuple[str, ...] | None]]:
    """What means something in its place: the place, where it is, and what it does; None: it is a
    value."""
    stack = [_OUTSIDE]
    at = 0
    while match := _SCANNERS[stack[-1]].search(shape, at):
        place, at = stack[-1], match.end()
        action = None if match.lastindex is None else _RULES[place][match.lastindex - 1][1]
        yield place, match, action
        if action is _END:
            del stack[1:]
        elif action is _POP:
            stack.pop()
        elif isinstance(action, tuple):
            stack += action


def _filled_in(shape: str, values: list[str], before: str = "", after: str = "") -> str:
    first, *others = shape.split(_VALUE)
    # The values of a part of the document may be followed by those of the rest.
    return first + "".join(
        f"{before}{value}{after}{text}" for value, text in zip(values, others, strict=False)
    )


def _is_apart(shape: str, at: int) -> bool:
    around = shape[max(0, at - 1) : at] + shape[at + 1 : at + 2]
    return not re.search(f"[A-Za-z_{_VALUE}]", around)


def _refuse_pairs(value: str) -> None:
    """Cromwell wants two escapes for a character above U+FFFF (its strings are Java's) and makes
    another one of ``\\UXXXXXXXX``; miniwdl wants just that."""
    if re.search(r"\\ud[89a-f]", value):
        text = json.loads(value)
        odd = "".join(character for character in text if character > "\uffff")
        raise Refusal(
            f"{text[:60]!r} can't be written into WDL for Cromwell: it has {odd[:10]}; only the "
            "plugin's arguments and variables may have such characters"
        )


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


# --- what Cromwell's Slurm backend pastes into its command lines ---

_SAFE = "A-Za-z0-9_./@%+="
_SAFE_WORDS = "letters, digits and _ . / @ % + = -"


def unquoted(
    value: object, what: str = "a value", remedy: str = "change it", also: str = ""
) -> str:
    """``value``, if it means itself wherever a shell reads it without quotes.

    Raises Refusal. ``also`` are further characters that are let through.
    """
    text = str(value)
    strange = re.search(f"[^{_SAFE}{re.escape(also)}-]", text)
    if strange:
        seen = strange[0] if strange[0].isprintable() else ascii(strange[0])
        why = f"it has {'a blank' if seen == ' ' else seen}"
    elif not text:
        why = "it is empty"
    elif text.startswith("-"):
        why = "it begins with -"
    else:
        return text
    allowed = " ".join([_SAFE_WORDS, *also])
    raise Refusal(
        f"{what} {text[:200]!r} can't go through Cromwell: {why} (allowed: {allowed}); {remedy}"
    )


def split_folders(first: str, second: str) -> tuple[str, str, str]:
    """The deepest folder that holds both, and the way to each of them from there."""
    common = posixpath.commonpath([first, second])
    return common, posixpath.relpath(first, common), posixpath.relpath(second, common)


# --- what is wrong with a document ---


def check(text: str) -> Complaint | None:
    """By miniwdl's parser and types, and by what Cromwell and pman need of it."""
    begin = re.match(r"(?:[ \t]*(?:#[^\n]*)?\n)*", text)
    at = begin.end() if begin else 0
    if not re.compile(r"version 1\.0[ \t]*(\n|$)").match(text, at):
        return Complaint(_line(text, at), "it must begin with `version 1.0`")
    try:
        import WDL
    except ImportError:
        mend = "pip install 'pman[cromwell]'"
        return Complaint(0, f"miniwdl, which checks WDL, is not installed: {mend}")
    try:
        document = WDL.parse_document(text)
        if document.imports:
            reason = "it can import nothing: Cromwell is sent this document alone"
            return Complaint(document.imports[0].pos.line, reason)
        document.typecheck()
    except WDL.Error.MultipleValidationErrors as errors:
        return _told(errors.exceptions[0])
    except (WDL.Error.SyntaxError, WDL.Error.ValidationError) as error:
        return _told(error)
    return _missing(document, text)


def _told(error: "WDL.Error.SyntaxError | WDL.Error.ValidationError") -> Complaint:
    if not hasattr(error, "wdl_version"):
        return Complaint(error.pos.line, str(error))
    # The parser's own words are about its tokens, of which an operator knows nothing.
    if "$END" in str(error):
        return Complaint(error.pos.line, "it ends in the middle of something, which begins before")
    return Complaint(error.pos.line, f"this is no WDL from column {error.pos.column} on")


def _missing(document: "WDL.Tree.Document", text: str) -> Complaint | None:
    """What Cromwell, or a site's configuration of it, needs to be there."""
    workflow = document.workflow
    if workflow is None or workflow.name != WORKFLOW:
        line = workflow.pos.line if workflow else 0
        return Complaint(line, f"it must have a workflow {WORKFLOW}")
    task = next((task for task in document.tasks if task.name == TASK), None)
    if task is None:
        return Complaint(0, f"it must have a task {TASK}")
    return _miscalled(workflow, task) or _of_task(task, text)


def _of_task(task: "WDL.Tree.Task", text: str) -> Complaint | None:
    if "docker" not in task.runtime:
        return Complaint(
            task.pos.line,
            f"the task {TASK} must have `docker` in its `runtime`: without it Cromwell runs the "
            "plugin on the node itself, in no container",
        )
    begin = task.command.pos
    rest = "\n".join(text.split("\n")[begin.line - 1 :])[begin.column - 1 :]
    if re.match(r"command\s*\{", rest):
        return Complaint(begin.line, "write the command as `command <<< … >>>`")
    for name, line in _twice(text):
        return Complaint(line, f"`{name}` stands twice in the `runtime` of {TASK}: leave one")
    retries = task.runtime.get("maxRetries")
    if retries is not None and str(retries) != "0":
        return Complaint(
            retries.pos.line,
            f"`maxRetries` of {TASK} must be 0, and not {retries}: each try has a folder of its "
            "own, so the plugin would be run again",
        )
    return None


def _miscalled(workflow: "WDL.Tree.Workflow", task: "WDL.Tree.Task") -> Complaint | None:
    """Of a workflow pman follows the one call that has the task's name."""
    calls = [
        (part, call)
        for part in workflow.body
        for call in _calls(part)
        if getattr(call, "callee", None) is task
    ]
    if not calls:
        return Complaint(workflow.pos.line, f"the workflow {WORKFLOW} must call {TASK}")
    if len(calls) > 1:
        line = calls[1][1].pos.line
        return Complaint(line, f"it must call {TASK} once: each call would run the plugin")
    ((part, call),) = calls
    if part is not call:
        reason = f"{TASK} must be called once: call it outside of `scatter` and `if`"
        return Complaint(call.pos.line, reason)
    name = getattr(call, "name", TASK)
    if name != TASK:
        reason = f"write `call {TASK}`, without `as {name}`: pman looks for that name"
        return Complaint(call.pos.line, reason)
    return None


def _calls(part: Any) -> Iterator[Any]:
    """The calls in a part of a workflow, which may be one itself."""
    inside = getattr(part, "body", None)
    if inside is None:
        yield part
    for one in inside or ():
        yield from _calls(one)


def _twice(text: str) -> Iterator[tuple[str, int]]:
    """The keys that stand a second time in the task's runtime, of which miniwdl keeps the last."""
    outside = _outside(text)
    begin = re.compile(rf"\btask\s+{TASK}\b.*?\bruntime\s*(?=\{{)", re.DOTALL).search(outside)
    seen: set[str] = set()
    depth = 0
    for match in re.compile(r"[{}]|(\w+)\s*:").finditer(outside, begin.end() if begin else 0):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return
        if depth == 1 and match[1]:
            if match[1] in seen:
                yield match[1], _line(text, match.start())
            seen.add(match[1])


def _outside(text: str) -> str:
    """``text`` with blanks for all that is a string, a comment or a command."""
    kept, at = "", 0
    for place, match, _ in _walk(text):
        kept += text[at : match.start()] if place is _OUTSIDE else ""
        kept += " " * (match.end() - len(kept))
        at = match.end()
    return kept + text[at:]


def commands(text: str) -> Iterator[tuple[int, str]]:
    """Each command that can be read as it stands, and the line of the document it begins in."""
    for start, stop in _scan(text)[1]:
        if "~{" not in text[start:stop]:
            yield _line(text, start), textwrap.dedent(text[start:stop])
