"""Settings: their meaning, and what is said of one that is wrong."""

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pman.errors import SettingsError
from pman.settings import Engine, Settings, draw, load, load_client, parse_container_user

USED = {"CONTAINER_ENV": "local", "STOREBASE": "/data"}


@pytest.fixture
def environment(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in USED.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("REMOVE_JOBS", "no", False),
        ("REMOVE_JOBS", "off", False),
        ("REMOVE_JOBS", "0", False),
        ("REMOVE_JOBS", "False", False),
        ("REMOVE_JOBS", "yes", True),
        ("IGNORE_LIMITS", "1", True),
        ("IGNORE_LIMITS", "on", True),
        ("ENABLE_HOME_WORKAROUND", "true", True),
        ("JOB_LABELS", "a=b", {"a": "b"}),
        ("JOB_LABELS", " a = b , c=d=e ,", {"a": "b", "c": "d=e"}),
        ("JOB_LABELS", "", {}),
        ("JOB_LABELS", "a=", {"a": ""}),
        ("TEMPLATE", "podman", {"": "podman"}),
        ("TEMPLATE", "slurm=apptainer,docker=chris", {"slurm": "apptainer", "docker": "chris"}),
        ("JOB_LOGS_TAIL", "0", 0),
        ("POLL_INTERVAL", "0.5", 0.5),
        ("SSH_PORT", "", None),
        ("TIMELIMIT_MINUTES", "60", 60),
        ("CONTAINER_USER", "1-2:3", "1-2:3"),
        ("JOBS_DIR", "/data/x", Path("/data/x")),
        ("storebase", "/elsewhere", Path("/elsewhere")),
        ("CROMWELL_URL", "", ""),
        ("CROMWELL_URL", "https://me:secret@host/cromwell/", "https://me:secret@host/cromwell"),
        ("CROMWELL_PATHS", "/a=/b, /c=/d", {"/a": "/b", "/c": "/d"}),
    ],
)
def test_a_setting_is_read_from_the_environment(
    environment: pytest.MonkeyPatch, variable: str, text: str, value: object
) -> None:
    environment.delenv(variable.upper(), raising=False)
    environment.setenv(variable, text)
    assert getattr(load(), variable.lower()) == value


def test_the_defaults_of_pman_hold(environment: pytest.MonkeyPatch) -> None:
    settings = load()
    assert settings.remove_jobs
    assert not settings.ignore_limits
    assert not settings.enable_home_workaround
    assert settings.job_logs_tail == 1000
    assert settings.jobs_folder == Path("/data/.pman")


def test_a_dotenv_file_is_read_after_the_environment(environment: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("STOREBASE=/other\nJOB_LOGS_TAIL=7\nSECRET_KEY=x\nAPPLICATION_MODE=y\n")
    settings = load()
    assert (settings.storebase, settings.job_logs_tail) == (Path("/data"), 7)


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("CONTAINER_ENV", "docker", "set CONTAINER_ENV=slurm"),
        ("CONTAINER_ENV", "podmann", "CONTAINER_ENV has the value 'podmann'"),
        ("STORAGE_TYPE", "kubernetes_pvc", "STORAGE_TYPE has the value"),
        ("STOREBASE", "", "STOREBASE is not set"),
        ("STOREBASE", "data", "STOREBASE has the value 'data': give an absolute"),
        ("STOREBASE", "~/data", "absolute path"),
        ("STOREBASE", "/a,b", "commas"),
        ("STOREBASE", "/a\nb", "control characters"),
        ("STOREBASE", "/a\x7f", "control characters"),
        ("STOREBASE", "/a\udcff", "control characters"),
        ("STOREBASE", "/data/../other", "without '..'"),
        ("JOBS_DIR", "jobs", "JOBS_DIR has the value"),
        ("JOBS_DIR", "/data", "holds STOREBASE"),
        ("JOBS_DIR", "/", "holds STOREBASE"),
        ("SSH_PORT", "0", "SSH_PORT has the value '0'"),
        ("SSH_PORT", "ssh", "SSH_PORT has the value 'ssh'"),
        ("POLL_INTERVAL", "0", "POLL_INTERVAL has the value '0'"),
        ("POLL_INTERVAL", "inf", "POLL_INTERVAL"),
        ("POLL_INTERVAL", "nan", "POLL_INTERVAL"),
        ("TIMELIMIT_MINUTES", "0", "TIMELIMIT_MINUTES"),
        ("SHM_SIZE", "64m", "SHM_SIZE"),
        ("REMOVE_JOBS", "maybe", "REMOVE_JOBS has the value 'maybe'"),
        ("JOB_LOGS_TAIL", "-1", "JOB_LOGS_TAIL"),
        ("LOST_AFTER", "-1", "LOST_AFTER"),
        ("JOB_LABELS", "a", "'a' is not key=value"),
        ("JOB_LABELS", "=b", "is not key=value"),
        ("JOB_LABELS", "a=b\n#SBATCH --x", "control character"),
        ("TEMPLATE", "slurm=a,b", "'b' is not key=value"),
        ("CONTAINER_USER", "root", "'root' is neither a number nor a range"),
        ("CONTAINER_USER", "5-3:1", "ends before it begins"),
        ("CONTAINER_USER", "1:2:3", "'2:3' is neither"),
        ("CONTAINER_USER", "-1", "is neither"),
        ("CONTAINER_USER", "١", "is neither"),
    ],
)
def test_a_wrong_setting_is_named_with_the_remedy(
    environment: pytest.MonkeyPatch, variable: str, text: str, words: str
) -> None:
    environment.setenv(variable, text)
    with pytest.raises(SettingsError) as caught:
        load()
    assert words in str(caught.value)


