"""The atlas of a tiny CLT, with text that would be dangerous if it were ever taken for HTML."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clts import connect_random, random_clt
from tiny_models import CONTEXT, FAMILIES, VOCAB, further_config, hf_model

from sparseclt.atlas.build import add_graphs, write_atlas
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


def graph_json() -> dict[str, Any]:
    """A small Graph JSON: two latents between an embedding and a logit."""
    tokens = ["<s>", "w1", SCRIPT]

    def node(node_id: str, layer: str, kind: str, label: str, **more: Any) -> dict[str, Any]:
        place = {
            "node_id": node_id,
            "feature": 1,
            "layer": layer,
            "ctx_idx": 2,
            "feature_type": kind,
            "jsNodeId": node_id,
        }
        return place | {"clerp": label, "influence": 0.5, "activation": None, "token_prob": 0.0} | more

    latent = "cross layer transcoder"
    nodes = [
        node("E_7_2", "E", "embedding", f'Embedding "{SCRIPT}"', influence=0.9),
        node("0_4_2", "0", latent, "mlp_0/4", site="mlp_0", latent=4, activation=1.5),
        node("1_5_2", "1", latent, "mlp_1/5", site="mlp_1", latent=5, activation=0.5, influence=0.7),
        node("4_9_2", "4", "logit", f'Output "{SCRIPT}" (p=0.250)', influence=None, token_prob=0.25),
    ]
    links = [("E_7_2", "0_4_2", 1.25), ("0_4_2", "1_5_2", -0.75), ("0_4_2", "4_9_2", 2.0), ("1_5_2", "4_9_2", 0.5)]
    ours = {
        "agreement": {"kl_last": 0.125, "kl_mean": 0.25, "top1_last": True, "top1_mean": 0.5},
        "scores": {"replacement": 0.75, "completeness": 0.875, "input_shares": {"embedding": 1.0}},
        "nodes": {"kept": 4, "all": 10},
        "edges": {"kept": 4, "all": 20},
    }
    metadata = {"slug": "tiny", "scan": "tiny", "prompt": f"w1 {SCRIPT}", "prompt_tokens": tokens, "sparseclt": ours}
    return {
        "metadata": metadata,
        "qParams": {"pinnedIds": [], "supernodes": []},
        "nodes": nodes,
        "links": [{"source": source, "target": target, "weight": weight} for source, target, weight in links],
    }


@dataclass
class Atlas:
    """A written atlas and what it was made from."""

    clt: SparseCLT
    language_model: LanguageModel
    rows: torch.Tensor
    folder: Path


def make_atlas(
    folder: Path,
    family: str = "gpt2",
    attention: str = "frozen",
    connected: bool = True,
    dtype: torch.dtype | None = None,
    activation: str = "topk",
) -> Atlas:
    config = family if family in FAMILIES else further_config(family)
    model = LanguageModel.from_hf(hf_model(config), tokenizer(), name=family)
    clt = random_clt(model, attention, activation=activation).to(dtype).eval()
    with torch.no_grad():
        for module in clt:
            for threshold, value in ((module.threshold, 0.5), (module.threshold_sparse, 0.8)):
                if threshold is not None:  # one that some of the strongest latents do not reach
                    threshold.fill_(value)
        clt.transcoder(DEAD[0]).b_enc[DEAD[1]] = -1e6
    if connected:
        connect_random(clt, C)
    rows = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    about = {"name": NAME, "config": {"note": SCRIPT}, "evaluation": None, "metrics": {}, "split": "held_out"}
    write_atlas(clt, model, rows, folder, about)
    graphs = folder.parent / "graphs"
    graphs.mkdir(exist_ok=True)
    (graphs / "tiny.json").write_text(json.dumps(graph_json()))
    (graphs / "graph-metadata.json").write_text('{"graphs": []}')
    add_graphs(graphs, folder)
    return Atlas(clt, model, rows, folder)
