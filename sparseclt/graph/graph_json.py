"""Graph JSON, as circuit-tracer's page and Neuronpedia read it.

Fields that neither knows (`site` and `latent` of a node, `sparseclt` of the metadata) are ours; both ignore them.
"""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparseclt.graph.attribution import LOGIT_SHARE
from sparseclt.graph.explain import PromptGraph
from sparseclt.graph.graph import Node, NodeKind
from sparseclt.model.sites import Site
from sparseclt.storage.json_files import replace_file

INDEX = "graph-metadata.json"
# Their names for what a node is. Attention that is taken as given is what attention latents would leave unexplained.
FEATURE_TYPES: dict[NodeKind, str] = {
    "error": "mlp reconstruction error",
    "attention": "lorsa error",
    "layers": "mlp reconstruction error",
    "embedding": "embedding",
    "bias": "bias",
    "logit": "logit",
}


def graph_json(explained: PromptGraph, name: str | None = None) -> dict[str, Any]:
    """The pruned graph as plain values for JSON. `name`: its slug (None: `graph_name`)."""
    graph, pruned = explained.graph, explained.pruned
    numbers = pruned.nodes.nonzero()[:, 0].tolist()
    ids = {number: _node_id(explained, graph.nodes[number]) for number in numbers}
    edges = pruned.edges.nonzero()[:, 0]
    links = zip(graph.source[edges].tolist(), graph.target[edges].tolist(), graph.weight[edges].tolist(), strict=True)
    return {
        "metadata": _metadata(explained, name or graph_name(explained)),
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [_node(explained, number, ids[number]) for number in numbers],
        "links": [{"source": ids[source], "target": ids[target], "weight": weight} for source, target, weight in links],
    }


def graph_name(explained: PromptGraph) -> str:
    """A file name for the graph: the first words of its prompt and a digest of all of it."""
    words = "-".join(re.findall(r"[a-z0-9]+", explained.prompt.lower()))[:40].strip("-") or "prompt"
    digest = hashlib.blake2b(explained.prompt.encode(), digest_size=3).hexdigest()
    vanilla = "-vanilla" if explained.mode == "vanilla" else ""
    return f"{words}-{digest}{vanilla}" + ("-errors" if explained.error_nodes else "")


def write_graph(explained: PromptGraph, path: Path) -> Path:
    """Write the graph to `path` (NAME.json) and enter it in the index beside it, which circuit-tracer's page reads.

    Raises ValueError if the name does not end with .json or is that of the index.
    """
    if path.suffix != ".json" or path.name == INDEX:
        raise ValueError(f"out: expected a file named NAME.json, other than {INDEX}, got {str(path)!r}")
    values = graph_json(explained, path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, values)
    index = path.parent / INDEX
    listed = json.loads(index.read_text())["graphs"] if index.is_file() else []
    others = [entry for entry in listed if entry["slug"] != path.stem]
    _write(index, {"graphs": [*others, values["metadata"]]})
    return path


def _write(path: Path, values: dict[str, Any]) -> None:
    replace_file(path, json.dumps(values, allow_nan=False) + "\n")


def _metadata(explained: PromptGraph, slug: str) -> dict[str, Any]:
    kept, graph = explained.pruned, explained.graph
    run = "The sparse model's run" if explained.mode == "sparse" else "The replaced model's run in vanilla mode"
    run = "The language model's own run, with error nodes" if explained.error_nodes else run
    return {
        "slug": slug,
        "scan": explained.model_name,
        "transcoder_list": [],
        "prompt_tokens": list(explained.token_strings),
        "prompt": explained.prompt,
        "node_threshold": explained.node_share,
        "schema_version": 1,
        "info": {
            "description": f"{run}; edges are exact, attention and norm scales frozen",
            "generator": {"name": "sparseclt"},
        },
        "generation_settings": {"max_n_logits": explained.max_logits, "desired_logit_prob": LOGIT_SHARE},
        "pruning_settings": {"node_threshold": explained.node_share, "edge_threshold": explained.edge_share},
        "sparseclt": {
            "mode": explained.mode,
            "error_nodes": explained.error_nodes,
            "attention": explained.attention,
            "agreement": asdict(explained.agreement),
            "scores": asdict(explained.scores),
            "nodes": {"kept": int(kept.nodes.sum()), "all": len(graph.nodes)},
            "edges": {"kept": int(kept.edges.sum()), "all": len(kept.edges)},
        },
    }


