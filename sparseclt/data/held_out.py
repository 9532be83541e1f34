"""Which documents are held out, for text that comes without held-out documents of its own."""

from collections.abc import Iterable, Iterator

import numpy as np

from sparseclt.data.documents import LONGEST, Passage, cut

GROUP = 64  # passages that are looked at together
Group = list[Passage]


def grouped(passages: Iterable[Passage]) -> Iterator[Group]:
    """The passages in groups of GROUP, or of less where LONGEST characters are reached; never one, but for the last."""
    group: Group = []
    characters = 0
    for passage in passages:
        group.append(passage)
        characters += len(passage.text)
        if len(group) == GROUP or characters >= LONGEST and len(group) > 1:
            yield group
            group, characters = [], 0
    if group:
        yield group


def divided(groups: Iterable[Group], share: float, seed: int) -> Iterator[tuple[Group, list[bool]]]:
    """Each group with what is held out of it: about `share` of all passages so far, at random but always the same.

    One passage at least is held out, and one is not. A single document is cut in passages as long as the smaller side.
    Raises ValueError if there is a single document that cannot be cut.
    """
    seen = held = 0
    for number, group in enumerate(groups):
        if len(group) == 1 and not number:
            text = group[0].text
            group = cut(text, max(1, round(len(text) * min(share, 1 - share))))
            if len(group) == 1:
                raise ValueError(
                    "data.source: expected at least two documents, to hold one out, got a single short one; give more "
                    "text, or a directory with a file named held_out"
                )
        seen += len(group)
        most = len(group) - 1 if not number else len(group)
        count = min(max(round(share * seen) - held, 0 if number else 1), most)
        held += count
        chosen = np.random.default_rng((seed, number)).permutation(len(group)) < count
        yield group, chosen.tolist()
