"""Run commands on the login node (over SSH) or on this machine: one interface, `Shell.run`.

The remote command line is always the same (`exec bash -l`); the program goes in on bash's standard
input, followed directly by the command's own input. bash reads a program from a pipe byte by byte
and has to see the closing brace before it runs anything, so half a program never runs, and what
comes after the brace is left for the command. The program prints a random marker on both streams
before and after the command: what comes earlier is login noise, and a missing end is noticed.
Programs are read slowly (about 1 µs a byte): large data belongs in `stdin`, not in `args`.
"""

import contextlib
import itertools
import math
import os
import re
import secrets
import select
import selectors
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Protocol

import paramiko
from paramiko.common import cMSG_CHANNEL_REQUEST

from pman import ssh
from pman.errors import Ambiguous, Unavailable

CHUNK = 32 * 1024  # what SSH puts into one packet
LIMIT = 4 << 20
SESSIONS = 8  # at a time on one connection; sshd allows 10 (MaxSessions)
OPEN_TIMEOUT = 10.0  # a healthy sshd opens a session within milliseconds
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # after the 1st, 2nd, ... failed attempt to connect


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it wrote: login noise is cut away."""

    code: int
    stdout: bytes
    stderr: bytes
    truncated: bool  # one of the streams had more than the limit


class Shell(Protocol):
    where: str  # for messages: "login.hpc.org", or "this machine"

    def run(
        self,
        script: str,
        *args: str,
        stdin: bytes = b"",
        timeout: float = 30.0,
        limit: int = LIMIT,
        repeatable: bool = True,
    ) -> Result:
        """Run a bash script with args as $1… and give back its end, whatever its exit code.

        Unavailable: nothing was run, or (repeatable) the end was not seen.
        Ambiguous: not repeatable, handed over, and the end was not seen.
        """

    def close(self) -> None: ...


# `set +euvx`: a profile may have set them. The command has its own process, so an `exit`, `exec`,
# `set -e` or trap in it stays there. bash's own stderr is shut meanwhile: about a killed command it
# would print the whole program, arguments and all. The markers are put together by printf, so that
# a shell that echoes what it reads (`set -v`) shows none. All on one line: then the line numbers
# in bash's messages are the script's.
PROGRAM = (
    "{{ set +euvx; printf '<%s>' {token}; printf '<%s>' {token} >&2; exec 3>&2 2>/dev/null; "
    "( exec 2>&3 3>&-; set -- {args}; eval {script} ); "
    "set -- $?; exec 2>&3; printf '<%s %3d>' {token} $1; printf '<%s %3d>' {token} $1 >&2; "
    "exit $1; }}\n"
)


class _Output:
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


class _Exchange:
    """One run as both kinds of shell see it: what is still to be sent, and what has come back."""

    def __init__(self, script: str, args: Sequence[str], stdin: bytes, limit: int) -> None:
        if "\0" in script or any("\0" in arg for arg in args):
            raise ValueError("a NUL character cannot be part of a script or of its arguments")
        token = secrets.token_hex(16)
        program = PROGRAM.format(
            token=token,
            args=" ".join(shlex.quote(arg).replace("\n", "'$'\\n''") for arg in args),
            script=shlex.quote(script),
        ).encode("utf-8", "surrogateescape")
        self._whole = memoryview(program + stdin)
        self._sent = 0
        self._program_ends = len(program)
        self.out, self.err = _Output(token, limit), _Output(token, limit)
        self.handed_over = False  # the last byte of the program may have gone: it may run

    def next_piece(self) -> bytes:
        """What to send next; asked for right before the sending, so that it may have gone."""
        piece = self._whole[self._sent : self._sent + CHUNK]
        self.handed_over |= self._sent + len(piece) >= self._program_ends
        return bytes(piece)

    def sent(self, count: int) -> None:
        self._sent += count

    @property
    def all_sent(self) -> bool:
        return self._sent >= len(self._whole)

    def give_up_sending(self) -> None:
        """The other side reads no more; whether that is well is told by the end marker."""
        self._sent = len(self._whole)

    @property
    def begun(self) -> bool:
        return self.out.begun or self.err.begun

    @property
    def ended(self) -> bool:
        return self.out.code is not None and self.err.code is not None

    def result(self) -> Result:
        assert self.out.code is not None
        cut = self.out.truncated or self.err.truncated
        return Result(self.out.code, bytes(self.out.kept), bytes(self.err.kept), cut)

    def timed_out(self, where: str, timeout: float, repeatable: bool) -> Unavailable | Ambiguous:
        slow = "" if self.begun else " It had not begun: a slow profile, or a home that hangs?"
        why = f"{where}: a command did not end within {timeout:g} s and was stopped.{slow}"
        return self.unfinished(Unavailable(why), repeatable)

    def stopped(self, where: str, repeatable: bool) -> Unavailable | Ambiguous:
        """The shell went away by itself and the way to it is fine."""
        if self.begun:
            why = f"{where}: the shell was killed during a command."
            return self.unfinished(Unavailable(why), repeatable)
        said = " | ".join(filter(None, (self.out.noise, self.err.noise))) or "nothing"
        return Unavailable(
            f"{where}: the shell ended before it ran the command. It said: {said}. "
            "Try `bash -l` there by hand: is bash installed, is the account allowed a shell?"
        )

    def unfinished(self, why: Unavailable, repeatable: bool) -> Unavailable | Ambiguous:
        """The one place that decides between the two."""
        if self.handed_over and not repeatable:
            return Ambiguous(f"{why} It may have done its work: look before a second try.")
        return why


class _TimedOut(Exception):
    pass


class LocalShell:
    """Commands on this machine: plain bash, with this process' environment."""

    where = "this machine"

    def run(
        self,
        script: str,
        *args: str,
        stdin: bytes = b"",
        timeout: float = 30.0,
        limit: int = LIMIT,
        repeatable: bool = True,
    ) -> Result:
        exchange = _Exchange(script, args, stdin, limit)
        pipe = subprocess.PIPE
        try:
            bash = subprocess.Popen(
                ["bash"], stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True
            )
        except OSError as error:
            raise Unavailable(f"this machine: bash does not start ({error}); install it") from error
        with bash:  # closes the pipes and waits for its end
            try:
                self._converse(bash, exchange, time.monotonic() + timeout)
            except _TimedOut:
                raise exchange.timed_out(self.where, timeout, repeatable) from None
            finally:
                if not exchange.ended:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(bash.pid, signal.SIGKILL)
        if not exchange.ended:
            raise exchange.stopped(self.where, repeatable)
        return exchange.result()

    def close(self) -> None:
        """Nothing is kept between commands."""

    @staticmethod
    def _converse(bash: subprocess.Popen[bytes], exchange: _Exchange, deadline: float) -> None:
        assert bash.stdin and bash.stdout and bash.stderr
        os.set_blocking(bash.stdin.fileno(), False)
        outputs: dict[IO[bytes], _Output] = {bash.stdout: exchange.out, bash.stderr: exchange.err}
        with selectors.DefaultSelector() as waiting:
            waiting.register(bash.stdin, selectors.EVENT_WRITE)
            for pipe in outputs:
                waiting.register(pipe, selectors.EVENT_READ)
            while outputs and not exchange.ended:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _TimedOut
                for key, _ in waiting.select(left):
                    if key.fileobj is bash.stdin:
                        try:
                            exchange.sent(os.write(key.fd, exchange.next_piece()))
                        except BrokenPipeError:
                            exchange.give_up_sending()
                        if exchange.all_sent:
                            waiting.unregister(bash.stdin)
                            bash.stdin.close()
                    elif data := os.read(key.fd, CHUNK):
                        outputs[key.fileobj].feed(data)  # type: ignore[index]
                    else:
                        waiting.unregister(key.fileobj)
                        del outputs[key.fileobj]  # type: ignore[arg-type]


