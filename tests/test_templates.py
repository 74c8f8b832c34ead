"""The last good templates stay in use, whatever is on disk; and a good change comes into use."""

import logging
import random
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pman import sources, templates
from pman.errors import Refusal, SiteError, SourceError, TemplateError
from pman.settings import Settings
from pman.templates import Templates, plain_spec
from tests.waiting import wait_for

GOOD = """{% extends "shipped/bare.sbatch.j2" %}
{% block directives %}
#SBATCH --comment=NUMBER
{% endblock %}
"""


class Site:
    """A TEMPLATES_DIR and a SITE_FILE that an operator edits, and the templates in use."""

    def __init__(self, values: dict[str, Any], tmp_path: Path) -> None:
        self.folder = tmp_path / "templates"
        self.file = tmp_path / "site.yaml"
        (self.folder / "sbatch").mkdir(parents=True)
        self.settings = Settings(
            **values
            | {"templates_dir": self.folder, "site_file": self.file, "template": {"": "mine"}}
        )
        self.site("partition: debug\n")
        self.template(number=1)
        self.templates = Templates(self.settings)

    def template(self, text: str | None = None, number: int = 0, name: str = "mine") -> None:
        text = GOOD.replace("NUMBER", str(number)) if text is None else text
        (self.folder / "sbatch" / f"{name}.sbatch.j2").write_text(text)

    def site(self, text: str) -> None:
        self.file.write_text(text)

    def number(self, **changes: Any) -> str:
        """Which one is in use."""
        spec = replace(plain_spec(self.settings), **changes)
        text = self.templates.render(spec).text
        return text.partition("#SBATCH --comment=")[2].partition("\n")[0]

    def looks(self, times: int = 2) -> None:
        for _ in range(times):
            self.templates.refresh()

    @property
    def problem(self) -> str:
        problem = self.templates.problem
        return str(problem.error) if problem else ""


@pytest.fixture
def site(values: dict[str, Any], tmp_path: Path) -> Iterator[Site]:
    made = Site(values, tmp_path)
    made.templates.load()
    yield made
    made.templates.close()


def test_a_change_is_in_use_once_two_looks_have_seen_the_same(site: Site) -> None:
    site.template(number=2)
    site.looks(1)
    assert site.number() == "1"
    site.looks(1)
    assert (site.number(), site.problem) == ("2", "")


def test_what_is_still_being_written_is_not_tried(site: Site) -> None:
    for number in range(2, 6):
        site.template(number=number)
        site.looks(1)
        assert site.number() == "1"


