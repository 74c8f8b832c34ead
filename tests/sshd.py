"""A real, throwaway sshd on loopback, for the account that runs the tests."""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SSHD = "/usr/sbin/sshd"


def need_sshd() -> None:
    """The one place that decides whether tests with a real sshd can run."""
    if not Path(SSHD).exists():
        pytest.skip(f"{SSHD} is missing: apt-get install --no-install-recommends openssh-server")


def wait_for(condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.01)


def make_key(file: Path, passphrase: str = "", kind: str = "ed25519") -> Path:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", file.name, "-f", str(file)],
        check=True,
    )
    return file


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Sshd:
    """`home` is HOME of the commands, so a `.bash_profile` in it is read by `bash -l`."""

    def __init__(self, folder: Path, *options: str) -> None:
        need_sshd()
        Path("/run/sshd").mkdir(exist_ok=True)  # where a root sshd shuts its unprivileged part in
        self.port = free_port()
        self.host_key = make_key(folder / "host_key")
        self.key = make_key(folder / "key")
        self.home = folder / "home"
        self.home.mkdir()
        self.log_file = folder / "sshd.log"
        self.known_hosts = folder / "known_hosts"
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {self.public_host_key}\n")
        authorized = folder / "authorized_keys"
        shutil.copy(f"{self.key}.pub", authorized)
        self.config = folder / "sshd_config"
        lines = (
            "ListenAddress 127.0.0.1",
            f"Port {self.port}",
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {authorized}",
            f"PidFile {folder / 'sshd.pid'}",
            f"SetEnv HOME={self.home}",
            "UsePAM no",
            "StrictModes no",
            "PermitRootLogin yes",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "LogLevel VERBOSE",
            *options,
        )
        self.config.write_text("\n".join(lines) + "\n")
        self.start()

    @property
    def public_host_key(self) -> str:
        return " ".join(Path(f"{self.host_key}.pub").read_text().split()[:2])

    @property
    def user(self) -> str:
        return getpass.getuser()

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [SSHD, "-D", "-f", str(self.config), "-E", str(self.log_file)],
        )
        wait_for(self._listens, "sshd to listen")

    def _listens(self) -> bool:
        assert self._process.poll() is None, self.log
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def sessions(self) -> list[int]:
        """The pids of the sshd processes that serve the connections (not what runs in them)."""
        found: list[int] = []
        parents = [self._process.pid]
        for parent in parents:
            for pid in _read(f"/proc/{parent}/task/{parent}/children").split():
                if _read(f"/proc/{pid}/comm").startswith("sshd"):
                    found.append(int(pid))
                    parents.append(int(pid))
        return found

    def signal_sessions(self, number: int) -> list[int]:
        pids = self.sessions()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    def stop(self) -> None:
        self.signal_sessions(signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    # --- what the log says ---

    def logins(self) -> int:
        return self.log.count("Accepted publickey")

    def most_sessions_at_once(self) -> int:
        most = now = 0
        for word in re.findall(r"^(Starting|Close) session:", self.log, re.M):
            now += 1 if word == "Starting" else -1
            most = max(most, now)
        return most


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:  # the process has ended
        return ""
