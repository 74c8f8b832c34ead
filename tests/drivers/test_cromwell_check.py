"""What each answer of Cromwell, its configuration, and the way to its files mean.

The server is scripted: it says what each test has written down, and is no Cromwell. The shell is
the real one of this machine.
"""

import shutil
import ssl
import sys
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pman.drivers import cromwell_check, cromwell_config
from pman.drivers.cromwell import CromwellDriver
from pman.drivers.cromwell_api import CromwellServer, Workflow
from pman.errors import Unavailable
from pman.jobs import Finding, Severity
from pman.shell import LocalShell, Result
from tests.drivers.scripted_cromwell import (
    QUERY,
    VERSION,
    WORKFLOWS,
    Reply,
    Request,
    Scripted,
    certificate,
    fail,
)

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR

STATUS = "/engine/v1/status"
JSON = "application/json"


class Told(Scripted):
    """Answers by path; what is not written down is a 404 of Cromwell."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(self._answer, tls)
        self.replies: dict[str, Reply] = {}
        self.say(VERSION, {"cromwell": "92-abc1234"})
        self.say(STATUS, {"Engine Database": {"ok": True}})
        self.flows: list[dict[str, str]] = []

    def say(self, path: str, body: Any, status: int = 200, kind: str = JSON) -> None:
        self.replies[path] = Reply(status, body, kind)

    def has(self, stdout: str = "") -> None:
        """One more workflow of pman's, older than the others, and where its stdout is."""
        self.has_another("ChRISJob", stdout)

    def has_another(self, name: str, stdout: str = "") -> None:
        flow = str(uuid.uuid4())
        self.flows.append({"id": flow, "name": name, "status": "Running"})
        calls = {f"{name}.plugin_instance": [{"stdout": stdout}]} if stdout else {}
        self.say(f"{WORKFLOWS}/{flow}/metadata", {"id": flow, "calls": calls})

    @property
    def queries(self) -> list[Any]:
        return [request.json for request in self.asked(QUERY)]

    def _answer(self, request: Request) -> Reply:
        if request.path in self.replies:
            return self.replies[request.path]
        if request.path != QUERY:
            return fail(404, f"no {request.path}")
        names = [pair["name"] for pair in request.json if "name" in pair]
        (size,) = [int(pair["pageSize"]) for pair in request.json if "pageSize" in pair]
        fitting = [flow for flow in self.flows if not names or flow["name"] in names][:size]
        return Reply(200, {"results": fitting, "totalResultsCount": len(fitting)})


@pytest.fixture
def server() -> Iterator[Told]:
    with Told() as told:
        yield told


def looked(url: str) -> list[Finding]:
    """The findings about the server alone."""
    cromwell = CromwellServer(url)
    try:
        return list(cromwell_check.of_server(cromwell))
    finally:
        cromwell.close()


