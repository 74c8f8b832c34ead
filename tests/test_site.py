"""SITE_FILE: what it may hold, what its rules choose, and where its mistakes are."""

import dataclasses
import fnmatch
import socket
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from pman import site as site_module
from pman import yaml_lines
from pman.errors import SiteError
from pman.jobs import JobSpec
from pman.site import Rule, Site
from pman.site_schema import SITE_SCHEMA

PLAIN = JobSpec(
    jid="chris-jid-1",
    name="chris-jid-1.0badcafe",
    auid="cube",
    type="ds",
    image="ghcr.io/fnndsc/pl-simpledsapp:2.1.0",
    argv=("simpledsapp", "/share/incoming", "/share/outgoing"),
    env={},
    labels={},
    input_dir="/data/in",
    output_dir="/data/out",
    folder="/data/.pman/chris-jid-1.0badcafe",
)


def problems(text: str) -> list[str]:
    """What is wrong with a text, each without the offending line."""
    with pytest.raises(SiteError) as caught:
        Site.parse(text, "site.yaml")
    error = caught.value
    assert str(error) == "\n".join(str(problem) for problem in error.problems)
    assert (error.reason, error.line) == (error.problems[0].reason, error.problems[0].line)
    rows = ["", *text.split("\n")]
    assert [problem.text for problem in error.problems] == [
        rows[problem.line] for problem in error.problems
    ]
    assert {problem.file for problem in error.problems} == {"site.yaml"}
    return [f"{problem.line}: {problem.reason}" for problem in error.problems]


# --- values and rules ---


@pytest.mark.parametrize("text", ["", "---\n", "# nothing\n", "null\n", "{}"])
def test_an_empty_file_is_an_empty_site(text: str) -> None:
    assert Site.parse(text) == Site()
    assert Site.parse(text).for_job(PLAIN) == {"image": None}


def test_rules_and_schema_are_not_for_templates() -> None:
    site = Site.parse(
        "partition: cpu\nscratch: /s\nschema: {properties: {scratch: {type: string}}}\n"
        "rules: [{match: {}, set: {qos: low}}]\n"
    )
    expected = {"partition": "cpu", "scratch": "/s", "qos": "low", "image": None}
    assert site.for_job(PLAIN) == expected


@pytest.mark.parametrize(
    ("changes", "partition", "image"),
    [
        ({"image": "other"}, "normal", None),
        ({"image": "docker.io/a/b"}, "normal", "/b.sif"),
        ({"image": "docker.io/a/c"}, "normal", "/a.sif"),
        ({"image": "other", "gpu_limit": 1}, "gpu", None),
        ({"image": "big", "gpu_limit": 1}, "big", None),
        ({"image": "big"}, "normal", None),
    ],
)
def test_the_last_rule_and_the_first_image_that_match_count(
    changes: dict[str, Any], partition: str, image: str | None
) -> None:
    site = Site.parse(
        "partition: normal\n"
        "images: {docker.io/a/b: /b.sif, docker.io/a/*: /a.sif}\n"
        "rules:\n"
        "- {match: {gpu: true}, set: {partition: gpu}}\n"
        "- {match: {gpu: true, image: big}, set: {partition: big}}\n",
    )
    values = site.for_job(dataclasses.replace(PLAIN, **changes))
    assert (values["partition"], values["image"]) == (partition, image)


def test_a_rule_changes_nothing_for_the_next_job() -> None:
    site = Site.parse("partition: a\nrules: [{match: {gpu: true}, set: {partition: b, qos: c}}]")
    site.for_job(dataclasses.replace(PLAIN, gpu_limit=1))
    assert site.for_job(PLAIN) == {"partition": "a", "image": None}


GPU = dataclasses.replace(PLAIN, gpu_limit=2)


