"""pman.shell and pman.ssh against a real sshd on loopback, and against this machine's bash."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paramiko
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pman import shell as shell_module
from pman import ssh
from pman.errors import Ambiguous, SettingsError, Unavailable
from pman.exchange import Output
from pman.shell import LocalShell, Result, Shell, SSHShell
from tests.sshd import Sshd, free_port, make_key, wait_for

HOST = "127.0.0.1"
QUICK = (0.05,)  # pauses between attempts to connect
NASTY = [
    "",
    "'",
    '"',
    "a b",
    "$(id)",
    "`id`",
    "\\",
    "\n",
    "a\n'b'\n",
    "!x",
    "*",
    "~",
    "é",
    "\udcff",
]
BINARY = os.urandom(1 << 20) * 5


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    server = Sshd(tmp_path_factory.mktemp("sshd"))
    yield server
    server.stop()


@pytest.fixture
def own_sshd(tmp_path: Path) -> Iterator[Callable[..., Sshd]]:
    """For tests that break it, or that count what is in its log."""
    started: list[Sshd] = []

    def start(*options: str) -> Sshd:
        folder = tmp_path / f"sshd{len(started)}"
        folder.mkdir()
        started.append(Sshd(folder, *options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def connect() -> Iterator[Callable[..., SSHShell]]:
    opened: list[SSHShell] = []

    def to(server: Sshd, host: str = HOST, **changes: Any) -> SSHShell:
        given: dict[str, Any] = {
            "port": server.port,
            "key_file": server.key,
            "known_hosts": server.known_hosts,
            "pauses": QUICK,
        }
        opened.append(SSHShell(host, **given | changes))
        return opened[-1]

    yield to
    for shell in opened:
        shell.close()
    assert not [
        thread for thread in threading.enumerate() if isinstance(thread, paramiko.Transport)
    ]


Connect = Callable[..., SSHShell]
Start = Callable[..., Sshd]


@pytest.fixture(params=["local", "ssh"])
def shell(request: pytest.FixtureRequest) -> Shell:
    if request.param == "local":
        return LocalShell()
    connected: SSHShell = request.getfixturevalue("connect")(request.getfixturevalue("sshd"))
    return connected


def pids_in(folder: Path) -> list[int]:
    return [int(file.name) for file in folder.iterdir()]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- both shells ---


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo out; echo err >&2", Result(0, b"out\n", b"err\n", False)),
        ("printf out", Result(0, b"out", b"", False)),
        ("", Result(0, b"", b"", False)),
        ("# nothing", Result(0, b"", b"", False)),
        ("echo a; exit 3; echo b", Result(3, b"a\n", b"", False)),
        ("exec false", Result(1, b"", b"", False)),
        ("set -eu; false; echo b", Result(1, b"", b"", False)),
        ("trap 'echo bye' EXIT; exit 200", Result(200, b"bye\n", b"", False)),
        ("kill -9 $BASHPID", Result(137, b"", b"", False)),
        ("exec >&- 2>&-", Result(0, b"", b"", False)),
        ("exec 3>&1; echo a >&3", Result(0, b"a\n", b"", False)),
        ("cat <<'X'\n$a\nX", Result(0, b"$a\n", b"", False)),
        ("f() { return 4; }\nf", Result(4, b"", b"", False)),
        ("cat", Result(0, b"", b"", False)),
    ],
)
def test_what_a_command_says_and_how_it_ends(shell: Shell, script: str, expected: Result) -> None:
    assert shell.run(script) == expected


@pytest.mark.parametrize("script", ["if", "echo 'a", "}", "(", "case", "echo $("])
def test_a_syntax_error_is_an_exit_code_with_the_line(shell: Shell, script: str) -> None:
    result = shell.run("true\n" + script)
    assert result.code != 0
    assert re.search(rb"eval: line [23]: ", result.stderr), result.stderr


def test_arguments_arrive_as_they_are(shell: Shell) -> None:
    result = shell.run('printf "%s\\0" "$#" "$@"', *NASTY)
    expected = [str(len(NASTY)), *NASTY, ""]
    assert result.stdout.decode("utf-8", "surrogateescape").split("\0") == expected


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
@settings(max_examples=60, deadline=None)
def test_any_arguments_arrive_as_they_are(args: list[str]) -> None:
    result = LocalShell().run('printf "%s\\0" "$#" "$@"', *args)
    assert result.stdout.decode().split("\0") == [str(len(args)), *args, ""]


@given(st.binary(max_size=300_000), st.integers(0, 300_000))
@settings(max_examples=30, deadline=None)
def test_any_input_comes_back_up_to_the_limit(data: bytes, limit: int) -> None:
    result = LocalShell().run("cat; cat >&2", stdin=data, limit=limit)
    assert result == Result(0, data[:limit], b"", len(data) > limit)


@given(st.lists(st.integers(1, 90)), st.integers(0, 40))
def test_markers_are_found_however_the_stream_is_cut(sizes: list[int], limit: int) -> None:
    whole = b"Welcome <t0ke<t0ken>body <t0ken> <t0ken 3 <t0ken  17>Bye <t0ken   0>"
    output = Output("t0ken", limit)
    start = 0
    for size in [*sizes, len(whole)]:
        output.feed(whole[start : start + size])
        start += size
    body = b"body <t0ken> <t0ken 3 "
    assert (output.code, bytes(output.kept)) == (17, body[:limit])
    assert output.truncated == (len(body) > limit)


@pytest.mark.parametrize(("script", "arg"), [("echo \0", "a"), ("echo", "a\0b")])
def test_a_nul_is_refused_before_anything_is_sent(shell: Shell, script: str, arg: str) -> None:
    with pytest.raises(ValueError, match="NUL"):
        shell.run(script, arg)


def test_input_is_binary_and_ends(shell: Shell) -> None:
    assert shell.run("cat", stdin=BINARY, limit=len(BINARY)) == Result(0, BINARY, b"", False)
    both = shell.run("tee /dev/stderr", stdin=BINARY, limit=len(BINARY))
    assert both == Result(0, BINARY, BINARY, False)


def test_input_that_nobody_reads_harms_nothing(shell: Shell) -> None:
    assert shell.run("exec <&-; echo a", stdin=BINARY) == Result(0, b"a\n", b"", False)
    assert shell.run("head -c 2", stdin=BINARY) == Result(0, BINARY[:2], b"", False)


def test_output_beyond_the_limit_is_dropped_and_the_command_still_ends(
    shell: Shell, tmp_path: Path
) -> None:
    script = 'head -c 30000000 /dev/zero; echo end >&2; touch "$1"; exit 5'
    result = shell.run(script, str(tmp_path / "ended"), limit=1000)
    assert result == Result(5, bytes(1000), b"end\n", True)
    assert (tmp_path / "ended").exists()
    assert not shell.run("head -c 1000 /dev/zero", limit=1000).truncated
    assert shell.run("head -c 1001 /dev/zero >&2", limit=1000).truncated


def test_a_process_left_behind_is_not_waited_for(shell: Shell, tmp_path: Path) -> None:
    script = 'echo a; sleep 600 & echo $! > "$1"'
    assert shell.run(script, str(tmp_path / "pid"), timeout=60).stdout == b"a\n"
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize(("repeatable", "error"), [(True, Unavailable), (False, Ambiguous)])
def test_a_time_out_ends_the_whole_command(
    shell: Shell, tmp_path: Path, repeatable: bool, error: type[Exception]
) -> None:
    script = 'touch "$1/$BASHPID"; (touch "$1/$BASHPID"; sleep 600) | sleep 600'
    with pytest.raises(error, match=r"did not end within 1 s and was stopped\."):
        shell.run(script, str(tmp_path), timeout=1, repeatable=repeatable)
    pids = pids_in(tmp_path)
    assert len(pids) == 2
    wait_for(lambda: not any(map(is_running, pids)), "the processes to end")


def test_a_local_command_without_its_watchdog_is_stopped_too(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="did not end within 1 s"):
        LocalShell().run('kill -9 $!; touch "$1/$BASHPID"; sleep 600', str(tmp_path), timeout=1)
    wait_for(lambda: not any(map(is_running, pids_in(tmp_path))), "the process to end")


def test_a_command_that_floods_is_stopped_in_time(shell: Shell) -> None:
    with pytest.raises(Unavailable, match="did not end"):
        shell.run("yes", timeout=0.5)


@pytest.mark.parametrize(("repeatable", "error"), [(True, Unavailable), (False, Ambiguous)])
def test_a_shell_that_is_killed_has_no_end(
    shell: Shell, repeatable: bool, error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error, match="the shell was killed during a command"):
        shell.run('echo >> "$1"; kill -9 $$', str(tmp_path / "ran"), repeatable=repeatable)
    assert (tmp_path / "ran").read_text() == "\n"  # not tried twice: the line is fine
    assert shell.run("echo a").stdout == b"a\n"


def test_no_file_descriptor_is_left(shell: Shell) -> None:
    shell.run("true")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        shell.run("true")
        with pytest.raises(Unavailable):
            shell.run("sleep 600", timeout=1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- the login shell ---


@pytest.mark.parametrize(
    "profile",
    [
        "echo Welcome; echo beware >&2",
        "printf 'no newline'; printf 'here neither' >&2",
        "set -euvx",
        "trap 'echo trapped' EXIT",
        "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2",
        "echo '<0123456789abcdef0123456789abcdef>'",
    ],
)
def test_login_noise_is_cut_away(
    own_sshd: Start, connect: Connect, tmp_path: Path, profile: str
) -> None:
    (tmp_path / "banner").write_text("Authorized use only\n")
    server = own_sshd(f"Banner {tmp_path / 'banner'}")
    (server.home / ".bash_profile").write_text(profile + "\n")
    (server.home / ".bash_logout").write_text("echo Bye; echo bye >&2\n")
    result = connect(server).run("cat; echo b >&2; exit 3", stdin=b"a")
    assert result == Result(3, b"a", b"b\n", False)


def test_it_is_a_login_shell(own_sshd: Start, connect: Connect) -> None:
    server = own_sshd()
    (server.home / ".bash_profile").write_text("export SITE=loaded\n")
    assert connect(server).run("echo $SITE").stdout == b"loaded\n"


def test_a_shell_that_does_not_start_says_why(sshd: Sshd, connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "nologin").write_text("#!/bin/sh\necho This account is not available\nexit 1\n")
    (tmp_path / "nologin").chmod(0o755)
    shell = connect(sshd, command=str(tmp_path / "nologin"))
    with pytest.raises(Unavailable, match=r"ended before it ran .* This account is not available"):
        shell.run("true", repeatable=False)


def test_a_profile_that_hangs_is_named(own_sshd: Start, connect: Connect, runs: Path) -> None:
    server = own_sshd()
    (server.home / ".bash_profile").write_text(f"echo $$ >> {runs / 'runs'}; sleep 600\n")
    with pytest.raises(Unavailable, match="had not begun: a slow profile"):
        connect(server).run("true", timeout=1)


# --- sessions ---


def test_many_threads_share_one_connection_and_eight_sessions(
    own_sshd: Start, connect: Connect
) -> None:
    server = own_sshd()
    shell = connect(server)
    with ThreadPoolExecutor(30) as pool:
        said = pool.map(
            lambda number: shell.run("sleep 0.1; echo $1", str(number)).stdout, range(60)
        )
        assert list(said) == [f"{number}\n".encode() for number in range(60)]
    assert server.logins() == 1
    assert 2 < server.most_sessions_at_once() <= 8


def test_a_server_with_fewer_sessions_is_served_with_fewer(
    own_sshd: Start, connect: Connect
) -> None:
    server = own_sshd("MaxSessions 3")
    shell = connect(server)
    with ThreadPoolExecutor(16) as pool:
        said = pool.map(
            lambda number: shell.run("sleep 0.1; echo $1", str(number)).stdout, range(32)
        )
        assert list(said) == [f"{number}\n".encode() for number in range(32)]
    assert server.logins() == 1
    assert server.most_sessions_at_once() == 3
    assert server.log.count("no more sessions") < 20  # it is not asked again and again


def test_a_server_that_gives_no_session_is_an_outage(own_sshd: Start, connect: Connect) -> None:
    server = own_sshd("MaxSessions 0")
    shell = connect(server, pauses=(60.0,))
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"unreachable since .*sshd gives no session"):
            shell.run("true")
    assert server.logins() == 1


def test_the_places_of_timed_out_commands_come_back(
    own_sshd: Start, connect: Connect, tmp_path: Path
) -> None:
    server = own_sshd()
    shell = connect(server)
    with ThreadPoolExecutor(5) as pool:
        hanging = [pool.submit(shell.run, "sleep 600", timeout=1) for _ in range(10)]
        assert {type(each.exception()) for each in hanging} == {Unavailable}
    (here := tmp_path / "here").mkdir()
    together = 'touch "$1/$$"; until [ "$(ls "$1" | wc -l)" = 8 ]; do sleep 0.02; done'
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(shell.run, together, str(here)) for _ in range(8)]
        assert [result.result().code for result in results] == [0] * 8
    assert server.logins() == 1


def test_waiting_for_a_place_has_an_end(sshd: Sshd, connect: Connect, tmp_path: Path) -> None:
    shell = connect(sshd)
    script = 'touch "$1/$$"; until [ -e "$1/go" ]; do sleep 0.02; done'
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(shell.run, script, str(tmp_path)) for _ in range(8)]
        wait_for(lambda: len(list(tmp_path.iterdir())) == 8, "eight commands")
        with pytest.raises(Unavailable, match="all 8 sessions were busy"):
            shell.run("true", timeout=0.2, repeatable=False)
        (tmp_path / "go").touch()
        assert [result.result().code for result in running] == [0] * 8


# --- lost lines ---

# The first run says that it has begun and hangs; a later one ends.
HANGS_ONCE = """
echo $$ >> "$1/runs"
if [ "$(wc -l < "$1/runs")" = 1 ]; then touch "$1/begun"; exec sleep 600; fi
echo done
"""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder for HANGS_ONCE, with the pids of what ran; what still hangs is ended."""
    folder = tmp_path / "runs"
    folder.mkdir()
    yield folder
    for pid in (folder / "runs").read_text().split():
        if is_running(int(pid)):
            os.killpg(int(pid), signal.SIGKILL)


