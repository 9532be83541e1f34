"""circuit-tracer's scores of the graphs of many prompts, unpruned."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseclt.graph.attribution import attribute
from sparseclt.graph.influence import scores
from sparseclt.graph.run import check_exact, language_model_run
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT, in_evaluation_mode


@dataclass(frozen=True)
class PromptScores:
    """Mean and standard deviation of `influence.Scores` over prompts, of graphs with error nodes."""

    prompts: int
    prompt_tokens: int
    """Tokens in each prompt."""
    replacement: float
    replacement_std: float
    completeness: float
    completeness_std: float


@in_evaluation_mode
@torch.no_grad()
def prompt_scores(
    clt: SparseCLT,
    language_model: LanguageModel,
    rows: Tensor,
    *,
    prompts: int = 16,
    prompt_tokens: int = 32,
    max_logits: int = 10,
) -> PromptScores:
    """The scores of the first `prompt_tokens` tokens of the first `prompts` rows of `rows` [R, S].

    Raises ValueError for a CLT or a model that has no exact graph, as `prompt_graph` does.
    """
    check_exact(clt, language_model)
    taken = rows[:prompts, :prompt_tokens]
    found = []
    for row in taken:
        run = language_model_run(clt, language_model, row[None])
        s = scores(attribute(run, max_logits=max_logits))
        found.append([s.replacement, s.completeness])
    values = torch.tensor(found, dtype=torch.float64)
    mean, std = values.mean(0).tolist(), values.std(0, correction=0).tolist()
    return PromptScores(len(taken), taken.shape[1], mean[0], std[0], mean[1], std[1])
