"""The command ``prenet4d``; the base installation answers it with what is missing."""

from __future__ import annotations

import signal
import sys
from typing import Any


def main() -> None:
    """Run the command line and exit with its status."""
    _on_ctrl_c(signal.SIG_DFL)  # it ends at once, and quietly, in the middle of an import
    try:
        from prenet4d_server.cli import run
    except ModuleNotFoundError as missing:
        if missing.name not in {"typer", "rich"}:
            raise
        print("The command needs the server extra: pip install 'prenet4d[server]'", file=sys.stderr)
        sys.exit(1)
    _on_ctrl_c(signal.default_int_handler)
    status = run()
    _on_ctrl_c(signal.SIG_DFL)  # and while Python puts its things away
    sys.exit(status)


def _on_ctrl_c(handler: Any) -> None:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is in a shell's background
        signal.signal(signal.SIGINT, handler)


if __name__ == "__main__":
    main()
