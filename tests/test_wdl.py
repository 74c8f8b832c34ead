"""WDL, judged by miniwdl, by what Cromwell does to a command, and by the real bash."""

import dataclasses
import itertools
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import WDL
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pman.errors import Refusal, TemplateError
from pman.jobs import JobSpec
from pman.languages import check_wdl
from pman.rendering import Renderer
from pman.samples import samples
from pman.site import Rule, Site
from pman.sources import Sources
from pman.wdl import command_word, literal, settled, split_folders, unquoted
from pman.worker import Worker
from tests.hostile import HOSTILE
from tests.test_quoting import ATTACKS, SYNTAX
from tests.test_rendering import FULL, GOLDEN, PLAIN

CROMWELL = ("SCRIPT_PREAMBLE", "SCRIPT_EPILOGUE", "ENVIRONMENT_VARIABLES", "INSTANTIATED_COMMAND")
REPLACED = (*CROMWELL, "DOCKER_OUTPUT_DIR_LINK")
"""Words that Cromwell replaces in its script."""

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.text(
    "\\'\"$`~{}<>#\n\r\t ;01é_ST"
)
bmp = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"], max_codepoint=0xFFFF)
)
names = st.from_regex(r"[A-Z][A-Z0-9_]{0,9}X", fullmatch=True)


def render(spec: JobSpec, site: Site | None = None, template: str = "chris", **also: str) -> str:
    renderer = Renderer(site=site)
    document = renderer.render(spec, "wdl", template, **also)
    renderer.check(document)
    return document.text


def task_of(text: str) -> WDL.Tree.Task:
    (task,) = WDL.parse_document(text).tasks
    return task


def evaluated(expression: WDL.Expr.Base) -> Any:
    library = WDL.StdLib.Base("1.0")
    expression.infer_type(WDL.Env.Bindings(), library)
    return expression.eval(WDL.Env.Bindings(), library).value


def runtime_of(text: str) -> dict[str, Any]:
    return {name: evaluated(value) for name, value in task_of(text).runtime.items()}


def by_miniwdl(text: str) -> str:
    command: str = evaluated(task_of(text).command)
    return command


def by_cromwell(text: str) -> str:
    """The command as Cromwell's script has it: normalised, and its words replaced."""
    parts = task_of(text).command.parts
    assert all(isinstance(part, str) for part in parts), parts
    raw = "".join(map(str, parts)).lstrip("\r\n").rstrip("\r\n \t")
    lines = re.split(r"[\r\n]+", raw)
    indent = min(len(line) - len(line.lstrip(" \t")) for line in lines)
    command = "\n".join(line[indent:] for line in lines)
    command = command.encode("ascii", "replace").decode()  # its files may have any encoding
    script = (
        "DOCKER_OUTPUT_DIR_LINK\n(\nSCRIPT_PREAMBLE\n)\n"
        "(\nENVIRONMENT_VARIABLES\nINSTANTIATED_COMMAND\n)\n"
    )
    values = {
        "SCRIPT_PREAMBLE": ":",
        "ENVIRONMENT_VARIABLES": "\n",
        "INSTANTIATED_COMMAND": command,
    }
    for word, value in {**values, "SCRIPT_EPILOGUE": "sync", "DOCKER_OUTPUT_DIR_LINK": ""}.items():
        script = script.replace(word, value)
    return script


READERS = pytest.mark.parametrize("read", [by_miniwdl, by_cromwell])

PLUGIN = """#!/bin/bash
printf '%s\\0' plugin "$@" > "$DUMP/argv"
env -0 > "$DUMP/env"
exit 3
"""


