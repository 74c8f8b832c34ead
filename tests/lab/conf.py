"""The text of every configuration file of a lab. Nothing here touches the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NODES = ("node1", "node2")
CPUS = 4  # of each node; pretended, see SlurmdParameters=config_overrides
MEMORY = 4000  # MiB of each node; pretended as well
GPUS = 2  # of each node; /dev/null under other names
USER = "chris"
ACCOUNT = "lab"
LIMITED_QOS = "limited"

# The commands for sacctmgr's standard input.
BOOKS = f"""\
add cluster lab
add qos {LIMITED_QOS} MaxSubmitJobsPerUser=1
add account {ACCOUNT} qos=normal,{LIMITED_QOS}
add user {USER} account={ACCOUNT} qos=normal,{LIMITED_QOS} defaultqos=normal
"""

# cgroup.conf for jobs that are killed when they use more memory than they asked for.
CGROUP = """\
CgroupPlugin=cgroup/v1
ConstrainRAMSpace=yes
ConstrainSwapSpace=yes
"""

# What the SSH user calls is counted for these.
COUNTED = ("squeue", "sacct", "sbatch", "scancel", "scontrol", "sinfo", "sacctmgr")

# Debian's own order; the counting wrappers come before it in the SSH user's PATH.
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Ports:
    """The loopback ports of one lab."""

    sshd: int
    slurmctld: int
    slurmdbd: int
    slurmd: tuple[int, int]


@dataclass(frozen=True)
class Options:
    """What makes one lab's cluster differ from another's; see SlurmLab."""

    accounting: bool = False
    cgroup: bool = False
    min_job_age: int = 300
    extra_conf: Sequence[str] = ()


def slurm_conf(root: Path, ports: Ports, options: Options) -> str:
    """slurm.conf: times tuned so that a test waits for nothing but the work itself."""
    lines = [
        "ClusterName=lab",
        "SlurmctldHost=localhost(127.0.0.1)",
        f"SlurmctldPort={ports.slurmctld}",
        "SlurmUser=root",
        "SlurmdUser=root",
        f"AuthInfo=socket={root}/munge/socket",
        f"StateSaveLocation={root}/state",
        f"SlurmdSpoolDir={root}/spool/%n",
        f"SlurmctldPidFile={root}/run/slurmctld.pid",
        f"SlurmdPidFile={root}/run/%n.pid",
        f"SlurmctldLogFile={root}/log/slurmctld.log",
        f"SlurmdLogFile={root}/log/%n.log",
        f"TaskProlog={root}/slurm/task_prolog",
        "MailProg=/bin/true",
        "MpiDefault=none",
        f"ProctrackType=proctrack/{'cgroup' if options.cgroup else 'linuxproc'}",
        f"TaskPlugin=task/{'cgroup' if options.cgroup else 'none'}",
        "SchedulerParameters="
        "batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "DefMemPerCPU=100",  # or a job that asks for no memory takes a node's all
        "GresTypes=gpu",
        "ReturnToService=2",
        "SlurmdTimeout=10",
        "KillWait=2",
        "MessageTimeout=10",
        "TCPTimeout=2",
        f"MinJobAge={options.min_job_age}",
        "MaxJobCount=20000",
        "PropagateResourceLimits=NONE",
        "SlurmdParameters=config_overrides",
    ]
    if options.accounting:
        lines += [
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageHost=127.0.0.1",
            f"AccountingStoragePort={ports.slurmdbd}",
            f"AccountingStoragePass={root}/munge/socket",
            "AccountingStorageTRES=gres/gpu",
            "AccountingStorageEnforce=limits,qos",
        ]
    else:
        lines.append("AccountingStorageType=accounting_storage/none")
    lines += [
        f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={CPUS}"
        f" RealMemory={MEMORY} Gres=gpu:{GPUS} State=UNKNOWN"
        for node, port in zip(NODES, ports.slurmd, strict=True)
    ]
    everywhere = f"Nodes={','.join(NODES)} State=UP"
    lines += [
        f"PartitionName=debug {everywhere} Default=YES MaxTime=INFINITE",
        f"PartitionName=short {everywhere} MaxTime=5",
        f"PartitionName=gpu {everywhere} MaxTime=INFINITE",
        *options.extra_conf,
    ]
    return "\n".join(lines) + "\n"


def gres_conf(root: Path) -> str:
    """gres.conf: pretended GPUs, one character device each."""
    return f"NodeName={','.join(NODES)} Name=gpu File={root}/dev/gpu[0-{GPUS - 1}]\n"


def slurmdbd_conf(root: Path, ports: Ports) -> str:
    """slurmdbd.conf: the database is reached by its socket, see MYSQL_UNIX_PORT."""
    return "\n".join(
        [
            "DbdHost=localhost",
            "DbdAddr=127.0.0.1",
            f"DbdPort={ports.slurmdbd}",
            "SlurmUser=root",
            f"AuthInfo=socket={root}/munge/socket",
            f"PidFile={root}/run/slurmdbd.pid",
            f"LogFile={root}/log/slurmdbd.log",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",
            "StorageUser=root",
            "StorageLoc=slurm",
            "",
        ]
    )


def mariadb_conf(root: Path) -> str:
    """my.cnf: small, no network, and no care for power cuts."""
    return "\n".join(
        [
            "[mariadbd]",
            f"datadir={root}/mariadb/data",
            f"tmpdir={root}/mariadb",  # its names hold the pid, which is the same in every lab
            f"socket={root}/mariadb/socket",
            f"pid-file={root}/run/mariadb.pid",
            f"log-error={root}/log/mariadb.log",
            "user=root",
            "skip-networking",
            "skip-name-resolve",
            "innodb-log-file-size=4M",
            "innodb-buffer-pool-size=64M",  # slurmdbd warns below its liking, and works
            "innodb-lock-wait-timeout=900",
            "innodb-flush-log-at-trx-commit=0",
            "debug-no-sync",
            "innodb-doublewrite=0",
            "",
        ]
    )


def sshd_config(root: Path, ports: Ports) -> str:
    """sshd_config: keys only, the lab's user only, and what a login node usually allows."""
    return "\n".join(
        [
            f"Port {ports.sshd}",
            "ListenAddress 127.0.0.1",
            f"HostKey {root}/ssh/host_key",
            f"PidFile {root}/run/sshd.pid",
            f"AllowUsers {USER}",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "AllowTcpForwarding yes",
            "UseDNS no",
            "PrintMotd no",
            "LogLevel INFO",  # `Accepted publickey` is what connections() counts
            f"Banner {root}/ssh/banner",
            f"SetEnv PATH={root}/bin:{SYSTEM_PATH}",
            "Subsystem sftp internal-sftp",
            "",
        ]
    )