BROKEN: dict[str, tuple[str, str]] = {
    "syntax": (
        "#!/bin/bash\n{{ job.jid }",
        "sbatch/mine.sbatch.j2, line 2: unexpected '}': `{{ job.jid }`",
    ),
    "undefined": (
        "#!/bin/bash\n{{ job.nope }}",
        "mine.sbatch.j2, line 2: .*'nope'.*`{{ job.nope }}`",
    ),
    "only with GPUs": (
        "#!/bin/bash\n{% if job.gpu_limit %}\n{{ site.gpus }}{% endif %}",
        "mine.sbatch.j2, line 3: .*tried with a job with 4 GPUs",
    ),
    "only with workers": (
        "#!/bin/bash\n{% if job.number_of_workers > 1 %}{{ nope }}{% endif %}",
        "line 2: .*tried with a job with 8 workers",
    ),
    "no tail": ("#!/bin/bash\n{{ job.argv[1] }}", "line 2: .*tried with a job with no argument"),
    "no memory limit": (
        "#!/bin/bash\n{{ job.memory_limit }}",
        "line 2: a value is None.*without limits",
    ),
    "no limit": ("#!/bin/bash\n{{ job.cpus }}", "line 2: a value is None.*without limits"),
    "in quotes": ('#!/bin/bash\necho "{{ job.auid }}"', "inside double quotes"),
    "no script": ("echo", "sbatch wants `#!`"),
    "ignored line": ("#!/bin/bash\ntrue\n#SBATCH --hold", "ignores an #SBATCH line .*line 3"),
    "no bash": ("#!/bin/bash\nif true\n", r"syntax error: unexpected end of file .line 3 of"),
    "open here-document": ("#!/bin/bash\ncat <<EOF\n", "here-document at line 2"),
    "endless": (
        "#!/bin/bash\n{% for i in range(99999) %}\n{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}",
        "line [23]: it takes more than 2 s",
    ),
    "huge": ("#!/bin/bash\n{{ 'x' * 5000000 }}", "longer than 4194304 bytes"),
    "class": ("#!/bin/bash\n{{ ''.__class__ }}", "line 2: .*unsafe"),
    "path": ("#!/bin/bash\n{% include '../../secret' %}", "line 2: .*no sbatch template"),
    "refuses all": ("{{ fail('nobody') }}", "^nobody"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_template_is_told_and_the_last_good_one_stays(site: Site, kind: str) -> None:
    text, words = BROKEN[kind]
    site.template(text)
    site.looks()
    assert site.templates.problem is not None
    with pytest.raises(SourceError, match=words):
        raise site.templates.problem.error
    assert site.number() == "1"
    site.template(number=3)
    site.looks()
    assert (site.number(), site.problem) == ("3", "")


def not_utf_8(site: Site) -> None:
    (site.folder / "sbatch" / "mine.sbatch.j2").write_bytes(b"#!/bin/bash\n\xff")


def a_link_out(site: Site) -> None:
    (site.folder / "sbatch" / "x.sbatch.j2").symlink_to("/etc/hostname")


def a_folder(site: Site) -> None:
    site.template(name="other")
    (site.folder / "sbatch" / "mine.sbatch.j2").unlink()
    (site.folder / "sbatch" / "mine.sbatch.j2").mkdir()


def all_gone(site: Site) -> None:
    shutil.rmtree(site.folder)


def emptied(site: Site) -> None:
    """As when the disk that it is on is not mounted."""
    shutil.rmtree(site.folder / "sbatch")


def no_site_file(site: Site) -> None:
    site.file.unlink()


def no_values(site: Site) -> None:
    """As when the disk was full when it was written."""
    site.site("")


def blank_values(site: Site) -> None:
    site.site(" \n\n")


def wrong_site_file(site: Site) -> None:
    site.site("partition: 5\n")


def an_unused_one(site: Site) -> None:
    site.template("{% if %}", name="other")


def a_rule_to_nowhere(site: Site) -> None:
    site.site("rules:\n- {match: {gpu: true}, template: nowhere}\n")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (not_utf_8, "mine.sbatch.j2, line 2: it is no UTF-8"),
        (a_link_out, "which is not in TEMPLATES_DIR"),
        (a_folder, "there is no sbatch template 'mine.sbatch.j2'"),
        (all_gone, "TEMPLATES_DIR .* it is not a folder"),
        (emptied, "TEMPLATES_DIR .*: is the disk mounted"),
        (no_values, "site.yaml: it had values, and it is empty"),
        (blank_values, "site.yaml: it had values, and it is empty"),
        (no_site_file, "site.yaml: it can't be read: No such file"),
        (wrong_site_file, "site.yaml, line 1: `partition` must be text"),
        (an_unused_one, "other.sbatch.j2, line 1"),
        (a_rule_to_nowhere, "there is no sbatch template 'nowhere"),
    ],
)
def test_whatever_happens_to_the_files_the_last_good_ones_stay(
    site: Site, harm: Callable[[Site], None], words: str
) -> None:
    harm(site)
    site.looks()
    assert site.templates.problem is not None
    with pytest.raises(SourceError, match=words):
        raise site.templates.problem.error
    assert site.number() == "1"
    shutil.rmtree(site.folder, ignore_errors=True)
    (site.folder / "sbatch").mkdir(parents=True)
    site.template(number=1)
    site.site("partition: debug\n")
    site.looks()
    assert (site.number(), site.problem) == ("1", "")


def test_a_template_may_refuse_some_jobs(site: Site) -> None:
    site.template("#!/bin/sh\n{% if job.gpu_limit %}{{ fail('no GPUs here') }}{% endif %}")
    site.looks()
    assert site.problem == ""
    with pytest.raises(Refusal, match="no GPUs here"):
        site.number(gpu_limit=1)


def test_a_template_that_a_rule_chooses_may_refuse_the_rules_own_jobs(site: Site) -> None:
    site.template("{{ fail('no fs here') }}", name="none")
    site.site("rules:\n- {match: {type: fs}, template: none}\n")
    site.looks()
    assert site.problem == ""
    with pytest.raises(Refusal, match="no fs here"):
        site.number(type="fs")


def test_the_template_of_a_rule_is_tried_though_a_later_rule_fits_its_sample_too(
    site: Site,
) -> None:
    site.template("#!/bin/sh\n{{ nope }}", name="first")
    site.site(
        "rules:\n- {match: {gpu: true}, template: first}\n- {match: {type: ds}, template: bare}\n"
    )
    site.looks()
    assert "first.sbatch.j2, line 2: 'nope' is undefined (tried with a job that fits rule 1" in (
        site.problem
    )


