"""Every kernel with every launch configuration, to be compiled for GPUs on a machine without one.

`cases()` is the whole table. Pointers and row strides are taken to be multiples of 16 and inner strides to be 1, as
contiguous tensors of common sizes have them.
"""

import itertools
from typing import Any, NamedTuple

import torch

from . import (
    add_upstream,
    batchtopk_encode,
    connected_encode,
    decoder_gradient,
    place,
    ragged_slots,
    rows,
    scores,
    select,
    select_connections,
    topk_encode,
    virtual_matmul,
)

ELEMENTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FEW_ELEMENTS = ("fp32", "bf16")  # where fp16 compiles as bf16 does


class AheadOfTime(NamedTuple):
    """A kernel and everything that determines its machine code.

    `signature` gives each argument a type: "*fp32", "i64", ..., followed by ":16" where the launcher usually passes a
    multiple of 16 (pointers and strides: wide loads need it), and "constexpr" for those in `constexprs`.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    backends: tuple[str, ...] = ("cuda", "hip")  # that have it
    hopper_options: dict[str, int] = {}  # more options on NVIDIA GPUs from Hopper on


def cases() -> list[AheadOfTime]:
    return [
        *_encoder_scores(HAS_SCALE=True),
        _maxima(),
        *_select(),
        *_place(),
        *_connected(),
        *_ragged(),
        *_rows(),
        *_connection_scores(),
        *_encoder_scores(HAS_SCALE=False),
        _encoder_score("bf16", HAS_SCALE=False, ABSOLUTE=True),
        *_groupmax(),
        *_virtual_matmul(),
        *_decoder_gradient(),
    ]


def _case(
    name: str, kernel: Any, types: list[str] | dict[str, str], constexprs: dict[str, Any], options: dict[str, int]
) -> AheadOfTime:
    """`types` of the arguments that are not in `constexprs`: all of them in the kernel's order, or some by name.

    In the second case the others are i32, and strides of rows ("..._row") multiples of 16.
    """
    left = [arg for arg in kernel.arg_names if arg not in constexprs]
    if isinstance(types, list):
        types = dict(zip(left, types, strict=True))
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {arg: types.get(arg, "i32:16" if arg.endswith("_row") else "i32") for arg in left}
    return AheadOfTime(name, kernel, signature, constexprs, options)


def _encoder_scores(HAS_SCALE: bool) -> list[AheadOfTime]:
    return [
        *(_encoder_score(element, HAS_SCALE) for element in ELEMENTS if element != "fp32"),
        *(_encoder_score("fp32", HAS_SCALE, precision=precision) for precision in scores.FLOAT32),
    ]


def _encoder_score(element: str, HAS_SCALE: bool, ABSOLUTE: bool = False, precision: str | None = None) -> AheadOfTime:
    pointers = {"x": "", "W_enc": "", "b_enc": "", "scale": "fp32", "scores": "fp32", "maxima": "i32"}
    integers = {"n": "i32", "F": "i32", "D": "i32:16"}
    integers |= dict.fromkeys(("x_row", "W_row", "scores_row", "maxima_row"), "i32:16")
    flags = {"HAS_BIAS": True, "HAS_SCALE": HAS_SCALE, "ABSOLUTE": ABSOLUTE, "GROUP": 16}
    return _product(scores.encoder_scores_kernel, element, pointers, integers, flags, precision)


def _connection_scores() -> list[AheadOfTime]:
    pointers = {"W_enc": "", "E": "", "importance": "", "scores": "fp32", "maxima": "i32"}
    integers = {"H": "i32", "n": "i32", "U": "i32", "D": "i32:16", "W_head": "i32:16", "importance_row": "i32"}
    integers |= dict.fromkeys(("W_row", "E_row", "scores_row", "maxima_row"), "i32:16")
    kernel = select_connections.connection_scores_kernel
    return [
        _product(kernel, element, pointers, integers, {"GROUP": 16, "MANY_HEADS": many}, precision)
        for element, many in itertools.product(ELEMENTS, (False, True))
        for precision in (_precisions(many) if element == "fp32" else (None,))
    ]


def _precisions(few: bool) -> tuple[str, ...]:
    return ("tf32x3",) if few else tuple(scores.FLOAT32)


def _product(
    kernel: Any,
    element: str,
    pointers: dict[str, str],
    integers: dict[str, str],
    flags: dict[str, Any],
    precision: str | None,
) -> AheadOfTime:
    """A kernel with a matrix product of `element`s; pointers of kind "" are to those as well. `precision`: of fp32."""
    config = scores.HALF if precision is None else scores.FLOAT32[precision]
    types = {name: f"*{kind or element}:16" for name, kind in pointers.items()} | integers
    constexprs = {**flags, **config.constexprs, "UPCAST": False}
    constexprs |= {name: 1 for name in kernel.arg_names if name not in types and name not in constexprs}
    which = "".join(f" {flag.lower()}" for flag, on in flags.items() if on is True)
    case = _case(f"{_name(kernel)} {precision or element}{which}", kernel, types, constexprs, config.options)
    if kernel is scores.encoder_scores_kernel:
        case = case._replace(hopper_options=config.hopper_options)
    # ROCm has no TF32 and no such split of it: `fp32_precision` never asks for them there.
    return case if precision in (None, "ieee") else case._replace(backends=("cuda",))


def _name(kernel: Any) -> str:
    return kernel.__name__.removesuffix("_kernel")


def _maxima() -> AheadOfTime:
    kernel, shape = connected_encode.maxima_kernel, connected_encode.MAXIMA.constexprs
    types = {"scores": "*fp32:16", "maxima": "*i32:16"}
    return _case("maxima", kernel, types, {"GROUP": 16, **shape}, connected_encode.MAXIMA.options)


def _select() -> list[AheadOfTime]:
    """Short and long rows, in each of the stages that select goes through."""
    kernels = []
    pointers = {"parents": "*i32:16", "labels": "*i32:16", "ids": "*i32:16", "values": "*fp32:16"}
    lengths = (128, 512, select.MAX_BLOCK // 2, select.MAX_BLOCK, 4 * select.MAX_BLOCK)
    for candidates, stage in itertools.product(lengths, ("groups", "scores", "pieces")):
        config = select.select_config(candidates)
        flags = {
            "GROUP": 16 if stage == "scores" else 1,
            "HAS_PARENTS": stage == "scores",
            "HAS_LABELS": stage == "pieces",
            "IS_KEY": stage == "groups",
            "ABSOLUTE": False,
        }
        source = {"source": "*i32:16" if stage == "groups" else "*fp32:16"}
        name = f"select {stage} {candidates}"
        kernels.append(
            _case(name, select.select_kernel, pointers | source, {**flags, **config.constexprs}, config.options)
        )
    return kernels


def _place() -> list[AheadOfTime]:
    flags = {"HAS_VALUES": True, "RELU": True, "ABSOLUTE": False}
    pointers = {"values": "*fp32:16", "ids": "*i32:16", "out_values": "*bf16:16", "out_ids": "*i64:16"}
    configs = {k: place.place_config(k) for k in (8, 32, 128)}
    return [
        _case(f"place {k}", place.place_kernel, pointers, {**flags, **config.constexprs}, config.options)
        for k, config in configs.items()
    ]


def _connected() -> list[AheadOfTime]:
    kernels, kernel = [], connected_encode.d_upstream_kernel
    for dtype, C in itertools.product(FEW_ELEMENTS, (32, 64)):
        lookup = connected_encode.lookup_config(C)
        types = {"dz": "*fp32:16", "read": "*fp32:16", "grad": "*fp32:16", "slots": "*i64:16", "ids": "*i32:16"}
        types |= {"z": "*fp32:16", "V": f"*{dtype}:16", "connections": "*i64:16"}
        flags = {"HAS_DZ": True, "HAS_READ": True, "STEPS": 11}
        steps = {arg: 1 for arg in kernel.arg_names if arg.endswith(("_k", "_c"))}
        constexprs = steps | flags | lookup.constexprs
        kernels.append(_case(f"connected d_upstream {dtype} C {C}", kernel, types, constexprs, lookup.options))
    return kernels


def _ragged() -> list[AheadOfTime]:
    types = {"scores": "*fp32:16", "values": "*fp32:16", "ids": "*i32:16", "counts": "*i32:16", "threshold": "*bf16:16"}
    types |= {"room": "*i64:16", "starts": "*i64:16", "F": "i32:16", "half_window": "fp32", "threshold_step": "i32"}
    options, block = ragged_slots.CONFIG.options, {"BLOCK": ragged_slots.BLOCK}
    span = {"SPAN": batchtopk_encode.SPAN}
    kernels = [_case("batchtopk histogram", batchtopk_encode.histogram_kernel, types, span | block, options)]
    for jump, op in enumerate(("batchtopk", "jumprelu")):
        for kernel in (ragged_slots.count_kernel, ragged_slots.compact_kernel):
            kernels.append(_case(f"{op} {_name(kernel)}", kernel, types, {"JUMP": bool(jump)} | block, options))
    return kernels


def _rows() -> list[AheadOfTime]:
    """Every tile, but the widest for row_dots, which does not use it."""
    kernels = []
    for dtype, (label, tile) in itertools.product(FEW_ELEMENTS, rows.TILES.items()):
        data, wide, ids, size = f"*{dtype}:16", "*fp32:16", "*i32:16", "i32:16"
        gather = {"weights_k": 1, "indices_k": 1, "rows_d": 1, "out_d": 1}
        dots = {"out_k": 1, "bags_d": 1, "indices_k": 1, "rows_d": 1}
        lists = {"weights_k": 1, "bags_d": 1, "PART": rows.PART}
        four = [data, data, ids, data] + [size] * 6
        parts = [wide, "*i64:16", data, ids, ids, data] + [size] * 6
        transposed = [data, wide, data, ids, ids, data] + [size] * 7
        table: list[tuple[Any, list[str], dict[str, Any]]] = [
            (rows.gather_sum_kernel, four, gather),
            (rows.list_parts_kernel, parts, lists),
            (rows.row_dots_kernel, four, dots),
            (rows.transposed_gather_sum_kernel, transposed, lists | {"out_d": 1}),
        ]
        for kernel, types, steps in table:
            if kernel is not rows.row_dots_kernel or tile is not rows.WIDE:
                name = f"{_name(kernel)} {dtype} {label}"
                kernels.append(_case(name, kernel, types, steps | tile.constexprs, tile.options))
    return kernels


def _groupmax() -> list[AheadOfTime]:
    pointers = {"scores": "*fp32:16", "values": "*fp32:16", "ids": "*i32:16"}
    kernel, configs = topk_encode.groupmax_kernel, {block: topk_encode.GroupTile(block=block) for block in (16, 512)}
    return [
        _case(f"groupmax {block}", kernel, pointers, config.constexprs, config.options)
        for block, config in configs.items()
    ]


def _virtual_matmul() -> list[AheadOfTime]:
    slots = add_upstream.SLOTS
    of_slots = {"ends": "*i32:16", "shifts": "*i32:16", "z_indices": "*i64:16", "starts": "*i32:16"}
    constexprs = {"index_s": 1} | slots.constexprs
    kernels = [_case("token_pairs", add_upstream.token_pairs_kernel, of_slots, constexprs, slots.options)]
    for dtype in FEW_ELEMENTS:
        data, wide, int32, int64, size = f"*{dtype}:16", "*fp32:16", "*i32:16", "*i64:16", "i32:16"
        add = {"pre": wide, "z_values": data, "ends": int32, "shifts": int32, "weights": data, "targets": int32}
        values, weights = virtual_matmul.D_VALUES, virtual_matmul.D_WEIGHTS
        pairs, flags = add_upstream.PAIRS, {"pre_f": 1, "value_s": 1, "STEPS": 11}
        name, kernel = f"add_upstream {dtype}", add_upstream.add_upstream_kernel
        kernels.append(_case(name, kernel, add, flags | pairs.constexprs, pairs.options))
        types = [data, data, int64, data, int32, int32] + [size] * 6
        steps = {"dz_s": 1, "grad_f": 1, "index_s": 1}
        kernel = virtual_matmul.d_values_kernel
        kernels.append(_case(f"d_values {dtype}", kernel, types, steps | values.constexprs, values.options))
        types = [data, data, data, int32, int32, int64, int32] + [size] * 9
        steps = {"grad_f": 1, "value_s": 1, "connection_c": 1}
        kernel = virtual_matmul.d_weights_kernel
        kernels.append(_case(f"d_weights {dtype}", kernel, types, steps | weights.constexprs, weights.options))
    return kernels


def _decoder_gradient() -> list[AheadOfTime]:
    kernel, tile = decoder_gradient.decoder_gradient_kernel, decoder_gradient.TILE
    types = {"out": "*fp32:16", "squares": "*fp32:16", "touched": "*u8:16", "D": "i32:16"}
    types |= {"table": "*i64:16"}
    kernels, element = [], decoder_gradient.ELEMENTS[torch.bfloat16]
    for stored in (True, False):
        flags = {"STORED": stored, "OFFSETS": True, "WEIGHT": element, "GRADIENT": element, "ENCODER": element}
        name = f"decoder_gradient bf16 {'rows' if stored else 'squares'}"
        constexprs = {**flags, "INDEX": decoder_gradient.tl.int32, **tile.constexprs}
        kernels.append(_case(name, kernel, types, constexprs, tile.options))
    return kernels
