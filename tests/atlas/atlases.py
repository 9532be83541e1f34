"""The atlas of a tiny CLT, with text that would be dangerous if it were ever taken for HTML."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clts import connect_random, random_clt
from tiny_models import CONTEXT, VOCAB, hf_model

from sparseclt.atlas.build import write_atlas
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT

SCRIPT, IMAGE, NAME = "<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>", "<b>tiny</b>"
SCRIPT_ID, IMAGE_ID = 7, 8
DEAD = (1, 3)  # module, latent: dead in both modes
C, ROWS, LENGTH = 6, 40, 20


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0} | {f"w{i}": i for i in range(1, VOCAB) if i not in (SCRIPT_ID, IMAGE_ID)}
    words |= {SCRIPT: SCRIPT_ID, IMAGE: IMAGE_ID}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<s>", unk_token="<s>", model_max_length=CONTEXT
    )


@dataclass
class Atlas:
    """A written atlas and what it was made from."""

    clt: SparseCLT
    language_model: LanguageModel
    rows: torch.Tensor
    folder: Path


def make_atlas(folder: Path, family: str = "gpt2", attention: str = "frozen", connected: bool = True) -> Atlas:
    model = LanguageModel.from_hf(hf_model(family), tokenizer(), name=family)
    clt = random_clt(model, attention)
    with torch.no_grad():
        clt.transcoder(DEAD[0]).b_enc[DEAD[1]] = -1e6
    if connected:
        connect_random(clt, C)
    rows = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    about = {"name": NAME, "config": {"note": SCRIPT}, "evaluation": None, "metrics": {}, "split": "held_out"}
    write_atlas(clt, model, rows, folder, about)
    return Atlas(clt, model, rows, folder)
