"""Spec + template → document: the shipped templates, and what an operator's own may not do."""

import dataclasses
import subprocess
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pman.errors import TemplateError
from pman.jobs import JobSpec
from pman.rendering import MAX_DOCUMENT, Renderer, shipped_templates
from pman.site import Rule, Site
from tests.hostile import HOSTILE

GOLDEN = Path(__file__).parent / "golden"
RUNTIMES = ("apptainer", "bare", "charliecloud", "podman", "pyxis", "sarus", "shifter")
USERS = {"podman", "charliecloud"}
"""Runtimes that can run a plugin as CONTAINER_USER."""

PLAIN = JobSpec(
    jid="chris-jid-1",
    name="chris-jid-1.0badcafe",
    auid="cube",
    type="ds",
    image="ghcr.io/fnndsc/pl-simpledsapp:2.1.0",
    argv=("simpledsapp", "--prefix", "le", "/share/incoming", "/share/outgoing"),
    env={},
    labels={},
    input_dir="/data/home/cube/in",
    output_dir="/data/home/cube/out",
    folder="/data/.pman/chris-jid-1.0badcafe",
)
FULL = dataclasses.replace(
    PLAIN,
    argv=("simple dsapp", "--message", 'it\'s $(id)\n`id` "é"', "/share/incoming", ""),
    env={"GREETING": "hello 'you'\n", "HOME": "/tmp"},
    labels={"site": "a b", "group": "100%"},
    input_dir="/data/100% in's",
    number_of_workers=2,
    cpu_limit=1500,
    memory_limit=200,
    gpu_limit=1,
    time_limit=1501,
    shm_size=64,
)
SITE = Site(
    {
        "images": {"ghcr.io/fnndsc/*": "/images/simple ds.sif"},
        "partition": "normal",
        "directives": ["--exclusive"],
        "setup": "module load runtime",
    },
    rules=(Rule(gpu=True, values={"partition": "gpu", "gres": "gpu:a100"}),),
)


def check_syntax(document: str) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=document.encode(), capture_output=True, check=False, timeout=20
    )
    assert (done.returncode, done.stderr) == (0, b"")


# --- the shipped templates ---