def about(subject: str, findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


# --- Cromwell ---


def test_a_cromwell_that_is_well(server: Told) -> None:
    (finding,) = looked(server.url)
    assert finding == Finding(OK, "Cromwell", f"{server.url}: version 92-abc1234")


def wrong(server: Told) -> Finding:
    (finding,) = looked(server.url)
    assert finding.severity is ERROR
    assert finding.subject == "Cromwell"
    assert server.url in finding.text
    assert "; " + finding.remedy not in finding.text
    return finding


@pytest.mark.parametrize(
    ("answer", "words", "remedy"),
    [
        (("<h1>Welcome</h1>", 200, "text/html"), "200 OK (text/html): Welcome", "is that a Crom"),
        (
            ({"name": "x"}, 200, JSON),
            "without its version",
            "is that a Cromwell? check CROMWELL_URL",
        ),
        ((["x"], 200, JSON), "200 OK", "is that a Cromwell?"),
        (("<p>no page</p>", 404, "text/html"), "404 Not Found (text/html): no page", "is that a"),
        (
            ({"detail": "no route"}, 404, JSON),
            '404 Not Found: {"detail": "no route"}',
            "is that a Cromwell?",
        ),
        (
            ({"status": "error", "message": "db"}, 500, JSON),
            "500 Internal Server Error: db",
            "see the log of Cromwell",
        ),
        (
            ("<h1>nginx</h1>", 502, "text/html"),
            "502 Bad Gateway (text/html): nginx",
            "and that of a proxy",
        ),
        (("who?", 401, "text/plain"), "401 Unauthorized (text/plain): who?", "put them into CROMW"),
        (("no", 403, "text/plain"), "403 Forbidden (text/plain): no", "put them into CROMWELL_URL"),
    ],
)
def test_what_is_no_cromwell_or_not_well(
    server: Told, answer: tuple[Any, int, str], words: str, remedy: str
) -> None:
    server.say(VERSION, *answer)
    finding = wrong(server)
    assert words in finding.text
    assert remedy in finding.remedy


def test_a_password_that_a_proxy_does_not_take_and_that_is_not_shown(server: Told) -> None:
    server.say(VERSION, "who?", 401, "text/plain")
    (finding,) = looked(server.url.replace("//", "//pman:secret@"))
    assert finding.remedy == "are the user and password in CROMWELL_URL right?"
    assert "secret" not in str(finding)


def test_a_port_that_nobody_listens_on() -> None:
    with Told() as closed:
        url = closed.url
    (finding,) = looked(url)
    assert finding.severity is ERROR
    assert finding.text == f"Cromwell at {url} can't be reached: Connection refused"
    assert finding.remedy == "does it run, and is CROMWELL_URL right?"


def test_a_name_that_nobody_knows() -> None:
    (finding,) = looked("http://cromwell.invalid:8000")
    assert "its name is not known" in finding.text
    assert "CROMWELL_URL" in finding.remedy


def test_tls_where_there_is_none(server: Told) -> None:
    (finding,) = looked(server.url.replace("http:", "https:"))
    assert finding.severity is ERROR
    assert finding.remedy == "does it speak TLS? check CROMWELL_URL"


def test_a_certificate_that_nobody_vouches_for(tmp_path: Path) -> None:
    _, context = certificate(tmp_path)
    with Told(context) as server:
        (finding,) = looked(server.url)
    assert finding.severity is ERROR
    assert "self-signed certificate" in finding.text
    assert "REQUESTS_CA_BUNDLE" in finding.remedy


@pytest.mark.parametrize(
    ("version", "severity"),
    [("74", WARNING), ("74-5ab1c2e-SNAP", WARNING), ("75", OK), ("93-c805f3c-SNAP", OK)],
)
def test_versions_that_take_no_ids(server: Told, version: str, severity: Severity) -> None:
    server.say(VERSION, {"cromwell": version})
    (finding,) = looked(server.url)
    assert finding.severity is severity
    assert f"version {version}" in finding.text
    assert ("takes up to a minute" in finding.text) == (severity is WARNING)
    assert ("75 or newer" in finding.remedy) == (severity is WARNING)


def test_a_part_that_is_not_well(server: Told) -> None:
    ill = {"DockerHub": {"ok": True}, "Engine Database": {"ok": False, "messages": ["it is full"]}}
    server.say(STATUS, ill, 500)
    (finding,) = looked(server.url)[1:]
    assert finding.severity is WARNING
    assert finding.text == "it finds its part Engine Database unwell: it is full"


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [(404, JSON, {"message": "no route"}), (503, "text/html", "<p>x"), (200, JSON, [1, {}])],
)
def test_a_cromwell_that_does_not_tell_how_its_parts_are(
    server: Told, status: int, kind: str, body: Any
) -> None:
    server.say(STATUS, body, status, kind)
    assert [finding.severity for finding in looked(server.url)] == [OK]


def test_nobody_is_asked_for_a_password(server: Told) -> None:
    everywhere = f"http://0.0.0.0:{server.port}"  # it leads to this machine, too
    (finding,) = looked(everywhere)[1:]
    assert (finding.severity, finding.subject) == (WARNING, "CROMWELL_URL")
    assert "runs commands as Cromwell's account" in finding.text
    assert "127.0.0.1" in finding.remedy
    for url in (everywhere.replace("//", "//pman:secret@"), server.url):
        assert not about("CROMWELL_URL", looked(url))
    assert not about("CROMWELL_URL", looked(server.url.replace("127.0.0.1", "localhost")))


# --- how soon workflows start ---


def flows(*waits: float) -> list[Workflow]:
    begin = datetime(2026, 11, 22, 10, 0, tzinfo=UTC)
    return [
        Workflow("x", "Running", begin + timedelta(seconds=wait), submitted_at=begin)
        for wait in waits
    ]


