"""pfcon's JSON: what is a job, and what is named as wrong."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pman.errors import RequestError, TooLarge
from pman.jobs import JobSpec
from pman.request import MAX_BODY, MAX_ITEMS, MAX_STRING, JobRequest, parse
from pman.settings import Settings
from tests.conftest import job_body

FIELDS = tuple(JobRequest.model_fields)
REQUIRED = tuple(name for name in FIELDS if name not in {"args_path_flags", "env"})


def request(**changes: Any) -> JobRequest:
    return parse(json.dumps(job_body(**changes)).encode())


def wrong_fields(**changes: Any) -> dict[str, str]:
    with pytest.raises(RequestError) as caught:
        request(**changes)
    return caught.value.fields


@pytest.mark.parametrize(
    ("changes", "argv"),
    [
        ({"entrypoint": ["a", "b"]}, "a b /share/incoming /share/outgoing"),
        ({"type": "fs"}, "true /share/outgoing"),
        ({"type": "ts"}, "true /share/outgoing"),
        ({"args": ["--x", "1"]}, "true --x 1 /share/incoming /share/outgoing"),
        (
            {"args": ["--d", "a", "b"], "args_path_flags": ["--d"], "type": "ts"},
            "true --d /share/incoming b /share/outgoing",
        ),
        (  # the one argument after a flag is its value, even where it is a flag itself
            {"args": ["--d", "--d", "--d", "x"], "args_path_flags": ["--d"], "type": "ts"},
            "true --d /share/incoming --d /share/incoming /share/outgoing",
        ),
        ({"args": ["--d"], "args_path_flags": ["--d"], "type": "ts"}, "true --d /share/outgoing"),
        ({"args": ["x"], "args_path_flags": None, "type": "ts"}, "true x /share/outgoing"),
    ],
)
def test_the_command_that_runs(changes: dict[str, Any], argv: str) -> None:
    assert request(**changes).argv == tuple(argv.split())


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(field: str) -> None:
    assert wrong_fields(**{field: ...}) == {field: "is required"}


@pytest.mark.parametrize("field", ["args_path_flags", "env"])
@pytest.mark.parametrize("value", [..., None, []])
def test_an_optional_field_may_be_left_out(field: str, value: object) -> None:
    assert getattr(request(**{field: value}), field) == []


@pytest.mark.parametrize("field", ["number_of_workers", "cpu_limit", "memory_limit", "gpu_limit"])
@pytest.mark.parametrize(
    ("value", "number"), [(3, 3), ("3", 3), (" 3\n", 3), ("+3", 3), ("03", 3), (3.0, 3)]
)
def test_numbers_may_be_strings_of_digits(field: str, value: object, number: int) -> None:
    assert getattr(request(**{field: value}), field) == number


@pytest.mark.parametrize("field", ["number_of_workers", "cpu_limit", "memory_limit", "gpu_limit"])
@pytest.mark.parametrize(
    "value",
    [
        *("1000m", "200Mi", "", "1.5", "1e3", "1_000", "٣", "0x10", "9" * 5000, "-1"),
        *(1.5, float("nan"), float("inf"), True, None, [], {}, -1, 2**31, 10**400),
    ],
)
def test_what_is_no_whole_number_is_named(field: str, value: object) -> None:
    assert [*wrong_fields(**{field: value})] == [field]


def test_a_number_of_workers_must_be_at_least_one() -> None:
    assert wrong_fields(number_of_workers=0) == {
        "number_of_workers": "0 is too small: 1 is the least"
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"jid": ""}, "can't name a job"),
        ({"jid": "/"}, "can't name a job"),
        ({"jid": "a/b"}, "can't name a job"),
        ({"jid": ".."}, "can't name a job"),
        ({"jid": "-rf"}, "can't name a job"),
        ({"jid": "a b"}, "can't name a job"),
        ({"jid": "a\n"}, "can't name a job"),
        ({"jid": "a" * 201}, "can't name a job"),
        ({"jid": "é"}, "can't name a job"),
        ({"jid": 5}, "must be a string, not 5"),
        ({"jid": None}, "must be a string, not null"),
        ({"image": ""}, "no image name"),
        ({"image": "--privileged"}, "no image name"),
        ({"image": "a b"}, "no image name"),
        ({"image": "a$(id)"}, "no image name"),
        ({"image": "a\n"}, "no image name"),
        ({"type": "xs"}, "'xs' is not one of 'ds', 'fs' or 'ts'"),
        ({"type": ["ds"]}, "a list is not one of"),
        ({"args": "x"}, "must be a list, not 'x'"),
        ({"args": {"a": 1}}, "must be a list, not an object"),
        ({"args": None}, "must be a list, not null"),
        ({"args": ["ok", 1]}, "item 1: must be a string, not 1"),
        ({"args": ["{got}{0}", None]}, "item 1: must be a string, not null"),
        ({"args": ["a\0"]}, "NUL byte"),
        ({"args": ["\ud800"]}, "half a surrogate pair"),
        ({"args": ["x"] * (MAX_ITEMS + 1)}, f"{MAX_ITEMS} are the most"),
        ({"args": ["x" * (MAX_STRING + 1)]}, f"{MAX_STRING} are the most"),
        ({"args": ["é" * (MAX_STRING // 2 + 1)]}, f"{MAX_STRING} are the most"),
        ({"auid": "a\0"}, "NUL byte"),
        ({"env": ["1A=x"]}, "no name of an environment variable"),
        ({"env": ["=x"]}, "no name of an environment variable"),
        ({"env": ["A B=x"]}, "no name of an environment variable"),
        ({"env": ["A;id=x"]}, "no name of an environment variable"),
        ({"env": ["A\n=x"]}, "no name of an environment variable"),
        ({"env": ["A=\0"]}, "NUL byte"),
        ({"input_dir": "/etc"}, "leaves the store base"),
        ({"input_dir": "a/../../b"}, "leaves the store base"),
        ({"input_dir": ".."}, "leaves the store base"),
        ({"input_dir": "a\nb"}, "control character"),
        ({"input_dir": "a\x7f"}, "control character"),
        ({"input_dir": ""}, "is empty"),
        ({"input_dir": "./."}, "is empty"),
        ({"output_dir": "../b"}, "leaves the store base"),
    ],
)
def test_a_wrong_field_is_named_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    fields = wrong_fields(**changes)
    assert [*fields] == [*changes]
    assert reason in next(iter(fields.values()))


def test_all_wrong_fields_are_named_at_once() -> None:
    assert {*wrong_fields(jid="-", cpu_limit="1000m", type="x", env="y", entrypoint=[])} == {
        *("jid", "cpu_limit", "type", "env", "entrypoint")
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"entrypoint": []}, '"entrypoint" cannot be empty'),
        ({"env": ["x"]}, '"env" must be a list of "key=value" strings'),
        ({"env": "A=b"}, '"env" must be a list of "key=value" strings'),
        ({"env": [1]}, '"env" must be a list of "key=value" strings'),
        ({"env": {"A": "b"}}, '"env" must be a list of "key=value" strings'),
    ],
)
def test_two_errors_are_a_sentence_when_they_are_the_only_one(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RequestError) as caught:
        request(**changes)
    assert (str(caught.value), caught.value.fields) == (sentence, {})
    assert wrong_fields(jid="-", **changes)[next(iter(changes))] == sentence


def test_a_reason_stays_short_however_long_the_value() -> None:
    assert len(wrong_fields(jid="a" * 100_000)["jid"]) < 300


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nope", b"\xff", b'{"jid": "\xff"}', b"[" * 100_000, b'{"jid": 1' + b"0" * 5000],
)
def test_malformed_json_is_said_to_be_that(body: bytes) -> None:
    with pytest.raises(RequestError, match="no valid JSON") as caught:
        parse(body)
    assert not caught.value.fields


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"1", b"null", b"NaN"])
def test_a_body_that_is_no_object_is_said_to_be_that(body: bytes) -> None:
    with pytest.raises(RequestError, match="must be a JSON object"):
        parse(body)


def test_a_deeply_nested_value_is_an_error_like_any_other() -> None:
    """Some depths can be read just so, but not be written out again."""
    for depth in range(800, 1000):
        with pytest.raises(RequestError):
            parse(b'{"args": ' + b"[" * depth + b"]" * depth + b"}")


def test_a_body_over_the_bound_is_too_large() -> None:
    with pytest.raises(TooLarge):
        parse(b" " * (MAX_BODY + 1))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_any_json_is_a_job_or_named_fields(changes: dict[str, Any]) -> None:
    body = json.dumps(job_body(**changes)).encode()
    try:
        parsed = parse(body)
    except RequestError as error:
        assert set(error.fields) <= {*changes}
        assert json.dumps(error.fields)
    else:
        assert JobRequest.model_validate_json(parsed.content) == parsed


# --- the spec ---


def spec(settings: Settings, **changes: Any) -> JobSpec:
    return request(**changes).spec(settings)


def test_the_paths_of_a_spec_are_below_the_store_base(settings: Settings) -> None:
    made = spec(settings, input_dir="a//b/", output_dir="./c", jid="/j")
    assert made.jid == "j"
    assert made.input_dir == f"{settings.storebase}/a/b"
    assert made.output_dir == f"{settings.storebase}/c"
    assert made.folder == f"{settings.storebase}/.pman/{made.name}"


def test_each_spec_has_a_name_of_its_own_that_starts_with_the_jid(settings: Settings) -> None:
    asked = request()
    names = {asked.spec(settings).name for _ in range(50)}
    assert len(names) == 50
    assert all(name.startswith("chris-jid-1.") for name in names)


@pytest.mark.parametrize("field", ["input_dir", "output_dir"])
@pytest.mark.parametrize("folder", ["jobs/mine", "jobs/mine/", "jobs", "jobs/mine/x.1/lock"])
def test_no_job_reads_or_writes_the_folders_of_the_others(
    values: dict[str, Any], field: str, folder: str
) -> None:
    settings = Settings(**values | {"jobs_dir": values["storebase"] / "jobs" / "mine"})
    with pytest.raises(RequestError) as caught:
        spec(settings, **{field: folder})
    assert [*caught.value.fields] == [field]
    assert spec(settings, **{field: "jobs/mine2"})


@pytest.mark.parametrize(
    ("setting", "asked", "expected"),
    [
        ({}, {}, {"cpu_limit": 1000, "memory_limit": 200, "cpus": 1, "uid": None, "gid": None}),
        ({}, {"cpu_limit": 1001}, {"cpus": 2}),
        (
            {},
            {"cpu_limit": 0, "memory_limit": 0},
            {"cpu_limit": None, "memory_limit": None, "cpus": None},
        ),
        (
            {"ignore_limits": True},
            {"gpu_limit": 2},
            {"cpu_limit": None, "memory_limit": None, "cpus": None, "gpu_limit": 2},
        ),
        ({"enable_home_workaround": True}, {"env": ["HOME=/x"]}, {"env": {"HOME": "/tmp"}}),
        ({}, {"env": ["A=1", "B=x=y", "A=2", "C="]}, {"env": {"A": "2", "B": "x=y", "C": ""}}),
        ({"container_user": "7:8"}, {}, {"uid": 7, "gid": 8}),
        ({"container_user": ":8"}, {}, {"uid": None, "gid": 8}),
        ({"timelimit_minutes": 5, "shm_size": 6}, {}, {"time_limit": 5, "shm_size": 6}),
        ({"job_labels": "a=b,c=d"}, {}, {"labels": {"a": "b", "c": "d"}}),
    ],
)
def test_what_the_settings_make_of_a_job(
    values: dict[str, Any], setting: dict[str, Any], asked: dict[str, Any], expected: dict[str, Any]
) -> None:
    made = spec(Settings(**values | setting), **asked)
    assert {name: getattr(made, name) for name in expected} == expected


def test_a_range_of_users_gives_each_job_one_of_them(values: dict[str, Any]) -> None:
    settings = Settings(**values | {"container_user": "10-12:20-21"})
    drawn = [spec(settings) for _ in range(100)]
    assert {job.uid for job in drawn} == {10, 11, 12}
    assert {job.gid for job in drawn} == {20, 21}


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_a_spec_comes_back_from_its_json_as_it_was(text: str) -> None:
    made = JobSpec(
        *("j", "j.1", text, "ds", "i", (text, ""), {"A": text}, {text: text}, text, text, text)
    )
    assert JobSpec.from_json(made.to_json()) == made
