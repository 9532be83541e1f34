"""Interventions: latents set to other values, what that does to the logits, and what the graph says it would do."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseclt.graph.attribution import attribute
from sparseclt.graph.prompt import prompt_tokens, token_strings
from sparseclt.graph.run import PromptRun, check_exact, sparse_model_run
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT, in_evaluation_mode
from sparseclt.model.forward import ForwardPass
from sparseclt.model.modules import Latents
from sparseclt.model.sites import MODES, Mode, Site

SHOWN = 5  # likeliest tokens before, and after, whose logits are compared
SYNTAX = "SITE/LATENT@POSITIONS=VALUE, such as mlp_2/137@5=0, mlp_2/137@5-8=x2 (twice its value) or mlp_2/137@*=1.5"


@dataclass(frozen=True)
class Intervention:
    """One latent, set to `value`, or to `factor` times the value it has, at some positions of the prompt."""

    site: str
    """"mlp_2", "attn_0", ..."""
    latent: int
    positions: tuple[int, ...] | None = None
    """Negative ones count from the end. None: all positions that have latents."""
    value: float | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.factor is None):
            raise ValueError(f"latents: expected either a value or a factor for {self.site}/{self.latent}")

    @classmethod
    def parse(cls, text: str) -> "Intervention":
        """Read SITE/LATENT@POSITIONS=VALUE. Raises ValueError for any other form."""
        match = re.fullmatch(r"(\w+)/(\d+)@(\*|-?\d+|\d+-\d+)=(x?)(-?\d*\.?\d+(?:[eE][+-]?\d+)?)", text)
        if match is None:
            raise ValueError(f"latents: expected {SYNTAX}, got {text!r}")
        site, latent, positions, factor, number = match.groups()
        kind = "factor" if factor else "value"
        return cls(site, int(latent), _positions(positions, text), **{kind: float(number)})


def _positions(text: str, whole: str) -> tuple[int, ...] | None:
    if text == "*":
        return None
    if re.fullmatch(r"-?\d+", text):
        return (int(text),)
    first, last = (int(end) for end in text.split("-"))
    if last < first:
        raise ValueError(f"latents: expected positions from the lower to the higher, got {whole!r}")
    return tuple(range(first, last + 1))


@dataclass(frozen=True)
class Outcome:
    """One run's prediction behind the last token, for the compared tokens [k]."""

    logits: Tensor  # [k] minus the mean over the vocabulary
    probabilities: Tensor  # [k]


@dataclass(frozen=True)
class Effects:
    """What interventions do to the logits behind the last token."""

    tokens: Tensor
    """[k] the compared tokens: the likeliest of the model that is graphed, before and after."""
    token_strings: tuple[str, ...]
    before: dict[Mode, Outcome]
    """Of each mode, without the interventions."""
    after: dict[Mode, Outcome]
    """With them: whatever follows from them is computed anew (later latents, attention, norm scales)."""
    predicted: Tensor
    """[k] the change of the logits along the graph, which is linear."""


@in_evaluation_mode
@torch.no_grad()
def intervene(
    clt: SparseCLT,
    language_model: LanguageModel,
    prompt: str,
    interventions: Sequence[Intervention],
    *,
    modes: Sequence[Mode] | None = None,
    special_tokens: bool = False,
) -> Effects:
    """Set latents to other values on `prompt`, in the replaced model of each of `modes` (None: all that the CLT has);
    the prediction is that of the sparse model's graph, or, of a CLT without connections, of vanilla mode's.

    Raises ValueError for sites, latents and positions that do not exist, for two interventions on one latent at one
    position, and where `prompt_graph` does.
    """
    known: Sequence[Mode] = MODES if clt.connected and clt.reads_upstream else ("vanilla",)
    graphed, modes = known[-1], known if modes is None else modes
    for mode in (graphed, *modes):
        check_exact(clt, language_model, mode)
    tokens = prompt_tokens(language_model, prompt, special_tokens)
    places = _resolve(clt, tokens.shape[1], interventions)
    runs = {mode: _runs(clt, language_model, tokens, mode, places) for mode in dict.fromkeys((graphed, *modes))}
    likeliest = [run.logits[-1].topk(min(SHOWN, run.logits.shape[1])).indices.tolist() for run in runs[graphed]]
    chosen = torch.tensor(list(dict.fromkeys(sum(likeliest, []))), device=tokens.device)
    return Effects(
        tokens=chosen,
        token_strings=tuple(token_strings(language_model, chosen)),
        before={mode: _outcome(runs[mode][0], chosen) for mode in modes},
        after={mode: _outcome(runs[mode][1], chosen) for mode in modes},
        predicted=_predicted(runs[graphed][0], places, chosen),
    )