@pytest.mark.parametrize(
    ("waits", "severity", "words"),
    [
        ((0.5, 1, 2), OK, "newest 3 workflows, since 2026-11-22"),
        ((1, 1, 1, 300), OK, "waited 1 s"),
        ((2, 10, 19), WARNING, "waited 10 s"),
        ((20, 40, 60, 80), WARNING, "waited 50 s"),
    ],
)
def test_how_long_workflows_wait(waits: tuple[float, ...], severity: Severity, words: str) -> None:
    (finding,) = cromwell_check.of_starts(flows(*waits))
    assert (finding.severity, finding.subject) == (severity, "start")
    assert words in finding.text
    assert ("new-workflow-poll-rate" in finding.remedy) == (severity is WARNING)


def test_a_few_workflows_tell_nothing_nor_those_that_wait(server: Told) -> None:
    assert list(cromwell_check.of_starts(flows(20, 20))) == []
    assert list(cromwell_check.of_starts([Workflow("x", "Submitted")] * 9)) == []
    begin, end = "2026-11-22T10:00:00.000Z", "2026-11-22T10:00:20.000Z"
    for _ in range(3):
        server.has_another("align_reads")
        server.flows[-1] |= {"submission": begin, "start": end}
    (finding,) = about("start", looked(server.url))
    assert "waited 20 s" in finding.text


# --- its configuration ---

WELL = r"""
include required(classpath("application"))
webservice.interface = 127.0.0.1
system {
  new-workflow-poll-rate = 2
  max-workflow-launch-count = 50
}
database.db.url = "jdbc:hsqldb:file:/var/lib/cromwell/db"
docker.hash-lookup.enabled = false
backend {
  default = SLURM
  providers.SLURM {
    actor-factory = "cromwell.backend.impl.sfs.config.ConfigBackendLifecycleActorFactory"
    config {
      root = "/shared/cromwell-executions"
      concurrent-job-limit = 1000
      exit-code-timeout-seconds = 60
      runtime-attributes = \"""
      String? docker
      String sharedir
      String incoming
      String outgoing
      Int? cpu
      Int? memory_mb
      Int gpu_limit = 0
      Int number_of_workers = 1
      Int? timelimit
      String? slurm_partition
      String? slurm_account
      String? slurm_qos
      String? slurm_constraint
      String? slurm_reservation
      \"""
      submit-docker = \"""
      sbatch --parsable --no-requeue ${"--time=" + timelimit} ${"-p " + slurm_partition} \
        ${"--account=" + slurm_account} ${"--qos=" + slurm_qos} \
        -C ${slurm_constraint} --reservation=${slurm_reservation} \
        -N ${number_of_workers} --gpus=${gpu_limit} -c ${cpu} --mem=${memory_mb}M <<END
      apptainer exec -B ${sharedir}/${incoming}:/share/incoming \
        -B ${sharedir}/${outgoing}:/share/outgoing docker://${docker} ${job_shell} ${script}
      END
      \"""
      job-id-regex = "(\\d+).*"
      check-alive = "squeue -j ${job_id} || scontrol ping | grep -q DOWN"
      kill-docker = "scancel ${job_id}"
    }
  }
}
""".replace('\\"""', '"""')


def configured(text: str) -> list[Finding]:
    return list(cromwell_config.findings(text, "/etc/cromwell.conf"))


def test_a_configuration_that_has_it_all() -> None:
    (finding,) = configured(WELL)
    assert (finding.severity, finding.subject) == (OK, "CROMWELL_CONFIG")


NOT_GIVEN = "\n"
SUMMARY = "services.MetadataService.config.metadata-summary-refresh-interval"


