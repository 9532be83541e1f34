"""Text, tokens and activations for training."""

from sparseclt.data.row_stream import RowStream
from sparseclt.data.text import load_rows, token_rows
from sparseclt.data.tokens import check_token_ids, rows_digest

__all__ = ["RowStream", "check_token_ids", "load_rows", "rows_digest", "token_rows"]
