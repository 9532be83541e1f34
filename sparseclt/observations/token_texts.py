"""Tokens as text."""

from typing import Any


def token_texts(tokenizer: Any, vocabulary: int) -> list[str]:
    """The text of every token as it stands inside a sentence, with its leading space where it has one.

    A token that is no whole characters, but some of their bytes, has the tokenizer's own name.
    """
    known = min(len(tokenizer), vocabulary)
    anchor = known // 2
    alone = tokenizer.decode([anchor], clean_up_tokenization_spaces=False)
    pairs = tokenizer.batch_decode([[anchor, i] for i in range(known)], clean_up_tokenization_spaces=False)
    return [
        pair.removeprefix(alone)
        if pair.startswith(alone) and "\ufffd" not in pair
        else tokenizer.convert_ids_to_tokens(i)
        for i, pair in enumerate(pairs)
    ] + [""] * (vocabulary - known)