@pytest.mark.parametrize(
    ("match", "fits", "differs"),
    [
        ("{}", [PLAIN, GPU], []),
        ("{gpu: true}", [GPU], [PLAIN]),
        ("{gpu: false}", [PLAIN], [GPU]),
        ("{image: 'ghcr.io/fnndsc/*'}", [PLAIN], [dataclasses.replace(PLAIN, image="GHCR.IO/x")]),
        ("{image: [a, 'b*']}", [dataclasses.replace(PLAIN, image="bc")], [PLAIN]),
        ("{auid: 'cu?e'}", [PLAIN], [dataclasses.replace(PLAIN, auid="Cube")]),
        ("{auid: [x, cube]}", [PLAIN], [dataclasses.replace(PLAIN, auid="y")]),
        ("{type: ds}", [PLAIN], [dataclasses.replace(PLAIN, type="fs")]),
        ("{type: [fs, ts]}", [dataclasses.replace(PLAIN, type="ts")], [PLAIN]),
        ("{type: ds, gpu: true}", [GPU], [PLAIN, dataclasses.replace(GPU, type="fs")]),
    ],
)
def test_a_rule_matches_when_all_its_matches_fit(
    match: str, fits: list[JobSpec], differs: list[JobSpec]
) -> None:
    (rule,) = Site.parse(f"rules:\n- match: {match}\n  template: x\n").rules
    assert [rule.matches(spec) for spec in [*fits, *differs]] == (
        [True] * len(fits) + [False] * len(differs)
    )
    assert rule.line == 2


def test_the_last_matching_rule_with_a_template_chooses_it() -> None:
    site = Site.parse(
        "rules:\n"
        "- {match: {}, template: podman}\n"
        "- {match: {gpu: true}, template: apptainer, set: {partition: gpu}}\n"
        "- {match: {gpu: true}, set: {qos: gpu}}\n"
        "- {match: {auid: nobody}, template: my.own-1}\n"
    )
    assert [site.template_for(spec) for spec in (PLAIN, GPU)] == ["podman", "apptainer"]
    assert site.for_job(GPU) == {"partition": "gpu", "qos": "gpu", "image": None}
    assert Site().template_for(PLAIN) == ""


# --- samples ---

PIECES = st.lists(st.sampled_from(["*", "?", "[", "]", "!", "-", "a", "c", "/", "\n", "é"]))
PATTERNS = PIECES.map("".join)


@given(PATTERNS)
@example("[]")
@example("[!]")
@example("[]a]")
@example("[c-a]")
@example("[!c-a]")
@example("[[]x")
@example("[a-c]*[!x]?")
def test_the_example_of_a_pattern_fits_it(pattern: str) -> None:
    try:
        text = site_module.example(pattern)
    except ValueError:
        assert "[" in pattern
        assert not any(fnmatch.fnmatchcase(one, pattern) for one in ("", "a", "b", "c", "x", "/"))
    else:
        assert fnmatch.fnmatchcase(text, pattern)


@pytest.mark.parametrize("pattern", ["[", "[]", "[!]", "[!a", "a[b", "]"])
def test_a_bracket_that_is_not_closed_is_itself(pattern: str) -> None:
    assert site_module.example(pattern) == pattern


def fitting(pattern: str) -> bool:
    try:
        return bool(pattern and site_module.example(pattern) is not None)
    except ValueError:
        return False


SOME_PATTERNS = st.lists(PATTERNS.filter(fitting), max_size=2).map(tuple)
RULES = st.builds(
    Rule,
    image=SOME_PATTERNS,
    gpu=st.sampled_from([None, True, False]),
    type=st.lists(st.sampled_from(["ds", "fs", "ts"]), max_size=2).map(tuple),
    auid=SOME_PATTERNS,
)


@given(RULES, st.integers(0, 2))
def test_the_sample_of_a_rule_matches_it(rule: Rule, gpus: int) -> None:
    assert rule.matches(rule.sample(dataclasses.replace(PLAIN, gpu_limit=gpus)))


def test_a_sample_differs_from_the_job_only_where_it_must() -> None:
    assert Rule(image=("x", "ghcr.io/*"), type=("fs", "ds"), gpu=True).sample(GPU) == GPU
    assert Rule().sample(PLAIN) == PLAIN
    sample = Rule(image=("a/*:[12]",), type=("ts",), gpu=True, auid=("b?",)).sample(PLAIN)
    assert sample == dataclasses.replace(PLAIN, image="a/x:1", type="ts", gpu_limit=1, auid="bx")
    assert Rule(gpu=False).sample(GPU) == PLAIN


def test_the_sample_image_is_one_that_the_site_maps() -> None:
    site = Site.parse("images: {'docker.io/[a-c]?/*': /x.sif}")
    assert site.for_job(dataclasses.replace(PLAIN, image=site.sample_image()))["image"] == "/x.sif"
    assert Site().sample_image() == "image"


