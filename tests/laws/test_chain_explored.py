"""The chain's own machines under an adversarial scheduler: see chain_world for what must hold."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from chain_client import Client, Scenario
from chain_explorer import assert_lawful, explore, run_many
from chain_stack import reference

from swarm.chain import CREDIT_PIECE, FIRST_CREDIT, Entry, History, Outlet, Send
from swarm.leg import Forget, Leg
from swarm.legs import Legs
from swarm.messages import Close, Gone, Message, Open, Ready, Step
from swarm.onward import Onward
from swarm.session import Session, Trouble

FAULTS = (
    *("break", "accuse", "crash", "restart", "refuse", "expire", "fail", "leave", "fallback"),
    *("drain", "drop", "evict"),
)

TWO = Scenario(
    held=("0:1", "1:2", "0:1", "1:2"), route=((0, "0:1"), (1, "1:2")), prompt=(5, 6), tokens=1
)
THREE = Scenario(
    held=("0:1", "1:2", "2:3") * 2,
    route=((0, "0:1"), (1, "1:2"), (2, "2:3")),
    faults=FAULTS,
    budget=3,
    tokens=5,
    drafts=(2, 0, 1),
)
SCENARIOS = {
    "three hops, each with a spare": THREE,
    "a peer that can take several hops": replace(
        THREE,
        held=("0:3", "1:2", "2:3", "0:1"),
        route=((3, "0:1"), (1, "1:2"), (2, "2:3")),
        budget=4,
    ),
    "spans of unequal cut": replace(
        THREE,
        held=("0:1", "1:3", "3:4", "0:2", "2:4", "1:2", "2:3", "0:1"),
        route=((0, "0:1"), (1, "1:3"), (2, "3:4")),
        budget=4,
    ),
    "one peer for each block, with room for one leg": replace(
        THREE,
        held=("0:1", "1:2"),
        route=((0, "0:1"), (1, "1:2")),
        prompt=(5, 6),
        tokens=3,
        budget=4,
        room=1,
    ),
    "payloads that use up the credit": replace(
        THREE, prompt=tuple(range(1, 13)), weight=FIRST_CREDIT // 3
    ),
    "no memory for histories": replace(THREE, history_bytes=0),
    "caches that are evicted again and again": replace(THREE, faults=("evict", "break"), budget=8),
    "hardly any room for what waits": replace(
        THREE,
        held=("0:3", "1:2", "2:3", "0:1"),
        route=((0, "0:1"), (1, "1:2"), (0, "2:3")),
        prompt=tuple(range(1, 13)),
        weight=FIRST_CREDIT // 3,
        waiting_bytes=FIRST_CREDIT,
        faults=("break", "evict"),
    ),
}
IN_PLACE = pytest.mark.parametrize("in_place", [False, True], ids=["fallback", "in place"])


@IN_PLACE
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_laws_hold_in_random_runs(name: str, in_place: bool) -> None:
    scenario = replace(SCENARIOS[name], repairs_in_place=in_place)
    assert_lawful(run_many(scenario, range(250)))


@pytest.mark.slow
@IN_PLACE
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_laws_hold_in_ten_thousand_random_runs(name: str, in_place: bool) -> None:
    scenario = replace(SCENARIOS[name], repairs_in_place=in_place)
    assert_lawful(run_many(scenario, range(1_000, 11_000)))


@pytest.mark.parametrize("weight", [1, CREDIT_PIECE - 1, FIRST_CREDIT // 2, FIRST_CREDIT])
def test_without_a_fault_there_is_no_repair(weight: int) -> None:
    scenario = replace(THREE, budget=0, prompt=tuple(range(1, 9)), weight=weight, drafts=(0, 1))
    assert_lawful(run_many(scenario, range(40)))


@pytest.mark.parametrize("history_bytes", [0, 3])
def test_histories_that_are_dropped_cost_no_repair(history_bytes: int) -> None:
    scenario = replace(THREE, faults=("drop",), history_bytes=history_bytes)
    assert_lawful(run_many(scenario, range(100)))


@IN_PLACE
def test_evictions_cost_replays_and_nothing_else(in_place: bool) -> None:
    scenario = replace(THREE, faults=("evict",), budget=6, repairs_in_place=in_place)
    assert_lawful(run_many(scenario, range(200)))


@IN_PLACE
@pytest.mark.parametrize("fault", ["refuse", "expire", "leave", "drop", "evict"])
def test_the_laws_hold_in_every_interleaving_with_one_fault(fault: str, in_place: bool) -> None:
    found = explore(replace(TWO, faults=(fault,), repairs_in_place=in_place))
    assert_lawful(found)
    assert found.states > 100


@pytest.mark.slow
@IN_PLACE
@pytest.mark.parametrize("fault", FAULTS)
def test_the_laws_hold_in_every_interleaving_of_two_tokens(fault: str, in_place: bool) -> None:
    assert_lawful(explore(replace(TWO, tokens=2, faults=(fault,), repairs_in_place=in_place)))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_laws_hold_in_every_interleaving_without_memory_for_histories(fault: str) -> None:
    scenario = replace(TWO, faults=(fault,), repairs_in_place=True, history_bytes=0)
    assert_lawful(explore(scenario))


# --- the explorer can fail: one rule off at a time ----------------------------------------------


def without_asking_what_it_has(patch: pytest.MonkeyPatch) -> None:
    """Hole 3: a kept hop is trusted to have everything."""
    dial = Leg.dial

    def trusting(self: Leg) -> None:
        dial(self)
        if self.down is not None and not self.down.is_known:
            self.down.is_known = True
            self.down.sent = self.history.entries[-1].serial if self.history.entries else 0

    patch.setattr(Leg, "dial", trusting)


def without_parking(patch: pytest.MonkeyPatch) -> None:
    """Hole 8: an Attach that comes before its Open is refused."""

    def refuse(self: Legs, parked: object) -> None:
        self._end(parked.link, Gone(reason="forgotten"))  # type: ignore[attr-defined]

    patch.setattr(Legs, "_park", refuse)


def without_outputs_kept(patch: pytest.MonkeyPatch) -> None:
    """Hole 5: what was computed while no downlink was there is never sent."""
    attach = Leg.attach

    def forgetful(self: Leg, link: int, epoch: int, have: int) -> None:
        newest = self.history.entries[-1].serial if self.history.entries else 0
        attach(self, link, epoch, max(have, newest))

    patch.setattr(Leg, "attach", forgetful)


def without_a_cascade(patch: pytest.MonkeyPatch) -> None:
    """Hole 15: the end of a grace time does not close the hops below."""
    free = Leg.free

    def alone(self: Leg, *, is_session_over: bool, is_kept: bool = False) -> None:
        free(self, is_session_over=is_session_over and self.up is not None, is_kept=is_kept)

    patch.setattr(Leg, "free", alone)


def without_gone(patch: pytest.MonkeyPatch) -> None:
    """Hole 12: a hop that was replaced is told Close."""
    leave = Leg._leave_next

    def close(self: Leg) -> None:
        if self.down is not None:
            self._emit(Send(self.down.link, Close()))
        leave(self)

    patch.setattr(Leg, "_leave_next", close)


def without_credit_for_the_unwanted(patch: pytest.MonkeyPatch) -> None:
    """Outputs that nobody is sent use up the downlink's credit."""
    ready = Outlet.ready

    def counting(self: Outlet, history: History, *, is_downlink: bool = False) -> list[Entry]:
        return [e for e in ready(self, history) if not is_downlink or e.wanted != "none"]

    patch.setattr(Outlet, "ready", counting)