@pytest.mark.parametrize("repeatable", [True, False])
def test_a_line_lost_in_the_middle_of_a_command(
    own_sshd: Start, connect: Connect, runs: Path, repeatable: bool
) -> None:
    server = own_sshd()
    shell = connect(server)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(shell.run, HANGS_ONCE, str(runs), repeatable=repeatable)
        wait_for((runs / "begun").exists, "the command to begin")
        server.signal_sessions(signal.SIGKILL)
        if repeatable:
            assert running.result(20).stdout == b"done\n"
        else:
            with pytest.raises(
                Ambiguous, match=r"connection was lost: .* look before a second try"
            ):
                running.result(20)
    assert len((runs / "runs").read_text().split()) == (2 if repeatable else 1)


def test_a_line_lost_for_good_in_the_middle_of_a_command(
    own_sshd: Start, connect: Connect, runs: Path
) -> None:
    server = own_sshd()
    shell = connect(server)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(shell.run, HANGS_ONCE, str(runs))
        wait_for((runs / "begun").exists, "the command to begin")
        server.stop()
        # A connection that was made while sshd was going is reset instead.
        with pytest.raises(Unavailable, match=r"refuses connections|reset by peer|hung up"):
            running.result(20)


def test_a_connection_that_died_between_commands_is_made_anew(
    own_sshd: Start, connect: Connect
) -> None:
    server = own_sshd()
    shell = connect(server, pauses=(60.0,))
    for _ in range(3):  # no pause after a connection that worked; nothing was handed over
        assert shell.run("echo a", repeatable=False).stdout == b"a\n"
        server.signal_sessions(signal.SIGKILL)
    assert server.logins() == 3