# --- what is wrong with the YAML ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: b\nc: [", "2: it is no valid YAML: expected the node content"),
        ("a: b\n\x07", r"2: it is no valid YAML: the character '\\x07' is not allowed"),
        ("a: 1\n--- \nb: 2", "2: it is no valid YAML: but found another document"),
        ("a: *b", "1: it is no valid YAML: found undefined alias 'b'"),
        ("- a", "0: it must be a mapping, such as `partition: cpu`"),
        ("text", "0: it must be a mapping"),
        ("a: &a [*a]", "0: it is nested too deeply, or an alias stands inside"),
        ("a: &a {<<: *a}", "0: it (is nested too deeply, or an alias|has more than)"),
        ("a: " + "[" * 60 + "]" * 60, "0: it is nested too deeply"),
        ("a: " + "[" * 9000, "0: it is nested too deeply"),
        ("# " + "x" * yaml_lines.MAX_SIZE, "0: it is longer than"),
        ("a: b\n\na: c", "3: 'a' stands in line 1 already"),
        ("rules:\n- match: {}\n  set: {a: b,\n   a: c}", "4: 'a' stands in line 3 already"),
        ("a: !!python/object/apply:os.system [x]", "1: the tag python/object/.* has no meaning"),
        ("a: !secret x", "1: `x` is read as a !secret by YAML: put it in quotes"),
        ("a: 2024-02-01", "1: `2024-02-01` is read as a timestamp by YAML: put it in quotes"),
        ("a: 2024-99-99", "1: `2024-99-99` is read as a timestamp by YAML: put it in quotes"),
        ("a: 0123", "1: `0123` is read as the number 83 by YAML: put it in quotes"),
        ("a: 1.10", "1: `1.10` is read as the number 1.1 by YAML: put it in quotes"),
        ("a: 12:30:00", "1: `12:30:00` is read as the number 45000 by YAML: put it in quotes"),
        ("a: .nan", "1: `.nan` is read as the number nan by YAML: put it in quotes"),
        ("a: 0b_", "1: `0b_` can't be read as int by YAML: put it in quotes"),
        ("a: !!int ''", "1: `` can't be read as int by YAML: put it in quotes"),
        ("a: !!bool x", "1: `x` can't be read as bool by YAML: put it in quotes"),
        (f"a: 0x{'f' * 5000}", "1: `0xf{58}…` can't be read as int by YAML: put it in quotes"),
        ("no: x", "1: the key 'no' is no text: put it in quotes"),
        ("images: {1.5: /x.sif}", "1: the key '1.5' is no text: put it in quotes"),
        ("? [a]\n: b", "1: a key must be text"),
        ("a: {<<: x}", "1: `<<` merges mappings only"),
        ("a: {<<: [{}, x]}", "1: `<<` merges mappings only"),
    ],
)
def test_what_yaml_takes_otherwise_than_meant_is_told(text: str, expected: str) -> None:
    with pytest.raises(SiteError) as caught:
        Site.parse(text)
    first = caught.value.problems[0]
    assert_matches(f"{first.line}: {first.reason}", expected)


def assert_matches(text: str, expected: str) -> None:
    with pytest.raises(SiteError, match=expected):
        raise SiteError(text)


@pytest.mark.parametrize(
    "bomb",
    [
        "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
        "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)),
    ],
)
def test_aliases_of_aliases_end(bomb: str) -> None:
    assert problems(f"a0: &a0 {{x: y}}\n{bomb}") == [
        f"0: it has more than {yaml_lines.MAX_VALUES} values, those of aliases included"
    ]


def test_anchors_and_merges_are_laid_over_as_yaml_says() -> None:
    text = """\
low: &low {partition: a, qos: low}
high: &high {partition: b, constraint: c}
rules:
- {match: {gpu: true}, set: {<<: [*low, *high], qos: own}}
- {match: &m {gpu: false}, set: *low}
- {match: *m, set: {reservation: r, <<: *high}}
"""
    site = Site.parse(text)
    plain = yaml.safe_load(text)
    assert [dict(rule.values) for rule in site.rules] == [rule["set"] for rule in plain["rules"]]
    assert site.rules[0].values == {"partition": "a", "qos": "own", "constraint": "c"}


def test_a_value_of_an_alias_is_wrong_in_its_own_line() -> None:
    assert problems("a: &a\n  qos: 5\nrules:\n- match: {}\n  set: *a\n") == [
        "2: `qos` must be text, and YAML reads the number 5: put it in quotes"
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), JSON))
def test_plain_values_are_read_as_yaml_reads_them(values: dict[str, Any]) -> None:
    content = yaml_lines.read(yaml.safe_dump(values))
    assert (content.value, content.problems) == (values, ())


