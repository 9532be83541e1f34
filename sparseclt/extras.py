"""The error raised where a package of an extra is missing. Needs the standard library only."""

INSTALL = "pip install 'sparseclt[train]'"


def missing_extra(what: str, error: ModuleNotFoundError) -> ImportError:
    """The error to raise in place of `error`, naming the extra that installs what `what` needs.

    It is `error` itself where a module of our own is missing: no extra would bring that.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "sparseclt", "csrc_triton"):
        return error
    return ImportError(f"{what} needs {package}, which is not installed: {INSTALL}", name=error.name)
