"""The `sparseclt` command, also `python -m sparseclt`: says what to install where the extra `train` is missing."""

import sys

from sparseclt.extras import missing_extra


def main() -> int:
    """Exit status of `sparseclt.cli.main`; 2, with one line on standard error, where a package is missing."""
    try:
        from sparseclt import cli

        return cli.main()
    except ModuleNotFoundError as error:
        missing = missing_extra("the sparseclt command", error)
        if missing is error:
            raise
        print(f"sparseclt: {missing}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