@pytest.mark.parametrize(
    ("was", "becomes", "severity", "words"),
    [
        ("webservice.interface = 127.0.0.1", NOT_GIVEN, WARNING, "so it is 0.0.0.0"),
        ("interface = 127.0.0.1", "interface = 0.0.0.0", WARNING, "interface is 0.0.0.0"),
        ("new-workflow-poll-rate = 2", NOT_GIVEN, WARNING, "every 20 s it starts 50"),
        ("poll-rate = 2", "poll-rate = 15", WARNING, "every 15 s it starts 50"),
        ("poll-rate = 2", "poll-rate = 2 seconds", WARNING, "does not start with anything else"),
        ("poll-rate = 2", 'poll-rate = "2 s"', WARNING, "does not start with anything else"),
        ("max-workflow-launch-count = 50", NOT_GIVEN, WARNING, "starts as few as one"),
        ("launch-count = 50", "launch-count = 1", WARNING, "every 2 s it starts 1 of"),
        ("database.db.url", "# ", WARNING, "none is given: it is in memory"),
        ("hsqldb:file", "hsqldb:mem", WARNING, "it is in memory: a restart"),
        ("docker.hash-lookup.enabled = false", NOT_GIVEN, WARNING, "hash-lookup is on"),
        ("system {", "system { abort-jobs-on-terminate = true", WARNING, "cancels every job"),
        ('include required(classpath("application"))', "", WARNING, "does not include"),
        ("system {", 'include "more.conf"\nsystem {', WARNING, 'includes "more.conf", which pman'),
        ("default = SLURM", NOT_GIVEN, ERROR, "jobs run on Cromwell's own machine"),
        ("default = SLURM", "default = PBS", ERROR, "PBS, is not configured here"),
        ("cromwell.backend.impl.sfs.config.Config", "a.Google", ERROR, "is not the backend for"),
        ('root = "/shared/', 'run-in-background = true, x = "', ERROR, "not on Slurm"),
        ("submit-docker =", "submit =", ERROR, "submit-docker is missing"),
        ("kill-docker =", "kill =", WARNING, "kill-docker is missing: Cromwell calls"),
        ("check-alive =", "x =", WARNING, "check-alive is missing: after a restart"),
        (" || scontrol ping | grep -q DOWN", "", WARNING, "check-alive fails when Slurm gives no"),
        ("-j ${job_id} || scontrol ping | grep -q DOWN", "--jobs=${job_id}", WARNING, "no answer"),
        ("--no-requeue", "", WARNING, "submit-docker lets Slurm queue a job again"),
        ("exit-code-timeout-seconds = 60", "", WARNING, "stays Running for ever"),
        ("job-id-regex =", "x =", ERROR, "job-id-regex is missing"),
        ('regex = "(\\\\d+).*"', 'regex = "Submitted batch job (\\\\d+).*"', WARNING, "`1234`"),
        ("sbatch --parsable", "sbatch", WARNING, "`Submitted batch job 1234`"),
        ('regex = "(\\\\d+).*"', 'regex = "\\\\d+"', WARNING, "the one id in `1234`"),
        ('regex = "(\\\\d+).*"', 'regex = "(\\\\d+)(.*)"', WARNING, "the one id in `1234`"),
        ('root = "/shared/', 'root = "', WARNING, "root is no absolute path"),
        ('root = "/shared/', 'root = "/a,b/', WARNING, "root has a `,`: /a,b/cromwell-executions;"),
        ('root = "/shared/', 'root = "/a:b/', WARNING, "root has a `:`"),
        ("system {", f'{SUMMARY} = "Inf"\nsystem {{', ERROR, "Cromwell never shows a job"),
        ("job-limit = 1000", "job-limit = 1", WARNING, "concurrent-job-limit is 1:"),
        ("String? docker", "", ERROR, "docker is not declared in runtime-attributes"),
        ("String sharedir", "", ERROR, "sharedir is not declared"),
        ("String incoming", "", WARNING, "incoming is not declared in runtime-attributes: jobs"),
        ("String outgoing", "", WARNING, "outgoing is not declared"),
        ("Int? cpu", "", WARNING, "cpu is not declared"),
        ("Int? memory_mb", "", WARNING, "memory is not declared"),
        ("Int gpu_limit = 0", "", WARNING, "gpu_limit is not declared"),
        ("Int number_of_workers = 1", "", WARNING, "number_of_workers is not declared"),
        ("Int? timelimit", "", WARNING, "the time limit of the partition, not TIMELIMIT_MINUTES"),
        ("String? slurm_partition", "", WARNING, "`partition` of SITE_FILE has no effect"),
        ("String? slurm_account", "", WARNING, "`account` of SITE_FILE has no effect"),
        ("String? slurm_qos", "", WARNING, "`qos` of SITE_FILE has no effect"),
        ("String? slurm_constraint", "", WARNING, "`constraint` of SITE_FILE has no effect"),
        ("String? slurm_reservation", "", WARNING, "`reservation` of SITE_FILE has no effect"),
        ('${"--time=" + timelimit}', "", WARNING, "timelimit is not used in submit-docker"),
        ("--mem=${memory_mb}M", "", WARNING, "memory is not used in submit-docker"),
        ("Int? cpu", "Int? cpu\nString queue", ERROR, "queue is mandatory, and pman does not"),
        ("Int? cpu", "Int cpu", WARNING, "cpu is mandatory: with IGNORE_LIMITS every job fails"),
        ("Int? memory_mb", "Float memory_mb", WARNING, "memory_mb is mandatory: with IGNORE_LIM"),
        ("String? slurm_qos", "String slurm_qos", WARNING, "unless SITE_FILE has it every job"),
    ],
)
def test_what_bites_in_a_configuration(
    was: str, becomes: str, severity: Severity, words: str
) -> None:
    assert was in WELL
    (finding,) = configured(WELL.replace(was, becomes, 1))
    assert finding.severity is severity
    assert words in finding.text
    assert finding.remedy


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("system {", f'{SUMMARY} = "1 second"\nsystem {{'),
        ("system {", f"{SUMMARY} = 2 seconds\nsystem {{"),
        ("Int? timelimit", "Int timelimit"),  # pman sends it with every job
        ("Int? cpu", 'Int? cpu\nString queue = "x"'),
        ("Int? cpu", "Int? cpu\nInt maxRetries"),
        ("Int? memory_mb", "Float? memory_mb"),
        ("interface = 127.0.0.1", 'interface = "localhost"'),
        ("default = SLURM", 'default = "SLURM"'),
        ('required(classpath("application"))', 'classpath("application.conf")'),
        ("poll-rate = 2", 'poll-rate = "2"'),
        ("enabled = false", "enabled = off"),
        ("database.db.url", "database.metadata.db.url"),
        ('root = "/shared/', 'root = ${base}"/'),
    ],
)
def test_what_is_as_good_in_a_configuration(was: str, becomes: str) -> None:
    assert was in WELL
    (finding,) = configured("base = /shared\n" + WELL.replace(was, becomes, 1))
    assert finding.severity is OK


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = 1\nb {", "line 2, can't be read: found end of text"),
        ('include required(classpath("application"))\n\na = 1\n}\n', "line 4, can't be read"),
        ("a = 1\nb = ${nope}", "line 2, can't be read: Cannot resolve variable ${nope}"),
        ("[1, 2]", "it has no names"),
        ("\0", "line 1, can't be read"),
    ],
)
def test_a_configuration_that_cannot_be_read(text: str, words: str) -> None:
    (finding,) = configured(text)
    assert (finding.severity, finding.subject) == (WARNING, "CROMWELL_CONFIG")
    assert finding.text.startswith("/etc/cromwell.conf")
    assert words in finding.text


