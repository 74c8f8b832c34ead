"""The process that holds one lab: its namespaces, its ports, its folder; and its end.

Run as a script (`python keeper.py FOLDER`, with FOLDER/plan.json) so that it needs nothing from
this checkout. It stays outside the lab's namespaces and forks the lab's PID 1:

    test process ──stdin pipe──▶ keeper ──pipe──▶ PID 1 of the lab ◀── every server and job
                                                  (adopts orphans)

When the test process goes, however it goes, the pipe closes; the keeper then closes its own pipe,
PID 1 exits, and the kernel kills everything in the PID namespace and forgets its mounts. The
keeper waits for that and deletes the folder. A lab that should outlive its starter (`stay`) ends
on SIGTERM instead.

When ready it prints one line of JSON: {"pid": PID 1 as the host sees it, "ports": [...]}.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

CLONE_NEWNS = 0x00020000  # linux/sched.h
CLONE_NEWPID = 0x20000000

# Blocks of ports below the range that the kernel hands out itself (it begins at 32768), so no
# outgoing connection can sit on one.
FIRST_PORT = 20000
BLOCKS = 1000
BLOCK_SIZE = 8


class Plan(TypedDict):
    """What the keeper is asked to do."""

    commands: list[list[str]]  # run in order as PID 1 before the lab is ready: mounts
    rubbish: list[str]  # cgroup folders to remove at the end
    stay: bool  # outlive the process that started us


def unshare(flags: int) -> None:
    """unshare(2), which Python has only since 3.12."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def reserve_ports() -> tuple[socket.socket, list[int]]:
    """A block of ports that no other lab takes as long as the returned socket is open.

    The reservation is an abstract Unix socket: exclusive, in the same network namespace as the
    ports, and gone with the process.
    """
    for block in range(BLOCKS):
        reservation = socket.socket(socket.AF_UNIX)
        first = FIRST_PORT + block * BLOCK_SIZE
        try:
            reservation.bind(f"\0pman-lab-ports-{first}")
        except OSError:
            reservation.close()
            continue
        ports = list(range(first, first + BLOCK_SIZE))
        if all(_is_free(port) for port in ports):
            return reservation, ports
        reservation.close()
    raise OSError("no block of free ports")


def be_first_process(commands: list[list[str]], ready: int, life: int) -> None:
    """Be PID 1: mount, say so, then live until `life` is closed."""
    unshare(CLONE_NEWNS)
    for command in commands:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=2)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then reaps what PID 1 adopts
    os.write(ready, b"!")
    os.close(ready)
    os.read(life, 1)


def fork_lab(plan: Plan, close: list[int]) -> tuple[int, int]:
    """Fork the lab's PID 1; its pid and the pipe that it lives by. SystemExit when it fails."""
    unshare(CLONE_NEWPID)  # for the children; we stay outside
    life_end, life = os.pipe()
    ready, ready_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for descriptor in (life, ready, *close):
                os.close(descriptor)
            be_first_process(plan["commands"], ready_end, life_end)
            status = 0
        except Exception as error:  # a process must not return into its parent's code
            print(f"the lab's mounts: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(life_end)
    os.close(ready_end)
    if not os.read(ready, 1):
        os.waitpid(pid, 0)
        raise SystemExit(1)
    os.close(ready)
    return pid, life


def wait_for_end(stay: bool) -> None:
    """Return on SIGTERM, on the death of a child (the lab's PID 1), and when stdin is closed."""
    wake_end, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    select.select([wake_end] if stay else [wake_end, sys.stdin.fileno()], [], [])


def remove_cgroups(top: Path) -> None:
    """Remove a cgroup and those below it; their files go with them."""
    for folder, _, _ in os.walk(top, topdown=False):
        Path(folder).rmdir()


def main() -> None:
    """Hold one lab from start to end."""
    root = Path(sys.argv[1])
    plan: Plan = json.loads((root / "plan.json").read_text())
    os.chdir("/")
    with (root / "alive").open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)  # `up` and `down` ask for this lock
        alive.write(str(os.getpid()))
        alive.flush()
        reservation, ports = reserve_ports()
        with reservation:
            try:
                pid, life = fork_lab(plan, [reservation.fileno(), alive.fileno()])
                print(json.dumps({"pid": pid, "ports": ports}), flush=True)
                wait_for_end(plan["stay"])
                os.close(life)
                os.waitpid(pid, 0)
            finally:
                shutil.rmtree(root)
                for folder in plan["rubbish"]:
                    remove_cgroups(Path(folder))


if __name__ == "__main__":
    main()
