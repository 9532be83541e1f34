"""Adam that updates some rows of a parameter at a time, so that a decoder's gradient need never be whole."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparseclt.config import OptimizerConfig
from sparseclt.devices import Budget
from sparseclt.model.decoder_gradients import squares_by_target
from sparseclt.model.transcoders import Transcoders
from sparseclt.ops.rows import chunks
from sparseclt.parallel import ALONE, ONE_RANK, Ranks
from sparseclt.training import eight_bit, one_pass
from sparseclt.training.rounding import round_stochastically

PIECE_BYTES = Budget(cpu=1 << 20, gpu=64 << 20, gpu_share=1 / 64)  # of float32 weights that are widened at a time
EPSILON = 1e-8
RESTING = ("W_enc", "b_enc")  # parameters whose rows stay where they are in a step that gives them no gradient
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

    `rows="fired"`: an encoder row (and its bias) with a gradient of zero stays where it is, while its moments decay as
    Adam's do. With `rows="all"` it would drift on: after a single gradient, by about six learning rates in total,
    which is enough to silence a latent that fires rarely.

    `rows="touched"`: a decoder row that no latent or connection touched stays, too, and is not even read. Its moments
    decay when it is next touched, by as many steps as have passed.

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
        self._steps: tuple[int, Tensor] | None = None
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
            one_pass.step(self.parameters[name].data, gradient, self.state[name], numbers, self._rests(name))
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

    def _rests(self, name: str) -> bool:
        return self.config.rows != "all" and name.endswith(RESTING)

    def in_one_pass(self, name: str) -> bool:
        return one_pass.fits(self.parameters[name], self.state[name], self.backend)

    def _numbers(self, name: str, rate: float, factor: float) -> list[Any]:
        return one_pass.numbers(self.scales.get(name), factor, rate, self.config.betas, EPSILON, self.step)

    @torch.no_grad()
    def update_gathered(self, name: str, gradient: Any, learning_rate: float, factor: float = 1.0) -> Tensor:
        """One step for a whole decoder, with a gradient that is never stored. Returns what its `adam` does."""
        moments, numbers = self.state[name], self._numbers(name, learning_rate, factor)
        squares: Tensor = gradient.adam(self.parameters[name].data, moments["mean"], moments["square"], numbers)
        return squares

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
            times = scale
            if self._rests(name):
                moves = own.any(-1, keepdim=True) if own.ndim == 2 else own.bool()
                times = moves.to(wide) if scale is None else moves * scale
            self._exact(exact, own, moment["mean"], moment["square"], learning_rate, times)
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

    def _step_on(self, device: torch.device) -> Tensor:
        """The number of this step, on the device."""
        if self._steps is None or self._steps[0] != self.step:
            self._steps = self.step, torch.full((), float(self.step), device=device)
        return self._steps[1]

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
        times: Tensor | None,
    ) -> None:
        """`gradient` is in Adam's units; the weights move by Adam's step, or by `times` it."""
        beta1, beta2 = self.config.betas
        moved = weights if times is None else torch.zeros_like(weights)
        # What `torch.optim.Adam(fused=True)` calls, without its counting up of steps for each parameter.
        torch._fused_adam_(
            [moved], [gradient], [mean], [square], [], [self._step_on(weights.device)], amsgrad=False, beta1=beta1,
            beta2=beta2, lr=learning_rate, weight_decay=0.0, eps=EPSILON, maximize=False,
        )  # fmt: skip
        if times is not None:
            weights.addcmul_(moved, times)


def _ones(name: str, parameter: Parameter) -> Tensor:
    shape = (parameter.shape[1], 1) if name.endswith("W_dec") else ()
    return torch.ones(shape, dtype=torch.promote_types(parameter.dtype, torch.float32), device=parameter.device)
