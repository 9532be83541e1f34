"""Text, tokens and activations for training."""

from sparseclt.data.text import RowStream, load_rows, read_documents, token_rows

__all__ = ["RowStream", "load_rows", "read_documents", "token_rows"]
