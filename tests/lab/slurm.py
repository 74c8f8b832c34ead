"""A real Slurm cluster with a login node, in a folder and namespaces of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lab import cgroups, conf, folder, releases, servers
from tests.lab.errors import LabError
from tests.lab.namespace import Namespace
from tests.waiting import wait_for

ANSWER_SECONDS = 30  # the longest that a server may take until it answers
SHOWN = 1500  # characters of each log in an error


class SlurmLab:
    """A cluster from `start()` to `stop()`, or as a context manager.

    - `root`: an empty or new folder with a short path; by default one below the temp folder.
      `stop()` deletes it.
    - `release`: `machine` (the packages of this machine), `trixie` or `sid` (see releases.py).
    - `accounting`: MariaDB and slurmdbd too; without, sacct says that accounting is disabled.
    - `min_job_age`: seconds for which squeue still shows an ended job.
    - `cgroup`: a job that uses more memory than it asked for ends as OUT_OF_MEMORY.
    - `extra_conf`: more lines for slurm.conf; a repeated name wins over the lab's own line.
    - `stay`: outlive this process, until somebody calls namespace.end_keeper(root).
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        release: str = "machine",
        accounting: bool = False,
        min_job_age: int = 300,
        cgroup: bool = False,
        extra_conf: Sequence[str] = (),
        stay: bool = False,
    ) -> None:
        if release not in releases.RELEASES:
            raise ValueError(f"release {release!r}: known are {', '.join(releases.RELEASES)}")
        if release != "machine" and (accounting or cgroup):
            raise ValueError(f"release {release!r} has neither accounting nor cgroup: use machine")
        if cgroup and (reason := cgroups.cgroup_problem()):
            raise ValueError(f"cgroup: {reason}")
        self.release = release
        self.options = conf.Options(accounting, cgroup, min_job_age, tuple(extra_conf))
        self.user = conf.USER
        self._wanted_root = root
        self._stay = stay

    # --- life ---

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Return when every server answers and both nodes are idle."""
        mask = os.umask(0o022)  # the lab's user must be able to read what is written here
        try:
            self._start()
        finally:
            os.umask(mask)

    def _start(self) -> None:
        tree = releases.tree(self.release)  # may build it: before anything is there to clean up
        self.root = folder.make_root(self._wanted_root)
        groups = cgroups.lab_cgroups(self.root) if self.options.cgroup else []
        self._namespace = Namespace(
            self.root,
            commands=[*cgroups.mounts(groups), *releases.mounts(tree, self.root)],
            rubbish=groups,
            stay=self._stay,
        )
        try:
            self._account = folder.write_identities(self.root, tree / "etc")
            self._namespace.start()
            sshd, slurmctld, slurmdbd, *slurmd = self._namespace.ports
            self.ports = conf.Ports(sshd, slurmctld, slurmdbd, (slurmd[0], slurmd[1]))
            folder.write_cluster(self.root, self.ports, self.options)
            folder.write_login_node(self.root, self.ports, self._account)
            with self._showing_logs():
                self._start_servers()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every server and job at once and delete the folder."""
        self._namespace.end()
        shutil.rmtree(self.root, ignore_errors=True)  # there still if the keeper never started

    # --- what a test needs to know ---

    @property
    def storebase(self) -> Path:
        """The shared disk: one path on the machine and in the lab, owned by the lab's user."""
        return self.root / "share"

    @property
    def ssh_config(self) -> Path:
        """For `ssh -F`: `login` is the login node, `behind` the same one by ProxyJump."""
        return self.root / "ssh" / "ssh_config"

    @property
    def slurm_conf(self) -> Path:
        """For SLURM_CONF: with it the machine's own squeue and sbatch work outside, as root."""
        return self.root / "slurm" / "slurm.conf"

    @property
    def settings(self) -> dict[str, str]:
        """Settings that point pman at this cluster."""
        return {
            "CONTAINER_ENV": "slurm",
            "SSH_HOST": "127.0.0.1",
            "SSH_PORT": str(self.ports.sshd),
            "SSH_USER": self.user,
            "SSH_KEY_FILE": f"{self.root}/ssh/key",
            "SSH_KNOWN_HOSTS": f"{self.root}/ssh/known_hosts",
            "STOREBASE": str(self.storebase),
            "STATE_DIR": f"{self.root}/pman",
        }

    def calls(self) -> list[list[str]]:
        """What the SSH user called so far, oldest first: argv of squeue, sacct, sbatch…"""
        files = sorted((self.root / "calls").iterdir(), key=lambda file: file.stat().st_mtime_ns)
        found = []
        for file in files:
            *words, _ = file.read_text(errors="surrogateescape").split("\0")
            while words and len(words) >= (length := int(words[0]) + 2):
                found.append(words[1:length])
                words = words[length:]
        return found

    def clear_calls(self) -> None:
        """Forget the calls so far."""
        for file in (self.root / "calls").iterdir():
            file.unlink()

    def connections(self) -> int:
        """How many SSH logins were accepted so far."""
        return (self.root / "log" / "sshd.log").read_text().count("Accepted publickey")

    # --- what a test may do ---

    def run(
        self,
        *argv: str,
        user: str | None = None,
        check: bool = True,
        input: str | None = None,
        timeout: float = 30,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside the lab as root, or as `user`, in that user's home.

        It isn't counted in `calls()`. With `check`, a failure is a LabError with its output.
        """
        uid, home = 0, self.root
        if user == self.user:
            uid, home = self._account.uid, self._account.home
        elif user not in (None, "root"):
            raise ValueError(f"user {user!r}: the lab has root and {self.user}")
        who = dict.fromkeys(("USER", "LOGNAME"), user or "root")
        done = subprocess.run(
            self._namespace.enter(argv, (uid, uid), home),
            env={**who, "PATH": conf.SYSTEM_PATH, "HOME": str(home), "LANG": "C.UTF-8"},
            input=input or "",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            words = f"{done.stdout}\n{done.stderr}".strip()
            raise LabError(f"{' '.join(argv)}: exit {done.returncode}: {words}")
        return done

    def stop_service(self, name: str) -> None:
        """Stop a server: sshd (with its connections), slurmctld, slurmd1, slurmd2, slurmdbd.

        Jobs go on without slurmctld and slurmd, as on a real cluster.
        """
        servers.stop(name, self._servers[name], self._namespace)

    def start_service(self, name: str) -> None:
        """Start a server unless it runs; returns when it really answers.

        A slurmd answers only when slurmctld does.
        """
        server = self._servers[name]
        with self._showing_logs():
            if not any(server.owns(process) for process in self._namespace.processes()):
                self.run(*server.argv)
            self._await(name)

    def _start_servers(self) -> None:
        self._servers = servers.servers(self.root, self.ports, self._output)
        self._start_together("munged")
        if self.options.accounting:
            database = f"--defaults-file={self.root}/mariadb/my.cnf"
            no_password = "--auth-root-authentication-method=normal"
            self.run("mariadb-install-db", database, "--skip-test-db", no_password)
            self._start_together("mariadbd")
            self._start_together("slurmdbd")
            self.run("sacctmgr", "--immediate", "--quiet", input=conf.BOOKS)
        self._start_together("slurmctld", "sshd")
        self._start_together("slurmd1", "slurmd2")  # before slurmctld they would wait a second

    def _start_together(self, *names: str) -> None:
        for name in names:
            self.run(*self._servers[name].argv)
        for name in names:
            self._await(name)

    def _await(self, name: str) -> None:
        wait_for(self._servers[name].answers, ANSWER_SECONDS, f"an answer from {name}")

    def _output(self, argv: Sequence[str]) -> str | None:
        done = self.run(*argv, check=False)
        return None if done.returncode else done.stdout

    @contextlib.contextmanager
    def _showing_logs(self) -> Iterator[None]:
        """Add the ends of the servers' logs to an error: the folder is soon gone."""
        try:
            yield
        except (LabError, TimeoutError) as error:
            logs = sorted((self.root / "log").glob("*.log"))
            ends = [f"--- {log.name}\n{log.read_text(errors='replace')[-SHOWN:]}" for log in logs]
            raise LabError("\n".join([str(error), *ends])) from error
