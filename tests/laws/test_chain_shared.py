"""Sessions that begin with what others left, under an adversarial scheduler: see chain_world."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from chain_client import Scenario
from chain_explorer import assert_lawful, explore, run_many
from chain_stack import reference
from chain_world import World

from swarm.chain import Entry
from swarm.onward import Onward
from swarm.prefix import Digests
from swarm.sharing import Sharing

FAULTS = (
    *("break", "accuse", "crash", "restart", "refuse", "expire", "fail", "leave", "fallback"),
    *("drain", "drop", "evict", "forget"),
)
ALIKE = Scenario(
    held=("0:1", "1:2", "2:3") * 2,
    route=((0, "0:1"), (1, "1:2"), (2, "2:3")),
    faults=FAULTS,
    budget=3,
    prompt=(5, 6, 7, 8, 9, 10, 11),
    before=(5, 6, 7, 8, 9, 3),
    page=2,
    tokens=5,
    drafts=(2, 0, 1),
    weight=8,
    repairs_in_place=True,
)
SCENARIOS = {
    "three hops, each with a spare": ALIKE,
    "the same prompt again": replace(ALIKE, before=ALIKE.prompt),
    "the next question of a chat": replace(
        ALIKE, before=(5, 6, 7), prompt=(*reference((5, 6, 7), 5, 3), 4), drafts=(1, 0)
    ),
    "nothing in common": replace(ALIKE, before=(1, 2, 3, 4)),
    "a page is a position": replace(ALIKE, page=1),
    "a peer that can take several hops": replace(
        ALIKE,
        held=("0:3", "1:2", "2:3", "0:1"),
        route=((3, "0:1"), (1, "1:2"), (2, "2:3")),
        budget=4,
    ),
    "hardly any memory for histories": replace(ALIKE, history_bytes=8 * 14),
}
IN_PLACE = pytest.mark.parametrize("in_place", [False, True], ids=["fallback", "in place"])


@IN_PLACE
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_laws_hold_in_random_runs(name: str, in_place: bool) -> None:
    scenario = replace(SCENARIOS[name], repairs_in_place=in_place)
    assert_lawful(run_many(scenario, range(100)))


@pytest.mark.slow
@IN_PLACE
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_laws_hold_in_ten_thousand_random_runs(name: str, in_place: bool) -> None:
    scenario = replace(SCENARIOS[name], repairs_in_place=in_place)
    assert_lawful(run_many(scenario, range(1_000, 11_000)))


TWO = replace(
    ALIKE,
    held=("0:1", "1:2", "0:1", "1:2"),
    route=((0, "0:1"), (1, "1:2")),
    prompt=(5, 6, 7),
    before=(5, 6, 3),
    page=2,
    tokens=1,
    drafts=(0,),
    budget=1,
)


@pytest.mark.parametrize("fault", ["forget", "drop"])
def test_the_laws_hold_in_every_interleaving_with_one_fault(fault: str) -> None:
    found = explore(replace(TWO, faults=(fault,)))
    assert_lawful(found)
    assert found.states > 50


@pytest.mark.slow
@IN_PLACE
@pytest.mark.parametrize("fault", FAULTS)
def test_the_laws_hold_in_every_interleaving_with_any_fault(fault: str, in_place: bool) -> None:
    assert_lawful(explore(replace(TWO, faults=(fault,), repairs_in_place=in_place)))


def run_through(scenario: Scenario) -> World:
    world = World(scenario)
    while events := world.events():
        world.do(events[0])
    world.check_end()
    return world


def test_a_session_computes_what_it_has_in_common_with_another_nowhere() -> None:
    quiet = replace(ALIKE, budget=0, drafts=(0,))
    alone = run_through(replace(quiet, before=())).computed
    assert alone == 3 * (len(ALIKE.prompt) + ALIKE.tokens - 1)
    assert run_through(quiet).computed == alone - 3 * 4  # two pages of two on each of three hops
    again = run_through(replace(quiet, before=ALIKE.prompt))
    assert again.computed == alone - 3 * 6
    assert again.client.session.shared == 6


# --- the explorer can fail: one rule off at a time ----------------------------------------------


def without_a_look_at_the_digest(patch: pytest.MonkeyPatch) -> None:
    """Whatever a page holds, it has the same name."""
    add = Digests.add

    def same(self: Digests, start: int, payload: object, sequence_length: int = 0) -> None:
        add(self, start, payload, sequence_length)  # type: ignore[arg-type]
        self.pages[:] = [bytes([place]) * 16 for place in range(len(self.pages))]

    patch.setattr(Digests, "add", same)


def without_waiting_for_ready(patch: pytest.MonkeyPatch) -> None:
    """A hop that is offered pages is thought to have them."""
    dial = Onward.dial

    def trusting(self: Onward) -> None:
        dial(self)
        if self.down is not None and not self.down.is_known and self._offered():
            self.down.sent, self.down.is_known = len(self._offered()) // 16, True
            self._flush()

    patch.setattr(Onward, "dial", trusting)


def without_a_history(patch: pytest.MonkeyPatch) -> None:
    """A leg begins with a cache, and with nothing to send on."""

    def nothing(self: Sharing, *_: object) -> object:
        return (Entry(1, 0, {}, "none"),), ()

    patch.setattr(Sharing, "_sent_on", nothing)


def with_caches_that_nobody_forgets(patch: pytest.MonkeyPatch) -> None:
    """A kept leg goes without a word to the executor."""
    drop = Sharing.drop

    def silent(self: Sharing, number: int) -> None:
        self.on_drop, told = (lambda _number: None), self.on_drop
        drop(self, number)
        self.on_drop = told

    patch.setattr(Sharing, "drop", silent)


BENT: list[tuple[Callable[[pytest.MonkeyPatch], None], Scenario]] = [
    (without_a_look_at_the_digest, replace(ALIKE, before=(1, 2, 3, 4, 1), budget=0)),
    (without_waiting_for_ready, replace(ALIKE, faults=("forget",))),
    (without_a_history, replace(ALIKE, faults=("forget", "break", "crash"))),
    (with_caches_that_nobody_forgets, replace(ALIKE, budget=0)),
]


@pytest.mark.parametrize(("bend", "scenario"), BENT, ids=lambda item: getattr(item, "__name__", ""))
def test_the_explorer_finds_a_chain_without_one_rule(
    bend: Callable[[pytest.MonkeyPatch], None],
    scenario: Scenario,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bend(monkeypatch)
    assert run_many(scenario, range(400)).breach
