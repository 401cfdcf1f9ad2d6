"""The peer map: who holds which blocks, as data and as a table for people.

Imports late what a question to the own daemon does not need: `swarm status` is quick.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swarm import interrupts
from swarm.control import ask_daemon

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from swarm.invite import Invite
    from swarm.record import PeerRecord

_BAR = " ▁▂▃▄▅▆▇█"


def status_of(
    records: "Sequence[PeerRecord]", round_trips: Mapping[str, float], own: str = ""
) -> dict[str, Any]:
    """Return the map in the form of `swarm status --json`. Round trips in seconds by peer."""
    from collections import Counter

    from routing.coverage import coverage, uncovered
    from swarm.digests import outvoted
    from swarm.record import offer_of

    if not records:
        return {
            "model": None,
            "fingerprint": None,
            "blocks": 0,
            "healthy": False,
            "coverage": [],
            "uncovered": [],
            "peers": [],
        }
    # One peer that announces something else must not decide what the swarm serves.
    usual = Counter((record.fingerprint, record.blocks) for record in records)
    (fingerprint, blocks), _ = usual.most_common(1)[0]
    ours = [r for r in records if (r.fingerprint, r.blocks) == (fingerprint, blocks)]
    offers = [offer_of(record) for record in ours]
    gaps = [str(span) for span in uncovered(offers, blocks)]
    wrong = outvoted(ours)
    ordered = sorted(ours, key=lambda record: (record.held.start, record.held.stop, record.peer))
    return {
        "model": ours[0].model_name,
        "fingerprint": fingerprint,
        "blocks": blocks,
        "healthy": not gaps,
        "coverage": [round(speed, 3) for speed in coverage(offers, blocks)],
        "uncovered": gaps,
        "peers": [
            {
                **_peer(record, round_trips, own),
                "differs": [str(span) for span in wrong.get(record.peer, ())],
            }
            for record in ordered
        ],
    }


def _peer(record: "PeerRecord", round_trips: Mapping[str, float], own: str) -> dict[str, Any]:
    from swarm.record import offer_of

    rtt = 0.0 if record.peer == own else round_trips.get(record.peer)
    return {
        "peer": record.peer,
        "name": record.name,
        "span": record.span,
        "state": record.state,
        "tokens_per_second": round(offer_of(record).tokens_per_second(record.blocks), 3),
        "rtt_ms": None if rtt is None else round(rtt * 1000, 2),
        "free_tokens": record.free_tokens,
        "quant": record.quantization,
        "dtype": record.dtype,
        "device": record.device,
        "version": record.version,
    }


def rendered(status: Mapping[str, Any]) -> "RenderableType":
    """Return the map for a terminal: the model, its coverage with holes in red, the peers."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not status["peers"]:
        return Text("No server has announced itself yet.")
    health = (
        "healthy" if status["healthy"] else f"blocks {', '.join(status['uncovered'])} uncovered"
    )
    head = Text(f"{status['model']}, {status['blocks']} blocks: ")
    head.append(health, style="green" if status["healthy"] else "bold red")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("peer", "name", "blocks", "", "state", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens/s", "ms away", "free tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for peer in status["peers"]:
        table.add_row(*_row(peer, status["blocks"]))
    return Group(head, _coverage(status["coverage"]), table)


def _coverage(speeds: Sequence[float]) -> Any:
    """A mark for each block, higher for more tokens per second; a red x where nobody serves."""
    from rich.text import Text

    line = Text("served  ")
    highest = max(speeds, default=0.0)
    for speed in speeds:
        if speed <= 0:
            line.append("x", style="bold red")
        else:
            line.append(_BAR[max(1, round(speed / highest * 8))], style="green")
    return line


def _row(peer: Mapping[str, Any], blocks: int) -> list["Text"]:
    from rich.text import Text

    start, stop = map(int, peer["span"].split(":"))
    width = min(blocks, 40)
    first, last = start * width // blocks, max(stop * width // blocks, start * width // blocks + 1)
    held = "·" * first + "█" * (last - first) + "·" * (width - last)
    rtt = peer["rtt_ms"]
    cells = [
        f"…{peer['peer'][-8:]}",
        peer["name"],
        peer["span"],
        held,
        "damaged?" if peer["differs"] else peer["state"],
        peer["dtype"] if peer["quant"] == "none" else peer["quant"],
        f"{peer['tokens_per_second']:.1f}",
        "?" if rtt is None else f"{rtt:.1f}",
        str(peer["free_tokens"]),
    ]
    return [Text(cell) for cell in cells]  # what peers say of themselves is no markup


def find_status(join: str | None) -> dict[str, Any]:
    """Return the map as this user's daemon sees it or, with a join token, as a newcomer does.

    Raises BadInput if there is neither, and what `open_joined` raises.
    """
    if join is None:
        return ask_daemon("status")
    from swarm.invite import decode_invite

    return interrupts.run(_joined_status, decode_invite(join))


async def _joined_status(invite: "Invite") -> dict[str, Any]:
    from swarm.prompt import open_joined

    async with open_joined(invite) as client:
        await client.refresh(is_whole=True)  # a client needs the best of each block, a map all
        return status_of(client.records(), client.whereabouts.round_trips)
