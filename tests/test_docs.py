"""The documentation says what the code does: settings, templates, examples, links."""

import inspect
import itertools
import re
import runpy
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jinja2
import pytest

from pman import request
from pman.check import of_settings
from pman.drivers import cromwell_config, cromwell_states
from pman.errors import SiteError, TemplateError
from pman.jobs import JobSpec, Severity
from pman.languages import LANGUAGES, check_wdl
from pman.rendering import Renderer, shipped_templates
from pman.settings import Settings
from pman.site import Site
from pman.site_schema import SITE_SCHEMA

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEMPLATES = sorted(path.name.split(".")[0] for path in shipped_templates().glob("sbatch/*.j2"))
RUNTIMES = [name for name in TEMPLATES if name not in ("base", "probe")]


@dataclass(frozen=True)
class Fence:
    """One fenced block of a page."""

    language: str
    text: str


def fences(page: Path) -> list[Fence]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [Fence(language, text) for language, text in found]


def first(page: Path, language: str) -> str:
    return next(fence.text for fence in fences(page) if fence.language == language)


def wdl_source() -> str:
    return (shipped_templates() / "wdl" / "chris.wdl.j2").read_text()


def sources(*names: str) -> str:
    folder = shipped_templates() / "sbatch"
    return "\n".join((folder / f"{name}.sbatch.j2").read_text() for name in names)


# --- settings.md ---


def test_settings_page_is_fresh() -> None:
    page = runpy.run_path(str(DOCS / "generate_settings.py"))["page"]()
    assert (DOCS / "settings.md").read_text() == page, "run docs/generate_settings.py"


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_every_setting_is_documented(name: str) -> None:
    assert f"| `{name.upper()}` |" in (DOCS / "settings.md").read_text()


# --- templates.md: what is named ---


def vocabulary() -> Iterator[str]:
    """Every word that a template may use, as templates.md writes it."""
    environment = jinja2.Environment()
    ours = Renderer()._environments["sbatch"]
    yield from sorted(ours.filters.keys() - environment.filters.keys() - {"word"})
    for name in sorted(ours.globals.keys() - environment.globals.keys()):
        function: Any = ours.globals[name]
        yield f"{name}({', '.join(inspect.signature(function).parameters)})"
    yield from sorted(set(re.findall(r"{% block (\w+)", sources("base") + wdl_source())))
    yield from (f"job.{field.name}" for field in fields(JobSpec))
    properties = [name for name, value in vars(JobSpec).items() if isinstance(value, property)]
    yield from (f"job.{name}" for name in properties)
    yield "site.image"
    yield from (*RUNTIMES, "chris", "probe")


@pytest.mark.parametrize("word", list(vocabulary()))
def test_every_word_of_templates_is_documented(word: str) -> None:
    assert f"`{word}`" in (DOCS / "templates.md").read_text()


# --- templates.md: the examples ---


def examples() -> list[tuple[str, Fence]]:
    """Each jinja block with the block after it: a part of the document, or the error."""
    found = fences(DOCS / "templates.md")
    return [
        (example.text, after)
        for example, after in itertools.pairwise(found)
        if example.language == "jinja"
    ]


def example_spec(settings: Settings) -> JobSpec:
    spec = request.parse(first(DOCS / "templates.md", "json").encode()).spec(settings)
    name = "chris-jid-1.5f0c2a9e"
    return replace(spec, name=name, folder=f"{settings.jobs_folder}/{name}")


def render_example(example: str, language: str) -> str:
    site = Site.parse(first(DOCS / "templates.md", "yaml"))
    settings = Settings.model_construct(
        storebase=Path("/data"), timelimit_minutes=90, job_labels={"project": "brain"}
    )
    renderer = Renderer({f"{language}/example.{language}.j2": example}, site)
    return renderer.render(example_spec(settings), language, "example").text


@pytest.mark.parametrize(("example", "expected"), examples())
def test_example_renders_as_the_page_says(example: str, expected: Fence) -> None:
    if expected.language == "text":
        language = "wdl" if expected.text.startswith("wdl/") else "sbatch"
        with pytest.raises(TemplateError) as error:
            render_example(example, language)
        assert str(error.value) == expected.text.strip()
    elif expected.language == "wdl":
        text = render_example(example, "wdl")
        assert expected.text in text
        if text.startswith("version"):
            assert check_wdl(text) is None
    else:
        assert expected.language == "bash"
        text = render_example(example, "sbatch")
        assert expected.text in text
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_there_are_examples() -> None:
    assert len(examples()) > 8


@pytest.mark.parametrize("name", sorted(Renderer()._environments["sbatch"].filters.keys()))
def test_every_filter_has_an_example(name: str) -> None:
    if name not in jinja2.Environment().filters and name != "word":
        assert any(re.search(rf"\| {name}\b", example) for example, _ in examples())


def site_files() -> list[tuple[str, str]]:
    """Each SITE_FILE with the errors after it; empty: the page shows none."""
    found = [*fences(DOCS / "templates.md"), Fence("", "")]
    return [
        (file.text, after.text if after.language == "text" else "")
        for file, after in itertools.pairwise(found)
        if file.language == "yaml"
    ]


@pytest.mark.parametrize(("text", "errors"), site_files())
def test_site_file_is_valid_or_has_the_errors_that_the_page_shows(text: str, errors: str) -> None:
    if not errors:
        assert Site.parse(text).warnings == ()
        return
    with pytest.raises(SiteError) as caught:
        Site.parse(text, "site.yaml")
    assert str(caught.value) == errors.strip()


