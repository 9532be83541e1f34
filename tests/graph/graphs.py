"""Runs and graphs of a prompt on the tiny models, each made once."""

from functools import cache

import torch
from clts import connect_random, language_model, random_clt

from sparseclt.graph.attribution import attribute
from sparseclt.graph.run import language_model_run, sparse_model_run
from sparseclt.model.forward import ForwardPass

PROMPT = "w7 w31 w7 w12 w3 w44"
TOKENS = torch.tensor([[0, 7, 31, 7, 12, 3, 44]])


@cache
def model_of(family: str):
    return language_model(family)


@cache
def clt_of(family: str, attention: str):
    clt = random_clt(model_of(family), attention)
    connect_random(clt, 6)
    return clt


@cache
def run_of(family: str, attention: str, error_nodes: bool, mode: str = "sparse"):
    clt = clt_of(family, attention)
    if error_nodes:
        return language_model_run(clt, model_of(family), TOKENS, mode)
    return sparse_model_run(clt, model_of(family), TOKENS, ForwardPass(clt, mode))


@cache
def graph_of(family: str, attention: str, error_nodes: bool, mode: str = "sparse"):
    return attribute(run_of(family, attention, error_nodes, mode))