Change = tuple[int, int, Intervention]  # position, latent, what is asked for
Changes = dict[Site, list[Change]]


def _resolve(clt: SparseCLT, length: int, interventions: Sequence[Intervention]) -> Changes:
    """The interventions by site, one entry for each position."""
    if not interventions:
        raise ValueError(f"latents: expected at least one intervention, {SYNTAX}")
    sites, changes, seen = {site.name: site for site in clt.sites}, Changes(), set()
    for wanted in interventions:
        if wanted.site not in sites:
            raise ValueError(f"latents: expected a site of this CLT ({', '.join(sites)}), got {wanted.site!r}")
        if not 0 <= wanted.latent < clt.architecture.latents:
            last = clt.architecture.latents - 1
            raise ValueError(f"latents: expected a latent from 0 to {last}, got {wanted.site}/{wanted.latent}")
        for position in range(1, length) if wanted.positions is None else wanted.positions:
            place = position + length if position < 0 else position
            if not 1 <= place < length:
                raise ValueError(
                    f"latents: expected a position from 1 to {length - 1} (position 0 has no latents), got {position}"
                )
            if (key := (wanted.site, place, wanted.latent)) in seen:
                raise ValueError(
                    f"latents: expected one intervention on {wanted.site}/{wanted.latent}@{place}, got two"
                )
            seen.add(key)
            changes.setdefault(sites[wanted.site], []).append((place, wanted.latent, wanted))
    return changes


class _IntervenedPass(ForwardPass):
    """A pass whose latents are changed as each module yields them."""

    def __init__(self, clt: SparseCLT, mode: Mode, changes: Changes):
        super().__init__(clt, mode)
        self.changes = changes
        self.spare = max(len(at_site) for at_site in changes.values())

    def encode(self, index: int) -> Latents:
        """As without interventions, with a spare slot for each latent that may not be active."""
        plain = super().encode(index)
        values = torch.nn.functional.pad(plain.values, (0, self.spare))
        indices = torch.nn.functional.pad(plain.indices, (0, self.spare), value=-1)  # an empty slot
        for spare, (position, latent, wanted) in enumerate(self.changes.get(self.clt.sites[index], [])):
            slots = ((plain.indices[position] == latent) & (plain.values[position] > 0)).nonzero()[:, 0]
            slot = int(slots[0]) if len(slots) else plain.values.shape[1] + spare
            values[position, slot] = _changed(values[position, slot].item(), wanted)
            indices[position, slot] = latent
        return Latents(values, indices)


def _changed(value: float, wanted: Intervention) -> float:
    if wanted.factor is not None:
        return value * wanted.factor
    assert wanted.value is not None
    return wanted.value


def _runs(
    clt: SparseCLT, language_model: LanguageModel, tokens: Tensor, mode: Mode, changes: Changes
) -> tuple[PromptRun, PromptRun]:
    """The runs without and with the interventions."""
    plain, changed = ForwardPass(clt, mode), _IntervenedPass(clt, mode, changes)
    return (
        sparse_model_run(clt, language_model, tokens, plain),
        sparse_model_run(clt, language_model, tokens, changed),
    )


def _outcome(run: PromptRun, chosen: Tensor) -> Outcome:
    logits = run.logits[-1].double()
    return Outcome((logits - logits.mean())[chosen], logits.softmax(-1)[chosen])


def _predicted(run: PromptRun, changes: Changes, chosen: Tensor) -> Tensor:
    """The change [k] of the logits of `chosen` along the graph of `run`."""
    places = [(site, position, latent) for site, at_site in changes.items() for position, latent, _ in at_site]
    graph = attribute(run, logits=chosen, also=places)
    held = {}
    for site, at_site in changes.items():
        for position, latent, wanted in at_site:
            number = graph.number_of(site, position, latent)
            assert number is not None
            held[number] = _changed(graph.values[number].item(), wanted)
    return (graph.propagate(held) - graph.values)[graph.by_kind["logit"]]