class Node:
    """A folder in which commands run; the plugin writes down what it was given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.share = folder / "share"
        self.programs = folder / "programs"
        for path in (self.share / "incoming", self.share / "outgoing", self.programs):
            path.mkdir(parents=True)
        (self.programs / "plugin").write_text(PLUGIN)
        (self.programs / "plugin").chmod(0o755)
        self._numbers = itertools.count()

    def run(self, script: str, again: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Runs what a reader made of a document, in ``again`` or in a folder of its own."""
        self.cwd = again or self.folder / f"run {next(self._numbers)}"
        self.cwd.mkdir(exist_ok=True)
        return subprocess.run(
            ["bash", "--norc"],
            input=script.replace("[ -d /share/", f"[ -d {self.share}/"),
            cwd=self.cwd,
            env={
                "PATH": f"{self.programs}:/usr/bin:/bin",
                "DUMP": str(self.cwd),
                "LC_ALL": "C.UTF-8",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def given(self, script: str) -> tuple[list[str], Mapping[str, str]]:
        """The arguments and the environment that the plugin was run with."""
        done = self.run(script)
        assert (done.returncode, done.stderr) == (3, ""), done
        argv, environment = (
            (self.cwd / name).read_bytes().decode().split("\0")[:-1] for name in ("argv", "env")
        )
        return argv[1:], dict(pair.split("=", 1) for pair in environment)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "node")


# --- arguments and variables ---


@READERS
@examples(max_examples=20)
@given(args=st.lists(words), env=st.dictionaries(names, words))
@example(
    args=[*HOSTILE, *REPLACED, *(f"a\n    {text}\r\n" for text in HOSTILE)],
    env={f"V{number}": text for number, text in enumerate((*HOSTILE, *REPLACED))},
)
def test_arguments_and_variables_arrive_byte_for_byte(
    read: Any, args: list[str], env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = render(dataclasses.replace(PLAIN, argv=("plugin", *args), env=env))
    argv, environment = Node(tmp_path_factory.mktemp("node")).given(read(text))
    assert argv == args
    assert {**environment, **env} == environment


@given(words)
@example("".join(REPLACED))
def test_a_word_is_one_line_of_ascii_that_nothing_replaces(text: str) -> None:
    for apart in (True, False):
        word = command_word(text, apart)
        assert word.isascii()
        assert word.isprintable()
        assert not [odd for odd in ("~{", "${", ">>>", "SCRIPT_", *REPLACED) if odd in word]


def test_plain_words_stay_plain() -> None:
    assert command_word("--in=/share/incoming,1.5%") == "--in=/share/incoming,1.5%"
    assert command_word("two words {}") == "'two words {}'"
    assert command_word("it's \\ \n") == "$'it\\'s \\\\ \\012'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ 'SCRIPT' }}{{ '_EPILOGUE' }}", "SCRIPT_EPILOGUE"),
        ("SCRIPT_{{ 'EPILOGUE' }}", "SCRIPT_EPILOGUE"),
        ("{{ 'SCRIPT' }}_EPILOGUE", "SCRIPT_EPILOGUE"),
        ("a={{ '~' }}{b", "a=~{b"),
        ("a={{ '$' }}{b", "a=${b"),
        ("{{ '>' }}{{ '>>' }}{{ '>' }}", ">>>>"),
        ("{{ 'a\\\\' }}b", "a\\b"),
        ("{{ ['a', 'b c'] | join(' ') }}{{ 5 }}{{ 1.5 }}", "a b c51.5"),
    ],
)
def test_two_halves_make_nothing_that_wdl_or_cromwell_knows(
    text: str, expected: str, node: Node
) -> None:
    block = f"{{% block run %}}\n    exec plugin {text}\n{{% endblock %}}"
    document = mine('{% extends "chris.wdl.j2" %}' + block)
    for read in (by_miniwdl, by_cromwell):
        assert node.given(read(document))[0] == [expected]


# --- literals ---


@given(bmp)
@example("".join(text for text in HOSTILE if max(text, default="") <= "\uffff"))
def test_every_text_survives_as_a_literal(text: str) -> None:
    for value in (text, f"{text}\n'\"\\~{{x}}${{x}}"):
        document = (
            f"version 1.0\ntask t {{ command <<<>>> runtime {{ docker: {literal(value)} }} }}"
        )
        assert runtime_of(document)["docker"] == value


@pytest.mark.parametrize("number", [0, 7, -7, 1.5, -0.25])
def test_a_number_is_a_number(number: float) -> None:
    assert runtime_of(mine_runtime("x: {{ site.x }}", {"x": number}))["x"] == number
    assert runtime_of(mine_runtime("x: {{ site.x }}", {"x": str(number)}))["x"] == str(number)


@pytest.mark.parametrize("number", [1e22, 1e-7, float("inf"), float("nan")])
def test_a_number_that_cromwell_could_not_read_is_refused(number: float) -> None:
    with pytest.raises(TemplateError, match=r"line 2: .* is no number that WDL can have"):
        mine_runtime("x: {{ site.x }}", {"x": number})