@given(st.text() | st.text("ab:-[]{}&*<!?|>'\"# \n019.,"))
@example("")
@example("\ufeffa: b")
@example("a: \ud800")
def test_any_text_is_a_site_or_a_site_error(text: str) -> None:
    try:
        Site.parse(text)
    except SiteError as error:
        assert error.problems


KEYS = st.sampled_from([*SITE_SCHEMA["properties"], "match", "set", "template", "type", "$ref"])
CONTENT = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.sampled_from(["", "ds", "[b-a]", "#", "*"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.fixed_dictionaries({"match": inner, "set": inner})
    ),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, CONTENT))
@example({"schema": {"allOf": [{"$ref": "#"}]}})
@example({"schema": {"$dynamicRef": "https://example.org/x"}})
@example({"schema": {"required": ["x"], "$schema": "nope"}})
def test_any_content_is_a_site_or_problems_with_lines(values: dict[str, Any]) -> None:
    try:
        site = Site.parse(yaml.safe_dump(values, sort_keys=False))
    except SiteError as error:
        assert all(problem.line for problem in error.problems)
    else:
        samples = [rule.sample(PLAIN) for rule in site.rules]
        assert all(rule.matches(spec) for rule, spec in zip(site.rules, samples, strict=True))
        assert all("rules" not in site.for_job(spec) for spec in samples)


# --- what is wrong with the values ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qos: no", "`qos` must be text, and YAML reads false: put it in quotes"),
        ("account: 123", "`account` must be text, and YAML reads the number 123: put it in quotes"),
        ("partition:", "`partition` must be text; it is empty"),
        ("setup: [a]", "`setup` must be text"),
        ("directives: --x", "`directives` must be a list, such as `- --exclusive`"),
        (
            "directives: [-1]",
            "item 1 of `directives` must be text, and YAML reads the number -1: put it in quotes",
        ),
        (
            "images: []",
            "`images` must be a mapping, such as `docker.io/fnndsc/*: /containers/plugin.sif`",
        ),
        ("images: {a: {}}", "`a` must be text"),
        ("image: x", "`image` is pman's own: map images under `images`"),
        (
            "schema: x",
            "`schema` must be a mapping, such as `properties: {scratch: {type: string}}`",
        ),
        (
            "rules:",
            "`rules` must be a list, such as `- {match: {gpu: true}, set: {partition: gpu}}`",
        ),
        ("images: {'[b-a]': x}", "the pattern '[b-a]' can't fit: no text fits '[b-a]'"),
    ],
)
def test_a_wrong_value_is_told(text: str, expected: str) -> None:
    assert problems(text) == [f"1: {expected}"]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            "x",
            "item 1 of `rules` must be a mapping, such as "
            "`match: {gpu: true}, set: {partition: gpu}`",
        ),
        ("{match: {}}", "item 1 of `rules` must have `match`, and `set` or `template`"),
        ("{set: {}, template: x}", "item 1 of `rules` must have `match`"),
        ("{match: {}, set: {}, x: 1}", "'x' is not a known key"),
        ("{match: {}, sets: {}}", "'sets' is not a known key; did you mean 'set'?"),
        ("{match: {images: x}, set: {}}", "'images' is not a known key; did you mean 'image'?"),
        (
            "{match: {image: 5}, set: {}}",
            "`image` must be text or a list, and YAML reads the number 5: put it in quotes",
        ),
        ("{match: {image: []}, set: {}}", "`image` must not be empty"),
        ("{match: {image: ''}, set: {}}", "`image` must not be empty"),
        ("{match: {auid: ['']}, set: {}}", "item 1 of `auid` must not be empty"),
        (
            "{match: {image: [a, '[b-a]']}, set: {}}",
            "the pattern '[b-a]' can't fit: no text fits '[b-a]'",
        ),
        ("{match: {gpu: 1}, set: {}}", "`gpu` must be true or false"),
        ("{match: {type: x}, set: {}}", "`type` must be ds, fs or ts"),
        ("{match: {type: [ds, x]}, set: {}}", "item 2 of `type` must be ds, fs or ts"),
        ("{match: {type: []}, set: {}}", "`type` must be ds, fs or ts"),
        ("{match: {}, set: {image: x}}", "`image` is pman's own: map images under `images`"),
        ("{match: {}, set: {rules: []}}", "`rules` can't be set by a rule"),
        ("{match: {}, set: {schema: {}}}", "`schema` can't be set by a rule"),
        (
            "{match: {}, set: {directives: x}}",
            "`directives` must be a list, such as `- --exclusive`",
        ),
        *(
            (
                f"{{match: {{}}, template: '{name}'}}",
                "`template` must be a template's name, without folder and ending",
            )
            for name in ("", "a/b", "..", "a..b", ".a", "x.sbatch.j2", "a b")
        ),
    ],
)
def test_a_wrong_rule_is_told(rule: str, expected: str) -> None:
    assert f"2: {expected}" in problems(f"rules:\n- {rule}")


