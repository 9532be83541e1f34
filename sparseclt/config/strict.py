"""Frozen dataclasses that check every field when they are built, with one readable line per problem.

pydantic does the checking, strictly: no text for a number, no 1.0 for a whole number, no True for 1, no NaN, no
infinity. Its errors become a `ConfigError`, which names the full path of the field, the expectation and the value.
"""

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import field, fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar, cast, dataclass_transform, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

T = TypeVar("T")
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
# The expectation behind each kind of error; the names in braces come with the error.
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "True or False",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "tuple_type": "a tuple",
    "too_long": "{max_length} values",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "dataclass_type": "the fields of a {class_name}",
    "dataclass_exact_type": "a {class_name}",
}


class ConfigError(ValueError):
    """A configuration that makes no sense; one line per problem."""


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def strict(path: str = "") -> Callable[[type[T]], type[T]]:
    """Make a class a frozen dataclass whose fields are checked on construction, `dataclasses.replace` included.

    path: the place of the class in the whole configuration, which errors put before the names of its fields. Checks
        of several fields at once go into `__post_init__`, which raises a ValueError with full paths.
    """

    def decorate(cls: type[T]) -> type[T]:
        checked = dataclass(cls, frozen=True, config=STRICT)
        init = checked.__init__

        @wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                init(self, *args, **kwargs)
            except ValidationError as error:
                raise ConfigError(_lines(error, checked, path)) from None

        checked.__init__ = __init__  # type: ignore[method-assign]
        return cast(type[T], checked)

    return decorate


def from_json_values(kind: type[T], values: Mapping[str, Any]) -> T:
    """An instance of the strict dataclass `kind` from nested dicts, as `json` reads them; lists become tuples.

    Raises ConfigError for unknown fields and for any value that the constructor would refuse.
    """
    try:
        text = json.dumps(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"config: expected plain JSON values: {error}") from None
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise ConfigError(_lines(error, kind, "")) from None


def _lines(error: ValidationError, kind: type, path: str) -> str:
    return "\n".join(_line(details, kind, path) for details in error.errors(include_url=False))


def _line(error: ErrorDetails, kind: type, path: str) -> str:
    """One problem: "clt.active: expected at least 1, got 0"."""
    place = path
    hint: Any = kind
    known: tuple[str, ...] = ()
    for step in error["loc"]:
        if is_dataclass(hint):
            known = tuple(f.name for f in fields(hint))
            name = known[step] if isinstance(step, int) and step < len(known) else _name(str(step))
            place = f"{place}.{name}" if place else name
            hint = get_type_hints(hint).get(name)
        else:
            place += f"[{step}]"
    context = {key: int(x) if isinstance(x, float) and x.is_integer() else x for key, x in error.get("ctx", {}).items()}
    if error["type"] == "value_error" and is_dataclass(hint):
        return str(context["error"])  # from __post_init__, which names the fields itself
    if error["type"].startswith("unexpected_"):
        return f"config: unknown field {place}; expected one of {', '.join(known)}"
    if error["type"] == "missing":
        return f"{place}: expected a value, got none"
    template = EXPECTED.get(error["type"])
    expected = str(context.get("error", error["msg"])) if template is None else template.format(**context)
    alternative = " or None" if type(None) in get_args(hint) else ""
    return f"{place or 'config'}: expected {expected}{alternative}, got {_shown(error['input'])}"


def _name(key: str) -> str:
    """The name of a field as it is; anything else, such as a key of many lines, quoted."""
    return key if key.isidentifier() and len(key) < 99 else reprlib.repr(key)


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # more digits than Python writes out
        return f"a value of type {type(value).__name__} too long to show"


def device_name(name: str) -> str:
    """`name`, if it can be that of a device."""
    kind, colon, index = name.partition(":")
    if not kind.isalpha() or colon and not (index.isascii() and index.isdigit()):
        raise ValueError("'auto', or a device such as 'cpu', 'cuda' or 'cuda:1'")
    return name


def no_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    """`names`, if each occurs once."""
    if len(set(names)) < len(names):
        raise ValueError("each logger at most once")
    return names
