"""What SITE_FILE may hold: pman's own keys by one JSON schema, and the site's own variables by
another one, under the key ``schema``. Neither is ever fetched from anywhere."""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import best_match
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012, Schema

from pman import yaml_lines
from pman.site import example, many
from pman.yaml_lines import Problem

_TEXT = {"type": "string"}
_PATTERN = {"type": "string", "minLength": 1, "words": "must not be empty"}
_TYPE = {"type": "string", "pattern": r"^(ds|fs|ts)\Z", "words": "must be ds, fs or ts"}


def _one_or_many(item: Mapping[str, Any]) -> dict[str, Any]:
    return {**item, "type": ["string", "array"], "items": item, "minItems": 1}


_IMAGE = {"not": {}, "words": "is pman's own: map images under `images`"}
_IN_NO_RULE = {"not": {}, "words": "can't be set by a rule"}

# Beside JSON Schema's own keywords, `words` says what a wrong value must be.
_VALUES: Mapping[str, Any] = {
    **dict.fromkeys(
        "partition account qos constraint reservation gres setup apptainer path".split(), _TEXT
    ),
    "directives": {"type": "array", "items": _TEXT, "examples": ["- --exclusive"]},
    "images": {
        "type": "object",
        "additionalProperties": _TEXT,
        "examples": ["docker.io/fnndsc/*: /containers/plugin.sif"],
    },
    "image": _IMAGE,
}
_RULE: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "match": {
            "type": "object",
            "properties": {
                "image": _one_or_many(_PATTERN),
                "gpu": {"type": "boolean"},
                "type": _one_or_many(_TYPE),
                "auid": _one_or_many(_PATTERN),
            },
            "additionalProperties": False,
        },
        "set": {
            "type": "object",
            "properties": {**_VALUES, "rules": _IN_NO_RULE, "schema": _IN_NO_RULE},
        },
        "template": {
            "type": "string",
            "pattern": r"^(?!.*(\.\.|\.j2\Z))[\w-][\w.-]*\Z",
            "words": "must be a template's name, without folder and ending",
        },
    },
    "required": ["match"],
    "minProperties": 2,
    "additionalProperties": False,
    "examples": ["match: {gpu: true}, set: {partition: gpu}"],
    "words": "must have `match`, and `set` or `template`",
}
SITE_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        **_VALUES,
        "rules": {
            "type": "array",
            "items": _RULE,
            "examples": ["- {match: {gpu: true}, set: {partition: gpu}}"],
        },
        "schema": {"type": "object", "examples": ["properties: {scratch: {type: string}}"]},
    },
    "examples": ["partition: cpu"],
}
"""What pman itself knows of SITE_FILE (JSON Schema, draft 2020-12)."""

_KNOWN = [name for name, of in SITE_SCHEMA["properties"].items() if of != _IMAGE]


# --- what is wrong ---

_OWN = Draft202012Validator(SITE_SCHEMA, registry=Registry())
_OF_SCHEMAS = Draft202012Validator(
    Draft202012Validator.META_SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER
)

Lines = Mapping[yaml_lines.Path, int]


def problems(content: Any, lines: Lines) -> Iterator[Problem]:
    for error in _OWN.iter_errors(content):
        yield from _worded(error, lines)
    if not isinstance(content, dict):
        return
    yield from _hopeless_patterns(content, lines)
    schema = content.get("schema")
    if isinstance(schema, dict):
        try:
            broken = list(_problems_of_schema(schema, lines))
            yield from broken or _problems_by_schema(schema, content, lines)
        except (Unresolvable, RecursionError):
            reason = "`schema` refers to nothing, or to itself without end"
            yield Problem(lines["schema",], reason)
        except Exception as error:  # whatever a schema of somebody's own makes the library meet
            words = str(error)[:200] or type(error).__name__
            yield Problem(lines["schema",], f"`schema` can't be applied: {words}")


def _hopeless_patterns(content: Mapping[str, Any], lines: Lines) -> Iterator[Problem]:
    """Patterns that no text fits."""
    for path, line in lines.items():
        match path:
            case ("images", str(pattern)) | ("rules", int(), "set", "images", str(pattern)):
                pass
            case ("rules", int(), "match", "image" | "auid", *_):
                pattern = _at(content, path)
            case _:
                continue
        try:
            if isinstance(pattern, str):
                example(pattern)
        except ValueError as error:
            yield Problem(line, f"the pattern {pattern!r} can't fit: {error}")


def _problems_of_schema(schema: Mapping[str, Any], lines: Lines) -> Iterator[Problem]:
    for error in _OF_SCHEMAS.iter_errors(schema):
        cause = best_match([error]) or error
        yield Problem(
            _line(("schema", *error.absolute_path), lines),
            f"`schema` is no valid JSON schema: {cause.message[:200]}",
        )
    resolver = Registry[Schema]().resolver_with_root(DRAFT202012.create_resource(schema))
    for path, line in lines.items():
        reference = _at(schema, path[1:]) if path[-1] == "$ref" and path[0] == "schema" else None
        if isinstance(reference, str):
            try:
                resolver.lookup(reference)
            except Unresolvable:
                yield Problem(
                    line,
                    f"{reference!r} is nowhere in `schema`, and nothing is fetched: "
                    "write '#/$defs/NAME'",
                )