def test_in_a_pause_nothing_is_tried(own_sshd: Start, connect: Connect) -> None:
    server = own_sshd()
    shell = connect(server, pauses=(60.0,))
    server.stop()
    message = (
        r"login node 127.0.0.1 unreachable since \d\d:\d\d:\d\d: .*refuses.*; next try in 60 s"
    )
    with pytest.raises(Unavailable, match=message):
        shell.run("true", repeatable=False)
    server.start()
    with ThreadPoolExecutor(30) as pool:
        errors = [pool.submit(shell.run, "true").exception() for _ in range(30)]
    assert all(re.match(message, str(error)) for error in errors)
    assert server.logins() == 0


def test_it_works_again_when_the_server_is_back(own_sshd: Start, connect: Connect) -> None:
    server = own_sshd()
    shell = connect(server, pauses=(0.05, 60.0))

    def works() -> bool:
        try:
            return shell.run("true").code == 0
        except Unavailable:
            return False

    for _ in range(2):  # the second time begins with the short pause again
        wait_for(works, "the connection to work")
        server.stop()
        with pytest.raises(Unavailable, match=r"unreachable since .*next try in 1 s"):
            shell.run("true")
        server.start()


def test_pauses_grow_and_a_success_ends_them() -> None:
    outage = shell_module._Outage("login", (1.0, 2.0, 4.0))
    tries = [str(outage.attempt_failed("it is down.")) for _ in range(4)]
    assert [text.rpartition("next try in ")[2] for text in tries] == ["1 s", "2 s", "4 s", "4 s"]
    with pytest.raises(Unavailable, match=r"it is down; next try in 4 s"):
        outage.check()
    outage.over()
    outage.check()
    assert "next try in 1 s" in str(outage.attempt_failed("again"))