@pytest.mark.parametrize("text", ["x: {{ site.x }}", "x: {{ site.x ~ 1 }}"])
def test_a_nul_byte_is_refused(text: str) -> None:
    with pytest.raises(TemplateError, match="has a NUL byte, which no command line can carry"):
        mine_runtime(text, {"x": "a\0b"})


def test_a_character_that_cromwell_and_miniwdl_write_differently_is_refused() -> None:
    with pytest.raises(Refusal, match="'a😀' can't be written into WDL for Cromwell: it has 😀"):
        mine_runtime("x: {{ site.x }}", {"x": "a😀"})
    spec = dataclasses.replace(PLAIN, auid="😀", argv=("plugin", "😀"))
    assert '# user: "\\ud83d\\ude00"' in render(spec)  # a comment is read by people alone


def mine(text: str, site: Mapping[str, Any] | None = None, spec: JobSpec = PLAIN) -> str:
    """The document of an operator's own template."""
    renderer = Renderer({"wdl/mine.wdl.j2": text}, Site(site or {}))
    return renderer.render(spec, "wdl", "mine").text


def mine_runtime(line: str, site: Mapping[str, Any]) -> str:
    block = f"{{% block runtime %}}\n{line}\n{{% endblock %}}"
    return mine('{% extends "chris.wdl.j2" %}' + block, site)


# --- where values may stand ---


@pytest.mark.parametrize(
    ("template", "document"),
    [
        ("# {{ v }}", '# "it\\u0027s"'),
        ("{{ v }} {{ 5 }}", '"it\\u0027s" 5'),
        ("command <<< {{ v }} >>> {{ v }}", "command <<< $'it\\'s' >>> \"it\\u0027s\""),
        ("command<<<\n  {{ v }}>>>", "command<<<\n  $'it\\'s'>>>"),
        ("command # <<<\n <<<{{ v }}>>>", "command # <<<\n <<<$'it\\'s'>>>"),
        ("# command <<<\n{{ v }}", '# command <<<\n"it\\u0027s"'),
        ('x: "command <<<" {{ v }} \'"\' {{ v }}',) * 1
        + ('x: "command <<<" "it\\u0027s" \'"\' "it\\u0027s"',),
        ('x: "\\" <<<" {{ v }}', 'x: "\\" <<<" "it\\u0027s"'),
        ('x: "~{"}"} <<<" {{ v }}', 'x: "~{"}"} <<<" "it\\u0027s"'),
        ("command <<< >> {{ v }} > >>> {{ v }}",) * 1
        + ("command <<< >> $'it\\'s' > >>> \"it\\u0027s\"",),
        ('command <<< "\'" # {{ v }}\n>>>', "command <<< \"'\" # $'it\\'s'\n>>>"),
        ("command <<<\n  cat <<EOF\n  '\n  EOF\n  {{ v }}>>>",) * 1
        + ("command <<<\n  cat <<EOF\n  '\n  EOF\n  $'it\\'s'>>>",),
        ("command { ${a} ~{b} } {{ v }}", 'command { ${a} ~{b} } "it\\u0027s"'),
        (
            'String s = "$("\n{{ v }}\ncommand { }',
            'String s = "$("\n"it\\u0027s"\ncommand { }',
        ),
        ("mycommand { {{ v }} }", 'mycommand { "it\\u0027s" }'),
        ("command <<< {{ v }} ~{a} >>> {{ 1 }}", "command <<< $'it\\'s' ~{a} >>> 1"),
        ("command <<< echo {{ 1 }} >>>\ncommand <<< {{ v }} >>>",) * 1
        + ("command <<< echo 1 >>>\ncommand <<< $'it\\'s' >>>",),
    ],
)
def test_a_value_is_what_its_place_wants(template: str, document: str) -> None:
    assert mine('{% set v = "it\'s" +%}' + template) == document


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ('\n"{{ v }}"', 'inside "…" in line 2 of the document: leave out the quotes'),
        ("\n\n'{{ v }}'", "inside '…' in line 3 of the document: leave out the quotes"),
        ('"\\"{{ v }}"', 'inside "…" in line 1'),
        ('"\\{{ v }}" {{ 1 }}', 'inside "…" in line 1'),
        ('"~{ {{ v }} }"', "inside a placeholder ~{…} in line 1"),
        ('"~{a}{{ v }}"', 'inside "…" in line 1'),
        (
            "command {\n{{ v }}\n}",
            "inside command { … } in line 2 .*: write the command as `command <<<",
        ),
        ("command # why\n { {{ v }} }", "inside command { … } in line 2"),
        ("command # {{ v }}\n { {{ v }} }", "inside command { … } in line 2"),
        ("{{ v }}command { {{ v }} }", "inside command { … } in line 1"),
        ("command <<< ~{ {{ v }} } >>>", "inside a placeholder ~{…} in line 1"),
        ("command <<< ~{a}\n {{ v }} >>>", "a command, after a placeholder ~{…} in line 2"),
        ('command <<< ~{a "}" "}"}\n {{ v }} >>>', "a command, after a placeholder ~{…} in line 2"),
        (
            '\ncommand <<<\n\n  echo "{{ v }}"\n>>>',
            "inside double quotes in line 4 .*: write it outside",
        ),
        ("command <<<\n\n  '{{ v }}'\n>>>", "inside single quotes in line 3"),
        ("command <<<\n  cat <<EOF\n  {{ v }}\n  EOF\n>>>", "inside a here-document in line 3"),
        ("command <<< `{{ v }}` >>>", "inside `…` in line 1"),
        ("command <<< \\{{ v }} >>>", "the reach of a backslash"),
        ('command <<< {{ 1 }} >>>\ncommand <<< "{{ v }}" >>>', "inside double quotes in line 2"),
        ("# command <<<\n# it's\n'{{ v }}'", "inside '…' in line 3"),
    ],
)
def test_a_value_that_cannot_stand_there_is_told_with_its_line(template: str, words: str) -> None:
    with pytest.raises(TemplateError, match=f"^wdl/mine.wdl.j2: a value stands .*{words}"):
        mine('{% set v = "it\'s" +%}' + template)


