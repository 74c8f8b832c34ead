"""The Debian packages that the lab needs: which are missing, and how they get installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.lab.errors import LabError

PACKAGES = (
    "slurmctld",
    "slurmd",
    "slurm-client",
    "slurmdbd",
    "munge",
    "openssh-server",
    "openssh-client",
    "mariadb-server",  # behind slurmdbd
    "mmdebstrap",  # root folders of newer releases, and container images
    "mount",  # with tzdata, in every Debian but the smallest
    "tzdata",
    "charliecloud-runtime",  # the one container engine of HPC that Debian 12 packages
)

# What the packages would start now and at every boot. The lab starts its own copies.
UNITS = ("slurmctld", "slurmd", "slurmdbd", "munge", "ssh", "mariadb")

INSTALL_SECONDS = 1800  # the longest that apt-get may take
SHOWN = 2000  # characters of its words in an error

POLICY = Path("/usr/sbin/policy-rc.d")


def missing() -> list[str]:
    """The packages of PACKAGES that aren't installed."""
    query = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *PACKAGES],
        capture_output=True,
        text=True,
        check=False,  # exit 1 only says that some are unknown
        timeout=60,
    )
    there = {line.split()[0] for line in query.stdout.splitlines() if line.endswith(" installed")}
    return [package for package in PACKAGES if package not in there]


def _machine_problem() -> str | None:
    if os.geteuid() != 0:
        return "the lab needs root: it makes namespaces and runs sshd for another user"
    if not shutil.which("apt-get") or not shutil.which("dpkg-query"):
        return "the lab needs Debian or Ubuntu: its servers come from their packages"
    return None


def problem() -> str | None:
    """Why the lab can't run on this machine, in one line; None when it can."""
    if reason := _machine_problem():
        return reason
    if lacking := missing():
        return f"the lab misses {', '.join(lacking)}: run `python -m tests.lab install`"
    trial = ["unshare", "--fork", "--pid", "--mount", "true"]
    if subprocess.run(trial, capture_output=True, check=False, timeout=60).returncode:
        return "the lab can't make namespaces here (a container without CAP_SYS_ADMIN?)"
    return None


@contextlib.contextmanager
def _services_stay_down() -> Iterator[None]:
    """Keep packages from starting services: Debian asks policy-rc.d first, and 101 means no.

    A machine that has a policy of its own keeps it. Packages also enable their units for the next
    boot; that is taken back for the units that weren't there before.
    """
    before = _units()
    ours = not POLICY.exists()
    if ours:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            POLICY.unlink()
        if shutil.which("systemctl") and (new := _units() - before):
            disable = ["systemctl", "--quiet", "disable", *sorted(new)]
            subprocess.run(disable, capture_output=True, check=False, timeout=60)


def _units() -> set[str]:
    return {unit for unit in UNITS if Path(f"/lib/systemd/system/{unit}.service").exists()}


def _apt(*argv: str) -> str | None:
    """Run apt-get; what it said if it failed."""
    done = subprocess.run(
        ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=300", *argv],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=INSTALL_SECONDS,
        check=False,
    )
    return done.stdout if done.returncode else None


def install() -> None:
    """Install what is missing. LabError says what is missing and why it can't be installed."""
    lacking = missing() if shutil.which("dpkg-query") else list(PACKAGES)
    if not lacking:
        return
    if reason := _machine_problem():
        raise LabError(f"can't install {', '.join(lacking)}: {reason}")
    command = ("install", "-y", "--no-install-recommends", *lacking)
    with _services_stay_down():
        # A fresh machine's lists are empty or old. To try without them first costs half a second.
        if _apt(*command) and (words := _apt("update") or _apt(*command)):
            raise LabError(f"can't install {', '.join(lacking)}: {words.strip()[-SHOWN:]}")
