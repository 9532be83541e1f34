"""What a decoder's gradient is made of, as the kernels of a backend take it.

`notes` are the `DecoderGradients` that gathered it.
"""

from typing import Any

import torch

from sparseclt.model.cross_layer import Reader
from sparseclt.model.sections import cut
from sparseclt.ops.rows import transpose


def make(notes: Any, index: int, backend: str) -> Any:
    """The gradient of module `index`'s decoder, for the kernels of "triton" or "numba"."""
    return _triton(notes, index) if backend == "triton" else _numba(notes, index)


def _numba(notes: Any, index: int) -> Any:
    from sparseclt.ops.optimizer_step import Read, gathered_decoder

    F, T, D = notes.clt.transcoder(index).W_dec.shape

    def read(reader: Reader | None) -> Read | None:
        if reader is None:
            return None
        assert reader.connections is not None
        W_enc, centred = notes.clt.transcoder(reader.index).W_enc.detach(), notes.clt.architecture.model.centred
        ((own,),) = cut([reader.connections.transposed], [index * F], F, F)
        return Read(notes.read[reader.index], own, W_enc, centred)

    return gathered_decoder((F, T, D), notes.written[index], [read(reader) for reader in notes.behind(index)])


def _triton(notes: Any, index: int) -> Any:
    from csrc_triton.decoder_gradient import Decoder, Read, Written
    from csrc_triton.transpose import Transpose

    F, T, D = notes.clt.transcoder(index).W_dec.shape
    readers = notes.behind(index)
    for i in {reader.index for reader in readers if reader} - notes.means.keys():
        notes.means[i] = notes.clt.transcoder(i).W_enc.detach().mean(1, dtype=torch.float32)

    def read(reader: Reader | None) -> Read | None:
        if reader is None:
            return None
        assert reader.connections is not None
        means = notes.means[reader.index] if notes.clt.architecture.model.centred else None
        W_enc = notes.clt.transcoder(reader.index).W_enc.detach()
        return Read(notes.read[reader.index], Transpose(*reader.connections.transposed), W_enc, means)

    written = [Written(w.values, Transpose(*transpose(w.indices, F)), w.grads) for w in notes.written[index]]
    return Decoder((F, T, D), index * F, written, [read(reader) for reader in readers])