WDL_ATTACKS = (
    *("~{1}", '"~{1}"', ">>>", ">>> runtime { x: 1 }", '" x: 1 y: "', "' x: 1 y: '", "\n>>>\n"),
    *("} x: {", "} } task u { command <<< >>> }", '"', "'", "\\", "\\\\", "#", "\nx: 1", "<<<"),
    *('\\" x: 1 #', "${1}", "~", "$", "{", "}", ">", '" + "', "*/", "/*", "\r x: 1", *ATTACKS),
)
WDL_SYNTAX = (
    *"x: y: 1 { } [ ] , + ( ) \" ' \\ ~{ ${ ~ $ > >> # \"a\" 'b' true @ @ @ @".split(),
    *("\n", "\r", " ", '"~{1}"', '"a~{"b"}"', "{x: 1}", "#'\n", '# "\n'),
)


def shape_of(text: str, value: str) -> Any:
    """What a document says, the value aside; None: it is no WDL."""
    try:
        (task,) = WDL.parse_document(text).tasks
    except (WDL.Error.SyntaxError, WDL.Error.ValidationError):
        return None
    return [
        (
            name,
            str(each).replace(literal(value), "@"),
            [type(part) for part in getattr(each, "parts", [])],
        )
        for name, each in task.runtime.items()
    ] + [str(part).replace(command_word(value), "@") for part in task.command.parts]


def filled(frame: str, value: str) -> str | None:
    """``frame`` with the value for each ``@``; None: it can't stand there."""
    begin, end = "\x02mark", "\x03mark"
    document = settled(frame.replace("@", f"{begin}{literal(value)}{end}"), begin, end)
    return document if isinstance(document, str) else None


@pytest.mark.parametrize("seed", range(4))
def test_no_value_leaves_its_place(seed: int) -> None:
    """Random syntax around an attack: whatever is let through says what it says with any value."""
    chance = random.Random(seed)
    tried = parsed = 0
    while tried < 60:
        parts = chance.choices(WDL_SYNTAX, k=chance.randint(1, 5))
        parts.insert(chance.randint(0, len(parts)), "x: @")
        runtime = chance.choice(("", " ")).join(parts)
        frame = f'version 1.0\ntask t {{ command <<<@>>> runtime {{ docker: "a" {runtime} }} }}'
        attack = chance.choice(WDL_ATTACKS)
        hostile, harmless = filled(frame, attack), filled(frame, "harmless")
        assert (hostile is None) == (harmless is None)
        if hostile is not None and harmless is not None:
            tried += 1
            shape = shape_of(harmless, "harmless")
            parsed += shape is not None
            assert shape == shape_of(hostile, attack), (frame, attack)
    assert parsed, "none of them was WDL"


