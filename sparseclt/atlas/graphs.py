"""The graphs of prompts that a run has, as pages of its atlas."""

import json
from pathlib import Path
from typing import Any

from sparseclt.atlas import folder

INDEX = "graph-metadata.json"  # beside the graphs, for circuit-tracer's page


def copy_graphs(source: Path, data: Path) -> int:
    """Take every Graph JSON file of directory `source` into the atlas below `data`; returns how many there are.

    Raises ValueError for a file that is no Graph JSON.
    """
    files = sorted(file for file in source.glob("*.json") if file.name != INDEX)
    listed = []
    for file in files:
        graph = _read(file)
        folder.write(data / "graphs" / f"{file.stem}.json.gz", folder.finite(graph))
        sizes = {"nodes": len(graph["nodes"]), "edges": len(graph["links"])}
        listed.append({"slug": file.stem, "prompt": graph["metadata"]["prompt"]} | sizes)
    folder.write(data / "graphs.json.gz", listed)
    return len(files)


def _read(file: Path) -> dict[str, Any]:
    try:
        graph = json.loads(file.read_bytes())
        ids = {node["node_id"] for node in graph["nodes"]}
        metadata = graph["metadata"]
        whole = isinstance(metadata["prompt"], str) and isinstance(metadata["prompt_tokens"], list)
        joined = all({link["source"], link["target"]} <= ids for link in graph["links"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"graphs: expected Graph JSON in {file}: {error!r}") from error
    if not whole or not joined:
        raise ValueError(f"graphs: expected Graph JSON in {file}, got one without a prompt or with links to no node")
    return graph
