"""Options that several commands share."""

import re
from pathlib import Path
from typing import Annotated

import typer

from swarm.errors import BadInput

_DEVICE = re.compile(r"cpu|(cuda|mps|xpu)(:[0-9]+)?")
_MOST_THREADS = 1024  # more than any machine has cores


def _join_token(token: str | None) -> str | None:
    """Tell a damaged token before anything is loaded or asked; an empty one is no token, too."""
    if token is not None:
        from swarm.invite import decode_invite

        decode_invite(token)
    return token


def _device(name: str) -> str:
    if _DEVICE.fullmatch(name) is None:
        raise BadInput(f"--device {name} is unknown", next_step="choose cpu, cuda or cuda:1")
    return name


def model_name(name: str | None) -> str | None:
    """What an argument MODEL is called with: an empty one is a variable that was never set."""
    if name == "":
        raise BadInput("MODEL is empty", next_step="name a model's folder, or a hub name")
    return name


Join = Annotated[
    str | None,
    typer.Option(
        "--join",
        envvar="SWARM_JOIN",
        metavar="TOKEN",
        callback=_join_token,
        help="The swarm's join token, as `swarm serve` and `swarm invite` print it.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", envvar="SWARM_JSON", help="Print JSON on stdout, errors too.")
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        envvar="SWARM_API_KEY",
        metavar="KEY",
        help="A secret that programs must show the API to be answered. May be repeated. "
        "Default: nobody needs one.",
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        envvar="SWARM_API_KEY_FILE",
        metavar="FILE",
        help="A file of such secrets, one a line; other users cannot see it, as they can options.",
    ),
]
AllowOrigin = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin",
        envvar="SWARM_ALLOW_ORIGIN",
        metavar="ORIGIN",
        help="Let pages of this origin ask the API from a browser, like https://chat.example.org, "
        "or * for any. May be repeated. Default: no page may.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        envvar="SWARM_DTYPE",
        help="The numbers to compute with: auto (the checkpoint's own), float32, bfloat16 or "
        "float16.",
    ),
]
QuantName = Annotated[
    str,
    typer.Option(
        envvar="SWARM_QUANT",
        help="Hold the weights in 8 bits (int8) or 4 (nf4), less exactly: none, int8, nf4, or auto "
        "(only if the blocks would not fit otherwise).",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        envvar="SWARM_DEVICE", callback=_device, help="Where to compute: cpu, cuda, cuda:1."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        envvar="SWARM_MEMORY", help="The most memory to use, like 8GB. Default: what is free."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        envvar="SWARM_THREADS",
        min=1,
        max=_MOST_THREADS,
        help="Threads to compute with. Default: one for each core.",
    ),
]
