"""The pages of one module's latents, as data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseclt.atlas import folder
from sparseclt.atlas.connections import Incoming, Outgoing, contributions
from sparseclt.atlas.tokens import TokenIndex
from sparseclt.model.activations import at_least_float32
from sparseclt.model.clt import SparseCLT
from sparseclt.model.sites import Mode
from sparseclt.observations.examples import Examples, choose, histograms, largest_and_sum
from sparseclt.observations.gather import Firings, Gathered, ranges
from sparseclt.observations.logits import extremes

SHARD = 64  # latents in a file


class ModulePages:
    """Writes what the pages of module `module` show, SHARD latents to a file."""

    def __init__(
        self,
        clt: SparseCLT,
        module: int,
        gathered: Gathered,
        incoming: Incoming | None,
        outgoing: Outgoing,
        directions: Tensor,
        indices: Mapping[Mode, TokenIndex],
    ):
        self.clt, self.m, self.gathered = clt, module, gathered
        self.incoming, self.outgoing, self.directions, self.indices = incoming, outgoing, directions, indices
        self.F = clt.architecture.latents
        self.largest = {mode: np.zeros(self.F, np.float32) for mode in indices}
        self.token = {mode: np.full(self.F, -1) for mode in indices}

    def write(self, data: Path) -> dict[str, Any]:
        """Write the files below `data`; returns the module's line of the overview."""
        module, spools = self.clt.transcoder(self.m), self.gathered.spools
        for first, last in ranges(spools.values(), self.m, SHARD):
            held = {mode: spool.firings(self.m, first, last) for mode, spool in spools.items()}
            for start in range(first, last, SHARD):
                latents = self._shard({mode: f.between(start, min(start + SHARD, last)) for mode, f in held.items()})
                folder.write(data / "latents" / str(self.m) / f"{start // SHARD}.json.gz", latents)
        table = {
            "fired": {mode: spool.fired[self.m].tolist() for mode, spool in spools.items()},
            "largest": {mode: folder.rounded(values) for mode, values in self.largest.items()},
            "token": {mode: values.tolist() for mode, values in self.token.items()},
            "downstream": np.diff(self.outgoing.begins)[self.m * self.F : (self.m + 1) * self.F].tolist(),
        }
        folder.write(data / "modules" / f"{self.m}.json.gz", table)
        return {
            "name": module.site.name,
            "kind": module.site.kind,
            "layer": module.site.layer,
            "upstream": module.upstream,
            "dead": {mode: int((spool.fired[self.m] == 0).sum()) for mode, spool in spools.items()},
        }

    def _shard(self, firings: Mapping[Mode, Firings]) -> list[dict[str, Any]]:
        some = next(iter(firings.values()))
        latents: list[dict[str, Any]] = [{"modes": {}} for _ in range(some.first, some.last)]
        bias = folder.rounded(self.clt.transcoder(self.m).b_enc[some.first : some.last].double().cpu().numpy())
        for latent, value in zip(latents, bias, strict=True):
            latent["bias"] = value
        for mode, fired in firings.items():
            self._add_mode(latents, mode, fired)
        self._add_logits(latents, some.first)
        for i, latent in enumerate(latents, some.first):
            latent["upstream"] = self._upstream(i)
            latent["downstream"] = self._downstream(i)
        return latents

    def _add_mode(self, latents: list[dict[str, Any]], mode: Mode, firings: Firings) -> None:
        first, last = firings.first, firings.last
        largest, total = largest_and_sum(firings)
        counts = self.gathered.spools[mode].fired[self.m, first:last]
        self.largest[mode][first:last] = largest
        self.token[mode][first:last] = self.indices[mode].add(self.m, firings)
        bins = histograms(firings, largest).tolist()
        means = folder.rounded(total / np.maximum(counts, 1))
        for i, latent in enumerate(latents):
            latent["modes"][mode] = {
                "fired": int(counts[i]),
                "largest": folder.rounded(largest[i]),
                "mean": means[i],
                "histogram": bins[i],
                "examples": [],
            }
        examples = choose(firings, self.gathered.rows)
        for i, example in zip(examples.latent, self._examples(examples, mode), strict=True):
            latents[i - first]["modes"][mode]["examples"].append(example)

    def _examples(self, examples: Examples, mode: Mode) -> list[dict[str, Any]]:
        S = self.gathered.rows.shape[1]
        parts: NDArray[np.float64] | None = None
        if mode == "sparse" and self.incoming is not None:
            parts = contributions(self.clt, self.gathered, self.m, examples.latent, examples.token)
            bias = self.clt.transcoder(self.m).b_enc.detach().double().cpu().numpy()[examples.latent]
            rest = folder.rounded(examples.value - bias - parts.sum(1))
            parts = folder.rounded(parts)
        value, values, shown = folder.rounded(examples.value), folder.rounded(examples.values), examples.window >= 0
        window, length = examples.window.tolist(), shown.sum(1).tolist()
        found = []
        for e, token in enumerate(examples.token.tolist()):
            example = {
                "group": int(examples.group[e]),
                "row": token // S,
                "position": token % S,
                "start": int(examples.start[e]) % S,
                "value": value[e],
                "tokens": window[e][: length[e]],
                "values": [v or 0 for v in values[e][: length[e]]],
            }
            if parts is not None and rest[e] is not None:
                example |= {"contributions": [v or 0 for v in parts[e]], "rest": rest[e]}
            found.append(example)
        return found

    def _add_logits(self, latents: list[dict[str, Any]], first: int) -> None:
        """Of every latent that fired: of the sum of its decoders, then of each target layer."""
        module = self.clt.transcoder(self.m)
        live = [i for i, latent in enumerate(latents) if any(mode["fired"] for mode in latent["modes"].values())]
        if not live:
            return
        decoders = at_least_float32(module.W_dec[torch.tensor(live, device=module.W_dec.device) + first].detach())
        T = decoders.shape[1]
        if T > 1:
            decoders = torch.cat([decoders.sum(1, keepdim=True), decoders], 1)
        found = extremes(decoders.flatten(0, 1), self.directions)
        layers = [None] * (T > 1) + list(range(module.site.layer, module.site.layer + T))
        columns = (
            found.top.tolist(),
            folder.rounded(found.top_values.numpy()),
            found.bottom.tolist(),
            folder.rounded(found.bottom_values.numpy()),
        )
        names = ("top", "top_values", "bottom", "bottom_values")
        for n, i in enumerate(live):
            latents[i]["logits"] = [
                {"layer": layer}
                | {name: column[n * len(layers) + t] for name, column in zip(names, columns, strict=True)}
                for t, layer in enumerate(layers)
            ]

    def _upstream(self, latent: int) -> dict[str, Any] | None:
        """Every slot, in the order of the contributions of examples; an empty one is -1."""
        if self.incoming is None:
            return None
        return {
            "latent": self.incoming.upstream[latent].tolist(),
            "V": folder.rounded(self.incoming.V[latent]),
            "mean": folder.rounded(self.incoming.mean[latent]),
            "together": folder.rounded(self.incoming.together[latent]),
        }

    def _downstream(self, latent: int) -> dict[str, Any]:
        out = self.outgoing
        count, places = out.of(self.m * self.F + latent)
        return {
            "count": count,
            "latent": (out.module[places].astype(np.int64) * self.F + out.latent[places]).tolist(),
            "V": folder.rounded(out.V[places]),
            "mean": folder.rounded(out.mean[places]),
            "together": folder.rounded(out.together[places]),
        }