def _problems_by_schema(
    schema: Mapping[str, Any], content: Mapping[str, Any], lines: Lines
) -> Iterator[Problem]:
    """What the site's own schema says of the values, and of those that rules set."""
    known = dict.fromkeys([*_KNOWN, *schema.get("required", [])], True)
    keys = {
        "properties": {**known, **schema.get("properties", {}), "image": _IMAGE},
        "patternProperties": schema.get("patternProperties", {}),
        "additionalProperties": schema.get("additionalProperties", False),
    }
    whole = Draft202012Validator({**schema, **keys}, registry=Registry())
    values = {key: value for key, value in content.items() if key not in ("rules", "schema")}
    for error in whole.iter_errors(values):
        yield from _worded(error, lines)
    of_rule = whole.evolve(schema=keys)
    for path, set_values in _sets(content):
        for error in of_rule.iter_errors(set_values):
            yield from _worded(error, lines, path)


def near_misses(content: Mapping[str, Any], lines: Lines) -> Iterator[Problem]:
    """Keys that are nearly pman's own, where no schema says that they are meant."""
    if "schema" in content:
        return
    for path, values in [((), content), *_sets(content)]:
        for key in values.keys() - SITE_SCHEMA["properties"].keys():
            for name in difflib.get_close_matches(key, _KNOWN, 1, 0.8):
                yield Problem(
                    lines[*path, key],
                    f"{key!r} is a variable of your own; if you mean {name!r}, mend it, "
                    "else describe it in `schema`",
                )


def _sets(content: Mapping[str, Any]) -> Iterator[tuple[yaml_lines.Path, Mapping[str, Any]]]:
    """What each rule sets, as far as it is a mapping."""
    rules = content.get("rules")
    for number, rule in enumerate(rules if isinstance(rules, list) else []):
        values = rule.get("set") if isinstance(rule, dict) else None
        if isinstance(values, dict):
            yield ("rules", number, "set"), values


# --- in words ---

_TYPES = {
    "string": "text",
    "array": "a list",
    "object": "a mapping",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "null": "null",
}


def _worded(
    error: ValidationError, lines: Lines, prefix: yaml_lines.Path = ()
) -> Iterator[Problem]:
    path = (*prefix, *error.absolute_path)
    line = _line(path, lines)
    schema = error.schema if isinstance(error.schema, dict) else {}
    instance: Any = error.instance
    wanted: Any = error.validator_value
    if error.validator == "additionalProperties":
        for key in instance:
            if key not in schema.get("properties", {}) and not any(
                re.search(pattern, key) for pattern in schema.get("patternProperties", {})
            ):
                yield Problem(lines[*path, key], f"{key!r} is not a known key{_near(key, schema)}")
    elif error.validator == "required":
        here = line or _line(("schema", "required"), lines)
        yield from (
            Problem(here, f"{_name(path)} must have `{key}`")
            for key in wanted
            if key not in instance
        )
    elif error.validator == "type":
        expected = " or ".join(_TYPES[name] for name in many(wanted))
        yield Problem(
            line, f"{_name(path)} must be {expected}{_remedy(instance, expected, schema)}"
        )
    elif "words" in schema:
        yield Problem(line, f"{_name(path)} {schema['words']}")
    else:
        yield Problem(line, f"{_name(path)} is wrong: {error.message[:200]}")


def _near(key: str, schema: Mapping[str, Any]) -> str:
    names = [name for name, of in schema.get("properties", {}).items() if of != _IMAGE]
    return "".join(f"; did you mean {name!r}?" for name in difflib.get_close_matches(key, names, 1))


def _remedy(value: object, expected: str, schema: Mapping[str, Any]) -> str:
    if "examples" in schema:
        return f", such as `{schema['examples'][0]}`"
    if value is None:
        return "; it is empty"
    if "text" in expected and isinstance(value, bool | int | float):
        read = str(value).lower() if isinstance(value, bool) else f"the number {value}"
        return f", and YAML reads {read}: put it in quotes"
    return ""


def _name(path: yaml_lines.Path) -> str:
    """`key`, or an item of it."""
    match path:
        case (*_, str(key)):
            return f"`{key}`"
        case (*_, str(key), int(number)):
            return f"item {number + 1} of `{key}`"
        case (*_, int(number)):
            return f"item {number + 1}"
        case _:
            return "it"


def _line(path: yaml_lines.Path, lines: Lines) -> int:
    """The line of what stands there, or of what holds it."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 0)


def _at(content: Any, path: yaml_lines.Path) -> Any:
    """What stands there; None: a key that merges laid over has left only its line."""
    for key in path:
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            return None
    return content
