"""A set of PID and mount namespaces with a folder and ports of its own, held by keeper.py."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.errors import LabError
from tests.waiting import wait_for

KEEPER = Path(__file__).with_name("keeper.py")


@dataclass
class Process:
    """A process of the namespace, by the pid that the host sees."""

    pid: int
    name: str  # the kernel's, at most 15 characters
    argv: list[str]


@dataclass
class Namespace:
    """Started once with `start`, ended once with `end`; see keeper.py for how it dies with us."""

    root: Path
    commands: Sequence[Sequence[str]] = ()
    rubbish: Sequence[Path] = ()
    stay: bool = False
    pid: int = 0  # its PID 1 as the host sees it
    ports: list[int] = field(default_factory=list)
    _keeper: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Return when the mounts are made. LabError shows why they can't be."""
        plan = {
            "commands": [list(command) for command in self.commands],
            "rubbish": [str(folder) for folder in self.rubbish],
            "stay": self.stay,
        }
        (self.root / "plan.json").write_text(json.dumps(plan))
        with (self.root / "keeper.log").open("w+") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(KEEPER), str(self.root)],
                stdin=subprocess.DEVNULL if self.stay else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C in the terminal is for the tests to handle
            )
            assert self._keeper.stdout is not None
            with self._keeper.stdout as answer:
                line = answer.readline()
            if not line:
                self.end()
                log.seek(0)
                raise LabError(f"the lab's namespaces can't be made: {log.read().strip()}")
        ready = json.loads(line)
        self.pid, self.ports = ready["pid"], ready["ports"]

    def enter(self, argv: Sequence[str], ids: tuple[int, int], folder: Path) -> list[str]:
        """The command line that runs `argv` inside, as (uid, gid) `ids`, in `folder`."""
        uid, gid = ids
        nsenter = ["nsenter", "--target", str(self.pid), "--mount", "--pid"]
        who = ["--setuid", str(uid), "--setgid", str(gid)]
        return [*nsenter, *who, "--", "env", f"--chdir={folder}", *argv]

    def processes(self) -> list[Process]:
        """Every process inside."""
        ours = Path(f"/proc/{self.pid}/ns/pid").stat().st_ino
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                if (entry / "ns/pid").stat().st_ino != ours:
                    continue
                name = (entry / "comm").read_text().strip()
                argv = (entry / "cmdline").read_text(errors="replace").split("\0")[:-1]
            except OSError:  # it ended while we looked
                continue
            found.append(Process(int(entry.name), name, argv))
        return found

    def end(self) -> None:
        """End every process inside, and delete the folder. Returns when that is done."""
        if self._keeper is None:
            return
        if self._keeper.stdin is None:
            self._keeper.terminate()
        else:
            self._keeper.stdin.close()
        try:
            self._keeper.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._keeper.kill()  # PID 1 and all the rest follow; the folder stays
            self._keeper.wait()
        self._keeper = None


def keeper_of(root: Path) -> int | None:
    """The pid of the keeper that holds the lab in `root`, if one does."""
    try:
        with (root / "alive").open("r+") as alive:
            try:
                fcntl.flock(alive, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(alive.read())
    except FileNotFoundError:
        pass
    return None


def end_keeper(root: Path) -> bool:
    """End the lab in `root`, whoever started it; False when none is alive there."""
    pid = keeper_of(root)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: keeper_of(root) is None, timeout=30, what=f"the end of the lab in {root}")
    return True
