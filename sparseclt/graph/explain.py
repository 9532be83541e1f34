"""A prompt explained: its graph, what pruning keeps of it, and how far the sparse model is from the language model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseclt.graph.attribution import attribute
from sparseclt.graph.graph import Graph
from sparseclt.graph.influence import Pruned, Scores, prune, scores
from sparseclt.graph.prompt import prompt_tokens, token_strings
from sparseclt.graph.run import check_exact, language_model_run, sparse_model_run
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT, in_evaluation_mode
from sparseclt.model.forward import ForwardPass
from sparseclt.model.sites import Mode


@dataclass(frozen=True)
class Agreement:
    """How far the sparse model's next-token probabilities are from the language model's."""

    kl_last: float
    """KL divergence from the language model to the sparse model, in nats, behind the last token."""
    kl_mean: float
    """Its mean over all tokens but the first."""
    top1_last: bool
    """Whether both find the same token likeliest behind the last token."""
    top1_mean: float
    """The share of tokens but the first behind which they do."""


@dataclass(frozen=True)
class PromptGraph:
    """The graph of one prompt, pruned, with what is measured beside it."""

    prompt: str
    token_strings: tuple[str, ...]
    logit_strings: tuple[str, ...]
    model_name: str
    attention: str
    """What stands for attention in the CLT: "frozen" or "latents"."""
    layers: int
    graph: Graph
    pruned: Pruned
    node_share: float
    edge_share: float
    max_logits: int
    mode: Mode
    """Whose latents and edges: those of sparsely-connected mode, or of vanilla mode."""
    error_nodes: bool
    """False: the graph of the sparse model (in vanilla mode: of the replaced model). True: of the language model's own
    run, with error nodes."""
    scores: Scores
    """Of the graph with error nodes, whether this is it or not."""
    agreement: Agreement


@in_evaluation_mode
@torch.no_grad()
def prompt_graph(
    clt: SparseCLT,
    language_model: LanguageModel,
    prompt: str,
    *,
    mode: Mode = "sparse",
    error_nodes: bool = False,
    node_share: float = 0.8,
    edge_share: float = 0.98,
    max_logits: int = 10,
    special_tokens: bool = False,
) -> PromptGraph:
    """The graph of `prompt` in sparsely-connected mode, or in `mode` "vanilla", where a latent reads all upstream ones.

    Without `error_nodes` it describes the sparse model: the language model with the CLT, in that mode, in place of its
    MLPs (and of attention, where that has latents). With them it describes the language model's own run.
    Either is exact: what leads to a latent adds up to its pre-activation, what leads to a logit to that logit minus
    the mean over the vocabulary. Attention patterns, norm scales and the choice of active latents are constants.
    Pruning, influence and scores are those of circuit-tracer; `node_share` and `edge_share` have its defaults.

    Raises ValueError for a prompt that is empty or too long, for shares outside 0 to 1, for sparsely-connected mode of
    a CLT without connections, and for a model whose logits are not linear in its last residual stream.
    """
    check_exact(clt, language_model, mode)
    tokens = prompt_tokens(language_model, prompt, special_tokens)
    sparse = sparse_model_run(clt, language_model, tokens, ForwardPass(clt, mode))
    real = language_model_run(clt, language_model, tokens, mode)
    graph = attribute(real if error_nodes else sparse, max_logits=max_logits)
    with_errors = graph if error_nodes else attribute(real, max_logits=max_logits)
    logits = torch.tensor([graph.nodes[number].index for number in graph.numbers("logit").tolist()])
    return PromptGraph(
        prompt=prompt,
        token_strings=tuple(token_strings(language_model, graph.tokens)),
        logit_strings=tuple(token_strings(language_model, logits)),
        model_name=clt.architecture.model.name,
        attention=clt.architecture.attention,
        layers=clt.architecture.model.layers,
        graph=graph,
        pruned=prune(graph, node_share, edge_share),
        node_share=node_share,
        edge_share=edge_share,
        max_logits=max_logits,
        mode=mode,
        error_nodes=error_nodes,
        scores=scores(with_errors),
        agreement=agreement(real.logits, sparse.logits),
    )


def agreement(real: Tensor, sparse: Tensor) -> Agreement:
    """Of the logits [S, V] of the language model and of the sparse model."""
    p, q = (logits.double().log_softmax(-1) for logits in (real, sparse))
    kl, same = (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)
    return Agreement(
        kl_last=kl[-1].item(),
        kl_mean=kl[1:].mean().item(),
        top1_last=bool(same[-1]),
        top1_mean=same[1:].double().mean().item(),
    )
