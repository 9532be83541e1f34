"""A graph of a prompt is exact: what leads to a latent adds up to it, and the logits follow from the inputs."""

import pytest
import torch
from clts import connect_random, language_model, random_clt
from tiny_models import FAMILIES, hf_model, tokenizer

from sparseclt.graph.attribution import attribute, top_logits
from sparseclt.graph.run import language_model_run, sparse_model_run
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.replacement import replacement

PROMPT = torch.tensor([[0, 7, 31, 7, 12, 3, 44]])
both_kinds = pytest.mark.parametrize("attention", ["frozen", "latents"])
both_runs = pytest.mark.parametrize("make_run", [sparse_model_run, language_model_run])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return language_model(request.param)


def connected(model, attention, C=6):
    clt = random_clt(model, attention)
    connect_random(clt, C)
    return clt


@both_runs
@both_kinds
def test_what_leads_to_a_node_adds_up_to_its_value(model, attention, make_run):
    graph = attribute(make_run(connected(model, attention), model, PROMPT))
    sums = torch.zeros_like(graph.values).index_add_(0, graph.target, graph.weight)
    reached = graph.stage >= 0
    assert graph.by_kind["latent"].sum() > 50 and graph.by_kind["logit"].any()
    torch.testing.assert_close(sums[reached], graph.values[reached], rtol=0, atol=1e-9)


@both_runs
@both_kinds
def test_logits_propagated_along_the_graph_are_those_of_the_run(model, attention, make_run):
    clt = connected(model, attention)
    graph = attribute(make_run(clt, model, PROMPT))
    hooks = replacement(clt, "sparse") if make_run is sparse_model_run else {}
    logits = model.replaced_logits(PROMPT, **hooks)[0, -1]
    numbers = graph.numbers("logit")
    chosen = torch.tensor([graph.nodes[n].index for n in numbers.tolist()])
    blank = attribute(make_run(clt, model, PROMPT))
    blank.values[blank.by_kind["latent"] | blank.by_kind["logit"]] = float("nan")  # nothing of them is used
    torch.testing.assert_close(blank.propagate({})[numbers], logits[chosen] - logits.mean(), rtol=0, atol=1e-9)


@both_kinds
def test_every_active_latent_is_a_node_and_reads_only_its_connections(model, attention):
    clt = connected(model, attention, C=3)
    run = sparse_model_run(clt, model, PROMPT)
    graph = attribute(run)
    active = {
        (site.name, position, index)
        for site, latents in zip(clt.sites, run.forward.latents, strict=True)
        for position, slots in enumerate(zip(*latents, strict=True))
        for value, index in zip(*(part.tolist() for part in slots), strict=True)
        if value > 0
    }
    latents = [node for node in graph.nodes if node.kind == "latent"]
    assert {(node.site.name, node.position, node.index) for node in latents} == active
    for source, target in zip(graph.source.tolist(), graph.target.tolist(), strict=True):
        s, t = graph.nodes[source], graph.nodes[target]
        assert s.position <= t.position or s.kind == "bias"
        if s.kind == t.kind == "latent":
            upstream = clt.sites.index(s.site) * clt.architecture.latents + s.index
            module = clt.transcoder(clt.sites.index(t.site))
            assert upstream in module.connections.indices[t.index].tolist()
            assert s.position == t.position or t.site.kind == "attn"


def test_frozen_attention_is_one_node_for_each_layer_and_position(model):
    graph = attribute(sparse_model_run(connected(model, "frozen"), model, PROMPT))
    places = [(node.site.name, node.position) for node in graph.nodes if node.kind == "attention"]
    assert sorted(places) == sorted((f"attn_{layer}", p) for layer in range(3) for p in range(PROMPT.shape[1]))


def test_attention_latents_have_edges_between_tokens(model):
    graph = attribute(sparse_model_run(connected(model, "latents", C=20), model, PROMPT))
    between = [
        (graph.nodes[s], graph.nodes[t])
        for s, t in zip(graph.source.tolist(), graph.target.tolist(), strict=True)
        if graph.nodes[s].kind == "latent" and graph.nodes[s].position < graph.nodes[t].position
    ]
    assert between and all(t.site.kind == "attn" for _, t in between)


def test_layers_that_the_clt_does_not_cover_are_one_node():
    model = LanguageModel.from_hf(hf_model("gpt2"), tokenizer(), layers=2, name="gpt2")
    graph = attribute(sparse_model_run(connected(model, "frozen"), model, PROMPT))
    assert [node.position for node in graph.nodes if node.kind == "layers"] == [PROMPT.shape[1] - 1]
    sums = torch.zeros_like(graph.values).index_add_(0, graph.target, graph.weight)
    logits = graph.by_kind["logit"]
    torch.testing.assert_close(sums[logits], graph.values[logits], rtol=0, atol=1e-9)


def test_the_top_logits_have_95_percent_of_the_probability_or_are_as_many_as_asked_for():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.06, 0.04]).log()
    assert top_logits(logits, 10).tolist() == [0, 1, 2, 3]
    assert top_logits(logits, 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match="max_logits: expected at least 1, got 0"):
        top_logits(logits, 0)