def test_what_is_none_of_what_it_should_be_breaks_nothing() -> None:
    odd = "webservice = 1, system = [], database = x, backend { default = [1], providers = 2 }"
    assert ERROR in {finding.severity for finding in configured(odd)}
    odd = WELL.replace('job-id-regex = "(\\\\d+).*"', 'job-id-regex = "(?<!x{1,2})(\\\\d+"')
    assert [finding.severity for finding in configured(odd)] == [OK]
    odd = WELL.replace("concurrent-job-limit = 1000", "concurrent-job-limit = [many]")
    assert "concurrent-job-limit" in configured(odd)[0].text


def test_without_pyhocon_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyhocon", None)
    (finding,) = configured(WELL)
    assert (finding.severity, finding.subject) == (WARNING, "CROMWELL_CONFIG")
    assert "pip install 'pman[cromwell]'" in finding.remedy


# --- the way to its files and to Slurm, by the whole check ---

SLURM = {
    "squeue": "echo slurm 24.11.5",
    "scancel": "",
    "sacct": "",
    "scontrol": "echo 'ClusterName = hpc'",
}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of the PATH: the tools, and programs that say what Slurm's say."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "sh", "ls", "date", "find", "id", *cromwell_check.WITH_SLURM.tools):
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    for name, text in SLURM.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def storebase(tmp_path: Path) -> Path:
    (tmp_path / "store base" / "in").mkdir(parents=True)
    return tmp_path / "store base"