@pytest.mark.parametrize("seed", range(4))
def test_no_command_that_is_let_through_runs_a_value(seed: int, node: Node) -> None:
    chance = random.Random(seed)
    tried = 0
    while tried < 40:
        parts = chance.choices((*SYNTAX, "~", ">", "SCRIPT_"), k=chance.randint(1, 10))
        parts.insert(chance.randint(0, len(parts)), "@")
        attack = chance.choice(ATTACKS)
        frame = "version 1.0\ntask t {\ncommand <<<\n  %s\n>>>\nruntime { docker: 'a' } }"
        document = filled(frame % "".join(parts), attack)
        if document is not None:
            tried += 1
            node.run(by_cromwell(document))
            assert not [*node.folder.rglob("pwned")], (parts, attack)


# --- what Cromwell's Slurm backend pastes into its command lines ---


@pytest.mark.parametrize("text", ["a", "/a/b-c_d.e@f%g+h=i", "100%", "a-", ".", "01"])
def test_what_a_shell_reads_as_it_is_goes_through(text: str) -> None:
    assert unquoted(text) == text


@pytest.mark.parametrize("text", [*(text for text in HOSTILE if text not in ("=", "%j", "%%"))])
def test_what_a_shell_would_change_is_refused(text: str) -> None:
    if not re.fullmatch("a=b|x+", text):
        with pytest.raises(Refusal, match="can't go through Cromwell"):
            unquoted(text)


@pytest.mark.parametrize(
    ("text", "also", "words"),
    [
        (
            "/data/it's",
            "",
            "^the input folder \"/data/it's\" can't go through Cromwell: it has ' (allowed: "
            "letters, digits and _ . / @ % + = -); rename it$",
        ),
        ("a:b", "", "it has : "),
        ("a,b", ":", "it has , (allowed: letters, digits and _ . / @ % + = - :)"),
        ("", "", "it is empty"),
        ("-a", "", "it begins with -"),
        ("a b", "", "it has a blank"),
        ("a\nb", "", "it has '\\n'"),
        ("é", "", "it has é"),
    ],
)
def test_a_refused_value_is_told_with_the_remedy(text: str, also: str, words: str) -> None:
    pattern = re.sub(r"[()+.\\]", r"\\\g<0>", words)
    with pytest.raises(Refusal, match=pattern):
        unquoted(text, "the input folder", "rename it", also)


def test_further_characters_can_be_let_through() -> None:
    assert unquoted("localhost:5000/a:1", also=":") == "localhost:5000/a:1"
    assert unquoted("a]b", also="]^") == "a]b"


@pytest.mark.parametrize(
    ("first", "second", "parts"),
    [
        ("/data/feed/in", "/data/feed/out", ("/data/feed", "in", "out")),
        ("/data/a/b/in", "/data/c/out", ("/data", "a/b/in", "c/out")),
        ("/data/a", "/data/a", ("/data/a", ".", ".")),
        ("/data/a", "/data/a/b", ("/data/a", ".", "b")),
        ("/data/a/b", "/data/a", ("/data/a", "b", ".")),
        ("/data/ab", "/data/a", ("/data", "ab", "a")),
        ("/in", "/out/a", ("/", "in", "out/a")),
    ],
)
def test_two_folders_are_split_at_the_deepest_that_holds_both(
    first: str, second: str, parts: tuple[str, str, str]
) -> None:
    assert split_folders(first, second) == parts


# --- the shipped templates ---

WDL_SITE = Site(
    {
        "images": {"ghcr.io/fnndsc/*": "/images/simple.sif"},
        "partition": "normal,long",
        **{"account": "proj-1", "qos": "high", "constraint": "ib", "reservation": "r1"},
    },
    rules=(Rule(gpu=True, values={"partition": "gpu"}),),
)
WDL_FULL = dataclasses.replace(FULL, input_dir="/data/home/100%/in")


def test_the_shipped_templates_are_these() -> None:
    assert Renderer().names("wdl") == ["chris", "probe"]


