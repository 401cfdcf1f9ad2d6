"""`swarm doctor plan`: what a model would need of a list of machines. No weight is read.

1. The plan is made by the code that places and routes real servers (`routing.plan`).
2. The file of peers is TOML; what is wrong in it is named with the peer it stands at.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from routing.placement import BlockSizes
from routing.plan import Holding, Machine, Plan, plan_swarm
from swarm.errors import BadInput
from swarm.settings import parse_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_PEERS = 10_000


class _Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of the file."""

    memory: str
    reads: str = "20GB"  # bytes of weights per second: what an office machine's memory gives
    rtt_ms: float = 50.0
    name: str = ""
    count: int = 1


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    peer: list[_Peer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is planned: a model as its sizes tell, and how it travels."""

    name: str
    dtype: str
    quant: str
    sizes: BlockSizes
    bytes_per_token: int  # between two hops


def read_machines(path: Path) -> tuple[Machine, ...]:
    """Return the machines a file of peers lists. BadInput says what is wrong where."""
    try:
        told = msgspec.convert(tomllib.loads(path.read_text("utf-8")), _File)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise BadInput(
            f"{path} is no list of peers: {error}",
            next_step='write entries like [[peer]] memory = "24GB" reads = "300GB" rtt_ms = 20',
        ) from error
    machines: list[Machine] = []
    for number, peer in enumerate(told.peer, start=1):
        name = peer.name or f"peer-{number}"
        if not 1 <= peer.count <= _MOST_PEERS - len(machines):
            raise BadInput(f"{name} in {path}: a count is 1 to {_MOST_PEERS} peers in all")
        try:
            machines += [_machine(peer, name, copy) for copy in range(1, peer.count + 1)]
        except (ValueError, BadInput) as error:
            raise BadInput(f"{name} in {path}: {error}") from error
    if len({machine.name for machine in machines}) < len(machines):
        raise BadInput(f"two peers of {path} have one name", next_step="name each differently")
    return tuple(machines)


def _machine(peer: _Peer, name: str, copy: int) -> Machine:
    return Machine(
        name=name if peer.count == 1 else f"{name}-{copy}",
        memory_bytes=parse_bytes(peer.memory, "memory"),
        bytes_per_second=float(parse_bytes(peer.reads, "reads")),
        round_trip_seconds=peer.rtt_ms / 1000,
    )


def report_of(wanted: Wanted, machines: tuple[Machine, ...]) -> dict[str, Any]:
    """Return the plan as --json prints it; bytes are bytes and times are seconds."""
    plan = plan_swarm(machines, wanted.sizes, wanted.bytes_per_token)
    sizes = wanted.sizes
    route = plan.route
    return {
        "model": wanted.name,
        "blocks": sizes.blocks,
        "dtype": wanted.dtype,
        "quant": wanted.quant,
        "weight_bytes": sum(sizes.block_bytes),
        "end_bytes": _ends(sizes),
        "cache_bytes_per_block_token": sizes.cache_bytes_per_token,
        "tokens": sizes.cache_tokens,
        "peers": [_peer_facts(holding) for holding in plan.holdings],
        "route": [{"peer": hop.peer, "span": str(hop.span)} for hop in route.hops] if route else [],
        "seconds_per_token": route.seconds if route else None,
        "missing": [str(span) for span in plan.missing],
        "missing_bytes": plan.missing_bytes,
        "is_complete": not plan.missing,
        "unused": _unused(plan),
    }


def _ends(sizes: BlockSizes) -> int:
    return sizes.embedding_bytes + (0 if sizes.is_tied else sizes.head_bytes)


def _unused(plan: Plan) -> list[str]:
    """Machines into which not even one block fits."""
    return [holding.machine for holding in plan.holdings if holding.span is None]


def _peer_facts(holding: Holding) -> dict[str, Any]:
    return {
        "peer": holding.machine,
        "span": str(holding.span) if holding.span else None,
        "weight_bytes": holding.weight_bytes,
        "end_bytes": holding.end_bytes,
        "cache_bytes": holding.cache_bytes,
        "history_bytes": holding.history_bytes,
        "usable_bytes": holding.usable_bytes,
        "seconds": holding.seconds,
    }


def rendered(report: Mapping[str, Any]) -> "RenderableType":
    """Return the plan for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Text(
        f"{report['model']}: {report['blocks']} blocks in {_format(report)}, "
        f"{_gigabytes(report['weight_bytes'])} and {_gigabytes(report['end_bytes'])} of ends; "
        f"room for {report['tokens']} tokens at {report['cache_bytes_per_block_token']} bytes "
        "a block each."
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("peer", "blocks"):
        table.add_column(name, no_wrap=True)
    for name in ("weights", "ends", "cache", "history", "of", "ms a token"):
        table.add_column(name, justify="right", no_wrap=True)
    for peer in report["peers"]:
        sizes = ("weight_bytes", "end_bytes", "cache_bytes", "history_bytes", "usable_bytes")
        cells = [_gigabytes(peer[name]) for name in sizes]
        span = peer["span"] or "none fits"
        table.add_row(peer["peer"], span, *cells, f"{peer['seconds'] * 1000:.1f}")
    return Group(head, table, Text(_conclusion(report)))


def _format(report: Mapping[str, Any]) -> str:
    return report["dtype"] if report["quant"] == "none" else f"{report['quant']}"


def _conclusion(report: Mapping[str, Any]) -> str:
    if report["missing"]:
        spans = ", ".join(report["missing"])
        needed = _gigabytes(report["missing_bytes"])
        return f"Nobody has room for blocks {spans}: {needed} more are needed, and a fifth on top."
    hops = " -> ".join(f"{hop['peer']} ({hop['span']})" for hop in report["route"])
    seconds = report["seconds_per_token"]
    return f"A token takes {seconds * 1000:.0f} ms ({1 / seconds:.1f} a second) over {hops}."


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