class DumbServer:
    """Accepts connections and says nothing; counts them."""

    def __init__(self, hang_up: bool) -> None:
        self.accepted: list[socket.socket] = []
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._hang_up = hang_up
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self.accepted.append(peer)
            if self._hang_up:
                peer.close()

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in (self._listener, *self.accepted):
            each.close()


@pytest.mark.parametrize("hang_up", [True, False])
def test_thirty_threads_make_one_attempt(
    hang_up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ssh, "STEP_TIMEOUT", 1.0)
    server = DumbServer(hang_up)
    shell = SSHShell(HOST, port=server.port, user="me", key_file=tmp_path / "key", pauses=(60.0,))
    try:
        with ThreadPoolExecutor(30) as pool:
            running = [pool.submit(shell.run, "true") for _ in range(30)]
            errors = [each.exception(20) for each in running]
        assert {type(error) for error in errors} == {Unavailable}
        assert len(server.accepted) == 1
    finally:
        shell.close()
        server.stop()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_waiting_for_somebody_elses_attempt_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "STEP_TIMEOUT", 3.0)
    server = DumbServer(hang_up=False)
    shell = SSHShell(HOST, port=server.port, user="me", key_file=tmp_path / "key", pauses=QUICK)
    try:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(shell.run, "true")
            wait_for(lambda: server.accepted, "the attempt")
            with pytest.raises(Unavailable, match="still connecting after 1 s"):
                shell.run("true", timeout=1, repeatable=False)
            # paramiko's own time-out or ours: they are equally long
            assert re.search("does not answer|protocol banner", str(first.exception()))
    finally:
        shell.close()
        server.stop()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell_module, "OPEN_TIMEOUT", 1.0)


