"""Whole runs: train and evaluate, go on with a run, evaluate, load or export what a run directory holds."""

from sparseclt.runs.finished import evaluate_run, export_run, faithfulness_of_run, interaction_of_run, load_run
from sparseclt.runs.fitting import begin, finish, resume, train
from sparseclt.runs.imports import import_run

__all__ = [
    "begin",
    "evaluate_run",
    "export_run",
    "faithfulness_of_run",
    "finish",
    "import_run",
    "interaction_of_run",
    "load_run",
    "resume",
    "train",
]
