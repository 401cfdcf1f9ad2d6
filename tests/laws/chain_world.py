"""A world for the chain's real machines: peers, one client, links, faults, and what must hold.

1. Whatever can happen next is an event in a list; a scheduler picks one. Nothing else happens.
2. A link is two queues. What is in flight when it breaks may be lost from any point on, each way.
3. After every event the laws of docs/protocol.md are checked; a breach raises Broken.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from chain_client import CLIENT, Broken, Client, Scenario, is_first, peer_name
from chain_laws import check_credit, check_peer, check_sent
from chain_links import DOWN, UP, End, Link
from chain_peer import Peer
from chain_stack import Stack, payload_of, truth

from swarm.chain import Dial, Send, Shut
from swarm.legs import Legs
from swarm.messages import (
    Attach,
    Close,
    Fault,
    FaultKind,
    HopTime,
    Message,
    Open,
    Step,
)
from swarm.session import Deliver, Trouble

Event = tuple[Any, ...]


class World:
    """All that takes part in one session, and all that can happen to it."""

    def __init__(self, scenario: Scenario, rng: Random | None = None) -> None:
        self.scenario = scenario
        self.rng = rng
        self.budget = scenario.budget
        self.links: dict[int, Link] = {}
        self.numbers = 0
        self.has_expired = self.may_be_forgotten = self.has_dropped = self.has_evicted = False
        self.dials: set[tuple[object, ...]] = set()
        self.peers = [Peer(scenario, self.new_link) for _ in scenario.held]
        self.computed = 0  # positions, of the session looked at
        if scenario.before:
            self._live_through(replace(scenario, prompt=scenario.before, before=()))
        self.client = Client(scenario, self.new_link)
        self.carry_out(CLIENT, self.client.start())

    def _live_through(self, scenario: Scenario) -> None:
        """Let a session come to its end without a fault."""
        self.client = Client(scenario, self.new_link, b"b" * 16)
        self.carry_out(CLIENT, self.client.start())
        while events := self.events():
            self.do(events[0])
        if self.client.state != "done":
            raise Broken("the session before did not end")
        self.dials.clear()
        self.computed = 0

    def new_link(self) -> int:
        self.numbers += 1
        return self.numbers

    # --- what the machines ask for -------------------------------------------------------------

    def carry_out(self, who: str, actions: Sequence[object]) -> None:
        waiting = deque(actions)
        while waiting:
            match waiting.popleft():
                case Dial() as dial:
                    self._dial(who, dial)
                case Send(link=link, message=message):
                    self._send(who, link, message)
                case Shut(link=link):
                    self._shut(who, link)
                case Deliver(output=output):
                    waiting.extend(self.client.delivered(output))
                case Trouble() as trouble:
                    self._check_trouble(trouble)
                    self.client.noted(trouble)
                case action:
                    self._peer(who).carry_out(action)
        if who != CLIENT:
            for number in self._peer(who).to_drop():
                self._drop(who, number)

    def _drop(self, who: str, number: int) -> None:
        peer = self._peer(who)
        self.has_dropped |= number not in peer.sharing
        self.carry_out(who, peer.legs.drop_history(number))

    def _peer(self, name: str) -> Peer:
        return self.peers[int(name.removeprefix("peer"))]

    def _dial(self, who: str, dial: Dial) -> None:
        if isinstance(dial.first, Open):
            opened = dial.first
            mark = (who, opened.at, opened.hops[opened.at], opened.epoch)
            if mark in self.dials and who not in self.client.failed:
                raise Broken(f"{who} dials {opened.hops[opened.at]} twice in an epoch")
            self.dials.add(mark)
        link = self.links[dial.link] = Link(dial.link, (dial.peer, who))
        link.queues[DOWN].append(dial.first)
        if not self._peer(dial.peer).is_alive:
            link.is_broken, link.listens[DOWN] = True, False
            link.cut(UP, 0, "unreachable")

    def _send(self, who: str, name: int, message: Message) -> None:
        link = self.links.get(abs(name))
        way = DOWN if name > 0 else UP
        if link is None or not link.listens[1 - way]:
            raise Broken(f"{who} speaks on a link it has left: {message}")
        if who == CLIENT and isinstance(message, Step):
            first = self.client.session.route[0]
            check_sent(message, -name, first, self._peer(first.peer).legs.legs())
        if link.listens[way] and not link.is_broken:
            link.queues[way].append(message)

    def _shut(self, who: str, name: int) -> None:
        link = self.links.get(abs(name))
        here = UP if name > 0 else DOWN
        if link is None or not link.listens[here]:
            raise Broken(f"{who} shuts a link it has left")
        self._leave(link, here)

    def _leave(self, link: Link, here: int, how: FaultKind = "closed") -> None:
        link.listens[here] = False
        link.queues[here].clear()
        there = 1 - here
        if link.listens[there] and not link.is_broken:
            link.queues[there].append(End(how))
        if not any(link.listens):
            del self.links[link.number]

    # --- what can happen ------------------------------------------------------------------------

    def events(self) -> list[Event]:
        """All that happens by itself."""
        found: list[Event] = [
            ("hear", link.number, way)
            for link in self.links.values()
            for way in (DOWN, UP)
            if link.listens[way] and link.queues[way]
        ]
        for index, peer in enumerate(self.peers):
            found += [("compute", index, leg) for leg, steps in peer.steps.items() if steps]
        if self.client.state == "running" and self.client.troubles:
            found.append(("repair", "other"))
            if self.client.may_retry():
                found.append(("repair", "again"))
        return found

    def faults(self) -> list[Event]:
        """All that may go wrong now, as far as the scenario allows."""
        found: list[Event] = []
        kinds = self.scenario.faults if self.budget else ()
        if self.client.state == "running":
            found += [(kind,) for kind in ("leave", "fallback") if kind in kinds]
        for link in self.links.values():
            if all(link.listens) and not link.is_broken:
                if "break" in kinds:
                    found += [("break", link.number, *kept) for kept in self._cuts(link)]
                if "accuse" in kinds:
                    found += [("accuse", link.number, way) for way in (DOWN, UP)]
        for index, peer in enumerate(self.peers):
            if peer.is_alive:
                found += self._faults_of(index, peer, kinds)
        return found

    def _faults_of(self, index: int, peer: Peer, kinds: Sequence[str]) -> list[Event]:
        found: list[Event] = []
        if "crash" in kinds and self._is_spare(index):
            found.append(("crash", index))
        if "drain" in kinds and self._is_spare(index) and not peer.is_draining:
            found.append(("drain", index))
        if "drop" in kinds:
            found += [("drop", index, s.leg) for s in peer.legs.spares() if s.byte_count]
        if "evict" in kinds:
            legs = [leg.number for leg in peer.legs.legs() if not leg.is_spent]
            found += [("evict", index, leg, wait) for leg in legs for wait in (0.0, 1.0)]
        if "restart" in kinds and len(peer.legs):
            found.append(("restart", index))
        if "refuse" in kinds and not peer.refusals:
            found.append(("refuse", index))
        if "expire" in kinds:
            found += [("expire", index, n) for n in peer.timers if n not in peer.sharing]
        if "forget" in kinds:
            found += [("forget", index, n) for n in peer.timers if n in peer.sharing]
        if "fail" in kinds:
            found += [("fail", index, leg) for leg, steps in peer.steps.items() if steps]
        return found

    def _cuts(self, link: Link) -> list[tuple[int, int]]:
        down, up = len(link.queues[DOWN]), len(link.queues[UP])
        if self.rng is not None:
            return [(self.rng.randint(0, down), self.rng.randint(0, up))]
        return sorted({(kept, back) for kept in (0, down) for back in (0, up)})

    def _is_spare(self, index: int) -> bool:
        """True if the others still cover all blocks without this peer."""
        covered: set[int] = set()
        for other, span in enumerate(self.scenario.held):
            held_there = self.peers[other]
            if other != index and held_there.is_alive and not held_there.is_draining:
                covered |= set(range(*map(int, span.split(":"))))
        return len(covered) == self.scenario.blocks

    def do(self, event: Event) -> None:
        """Let one event happen, then check what must hold."""
        match event:
            case ("hear", number, way):
                self._hear(self.links[number], way)
            case ("compute", index, leg):
                self._compute(index, leg)
            case ("repair", how):
                self.carry_out(CLIENT, self.client.repair(how, self.rng))
            case _:
                self.budget -= 1
                self._fault(event)
        self._check_laws()

    def _fault(self, event: Event) -> None:
        match event:
            case ("leave",):
                self.carry_out(CLIENT, self.client.finish("gone"))
            case ("fallback",):
                self.carry_out(CLIENT, self.client.repair("fallback", self.rng))
            case ("break", number, kept_down, kept_up):
                link = self.links[number]
                self.client.failed |= set(link.ends)
                link.is_broken = True
                link.cut(DOWN, kept_down)
                link.cut(UP, kept_up)
            case ("accuse", number, way):
                link = self.links[number]
                self.client.failed |= set(link.ends)
                self._ended(link, way, "silent")
            case ("crash" | "restart" as kind, index):
                self._crash(index, kind)
            case ("refuse", index):
                self.client.failed.add(peer_name(index))
                self.may_be_forgotten = True
                self.peers[index].refusals = 1
            case ("expire", index, number):
                self.client.failed.add(peer_name(index))
                self.has_expired = self.may_be_forgotten = True
                self.expire(index, number)
            case ("forget", index, number):
                self.expire(index, number)
            case ("drain", index):
                self.client.failed.add(peer_name(index))
                self.may_be_forgotten = True  # it refuses to begin anew, and ends the downlink
                self.peers[index].is_draining = True
                self.carry_out(peer_name(index), self.peers[index].legs.drain())
            case ("drop", index, leg):
                self._drop(peer_name(index), leg)  # nobody may be blamed, and nothing is repaired
            case ("evict", index, leg, seconds):
                self.has_evicted = True
                self.carry_out(peer_name(index), self.peers[index].legs.evict(leg, "", seconds))
            case ("fail", index, leg):
                self.client.failed.add(peer_name(index))
                self.peers[index].broken.add(leg)

    def expire(self, index: int, number: int) -> None:
        self.peers[index].timers.discard(number)
        self.carry_out(peer_name(index), self.peers[index].legs.grace_over(number))

    def _crash(self, index: int, kind: str) -> None:
        name = peer_name(index)
        self.client.failed.add(name)
        for link in tuple(self.links.values()):
            was_broken = link.is_broken
            for way in (DOWN, UP):
                if link.ends[way] == name and link.listens[way]:
                    link.is_broken = True
                    self._leave(link, way)
            for way in (DOWN, UP):
                if link.is_broken and not was_broken and link.listens[way]:
                    most = len(link.queues[way])
                    link.cut(way, self.rng.randint(0, most) if self.rng else most)
        self.peers[index].is_alive = kind == "restart"
        self.peers[index].restart()

    # --- what the machines hear -----------------------------------------------------------------

    def _hear(self, link: Link, way: int) -> None:
        message = link.queues[way].popleft()
        who, name = link.ends[way], link.name_at(way)
        if isinstance(message, End):
            self._ended(link, way, message.how)
        elif who == CLIENT:
            self.carry_out(who, self.client.session.received(name, message))
        else:
            self._check_heard(who, name, message)
            self.carry_out(who, self._told(self._peer(who).legs, link, name, message))

    def _told(self, legs: Legs, link: Link, name: int, message: Message) -> Sequence[object]:
        if name > 0 or not link.is_new:
            return legs.received(name, message)
        link.is_new = False
        if not is_first(message):
            raise Broken(f"a stream begins with {message}")
        if isinstance(message, Attach):
            return legs.attached(name, link.ends[UP], message)
        assert isinstance(message, Open)
        return legs.opened(name, message)

    def _ended(self, link: Link, way: int, how: FaultKind) -> None:
        who, name = link.ends[way], link.name_at(way)
        self._leave(link, way)
        machine = self.client.session if who == CLIENT else self._peer(who).legs
        self.carry_out(who, machine.ended(name, how, how))

    def _compute(self, index: int, leg: int) -> None:
        peer = self.peers[index]
        step = peer.steps[leg].popleft()
        if leg in peer.broken:
            self.carry_out(peer_name(index), peer.legs.failed(leg, "out of memory"))
            return
        (held,) = (held for held in peer.legs.legs() if held.number == leg)
        stack = peer.stacks.setdefault(leg, Stack(held.span))
        outputs = stack.run(step)
        self.computed += len(outputs)
        ids, last = self.client.prefixes[step.serial], stack.blocks[-1]
        right = [truth(last, ids[: step.start + i + 1]) for i in range(len(outputs))]
        if list(outputs) != right:
            raise Broken(f"{peer_name(index)} computed serial {step.serial} on a false prefix")
        if stack.blocks.stop == self.scenario.blocks and step.wanted == "last":
            outputs = outputs[-1:]
        payload = payload_of("hidden", outputs, self.scenario.weight)
        time = HopTime(0.0, 0.0)
        done = peer.legs.computed(leg, step.serial, payload, time, 1)
        self.carry_out(peer_name(index), done)

    # --- what must hold -------------------------------------------------------------------------

    def _check_heard(self, who: str, name: int, message: Message) -> None:
        if isinstance(message, Fault) and message.failure == "broke_word":
            raise Broken(f"an honest peer is said to have broken its word: {message}")
        if isinstance(message, Close) and self.client.state == "running" and not self.has_expired:
            places = {(hop.peer, hop.span) for hop in self.client.session.route}
            for leg in self._peer(who).legs.legs():
                if leg.up == name and (who, leg.span) in places:
                    raise Broken(f"{who}, healthy and on the route, is told to free its cache")

    def _check_trouble(self, trouble: Trouble) -> None:
        """Two repairs on their way at once may cost a third, never one alone."""
        if trouble.failure == "dropped" and (trouble.peer or not self.has_dropped):
            raise Broken(f"a history that nobody dropped is missed: {trouble}")
        can_evict = self.has_evicted or self.scenario.waiting_bytes < 1 << 40
        if trouble.failure == "evicted" and not can_evict:
            raise Broken(f"a cache that nobody evicted is missed: {trouble}")
        is_allowed = self.may_be_forgotten or self.client.session.epoch > 2
        if trouble.failure == "forgotten" and not is_allowed:
            raise Broken("the client is told of a grace time that was not over")

    def _check_laws(self) -> None:
        for link in self.links.values():
            for queue in link.queues:
                check_credit(link, queue)
        for index, peer in enumerate(self.peers):
            if peer.is_alive:
                check_peer(peer_name(index), peer.legs, peer.timers)

    def check_end(self) -> None:
        """Nothing more happens by itself: the text is done, and soon nothing is left of it."""
        if self.client.state == "running":
            raise Broken("stuck")
        for _ in range(3):  # the legs' grace, then the highest epochs', and what was kept
            for index, peer in enumerate(self.peers):
                for number in tuple(peer.timers):
                    if number in peer.timers:
                        self.expire(index, number)
            while events := self.events():
                self.do(events[0])
            for index, peer in enumerate(self.peers):
                if not peer.legs.free_of_sessions or peer.steps or peer.has_stray_stacks:
                    raise Broken(f"{peer_name(index)} holds something after the grace time")
        for index, peer in enumerate(self.peers):
            left = (peer.legs._highest, peer.legs._ended, peer.legs._by_link, peer.timers)
            kept = len(peer.sharing) + len(peer.sharing._index) + peer.sharing.history_bytes
            if any(left) or peer.legs._by_number or peer.legs.history_bytes or kept:
                raise Broken(f"{peer_name(index)} remembers a session for ever: {left}")
        if self.links:
            raise Broken(f"links are left: {self.links}")
