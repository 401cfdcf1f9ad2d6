"""What a command was asked to do, checked, and where this program keeps its things."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from routing.span import Span
from swarm.errors import BadInput

DEMO_FOLDER = Path(__file__).parent / "demo"
DEFAULT_TOKENS = 64
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTS = ("auto", "none", "int8", "nf4")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MOST_BYTES = 1 << 60
_MOST_NAME = 64  # a column of the peer map
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def home() -> Path:
    """The folder for keys, sockets and what is remembered: SWARM_HOME, or the system's choice."""
    chosen = os.environ.get("SWARM_HOME")
    return Path(chosen) if chosen else platformdirs.user_state_path("swarm")


def cache_home() -> Path:
    """The folder for what can be fetched again."""
    chosen = os.environ.get("SWARM_HOME")
    return Path(chosen) / "cache" if chosen else platformdirs.user_cache_path("swarm")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """What `swarm serve` was asked to do."""

    model: Path | str | None = None  # a folder, a hub name, or the swarm's own (or the demo)
    blocks: Span | int | None = None  # None: as much as fits, where it is needed most
    join: str | None = None
    is_public: bool = False
    dtype: str = "auto"
    quant: str = "auto"
    is_unproven: bool = False  # serve a model type whose test fails, too
    device: str = "cpu"
    memory_bytes: int | None = None
    context_tokens: int | None = None  # of one conversation, to plan memory for
    disk_bytes: int | None = None  # for all shards of the model that are here; None: what is free
    listen: str = "0.0.0.0"  # a server of a swarm is there to be reached
    port: int | None = None  # None: the one used before, or any
    announce: tuple[str, ...] = ()
    is_only_announced: bool = False  # tell others no address but those of `announce`
    identity: Path | None = None
    name: str = ""
    threads: int | None = None


def parse_blocks(text: str) -> Span | int | None:
    """Read --blocks: "8:16", "12" or "auto" (None). BadInput says what is allowed."""
    if text == "auto":
        return None
    try:
        if ":" in text:
            return Span.parse(text)
        if int(text) > 0:
            return int(text)
    except ValueError:
        pass
    raise BadInput(
        f"--blocks {text} is not a choice of blocks",
        next_step="give a span like 8:16, a count like 12, or auto",
    )


def parse_model(text: str) -> Path | str:
    """Read MODEL: a folder that exists, or a name that the hub may know. BadInput for neither."""
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise BadInput(f"{text} is a file", next_step="name the folder that holds config.json")
    if _HUB_NAME.fullmatch(text) is None:
        raise BadInput(
            f"there is no folder {text}", next_step="name a model's folder, or a hub name a/b"
        )
    return text


def parse_dtype(text: str) -> str:
    """Read --dtype. BadInput says what is allowed."""
    if text not in DTYPES:
        raise BadInput(f"--dtype {text} is unknown", next_step=f"choose {', '.join(DTYPES)}")
    return text


def parse_quant(text: str) -> str:
    """Read --quant. BadInput says what is allowed."""
    if text not in QUANTS:
        raise BadInput(f"--quant {text} is unknown", next_step=f"choose {', '.join(QUANTS)}")
    return text


def parse_bytes(text: str, option: str = "--memory") -> int:
    """Read "8GB", "500M" or plain bytes. BadInput says what is allowed for the option."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    amount = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if not 1 <= amount < _MOST_BYTES:
        raise BadInput(f"{option} {text} is not an amount", next_step="give one like 8GB or 500MB")
    return int(amount)


def parse_name(text: str) -> str:
    """Read --name: one line that fits into a record. BadInput for another."""
    if len(text) > _MOST_NAME or not text.isprintable():
        raise BadInput(
            "--name is not a name for the peer map",
            next_step=f"give one line of at most {_MOST_NAME} characters",
        )
    return text
