"""Lays out a lab's folder: keys, configuration, the users' files. Its text comes from conf.py."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.lab import conf

LONGEST_ROOT = 60  # bytes; the path of a Unix socket below it must stay under 108
FOLDERS = "bin calls dev etc home log munge pman run share slurm spool ssh state tmp"


@dataclass(frozen=True)
class User:
    """The ordinary user who logs in by SSH."""

    uid: int  # of the group as well
    home: Path


def make_root(wanted: Path | None) -> Path:
    """The lab's folder with its empty rooms: `wanted` (new or empty), or one of its own."""
    if wanted is None:
        root = Path(tempfile.mkdtemp(prefix="pman-lab-"))
    else:
        root = wanted.absolute()
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise ValueError(f"root {root}: not empty")
    if len(os.fsencode(root)) > LONGEST_ROOT:
        root.rmdir()
        raise ValueError(f"root {root}: longer than {LONGEST_ROOT} bytes")
    root.chmod(0o755)
    for name in FOLDERS.split():
        (root / name).mkdir()
    return root


def write_identities(root: Path, base: Path) -> User:
    """Private copies of the files in /etc (`base`) that say who is who, with the user added."""
    own = f"{conf.USER}:"
    lines: dict[str, list[str]] = {}
    for name in ("passwd", "group", "shadow"):
        text = (base / name).read_text()
        lines[name] = [line for line in text.splitlines() if not line.startswith(own)]
    taken = {line.split(":")[2] for name in ("passwd", "group") for line in lines[name]}
    uid = next(number for number in itertools.count(4711) if str(number) not in taken)
    user = User(uid, root / "home" / conf.USER)
    lines["passwd"].append(f"{own}x:{uid}:{uid}:ChRIS:{user.home}:/bin/bash")
    lines["group"].append(f"{own}x:{uid}:")
    lines["shadow"].append(f"{own}*:19000:0:99999:7:::")  # `!` would be a locked account to sshd
    lines["hosts"] = [f"127.0.0.1 localhost {socket.gethostname()}"]
    for name, content in lines.items():
        (root / "etc" / name).write_text("\n".join(content) + "\n")
    (root / "etc" / "shadow").chmod(0o600)
    return user


def write_cluster(root: Path, ports: conf.Ports, options: conf.Options) -> None:
    """Munge's key, the pretended GPUs, and all that belongs into /etc/slurm."""
    key = root / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    for number in range(conf.GPUS):
        gpu = root / "dev" / f"gpu{number}"
        os.mknod(gpu, stat.S_IFCHR, os.makedev(1, 3))  # the numbers of /dev/null
        gpu.chmod(0o666)
    slurm = root / "slurm"
    (slurm / "slurm.conf").write_text(conf.slurm_conf(root, ports, options))
    (slurm / "gres.conf").write_text(conf.gres_conf(root))
    # Jobs' scratch folders go with the lab: `export` lines of a TaskProlog set their environment.
    (root / "tmp").chmod(0o1777)
    prolog = slurm / "task_prolog"
    prolog.write_text(f"#!/bin/sh\necho export TMPDIR={root}/tmp\n")
    prolog.chmod(0o755)
    if options.cgroup:
        (slurm / "cgroup.conf").write_text(conf.CGROUP)
    if options.accounting:
        (root / "mariadb").mkdir()
        (root / "mariadb" / "my.cnf").write_text(conf.mariadb_conf(root))
        slurmdbd = slurm / "slurmdbd.conf"
        slurmdbd.write_text(conf.slurmdbd_conf(root, ports))
        slurmdbd.chmod(0o600)  # slurmdbd insists


def write_login_node(root: Path, ports: conf.Ports, user: User) -> None:
    """The user's home, the counting wrappers, sshd's and its clients' keys and configuration."""
    ssh = root / "ssh"
    for command in conf.COUNTED:
        wrapper = root / "bin" / command
        wrapper.write_text(conf.counting_wrapper(root, command))
        wrapper.chmod(0o755)
    for name in ("host_key", "key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(ssh / name)],
            check=True,
            capture_output=True,
            timeout=30,
        )
    host_key = (ssh / "host_key.pub").read_text()
    (ssh / "known_hosts").write_text(f"[127.0.0.1]:{ports.sshd} {host_key}")
    (ssh / "banner").write_text("Authorised use only: this is the login node of the lab.\n")
    (ssh / "sshd_config").write_text(conf.sshd_config(root, ports))
    (ssh / "ssh_config").write_text(conf.ssh_config(root, ports))
    profile, keys = user.home / ".bash_profile", user.home / ".ssh"
    user.home.mkdir(mode=0o700)
    keys.mkdir(mode=0o700)
    profile.write_text(conf.bash_profile(root))
    authorized = Path(shutil.copy(ssh / "key.pub", keys / "authorized_keys"))
    for path in (user.home, profile, keys, authorized, root / "share", root / "calls"):
        os.chown(path, user.uid, user.uid)