# --- over SSH ---

LOST = (paramiko.SSHException, EOFError, OSError)  # how paramiko says that a connection is gone


class _LostLine(Unavailable):
    """The connection went, and the same command may be given to a new one."""


class _Outage:
    """Since when and why the login node cannot be reached, and when to try again."""

    def __init__(self, where: str, pauses: Sequence[float]) -> None:
        self._where = where
        self._pauses = pauses
        self.over()

    def over(self) -> None:
        self._failures = 0
        self._until = 0.0

    def attempt_failed(self, why: str) -> Unavailable:
        if not self._failures:
            self._since = datetime.now()
        self._why = why
        pause = self._pauses[min(self._failures, len(self._pauses) - 1)]
        self._failures += 1
        self._until = time.monotonic() + pause
        return self._error(pause)

    def check(self) -> None:
        left = self._until - time.monotonic()
        if left > 0:
            raise self._error(left)

    def _error(self, left: float) -> Unavailable:
        return Unavailable(
            f"login node {self._where} unreachable since {self._since:%H:%M:%S}: "
            f"{self._why.rstrip('.')}; next try in {math.ceil(left)} s"
        )


class _Places:
    """The places for sessions on one connection: as many as sshd lets us have, at most 8."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._places = SESSIONS
        self._taken = 0
        self._grow_at = 0.0
        self._closed = False

    def take(self, deadline: float) -> None:
        with self._changed:
            while not self._closed and self._taken >= self._now_allowed():
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise Unavailable(
                        f"all {self._places} sessions with the login node were busy all the time; "
                        "try again later"
                    )
            if self._closed:
                raise ConnectionError("the connection was closed")
            self._taken += 1

    def give_back(self) -> None:
        with self._changed:
            self._taken -= 1
            self._changed.notify()

    def fewer(self) -> int:
        """sshd refused the session for which a place was taken. How many others are there?"""
        with self._changed:
            others = self._taken - 1
            self._places = max(1, min(self._places, others))
            self._grow_at = time.monotonic() + 30
            return others

    def _now_allowed(self) -> int:
        """sshd's own count lags behind, so it may have refused one too many: try more in time."""
        if self._places < SESSIONS and time.monotonic() > self._grow_at:
            self._places += 1
            self._grow_at = time.monotonic() + 30
        return self._places

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Link:
    """One connection on which several commands run at a time."""

    def __init__(self, connection: ssh.Connection) -> None:
        self._connection = connection
        self._transport = connection.transport
        self._places = _Places()
        self.proven = False  # at least one command could be started

    @property
    def alive(self) -> bool:
        return self._transport.is_active()

    def ended_soon(self) -> bool:
        """Has the connection ended? Its channels end a moment before it does."""
        self._transport.join(0.5)
        return not self._transport.is_alive()

    def close(self) -> None:
        self._places.close()
        self._connection.close()

    @contextlib.contextmanager
    def started(self, command: str, timeout: float) -> Iterator[paramiko.Channel]:
        """A started command; the wait for a place and the command have `timeout` seconds each."""
        deadline = time.monotonic() + timeout
        self._places.take(deadline)
        try:
            channel = self._start(command, deadline)
            with self._cut_after(timeout + OPEN_TIMEOUT):
                try:
                    yield channel
                finally:
                    with contextlib.suppress(*LOST):
                        channel.close()
        finally:
            self._places.give_back()

    def _start(self, command: str, deadline: float) -> paramiko.Channel:
        for refusals in itertools.count():
            try:
                with self._cut_after(OPEN_TIMEOUT + 1):
                    channel = self._transport.open_session(timeout=OPEN_TIMEOUT)
                    self._execute(channel, command)
                break
            except paramiko.ChannelException as error:  # a healthy sshd at its MaxSessions
                if self._places.fewer() == 0 and refusals > 10:
                    raise ConnectionError(f"sshd gives no session: {error.text}") from error
                self._places.give_back()
                time.sleep(0.1)
                self._places.take(deadline)
        self.proven = True
        return channel

    def _execute(self, channel: paramiko.Channel, command: str) -> None:
        try:
            channel.exec_command(command)
        except LOST as error:
            if self.ended_soon():
                raise
            raise Unavailable(
                "the login node starts no command on an open connection: is it out of processes?"
            ) from error

    @contextlib.contextmanager
    def _cut_after(self, seconds: float) -> Iterator[None]:
        """Some of paramiko's waits have no bound, as for room in the socket of a frozen line."""
        timer = threading.Timer(seconds, self.close)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class SSHShell:
    """Commands on the login node, over one connection that is made anew when it has died."""

    def __init__(
        self,
        host: str,
        *,
        port: int | None = None,
        user: str | None = None,
        key_file: Path | None = None,
        known_hosts: Path | None = None,
        config_file: Path | None = None,
        command: str = "bash -l",
        pauses: Sequence[float] = PAUSES,
    ) -> None:
        """`host` may be an alias of the ssh_config; what is given here goes before the config."""
        self.where = host
        self._route = ssh.Route(
            host,
            port=port,
            user=user,
            key_file=key_file,
            known_hosts=known_hosts,
            config_file=config_file,
        )
        self._command = f"exec {command}"
        self._outage = _Outage(host, pauses)
        self._connecting = threading.Lock()  # one connects, the others wait and share the outcome
        self._link: _Link | None = None
        self._closed = False

    def run(
        self,
        script: str,
        *args: str,
        stdin: bytes = b"",
        timeout: float = 30.0,
        limit: int = LIMIT,
        repeatable: bool = True,
    ) -> Result:
        def attempt() -> Result:
            exchange = _Exchange(script, args, stdin, limit)
            return self._attempt(exchange, timeout, repeatable)

        try:
            return attempt()
        except _LostLine:
            return attempt()

    def close(self) -> None:
        self._closed = True
        with self._connecting:
            link, self._link = self._link, None
        if link:
            link.close()

    def _attempt(self, exchange: _Exchange, timeout: float, repeatable: bool) -> Result:
        link = self._connected(timeout)
        try:
            with link.started(self._command, timeout) as channel:
                self._outage.over()
                try:
                    _converse(channel, exchange, time.monotonic() + timeout)
                except _TimedOut:
                    _kill(channel)
                    raise exchange.timed_out(self.where, timeout, repeatable) from None
                if exchange.ended:
                    return exchange.result()
                if link.ended_soon():
                    raise ConnectionError("it ended in the middle of a command")
                raise exchange.stopped(self.where, repeatable)
        except LOST as error:
            why = f"{self.where}: the SSH connection was lost ({str(error) or 'sshd hung up'})."
            self._drop(link, why)
            raise exchange.unfinished(_LostLine(why), repeatable) from error

    def _connected(self, timeout: float) -> _Link:
        self._outage.check()
        if not self._connecting.acquire(timeout=timeout):
            raise Unavailable(f"login node {self.where}: still connecting after {timeout:g} s")
        try:
            if self._closed:
                raise Unavailable(f"login node {self.where}: this pman is shutting down")
            if self._link and self._link.alive:
                return self._link
            self._outage.check()
            if self._link:
                self._link.close()
            try:
                self._link = _Link(ssh.Connection(self._route))
            except Unavailable as error:
                raise self._outage.attempt_failed(str(error)) from error
            return self._link
        finally:
            self._connecting.release()

    def _drop(self, link: _Link, why: str) -> None:
        link.close()
        with self._connecting:
            if self._link is link:
                self._link = None
                if not link.proven:  # connecting works, nothing else does: an outage as well
                    self._outage.attempt_failed(why)


