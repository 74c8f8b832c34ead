"""Run commands on the login node (over SSH) or on this machine: one interface, `Shell.run`.

How a command goes in and what comes back is in pman.exchange; how a connection is made is in
pman.ssh. Here is what happens when: which failure is tried again, and what is said of it.
"""

import contextlib
import logging
import math
import os
import select
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

import paramiko

from pman import ssh
from pman.errors import Unavailable
from pman.exchange import CHUNK, GRACE, Exchange, Result

__all__ = ["LocalShell", "Result", "SSHShell", "Shell"]

LIMIT = 4 << 20
SESSIONS = 8  # at a time on one connection; sshd allows 10 (MaxSessions)
OPEN_TIMEOUT = 10.0  # a healthy sshd opens a session within milliseconds
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # after the 1st, 2nd, ... failed attempt to connect
LOST = (paramiko.SSHException, EOFError, OSError)  # how paramiko says that a connection is gone

log = logging.getLogger(__name__)


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

        `timeout` (whole seconds, rounded up) is for the command alone, and once more for the wait
        for a free session. Of each stream the first `limit` bytes are kept.
        Unavailable: nothing was run, or (repeatable) the end was not seen.
        Ambiguous: not repeatable, handed over, and the end was not seen.
        """

    def close(self) -> None: ...


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
        exchange = Exchange(script, args, stdin, timeout, limit)
        pipe = subprocess.PIPE
        try:
            bash = subprocess.Popen(
                ["bash"], stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True
            )
        except OSError as error:
            raise Unavailable(f"this machine: bash does not start ({error}); install it") from error
        with bash:  # closes the pipes and waits for its end
            try:
                self._converse(bash, exchange)
            finally:
                if not exchange.ended:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(bash.pid, signal.SIGKILL)
        if not exchange.ended:
            raise exchange.why_no_end(self.where, repeatable)
        return exchange.result()

    def close(self) -> None:
        """Nothing is kept between commands."""

    @staticmethod
    def _converse(bash: subprocess.Popen[bytes], exchange: Exchange) -> None:
        """Send and read until the end is seen, or the streams end, or the time is up."""
        assert bash.stdin and bash.stdout and bash.stderr
        os.set_blocking(bash.stdin.fileno(), False)
        with selectors.DefaultSelector() as waiting:
            waiting.register(bash.stdin, selectors.EVENT_WRITE)
            for pipe, output in ((bash.stdout, exchange.out), (bash.stderr, exchange.err)):
                waiting.register(pipe, selectors.EVENT_READ, output)
            streams = 2
            while streams and not exchange.ended and (left := exchange.time_left) > 0:
                for key, _ in waiting.select(left):
                    if key.data is None:
                        try:
                            exchange.sent(os.write(key.fd, exchange.next_piece()))
                        except BrokenPipeError:
                            exchange.give_up_sending()
                        if exchange.all_sent:
                            waiting.unregister(bash.stdin)
                            bash.stdin.close()
                    elif data := os.read(key.fd, CHUNK):
                        key.data.feed(data)
                    else:
                        waiting.unregister(key.fileobj)
                        streams -= 1


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
        """`host` may be an alias of the ssh_config; what is given here goes before the config.

        SettingsError: the config cannot work. Nothing is connected before the first command.
        """
        self.where = host
        self._route = ssh.Route(
            host,
            port=port,
            user=user,
            key_file=key_file,
            known_hosts=known_hosts,
            config_file=config_file,
        )
        self._command = f"exec {command}"  # understood by sh, csh and fish alike
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
            return self._attempt(Exchange(script, args, stdin, timeout, limit), repeatable)

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

    def _attempt(self, exchange: Exchange, repeatable: bool) -> Result:
        link = self._connected(exchange.timeout)
        try:
            with link.started(self._command, exchange.timeout) as channel:
                self._outage.over()
                _converse(channel, exchange)
                if exchange.ended:
                    return exchange.result()
                if link.ended_soon():
                    raise ConnectionError("it ended in the middle of a command")
                raise exchange.why_no_end(self.where, repeatable)
        except LOST as error:
            why = f"{self.where}: the SSH connection was lost: {_words(error)}."
            self._drop(link, why)
            raise exchange.unfinished(_LostLine(why), repeatable) from error

    def _connected(self, timeout: float) -> "_Link":
        if not self._connecting.acquire(timeout=timeout):
            raise Unavailable(f"login node {self.where}: still connecting after {timeout:g} s")
        try:
            if self._closed:
                raise Unavailable(f"login node {self.where}: pman is shutting down")
            if self._link and self._link.alive:
                return self._link
            self._outage.check()
            if self._link:
                self._link.close()
            try:
                self._link = _Link(self.where, ssh.Connection(self._route))
            except Unavailable as error:
                raise self._outage.attempt_failed(str(error)) from error
            log.info("connected to login node %s", self.where)
            return self._link
        finally:
            self._connecting.release()

    def _drop(self, link: "_Link", why: str) -> None:
        with self._connecting:
            if self._link is link:
                self._link = None
                if not link.proven:  # connecting works, nothing else does: an outage as well
                    self._outage.attempt_failed(why)
        link.close()


def _words(error: Exception) -> str:
    return str(error).rstrip(".") or "sshd hung up"  # EOFError says nothing


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
        self._why = why.rstrip(".")
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
            f"{self._why}; next try in {math.ceil(left)} s",
            f"login node {self._where} unreachable",
        )


class _Link:
    """One connection on which several commands run at a time."""

    def __init__(self, where: str, connection: ssh.Connection) -> None:
        self._where = where
        self._connection = connection
        self._transport = connection.transport
        self._places = _Places(where)
        self._opening = threading.Lock()  # paramiko mixes up who was refused, of two at a time
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
        channel = self._start(command, time.monotonic() + timeout)
        try:
            with self._cut_after(timeout + GRACE + OPEN_TIMEOUT):
                try:
                    yield channel
                    # sshd has the session in its count until it has seen the end of the shell.
                    channel.status_event.wait(1.0)
                finally:
                    with contextlib.suppress(*LOST):
                        channel.close()
        finally:
            self._places.give_back()

    def _start(self, command: str, deadline: float) -> paramiko.Channel:
        refused_alone = 0
        while True:
            self._places.take(deadline)
            try:
                with self._cut_after(OPEN_TIMEOUT + 1):
                    with self._opening:
                        channel = self._transport.open_session(timeout=OPEN_TIMEOUT)
                    self._execute(channel, command)
                self.proven = True
                return channel
            except paramiko.ChannelException as error:  # a healthy sshd at its MaxSessions
                others = self._places.give_back_refused()
                refused_alone = 0 if others else refused_alone + 1
                if refused_alone > 10:  # not ours to wait for: what hangs there, hangs
                    raise ConnectionError(f"sshd gives no session ({error.text})") from error
            except BaseException:
                self._places.give_back()
                raise
            time.sleep(0.1)

    def _execute(self, channel: paramiko.Channel, command: str) -> None:
        try:
            channel.exec_command(command)
        except LOST as error:
            if self.ended_soon():
                raise
            raise Unavailable(
                f"login node {self._where} starts no command on an open connection "
                f"({_words(error)}): is it out of processes?"
            ) from error

    @contextlib.contextmanager
    def _cut_after(self, seconds: float) -> Iterator[None]:
        """Some of paramiko's waits have no bound, as for room in the socket of a frozen line."""

        def cut() -> None:
            log.warning("%s: the SSH connection is stuck for %g s: cut", self._where, seconds)
            self.close()

        timer = threading.Timer(seconds, cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class _Places:
    """The places for sessions on one connection: as many as sshd lets us have, at most 8."""

    def __init__(self, where: str) -> None:
        self._where = where
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
                        f"login node {self._where}: all {self._places} sessions were busy all the "
                        "time; try again later"
                    )
            if self._closed:
                raise ConnectionError("it was closed")
            self._taken += 1

    def give_back(self) -> None:
        with self._changed:
            self._taken -= 1
            self._changed.notify()

    def give_back_refused(self) -> int:
        """sshd had no session for this place: there are fewer. How many others are in use?"""
        with self._changed:
            self._taken -= 1
            self._places = max(1, min(self._places, self._taken))
            self._grow_at = time.monotonic() + 30
            return self._taken

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


def _converse(channel: paramiko.Channel, exchange: Exchange) -> None:
    """Send and read until the end is seen, or the channel ends, or the time is up."""
    channel.setblocking(False)
    outputs = (
        (channel.recv_ready, channel.recv, exchange.out),
        (channel.recv_stderr_ready, channel.recv_stderr, exchange.err),
    )
    readable = select.poll()
    readable.register(channel.fileno(), select.POLLIN)
    while not exchange.ended and (left := exchange.time_left) > 0:
        over = channel.closed or channel.eof_received  # asked first: what came before is still read
        moved = _send(channel, exchange)
        for ready, receive, output in outputs:
            if ready():
                output.feed(receive(CHUNK))
                moved = True
        if over and not moved:
            return
        if not moved:  # nothing tells when sshd takes more input: look again soon
            readable.poll(1000 * (left if exchange.all_sent else min(left, 0.01)))


def _send(channel: paramiko.Channel, exchange: Exchange) -> bool:
    if exchange.all_sent or not channel.send_ready():
        return False
    try:
        exchange.sent(channel.send(exchange.next_piece()))
        if exchange.all_sent:
            channel.shutdown_write()
    except (EOFError, OSError):  # closed over there: what has come back tells what happened
        exchange.give_up_sending()
    return True
