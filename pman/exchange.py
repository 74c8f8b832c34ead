"""One command as bash sees it: the program that goes in, and what of the output is the command's.

The program goes in on bash's standard input, followed directly by the command's own input. bash
reads a program from a pipe byte by byte and has to see the closing brace before it runs anything:
half a program never runs, and what comes after the brace is left for the command. The program
prints a random marker on both streams before and after the command: what comes earlier is login
noise, and a missing end is noticed. (Byte by byte is slow, 0.4 s for a megabyte: large data belongs
in `stdin`, not in `args`.)
"""

import math
import re
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pman.errors import Ambiguous, Unavailable

CHUNK = 32 * 1024  # what SSH puts into one packet
GRACE = 2.0  # for the watchdog's work to be seen, after the time-out

# What a profile may have set goes first. The command has its own process, so an `exit`, `exec`,
# `set -e` or trap in it stays there. Beside it waits a watchdog that ends the whole process group
# at the time-out, also when the line is lost by then: what pman has given up cannot happen hours
# later. (A `read` from a pipe that nobody writes to: a `sleep` would be left behind each time.
# Whole seconds: some locales have decimal commas.) bash's own stderr is shut meanwhile: about a
# killed command it would print the program, arguments and all. The markers are put together by
# printf, so that a shell that echoes what it reads (`set -v` in a profile) shows none.
PROGRAM = (
    "{{ set +euvxCfT; trap - DEBUG ERR EXIT RETURN; unalias -a; IFS=$' \\t\\n'; "
    "( read -rt {seconds} <> <(:); kill -KILL 0 ) </dev/null >/dev/null 2>&1 & "
    "printf '<%s>' {token}; printf '<%s>' {token} >&2; exec 3>&2 2>/dev/null; "
    "( exec 2>&3 3>&-; set -- {args}; eval {script} ); "
    "set -- $?; exec 2>&3; printf '<%s %3d>' {token} $1; printf '<%s %3d>' {token} $1 >&2; "
    "kill -KILL $!; exit $1; }}\n"
)


def _quote(text: str) -> str:
    """All on one line: then the line numbers in bash's messages are the script's own."""
    return shlex.quote(text).replace("\n", "'$'\\n''")


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it wrote: login noise is cut away."""

    code: int
    stdout: bytes
    stderr: bytes
    truncated: bool  # one of the streams had more than the limit


class Output:
    """One stream: cuts what lies between the markers out of what arrives, in bounded memory."""

    def __init__(self, token: str, limit: int) -> None:
        self._begin = f"<{token}>".encode()
        self._end = re.compile(f"<{token} +([0-9]+)>".encode())
        self._longest = len(self._begin) + 4
        self._limit = limit
        self._pending = b""
        self.kept = bytearray()
        self.begun = self.truncated = False
        self.code: int | None = None

    def feed(self, data: bytes) -> None:
        self._pending += data
        if not self.begun:
            _, found, after = self._pending.partition(self._begin)
            self.begun = bool(found)
            self._pending = after if found else self._pending[-500:]  # kept for `noise`
        if self.begun and self.code is None:
            end = self._end.search(self._pending)
            # A marker may be cut by the edge of a packet: its length is held back.
            cut = end.start() if end else max(0, len(self._pending) - self._longest)
            room = max(0, self._limit - len(self.kept))
            self.kept += self._pending[: min(cut, room)]
            self.truncated |= cut > room
            self._pending = self._pending[cut:]
            self.code = int(end[1]) if end else None

    @property
    def noise(self) -> str:
        return "" if self.begun else self._pending.decode(errors="replace").strip()


class Exchange:
    """What is still to be sent of one command, and what has come back."""

    def __init__(
        self, script: str, args: Sequence[str], stdin: bytes, timeout: float, limit: int
    ) -> None:
        if "\0" in script or any("\0" in arg for arg in args):
            raise ValueError("a NUL character cannot be part of a script or of its arguments")
        token = secrets.token_hex(16)
        self.timeout = math.ceil(timeout)
        program = PROGRAM.format(
            seconds=self.timeout,
            token=token,
            args=" ".join(map(_quote, args)),
            script=_quote(script),
        ).encode("utf-8", "surrogateescape")
        self._whole = memoryview(program + stdin)
        self._sent = 0
        self._program_ends = len(program)
        self._started: float | None = None
        self.out, self.err = Output(token, limit), Output(token, limit)
        self.handed_over = False  # the last byte of the program may have gone: it may run

    def next_piece(self) -> bytes:
        """What to send next; asked for right before the sending, so that it may have gone."""
        piece = self._whole[self._sent : self._sent + CHUNK]
        self.handed_over |= self._sent + len(piece) >= self._program_ends
        return bytes(piece)

    def sent(self, count: int) -> None:
        self._sent += count

    def give_up_sending(self) -> None:
        """The other side reads no more; whether that is well is told by the end marker."""
        self._sent = len(self._whole)

    @property
    def all_sent(self) -> bool:
        return self._sent >= len(self._whole)

    @property
    def time_used(self) -> float:
        """Since the first question for it: neither connecting nor waiting for a session counts."""
        self._started = self._started or time.monotonic()
        return time.monotonic() - self._started

    @property
    def time_left(self) -> float:
        """The watchdog comes first; this is for a program that never began, or a frozen line."""
        return self.timeout + GRACE - self.time_used

    @property
    def ended(self) -> bool:
        return self.out.code is not None and self.err.code is not None

    def result(self) -> Result:
        assert self.out.code is not None
        cut = self.out.truncated or self.err.truncated
        return Result(self.out.code, bytes(self.out.kept), bytes(self.err.kept), cut)

    def why_no_end(self, where: str, repeatable: bool) -> Unavailable | Ambiguous:
        """The shell went away, or was given up, and the way to it is fine."""
        begun = self.out.begun or self.err.begun
        if self.time_used >= self.timeout:
            why = f"{where}: a command did not end within {self.timeout} s and was stopped."
            if not begun:
                why += " It had not begun: a slow profile, or a home that hangs?"
        elif begun:
            why = f"{where}: the shell was killed during a command."
        else:
            said = " | ".join(filter(None, (self.out.noise, self.err.noise))) or "nothing"
            return Unavailable(
                f"{where}: the shell ended before it ran the command. It said: {said}. "
                "Try `bash -l` there by hand: is bash installed, is the account allowed a shell?"
            )
        return self.unfinished(Unavailable(why), repeatable)

    def unfinished(self, why: Unavailable, repeatable: bool) -> Unavailable | Ambiguous:
        """The one place that decides between the two."""
        if self.handed_over and not repeatable:
            return Ambiguous(f"{why} It may have done its work: look before a second try.")
        return why
