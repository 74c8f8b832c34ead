"""The servers of a lab: how each is started, which processes are its own, when it answers."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab import conf
from tests.lab.namespace import Namespace, Process
from tests.waiting import wait_for

STOP_SECONDS = 15  # the longest that a server may take to save its state


@dataclass(frozen=True)
class Server:
    """One server. Its `argv` puts itself into the background."""

    argv: Sequence[str]
    owns: Callable[[Process], bool]
    answers: Callable[[], bool]


def servers(
    root: Path, ports: conf.Ports, output: Callable[[Sequence[str]], str | None]
) -> dict[str, Server]:
    """Every server by name. `output` runs a command inside: its stdout, or None if it failed."""
    munge, database = root / "munge", root / "mariadb"

    def node(name: str, port: int) -> Server:
        return Server(
            ("slurmd", "-N", name),
            lambda process: process.name == "slurmd" and name in process.argv,
            lambda: listens(port) and is_up(output(("sinfo", "-h", "-n", name, "-o", "%T"))),
        )

    return {
        "munged": Server(
            (
                "munged",
                "--force",  # it finds a folder below the temp folder too open
                f"--key-file={munge}/key",
                f"--socket={munge}/socket",
                f"--seed-file={munge}/seed",
                f"--pid-file={root}/run/munged.pid",
                f"--log-file={root}/log/munged.log",
            ),
            named("munged"),
            lambda: output(("munge", "--no-input", f"--socket={munge}/socket")) is not None,
        ),
        "mariadbd": Server(
            ("sh", "-c", f"mariadbd --defaults-file={database}/my.cnf <&- >/dev/null 2>&1 &"),
            named("mariadbd"),
            lambda: output(("mariadb-admin", f"--socket={database}/socket", "ping")) is not None,
        ),
        "slurmdbd": Server(
            ("env", f"MYSQL_UNIX_PORT={database}/socket", "slurmdbd"),
            named("slurmdbd"),
            lambda: listens(ports.slurmdbd) and output(("sacctmgr", "list", "cluster")) is not None,
        ),
        "slurmctld": Server(
            ("slurmctld",),
            named("slurmctld", "slurmscriptd"),
            lambda: listens(ports.slurmctld) and " is UP" in (output(("scontrol", "ping")) or ""),
        ),
        "slurmd1": node(conf.NODES[0], ports.slurmd[0]),
        "slurmd2": node(conf.NODES[1], ports.slurmd[1]),
        "sshd": Server(
            ("/usr/sbin/sshd", "-f", f"{root}/ssh/sshd_config", "-E", f"{root}/log/sshd.log"),
            named("sshd"),  # its sessions too: sshd, sshd-session
            lambda: greets_as_ssh(ports.sshd),
        ),
    }


def stop(name: str, server: Server, namespace: Namespace) -> None:
    """End a server with its sessions; its state is saved, as `systemctl stop` would."""

    def mine() -> list[int]:
        return [process.pid for process in namespace.processes() if server.owns(process)]

    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in mine():
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # another one took it along
                continue
        try:
            # Twice: a session that is forked during one look at /proc is missed by it.
            wait_for(
                lambda: not (mine() or mine()), STOP_SECONDS, f"the end of {name} by {number.name}"
            )
        except TimeoutError:
            if number == signal.SIGKILL:
                raise
        else:
            return


def named(*starts: str) -> Callable[[Process], bool]:
    """A test for processes whose names start like one of these."""
    return lambda process: process.name.startswith(starts)


def is_up(state: str | None) -> bool:
    """Whether sinfo's word for a node's state means that the node answers slurmctld."""
    return (state or "").strip() in ("idle", "mixed", "allocated", "completing")


def listens(port: int) -> bool:
    """Whether something accepts connections on a loopback port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def greets_as_ssh(port: int) -> bool:
    """Whether an SSH server says its version on a loopback port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