def test_all_problems_are_told_in_the_order_of_lines() -> None:
    text = """\
partition: cpu
qos: no
rules:
- match: {gpus: true}
  set:
    account: 007
    partition: 1
    partition: gpu
- template: x
a: 2024-01-01
"""
    assert problems(text) == [
        "2: `qos` must be text, and YAML reads false: put it in quotes",
        "4: 'gpus' is not a known key; did you mean 'gpu'?",
        "6: `007` is read as the number 7 by YAML: put it in quotes",
        "8: 'partition' stands in line 7 already",
        "9: item 2 of `rules` must have `match`",
        "9: item 2 of `rules` must have `match`, and `set` or `template`",
        "10: `2024-01-01` is read as a timestamp by YAML: put it in quotes",
    ]


# --- the site's own schema ---

SCHEMA = """\
schema:
  properties:
    scratch: {type: string, pattern: ^/}
    cores: {type: integer, maximum: 64}
    partition: {enum: [cpu, gpu]}
  required: [scratch]
"""


def test_values_of_the_sites_own_schema() -> None:
    site = Site.parse(f"{SCHEMA}scratch: /s\ncores: 5\npartition: cpu\nqos: x\ngres: y\n")
    assert site.values == {
        "scratch": "/s",
        "cores": 5,
        "partition": "cpu",
        "qos": "x",
        "gres": "y",
    }
    assert site.warnings == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("scratch: s", "7: `scratch` is wrong: 's' does not match '^/'"),
        ("qos: x", "6: it must have `scratch`"),
        ("scratch: /s\ncores: x", "8: `cores` must be a whole number"),
        ("scratch: /s\ncores: 65", "8: `cores` is wrong: 65 is greater than the maximum of 64"),
        ("scratch: /s\npartition: x", "8: `partition` is wrong: 'x' is not one of ['cpu', 'gpu']"),
        (
            "scratch: /s\npartiton: cpu",
            "8: 'partiton' is not a known key; did you mean 'partition'?",
        ),
        ("scratch: /s\nscrath: /t", "8: 'scrath' is not a known key; did you mean 'scratch'?"),
        ("scratch: /s\nzzz: /t", "8: 'zzz' is not a known key"),
        (
            "scratch: /s\nrules:\n- match: {}\n  set:\n    scratsh: x",
            "11: 'scratsh' is not a known key; did you mean 'scratch'?",
        ),
        (
            "scratch: /s\nrules:\n- match: {}\n  set: {scratch: x}",
            "10: `scratch` is wrong: 'x' does not match '^/'",
        ),
        (
            "scratch: /s\nrules:\n- match: {}\n  set: {partition: x}",
            "10: `partition` is wrong: 'x' is not one of ['cpu', 'gpu']",
        ),
    ],
)
def test_what_the_sites_own_schema_refuses_is_told(text: str, expected: str) -> None:
    assert problems(SCHEMA + text) == [expected]


def test_required_values_must_be_at_the_top_and_not_in_every_rule() -> None:
    Site.parse(f"{SCHEMA}scratch: /s\nrules: [{{match: {{}}, set: {{cores: 4}}}}]")
    assert problems(f"{SCHEMA}rules: [{{match: {{}}, set: {{scratch: /s}}}}]") == [
        "6: it must have `scratch`"
    ]


