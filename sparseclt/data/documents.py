"""Documents as passages: whole where they are short, in parts where they are too long to be held at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LONGEST = 16 << 20  # characters of a document that is kept whole
PART = 1 << 20  # characters, at most, of each part of a longer one
CONTEXT = 64  # characters before a part that go with it, for the tokenizer


@dataclass(frozen=True, slots=True)
class Passage:
    """A document, or a part of one."""

    text: str
    before: str = ""
    """The last characters of the document before this part of it; empty at the beginning of a document."""


def passages(chunks: Iterable[str]) -> Iterator[Passage]:
    """The passages of one document that arrives in chunks: one of up to LONGEST characters, or parts of up to PART.

    Nothing is left out or changed; a document without any text but white space has no passage.
    """
    held, before, limit = "", "", LONGEST
    for chunk in chunks:
        held += chunk
        while len(held) > limit:
            limit = PART
            end = break_before(held, 0, PART)
            yield Passage(held[:end], before)
            held, before = held[end:], held[max(0, end - CONTEXT) : end]
    if held.strip() or held and before:
        yield Passage(held, before)


def cut(text: str, size: int, before: str = "") -> list[Passage]:
    """A text in passages of up to `size` characters, the first of which follows on `before`."""
    parts, start = [], 0
    while start < len(text):
        end = len(text) if len(text) - start <= size else break_before(text, start, start + size)
        parts.append(Passage(text[start:end], before))
        start, before = end, text[max(start, end - CONTEXT) : end]
    return parts


def break_before(text: str, start: int, end: int) -> int:
    """The best place for a cut in the second half of text[start:end]: at a line end, else at a space, else the end.

    Tokenizers join spaces to the word behind them and line ends to what stands before them, and treat several line
    ends or spaces in a row in ways of their own: such places are left alone.
    """
    middle = (start + end) // 2 + 1
    for mark, behind in (("\n", 1), (" ", 0)):
        place = text.rfind(mark, middle, end - 1)
        while place > 0:
            if not text[place - 1].isspace() and not text[place + 1].isspace():
                return place + behind
            place = text.rfind(mark, middle, place)
    return end