def _row(explained: PromptGraph, site: Site) -> int:
    """The row in which a site is drawn: its layer; with attention latents, its place in the model's order."""
    return site.layer if explained.attention == "frozen" else 2 * site.layer + (site.kind == "mlp")


def _last_row(explained: PromptGraph) -> int:
    return explained.layers if explained.attention == "frozen" else 2 * explained.layers


def _node_id(explained: PromptGraph, node: Node) -> str:
    if node.kind == "bias":
        return "E_bias_0"
    if node.kind == "embedding":
        return f"E_{node.index}_{node.position}"
    if node.kind == "logit":
        return f"{_last_row(explained) + 1}_{node.index}_{node.position}"
    if node.site is None:
        return f"{_last_row(explained)}_layers_{node.position}"
    row = _row(explained, node.site)
    if node.kind == "latent":
        return f"{row}_{node.index}_{node.position}"
    return f"{row}_error_{node.site.kind}_{node.position}"


def _node(explained: PromptGraph, number: int, node_id: str) -> dict[str, Any]:
    graph = explained.graph
    node, value = graph.nodes[number], graph.values[number].item()
    logit = number - int(graph.numbers("logit")[0]) if node.kind == "logit" else -1
    probability = graph.probabilities[logit].item() if node.kind == "logit" else 0.0
    row = node_id.split("_")[0]
    fields: dict[str, Any] = {
        "node_id": node_id,
        "feature": _feature(node, row),
        "layer": row,
        "ctx_idx": node.position,
        "feature_type": _feature_type(node),
        "token_prob": probability,
        "is_target_logit": logit == 0,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": _js_node_id(node, row, node_id),
        "clerp": _label(explained, node, logit, probability),
        "influence": None if node.kind in ("logit", "bias") else explained.pruned.cumulative[number].item(),
        "activation": value if node.kind == "latent" else None,
    }
    if node.site is not None:
        fields["site"] = node.site.name
    if node.kind == "latent":
        fields["latent"] = node.index
    return fields


def _feature_type(node: Node) -> str:
    if node.kind == "latent":
        return "cross layer transcoder" if node.site and node.site.kind == "mlp" else "lorsa"
    if node.kind == "error" and node.site and node.site.kind == "attn":
        return "lorsa error"
    return FEATURE_TYPES[node.kind]


def _feature(node: Node, row: str) -> int:
    """The number by which their pages know what a node stands for; a latent's is Cantor's number of row and latent."""
    if node.kind == "latent":
        total = int(row) + node.index
        return total * (total + 1) // 2 + node.index
    return {"embedding": node.position, "logit": node.index}.get(node.kind, -1)


def _js_node_id(node: Node, row: str, node_id: str) -> str:
    if node.kind == "latent":
        return f"{row}_{node.index}-0"
    if node.kind == "logit":
        return f"L_{node.index}-{node.position}"
    return "-".join(node_id.rsplit("_", 1))


def _label(explained: PromptGraph, node: Node, logit: int, probability: float) -> str:
    if node.kind == "latent":
        assert node.site is not None
        return f"{node.site.name}/{node.index}"
    if node.kind == "logit":
        return f'Output "{explained.logit_strings[logit]}" (p={probability:.3f})'
    if node.kind == "embedding":
        return f'Embedding "{explained.token_strings[node.position]}"'
    return {
        "error": f"Error of {node.site.name}" if node.site else "",
        "attention": f"Frozen attention of layer {node.site.layer}" if node.site else "",
        "layers": "Layers that the CLT does not cover",
        "bias": "All biases",
    }[node.kind]