def test_site_file_and_templates_change_together_or_not_at_all(site: Site) -> None:
    site.template("#!/bin/sh\n#SBATCH --comment={{ site.number }}\n")
    site.looks()
    assert "'number'" in site.problem
    assert site.number() == "1"
    site.site("number: 7\n")
    site.looks()
    assert (site.number(), site.problem) == ("7", "")


def test_rules_of_site_file_choose_the_template(site: Site) -> None:
    site.template(number=5, name="special")
    site.site("rules:\n- {match: {auid: 'dr-*', type: ds}, template: special}\n")
    site.looks()
    assert site.problem == ""
    assert site.number(auid="dr-who") == "5"
    assert site.number(auid="dr-who", type="ts") == "1"


def test_the_template_for_the_engine_goes_before_the_one_for_all(site: Site) -> None:
    both = site.settings.model_copy(update={"template": {"": "mine", "local": "bare"}})
    assert templates.render(both, plain_spec(both)).template == "bare"


def test_since_when_it_is_broken_is_told_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.template("{% if %}")
    site.looks(5)
    first = site.templates.problem
    assert len([one for one in caplog.records if one.levelno >= logging.ERROR]) == 1
    assert "the last good templates stay in use: sbatch/mine.sbatch.j2, line 1" in caplog.text
    site.template("{% for %}")
    site.looks(5)
    second = site.templates.problem
    assert first is not None
    assert second is not None
    assert second.since == first.since
    assert str(second.error) != str(first.error)
    assert len([one for one in caplog.records if one.levelno >= logging.ERROR]) == 2
    site.template(number=2)
    site.looks()
    assert "in use again" in caplog.text


