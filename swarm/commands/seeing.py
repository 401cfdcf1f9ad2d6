"""`swarm status` and `swarm invite`: what there is, and the way in."""

import json
import sys
from typing import Annotated, Any

import typer

from swarm.commands.options import Join, Json
from swarm.errors import EXIT_UNCOVERED


def status(
    join: Join = None,
    as_json: Json = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", envvar="SWARM_WATCH", help="Show it again every two seconds, until Ctrl-C."
        ),
    ] = False,
) -> None:
    """Show the peer map: who holds which blocks, how fast, how far.

    The exit code is 3 if some block is served by nobody.
    """
    from swarm.console import readable_errors

    with readable_errors(is_json=as_json):
        import time

        from swarm.status import find_status

        while True:
            found = find_status(join)
            if as_json:
                print(json.dumps(found), flush=True)
            else:
                _print_map(found, is_cleared=watch)
            if not watch:
                break
            time.sleep(2.0)
        if not found["healthy"]:
            sys.exit(EXIT_UNCOVERED)


def invite(as_json: Json = False) -> None:
    """Print a join token of the swarm that your running daemon (`swarm serve`) serves in."""
    from swarm.console import readable_errors

    with readable_errors(is_json=as_json):
        from swarm.control import ask_daemon

        token = ask_daemon("invite")["join"]
        print(json.dumps({"join": token}) if as_json else token, flush=True)


def _print_map(found: dict[str, Any], *, is_cleared: bool) -> None:
    from rich.console import Console as Terminal

    from swarm.status import rendered

    terminal = Terminal(highlight=False)
    if is_cleared:
        terminal.clear()
    terminal.print(rendered(found))