@pytest.mark.parametrize(
    ("kind", "spec", "site"), [("plain", PLAIN, None), ("full", WDL_FULL, WDL_SITE)]
)
def test_the_document_is_the_golden_one(
    kind: str, spec: JobSpec, site: Site | None, request: pytest.FixtureRequest
) -> None:
    text = render(spec, site)
    golden = GOLDEN / f"chris-{kind}.wdl"
    if request.config.getoption("--rewrite-golden"):
        golden.write_text(text)
    assert text == golden.read_text()


def grid() -> Iterator[Any]:
    sites: dict[str, Site] = {
        "no site": Site(),
        "all of a site": WDL_SITE,
        "a partition": Site({"partition": "a"}),
        "numbers": Site({"account": 7, "qos": "007"}),
    }
    limits: dict[str, dict[str, Any]] = {
        "no limits": {},
        "limits": {"cpu_limit": 1500, "memory_limit": 200, "time_limit": 90},
        "a time limit": {"time_limit": 1},
    }
    for (name, site), (kind, limit), gpus, workers in itertools.product(
        sites.items(), limits.items(), (0, 4), (1, 8)
    ):
        spec = dataclasses.replace(
            PLAIN, gpu_limit=gpus, number_of_workers=workers, argv=("plugin", *HOSTILE[:20])
        )
        for sample in samples(dataclasses.replace(spec, **limit), site):
            named = f"{name}, {kind}, {gpus} GPUs, {workers} workers, {sample.what}"
            yield pytest.param(sample.spec, site, id=named)


@pytest.mark.parametrize(("spec", "site"), [*grid()])
def test_each_kind_of_job_says_what_was_asked_for(spec: JobSpec, site: Site, node: Node) -> None:
    if "'" in spec.input_dir:
        with pytest.raises(Refusal, match="can't go through Cromwell"):
            render(spec, site)
        spec = dataclasses.replace(spec, input_dir=PLAIN.input_dir, output_dir=PLAIN.output_dir)
    text = render(spec, site)
    values = site.for_job(spec)
    expected = {
        "docker": values["image"] or spec.image,
        "sharedir": "/data/home/cube",
        "incoming": "in",
        "outgoing": "out",
        "cpu": spec.cpus,
        "memory": spec.memory_limit and f"{spec.memory_limit} MiB",
        "gpu_limit": spec.gpu_limit,
        "number_of_workers": spec.number_of_workers,
        "timelimit": spec.time_limit,
        **{
            f"slurm_{option}": str(values[option]) if option in values else None
            for option in ("partition", "account", "qos", "constraint", "reservation")
        },
        "maxRetries": 0,
        "failOnStderr": False,
        "continueOnReturnCode": 0,
    }
    assert runtime_of(text) == {name: each for name, each in expected.items() if each is not None}
    assert node.given(by_cromwell(text))[0] == node.given(by_miniwdl(text))[0] == [*spec.argv[1:]]


@READERS
def test_a_plugin_is_run_once(read: Any, node: Node) -> None:
    script = read(render(dataclasses.replace(PLAIN, argv=("plugin",))))
    assert node.run(script).returncode == 3
    (node.cwd / "argv").unlink()
    done = node.run(script, again=node.cwd)
    reason = "started again by the cluster after it had begun; a plugin is never run twice"
    assert (done.returncode, done.stderr) == (1, f"pman: {reason}\n")
    assert (node.cwd / "pman-reason").read_text() == f"{reason}\n"
    assert not (node.cwd / "argv").exists()


@pytest.mark.parametrize(
    ("folder", "path"), [("incoming", PLAIN.input_dir), ("outgoing", PLAIN.output_dir)]
)
def test_a_folder_that_is_not_mounted_is_told(folder: str, path: str, node: Node) -> None:
    (node.share / folder).rmdir()
    done = node.run(by_cromwell(render(dataclasses.replace(PLAIN, argv=("plugin",)))))
    assert done.returncode == 1
    reason = (node.cwd / "pman-reason").read_text()
    assert f" {path} is not mounted at /share/{folder}: " in reason
    assert done.stderr == f"pman: {reason}"
    assert not (node.cwd / "argv").exists()


