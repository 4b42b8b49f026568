"""The command ``prenet4d``; the base installation answers it with what is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        from prenet4d_server.cli import run
    except ModuleNotFoundError as missing:
        if missing.name not in {"typer", "rich"}:
            raise
        print("The command needs the server extra: pip install 'prenet4d[server]'", file=sys.stderr)
        sys.exit(1)
    sys.exit(run())


if __name__ == "__main__":
    main()