def checked(url: str, storebase: Path, **settings: Any) -> list[Finding]:
    """The whole check."""
    paths = settings.pop("paths", {})
    config = storebase.parent / "cromwell.conf"
    config.exists() or config.write_text(WELL)
    given = {"asks_slurm": True, "config": str(config), "storebase": str(storebase), **settings}
    driver = CromwellDriver(CromwellServer(url), LocalShell(), paths, **given)
    try:
        return list(driver.check())
    finally:
        driver.close()


def test_a_site_that_is_well(server: Told, programs: Path, storebase: Path) -> None:
    (storebase / "cromwell" / "execution").mkdir(parents=True)
    server.has(f"{storebase}/cromwell/execution/stdout")
    found = checked(server.url, storebase)
    assert {finding.severity for finding in found} == {OK}
    assert [finding.subject for finding in found] == [
        "Cromwell",
        "login node",
        "programs",
        "Slurm",
        "Slurm",
        "accounting",
        "STOREBASE",
        "CROMWELL_CONFIG",
        "CROMWELL_PATHS",
    ]
    assert "version 24.11.5" in about("Slurm", found)[0].text


def test_without_ssh_host_slurm_is_not_asked(server: Told, programs: Path, storebase: Path) -> None:
    for name in SLURM:
        (programs / name).write_text(f"#!/bin/sh\n: > '{storebase}/asked'\n")
    found = checked(server.url, storebase, asks_slurm=False, config="")
    assert not (storebase / "asked").exists()
    assert "jobs' logs are read here" in about("login node", found)[0].text
    assert not about("clock", found)  # this machine's alone
    (finding,) = about("Slurm", found)
    assert finding.severity is OK
    assert "a job that waits reads as started" in finding.text
    assert "SSH_HOST" in finding.remedy
    assert not about("accounting", found) + about("STOREBASE", found)
    assert {finding.subject for finding in found if finding.severity is not OK} == {
        "CROMWELL_CONFIG"
    }


def test_a_cromwell_that_is_away_does_not_hide_the_rest(
    server: Told, programs: Path, storebase: Path
) -> None:
    server.say(VERSION, "x", 500, "text/plain")
    found = checked(server.url, storebase)
    assert {finding.subject for finding in found if finding.severity is ERROR} == {"Cromwell"}
    assert about("Slurm", found)
    assert about("CROMWELL_CONFIG", found)
    assert server.queries == []


class Away:
    """A login node that can't be reached."""

    where = "login.hpc.org"

    def run(self, *_: object, **__: object) -> Result:
        raise Unavailable("login.hpc.org shows an unknown key. Add it by hand")

    def close(self) -> None: ...


def test_a_login_node_that_is_away_is_one_finding(server: Told) -> None:
    server.has("/cromwell/execution/stdout")
    driver = CromwellDriver(
        CromwellServer(server.url),
        Away(),
        {},
        asks_slurm=True,
        config="/etc/x",
        storebase="/data",
    )
    cromwell, away = driver.check()
    driver.close()
    assert cromwell.severity is OK
    assert (away.severity, away.subject) == (ERROR, "login node")
    assert (away.text, away.remedy) == ("login.hpc.org shows an unknown key", "Add it by hand")


@pytest.mark.parametrize("program", ["squeue", "scancel", "sacct", "scontrol", "sed", "stat"])
def test_a_program_that_is_not_there(
    server: Told, programs: Path, storebase: Path, program: str
) -> None:
    (programs / program).unlink()
    (finding,) = about("programs", checked(server.url, storebase))
    assert finding.severity is (WARNING if program in ("sacct", "scontrol") else ERROR)
    assert finding.text.startswith(f"{program} is not on the PATH")
    assert ("install it there" in finding.remedy) == (program in ("sed", "stat"))


def test_a_storebase_that_is_not_there_or_empty(
    server: Told, programs: Path, storebase: Path
) -> None:
    (storebase / "in").rmdir()
    (finding,) = about("STOREBASE", checked(server.url, storebase))
    assert (finding.severity, finding.text) == (
        WARNING,
        f"{storebase} is empty on this machine",
    )
    storebase.rmdir()
    (finding,) = about("STOREBASE", checked(server.url, storebase))
    assert finding.severity is WARNING
    assert "can't be entered" in finding.text
    assert "mounted" in finding.remedy