def test_there_are_site_files_with_errors_and_without() -> None:
    assert {bool(errors) for _, errors in site_files()} == {True, False}


# --- slurm-site.md ---


def site_keys() -> set[str]:
    """Every key of SITE_FILE that pman or a shipped template knows."""
    text = sources(*TEMPLATES) + wdl_source()
    listed = re.findall(r"for option in \[(.*?)\]", text)
    options = set(re.findall(r"'(\w+)'", " ".join(listed)))
    assert options, "base names the options that become directives in a list"
    return {*re.findall(r"\bsite\.(\w+)", text), *options, *SITE_SCHEMA["properties"]} - {"image"}


def test_every_key_of_a_shipped_template_is_in_the_schema() -> None:
    assert site_keys() <= SITE_SCHEMA["properties"].keys()


def test_site_file_example_has_every_key() -> None:
    text = first(DOCS / "slurm-site.md", "yaml")
    assert {key for key in site_keys() if not re.search(rf"^{key}:", text, re.M)} == set()


@pytest.mark.parametrize("template", RUNTIMES)
@pytest.mark.parametrize("gpus", [0, 1])
def test_site_file_example_renders(template: str, gpus: int) -> None:
    site = Site.parse(first(DOCS / "slurm-site.md", "yaml"))
    assert site.warnings == ()
    spec = example_spec(Settings.model_construct(storebase=Path("/data")))
    text = Renderer(None, site).render(replace(spec, gpu_limit=gpus), "sbatch", template).text
    assert ("--partition=gpu" in text) == (gpus > 0)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_every_match_of_a_rule_is_documented() -> None:
    matches = SITE_SCHEMA["properties"]["rules"]["items"]["properties"]["match"]["properties"]
    page = (DOCS / "slurm-site.md").read_text()
    assert {name for name in matches if f"| `{name}` |" not in page} == set()


@pytest.mark.parametrize("page", ["slurm-site.md", "cromwell.md"])
def test_environment_file_example_is_valid(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = first(DOCS / page, "ini")
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    (tmp_path / "pman.env").write_text(text)
    settings = Settings(_env_file=tmp_path / "pman.env")  # type: ignore[call-arg]
    assert [found for found in of_settings(settings) if found.severity is Severity.WARNING] == []
    named = set(re.findall(r"^#?([A-Z_]+)=", text, re.M))
    assert {name for name in named if name.lower() not in Settings.model_fields} == set()


# --- cromwell.md ---

EXAMPLE = DOCS / "examples" / "cromwell-slurm.conf"


def runtime_attributes() -> list[str]:
    """Those of the WDL that pman sends."""
    text = (shipped_templates() / "wdl" / "chris.wdl.j2").read_text()
    runtime = text[text.index("runtime {") :]
    listed = re.search(r"for option in \[(.*?)\]", runtime)
    assert listed
    options = [f"slurm_{option}" for option in re.findall(r"'(\w+)'", listed[1])]
    return re.findall(r"^    (\w+): ", runtime, re.M) + options


@pytest.mark.parametrize("name", runtime_attributes())
def test_every_runtime_attribute_is_documented_and_used_by_the_example(name: str) -> None:
    assert f"`{name}`" in (DOCS / "cromwell.md").read_text()
    cromwells_own = ("maxRetries", "failOnStderr", "continueOnReturnCode")
    declared = "memory_mb" if name == "memory" else name
    if name not in cromwells_own:
        assert re.search(rf"^ *(String|Int)\?? {declared}\b", EXAMPLE.read_text(), re.M)


def test_the_check_knows_every_runtime_attribute() -> None:
    known = cromwell_config._ATTRIBUTES.keys() | cromwell_config._CROMWELLS_OWN
    assert known == {*runtime_attributes()}


def test_nothing_bites_in_the_example_configuration() -> None:
    (finding,) = cromwell_config.findings(EXAMPLE.read_text(), EXAMPLE.name)
    assert finding.severity is Severity.OK


def test_every_part_of_the_example_configuration_is_explained() -> None:
    page = (DOCS / "cromwell.md").read_text()
    text = re.sub(r'""".*?"""', "", EXAMPLE.read_text(), flags=re.S)
    names = set(re.findall(r"^ *([a-z][\w-]*)(?:\.enabled)? = ", text, re.M))
    plain = {
        "default",
        "actor-factory",
        "port",
        "submit",
        "max-concurrent-workflows",
        "jobs",
        "per",
    }
    plain |= {"profile", "driver", "connectionTimeout", "numThreads", "url", "interface"}
    assert {name for name in names - plain if f"`{name}`" not in page} == set()


@pytest.mark.parametrize("message", cromwell_states.WAITING.values())
def test_what_waiting_jobs_say_is_documented(message: str) -> None:
    assert f"`{message}`" in (DOCS / "cromwell.md").read_text()


# --- architecture.md ---

MODULES = sorted(
    path.name + "/" * path.is_dir()
    for path in (ROOT / "pman").iterdir()
    if not path.name.startswith("__")
)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_its_line(name: str) -> None:
    assert f"`pman/{name}`" in (DOCS / "architecture.md").read_text()


# --- links ---


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_languages_of_templates_are_all_documented() -> None:
    page = (DOCS / "templates.md").read_text()
    for language in LANGUAGES.values():
        assert f"`{language.folder}/NAME{language.ending}`" in page
