"""The configuration refuses every bad value, from Python and from JSON; errors name the field."""

import copy
import json
import math
import pickle
from contextlib import suppress
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

import pytest

import sparseclt.ops  # noqa: F401  registers the backends
from sparseclt.cli import main
from sparseclt.config import (
    ActivationConfig,
    CLTConfig,
    ComputeConfig,
    ConnectionConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from sparseclt.ops.backend import backends
from sparseclt.training import loggers

SECTIONS = {f.name: f.default_factory for f in fields(TrainConfig) if is_dataclass(f.default_factory)}
PATHS = [
    path
    for f in fields(TrainConfig)
    for path in ([f"{f.name}.{g.name}" for g in fields(SECTIONS[f.name])] if f.name in SECTIONS else [f.name])
]  # fmt: skip


def built(path: str, value: Any) -> TrainConfig:
    """The default configuration with one field changed, built in Python."""
    section, _, name = path.rpartition(".")
    if section:
        return TrainConfig(**{section: SECTIONS[section](**{name: value})})
    return TrainConfig(**{name: value})


def read(path: str, value: Any) -> TrainConfig:
    """The same from a file."""
    section, _, name = path.rpartition(".")
    values = {section: {name: value}} if section else {name: value}
    return from_dict(json.loads(json.dumps(values)))


def value_of(config: TrainConfig, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


WAYS = {"from Python": built, "from JSON": read}
BAD = {
    "out": [""],
    "steps": [0, -1, 850.0, 2**63],
    "batch_rows": [0, -4],
    "device": ["", "cu/da", "cuda:", "cuda:x", ":1", "cuda:-1"],
    "seed": [-1, 2**63, 0.5],
    "model.path": [""],
    "model.layers": [0, -1],
    "model.dtype": ["float16", "int8", "fp64"],
    "data.source": [""],
    "data.text_field": [""],
    "data.row_tokens": [1, 0, -128],
    "data.bos": ["", "rows", "Row"],
    "data.max_tokens": [0, -1, 127],
    "data.held_out_tokens": [0, -1],
    "data.held_out_share": [0.0, 1.0, -0.1, 1.1],
    "data.cache": [""],
    "clt.latents": [0, -512, 31],
    "clt.active": [0, -1, 1025],
    "clt.active_ratio": [0.0, -2.0],
    "clt.activation": ["relu", "TopK", ""],
    "clt.bandwidth": [0.0, -0.1],
    "clt.targets": ["later", ""],
    "clt.attention": ["latent", "Frozen", ""],
    "clt.dtype": ["fp16", "float32", "bfloat16"],
    "connections.policy": ["tpo", "Top", "dense_learned", ""],
    "connections.per_latent": [-1],
    "connections.budget": ["model", ""],
    "connections.importance": ["max", ""],
    "connections.recent_tokens": [0, -1],
    "connections.start_per_latent": [0, -1, 7],
    "connections.anneal_share": [-0.1, 1.1],
    "connections.refresh_steps": [0, -50],
    "connections.freeze_after_share": [-0.1, 1.1],
    "connections.exchange_share": [-0.1, 1.1],
    "connections.open_per_latent": [0.0, -1.0],
    "connections.candidates_after_steps": [-1],
    "connections.pressure_weight": [-1e-3],
    "loss.sparse_start_share": [-0.1, 1.1],
    "loss.sparse_ramp_share": [-0.1, 1.1],
    "loss.latent_agreement_weight": [-0.2],
    "loss.l0_weight": [-0.1],
    "loss.interaction_weight": [-1.0],
    "loss.cross_entropy_weight": [-1.0],
    "optimizer.learning_rate": [-2e-3],
    "optimizer.warmup_share": [-0.1, 1.1],
    "optimizer.decay_share": [-0.1, 1.1],
    "optimizer.betas": [(0.9, 1.0), (1.0, 0.9), (-0.1, 0.9), (0.9,), (0.9, 0.99, 0.999), (0.9, math.nan)],
    "optimizer.revival_rate": [-1.0],
    "optimizer.dead_after_tokens": [0, -1],
    "optimizer.clip_norm": [-1.0, 0.0],
    "optimizer.state": ["8-bit", "8 bit", "int8"],
    "optimizer.rows": ["some", ""],
    "activations.shuffle_bytes": [-1],
    "activations.cache": [""],
    "activations.cache_dtype": ["fp8", "fp32"],
    "compute.micro_batch_rows": [0, -1],
    "compute.backend": ["cobol", "", "Torch"],
    "compute.precision": ["fp16", "", "BF16"],
    "logging.every_steps": [0, -10],
    "logging.loggers": [("carrierpigeon",), ("wandb", "wandb"), ("wandb", "")],
    "logging.progress": ["yes", 0, 1],
    "checkpoints.every_steps": [0, -500],
    "checkpoints.every_minutes": [0.0, -1.0],
    "checkpoints.keep": [0, -2],
    "parallel.latents": [0, -1],
    "parallel.data": [0, -1],
    "parallel.model_devices": [("",)],
    "parallel.timeout_seconds": [0, -1],
}


@pytest.mark.parametrize("made", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in BAD.items() for value in values])
def test_bad_values_are_refused_by_name(made, path, value):
    with pytest.raises(ValueError) as error:
        made(path, value)
    # clt.latents = 15 is too small for the default of clt.active, which the error then names
    assert str(error.value).startswith((f"{path}: expected ", f"{path}[", "clt.active: expected at most clt.latents"))
    assert ", got " in str(error.value) and "pydantic" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", BAD)
def test_the_command_refuses_bad_values_by_name(path, capsys):
    flag = "--" + path.replace("_", "-")
    for value in BAD[path]:
        arguments = [flag, *map(str, value if isinstance(value, tuple) else [value])]
        if path == "logging.progress":
            arguments = [f"{flag}={value}"]
        with suppress(SystemExit):  # tyro's own errors, in a frame
            assert main(["plan", "--shape.layers", "2", "--shape.d-model", "8", *arguments]) == 2
        printed = capsys.readouterr()
        assert not printed.out
        # A flag without a value does not take "yes", nor one for two values a third.
        assert any(name in printed.err for name in (path, flag, "clt.active: expected at most", "Unrecognized options"))


def test_the_table_of_bad_values_has_every_field():
    assert list(BAD) == PATHS


WRONG = {
    int: [True, "3", 3.5, math.nan, [3], {}],
    float: [True, "0.5", math.nan, math.inf, -math.inf, [0.5], {}],
    str: [3, True, ["torch"], {}, math.nan],
    bool: [0, "True", 1.0, []],
    tuple: [3, "wandb", {}, True],
}


@pytest.mark.parametrize("made", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_type_is_refused_in_every_field(made, path):
    default = value_of(TrainConfig(), path)
    section, _, name = path.rpartition(".")
    hint = get_type_hints(SECTIONS[section] if section else TrainConfig)[name]
    kinds = [kind for kind in WRONG if isinstance(default, kind) and kind is type(default)]
    if default is None:
        kinds = [kind for kind in WRONG if kind in get_args(hint)] or [str]
    for wrong in WRONG[kinds[0]] + ([] if type(None) in get_args(hint) else [None]):
        with pytest.raises(ValueError, match=rf"^{path}(\[\d\])?: expected "):
            made(path, wrong)


@pytest.mark.parametrize("made", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer.betas", (0.0, 0.0)), ("optimizer.clip_norm", None), ("optimizer.learning_rate", 1),
        ("optimizer.learning_rate", 0.0), ("connections.start_per_latent", 32), ("data.max_tokens", 128),
        ("seed", 2**63 - 1), ("compute.micro_batch_rows", 64), ("loss.l0_weight", 0), ("device", "cuda:1"),
        ("connections.freeze_after_share", 0), ("logging.loggers", ("tensorboard", "wandb")),
    ],
)  # fmt: skip
def test_values_at_the_edge_are_taken(made, path, value):
    assert value_of(made(path, value), path) == value


CONTRADICTIONS = {
    "clt.active: expected at most clt.latents = 8, got 9": {"clt": {"latents": 8, "active": 9}},
    "clt.dtype: expected 'fp32' with clt.attention 'latents', got 'bf16'": {
        "clt": {"attention": "latents", "dtype": "bf16"}
    },
    "compute.precision: expected 'fp32' or None with compute.backend 'numba', which has no bf16, got 'bf16'": {
        "compute": {"precision": "bf16", "backend": "numba"}
    },
    "compute.precision: expected 'bf16' or None with clt.dtype 'bf16', in which products read the weights, got": {
        "compute": {"precision": "fp32"}, "clt": {"dtype": "bf16"}
    },
    "compute.precision: expected 'fp32' or None with clt.attention 'latents', whose pre-activations are added up head "
    "after head, got 'bf16'": {"compute": {"precision": "bf16"}, "clt": {"attention": "latents"}},
    "data.max_tokens: expected at least data.row_tokens = 64, got 63": {"data": {"row_tokens": 64, "max_tokens": 63}},
    "connections.start_per_latent: expected at least connections.per_latent = 8 or None, got 4": {
        "connections": {"per_latent": 8, "start_per_latent": 4}
    },
    "connections.budget: expected 'latent' unless connections.policy is 'top' and connections.importance": {
        "connections": {"policy": "random", "budget": "module"}
    },
    "activations.shuffle_bytes, activations.cache: expected 0 and None with clt.attention 'latents'": {
        "clt": {"attention": "latents"}, "activations": {"cache": "x"},
    },
    "activations.shuffle_bytes: expected 0 with loss.cross_entropy_weight > 0": {
        "loss": {"cross_entropy_weight": 0.1}, "activations": {"shuffle_bytes": 9},
    },
    "connections.candidates_after_steps: expected less than steps = 50 with connections.policy 'learned'": {
        "steps": 50, "connections": {"policy": "learned"},
    },
}  # fmt: skip


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_contradictions_are_refused(message):
    values = CONTRADICTIONS[message]
    with pytest.raises(ValueError) as error:
        from_dict(values)
    assert str(error.value).startswith(message)
    with pytest.raises(ValueError) as error:
        TrainConfig(**{k: SECTIONS[k](**v) if isinstance(v, dict) else v for k, v in values.items()})
    assert str(error.value).startswith(message)


def test_every_problem_has_its_line():
    with pytest.raises(ValueError) as error:
        from_dict({"steps": 0, "clt": {"width": 3}, "optimizer": {"state": "8-bit", "betas": [0.9, 1]}, "loss": None})
    assert str(error.value).splitlines() == [
        "steps: expected at least 1, got 0",
        "config: unknown field clt.width; expected one of latents, active, active_ratio, activation, bandwidth, "
        "targets, attention, dtype",
        "loss: expected the fields of a LossConfig, got None",
        "optimizer.betas[1]: expected less than 1, got 1",
        "optimizer.state: expected 'fp32' or '8bit', got '8-bit'",
    ]
    with pytest.raises(ValueError) as error:
        TrainConfig(
            activations=ActivationConfig(shuffle_bytes=9), clt=CLTConfig(attention="latents"),
            loss=LossConfig(cross_entropy_weight=1.0),
        )  # fmt: skip
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("values", [None, [], 3, "steps"])
def test_what_is_no_configuration_is_refused(values):
    with pytest.raises(ValueError, match="config: expected the fields of a TrainConfig, got"):
        from_dict(values)


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match=r"config: unknown field row_length; expected one of out, steps, "):
        from_dict({"row_length": 3})
    with pytest.raises(ValueError, match=r"config: unknown field clt.width; expected one of latents, active, "):
        CLTConfig(width=3)  # type: ignore[call-arg]