def without_a_check_of_serials(patch: pytest.MonkeyPatch) -> None:
    """A step that was admitted before is admitted again."""
    admit = Leg.admit

    def twice(self: Leg, step: Step, link: int) -> None:
        if step.serial <= self.admitted:
            self.admitted = step.serial - 1
        admit(self, step, link)

    patch.setattr(Leg, "admit", twice)


def without_waiting_for_a_kept_first_hop(patch: pytest.MonkeyPatch) -> None:
    """The client sends its log again without asking a kept first hop what it has."""
    dial = Session._dial_first

    def hasty(self: Session) -> None:
        dial(self)
        assert self._uplink is not None
        self._uplink.is_known = True

    patch.setattr(Session, "_dial_first", hasty)


def without_saying_what_was_dropped(patch: pytest.MonkeyPatch) -> None:
    """A hop sends on what it still has, whatever its next hop lacks."""
    patch.setattr(History, "reaches", lambda self, serial, is_downlink=False: True)


def without_sparing_the_live_link(patch: pytest.MonkeyPatch) -> None:
    """What was once sent on is dropped, though the live link is only being brought up to date."""
    patch.setattr(Leg, "droppable", property(lambda self: self.sent_on))


def without_sparing_what_was_not_sent(patch: pytest.MonkeyPatch) -> None:
    """The whole history is dropped."""

    def everything(self: Leg) -> int:
        return self.history.entries[-1].serial if self.history.entries else 0

    patch.setattr(Leg, "droppable", property(everything))


def without_telling_a_client_that_attached_first(patch: pytest.MonkeyPatch) -> None:
    """An Attach that came before its Open is not looked at again when that comes."""
    reroute, flush = Leg.reroute, Leg._flush_outputs

    def silent(self: Leg, opened: Open) -> None:
        patch.setattr(Leg, "_flush_outputs", lambda self: None)
        reroute(self, opened)
        patch.setattr(Leg, "_flush_outputs", flush)

    patch.setattr(Leg, "reroute", silent)


