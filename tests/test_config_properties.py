"""Configurations from random values: a configuration that survives every round trip, or a ConfigError."""

import copy
import json
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import annotated_types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from sparseclt.config import TrainConfig, from_dict, to_dict
from sparseclt.config.strict import ConfigError
from sparseclt.storage.json_files import CheckpointError
from sparseclt.storage.run_config import read_config

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def values(hint: Any) -> st.SearchStrategy:
    """What the field of a configuration may hold, as JSON has it."""
    if is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        return st.fixed_dictionaries({}, optional={field.name: values(hints[field.name]) for field in fields(hint)})
    arguments = get_args(hint)
    if hasattr(hint, "__metadata__"):
        return constrained(hint.__origin__, hint.__metadata__)
    if get_origin(hint) is tuple:
        if arguments[-1] is ...:
            return st.just([]) | values(arguments[0]).map(lambda value: [value])
        return st.tuples(*map(values, arguments)).map(list)
    if type(None) in arguments:
        return st.one_of(*map(values, arguments))
    if arguments:
        return st.sampled_from(arguments)  # a Literal
    return {int: st.integers(0, 9), float: st.floats(0, 1), bool: st.booleans(), str: st.text(), type(None): st.none()}[
        hint
    ]


def constrained(hint: Any, metadata: tuple) -> st.SearchStrategy:
    limits = [limit for field in metadata if isinstance(field, FieldInfo) for limit in field.metadata]
    if any(isinstance(part, AfterValidator) for part in metadata):
        return st.sampled_from(["auto", "cpu", "cuda:1"]) if hint is str else values(hint)
    least = max((limit.ge for limit in limits if isinstance(limit, annotated_types.Ge)), default=None)
    most = min((limit.le for limit in limits if isinstance(limit, annotated_types.Le)), default=None)
    if hint is int:
        return st.integers(least, most) | st.integers(least, 50)
    if hint is float:
        above = next((limit.gt for limit in limits if isinstance(limit, annotated_types.Gt)), None)
        below = next((limit.lt for limit in limits if isinstance(limit, annotated_types.Lt)), None)
        return st.floats(
            least if above is None else above, most if below is None else below, allow_nan=False, allow_infinity=False,
            exclude_min=above is not None, exclude_max=below is not None,
        )  # fmt: skip
    return st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def survives(config: TrainConfig) -> None:
    text = json.dumps(to_dict(config), allow_nan=False)
    assert from_dict(to_dict(config)) == from_dict(json.loads(text)) == config
    assert json.dumps(to_dict(from_dict(json.loads(text)))) == text


def fits(given: Any, kept: Any) -> bool:
    """Whether every value that was given is in the configuration as it was, to the last bit."""
    if isinstance(given, dict):
        return all(fits(value, kept[name]) for name, value in given.items())
    return json.dumps(given) == json.dumps(kept)


@QUICK
@given(values(TrainConfig))
def test_sensible_values_are_kept_through_every_round_trip(values):
    try:
        config = from_dict(values)
    except ConfigError as error:  # each on its own makes sense: only two of them together may not
        assert all(": expected" in line or line.startswith("activations") for line in str(error).splitlines())
        return
    assert fits(json.loads(json.dumps(values)), json.loads(json.dumps(to_dict(config))))
    survives(config)


def test_most_sensible_values_are_accepted():
    """The strategy is worth something: it is no ConfigError that the test above looks at."""
    accepted = []

    @QUICK
    @given(values(TrainConfig))
    def count(values):
        try:
            accepted.append(from_dict(values))
        except ConfigError:
            pass

    count()
    assert len(accepted) > 15 and len(set(map(repr, accepted))) > 10


def places(value: Any, path: tuple = ()) -> list[tuple]:
    inner = (
        [place for name, part in value.items() for place in places(part, (*path, name))]
        if value.__class__ is dict
        else []
    )
    return [*([path] if path else []), *inner]


PLACES = places(to_dict(TrainConfig()))


@QUICK
@given(
    st.lists(
        st.tuples(st.sampled_from(PLACES), st.sampled_from(["set", "drop", "add"]), st.text(max_size=9), JSON),
        max_size=3,
    )
)
def test_any_values_are_a_configuration_or_a_config_error(changes):
    values = copy.deepcopy(to_dict(TrainConfig()))
    for place, how, key, value in changes:
        parent = values
        for name in place[:-1]:
            parent = parent.get(name) if isinstance(parent, dict) else None
        if isinstance(parent, dict):
            if how == "drop":
                parent.pop(place[-1], None)
            else:
                parent[place[-1] if how == "set" else key] = value
    try:
        config = from_dict(values)
    except ConfigError as error:
        assert all(": expected " in line or "unknown field" in line for line in str(error).split("\n"))
        return
    survives(config)


@QUICK
@given(JSON)
def test_any_json_at_all_is_a_configuration_or_a_config_error(value):
    try:
        survives(from_dict(value))
    except ConfigError:
        pass


WRITTEN = json.dumps(to_dict(TrainConfig())).encode()


@QUICK
@given(st.integers(0, len(WRITTEN)), st.integers(0, len(WRITTEN)), st.binary(max_size=4))
def test_any_bytes_of_a_config_file_are_a_configuration_or_an_error_that_names_it(
    tmp_path_factory, begin, end, inserted
):
    run = tmp_path_factory.getbasetemp()
    (run / "config.json").write_bytes(WRITTEN[:begin] + inserted + WRITTEN[max(begin, end) :])
    try:
        survives(read_config(run))
    except (CheckpointError, ConfigError) as error:
        assert all(line.startswith(str(run / "config.json")) for line in str(error).split("\n"))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "x" * 9999])
def test_a_hostile_name_of_a_field_stays_within_a_line(name):
    with pytest.raises(ConfigError) as error:
        from_dict({name: 1})
    assert str(error.value).isprintable() and len(str(error.value)) < 999
