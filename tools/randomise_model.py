"""Write a copy of a language model whose weights mean nothing, as a control.

    python tools/randomise_model.py embedded runs/nonsense
    sparseclt train --model.path runs/nonsense --out runs/control

Every tensor keeps its own numbers in a random order, so that sizes and distributions stay as they were. A figure that
is as good for this model as for the real one says nothing about what the real one has learned.
"""

import argparse
from pathlib import Path

import torch

from sparseclt.language_model.files import load_hf, locate


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="'embedded', a local directory or a .gguf file")
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    path = locate(options.model)
    if path is None:
        parser.error(f"model: expected 'embedded' or a local model, got {options.model!r}")
    if options.out.exists():
        parser.error(f"out: expected a new directory, got {options.out}, which exists")
    model, tokenizer = load_hf(path, torch.float32)
    generator = torch.Generator().manual_seed(options.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