def with_blame_for_a_dropped_history(patch: pytest.MonkeyPatch) -> None:
    """The client holds it against a hop that it no longer has a history."""
    received = Session.received

    def blaming(self: Session, link: int, message: Message) -> object:
        actions = received(self, link, message)
        return [
            replace(a, peer=message.peer)  # type: ignore[union-attr]
            if isinstance(a, Trouble) and a.failure == "dropped"
            else a
            for a in actions
        ]

    patch.setattr(Session, "received", blaming)


def with_a_drain_that_frees(patch: pytest.MonkeyPatch) -> None:
    """A server that is to leave drops its sessions at once."""

    def leave(self: Legs) -> object:
        for leg in self.legs():
            self._free(leg, is_session_over=True)
        return self._taken()

    patch.setattr(Legs, "drain", leave)


def with_an_eviction_that_is_not_noted(patch: pytest.MonkeyPatch) -> None:
    """A leg goes on as if it still had its cache."""

    def forget(self: Leg, message: str, retry_seconds: float) -> None:
        self._emit(Forget(self.number))

    patch.setattr(Leg, "evict", forget)


def without_telling_of_an_eviction(patch: pytest.MonkeyPatch) -> None:
    """A leg without cache drops what it is sent, and nobody hears why."""
    patch.setattr(Leg, "_say_evicted", lambda self: None)


def without_beginning_anew_after_an_eviction(patch: pytest.MonkeyPatch) -> None:
    """A leg without cache is taken up again as if it had one."""
    patch.setattr(Leg, "is_spent", property(lambda self: self.has_failed))


def without_going_on_when_something_was_sent(patch: pytest.MonkeyPatch) -> None:
    """What waited because too much waited to be sent on is never computed."""
    patch.setattr(Leg, "_flush", Onward._flush)


def without_a_bound_on_what_waits(patch: pytest.MonkeyPatch) -> None:
    """Whatever comes is taken."""

    def admit(self: Legs, leg: Leg, step: Step, link: int) -> None:
        with self._counting(leg):
            leg.admit(step, link)

    patch.setattr(Legs, "_admit", admit)


CREDIT = SCENARIOS["payloads that use up the credit"]
FORGETFUL = replace(SCENARIOS["no memory for histories"], repairs_in_place=True)
EVICTING = replace(THREE, faults=("evict",), repairs_in_place=True)
BENT: list[tuple[Callable[[pytest.MonkeyPatch], None], Scenario]] = [
    (without_parking, replace(THREE, budget=0)),
    (without_asking_what_it_has, replace(THREE, repairs_in_place=True)),
    (without_outputs_kept, replace(THREE, repairs_in_place=True)),
    (without_a_cascade, replace(THREE, faults=("expire", "break", "accuse"))),
    (without_gone, replace(THREE, repairs_in_place=True)),
    (without_credit_for_the_unwanted, replace(CREDIT, budget=0)),
    (without_a_check_of_serials, replace(THREE, repairs_in_place=True)),
    (without_waiting_for_a_kept_first_hop, replace(THREE, repairs_in_place=True)),
    (without_saying_what_was_dropped, FORGETFUL),
    (without_sparing_the_live_link, replace(CREDIT, repairs_in_place=True)),
    (without_sparing_what_was_not_sent, replace(CREDIT, history_bytes=0)),
    (without_telling_a_client_that_attached_first, FORGETFUL),
    (with_blame_for_a_dropped_history, FORGETFUL),
    (with_an_eviction_that_is_not_noted, EVICTING),
    (without_telling_of_an_eviction, EVICTING),
    (without_beginning_anew_after_an_eviction, EVICTING),
    (without_going_on_when_something_was_sent, CREDIT),
    (without_a_bound_on_what_waits, SCENARIOS["hardly any room for what waits"]),
    (with_a_drain_that_frees, replace(THREE, faults=("drain",), repairs_in_place=True)),
]


@pytest.mark.parametrize(("bend", "scenario"), BENT, ids=lambda item: getattr(item, "__name__", ""))
def test_the_explorer_finds_a_chain_without_one_rule(
    bend: Callable[[pytest.MonkeyPatch], None],
    scenario: Scenario,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bend(monkeypatch)
    assert run_many(scenario, range(600)).breach


def test_the_explorer_tells_a_wrong_text(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = reference(THREE.prompt, THREE.tokens, 2)
    monkeypatch.setattr(Client, "truth", wrong)
    assert "another text" in run_many(replace(THREE, budget=0), range(1)).breach


def test_a_client_that_misses_a_ready_gets_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    received = Session.received

    def deaf(self: Session, link: int, message: Message) -> object:
        return [] if isinstance(message, Ready) else received(self, link, message)

    monkeypatch.setattr(Session, "received", deaf)
    scenario = replace(THREE, faults=("break",), repairs_in_place=True)
    assert "stuck" in run_many(scenario, range(300)).breach
