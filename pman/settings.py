"""Every setting, once: name, type, default, unit and why. docs/settings.md is made from this."""

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from pman.errors import SettingsError

BUILT_ENGINES = ("slurm", "cromwell", "local")
"""The values of CONTAINER_ENV that this version runs jobs on."""

LABEL_CHARACTERS = 255
"""Of a label's key and of its value, at the most: what Cromwell takes."""

Engine = Literal[
    "docker", "podman", "swarm", "kubernetes", "openshift", "cromwell", "slurm", "local"
]

S = TypeVar("S", bound="ClientSettings")


class ClientSettings(BaseSettings):
    """What a command needs that asks a running server.

    Read from the environment, then from ``.env`` in the working folder. Names are upper case.
    """

    model_config = SettingsConfigDict(
        env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True, case_sensitive=False
    )

    # What the server and those who ask it share
    pman_url: str = Field(
        "http://127.0.0.1:5010",
        description="Where `pman jobs` and `pman job` find the server. The server itself listens "
        "where `pman serve --host --port` says.",
    )
    api_token: str = Field(
        "",
        repr=False,
        description="If set, every call but `/health/` needs the header "
        "`Authorization: Bearer <token>`; `pman jobs` and `pman job` send it.",
    )

    @field_validator("pman_url")
    @classmethod
    def _url(cls, value: str) -> str:
        url = _http_url(value, "give the server's address, such as http://127.0.0.1:5010")
        if urlsplit(url).username is not None:
            raise ValueError("give the address alone; the token belongs into API_TOKEN")
        return url


