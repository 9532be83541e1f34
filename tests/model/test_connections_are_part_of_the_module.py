"""Connections, and learned logits, go wherever the module goes."""

import copy
import io

import pytest
import torch
from clts import connect_random, language_model, random_clt, tokens
from torch import nn

from sparseclt.model.clt import SparseCLT


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2")


@pytest.fixture
def clt(model) -> SparseCLT:
    clt = random_clt(model)
    connect_random(clt, 6)
    clt.transcoder(2).logits = nn.Parameter(torch.randn(20, 6, dtype=torch.float64))
    return clt


def same(a: SparseCLT, b: SparseCLT, model) -> bool:
    """Whether two CLTs have the same connections and the same sparsely-connected pass, which masks and V go into."""
    activations = model.capture(tokens())
    passes = [clt(activations, "sparse") for clt in (a, b)]
    connections = [[module.connection_indices for module in clt] for clt in (a, b)]
    return all(
        torch.equal(x.values, y.values) for x, y in zip(passes[0].latents, passes[1].latents, strict=True)
    ) and all((x is None and y is None) or torch.equal(x, y) for x, y in zip(*connections, strict=True))


def through_a_file(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("through", [dict, through_a_file], ids=["state_dict", "torch.save"])
@pytest.mark.parametrize("before", [None, 6, 4], ids=["unconnected", "same C", "another C"])
def test_load_state_dict_takes_connections_of_any_number(clt, model, through, before):
    other = random_clt(model, seed=1)
    if before:
        connect_random(other, before, seed=1)
    missing = other.load_state_dict(through(clt.state_dict()))
    assert not missing.missing_keys and not missing.unexpected_keys
    assert same(clt, other, model)


def test_what_was_loaded_is_a_copy(clt, model):
    other = random_clt(model)
    other.load_state_dict(clt.state_dict())
    other.transcoder(1).connection_indices.fill_(-1)
    assert (clt.transcoder(1).connection_indices >= 0).any()


def test_a_state_without_connections_does_not_silently_leave_the_old_ones(clt, model):
    with pytest.raises(RuntimeError, match="Missing key.*connection_indices"):
        clt.load_state_dict(random_clt(model).state_dict())


def test_ids_out_of_range_are_refused_when_they_are_used(clt, model):
    state = clt.state_dict()
    state["transcoders.1.connection_indices"] = state["transcoders.1.connection_indices"].clone().fill_(20)
    other = random_clt(model)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="connections: expected ids from -1"):
        other(model.capture(tokens()), "sparse")


def test_a_deep_copy_has_its_own(clt, model):
    other = copy.deepcopy(clt)
    assert same(clt, other, model)
    other.transcoder(1).connect(torch.zeros(20, 1, dtype=torch.int64))
    assert clt.transcoder(1).connections.C == 6


def test_they_move_with_the_module(clt):
    moved = clt.to("meta")
    assert moved.transcoder(1).connection_indices.device.type == "meta"


def test_a_change_of_dtype_leaves_ids_alone(clt):
    ids = clt.transcoder(1).connection_indices.clone()
    order = clt.transcoder(1).connections
    clt.float()
    assert torch.equal(clt.transcoder(1).connection_indices, ids)
    assert clt.transcoder(1).connections is order  # neither checked nor sorted again
