"""A CLT as a model on the Hugging Face hub: its card, and what is uploaded."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin

from sparseclt.model import pretrained
from sparseclt.model.transcoders import Transcoders
from sparseclt.storage.json_files import write_text

LIBRARY = "sparseclt"
TAGS = ("cross-layer-transcoder", "interpretability", "sparse-autoencoder")
CARD = """---
{data}
---

# {title}

A sparsely-connected cross-layer transcoder of {model}: {modules} modules with {F} latents each, of which {active} are
active per token. In sparsely-connected mode {reading}.

```python
from sparseclt import SparseCLT

clt = SparseCLT.from_pretrained("{name}")
```
"""
EVALUATION = """
## Evaluation

{table}

FVU is the fraction of variance unexplained of each module's target; "sparse" is sparsely-connected mode, in which
errors of earlier modules count as well. L0 is the mean number of active latents per token.
"""


class HubModel(Transcoders, ModelHubMixin, library_name=LIBRARY, tags=list(TAGS)):
    """Transcoders that can be written to a directory and pushed to the hub."""

    def save_pretrained(  # type: ignore[override]  # ours never writes into a directory that holds other files
        self, path: str | Path, *, config: None = None, model_card_kwargs: Mapping[str, Any] | None = None
    ) -> Path:
        """Write the CLT to directory `path` (circuit-tracer layout and sidecars), whole or not at all.

        model_card_kwargs: those of `generate_model_card`. None: no card.
        """
        path = pretrained.save(self, Path(path))
        if model_card_kwargs is not None:
            # Beside the manifest, not in it: cards are edited on the hub.
            write_text(path / "README.md", str(self.generate_model_card(**model_card_kwargs)))
            for name, text in model_card_kwargs.get("files", {}).items():
                write_text(path / name, text)
        return path

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, table: str | None = None, files: Mapping[str, str] | None = None, **options: Any
    ) -> str:
        """Upload the CLT with a model card to `repo_id` ("owner/name"), which is made if it does not exist; returns the
        address of the commit.

        table: an evaluation as Markdown, for the card. files: name -> text of further files. options: those of
        `huggingface_hub.ModelHubMixin.push_to_hub` (`token`, `private`, `branch`, `create_pr`, `commit_message`).
        """
        card = {"repo_id": repo_id, "table": table, "files": files or {}}
        options.setdefault("commit_message", "Upload a sparsely-connected CLT")
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)

    def generate_model_card(self, repo_id: str, table: str | None = None, **_: object) -> ModelCard:
        """The card of the CLT as it is called `repo_id` on the hub; `table`: an evaluation as Markdown."""
        a = self.architecture
        # circuit-tracer knows thresholds, not the K strongest, and has no place for attention latents.
        runs_elsewhere = a.activation != "topk" and a.attention == "frozen"
        data = ModelCardData(
            library_name=LIBRARY,
            tags=[*TAGS, *(["circuit-tracer"] if runs_elsewhere else [])],
            base_model=a.model.name if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", a.model.name) else None,
        )
        exactly = "" if a.activation == "topk" else f" ({a.activation}) on average"
        if (first := a.active_of(0)) != (last := a.active_of(a.model.layers - 1)):
            exactly += f" in the mean over layers, from {first} in the first to {last} in the last,"
        text = CARD.format(
            data=data.to_yaml(),
            title=repo_id.split("/")[-1],
            model=a.model.name or "a language model",
            modules=len(self.sites),
            F=a.latents,
            active=f"{a.active}{exactly}",
            reading=self._reading(),
            name=repo_id,
        )
        return ModelCard(text + (EVALUATION.format(table=table) if table else ""))

    def _reading(self) -> str:
        C = max((module.connections.C for module in self if module.connections), default=0)
        given = "the embedding and " + (
            "the model's own attention outputs" if self.architecture.attention == "frozen" else "attention latents"
        )
        return f"a latent reads {given}, and at most {C} upstream latents" if C else "it has no connections"