class Settings(ClientSettings):
    """All that the server is told."""

    # What runs the jobs
    container_env: Engine = Field(
        "docker",
        description="The engine that runs the jobs. This version has `slurm`, `cromwell` (Slurm "
        "through a Cromwell server) and `local` (this machine, without a container: for trying "
        "things).",
    )
    template: Annotated[Mapping[str, str], NoDecode] = Field(
        {},
        description="The template's name without folder and ending, or one for each engine: "
        "`slurm=apptainer,local=bare`. Default: `apptainer` on slurm, `chris` on cromwell, `bare` "
        "on local.",
    )
    templates_dir: Path | None = Field(
        None, description="A folder with templates of your own, searched before the shipped ones."
    )
    site_file: Path | None = Field(
        None, description="A YAML file whose content templates see as `site`."
    )

    # Where the data is
    storage_type: Literal["host"] | None = Field(
        None,
        description="Where the data lies. On slurm, cromwell and local it is `host`: a folder that "
        "has the same path on every node.",
    )
    storebase: Path | None = Field(
        None, description="The folder of ChRIS's data, the same path on every node. Required."
    )
    jobs_dir: Path | None = Field(
        None,
        description="Where each job's own folder (script, log, lock, exit file) lies as the nodes "
        "see it. Default: `.pman` in STOREBASE. Cromwell has a folder of its own for that.",
    )
    state_dir: Path = Field(
        Path("pman-state"),
        description="The folder of pman's own database, on a local disk of this machine.",
    )

    # The way to Cromwell
    cromwell_url: str = Field(
        "",
        repr=False,
        description="Cromwell's address, such as `http://127.0.0.1:8000`. Required on cromwell. "
        "The `user:password@` of a proxy before it may stand in it.",
    )
    cromwell_paths: Annotated[Mapping[str, str], NoDecode] = Field(
        {},
        description="How Cromwell's paths read on the login node or, without SSH_HOST, on this "
        "machine: `/cromwell-executions=/mnt/cromwell-executions`. Default: the same.",
    )
    cromwell_config: str = Field(
        "",
        description="Cromwell's configuration file, by its path on the login node or, without "
        "SSH_HOST, on this machine. Only `pman check` reads it.",
    )

    # The way to the login node
    ssh_host: str = Field(
        "",
        description="The login node, or its alias in SSH_CONFIG_FILE. Empty: Slurm's commands run "
        "on this machine. On cromwell: where Slurm is asked and logs are read; empty: Slurm is not "
        "asked, and logs are read on this machine.",
    )
    ssh_port: int | None = Field(
        None, ge=1, le=65535, description="Default: the config's, else 22."
    )
    ssh_user: str | None = Field(
        None, description="The account that submits. Default: the config's, else this process's."
    )
    ssh_key_file: Path | None = Field(
        None, description="The private key. Default: the config's, the agent's, then `~/.ssh`."
    )
    ssh_known_hosts: Path | None = Field(
        None,
        description="The file of known host keys; an unknown key is refused. Default: the "
        "config's, else `~/.ssh/known_hosts`.",
    )
    ssh_config_file: Path | None = Field(
        None, description="An OpenSSH client configuration. Default: `~/.ssh/config` if there."
    )
    ssh_shell: str = Field(
        "bash -l",
        description="The shell that runs pman's commands on the login node. `bash -l` reads the "
        "account's profile, which is where sites put Slurm on the PATH; `bash` is quicker.",
    )

    # What jobs get
    timelimit_minutes: int | None = Field(
        None,
        ge=1,
        description="The time limit of each job, in minutes. Required on cromwell. Default: the "
        "cluster's.",
    )
    container_user: str = Field(
        "",
        description="`UID:GID` that the plugin runs as; either may be empty or a range `lo-hi`, "
        "from which each job gets a random number. Only where the template's runtime can do it.",
    )
    enable_home_workaround: bool = Field(
        False, description="Adds `HOME=/tmp` to the job's environment."
    )
    shm_size: int | None = Field(
        None, ge=1, description="Size of /dev/shm in MiB, where the runtime has such an option."
    )
    job_labels: Annotated[Mapping[str, str], NoDecode] = Field(
        {},
        description="Labels on each job, `key=value,key=value`. On slurm: the comment; on "
        "cromwell: the workflow's labels.",
    )
    ignore_limits: bool = Field(
        False, description="No CPU and memory limits on jobs (GPUs are still asked for)."
    )

    # What pman answers
    job_logs_tail: int = Field(1000, ge=0, description="How many lines of log are returned.")
    remove_jobs: bool = Field(True, description="`no`: DELETE answers 204 and removes nothing.")

    # How often
    poll_interval: float = Field(
        2.0,
        ge=0.1,
        allow_inf_nan=False,
        description="Seconds between two looks at the engine, at the least.",
    )
    lost_after: int = Field(
        3600,
        ge=0,
        description="Seconds after which a job is `undefined` that queue, accounting and exit "
        "file, all of them answering, know nothing of. 0: never.",
    )

    @field_validator("template", mode="before")
    @classmethod
    def _template(cls, value: object) -> object:
        if isinstance(value, str):
            return _pairs(value) if "=" in value else {"": value}
        return value

    @field_validator("template")
    @classmethod
    def _engines(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        if unknown := value.keys() - {"", *get_args(Engine)}:
            raise ValueError(f"{min(unknown)!r} is none of {', '.join(get_args(Engine))}")
        return value

    @field_validator("job_labels", "cromwell_paths", mode="before")
    @classmethod
    def _labels(cls, value: object) -> object:
        return _pairs(value) if isinstance(value, str) else value

    @field_validator("cromwell_url")
    @classmethod
    def _cromwell(cls, value: str) -> str:
        remedy = "give Cromwell's address, such as http://127.0.0.1:8000"
        return _http_url(value, remedy) if value else value

    @field_validator("cromwell_paths")
    @classmethod
    def _paths(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for path in [*value, *value.values()]:
            if not path.startswith("/"):
                raise ValueError(f"{path!r} is no absolute path; write /theirs=/ours")
        return value

    @field_validator("container_user")
    @classmethod
    def _user(cls, value: str) -> str:
        parse_container_user(value)
        return value

    @field_validator("storebase", "jobs_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        if not value.is_absolute():
            raise ValueError("give an absolute path: it must be the same on every node")
        if "," in str(value) or not str(value).isprintable():
            raise ValueError("commas and control characters can't be in a path that is mounted")
        if ".." in value.parts:
            raise ValueError("give a path without '..': jobs are kept out of JOBS_DIR by its name")
        return value

    @model_validator(mode="after")
    def _together(self) -> "Settings":
        if self.container_env not in BUILT_ENGINES:
            raise ValueError(
                f"CONTAINER_ENV is {self.container_env!r}, and this version runs jobs on "
                f"{' and '.join(BUILT_ENGINES)}: set CONTAINER_ENV=slurm"
            )
        if self.storebase is None:
            raise ValueError(
                "STOREBASE is not set: give the folder of ChRIS's data, the same on every node"
            )
        if self.container_env == "cromwell":
            _labels_for_cromwell(self.job_labels)
        if self.storebase.is_relative_to(self.jobs_folder):
            raise ValueError(
                f"JOBS_DIR {self.jobs_folder} holds STOREBASE, so every job could change the "
                "others' scripts: set JOBS_DIR to a folder of its own"
            )
        return self

    @property
    def storage(self) -> Path:
        """STOREBASE, which the validation has made sure of."""
        assert self.storebase is not None
        return self.storebase

    @property
    def jobs_folder(self) -> Path:
        return self.jobs_dir or self.storage / ".pman"


def load(**overrides: Any) -> Settings:
    """The settings of this process.

    Raises SettingsError with a line for every wrong setting.
    """
    return _validated(Settings, overrides)


def load_client(**overrides: Any) -> ClientSettings:
    """What a command needs that asks a running server. Raises SettingsError as ``load``."""
    return _validated(ClientSettings, overrides)


def _validated(kind: type[S], overrides: Mapping[str, Any]) -> S:
    try:
        return kind(**overrides)
    except ValidationError as error:
        lines = []
        for wrong in error.errors():
            name = ".".join(str(part) for part in wrong["loc"]).upper()
            reason = wrong["msg"].removeprefix("Value error, ")
            password = name in ("PMAN_URL", "CROMWELL_URL") and "@" in str(wrong["input"])
            secret = name == "API_TOKEN" or password
            value = "" if secret or not name else f" has the value {wrong['input']!r}"
            lines.append(f"{name}{value}: {reason}" if name else reason)
        raise SettingsError("\n".join(lines)) from None


def _http_url(value: str, remedy: str) -> str:
    """``value`` without slashes at its end. Raises ValueError with ``remedy``."""
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not value.isprintable() or " " in value or parts.query or parts.fragment:
        raise ValueError(remedy)
    return value.rstrip("/")


def _labels_for_cromwell(labels: Mapping[str, str]) -> None:
    """Cromwell would refuse every job for a label that is too long. Raises ValueError."""
    for key, value in labels.items():
        for what, text in (("key", key), ("value", value)):
            if len(text) > LABEL_CHARACTERS:
                raise ValueError(
                    f"JOB_LABELS: the {what} {text[:20]}… has {len(text)} characters, and Cromwell "
                    f"takes no more than {LABEL_CHARACTERS}: shorten it"
                )


def parse_container_user(value: str) -> tuple[range | None, range | None]:
    """The ranges of user and group ids that CONTAINER_USER allows; None: not given.

    Raises ValueError for anything that is not ``UID:GID`` with numbers or ranges ``lo-hi``.
    """
    user, _, group = value.partition(":")
    return _id_range(user), _id_range(group)


def draw(ids: range | None) -> int | None:
    """One id of the range, at random."""
    return None if ids is None else random.choice(ids)


def _id_range(text: str) -> range | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is neither a number nor a range like 1000-2000")
    low, high = int(match[1]), int(match[2] or match[1])
    if high < low:
        raise ValueError(f"the range {text!r} ends before it begins")
    return range(low, high + 1)


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not text.isprintable():
        raise ValueError("it has a control character; write key=value,key=value")
    for key, equals, _ in pairs:
        if not equals or not key.strip():
            raise ValueError(f"{key!r} is not key=value; write key=value,key=value")
    return {key.strip(): value.strip() for key, _, value in pairs}
