"""The laboratory's arithmetic and its scenarios: tables, without a namespace."""

import pytest
from netlab_scenario import Event, parse_event, parse_scenario
from netlab_wire import Cable, Direction

MS = 1_000_000


def arrivals(cable: Cable, packets: list[tuple[float, int]]) -> list[float | None]:
    """When packets (entering at ms, bytes) arrive, in ms; None: never."""
    direction = Direction(cable)
    times = [direction.enter(round(at * MS), size, 0.5) for at, size in packets]
    return [None if time is None else time / MS for time in times]


@pytest.mark.parametrize(
    ("cable", "packets", "expected"),
    [
        pytest.param(Cable(), [(3, 1500), (3, 1500)], [3, 3], id="a bare wire takes no time"),
        pytest.param(Cable(rtt_ms=100), [(0, 60), (1, 60)], [50, 51], id="half the round trip"),
        pytest.param(Cable(mbit=12), [(0, 1500), (0, 1500)], [1, 2], id="one after the other"),
        pytest.param(Cable(mbit=12), [(0, 1500), (9, 1500)], [1, 10], id="an idle wire is free"),
        pytest.param(
            Cable(mbit=12, rtt_ms=20), [(0, 15000), (1, 150)], [20, 20.1], id="wait, then travel"
        ),
        pytest.param(
            Cable(mbit=12, queue_ms=2),
            [(0, 4500), (0.5, 1500), (1, 1500), (1, 1500)],
            [3, None, 4, None],
            id="who finds more than the queue before it is dropped",
        ),
        pytest.param(
            Cable(mbit=1, queue_ms=1), [(0, 65000)], [520], id="an idle wire takes any size"
        ),
        pytest.param(Cable(is_cut=True), [(0, 60)], [None], id="a cut cable takes nothing"),
    ],
)
def test_a_packet_arrives_when_the_wire_says(
    cable: Cable, packets: list[tuple[float, int]], expected: list[float | None]
) -> None:
    assert arrivals(cable, packets) == expected


def test_a_shorter_round_trip_overtakes_nothing() -> None:
    direction = Direction(Cable(rtt_ms=100))
    first = direction.enter(0, 60, 0.5)
    direction.change(Cable(rtt_ms=10))
    second, much_later = direction.enter(1 * MS, 60, 0.5), direction.enter(90 * MS, 60, 0.5)
    assert (first, second, much_later) == (50 * MS, 50 * MS, 95 * MS)


def test_a_packet_is_lost_when_its_chance_is_below_the_loss_and_still_took_its_time() -> None:
    direction = Direction(Cable(mbit=12, loss=0.3))
    assert direction.enter(0, 1500, 0.29) is None
    assert direction.enter(0, 1500, 0.3) == 2 * MS
    assert direction.tally.lost == 1


def test_what_is_on_its_way_when_the_cable_is_cut_never_arrives() -> None:
    direction = Direction(Cable(rtt_ms=100))
    direction.enter(0, 60, 0.5)
    before = direction.cuts
    direction.change(Cable(rtt_ms=100, is_cut=True))
    direction.change(Cable(rtt_ms=100))
    assert not direction.is_intact(before)
    assert direction.is_intact(direction.cuts)
    assert direction.tally.severed == 1


def test_a_mended_cable_has_forgotten_its_queue() -> None:
    direction = Direction(Cable(mbit=1))
    direction.enter(0, 65000, 0.5)
    direction.change(Cable(mbit=12, is_cut=True))
    direction.change(Cable(mbit=12))
    assert direction.enter(5 * MS, 1500, 0.5) == 6 * MS


@pytest.mark.parametrize(
    "fields",
    [{"rtt_ms": -1}, {"mbit": 0}, {"loss": 1.1}, {"queue_ms": 0}, {"rtt_ms": float("nan")}],
)
def test_an_impossible_cable_cannot_be_built(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="not"):
        Cable(**fields)  # type: ignore[arg-type]


SCENARIO = """
until = "client"
seconds = 9
events = ["at 4 s mend server client", "at 2.5 s cut server client"]
[cable]
rtt_ms = 100
[hosts.server]
command = "serve"
[hosts.client]
command = "ask"
starts_at = 3
nat = "random"
[hosts.idle]
[[cables]]
between = ["idle", "client"]
mbit = 10
"""


def test_a_scenario_says_who_runs_what_over_which_cables_and_what_happens_when() -> None:
    scenario = parse_scenario(SCENARIO)
    assert dict(scenario.commands) == {
        "server": ("sh", "-c", "serve"),
        "client": ("sh", "-c", "ask"),
        "idle": (),
    }
    assert scenario.cable == Cable(rtt_ms=100)
    assert scenario.cables == {("idle", "client"): Cable(rtt_ms=100, mbit=10)}
    assert scenario.nats == {"client": "random"}
    assert scenario.events == (
        Event(0, "start", ("server",)),
        Event(2.5, "cut", ("server", "client")),
        Event(3, "start", ("client",)),
        Event(4, "mend", ("server", "client")),
    )
    assert (scenario.until, scenario.seconds, scenario.seed) == ("client", 9, 0)


def test_an_event_may_name_one_host_for_all_its_cables_and_change_fields() -> None:
    assert parse_event("at 1 s cut a", {"a", "b"}) == Event(1, "cut", ("a",))
    changed = parse_event("at 1 s set a b rtt_ms=300 mbit=5", {"a", "b"})
    assert changed.changes == {"rtt_ms": 300, "mbit": 5}


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("", "needs hosts"),
        ("host = 1\n[hosts.a]", "not host"),
        ("[hosts.a]\ncomand = 'x'", "not comand"),
        ("[hosts.a]\nnat = 'cone'", "preserving, random"),
        ("until = 'b'\n[hosts.a]\ncommand = 'x'", "until names"),
        ("[cable]\nrtt = 5\n[hosts.a]", "not rtt"),
        ("[cable]\nrtt_ms = 'far'\n[hosts.a]", "numbers"),
        ("[hosts.a]\n[[cables]]\nbetween = ['a', 'b']", "between two hosts"),
        ("events = ['2 s cut a']\n[hosts.a]", "an event is"),
        ("events = ['at 2 s bend a']\n[hosts.a]", "an event is"),
        ("events = ['at 2 s cut b']\n[hosts.a]", "no host b"),
        ("events = ['at 2 s cut a a']\n[hosts.a]", "with itself"),
        ("events = ['at 2 s kill a b']\n[hosts.a]\n[hosts.b]", "kill takes"),
        ("events = ['at 2 s start a']\n[hosts.a]", "a start needs a command"),
        ("events = ['at 2 s set a b']\n[hosts.a]\n[hosts.b]", "set takes"),
        ("events = ['at 2 s set a b loss=2']\n[hosts.a]\n[hosts.b]", "from 0 to 1"),
        ("hosts = [", "Invalid"),
    ],
)
def test_a_scenario_that_cannot_be_played_is_told_before_it_starts(written: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_scenario(written)
