"""Adam that updates some rows of a parameter at a time, so that a decoder's gradient need never be whole."""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adam import adam

from sparseclt.config import OptimizerConfig
from sparseclt.devices import Budget
from sparseclt.model.decoder_gradients import Chunk, DecoderGradients, squares_by_target
from sparseclt.model.transcoders import Transcoders
from sparseclt.ops.rows import chunks
from sparseclt.parallel import ALONE, ONE_RANK, Ranks
from sparseclt.training import eight_bit, one_pass
from sparseclt.training.rounding import round_stochastically

KEPT_BYTES = 256 << 20  # decoder gradients that are kept for the update; larger ones are computed again for it
PIECE_BYTES = Budget(cpu=1 << 20, gpu=64 << 20, gpu_share=1 / 64)  # of float32 weights that are widened at a time
EPSILON = 1e-8
UNCOUNTED = ("cuda",)  # where untouched rows are computed and dropped: counting the others would make the host wait
SCALED = ("W_enc", "W_dec", "b_dec")  # parameters that have a scale; b_enc is in the latents' own units
CODES = {"mean": eight_bit.MEAN, "square": eight_bit.SQUARE}

# Adam's state of a parameter, or of some rows. "mean": running mean of the gradient; "square": of its square;
# "mean_scale", "square_scale": of each vector [D], where those two are codes of 8 bits; "last": by row, the step that
# last updated it, where only touched rows are.
Moments = dict[str, Tensor]


