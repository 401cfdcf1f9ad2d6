"""`swarm serve`: a peer that holds blocks."""

from pathlib import Path
from typing import Annotated

import typer

from swarm import interrupts
from swarm.commands.options import (
    AllowOrigin,
    ApiKey,
    ApiKeyFile,
    Device,
    Dtype,
    Join,
    Json,
    Memory,
    QuantName,
    Threads,
    model_name,
)
from swarm.errors import BadInput


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            envvar="SWARM_MODEL",
            metavar="MODEL",
            callback=model_name,
            help="A folder with config.json and safetensors shards, or a hub name. "
            "Without it: the swarm's model with --join, else the small demo model.",
        ),
    ] = None,
    blocks: Annotated[
        str,
        typer.Option(
            envvar="SWARM_BLOCKS",
            help="Which to hold: 8:16 (blocks 8 to 15), 12 (so many) or auto (what fits into "
            "memory); the last two are taken where they are needed most.",
        ),
    ] = "auto",
    join: Join = None,
    public: Annotated[
        bool,
        typer.Option(
            "--public",
            envvar="SWARM_PUBLIC",
            help="Found a swarm that everyone may enter who knows a peer's address.",
        ),
    ] = False,
    dtype: Dtype = "auto",
    quant: QuantName = "auto",
    device: Device = "cpu",
    memory: Memory = None,
    context: Annotated[
        int | None,
        typer.Option(
            envvar="SWARM_CONTEXT",
            min=1,
            help="The tokens of one conversation to plan memory for. Default: what the model "
            "takes, at most 32768.",
        ),
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(
            envvar="SWARM_DISK",
            help="The most room for a hub model's shards, like 50GB. Default: what is free.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(envvar="SWARM_HOST", help="The address to listen on.")
    ] = "0.0.0.0",
    port: Annotated[
        int | None,
        typer.Option(
            envvar="SWARM_PORT",
            min=0,
            max=65535,
            help="The TCP port to listen on, 0 for any. Default: the one used before.",
        ),
    ] = None,
    announce: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SWARM_ANNOUNCE",
            help="Tell others this address of yours too, say your router's that sends its port "
            "here: /ip4/203.0.113.5/tcp/4001. May be repeated.",
        ),
    ] = None,
    only_announced: Annotated[
        bool,
        typer.Option(
            "--only-announced",
            envvar="SWARM_ONLY_ANNOUNCED",
            help="Tell others the addresses of --announce alone.",
        ),
    ] = False,
    identity: Annotated[
        Path | None,
        typer.Option(
            envvar="SWARM_IDENTITY",
            help="The file of this peer's key, made if missing. Default: the first not in use.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(envvar="SWARM_NAME", help="What the peer map calls this peer.")
    ] = "",
    threads: Threads = None,
    api: Annotated[
        str | None,
        typer.Option(
            envvar="SWARM_API",
            metavar="HOST:PORT",
            help="Answer programs that speak OpenAI's or Anthropic's API there, too. Without "
            "HOST: on loopback.",
        ),
    ] = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    allow_origin: AllowOrigin = None,
    unproven: Annotated[
        bool,
        typer.Option(
            "--unproven",
            envvar="SWARM_UNPROVEN",
            help="Serve a model type that fails its test, too: what it says may be wrong.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Hold some blocks of MODEL and serve them until Ctrl-C.

    Prints how others join, once it serves. The first Ctrl-C finishes what runs,
    the second leaves at once.
    """
    from swarm.console import Console, readable_errors

    with readable_errors(is_json=as_json):
        from swarm import settings as checked

        settings = checked.ServeSettings(
            model=checked.parse_model(model) if model else None,
            blocks=checked.parse_blocks(blocks),
            join=join,
            is_public=public,
            dtype=checked.parse_dtype(dtype),
            quant=checked.parse_quant(quant),
            is_unproven=unproven,
            device=device,
            memory_bytes=checked.parse_bytes(memory) if memory else None,
            context_tokens=context,
            disk_bytes=checked.parse_bytes(disk, "--disk") if disk else None,
            listen=host,
            port=port,
            announce=tuple(announce or ()),
            is_only_announced=only_announced,
            identity=identity,
            name=checked.parse_name(name),
            threads=threads,
        )
        if only_announced and not announce:
            raise BadInput(
                "--only-announced needs an address to announce", next_step="give --announce"
            )
        door = None
        if api is not None:
            from swarm.gateway import settings as gateway
            from swarm.gateway.door import open_door

            address, number = gateway.parse_address(api)
            keys = gateway.read_keys(tuple(api_key or ()), api_key_file)
            origins = gateway.read_origins(tuple(allow_origin or ()))
            door = open_door(
                gateway.GatewaySettings(host=address, port=number, keys=keys, origins=origins)
            )
        from swarm.serve import serve as run_server

        with Console(is_json=as_json) as console:
            interrupts.run(run_server, settings, console, door)