def _converse(channel: paramiko.Channel, exchange: _Exchange, deadline: float) -> None:
    """Send and read until the end is seen, or the channel ends."""
    channel.setblocking(False)
    outputs = (
        (channel.recv_ready, channel.recv, exchange.out),
        (channel.recv_stderr_ready, channel.recv_stderr, exchange.err),
    )
    readable = select.poll()
    readable.register(channel.fileno(), select.POLLIN)
    while not exchange.ended:
        over = channel.closed or channel.eof_received  # asked first: what came before is still read
        moved = _send(channel, exchange)
        for ready, receive, output in outputs:
            if ready():
                output.feed(receive(CHUNK))
                moved = True
        left = deadline - time.monotonic()
        if left <= 0:
            raise _TimedOut
        if over and not moved:
            return
        if not moved:  # nothing tells when sshd takes more input: look again soon
            readable.poll(1000 * (left if exchange.all_sent else min(left, 0.01)))


def _send(channel: paramiko.Channel, exchange: _Exchange) -> bool:
    if exchange.all_sent or not channel.send_ready():
        return False
    try:
        exchange.sent(channel.send(exchange.next_piece()))
        if exchange.all_sent:
            channel.shutdown_write()
    except (EOFError, OSError):  # closed over there: what has come back tells what happened
        exchange.give_up_sending()
    return True


def _kill(channel: paramiko.Channel) -> None:
    """End a command on the far side: sshd keeps a closed session's place until its shell ends.

    paramiko has no call for this request. An sshd older than 7.9 does not know it; then the
    places run out in time, sessions are refused, and a new connection is made.
    """
    message = paramiko.Message()
    message.add_byte(cMSG_CHANNEL_REQUEST)
    message.add_int(channel.remote_chanid)
    message.add_string("signal")
    message.add_boolean(False)
    message.add_string("KILL")
    with contextlib.suppress(*LOST):
        channel.get_transport()._send_user_message(message)  # type: ignore[attr-defined]