@pytest.mark.usefixtures("impatient")
def test_a_line_that_froze_between_commands_is_left(own_sshd: Start, connect: Connect) -> None:
    server = own_sshd()
    shell = connect(server)
    shell.run("true")
    frozen = server.signal_sessions(signal.SIGSTOP)
    assert shell.run("echo a", repeatable=False).stdout == b"a\n"
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    assert server.logins() == 2


@pytest.mark.usefixtures("impatient")
def test_a_line_that_freezes_under_load_holds_nobody_for_ever(
    own_sshd: Start, connect: Connect, tmp_path: Path
) -> None:
    """So much is under way that the kernel's buffers are full: paramiko's writes block."""
    server = own_sshd()
    shell = connect(server)
    (here := tmp_path / "here").mkdir()
    script = 'head -c 100000 > /dev/null; touch "$1/$$"; cat > /dev/null'
    begun = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        running = [
            pool.submit(
                shell.run, script, str(here), stdin=bytes(20 << 20), timeout=5, repeatable=False
            )
            for _ in range(8)
        ]
        wait_for(lambda: len(list(here.iterdir())) == 8, "eight commands", 30)
        frozen = server.signal_sessions(signal.SIGSTOP)
        errors = [each.exception(60) for each in running]
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    assert {type(error) for error in errors} == {Ambiguous}
    assert time.monotonic() - begun < 30
    assert shell.run("echo a").stdout == b"a\n"