def test_groups_must_be_groups():
    with pytest.raises(ValueError, match=r"clt: expected a CLTConfig, got \{'latents': 3\}"):
        TrainConfig(clt={"latents": 3})  # type: ignore[arg-type]


EVERYTHING = TrainConfig(
    out="runs/x", steps=10, seed=3, clt=CLTConfig(latents=64, active=4),
    connections=ConnectionConfig("learned", 8, candidates_after_steps=2),
    loss=LossConfig(l0_weight=0.1), optimizer=OptimizerConfig(betas=(0.8, 0.95), clip_norm=None, learning_rate=1 / 3),
    activations=ActivationConfig(0, "cache", "int8"), compute=ComputeConfig(2, "numba"),
    logging=LoggingConfig(1, ("wandb",), False),
)  # fmt: skip


@pytest.mark.parametrize("config", [TrainConfig(), EVERYTHING], ids=["default", "everything"])
def test_the_configuration_survives_json_copies_and_pickles(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(to_dict(config)) == from_dict(asdict(config)) == config
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert hash(config) == hash(copy.deepcopy(config))


def test_replace_checks_again():
    config = TrainConfig()
    assert replace(config, clt=replace(config.clt, latents=99)).clt.latents == 99
    with pytest.raises(ValueError, match=r"clt.active: expected at most clt.latents = 31, got 32"):
        replace(config.clt, latents=31)
    with pytest.raises(ValueError, match=r"steps: expected at least 1, got 0"):
        replace(config, steps=0)
    with pytest.raises(FrozenInstanceError):
        config.steps = 0  # type: ignore[misc]


def test_names_are_those_that_the_rest_of_the_code_knows():
    def choices(section: str, name: str) -> list[str]:
        found, queue = [], [get_type_hints(SECTIONS[section])[name]]
        while queue:
            hint = queue.pop(0)
            found += [hint] if isinstance(hint, str) else []
            queue += get_args(hint)
        return found

    assert sorted(choices("compute", "backend")) == sorted(backends())
    assert sorted(choices("logging", "loggers")) == sorted(loggers._OPENERS)