class RowAdam:
    """Adam (as `torch.optim.Adam`), over rows of parameters.

    `state="8bit"`: the moments of encoders and decoders are codes of 8 bits with a scale for each vector [D]
    (`eight_bit`): 2 bytes per parameter instead of 8.

    `rows="touched"`: a decoder row that no latent or connection touched is left alone. Its moments decay when it is
    next touched, by as many steps as have passed: they, and their bias correction, are exactly those of Adam with
    zero gradients in between; but the weights do not drift on meanwhile, as Adam's would.

    `scales`: for encoders, decoders and their biases, what a parameter is in the units that Adam works in, times which
    is the parameter itself (`normalisation`): [T, 1] for a decoder, one per target, otherwise a scalar; 1 at first.
    Adam is given gradients in its own units, and the norm to which they are clipped is in those.

    Weights in bf16 are rounded stochastically: the expected weight is the exact one, so that updates far below the
    spacing of bf16 still add up. The random bits follow from `seed`, the step, the parameter and the row, and from the
    rank among `ranks` that share the CLT.
    """

    def __init__(self, clt: Transcoders, config: OptimizerConfig, seed: int = 0, ranks: Ranks = ONE_RANK,
                 backend: str | None = None):  # fmt: skip
        self.config, self.seed, self.group, self.backend = config, seed, ranks.latents, backend
        self.parameters = dict(clt.named_parameters())
        self.step = 0
        self._scaled: tuple[object, Tensor] = (None, torch.empty(0))
        self._steps: tuple[int, list[Tensor]] | None = None
        self.state = {name: self._moments(name, parameter) for name, parameter in self.parameters.items()}
        self.scales = {name: _ones(name, p) for name, p in self.parameters.items() if name.endswith(SCALED)}

    def _moments(self, name: str, parameter: Parameter) -> Moments:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        decoder = name.endswith("W_dec")
        moments: Moments = {}
        for key, code in CODES.items():
            small = self.config.state == "8bit" and (decoder or name.endswith("W_enc"))
            moments[key] = torch.zeros(parameter.shape, dtype=code.dtype if small else wide, device=parameter.device)
            if small:
                moments[f"{key}_scale"] = torch.zeros(parameter.shape[:-1], dtype=wide, device=parameter.device)
        if decoder and self.config.rows == "touched":
            moments["last"] = torch.zeros(len(parameter), dtype=torch.int32, device=parameter.device)
        return moments

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, to be saved, or copied into."""
        moments = {f"{name}/{key}": tensor for name, parts in self.state.items() for key, tensor in parts.items()}
        return moments | {f"{name}/scale": scale for name, scale in self.scales.items()}

    def square_sum(self, name: str, gradient: Tensor) -> Tensor:
        """The sum of squares of a parameter's gradient, or of some of its rows, in Adam's units."""
        scale = self.scales.get(name)
        if scale is None or scale.ndim == 0:
            flat = gradient.flatten()
            return torch.dot(flat, flat) if scale is None else torch.dot(flat, flat) * scale.square()
        return self.square_sum_of_targets(name, squares_by_target(gradient))

    def square_sum_of_targets(self, name: str, squares: Tensor) -> Tensor:
        """The same, of a decoder's gradient whose squares add up to `squares` [T]."""
        return (squares * self.scales[name][:, 0].square()).sum()

    @torch.no_grad()
    def update(
        self,
        name: str,
        gradient: Tensor,
        learning_rate: float,
        rows: slice = slice(None),
        touched: Tensor | None = None,
        factor: float = 1.0,
    ) -> None:
        """One step for `rows` of a parameter; `gradient` is theirs, and is overwritten; it counts times `factor`.
        `self.step` counts from 1."""
        if not name.endswith("W_dec") and self.in_one_pass(name):
            (numbers,) = self._numbers(name, learning_rate, factor)
            one_pass.step(self.parameters[name].data, gradient, self.state[name], numbers)
            return
        weights, first = self.parameters[name].data[rows], rows.start or 0
        part = {key: tensor[rows] for key, tensor in self.state[name].items()}
        if "last" not in part:
            self._adam(name, weights, gradient, part, learning_rate, first, factor)
            return
        assert touched is not None
        if weights.device.type in UNCOUNTED:
            before = [(tensor, tensor.clone()) for tensor in (weights, *part.values())]
            self._decay(part)
            self._adam(name, weights, gradient, part, learning_rate, first, factor)
            for tensor, old in before:
                tensor.copy_(torch.where(touched.view(-1, *[1] * (tensor.ndim - 1)), tensor, old))
            return
        ids = touched.nonzero().flatten()
        some, few = weights[ids], {key: tensor[ids] for key, tensor in part.items()}
        self._decay(few)
        self._adam(name, some, gradient[ids], few, learning_rate, first, factor)
        weights[ids] = some
        for key, tensor in part.items():
            tensor[ids] = few[key]

    def in_one_pass(self, name: str) -> bool:
        return one_pass.fits(self.parameters[name], self.state[name], self.backend)

    def _numbers(self, name: str, rate: float, factor: float) -> list[Any]:
        return one_pass.numbers(self.scales.get(name), factor, rate, self.config.betas, EPSILON, self.step)

    @torch.no_grad()
    def update_gathered(self, name: str, gradient: Any, learning_rate: float, factor: float = 1.0) -> None:
        """One step for a whole decoder, with a gradient that is never stored."""
        moments, numbers = self.state[name], self._numbers(name, learning_rate, factor)
        gradient.adam(self.parameters[name].data, moments["mean"], moments["square"], numbers)

    def _decay(self, moments: Moments) -> None:
        """Of rows that were left alone, up to the step before this one."""
        idle = (self.step - 1 - moments["last"]).to(torch.float32)
        for key, beta in zip(("mean", "square"), self.config.betas, strict=True):
            moment = moments.get(f"{key}_scale", moments[key])
            moment.mul_((beta**idle).view(-1, *[1] * (moment.ndim - 1)))
        moments["last"].fill_(self.step)

    def _adam(
        self,
        name: str,
        weights: Tensor,
        gradient: Tensor,
        moments: Moments,
        learning_rate: float,
        row: int,
        factor: float,
    ) -> None:
        """The step itself, some rows at a time, for which weights and moments are widened where they have to be."""
        wide = torch.promote_types(weights.dtype, torch.float32)
        small = "mean_scale" in moments
        # A rank has some columns of a decoder, whose vectors have one scale on all ranks.
        group = self.group if name.endswith("W_dec") else ALONE
        offset = None
        if small:
            columns = group.part(weights.shape[-1] * group.size, "d_model of the language model")
            offset = eight_bit.offsets(columns.stop, self.step, weights.device)[columns]
        generator, scale = self._generator(name, row) if weights.dtype != wide else None, self.scales.get(name)
        for rows in chunks(len(weights), 4 * weights[:1].numel(), PIECE_BYTES.on(weights.device)):
            exact, part = weights[rows].to(wide), {key: tensor[rows] for key, tensor in moments.items()}
            moment = {
                k: eight_bit.decode(c, part[k], part[f"{k}_scale"]) if small else part[k] for k, c in CODES.items()
            }
            own = gradient[rows].to(wide)
            if scale is not None or factor != 1:
                own.mul_(factor if scale is None else self._scale_times(name, factor))
            self._exact(exact, own, moment["mean"], moment["square"], learning_rate, scale)
            if offset is not None:
                for key, code in CODES.items():
                    eight_bit.encode(code, moment[key], part[key], part[f"{key}_scale"], offset, group)
            if generator is not None:
                round_stochastically(exact, weights[rows], generator)

    def _scale_times(self, name: str, factor: float) -> Tensor:
        """A parameter's scale times `factor`, for all rows of one step."""
        key = name, self.step, factor
        if self._scaled[0] != key:
            self._scaled = key, self.scales[name] * factor
        return self._scaled[1]

    def _before(self, device: torch.device) -> Tensor:
        """The number of steps before this one, as Adam's function takes it, which counts it up: out of many that are
        filled on the device at once."""
        if self._steps is None or self._steps[0] != self.step or not self._steps[1]:
            self._steps = self.step, list(torch.full((256,), self.step - 1.0, device=device).unbind())
        return self._steps[1].pop()

    def _generator(self, name: str, row: int) -> torch.Generator:
        """Of random bits that follow from the seed, the step, the parameter and the row, and from the rank, unless all
        ranks have the same parameter."""
        generator = torch.Generator(self.parameters[name].device)
        seed = self.seed + (0 if name.endswith("b_dec") else self.group.rank)
        return generator.manual_seed(hash((seed, self.step, list(self.parameters).index(name), row)) & (2**63 - 1))

    def _exact(
        self,
        weights: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        learning_rate: float,
        scale: Tensor | None,
    ) -> None:
        """`gradient` is in Adam's units."""
        beta1, beta2 = self.config.betas
        steps = self._before(weights.device)
        # With a scale: the step in Adam's units, which begins at 0.
        moved = weights if scale is None else torch.zeros_like(weights)
        adam(
            [moved], [gradient], [mean], [square], [], [steps], fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=learning_rate, weight_decay=0.0, eps=EPSILON, maximize=False,
        )  # fmt: skip
        if scale is not None:
            weights.addcmul_(moved, scale)