def test_close_ends_everything(own_sshd: Start, connect: Connect, runs: Path) -> None:
    server = own_sshd()
    shell = connect(server)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(shell.run, HANGS_ONCE, str(runs), repeatable=False)
        wait_for((runs / "begun").exists, "the command to begin")
        shell.close()
        assert isinstance(running.exception(20), Ambiguous)
    with pytest.raises(Unavailable, match="shutting down"):
        shell.run("true")
    wait_for(lambda: not server.sessions(), "the sessions to end")


# --- host keys ---


def fingerprint(key: Path) -> str:
    shown = subprocess.run(["ssh-keygen", "-l", "-f", str(key)], capture_output=True, check=True)
    return shown.stdout.decode().split()[1]


def test_an_unknown_host_key(sshd: Sshd, connect: Connect, tmp_path: Path) -> None:
    nothing = tmp_path / "known_hosts"
    with pytest.raises(Unavailable) as caught:
        connect(sshd, known_hosts=nothing).run("true")
    message = str(caught.value)
    for part in (
        "unknown",
        "ssh-ed25519",
        fingerprint(sshd.host_key),
        str(nothing),
        f"ssh-keyscan -p {sshd.port} {HOST} >> {nothing}",
    ):
        assert part in message


def test_a_changed_host_key(sshd: Sshd, connect: Connect, tmp_path: Path) -> None:
    other = Path(f"{make_key(tmp_path / 'other')}.pub").read_text()
    known = tmp_path / "known_hosts"
    known.write_text(f"# the login node\n[{HOST}]:{sshd.port} {other}")
    with pytest.raises(Unavailable) as caught:
        connect(sshd, known_hosts=known).run("true")
    for part in ("CHANGED", f"{known} line 2", fingerprint(sshd.host_key), "ask the site's admin"):
        assert part in str(caught.value)


def test_a_key_of_another_kind_is_not_asked_for(
    own_sshd: Start, connect: Connect, tmp_path: Path
) -> None:
    """The server has several host keys; the one that is on file must be used."""
    rsa = make_key(tmp_path / "rsa", kind="rsa")
    server = own_sshd(f"HostKey {rsa}")
    public = Path(f"{rsa}.pub").read_text()
    server.known_hosts.write_text(f"[{HOST}]:{server.port} {public}")
    assert connect(server).run("true").code == 0


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        ("[127.0.0.1]:{port} {key} a comment", ""),
        ("[127.0.0.*]:{port} {key}", ""),
        ("login?,[127.*]:* {key}", ""),
        ("[127.0.0.*]:*,![127.0.0.1]:* {key}", "unknown"),
        ("127.0.0.1 {key}", "unknown"),
        ("[127.0.0.1]:{port} {other}\n[127.0.0.1]:{port} {key}", ""),
        ("[127.0.0.1]:{port} {key}\n@revoked * {key}", "marked as revoked"),
        ("[127.0.0.1]:{port} {other}\n@cert-authority * {key}", "CHANGED"),
        ("@cert-authority * {key}", "unknown"),
        ("|1|broken {key}\nrubbish\n\n# nothing", "unknown"),
    ],
)
def test_what_a_known_hosts_line_says(
    sshd: Sshd, connect: Connect, tmp_path: Path, line: str, refusal: str
) -> None:
    other = " ".join(Path(f"{make_key(tmp_path / 'other')}.pub").read_text().split()[:2])
    known = tmp_path / "known_hosts"
    known.write_text(line.format(port=sshd.port, key=sshd.public_host_key, other=other) + "\n")
    shell = connect(sshd, known_hosts=known)
    if refusal:
        with pytest.raises(Unavailable, match=refusal):
            shell.run("true")
    else:
        assert shell.run("true").code == 0


def test_hashed_known_hosts(sshd: Sshd, connect: Connect, tmp_path: Path) -> None:
    known = Path(shutil.copy(sshd.known_hosts, tmp_path / "known_hosts"))
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True)
    assert known.read_text().startswith("|1|")
    assert connect(sshd, known_hosts=known).run("true").code == 0


# --- keys ---


def test_a_key_that_the_server_does_not_know(sshd: Sshd, connect: Connect, tmp_path: Path) -> None:
    wrong = make_key(tmp_path / "wrong")
    shell = connect(sshd, user="root", key_file=wrong)
    message = rf"did not let user root in\. Tried: {wrong}; there is no ssh-agent key\."
    with pytest.raises(Unavailable, match=message):
        shell.run("true")


