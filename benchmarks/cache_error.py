"""What the dtypes of the activation cache cost on disk and in precision, on rows of the embedded text.

python benchmarks/cache_error.py
"""

import argparse
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from sparseclt.config import ActivationConfig, DataConfig, LoggingConfig, TrainConfig
from sparseclt.data.activation_cache import open_cache
from sparseclt.data.text import load_rows
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations
from sparseclt.training.losses import fvu

KINDS: dict[str, Callable[[Activations], list[Tensor]]] = {
    "embedding": lambda a: [a.r_0],
    "MLP inputs": lambda a: a.x,
    "MLP outputs": lambda a: a.mlp_out,
    "attention outputs": lambda a: a.attn_out,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="embedded", help="the language model (model.path)")
    parser.add_argument("--rows", type=int, default=200, help="rows of 128 tokens")
    arguments = parser.parse_args()
    model = LanguageModel.load(arguments.model)
    text = load_rows(TrainConfig(data=DataConfig(max_tokens=128 * arguments.rows)), model.tokenizer, "train")
    real, every = model.capture(text), torch.arange(len(text))
    print("| dtype | bytes a token | " + " | ".join(f"FVU, {kind}" for kind in KINDS) + " |")
    print("| --- | ---: |" + " ---: |" * len(KINDS))
    for dtype in ("bf16", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            activations = ActivationConfig(cache=folder, cache_dtype=dtype)  # type: ignore[arg-type]
            cache = open_cache(TrainConfig(activations=activations, logging=LoggingConfig(progress=False)), model, text)
            stored = cache.read(every)
        errors = []
        for kind in KINDS.values():
            pairs = zip(kind(real), kind(stored), strict=True)
            errors.append(max(fvu(a.flatten(0, 1), b.flatten(0, 1)).item() for a, b in pairs))
        size = cache.info.row_bytes / cache.info.row_length
        print(f"| {dtype} | {size:,.0f} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")


if __name__ == "__main__":
    main()
