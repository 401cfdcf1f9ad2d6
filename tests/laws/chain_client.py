"""The client of the explored chain: what it asks for, and how it repairs its route.

1. What it is given is the reference, each position once.
2. It repairs nothing that did not fail and blames only peers that failed or whose link did.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from chain_stack import VOCABULARY, numbers_of, payload_of, reference

from swarm.messages import Attach, HopName, Message, Mode, Open, Output
from swarm.prefix import Digests
from swarm.session import Action, Session, Trouble

CLIENT = "client"
Places = Sequence[tuple[str, str]]


class Broken(Exception):
    """An invariant of the chain does not hold."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Who holds what, what the client asks for, how it repairs, and what may go wrong."""

    held: tuple[str, ...]  # by peer: its span, "0:2"
    route: tuple[tuple[int, str], ...]  # the first: peer, span
    faults: tuple[str, ...] = ("break",)
    budget: int = 1
    prompt: tuple[int, ...] = (5, 6, 7)
    chunk: int = 2
    tokens: int = 2
    drafts: tuple[int, ...] = (0,)  # how many ids a step drafts, by serial in turn
    weight: int = 1  # bytes that a position counts as
    repairs_in_place: bool = False
    room: int = 1000  # legs that one peer takes
    history_bytes: int = 1 << 40  # that one peer keeps
    waiting_bytes: int = 1 << 40  # of steps that may wait at one peer
    page: int = 0  # positions of a page, of 8 bytes each; 0: nothing is shared
    before: tuple[int, ...] = ()  # the prompt of a session that came to its end before this one

    @property
    def blocks(self) -> int:
        return max(int(span.split(":")[1]) for span in self.held)


def peer_name(index: int) -> str:
    return f"peer{index}"


def unsigned(opened: Open) -> Open:
    return opened