def ssh_config(root: Path, ports: Ports) -> str:
    """ssh_config for clients: `login` is the lab's sshd, `behind` is the same one through it."""
    return "\n".join(
        [
            "Host login behind",
            "  HostName 127.0.0.1",
            f"  Port {ports.sshd}",
            f"  User {USER}",
            f"  IdentityFile {root}/ssh/key",
            "  IdentitiesOnly yes",
            f"  UserKnownHostsFile {root}/ssh/known_hosts",
            "  StrictHostKeyChecking yes",
            "  BatchMode yes",
            "Host behind",
            "  ProxyJump login",
            "",
        ]
    )


def bash_profile(root: Path) -> str:
    """The user's ~/.bash_profile: /etc/profile has just reset PATH; and the noise of real sites."""
    return "\n".join(
        [
            f'export PATH="{root}/bin:$PATH"',
            'echo "Welcome to the lab cluster. Downtime: Monday 06:00."',
            'echo "lab: your scratch folder is cleaned after 30 days" >&2',
            "",
        ]
    )


def counting_wrapper(root: Path, command: str) -> str:
    """A script that records one call, then becomes the real command.

    A record is the number of arguments, then the command and each argument, all ended by NUL, the
    one byte that no argument can hold. One file a process: a long record is written in pieces,
    which would mix in a shared file. What jobs themselves call is not the gateway's doing.
    """
    return "\n".join(
        [
            "#!/bin/sh",
            f'[ -n "$SLURM_JOB_ID" ] || printf "%s\\0" $# {command} "$@" >>"{root}/calls/$$"',
            f'exec /usr/bin/{command} "$@"',
            "",
        ]
    )