@pytest.mark.parametrize(
    ("schema", "own", "accepted"),
    [
        ("{}", "a: 1", False),
        ("{additionalProperties: true}", "a: 1", True),
        ("{additionalProperties: false}", "a: 1", False),
        ("{additionalProperties: {type: integer}}", "a: 1", True),
        ("{additionalProperties: {type: integer}}", "a: x", False),
        ("{additionalProperties: {type: integer}}", "partition: x", True),
        ("{additionalProperties: false, required: [partition]}", "partition: x", True),
        ("{patternProperties: {^a: {type: integer}}}", "a: 1", True),
        ("{patternProperties: {^a: {type: integer}}}", "a: x", False),
        ("{patternProperties: {^a: {type: integer}}}", "b: 1", False),
        ("{required: [a]}", "a: 1", True),
        ("{properties: {a: {$ref: '#/$defs/n'}}, $defs: {n: {type: integer}}}", "a: 1", True),
        ("{properties: {a: {$ref: '#/$defs/n'}}, $defs: {n: {type: integer}}}", "a: x", False),
        ("{$schema: 'http://x.org/', properties: {a: {$ref: '#'}}}", "a: {partition: x}", True),
    ],
)
def test_which_variables_a_schema_lets_in(schema: str, own: str, accepted: bool) -> None:
    everywhere = f"schema: {schema}\n{own}\nrules:\n- match: {{}}\n  set:\n    {own}\n"
    if accepted:
        Site.parse(everywhere)
    else:
        assert [problem.split(":")[0] for problem in problems(everywhere)] == ["2", "6"]


@pytest.mark.parametrize(
    ("schema", "line", "words"),
    [
        ("{properties: {a: {type: strin}}}", 2, "`schema` is no valid JSON schema: 'strin'"),
        ("{properties: {a: {pattern: '('}}}", 2, "`schema` is no valid JSON schema: '\\('"),
        ("{patternProperties: {'(': {}}}", 2, "`schema` is no valid JSON schema: '\\('"),
        ("{required: a}", 2, "`schema` is no valid JSON schema: 'a' is not of type 'array'"),
        ("\n    properties: 5", 3, "`schema` is no valid JSON schema: 5 is not of type 'object'"),
        ("\n    properties:\n      a: {$ref: '#/$defs/b'}", 4, "'#/\\$defs/b' is nowhere"),
        ("{allOf: [{$ref: '#'}]}", 2, "`schema` refers to nothing, or to itself without end"),
        (
            "{$id: 'http://[', properties: {a: {$ref: 'http://['}}}",
            2,
            "`schema` can't be applied: Invalid IPv6 URL",
        ),
    ],
)
def test_a_broken_schema_is_told(schema: str, line: int, words: str) -> None:
    (problem,) = problems(f"a: b\nschema: {schema}")
    assert_matches(problem, f"^{line}: {words}")


def test_a_value_that_the_schema_cannot_be_applied_to_is_told_at_the_schema() -> None:
    (problem,) = problems(f"a: {10**400}\nschema: {{properties: {{a: {{multipleOf: 0.1}}}}}}")
    assert_matches(problem, "^2: `schema` can't be applied: .*too large")


@pytest.mark.parametrize("keyword", ["$ref", "$dynamicRef"])
def test_nothing_is_ever_fetched(keyword: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        (problem,) = problems(f"a: b\nschema: {{properties: {{a: {{{keyword}: '{url}'}}}}}}")
        assert "fetched" in problem or "refers to nothing" in problem
        with pytest.raises(BlockingIOError):
            server.accept()


# --- warnings ---


def test_a_key_that_is_nearly_pmans_own_is_a_warning() -> None:
    site = Site.parse(
        "partiton: x\nscratch: y\nrules:\n- match: {}\n  set: {accont: z}\n", "s.yaml"
    )
    assert [str(warning) for warning in site.warnings] == [
        "s.yaml, line 1: 'partiton' is a variable of your own; if you mean 'partition', mend it, "
        "else describe it in `schema`: `partiton: x`",
        "s.yaml, line 5: 'accont' is a variable of your own; if you mean 'account', mend it, "
        "else describe it in `schema`: `set: {accont: z}`",
    ]
    assert site.values["partiton"] == "x"


def test_a_schema_says_that_a_key_is_meant() -> None:
    text = "accounts: x\nschema: {properties: {accounts: {type: string}}}"
    assert Site.parse(text).warnings == ()


# --- the file ---


def test_a_file_is_named_in_its_errors() -> None:
    with pytest.raises(SiteError, match=r"^s\.yaml, line 2: `qos` must be .*: `qos: no`$"):
        Site.parse("ä: ü\r\nqos: no\r\n", "s.yaml")