class Client:
    """Feeds a session with steps and repairs, as a generating caller would."""

    def __init__(
        self, scenario: Scenario, new_link: Callable[[], int], session: bytes = b"s" * 16
    ) -> None:
        self.scenario = scenario
        page = scenario.page or 1
        self.pages = (len(scenario.prompt) - 1) // page if scenario.page else 0
        digests = Digests("f", page)
        if self.pages:
            prompt = scenario.prompt[: self.pages * page]
            digests.add(0, payload_of("ids", prompt, scenario.weight))
        self.session = Session(
            session=session,
            client=CLIENT,
            fingerprint="f",
            max_tokens=64,
            sign=unsigned,
            new_link=new_link,
            prefix=digests.pages,
            page=page,
        )
        self.ids = list(scenario.prompt)
        self.prefixes: dict[int, tuple[int, ...]] = {}  # what the steps' last positions follow
        self.asked: dict[int, tuple[int, tuple[int, ...]]] = {}  # serial: start, ids
        self.state = "running"  # or done, gone
        self.troubles: list[Trouble] = []
        self.suspects: list[str] = []  # oldest first
        self.retried: set[tuple[str, str]] = set()  # since the last output
        self.repairs = 0
        self.failed: set[str] = set()  # the world says who failed, or whose link did
        self.serials = 0

    @property
    def truth(self) -> tuple[int, ...]:
        s = self.scenario
        return reference(s.prompt, s.tokens, s.blocks)

    def start(self) -> list[Action]:
        route = [(peer_name(peer), span) for peer, span in self.scenario.route]
        actions = self.session.take_route(route)
        prompt, chunk, page = self.scenario.prompt, self.scenario.chunk, self.scenario.page
        paged = self.pages * page
        for begin in range(0, paged, page or 1):
            actions += self._step(begin, prompt[begin : begin + page])
        for begin in range(paged, len(prompt), chunk):
            actions += self._step(begin, prompt[begin : begin + chunk])
        return actions

    def _step(self, start: int, ids: Sequence[int]) -> list[Action]:
        self.serials += 1
        self.prefixes[self.serials] = (*self.ids[:start], *ids)
        end = start + len(ids)
        wanted = "last" if end == len(self.ids) else "all" if end > len(self.ids) else "none"
        if wanted != "none":
            self.asked[self.serials] = (start, tuple(ids))
        payload = payload_of("ids", ids, self.scenario.weight)
        return self.session.step(start, payload, wanted)  # type: ignore[arg-type]

    def delivered(self, output: Output) -> list[Action]:
        """Check an output, take what it confirms of the draft, and ask for the next."""
        if self.asked.pop(output.serial, (output.start,))[0] != output.start:
            raise Broken("an output of another position")
        self.retried.clear()
        ids = self.prefixes[output.serial][output.start :]
        values = numbers_of(output.payload)
        if len(values) not in (1, len(ids)):
            raise Broken("a wrong count of outputs")
        for place, value in enumerate(values):
            self.ids.append(value % VOCABULARY)
            if tuple(self.ids) != self.truth[: len(self.ids)]:
                raise Broken("the caller got another text than the reference")
            if len(self.ids) == len(self.truth):
                return self.finish("done")
            if len(values) > 1 and place + 1 < len(ids) and self.ids[-1] != ids[place + 1]:
                break
        return self._step(len(self.ids) - 1, (self.ids[-1], *self._draft()))

    def _draft(self) -> list[int]:
        """Some right ids and some wrong, by position."""
        drafts, here = self.scenario.drafts, len(self.ids)
        count = min(drafts[self.serials % len(drafts)], len(self.truth) - here)
        return [
            self.truth[p] if (p * 7 + (p - here) * 3) % 5 < 2 else VOCABULARY
            for p in range(here, here + count)
        ]

    def finish(self, state: str) -> list[Action]:
        self.state = state
        self.troubles.clear()
        return self.session.close()

    def noted(self, trouble: Trouble) -> None:
        if self.state != "running":
            return
        if trouble.failure == "broke_word":
            raise Broken(f"an honest peer is said to have broken its word: {trouble}")
        # An output may have been sent to a downlink that a fallback has just left, and be dropped.
        is_overtaken = trouble.failure == "dropped" and self.session.epoch > 1
        is_eviction = trouble.failure == "evicted"  # the world knows whether one was
        is_certain = self.scenario.room >= 1000 and not is_eviction
        if not self.failed and not is_overtaken and is_certain:
            raise Broken(f"a trouble without a fault: {trouble}")
        if trouble.peer and trouble.peer not in self.failed and is_certain:
            raise Broken(f"{trouble.peer} is blamed and never failed: {trouble}")
        if trouble not in self.troubles:
            self.troubles.append(trouble)

    def may_retry(self) -> bool:
        """True if the same peers are tried once more before anybody is replaced."""
        blamed = {(trouble.peer, trouble.span) for trouble in self.troubles}
        how = {trouble.failure for trouble in self.troubles}
        hard = how & {"unreachable", "failed", "draining"}
        return not hard and not blamed & self.retried

    def repair(self, how: str, rng: Random | None) -> list[Action]:
        """Act on all troubles noted: `again` on the same peers, `other`, or fall back."""
        self.repairs += 1
        if self.repairs > 40:
            raise Broken("repairs without end")
        troubles, self.troubles = self.troubles, []
        blamed = [(t.peer, t.span) for t in troubles if t.peer and not is_welcome(t)]
        if how == "again":
            self.retried |= set(blamed)
        else:
            for peer, _ in blamed:
                self.suspects = [*(p for p in self.suspects if p != peer), peer]
        in_doubt = how == "fallback" or any(t.failure == "dropped" for t in troubles)
        if self.scenario.repairs_in_place and not in_doubt:
            return self._patch(troubles, blamed if how == "other" else [], rng)
        if how == "again":
            return self.session.take_route([(hop.peer, hop.span) for hop in self.session.route])
        return self.session.take_route(self._cover(0, self.scenario.blocks, rng))

    def _patch(
        self, troubles: list[Trouble], replaced: list[tuple[str, str]], rng: Random | None
    ) -> list[Action]:
        hops: list[HopName] = []
        route = self.session.route
        evicted = {(t.peer, t.span) for t in troubles if is_welcome(t)}
        for hop in route:
            if (hop.peer, hop.span) in evicted:
                hops.append(HopName(hop.peer, hop.span, "anew"))
            elif (hop.peer, hop.span) in replaced:
                start, stop = map(int, hop.span.split(":"))
                hops += [HopName(p, s, "new") for p, s in self._cover(start, stop, rng)]
            else:
                mode: Mode = "keep" if any(t.span == hop.span for t in troubles) else "new"
                hops.append(HopName(hop.peer, hop.span, mode))
        forgotten = any(trouble.failure == "forgotten" for trouble in troubles)
        return self.session.reroute(hops, attach=forgotten)

    def _cover(self, start: int, stop: int, rng: Random | None) -> list[tuple[str, str]]:
        while True:
            found = self._search(start, stop, rng)
            if found is not None:
                return found
            if not self.suspects:
                raise Broken("no cover at all")
            self.suspects.pop(0)  # the oldest suspicion is forgiven

    def _search(self, start: int, stop: int, rng: Random | None) -> list[tuple[str, str]] | None:
        if start >= stop:
            return []
        order = list(range(len(self.scenario.held)))
        if rng is not None:
            rng.shuffle(order)
        for peer in order:
            first, end = map(int, self.scenario.held[peer].split(":"))
            if first <= start < end and peer_name(peer) not in self.suspects:
                rest = self._search(min(end, stop), stop, rng)
                if rest is not None:
                    return [(peer_name(peer), f"{start}:{min(end, stop)}"), *rest]
        return None


def is_welcome(trouble: Trouble) -> bool:
    """True if the hop lost its cache, nobody is to blame, and it may begin anew at once."""
    return trouble.failure == "evicted" and not trouble.retry_seconds


def is_first(message: Message) -> bool:
    """True for the messages that begin a stream."""
    return isinstance(message, Open | Attach)