def test_a_folder_that_cannot_be_written_is_told(node: Node) -> None:
    script = by_cromwell(render(PLAIN)).replace("mkdir pman-lock", "mkdir /proc/pman-lock")
    done = node.run(script)
    assert (done.returncode, done.stderr) == (
        1,
        f"pman: the job's folder {node.cwd} can't be written\n",
    )


@pytest.mark.parametrize("ids", [{"uid": 0}, {"gid": 0}])
def test_container_user_is_refused_unless_the_site_sees_to_it(ids: dict[str, Any]) -> None:
    spec = dataclasses.replace(PLAIN, **ids)
    with pytest.raises(Refusal, match=r"CONTAINER_USER is set.*leave CONTAINER_USER empty"):
        render(spec)
    mine('{% extends "chris.wdl.j2" %}{% block container_user %}{% endblock %}', spec=spec)


def test_the_probe_tells_what_the_node_is_like(node: Node) -> None:
    text = render(PLAIN, template="probe", probed="chris")
    script = by_cromwell(text).replace("probe /share/outgoing", f"probe {node.share}/outgoing")
    done = node.run(script)
    told = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert (done.returncode, done.stderr, told["writable"]) == (0, "", "yes")
    assert told.keys() == {"node", "clock", "bash", "writable", "scratch", "free"}
    assert runtime_of(text) == runtime_of(render(PLAIN))
    assert [*(node.share / "outgoing").iterdir()] == []


HOSTILE_FIELDS = 'it\'s "$(touch pwned)" ~{1} >>> }\n} task u { command <<< >>> } /* 😀'


@READERS
def test_hostile_fields_say_nothing(read: Any, node: Node) -> None:
    spec = dataclasses.replace(PLAIN, argv=("plugin", HOSTILE_FIELDS), env={"A": HOSTILE_FIELDS})
    fields: dict[str, Any] = dict.fromkeys(("jid", "name", "auid", "type"), HOSTILE_FIELDS)
    hostile = dataclasses.replace(spec, **fields, labels={HOSTILE_FIELDS: HOSTILE_FIELDS})
    assert runtime_of(render(hostile)) == runtime_of(render(spec))
    assert read(render(hostile)) == read(render(spec))
    assert node.given(read(render(hostile)))[0] == [HOSTILE_FIELDS]


@pytest.mark.parametrize("field", ["image", "input_dir", "output_dir"])
@pytest.mark.parametrize("odd", ["$(id)", "'", " ", ";", "`", "é", ",", "\n"])
def test_what_a_shell_would_read_is_no_image_and_no_folder(field: str, odd: str) -> None:
    with pytest.raises(Refusal, match=r"^the .* can't go through Cromwell: it has"):
        changes: dict[str, Any] = {field: f"/data/x{odd}"}
        render(dataclasses.replace(PLAIN, **changes))


def test_a_worker_renders_and_checks_within_its_bounds() -> None:
    own = '{% extends "chris.wdl.j2" %}{% block run %}\n    exec "{{ job.auid }}"\n{% endblock %}'
    with Worker(Sources({"wdl/mine.wdl.j2": own}, None, "")) as worker:
        worker.compile("wdl")
        assert worker.render(PLAIN, "wdl", "chris", check=True).text == render(PLAIN)
        probe = worker.probe(PLAIN, "wdl", "chris").text
        assert probe == render(PLAIN, template="probe", probed="chris")
        with pytest.raises(TemplateError, match="inside double quotes in line 24 "):
            worker.render(PLAIN, "wdl", "chris", "mine")


# --- what is wrong with a document ---

