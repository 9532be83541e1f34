"""Which implementation of an op runs: one table, filled as the ops are defined, one look-up a call."""

from collections.abc import Callable
from typing import Any, TypeVar

AUTOMATIC = "torch"

_Implementation = TypeVar("_Implementation", bound=Callable[..., Any])
_implementations: dict[tuple[str, str], Callable[..., Any]] = {}


def implements(op: str, backend: str) -> Callable[[_Implementation], _Implementation]:
    """Decorator: the function is what `backend` runs for `op`. It is called with checked arguments."""

    def register(implementation: _Implementation) -> _Implementation:
        _implementations[op, backend] = implementation
        return implementation

    return register


def lookup(op: str, backend: str | None) -> Callable[..., Any]:
    """The implementation of `op` named `backend`, the automatic choice for None.

    Raises ValueError, listing what exists, for a backend that is unknown or has no such op.
    """
    name = AUTOMATIC if backend is None else backend
    try:
        return _implementations[op, name]
    except KeyError:
        known = ", ".join(repr(b) for o, b in _implementations if o == op)
        raise ValueError(f"backend of {op}: expected one of {known} or None (automatic), got {name!r}") from None


def backends() -> tuple[str, ...]:
    """Names accepted by every op's `backend` argument."""
    return tuple(dict.fromkeys(name for _, name in _implementations))
