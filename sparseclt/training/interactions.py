"""A penalty on the Jacobian between latents: a Jacobian-SAE baseline for CLTs and per-layer transcoders."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseclt.model.activations import Activations
from sparseclt.model.modules import Latents
from sparseclt.model.transcoders import Transcoders
from sparseclt.ops.rows import accumulation_dtype


def jacobian_sums(clt: Transcoders, latents: Sequence[Latents], activations: Activations) -> list[Tensor]:
    """For every MLP module with upstream modules, the mean over pairs of |J|, summed over tokens, a scalar.

    J is the Jacobian of an active latent's pre-activation with respect to an upstream latent that is active on the same
    token, with the norm's scale and attention frozen, as everywhere here, and through the residual stream only: the
    virtual weight V[i, j] over the norm's scale. It is taken in units in which every decoder row has norm 1, so that
    stretching latents changes nothing. Equivalent, with the virtual weights V [F, U] of a module, its decoder norms
    d [F] and those u [U] upstream, to `((d[:, None] * V / u).abs() * (z > 0)[:, :, None] * (z_up > 0)[:, None]).sum() /
    scale / (K * S)`, token by token, with K latents of the module and S upstream ones to a token. Only active pairs are
    met, N K S D multiplications; but rows [N, S, D] are gathered for every reader, and decoders get a dense gradient.

    After the L1 penalty of Farnik et al., "Jacobian Sparse Autoencoders: Sparsify Computations, Not Just Activations"
    (arXiv 2502.18147), the mean of |J| over the k x k active pairs of two TopK SAEs. There they lie at the input and
    the output of one MLP and J goes through the MLP; here the latents themselves stand for MLPs, J is between those of
    different layers, of all pairs of modules at once, and linear. The units stand for decoders of norm 1, which TopK
    SAEs usually have.
    Readers that are attention modules mix tokens, and have no such pairs.
    """
    unit = [_unit_norms(module.W_dec) for module in clt]
    sums = []
    for m, module in enumerate(clt):
        if not clt.upstream[m] or module.site.kind != "mlp":
            continue
        values, indices = latents[m]
        ids = indices.clamp_min(0)
        read = clt.reading_rows(m)[ids].to(unit[m].dtype) * unit[m][ids][..., None]
        scale = activations.scale[module.site.layer].flatten()[:, None, None]
        pairs, total = 0, read.new_zeros(())
        for u in range(clt.upstream[m]):
            written = _written_before(clt, u, m) / unit[u][:, None]
            z = latents[u]
            J = read @ written[z.indices.clamp_min(0)].mT / scale
            total = total + (J.abs() * (values > 0)[:, :, None] * (z.values > 0)[:, None]).sum()
            pairs += values.shape[1] * z.values.shape[1]
        sums.append(total / pairs)
    return sums


def _unit_norms(W_dec: Tensor) -> Tensor:
    """The norm of each latent's decoder [F], over all of its targets."""
    wide = W_dec.flatten(1).to(accumulation_dtype(W_dec.dtype))
    return wide.norm(dim=1).clamp_min(torch.finfo(wide.dtype).tiny ** 0.5)


def _written_before(clt: Transcoders, upstream: int, reader: int) -> Tensor:
    """What each latent of module `upstream` has written before module `reader`, [F, D]."""
    writer, W_dec = clt.sites[upstream], clt.transcoder(upstream).W_dec
    before = W_dec[:, : clt.sites[reader].layer - writer.layer] if writer.kind == "mlp" else W_dec
    return before.sum(1, dtype=accumulation_dtype(W_dec.dtype))