def test_the_warnings_of_site_file_are_logged(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.site("partiton: cpu\n")
    site.looks()
    assert site.problem == ""
    assert "site.yaml, line 1: 'partiton'" in caplog.text


def test_an_accident_in_a_trial_is_no_verdict_for_ever(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    site.template(number=2)
    site.looks()
    assert "bash, which checks the script, can't be run here" in site.problem
    monkeypatch.undo()
    site.looks()
    assert site.number() == "1"
    monkeypatch.setattr(templates, "TRY_AGAIN", 0.0)
    site.looks()
    assert (site.number(), site.problem) == ("2", "")


def test_a_defect_does_not_end_the_looks(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(templates, "read", lambda *_: 1 / 0)
    site.templates.watch()
    wait_for(lambda: "an error that it does not know" in caplog.text, 30, "the defect to be met")
    monkeypatch.setattr(templates, "read", sources.read)
    site.template(number=2)
    wait_for(lambda: site.number() == "2", 30, "the looks to go on")


def test_renders_during_reloads_have_answers_of_their_own(site: Site) -> None:
    over = threading.Event()
    wrong: list[object] = []

    def render() -> None:
        try:
            while not over.is_set():
                if not site.number().isdecimal():
                    wrong.append("no number")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(2, 12):
        site.template(number=number)
        site.looks()
    over.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert site.number() == "11"


# --- the start ---


def again(site: Site) -> Templates:
    """The templates of a server that is started anew."""
    site.templates.close()
    site.templates = Templates(site.settings)
    site.templates.load()
    return site.templates


def test_a_restart_with_broken_templates_goes_on_with_the_last_good_ones(site: Site) -> None:
    site.template("{% if %}")
    again(site)
    assert site.number() == "1"
    assert "mine.sbatch.j2, line 1" in site.problem
    site.looks()
    assert "mine.sbatch.j2, line 1" in site.problem
    site.template(number=2)
    site.looks()
    assert (site.number(), site.problem) == ("2", "")


def test_a_restart_without_the_folder_goes_on_with_the_last_good_ones(site: Site) -> None:
    away = site.folder.rename(site.folder.with_name("away"))
    again(site)
    assert site.number() == "1"
    assert "is not a folder" in site.problem
    away.rename(site.folder)
    site.looks()
    assert (site.number(), site.problem) == ("1", "")


@pytest.mark.parametrize("harm", [emptied, no_values])
def test_a_restart_with_nothing_where_something_was_goes_on_with_the_last_good_ones(
    site: Site, harm: Callable[[Site], None]
) -> None:
    harm(site)
    again(site)
    assert site.number() == "1"
    assert "it is empty: is the disk mounted" in site.problem


def test_a_disk_that_hangs_is_told_and_does_not_keep_pman_from_starting(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that does not end can't be had without such a disk: it is the one thing replaced."""
    go_on = threading.Event()
    monkeypatch.setattr(templates, "read", lambda *_: go_on.wait(60))
    monkeypatch.setattr(templates, "HANGS", 0.2)
    again(site)
    assert site.number() == "1"
    assert "could not be looked at within 0.2 s: does their disk hang?" in site.problem
    go_on.set()


def test_a_look_that_does_not_end_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    real = sources.read
    monkeypatch.setattr(templates, "HANGS", 0.2)
    monkeypatch.setattr(templates, "read", lambda *dirs: go_on.wait(60) and real(*dirs))
    site.templates.watch()
    wait_for(lambda: "does their disk hang" in site.problem, 30, "the look to be told")
    go_on.set()
    wait_for(lambda: not site.problem, 30, "the looks to go on")


def test_after_a_restart_good_templates_are_used(site: Site) -> None:
    site.template(number=2)
    again(site)
    assert (site.number(), site.problem) == ("2", "")


@pytest.mark.parametrize("kept", [None, "", "{}", '{"templates": 5}', "[1]"])
def test_without_anything_good_there_is_no_start(
    values: dict[str, Any], tmp_path: Path, kept: str | None
) -> None:
    site = Site(values, tmp_path)
    site.template("{% if %}")
    if kept is not None:
        site.settings.state_dir.mkdir()
        (site.settings.state_dir / "last-good.json").write_text(kept)
    with pytest.raises(TemplateError, match=r"mine.sbatch.j2, line 1"):
        site.templates.load()
    site.templates.close()


def test_what_was_good_for_other_settings_is_no_help(site: Site) -> None:
    site.template("{% if %}")
    site.settings = site.settings.model_copy(update={"template": {"": "other"}})
    with pytest.raises(TemplateError, match=r"mine.sbatch.j2, line 1"):
        again(site)


def test_the_kept_ones_are_for_this_account_alone(site: Site) -> None:
    (kept,) = site.settings.state_dir.glob("last-good*")
    assert kept.stat().st_mode & 0o777 == 0o600


def test_what_is_kept_is_whole_though_the_disk_is_full(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    kept = site.settings.state_dir / "last-good.json"
    before = kept.read_text()
    site.template(number=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        site.looks()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert site.number() == "2"
    assert "can't be kept for the next start" in caplog.text
    assert kept.read_text() == before


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_start(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.settings = site.settings.model_copy(update={"state_dir": Path("/proc/nowhere")})
    again(site)
    assert site.number() == "1"
    assert "can't be kept for the next start" in caplog.text


# --- once, from disk ---


def test_render_takes_what_is_on_disk_now_good_or_not(site: Site) -> None:
    site.template(number=9)
    spec = plain_spec(site.settings)
    assert "--comment=9" in templates.render(site.settings, spec).text
    assert templates.render(site.settings, spec, "bare").template == "bare"
    site.template("{% if %}")
    with pytest.raises(TemplateError, match=r"mine.sbatch.j2, line 1"):
        templates.render(site.settings, spec)
    site.site("rules: 5\n")
    with pytest.raises(SiteError, match="line 1"):
        templates.render(site.settings, spec)


def test_good_and_broken_changes_at_random(site: Site) -> None:
    """What is in use is always the last good one that two looks have seen."""
    chance = random.Random(1)
    texts = [text for kind, (text, _) in BROKEN.items() if kind != "endless"]
    good = "1"
    for number in range(40):
        broken = chance.random() < 0.5
        site.template(chance.choice(texts) if broken else None, number=number)
        site.looks()
        good = good if broken else str(number)
        assert site.number() == good
        assert bool(site.problem) == broken


# --- through Cromwell ---

RAW = '{% extends "shipped/chris.wdl.j2" %}{% block run %}exec {{ job.argv | join(" ") | raw }}\n'
CROMWELLS = {
    "": "",
    "version 1.1\n": "chris.wdl.j2: it must begin with `version 1.0` (line 1 of the document)",
    RAW + "{% endblock %}": "(tried with a job with hostile values)",
}


@pytest.mark.parametrize(("template", "problem"), CROMWELLS.items())
def test_wdl_is_tried_before_it_is_used(
    values: dict[str, Any], tmp_path: Path, template: str, problem: str
) -> None:
    (tmp_path / "wdl").mkdir()
    cromwell = {"container_env": "cromwell", "storebase": tmp_path / "store", "templates_dir": "."}
    used = Templates(Settings(**values | cromwell))
    used.load()
    try:
        first = used.render(plain_spec(used._settings))
        (tmp_path / "wdl" / "chris.wdl.j2").write_text(
            template or '{% extends "shipped/chris.wdl.j2" %}'
        )
        used.refresh()
        used.refresh()
        assert (problem in str(used.problem.error)) if used.problem else not problem
        assert used.render(plain_spec(used._settings)).text.startswith("version 1.0\n")
        assert first.language == "wdl"
    finally:
        used.close()
