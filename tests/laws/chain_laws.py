"""What must hold of each peer, each link and each step of the explored chain, at every moment."""

from collections import deque
from collections.abc import Iterable, Set

from chain_client import Broken
from chain_links import End, Link

from swarm.chain import CREDIT_PIECE, FIRST_CREDIT
from swarm.leg import Leg
from swarm.legs import Legs
from swarm.messages import HopName, Message, Output, Step, payload_bytes


def check_credit(link: Link, queue: deque[Message | End]) -> None:
    sizes = [payload_bytes(m.payload) for m in queue if isinstance(m, Step | Output)]
    if sizes and sum(sizes) > max(FIRST_CREDIT, CREDIT_PIECE + max(sizes)):
        raise Broken(f"more travels to {link.ends} than its credit")


def check_sent(step: Step, link: int, first: HopName, legs: Iterable[Leg]) -> None:
    """The client sends a step again only to a first hop that does not have it.

    Where it need not ask (mode new), it may only find out by the Ready on this stream.
    """
    for leg in legs:
        has_it = leg.span == first.span and leg.admitted >= step.serial and not leg.is_spent
        if has_it and (leg.up == link or first.mode == "keep"):
            raise Broken(f"the client sends serial {step.serial} to {first.peer}, which has it")


def check_peer(name: str, peer: Legs, timers: Set[int]) -> None:
    legs, taken = list(peer.legs()), set[int]()
    for leg in legs:
        outlets = [outlet.link for outlet in (leg.down, leg.downlink) if outlet is not None]
        links = outlets if leg.up is None else [leg.up, *outlets]
        if any(peer._by_link.get(link) is not leg for link in links):
            raise Broken(f"{name} does not hear a stream of its leg {leg.span}")
        taken |= set(links)
        if peer._highest[leg.client, leg.session] < leg.epoch:
            raise Broken(f"{name} forgot the highest epoch")
        if leg.up is None and leg.number not in timers:
            raise Broken(f"{name} has an orphan {leg.span} that nothing ends")
        blocks = set(range(*map(int, leg.span.split(":"))))
        for other in legs:
            if other is not leg and blocks & set(range(*map(int, other.span.split(":")))):
                raise Broken(f"{name} holds a block of the session twice")
        _check_history(name, leg)
    if set(peer._by_link) != taken:
        raise Broken(f"{name} remembers streams it has left")
    if any(not leg._inlet.is_within_credit for leg in legs):
        raise Broken(f"{name} was sent more than its credit")
    if peer.waiting_bytes != sum(leg.waiting_bytes for leg in legs):
        raise Broken(f"{name} has lost count of what waits")
    most, alone = peer._most_waiting, max((leg.waiting_bytes for leg in legs), default=0)
    if peer.waiting_bytes > most and peer.waiting_bytes != alone:
        raise Broken(f"at {name} more waits than it has room for")
    if peer.history_bytes != sum(leg.history.byte_count for leg in legs):
        raise Broken(f"{name} has lost count of its histories")


def _check_history(name: str, leg: Leg) -> None:
    """What a link that lives may still be sent is there: nothing of it was dropped."""
    history, down = leg.history, leg.down
    if history.byte_count != sum(payload_bytes(entry.payload) for entry in history.entries):
        raise Broken(f"{name} has lost count of a history")
    if leg.waiting_bytes != sum(size for _, _, size in leg._waiting):
        raise Broken(f"{name} has lost count of the steps of a leg")
    if down is not None and down.is_known and not history.reaches(down.sent):
        raise Broken(f"{name} has dropped what its next hop lacks")
