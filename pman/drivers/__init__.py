"""What the gateway asks of an engine, and which name means which driver."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pman.errors import EngineError, SettingsError
from pman.jobs import Finding, Job, Observation, Verdict
from pman.settings import Settings
from pman.shell import LocalShell, Shell, SSHShell


class Driver(Protocol):
    """One engine. The calls block, come from several threads at once, and know nothing of pfcon.

    Each may raise Unavailable. Jobs are told apart by their ``name``, which is unique.
    """

    def submit(self, jobs: Sequence[Job]) -> Mapping[str, str | EngineError]:
        """Hand the documents over, all in one go; for each name the engine's id or what went wrong.

        Rejected is final; Unavailable was certainly not handed over; Ambiguous may have been.
        """

    def find(self, jobs: Sequence[Job]) -> Mapping[str, str]:
        """The ids of those jobs that the engine has, or has had, whatever became of them."""

    def observe(self, jobs: Sequence[Job]) -> Mapping[str, Observation]:
        """What became of the jobs: a fixed number of engine calls however many there are.

        A name that is missing from the answer was not seen; that is never an end.
        """

    def logs(self, job: Job, tail: int) -> str:
        """The last ``tail`` lines that the job wrote, stdout and stderr, in a bounded number of
        bytes."""

    def remove(self, jobs: Sequence[Job]) -> Mapping[str, str]:
        """End the jobs if they have not ended, and remove what is theirs alone. Repeatable.

        For each name that has something left: why.
        """

    def test(self, jobs: Sequence[Job]) -> Mapping[str, Verdict]:
        """For each name what the scheduler says of the document; nothing is submitted or stored."""

    def check(self) -> Iterable[Finding]:
        """How the engine and the way to it are. It raises nothing: being away is a finding."""

    def close(self) -> None:
        """Let go of connections; jobs go on."""


def _shell(settings: Settings) -> Shell:
    """The login node or, without SSH_HOST, this machine."""
    if not settings.ssh_host:
        return LocalShell()
    return SSHShell(
        host=settings.ssh_host,
        port=settings.ssh_port,
        user=settings.ssh_user,
        key_file=settings.ssh_key_file,
        known_hosts=settings.ssh_known_hosts,
        config_file=settings.ssh_config_file,
        command=settings.ssh_shell,
    )


def _slurm(settings: Settings) -> Driver:
    from pman.drivers.slurm import SlurmDriver

    return SlurmDriver(
        _shell(settings), settings.storage, settings.jobs_folder, settings.poll_interval
    )


def _cromwell(settings: Settings) -> Driver:
    from pman.drivers.cromwell import CromwellDriver
    from pman.drivers.cromwell_api import CromwellServer

    needed = {
        "CROMWELL_URL is not set: give Cromwell's address": settings.cromwell_url,
        "TIMELIMIT_MINUTES is not set: give the time limit of each job": settings.timelimit_minutes,
    }
    if missing := [text for text, value in needed.items() if not value]:
        raise SettingsError("\n".join(missing))
    return CromwellDriver(
        CromwellServer(settings.cromwell_url),
        _shell(settings),
        settings.cromwell_paths,
        asks_slurm=bool(settings.ssh_host),
        config=settings.cromwell_config,
        storebase=str(settings.storage),
        poll_interval=settings.poll_interval,
    )


def _local(_: Settings) -> Driver:
    from pman.drivers.local import LocalDriver

    return LocalDriver()


@dataclass(frozen=True)
class Engine:
    """What a value of CONTAINER_ENV stands for."""

    language: str
    """The language of the documents it takes."""
    template: str
    """The template that is used unless TEMPLATE says otherwise."""
    make: Callable[[Settings], Driver]


ENGINES: Mapping[str, Engine] = {
    "slurm": Engine("sbatch", "apptainer", _slurm),
    "cromwell": Engine("wdl", "chris", _cromwell),
    "local": Engine("sbatch", "bare", _local),
}
