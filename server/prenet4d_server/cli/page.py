"""``prenet4d dashboard``: the operator's page on another machine than the service's."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated

import typer

from prenet4d_server.cli.arguments import ClientKeyOption, ServerKeyOption, address


def _parse_host(text: str) -> str:
    """A host as it is written in an address: IPv6 in brackets."""
    bare = text.removeprefix("[").removesuffix("]")
    try:
        return f"[{bare}]" if ipaddress.ip_address(bare).version == 6 else bare
    except ValueError:
        if re.fullmatch(r"[\w.-]+", text):
            return text
    raise typer.BadParameter(
        f"{text!r} is no host: write its name or number alone, for example microscope-pc; other "
        "ports go with --stream and --control."
    )


def dashboard(
    connect: Annotated[
        str, typer.Option(parser=_parse_host, metavar="HOST", help="Where the service runs.")
    ] = "127.0.0.1",
    stream: Annotated[
        str | None, address("--stream", "The service's stream address; port 5561 by default.")
    ] = None,
    control: Annotated[
        str | None, address("--control", "The service's control address; port 5563 by default.")
    ] = None,
    listen: Annotated[
        str, address("--listen", "Where browsers find the page.")
    ] = "tcp://127.0.0.1:5564",
    token: Annotated[
        str | None,
        typer.Option(
            envvar="PRENET4D_HTTP__OPERATOR_TOKEN",
            help="Who opens the page with it may command; by default one is made.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The file that holds the token, and keeps it; made if missing."
        ),
    ] = None,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine; HTTP is not encrypted.")
    ] = False,
) -> None:
    """Serve the operator's page here, for a service that runs elsewhere."""
    from prenet4d_client import ControlClient, Subscriber
    from prenet4d_server import logs
    from prenet4d_server.config import LogSettings
    from prenet4d_server.errors import ConfigError
    from prenet4d_server.page.operator_token import OperatorToken
    from prenet4d_server.page.process import serve_page
    from prenet4d_server.page.settings import PageSettings, ServiceAddress
    from prenet4d_server.page.supervisor import listen as open_listening
    from prenet4d_server.service import stopped_by_signals
    from prenet4d_server.sockets import is_local

    if not is_local(listen) and not insecure:
        raise ConfigError(
            f"{listen} can be reached from other machines, and HTTP is not encrypted. Listen on "
            "127.0.0.1 and let others in through an ssh tunnel, or say --insecure."
        )
    service = ServiceAddress(
        stream=stream or f"tcp://{connect}:5561",
        control=control or f"tcp://{connect}:5563",
        server_key=server_key,
        client_keys=client_key,
    )
    # Nobody needs to answer yet; what can be no address or key is refused here, before we listen.
    Subscriber(service.stream, server_key=server_key).close()
    ControlClient(service.control, server_key=server_key, keys=client_key).close()
    if token and token_file:
        raise ConfigError("Give --token or --token-file, not both.")
    operator = OperatorToken(token or None, token_file)
    with stopped_by_signals() as stop:
        listening, url = open_listening(listen, "--listen")
        logs.configure(LogSettings(), "page")
        with listening:
            print(
                f"Look:    {url}/\nCommand: {operator.address(url)}\nStop with Ctrl-C.", flush=True
            )
            serve_page(
                PageSettings(service=service, operator_token=operator.secret), listening, stop
            )


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the command line."""
    app.command(epilog="Example:  [bold]prenet4d dashboard --connect microscope-pc[/bold]")(
        dashboard
    )