def test_key_files_that_cannot_be_used(sshd: Sshd, connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "rubbish").write_text("rubbish")
    for file, message in {
        make_key(tmp_path / "locked", passphrase="secret"): "protected by a passphrase.*ssh-add",
        tmp_path / "missing": "cannot be read: No such file",
        tmp_path: "cannot be read: Is a directory",
        tmp_path / "rubbish": "not a private key that can be used",
    }.items():
        with pytest.raises(Unavailable, match=message) as caught:
            connect(sshd, key_file=file).run("true")
        assert str(file) in str(caught.value)


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    place = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(place)], stdout=subprocess.DEVNULL)
    wait_for(place.exists, "the agent")
    monkeypatch.setenv("SSH_AUTH_SOCK", str(place))
    ask = tmp_path / "ask"
    ask.write_text("#!/bin/sh\necho secret\n")
    ask.chmod(0o755)
    monkeypatch.setenv("SSH_ASKPASS", str(ask))
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")

    def add(key: Path) -> None:
        subprocess.run(["ssh-add", "-q", str(key)], check=True, stdin=subprocess.DEVNULL)

    yield add
    process.kill()
    process.wait()


def test_a_locked_key_file_is_taken_from_the_agent_before_all_others(
    own_sshd: Start, connect: Connect, tmp_path: Path, agent: Callable[[Path], None]
) -> None:
    server = own_sshd("MaxAuthTries 2")
    locked = Path(shutil.copy(server.key, tmp_path / "locked"))
    shutil.copy(f"{server.key}.pub", tmp_path / "locked.pub")
    for number in range(4):
        agent(make_key(tmp_path / f"other{number}"))
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(locked)],
        check=True,
        capture_output=True,
    )
    agent(locked)
    assert connect(server, key_file=locked).run("true").code == 0
    with pytest.raises(Unavailable, match=r"did not let .* an ssh-agent with 5 key\(s\)"):
        connect(server, key_file=None).run("true")