def test_the_shipped_templates_are_these() -> None:
    assert sorted(Renderer().names("sbatch")) == sorted([*RUNTIMES, "base", "probe"])


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("kind", "spec"), [("plain", PLAIN), ("full", FULL)])
def test_the_document_is_the_golden_one(
    runtime: str, kind: str, spec: JobSpec, request: pytest.FixtureRequest
) -> None:
    if kind == "full" and runtime in USERS:
        spec = dataclasses.replace(spec, uid=1001, gid=1002)
    site = SITE if kind == "full" or runtime == "charliecloud" else Site()
    document = Renderer(site=site).render(spec, "sbatch", runtime)
    golden = GOLDEN / f"{runtime}-{kind}.sbatch"
    if request.config.getoption("--rewrite-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(document.text)
    assert document.text == golden.read_text()
    assert (document.language, document.template) == ("sbatch", runtime)
    check_syntax(document.text)


def test_there_is_no_golden_document_without_a_template() -> None:
    documents = [*(f"{runtime}-{{}}.sbatch" for runtime in RUNTIMES), "chris-{}.wdl"]
    assert {path.name for path in GOLDEN.iterdir()} == {
        name.format(kind) for name in documents for kind in ("plain", "full")
    }


def test_base_alone_says_what_is_missing() -> None:
    with pytest.raises(TemplateError, match="no block `run`"):
        Renderer().render(PLAIN, "sbatch", "base")


@pytest.mark.parametrize("runtime", sorted({*RUNTIMES} - USERS))
@pytest.mark.parametrize("ids", [{"uid": 0}, {"gid": 0}])
def test_a_runtime_that_cannot_be_another_user_refuses(runtime: str, ids: dict[str, Any]) -> None:
    with pytest.raises(TemplateError, match="CONTAINER_USER is set"):
        Renderer(site=SITE).render(dataclasses.replace(PLAIN, **ids), "sbatch", runtime)


def test_charliecloud_wants_an_image_of_the_site() -> None:
    with pytest.raises(TemplateError, match="`images` in SITE_FILE"):
        Renderer().render(PLAIN, "sbatch", "charliecloud")


# --- what arrives at the runtime ---

# `srun` also makes and removes the scratch folder.
DUMP = """#!/bin/bash
argv=("$0" "$@")
if [ "${0##*/}" = srun ]; then
    while [[ $1 = -* ]]; do shift; done
    case "$1 $2" in "bash -c" | "rm -rf") exec "$@" ;; esac
fi
printf '%s\\0' "${argv[@]}" > "$DUMP/argv"
env -0 > "$DUMP/env"
"""
PROGRAMS = ("apptainer", "ch-run", "podman", "srun", "sarus", "shifter")


def renderer(runtime: str) -> Renderer:
    images = {"images": {"*": "/images/plugin"}} if runtime == "charliecloud" else {}
    return Renderer(site=Site(images))


Run = Callable[[JobSpec, str], tuple[list[str], Mapping[str, str]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a document with bash; the command it ends with writes down its arguments and its
    environment and does nothing else."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in (*PROGRAMS, "plugin"):
        (programs / name).write_text(DUMP)
        (programs / name).chmod(0o755)
    dump = tmp_path / "dump"
    dump.mkdir()
    numbers = count()

    def run_document(spec: JobSpec, runtime: str) -> tuple[list[str], Mapping[str, str]]:
        folder = tmp_path / f"job '{next(numbers)}' $(touch pwned)"
        folder.mkdir()
        for place in (spec.input_dir, spec.output_dir):
            Path(place).mkdir(parents=True, exist_ok=True)
        document = renderer(runtime).render(
            dataclasses.replace(spec, folder=str(folder)), "sbatch", runtime
        )
        (folder / "script").write_bytes(document.text.encode())
        done = subprocess.run(
            ["bash", str(folder / "script")],
            cwd=tmp_path,
            env={
                "PATH": f"{programs}:/usr/bin:/bin",
                "DUMP": str(dump),
                "TMPDIR": str(tmp_path),
                "LC_ALL": "C.UTF-8",
            },
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert not [*tmp_path.rglob("pwned")]
        argv, environment = (
            (dump / name).read_bytes().decode().removesuffix("\0").split("\0")
            for name in ("argv", "env")
        )
        return argv, dict(pair.split("=", 1) for pair in environment)

    return run_document


def spec_in(folder: Path, **changes: Any) -> JobSpec:
    """A spec whose folders are there, with names that break careless quoting."""
    return dataclasses.replace(
        PLAIN,
        input_dir=f"{folder}/in 'it'\" $(touch pwned) \\ % é",
        output_dir=f"{folder}/out `touch pwned`;#",
        **changes,
    )


words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
names = st.from_regex(r"[A-Z][A-Z0-9_]{0,9}X", fullmatch=True)


@pytest.mark.parametrize("runtime", RUNTIMES)
@examples(max_examples=5)
@given(args=st.lists(words), env=st.dictionaries(names, words))
@example(args=[*HOSTILE], env={f"V{number}": text for number, text in enumerate(HOSTILE)})
def test_arguments_and_variables_arrive_byte_for_byte(
    runtime: str, args: list[str], env: dict[str, str], run: Run, tmp_path: Path
) -> None:
    spec = spec_in(tmp_path, argv=("plugin", *args), env=env)
    argv, environment = run(spec, runtime)
    end = len(argv) - len(args)
    assert argv[end:] == args
    if runtime == "bare":  # env(1) has run already
        assert {**environment, **env} == environment
    else:
        assignments = [f"{name}={value}" for name, value in env.items()]
        assert argv[end - 1 - len(env) : end] == [*assignments, "plugin"]


def test_without_a_container_the_mounts_become_the_real_folders(run: Run, tmp_path: Path) -> None:
    spec = spec_in(
        tmp_path,
        argv=(
            *("plugin", "/share/incoming", "/share/incoming/a/../b", "/share/outgoing/"),
            *("/share/incoming2", "x/share/incoming", "--in=/share/incoming", "/share"),
        ),
    )
    argv, _ = run(spec, "bare")
    assert argv[1:] == [
        spec.input_dir,
        f"{spec.input_dir}/a/../b",
        f"{spec.output_dir}/",
        *("/share/incoming2", "x/share/incoming", "--in=/share/incoming", "/share"),
    ]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_several_workers_are_started_by_one_srun(runtime: str, run: Run, tmp_path: Path) -> None:
    argv, _ = run(
        spec_in(tmp_path, argv=("plugin", "a b"), number_of_workers=2, cpu_limit=3000), runtime
    )
    assert Path(argv[0]).name == "srun"
    assert "--cpus-per-task=3" in argv
    assert argv[-1] == "a b"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_several_workers_without_limits_are_started_too(
    runtime: str, run: Run, tmp_path: Path
) -> None:
    argv, _ = run(spec_in(tmp_path, argv=("plugin",), number_of_workers=2), runtime)
    assert Path(argv[0]).name == "srun"
    assert not [word for word in argv if "cpus-per-task" in word or word.startswith(" ")]


ATTACK = "$(touch pwned)`touch pwned`\n#SBATCH --uid=0\n';touch pwned;'\";touch pwned;\""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_hostile_fields_run_nothing_and_add_no_directive(
    runtime: str, run: Run, tmp_path: Path
) -> None:
    spec = spec_in(tmp_path, argv=("plugin", ATTACK), env={"A": ATTACK}, labels={"a": "b"})
    hostile = dataclasses.replace(
        spec, jid=ATTACK, auid=ATTACK, type=ATTACK, image=ATTACK, labels={ATTACK: ATTACK}
    )
    assert directives(hostile, runtime) == directives(spec, runtime)
    run(hostile, runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "changes",
    [
        {"name": ATTACK},
        {"input_dir": f"/tmp/{ATTACK}"},
        {"output_dir": f"/tmp/{ATTACK}"},
        {"folder": f"/tmp/{ATTACK}"},
    ],
)
def test_a_hostile_name_or_path_adds_no_directive(runtime: str, changes: dict[str, Any]) -> None:
    hostile = dataclasses.replace(PLAIN, **changes)
    assert directives(hostile, runtime) == directives(PLAIN, runtime)


def directives(spec: JobSpec, runtime: str) -> list[str]:
    document = renderer(runtime).render(spec, "sbatch", runtime).text
    check_syntax(document)
    return [line.split("=")[0] for line in document.splitlines() if line.startswith("#SBATCH")]


# --- an operator's own templates ---

Render = Callable[..., str]


@pytest.fixture
def render() -> Render:
    """The document of a template with this text."""

    def render_text(text: str, site: Mapping[str, Any] | None = None, **changes: Any) -> str:
        renderer = Renderer({"sbatch/mine.sbatch.j2": text}, Site(site or {}))
        return renderer.render(dataclasses.replace(PLAIN, **changes), "sbatch", "mine").text

    return render_text


@pytest.mark.parametrize(
    ("template", "document"),
    [
        ("{{ job.auid }}", "'a b'"),
        ("x{{ job.auid }}y", "x'a b'y"),
        ("{{ job.argv }}", "run '1 2' ''"),
        ("{{ job.argv | map('upper') }}", "RUN '1 2' ''"),
        ("{{ job.argv | map('upper') | list }}", "RUN '1 2' ''"),
        ("{{ [] }}", ""),
        ("{{ job.argv | with_env(job.env) }}", "env 'A=x y' run '1 2' ''"),
        ("{{ ['a'] | with_env({'B': 1}, A='x', B=2) }}", "env A=x B=1 a"),
        ("{{ ['a'] | with_env({}) }}", "a"),
        ("{{ 'x y' if false }}", ""),
        ("{{ job.auid | raw }}", "a b"),
        ("{{ 'x ' ~ job.auid }}", "'x a b'"),
        ("{% macro m(v) %}<{{ v }}>{% endmacro %}{{ m(job.auid) }}", "<'a b'>"),
        ("{% set x %}-{{ job.auid }}{% endset %}{{ x | raw }}", "-'a b'"),
        ("{% block b %}{{ job.auid }}{% endblock %} {{ self.b() }}", "'a b' 'a b'"),
        ("{{ site.x }} {{ site.n }}", "'p q' 1.5"),
        ("{{ 90 | duration }} {{ 1500 | duration }}", "0-01:30:00 1-01:00:00"),
        ("{{ 1025 | mib_to('G') }} {{ 1024 | mib_to('G') }}", "2 1"),
        ("{{ 3 | mib_to('bytes') }} {{ 3 | mib_to('K') }} {{ 3 | mib_to('M') }}", "3145728 3072 3"),
        ("{{ 0 | mib_to('T') }} {{ 1 | mib_to('T') }}", "0 1"),
        ("{{ job.argv | join(',') }}", "'run,1 2,'"),
        ("{# it's #}{{ job.auid }}", "'a b'"),
    ],
)
def test_a_value_is_quoted_once(render: Render, template: str, document: str) -> None:
    site = {"x": "p q", "n": 1.5}
    values = {"auid": "a b", "argv": ("run", "1 2", ""), "env": {"A": "x y"}}
    assert render(template, site, **values) == document


def test_a_template_of_the_operator_may_extend_a_shipped_one(render: Render) -> None:
    document = render(
        '{% extends "bare.sbatch.j2" %}{% block directives %}\n#SBATCH --x={{ job.auid }}\n'
        "{% endblock %}{% block run %}echo before\n{{ super() }}{% endblock %}",
        auid="a b",
    )
    assert "\n#SBATCH --x='a b'\n" in document
    assert "echo before" in document
    assert "/share/incoming" not in document
    check_syntax(document)


def test_a_template_of_the_operator_goes_before_the_shipped_one() -> None:
    renderer = Renderer({"sbatch/bare.sbatch.j2": "mine\n"})
    assert renderer.render(PLAIN, "sbatch", "bare").text == "mine\n"


def test_a_template_of_the_operator_may_extend_the_one_that_it_hides() -> None:
    more = '{% extends "shipped/base.sbatch.j2" %}{% block directives %}#SBATCH --x{% endblock %}'
    document = Renderer({"sbatch/base.sbatch.j2": more}).render(PLAIN, "sbatch", "bare")
    assert "\n#SBATCH --x\n" in document.text
    check_syntax(document.text)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("\n\n{{ nope }}", "mine.sbatch.j2, line 3: 'nope' is undefined"),
        (
            "{% extends 'bare.sbatch.j2' %}{% block setup %}\n{{ nope }}{% endblock %}",
            "mine.sbatch.j2, line 2: 'nope' is undefined",
        ),
        ("\n{{ job.nope }}", "mine.sbatch.j2, line 2: .*no attribute 'nope'"),
        ("\n{{ site.nope }}", "mine.sbatch.j2, line 2: .*no attribute 'nope'"),
        ("{% if nope %}{% endif %}", "mine.sbatch.j2, line 1: 'nope' is undefined"),
        ("\n{{ job.uid }}", "mine.sbatch.j2, line 2: a value is None"),
        ("{{ job.argv + (none,) }}", "mine.sbatch.j2, line 1: a value is None"),
        ("{{ true }}", "mine.sbatch.j2, line 1: a value is True"),
        ("{{ job.env }}", "mine.sbatch.j2, line 1: a value is {}"),
        ("{{ job.env.keys() }}", "mine.sbatch.j2, line 1: a value is dict_keys"),
        ("{{ job }}", "mine.sbatch.j2, line 1: a value is JobSpec"),
        ("{{ job.to_json }}", "mine.sbatch.j2, line 1: a value is <bound method"),
        ("{{ 'a\\0b' }}", "mine.sbatch.j2, line 1: .*NUL byte"),
        ("{{ ''.__class__ }}", "mine.sbatch.j2, line 1: .*'__class__'.*unsafe"),
        ("{{ job.__init__.__globals__ }}", "line 1: .*unsafe"),
        ("{{ ''['__cl' ~ 'ass__'] }}", "line 1: .*unsafe"),
        ("{{ '{0.__class__}'.format(job) | raw }}", "line 1: .*unsafe"),
        ("{{ site.update({}) }}", "line 1: .*unsafe"),
        ("{{ cycler.__init__ }}", "line 1: .*unsafe"),
        ("\n{{ range(10 ** 9) | list }}", "line 2: Range too big"),
        ("\n{% if %}", "mine.sbatch.j2, line 2: "),
        ("\n{{ job.auid | nope }}", "mine.sbatch.j2, line 2: No filter named 'nope'"),
        ("{{ 1 / 0 }}", "mine.sbatch.j2, line 1: division by zero"),
        ("{% extends 'nope' %}", "no sbatch template 'nope'; there are: apptainer, bare"),
        ("{% include '../secret' %}", "no sbatch template"),
        ("{{ fail('not ' ~ job.type) }}", "^not ds$"),
        (
            '\n\n"{{ job.auid }}"',
            "^sbatch/mine.sbatch.j2: a value stands inside double quotes in line 3 .*'a b'",
        ),
        ("'{{ job.auid }}'", "inside single quotes in line 1"),
        ("cat <<EOF\n{{ job.auid }}\nEOF", "inside a here-document in line 2"),
        ("x=`echo {{ job.auid }}`", "inside `…` in line 1"),
        ("echo ${{ job.auid }}", "a backslash, a `.` or a `<<` in line 1"),
        ("\v\n\f\n'{{ job.auid }}'", "inside single quotes in line 3 .*`''a b''`"),
        ("{% set x %}{{ job.auid }}{% endset %}'{{ x | raw }}'", "inside single quotes"),
        ("{% set x %}{{ job.auid }}{% endset %}{{ x }}", "line 1: .*quoted already.*raw"),
        ("{% filter upper %}{{ job.auid }}{% endfilter %}", "changed by a filter"),
        ("{% filter truncate(9, true) %}{{ job.auid }}{% endfilter %}", "changed by a filter"),
        ("{{ 'x' * 5000000 }}", f"longer than {MAX_DOCUMENT} bytes"),
        ("{{ 'é' * 3000000 }}", f"longer than {MAX_DOCUMENT} bytes"),
        ("{% for _ in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", f"longer than {MAX_DOCUMENT}"),
        ("{% include 'mine.sbatch.j2' %}", "mine.sbatch.j2, line 1: it .*includes.* itself"),
        ("{% extends 'mine.sbatch.j2' %}", "itself without end; .*`shipped/NAME`"),
        ("{% filter replace(\"'\", '') %}{{ job.auid }}{% endfilter %}", "changed by a filter"),
        ("{% filter escape %}{{ job.auid }}{% endfilter %}", "changed by a filter"),
        ("{% set x | lower %}{{ job.image ~ ' A' }}{% endset %}{{ x | raw }}", "by a filter"),
        ("{% set x %}{{ job.auid }}{% endset %}{{ x | replace(' ', '') | raw }}", "by a filter"),
        ("echo \x02", r"has the character \\x02 or"),
        ("{{ fail('x' * 9999) }}", "^x{2000}$"),
        ("{% set x %}{{ job.auid }}{% endset %}{{ fail('no ' ~ x) }}", "^no 'a b'$"),
        ("\n{{ 5 | mib_to('GB') }}", "line 2: 'GB' is no unit of memory; there are: bytes, K, M"),
        ("{# #}\n{{ job.auid", "mine.sbatch.j2, line 2: .*: `{{ job.auid`"),
        ("\n{{ nope }} # why", r"line 2: 'nope' is undefined: `{{ nope }} # why`"),
    ],
)
def test_a_template_that_cannot_be_used_is_told_with_its_place(
    render: Render, template: str, words: str
) -> None:
    with pytest.raises(TemplateError, match=words):
        render(template, auid="a b")


@pytest.mark.parametrize("name", ["nope", "../sbatch/bare", "/etc/passwd", "", "bare.sbatch.j2"])
def test_an_unknown_template_is_told_with_those_that_there_are(name: str) -> None:
    with pytest.raises(TemplateError, match=r"there is no sbatch template .* there are: apptainer"):
        Renderer().render(PLAIN, "sbatch", name)


def test_the_shipped_templates_are_found() -> None:
    assert (shipped_templates() / "sbatch" / "base.sbatch.j2").is_file()