def _ones(name: str, parameter: Parameter) -> Tensor:
    shape = (parameter.shape[1], 1) if name.endswith("W_dec") else ()
    return torch.ones(shape, dtype=torch.promote_types(parameter.dtype, torch.float32), device=parameter.device)


@torch.no_grad()
def clip_and_step(
    clt: Transcoders,
    gradients: DecoderGradients,
    optimizer: RowAdam,
    learning_rate: float,
    clip: float | None,
    settle: Callable[[Tensor], float] = float,
) -> tuple[Tensor, str | None]:
    """One optimiser step from the gathered gradients: their norm in Adam's units, and the name of the first parameter
    whose gradient is not finite (then nothing was updated).

    The norm that `clip` bounds is that of the whole gradient, exactly: of decoders that are large, or gathered, it is
    computed a second time for the update. Encoders and biases come last, for the gradient of decoders is made of
    encoder rows. `settle` reads the norm, which waits for the device, once.
    """
    _add_up(clt)
    gradients.add_to_encoders()
    decoders = {f"transcoders.{i}.W_dec": i for i in range(len(clt.sites))}
    gathered = {name: gradients.gathered(i) if optimizer.in_one_pass(name) else None for name, i in decoders.items()}
    size = sum(p.numel() for name, p in optimizer.parameters.items() if name in decoders) * 4
    kept: dict[str, list[Chunk]] = {}
    squares: dict[str, Tensor] = {}
    for name, parameter in optimizer.parameters.items():
        if name not in decoders:
            if parameter.grad is not None:
                squares[name] = optimizer.square_sum(name, parameter.grad)
        elif (own := gathered[name]) is not None:
            own.keep = size <= KEPT_BYTES
            squares[name] = optimizer.square_sum_of_targets(name, own.squares())
        elif size <= KEPT_BYTES:
            kept[name] = list(gradients.chunks(decoders[name]))
            squares[name] = torch.stack([optimizer.square_sum(name, chunk.gradient) for chunk in kept[name]]).sum()
        else:
            squares[name] = optimizer.square_sum_of_targets(name, gradients.squares(decoders[name]))
    wide = reduce(torch.promote_types, (square.dtype for square in squares.values()))
    total = torch.stack([square.to(wide) for square in squares.values()]).to(torch.float64)
    if clt.ranks.latents.rank:
        total *= torch.tensor([not name.endswith("b_dec") for name in squares], device=total.device)  # counted once
    total = clt.ranks.latents.sum_(total)
    norm = total.sum().sqrt()
    length = settle(norm)
    if not math.isfinite(length):
        return norm, next(name for name, square in zip(squares, total, strict=True) if not torch.isfinite(square))
    factor = min(1.0, (math.inf if clip is None else clip) / (length + 1e-6))
    optimizer.step += 1
    for name, index in decoders.items():
        if gathered[name] is not None:
            optimizer.update_gathered(name, gathered[name], learning_rate, factor)
        for chunk in kept.pop(name, None) or (gradients.chunks(index) if gathered[name] is None else ()):
            optimizer.update(name, chunk.gradient, learning_rate, chunk.rows, chunk.touched, factor)
    for name, parameter in optimizer.parameters.items():
        if parameter.grad is not None and name not in decoders:  # whose gradient the chunks hold
            optimizer.update(name, parameter.grad, learning_rate, factor=factor)
        parameter.grad = None
    return norm, None


def _add_up(clt: Transcoders) -> None:
    """Of every parameter but the decoders, the gradient of the whole batch in `.grad`, of which a rank has a part."""
    for name, parameter in clt.named_parameters():
        if parameter.grad is not None:
            group = clt.ranks.world if name.endswith("b_dec") else clt.ranks.data
            parameter.grad = group.sum_(parameter.grad)