def test_no_configuration_is_one_warning(server: Told, programs: Path, storebase: Path) -> None:
    (finding,) = about("CROMWELL_CONFIG", checked(server.url, storebase, config=""))
    assert finding.severity is WARNING
    for word in ("interface", "database", "kill-docker", "exit-code-timeout-seconds"):
        assert word in finding.text
    assert "docs/cromwell.md" in finding.remedy


def test_a_configuration_that_is_not_there_is_no_file_or_too_large(
    server: Told, programs: Path, storebase: Path
) -> None:
    for file, words in [("/nowhere", "there is no such file"), (str(storebase), "no such file")]:
        (finding,) = about("CROMWELL_CONFIG", checked(server.url, storebase, config=file))
        assert finding.severity is WARNING
        assert f"{file} can't be read on this machine" in finding.text
        assert words in finding.text
    config = storebase.parent / "cromwell.conf"
    config.write_text("#" * cromwell_check.CONFIG_BYTES + "\n")
    (finding,) = about("CROMWELL_CONFIG", checked(server.url, storebase))
    assert finding.text == f"{config} is larger than 256 KiB"


def test_what_bites_in_the_configuration_is_found_by_the_check(
    server: Told, programs: Path, storebase: Path
) -> None:
    (storebase.parent / "cromwell.conf").write_text(WELL.replace("kill-docker", "kill"))
    (finding,) = about("backend", checked(server.url, storebase))
    assert "kill-docker is missing" in finding.text


def test_paths_of_cromwell_that_are_others_here(
    server: Told, programs: Path, storebase: Path
) -> None:
    inner = "ChRISJob/1/call-plugin_instance/execution"
    (storebase / "c" / inner).mkdir(parents=True)
    server.has_another("align_reads", "/elsewhere/stdout")
    server.has()
    server.has(f"/cromwell/{inner}/stdout")
    (finding,) = about("CROMWELL_PATHS", checked(server.url, storebase))
    assert finding.severity is WARNING
    assert f"/cromwell/{inner} can't be read on this machine" in finding.text
    assert "CROMWELL_PATHS=/cromwell=ITS_PATH_THERE" in finding.remedy
    mapped = checked(server.url, storebase, paths={"/cromwell": f"{storebase}/c"})
    (finding,) = about("CROMWELL_PATHS", mapped)
    assert finding.severity is OK
    elsewhere = checked(server.url, storebase, paths={"/cromwell": f"{storebase}/x"})
    (finding,) = about("CROMWELL_PATHS", elsewhere)
    assert f"{storebase}/x/{inner} (for Cromwell /cromwell/{inner})" in finding.text


def test_without_a_job_of_late_nothing_is_said_of_files(
    server: Told, programs: Path, storebase: Path
) -> None:
    server.has()
    server.has_another("align_reads", "/elsewhere/stdout")
    assert not about("CROMWELL_PATHS", checked(server.url, storebase))


def test_jobs_of_another_account_than_the_one_that_asks_slurm(
    server: Told, programs: Path, storebase: Path
) -> None:
    server.has(f"{storebase}/stdout")
    (programs / "id").unlink()
    (programs / "id").write_text("#!/bin/sh\necho pman\n")
    (programs / "id").chmod(0o755)
    owner = storebase.owner()
    (finding,) = about("SSH_USER", checked(server.url, storebase))
    assert finding.severity is WARNING
    assert finding.text == f"jobs are {owner}'s, and pman comes as pman, who can't cancel them"
    assert owner in finding.remedy
    (programs / "scontrol").write_text("#!/bin/sh\necho 'PrivateData = jobs,usage'\n")
    (finding,) = about("SSH_USER", checked(server.url, storebase))
    assert "nor see them (PrivateData=jobs,usage)" in finding.text
    assert not about("SSH_USER", checked(server.url, storebase, asks_slurm=False))


def test_a_disk_that_hangs_does_not_hide_the_rest(
    server: Told, programs: Path, storebase: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cromwell_check, "SECONDS", 1.0)
    (programs / "ls").unlink()
    (programs / "ls").write_text("#!/bin/sh\nread -r _ < /dev/zero\n")
    (programs / "ls").chmod(0o755)
    server.has(f"{storebase}/stdout")
    found = checked(server.url, storebase)
    for subject in ("STOREBASE", "CROMWELL_PATHS"):
        (finding,) = about(subject, found)
        assert finding.severity is WARNING
        assert "did not end within 1 s" in finding.text
    assert about("CROMWELL_CONFIG", found)[0].severity is OK