def test_every_wrong_setting_has_a_line_and_no_secret_is_shown(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("SSH_PORT", "x")
    environment.setenv("LOST_AFTER", "y")
    with pytest.raises(SettingsError) as caught:
        load(api_token=b"\xff secret")
    lines = str(caught.value).splitlines()
    assert [line.split()[0].rstrip(":") for line in lines] == [
        *("API_TOKEN", "SSH_PORT", "LOST_AFTER")
    ]
    assert "secret" not in str(caught.value)


def test_the_token_is_not_in_what_is_logged_of_the_settings(
    environment: pytest.MonkeyPatch,
) -> None:
    assert "secret" not in repr(load(api_token="secret"))


def test_who_asks_a_server_needs_none_of_its_settings(clean_environment: None) -> None:
    assert load_client().pman_url == "http://127.0.0.1:5010"
    Path(".env").write_text(
        "STOREBASE=nonsense\nAPI_TOKEN=secret\nPMAN_URL=https://[::1]:1/pman/\n"
    )
    settings = load_client()
    assert (settings.pman_url, settings.api_token) == ("https://[::1]:1/pman", "secret")
    assert "secret" not in repr(settings)
    assert load_client(pman_url="http://other").pman_url == "http://other"


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:5010", "ftp://host", "http://", "http://host:x", "http://host:99999", "/x"),
        *("http://a b", "http://host\n", "http://[::1", "http://host:0"),
        *("http://host?a=b", "http://host#a"),
    ],
)
def test_an_address_that_is_none_is_refused(clean_environment: None, url: str) -> None:
    with pytest.raises(SettingsError, match=r"PMAN_URL has the value .*http://127\.0\.0\.1:5010"):
        load_client(pman_url=url)


def test_an_address_with_a_password_is_refused_and_not_repeated(clean_environment: None) -> None:
    with pytest.raises(SettingsError, match="API_TOKEN") as caught:
        load_client(pman_url="http://me:secret@host")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://host?a=b", "http://h#a"])
def test_an_address_of_cromwell_that_is_none_is_refused(
    environment: pytest.MonkeyPatch, url: str
) -> None:
    environment.setenv("CROMWELL_URL", url)
    with pytest.raises(
        SettingsError, match=r"CROMWELL_URL has the value .*http://127\.0\.0\.1:8000"
    ):
        load()


def test_the_password_in_the_address_of_cromwell_is_not_repeated(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("CROMWELL_URL", "http://me:secret@host")
    assert "secret" not in repr(load())
    environment.setenv("CROMWELL_URL", "http://me:secret@host:x")
    with pytest.raises(SettingsError, match="CROMWELL_URL: give") as caught:
        load()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (256, 1, r"JOB_LABELS: the key k{20}… has 256 characters, and Cromwell takes no more than"),
        (1, 256, r"JOB_LABELS: the value v{20}… has 256 characters.* 255: shorten it"),
    ],
)
def test_labels_that_cromwell_would_refuse_are_refused_at_the_start(
    environment: pytest.MonkeyPatch, key: int, value: int, words: str
) -> None:
    environment.setenv("JOB_LABELS", f"{'k' * key}={'v' * value}")
    load()
    environment.setenv("CONTAINER_ENV", "cromwell")
    with pytest.raises(SettingsError, match=words):
        load()


def test_labels_that_cromwell_takes(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("CONTAINER_ENV", "cromwell")
    environment.setenv("JOB_LABELS", f"{'k' * 255}={'v' * 255},a=")
    assert len(load().job_labels) == 2


@pytest.mark.parametrize("paths", ["theirs=/ours", "/theirs=ours"])
def test_a_path_of_cromwell_that_is_not_absolute_is_refused(
    environment: pytest.MonkeyPatch, paths: str
) -> None:
    environment.setenv("CROMWELL_PATHS", paths)
    with pytest.raises(SettingsError, match="is no absolute path; write /theirs=/ours"):
        load()


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_a_template_for_an_engine_that_there_is_none_of_is_refused(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("TEMPLATE", "slrum=podman")
    with pytest.raises(SettingsError, match="slrum") as caught:
        load()
    assert all(engine in str(caught.value) for engine in get_args(Engine))


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_every_id_of_a_range_may_be_drawn(first: int, second: int) -> None:
    low, high = sorted((first, second))
    user, group = parse_container_user(f"{low}-{high}:")
    assert user == range(low, high + 1)
    assert draw(user) in range(low, high + 1)
    assert (group, draw(group)) == (None, None)


def test_the_overrides_of_the_command_line_come_first(environment: pytest.MonkeyPatch) -> None:
    overrides: dict[str, Any] = {"container_env": "slurm"}
    assert load(**overrides).container_env == "slurm"
