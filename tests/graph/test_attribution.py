"""A graph of a prompt is exact: what leads to a latent adds up to it, and the logits follow from the inputs."""

from dataclasses import replace

import pytest
import torch
from clts import connect_random, random_clt
from graphs import TOKENS, clt_of, graph_of, model_of, run_of
from tiny_models import FAMILIES, further_config, hf_model, tokenizer

from sparseclt.graph.attribution import attribute, top_logits
from sparseclt.graph.run import language_model_run, sparse_model_run
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.replacement import replacement

every_family = pytest.mark.parametrize("family", FAMILIES)
both_kinds = pytest.mark.parametrize("attention", ["frozen", "latents"])
both_modes = pytest.mark.parametrize("mode", ["sparse", "vanilla"])
both_runs = pytest.mark.parametrize("error_nodes", [False, True], ids=["sparse model", "error nodes"])


@both_modes
@both_runs
@both_kinds
@every_family
def test_what_leads_to_a_node_adds_up_to_its_value(family, attention, error_nodes, mode):
    graph = graph_of(family, attention, error_nodes, mode)
    sums = torch.zeros_like(graph.values).index_add_(0, graph.target, graph.weight)
    reached = graph.stage >= 0
    assert graph.by_kind["latent"].sum() > 50 and graph.by_kind["logit"].any()
    torch.testing.assert_close(sums[reached], graph.values[reached], rtol=0, atol=1e-9)


@both_modes
@both_runs
@both_kinds
@every_family
def test_logits_propagated_from_the_inputs_are_those_of_the_run(family, attention, error_nodes, mode):
    graph = graph_of(family, attention, error_nodes, mode)
    hooks = {} if error_nodes else replacement(clt_of(family, attention), mode)
    logits = model_of(family).replaced_logits(TOKENS, **hooks)[0, -1]
    numbers = graph.numbers("logit")
    chosen = torch.tensor([graph.nodes[n].index for n in numbers.tolist()])
    unknown = graph.values.masked_fill(graph.stage >= 0, float("nan"))  # only the inputs are used
    propagated = replace(graph, values=unknown).propagate({})
    torch.testing.assert_close(propagated[numbers], logits[chosen] - logits.mean(), rtol=0, atol=1e-9)


@both_kinds
def test_every_active_latent_is_a_node_and_reads_only_its_connections(attention):
    clt, run, graph = clt_of("gpt2", attention), run_of("gpt2", attention, False), graph_of("gpt2", attention, False)
    active = {
        (site.name, position, latents.indices[position, slot].item())
        for site, latents in zip(clt.sites, run.forward.latents, strict=True)
        for position, slot in (latents.values > 0).nonzero().tolist()
    }
    assert {(n.site.name, n.position, n.index) for n in graph.nodes if n.kind == "latent"} == active
    for source, target in zip(graph.source.tolist(), graph.target.tolist(), strict=True):
        s, t = graph.nodes[source], graph.nodes[target]
        assert s.position <= t.position or s.kind == "bias"
        if s.kind == t.kind == "latent":
            upstream = clt.sites.index(s.site) * clt.architecture.latents + s.index
            assert upstream in clt.transcoder(clt.sites.index(t.site)).connections.indices[t.index].tolist()
            assert s.position == t.position or t.site.kind == "attn"


@both_kinds
@every_family
def test_in_vanilla_mode_the_latents_are_those_of_a_vanilla_pass_and_read_all_upstream_ones(family, attention):
    clt, graph = clt_of(family, attention), graph_of(family, attention, True, "vanilla")
    forward = clt(model_of(family).capture(TOKENS, attention=attention == "latents"), "vanilla")
    for site, latents in zip(clt.sites, forward.latents, strict=True):
        active = {(p, latents.indices[p, slot].item()) for p, slot in (latents.values > 0).nonzero().tolist()}
        assert {(n.position, n.index) for n in graph.nodes if n.kind == "latent" and n.site == site} == active
    latent = graph.by_kind["latent"]
    pairs = set(zip(graph.source.tolist(), graph.target.tolist(), strict=True))
    last = [n for n in latent.nonzero()[:, 0].tolist() if graph.nodes[n].site == clt.sites[-1]]
    earlier = [n for n in latent.nonzero()[:, 0].tolist() if graph.nodes[n].site.layer < clt.sites[-1].layer]
    same = [(s, t) for s in earlier for t in last if graph.nodes[s].position == graph.nodes[t].position]
    assert len(same) > 50 and set(same) <= pairs


