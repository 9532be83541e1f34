"""Runs and graphs of a prompt on the tiny models, each made once."""

from functools import cache

import torch
from clts import connect_random, language_model, random_clt

from sparseclt.graph.attribution import attribute
from sparseclt.graph.run import language_model_run, sparse_model_run

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
def run_of(family: str, attention: str, error_nodes: bool):
    make = language_model_run if error_nodes else sparse_model_run
    return make(clt_of(family, attention), model_of(family), TOKENS)


@cache
def graph_of(family: str, attention: str, error_nodes: bool):
    return attribute(run_of(family, attention, error_nodes))