GOOD = """version 1.0
task plugin_instance {
  command <<<
    true
  >>>
  runtime { docker: "a" }
}
workflow ChRISJob { call plugin_instance }
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("version 1.0", "", 2, "it must begin with `version 1.0`"),
        ("version 1.0", "version 1.1", 1, "it must begin with `version 1.0`"),
        ("version 1.0", "# why\n\nversion draft-2", 3, "it must begin with `version 1.0`"),
        ("version 1.0", "struct A {}\nversion 1.0", 1, "it must begin with `version 1.0`"),
        ("ChRISJob", "Job", 8, "a workflow ChRISJob"),
        ("workflow ChRISJob { call plugin_instance }", "", 0, "a workflow ChRISJob"),
        ("plugin_instance", "other", 0, "a task plugin_instance"),
        ("{ call plugin_instance }", "{ }", 8, "the workflow ChRISJob must call plugin_instance"),
        ('docker: "a"', "cpu: 1", 2, "must have `docker` in its `runtime`"),
        ('runtime { docker: "a" }', "", 2, "must have `docker` in its `runtime`"),
        ('"a"', '"a" "b"', 6, "this is no WDL from column 2"),
        ('"a"', '"a', 6, "it ends in the middle"),
        ("call plugin_instance }", "call plugin_instance", 8, "it ends in the middle"),
        ('"a"', "nothing", 6, "Unknown identifier nothing"),
        ('"a"', "true - 1", 6, "Non-numeric operand"),
        ("command <<<\n    true\n  >>>", "command {\n    true\n  }", 3, "as `command <<< … >>>`"),
        ("    true", "    if true\n", 6, "syntax error"),
        ("    true", "\n    true )", 5, "syntax error near unexpected token `)'"),
        ("version 1.0", 'version 1.0\nimport "a.wdl"', 2, "it can import nothing"),
        ('"a"', '"a"\n maxRetries: 2', 7, "`maxRetries` of plugin_instance must be 0, and not 2"),
        ('"a"', '"a" maxRetries: 0 + 1', 6, "must be 0, and not 0 + 1: each try has a folder"),
        ('"a"', '"a" maxRetries: "0"', 6, 'must be 0, and not "0"'),
        ('"a"', '"a" maxRetries: 2\nmaxRetries: 0', 7, "`maxRetries` stands twice"),
        ('"a"', '"a", cpu: 1, docker : "b"', 6, "`docker` stands twice in the `runtime` of plugin"),
        ('"a"', '"a" x: "}" # }\n y: {"x": 1} x\n:2', 7, "`x` stands twice"),
        ("call plugin_instance", "call plugin_instance as x", 8, "without `as x`"),
        (
            "call plugin_instance",
            "call plugin_instance\ncall plugin_instance as y",
            9,
            "it must call plugin_instance once",
        ),
        (
            "call plugin_instance",
            "if (true) { call plugin_instance }\ncall plugin_instance as y",
            9,
            "it must call plugin_instance once",
        ),
        (
            "call plugin_instance",
            "scatter (i in [1, 2]) {\ncall plugin_instance\n}",
            9,
            "outside of `scatter` and `if`",
        ),
        (
            "call plugin_instance",
            "if (true) { if (true) {\ncall plugin_instance\n} }",
            9,
            "outside of `scatter` and `if`",
        ),
    ],
)
def test_a_wrong_document_is_told_with_its_line(old: str, new: str, line: int, words: str) -> None:
    complaint = check_wdl(GOOD.replace(old, new))
    assert complaint is not None
    assert (complaint.line, words in complaint.reason) == (line, True), complaint


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("version 1.0", "# a\n\n  # b\nversion 1.0 "),
        ("true", "cat <<EOF\n    '\n    EOF"),
        ("true", "echo ~{1 + 1} '"),
        ("command <<<", "command\n<<<"),
        ('"a"', '"a" maxRetries: 0 # maxRetries: 1\n'),
        ('"a"', '"a" maxRetries: 0 x: {"docker": {1: 2}, "maxRetries": {1: 2}}'),
        ('"a"', '"maxRetries: ~{"x: 1"} docker: " x: "docker: 2"'),
        ("true", "true # runtime { docker: docker: }"),
        ("command", 'meta { runtime: "x" x: {runtime: {cpu: 1}, cpu: 2} } command'),
        ("call plugin_instance", "call plugin_instance as plugin_instance"),
        (
            "workflow ChRISJob { ",
            "task other { command <<< >>> runtime { cpu: 1 cpu: 1 maxRetries: 3 } }\n"
            "workflow ChRISJob { call other if (true) { call other as more } ",
        ),
    ],
)
def test_a_right_document_is_right(old: str, new: str) -> None:
    assert check_wdl(GOOD.replace(old, new)) is None


def test_without_miniwdl_nothing_is_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "WDL", None)
    complaint = check_wdl(GOOD)
    assert complaint is not None
    assert "pip install 'pman[cromwell]'" in complaint.reason


def test_a_site_without_cromwell_needs_no_miniwdl() -> None:
    code = "import sys; sys.modules['WDL'] = None; import pman.worker, pman.check"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
