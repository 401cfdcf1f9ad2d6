"""`swarm api`: a peer that serves nothing but HTTP."""

from typing import Annotated

import typer

from swarm import interrupts
from swarm.commands.options import AllowOrigin, ApiKey, ApiKeyFile, Join, Json


def api(
    join: Join = None,
    host: Annotated[
        str, typer.Option(envvar="SWARM_API_HOST", help="The address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            envvar="SWARM_API_PORT", min=0, max=65535, help="The port to listen on, 0 for any."
        ),
    ] = 0,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    allow_origin: AllowOrigin = None,
    patience: Annotated[
        float,
        typer.Option(
            envvar="SWARM_PATIENCE",
            min=0,
            help="Seconds to look for servers of all blocks, at first and when one is lost.",
        ),
    ] = 10.0,
    as_json: Json = False,
) -> None:
    """Answer programs that speak OpenAI's or Anthropic's API, by a swarm, until Ctrl-C.

    Prints the base URL that they need; OpenAI's take it with /v1 behind.
    Without --join, the swarm of your running daemon (`swarm serve`) is asked. If none
    runs, a private swarm of three peers runs the demo model in this process.
    """
    from swarm.console import Console, readable_errors

    with readable_errors(is_json=as_json):
        from swarm.gateway.door import open_door
        from swarm.gateway.settings import GatewaySettings, read_keys, read_origins

        settings = GatewaySettings(
            host=host,
            port=port,
            keys=read_keys(tuple(api_key or ()), api_key_file),
            origins=read_origins(tuple(allow_origin or ())),
            route_seconds=patience,
        )
        door = open_door(settings)
        from swarm.gateway.entry import run_api

        with Console(is_json=as_json) as console:
            interrupts.run(run_api, door, join, console)