def test_without_a_key_file_the_agent_and_the_usual_files_are_tried(
    sshd: Sshd,
    connect: Connect,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    agent: Callable[[Path], None],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    agent(make_key(tmp_path / "other"))
    shell = connect(sshd, key_file=None)
    with pytest.raises(
        Unavailable, match="Tried: other of the agent; there is an ssh-agent with 1"
    ):
        shell.run("true")
    shutil.copy(sshd.key, tmp_path / ".ssh" / "id_ed25519")
    assert connect(sshd, key_file=None).run("true").code == 0


# --- ssh_config ---


def write_config(folder: Path, text: str, server: Sshd) -> Path:
    file = folder / "ssh_config"
    file.write_text(
        text
        + f"\nHost *\n  HostName {HOST}\n  Port {server.port}\n  User {server.user}\n"
        + f"  IdentityFile {server.key}\n"
        + f"  UserKnownHostsFile {folder / 'none'} {server.known_hosts}\n"
    )
    return file


@pytest.mark.parametrize(
    ("text", "logins"),
    [
        ("", 1),
        ("Host login\n  ProxyJump gate", 2),
        ("Host login\n  ProxyJump gate,inner", 3),
        ("Host login\n  ProxyJump inner\nHost inner\n  ProxyJump gate", 3),
        ("Host login\n  ProxyJump root@gate:{port}", 2),
        ("Host login\n  ProxyJump none\n  ProxyCommand nonsense", 1),
        ("Host login\n  ProxyCommand {python} {proxy} %h %p", 1),
        ("Host login\n  ProxyJump gate\nHost gate\n  ProxyCommand {python} {proxy} %h %p", 2),
    ],
)
def test_the_way_that_an_ssh_config_says(
    own_sshd: Start, connect: Connect, tmp_path: Path, text: str, logins: int
) -> None:
    server = own_sshd()
    proxy = tmp_path / "proxy.py"
    proxy.write_text(
        "import os, socket, sys, threading\n"
        "peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "def pump(take, give):\n"
        "    while data := take(65536): give(data)\n"
        "    os._exit(0)\n"
        "send = lambda data: os.write(1, data)\n"
        "threading.Thread(target=pump, args=(peer.recv, send)).start()\n"
        "pump(lambda size: os.read(0, size), peer.sendall)\n"
    )
    text = text.format(port=server.port, python=sys.executable, proxy=proxy)
    config = write_config(tmp_path, text, server)
    shell = connect(server, "login", port=None, key_file=None, known_hosts=None, config_file=config)
    assert shell.run("cat", stdin=BINARY, limit=len(BINARY)).stdout == BINARY
    assert server.logins() == logins


def test_what_the_operator_set_goes_before_the_config(
    sshd: Sshd, connect: Connect, tmp_path: Path
) -> None:
    config = tmp_path / "ssh_config"
    config.write_text(
        "Host login\n  HostName 127.0.0.1\n  Port 1\n  User nobody\n"
        "  IdentityFile /nowhere\n  UserKnownHostsFile /nowhere\n"
    )
    shell = connect(sshd, "login", user=sshd.user, config_file=config)
    assert shell.where == "login"
    assert shell.run("true").code == 0


def test_a_config_in_the_home_folder_is_found(
    sshd: Sshd, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    write_config(tmp_path, "", sshd).rename(tmp_path / ".ssh" / "config")
    shell = connect(sshd, "login", port=None, key_file=None, known_hosts=None)
    assert shell.run("true").code == 0


def test_a_host_key_alias(sshd: Sshd, connect: Connect, tmp_path: Path) -> None:
    config = write_config(tmp_path, "Host login\n  HostKeyAlias cluster", sshd)
    shell = connect(sshd, "login", port=None, config_file=config)
    with pytest.raises(Unavailable, match="cluster is not in"):
        shell.run("true")
    known = tmp_path / "known"
    known.write_text(f"cluster {sshd.public_host_key}\n")
    shell = connect(sshd, "login", port=None, config_file=config, known_hosts=known)
    assert shell.run("true").code == 0


def test_the_host_key_of_a_jump_host_is_verified(
    sshd: Sshd, connect: Connect, tmp_path: Path
) -> None:
    text = "Host login\n  ProxyJump gate\nHost gate\n  HostKeyAlias elsewhere"
    config = write_config(tmp_path, text, sshd)
    shell = connect(sshd, "login", port=None, config_file=config)
    with pytest.raises(
        Unavailable, match=r"the host key of gate \(127.0.0.1 port \d+\) is unknown"
    ):
        shell.run("true")


def test_a_jump_host_that_cannot_reach_the_login_node(
    sshd: Sshd, connect: Connect, tmp_path: Path
) -> None:
    text = f"Host login\n  ProxyJump gate\n  Port {free_port()}"
    shell = connect(sshd, "login", port=None, config_file=write_config(tmp_path, text, sshd))
    with pytest.raises(Unavailable, match=r"the jump host could not reach login .*Connect"):
        shell.run("true")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Host *\n  ProxyJump gate", "circle: login -> gate -> gate"),
        ("Host a\n  ProxyJump login\nHost login\n  ProxyJump a", "circle: login -> a -> login"),
        ("Host login\n  ProxyJump a:b:c", "not of the form"),
        ("Host login\n  Port ssh", "Port of login is not a number"),
        ("Host 'login", "cannot be understood"),
        ("Host\n", "cannot be understood"),
    ],
)
def test_a_config_that_cannot_work(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "ssh_config"
    config.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        SSHShell("login", config_file=config)
    assert str(config) in str(caught.value)


def test_a_config_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        SSHShell("login", config_file=tmp_path / "missing")


def test_a_proxy_command_that_ends_at_once(sshd: Sshd, connect: Connect, tmp_path: Path) -> None:
    config = write_config(tmp_path, "Host login\n  ProxyCommand exit 1", sshd)
    shell = connect(sshd, "login", port=None, config_file=config)
    with pytest.raises(Unavailable, match=r"unreachable since .*login"):
        shell.run("true")


def test_a_name_that_cannot_be_resolved(sshd: Sshd, connect: Connect) -> None:
    with pytest.raises(Unavailable, match=r"the name of no-such-host.invalid .*cannot be resolved"):
        connect(sshd, "no-such-host.invalid").run("true")
