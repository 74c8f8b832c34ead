"""`python -m tests.lab install | up | down`: the lab from a shell.

`eval "$(python -m tests.lab up)"` sets pman's settings for a cluster that stays until `down`.
Only those settings are on stdout; everything else is on stderr. Exit 3: this machine can't.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from tests.lab import packages, releases
from tests.lab.errors import LabError
from tests.lab.namespace import end_keeper, keeper_of
from tests.lab.slurm import SlurmLab

ROOT = Path(tempfile.gettempdir()) / "pman-lab-up"


def say(text: str) -> None:
    """Tell the person, not the shell that evaluates our stdout."""
    print(text, file=sys.stderr)


def install(arguments: argparse.Namespace) -> int:
    """Install the packages that the lab needs."""
    packages.install()
    return 0


def up(arguments: argparse.Namespace) -> int:
    """Start the cluster unless it is up, and print its settings."""
    saved = ROOT / "settings.json"
    if keeper_of(ROOT):
        say(f"already up in {ROOT}; `down` ends it")
        settings = json.loads(saved.read_text())
    else:
        if reason := packages.problem():
            raise LabError(reason)
        if ROOT.exists():
            shutil.rmtree(ROOT)  # left by a keeper that was killed
        lab = SlurmLab(
            ROOT,
            release=arguments.release,
            accounting=arguments.accounting,
            min_job_age=arguments.min_job_age,
            cgroup=arguments.cgroup,
            stay=True,
        )
        lab.start()
        settings = lab.settings
        saved.write_text(json.dumps(settings))
        say(f"up in {ROOT}; try: ssh -F {lab.ssh_config} login")
    for name, value in settings.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def down(arguments: argparse.Namespace) -> int:
    """End the cluster that `up` started."""
    say("down" if end_keeper(ROOT) else "was not up")
    if ROOT.exists():
        shutil.rmtree(ROOT)
    return 0


def main() -> int:
    """Do one command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("install", help=install.__doc__).set_defaults(do=install)
    commands.add_parser("down", help=down.__doc__).set_defaults(do=down)
    starter = commands.add_parser("up", help=up.__doc__)
    starter.add_argument("--release", choices=releases.RELEASES, default="machine")
    starter.add_argument("--accounting", action="store_true", help="MariaDB and slurmdbd too")
    starter.add_argument("--min-job-age", type=int, default=300, metavar="SECONDS")
    starter.add_argument("--cgroup", action="store_true", help="jobs really run out of memory")
    starter.set_defaults(do=up)
    arguments = parser.parse_args()
    try:
        status: int = arguments.do(arguments)
    except (LabError, ValueError) as error:
        say(f"lab: {error}")
        return 3
    return status


if __name__ == "__main__":
    sys.exit(main())
