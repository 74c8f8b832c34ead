"""The lab: the real Slurm, sshd and container engines, started for the tests, gone without a trace.

Each lab is one folder and one set of PID and mount namespaces with its own munge, slurmctld, two
slurmd and sshd (and MariaDB and slurmdbd when asked). It needs root on Debian or Ubuntu, changes
nothing of the machine besides the packages that `python -m tests.lab install` adds, and dies with
the process that started it.

- `slurm.SlurmLab`: the cluster, for fixtures; `python -m tests.lab up` is one for a person.
- `images.python_image()`: a container image as a plain folder.
- `problem()`: why the lab can't run here, for pytest's skips.
"""

from __future__ import annotations

from tests.lab.packages import problem

__all__ = ["problem"]