@every_family
def test_frozen_attention_is_one_node_for_each_layer_and_position(family):
    places = [(n.site.name, n.position) for n in graph_of(family, "frozen", False).nodes if n.kind == "attention"]
    assert sorted(places) == sorted((f"attn_{layer}", p) for layer in range(3) for p in range(TOKENS.shape[1]))


@both_kinds
def test_position_0_has_no_latents_and_what_the_model_writes_there_is_given(attention):
    graph, clt = graph_of("gpt2", attention, False), clt_of("gpt2", attention)
    first = [node for node in graph.nodes if node.position == 0 and node.kind in ("latent", "error")]
    assert {node.kind for node in first} == {"error"} and {node.site for node in first} == set(clt.sites)
    errors = [node for node in graph.nodes if node.kind == "error"]
    assert errors == first  # elsewhere the sparse model leaves nothing unexplained


def test_attention_latents_have_edges_between_tokens():
    graph = graph_of("gpt2", "latents", False)
    pairs = [(graph.nodes[s], graph.nodes[t]) for s, t in zip(graph.source, graph.target, strict=True)]
    between = [t for s, t in pairs if s.kind == "latent" and s.position < t.position]
    assert between and all(t.site.kind == "attn" for t in between)


@pytest.mark.parametrize("attention", ["frozen", "latents"])
@pytest.mark.parametrize("family", ["GPTJ", "Phi", "Olmo2"])  # one norm for both; norms behind attention and MLP
def test_other_families_add_up_too(family, attention):
    model = LanguageModel.from_hf(hf_model(further_config(family)), tokenizer(), name=family)
    clt = random_clt(model, attention)
    connect_random(clt, 6)
    graph = attribute(sparse_model_run(clt, model, TOKENS))
    sums = torch.zeros_like(graph.values).index_add_(0, graph.target, graph.weight)
    torch.testing.assert_close(sums[graph.stage >= 0], graph.values[graph.stage >= 0], rtol=0, atol=1e-9)


def test_layers_that_the_clt_does_not_cover_are_one_node():
    model = LanguageModel.from_hf(hf_model("gpt2"), tokenizer(), layers=2, name="gpt2")
    clt = random_clt(model)
    connect_random(clt, 6)
    graph = attribute(sparse_model_run(clt, model, TOKENS))
    assert [node.position for node in graph.nodes if node.kind == "layers"] == [TOKENS.shape[1] - 1]
    sums = torch.zeros_like(graph.values).index_add_(0, graph.target, graph.weight)
    logits = graph.by_kind["logit"]
    torch.testing.assert_close(sums[logits], graph.values[logits], rtol=0, atol=1e-9)


def test_closed_connections_have_no_edges():
    clt = random_clt(model_of("gpt2"))
    connect_random(clt, 6)
    for module in clt:
        if module.upstream:
            module.logits = torch.nn.Parameter(torch.full_like(module.connections.indices, -1, dtype=torch.float64))
    graph = attribute(sparse_model_run(clt, model_of("gpt2"), TOKENS))
    latent = graph.by_kind["latent"]
    assert not (latent[graph.source] & latent[graph.target]).any()


def test_the_top_logits_have_95_percent_of_the_probability_or_are_as_many_as_asked_for():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.06, 0.04]).log()
    assert top_logits(logits, 10).tolist() == [0, 1, 2, 3]
    assert top_logits(logits, 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match="max_logits: expected at least 1, got 0"):
        top_logits(logits, 0)


def test_logits_with_a_soft_cap_are_refused():
    run = run_of("gpt2", "frozen", False)
    with pytest.raises(ValueError, match="expected logits that are linear in the residual stream"):
        attribute(replace(run, logits=3 * torch.tanh(run.logits / 3)))


@pytest.mark.parametrize("make", [sparse_model_run, language_model_run])
def test_a_family_with_a_soft_cap_is_refused_however_small_its_logits(make):
    model = LanguageModel.from_hf(hf_model(further_config("Gemma2")), tokenizer(), name="Gemma2")
    clt = random_clt(model)
    connect_random(clt, 6)
    with pytest.raises(ValueError, match="expected logits that are linear in the residual stream"):
        attribute(make(clt, model, TOKENS))
