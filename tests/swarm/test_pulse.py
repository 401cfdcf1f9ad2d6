"""Pulse: who is found silent, how soon, and who never is. Time is virtual but for the last test."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from pulsing import LAN, World, run

from swarm.host import open_host
from swarm.identity import new_identity
from swarm.pulse import MOST_SECONDS, MOST_WATCHED, Heart, Pulse, Watch

BEAT = 0.25


def asked(heart: Heart, round_trips: list[float], lag: float = 0.0) -> float:
    """Let a peer answer one ping after the other; return the time of the ping after them."""
    now = 0.0
    for round_trip in round_trips:
        heart.sent(now)
        heart.heard(round_trip, lag)
        now += max(BEAT, round_trip)
    heart.sent(now)
    return now


def patience(round_trips: list[float], lag: float = 0.0, own_lag: float = 0.0) -> float:
    """Seconds that such a peer may leave a ping unanswered, to 10 ms."""
    heart = Heart()
    started = asked(heart, round_trips, lag)
    steps = range(10_000)
    return next(n / 100 for n in steps if heart.verdict(started + n / 100, own_lag) == "silent")


@pytest.mark.parametrize(
    ("round_trips", "least", "most"),
    [
        ([], 1.7, 1.8),  # RFC 6298's second before the first sample, and our patience
        ([LAN] * 40, 0.75, 0.85),
        ([0.3] * 40, 1.05, 1.15),
        ([0.02, 0.22] * 20, 1.1, 1.5),
        ([LAN] * 39 + [1.0], 1.5, 2.0),
        ([LAN] * 20 + [2.0] + [LAN] * 40, 0.75, 0.9),
        ([30.0] * 10, MOST_SECONDS, MOST_SECONDS + 0.02),
        ([-5.0] * 10, 0.75, 0.85),
    ],
    ids=[
        "new",
        "steady",
        "far",
        "jittery",
        "just late",
        "late long ago",
        "too slow",
        "clock set back",
    ],
)
def test_a_peer_may_be_silent_as_its_answers_so_far_suggest(
    round_trips: list[float], least: float, most: float
) -> None:
    assert least <= patience(round_trips) <= most


@pytest.mark.parametrize(
    ("lag", "own_lag", "expected"),
    [(2.0, 0.0, 2.8), (0.0, 2.0, 2.8), (1e9, 0.0, MOST_SECONDS), (1e9, 30.0, MOST_SECONDS + 30.0)],
)
def test_lags_are_added_and_only_our_own_without_bound(
    lag: float, own_lag: float, expected: float
) -> None:
    assert patience([LAN] * 40, lag, own_lag) == pytest.approx(expected, abs=0.03)


def test_who_was_asked_nothing_is_never_silent() -> None:
    heart = Heart()
    asked(heart, [LAN] * 10)
    heart.heard()
    assert heart.verdict(1e9, 0.0) == "alive"


def test_a_peer_is_late_before_it_is_silent_and_alive_with_the_next_byte() -> None:
    heart = Heart()
    started = asked(heart, [LAN] * 10)
    verdicts = [heart.verdict(started + seconds, 0.0) for seconds in (0.01, 0.4, 1.0)]
    heart.heard()
    assert [*verdicts, heart.verdict(started + 1.0, 0.0)] == ["alive", "late", "silent", "alive"]


def test_a_lag_stays_known_when_other_bytes_come() -> None:
    heart = Heart()
    asked(heart, [LAN] * 10, lag=2.0)
    heart.heard()
    heart.sent(100.0)
    assert heart.verdict(102.0, 0.0) == "alive"


def test_a_clock_that_is_set_back_begins_the_wait_anew() -> None:
    heart = Heart()
    started = asked(heart, [LAN] * 10)
    assert heart.verdict(started - 3600.0, 0.0) == "alive"
    assert heart.verdict(started - 3599.5, 0.0) == "late"
    assert heart.verdict(started - 3598.9, 0.0) == "silent"


@pytest.mark.parametrize("phase", [0.0, 0.06, 0.12, 0.18, 0.24])
@pytest.mark.parametrize("how", ["cut", "silent death", "death"])
def test_silence_is_noticed_within_a_second_or_so(phase: float, how: str) -> None:
    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        await trio.sleep(3 + phase)
        if how == "cut":
            world.network.cut("near", "far")
        else:
            world.network.kill("far", is_silent=how == "silent death")
        assert 0.75 <= await world.silence_after(5.0) <= 1.15

    run(body)


def test_a_cut_that_is_mended_in_time_is_nobodys_silence() -> None:
    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        await trio.sleep(3)
        world.network.cut("near", "far")
        await trio.sleep(0.6)
        assert world.pulse.verdict("far") == "late"
        world.network.mend("near", "far")
        await trio.sleep(5)
        assert not world.silences
        assert world.pulse.verdict("far") == "alive"

    run(body)


def test_each_silence_is_told_once() -> None:
    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        for expected in (1, 2):
            await trio.sleep(10)
            world.network.cut("near", "far")
            await trio.sleep(60)
            assert len(world.silences) == expected
            assert world.pulse.verdict("far") == "silent"
            world.network.mend("near", "far")
        await trio.sleep(5)
        assert world.pulse.verdict("far") == "alive"

    run(body)


def test_a_broken_link_that_can_be_dialled_again_is_no_silence() -> None:
    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        for _ in range(5):
            await trio.sleep(1.1)
            world.network.break_link("near", "far")
        await trio.sleep(3)
        assert not world.silences
        world.network.cut("near", "far")
        assert await world.silence_after(5) < 1.2

    run(body)


def test_a_slow_and_jittery_link_accuses_nobody_even_while_it_is_dialled() -> None:
    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        await trio.sleep(60)
        assert not world.silences
        world.network.cut("near", "far")
        assert await world.silence_after(10) < 2.2

    run(body, delay=0.15, jitter=0.1)


def test_a_peer_that_cannot_be_dialled_is_silent_a_while_after_the_dial_failed() -> None:
    async def body(world: World) -> None:
        world.network.cut("near", "far")
        world.pulse.watch("far", world.tell)
        assert 6.5 < await world.silence_after(20) < 7.0

    run(body)


@pytest.mark.parametrize("stall", [2.0, 3600.0])
def test_our_own_stall_accuses_nobody_and_does_not_blind_us(stall: float) -> None:
    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        await trio.sleep(3)
        for _ in range(10):
            world.clock.jump(stall)
            assert world.pulse.verdict("far") != "silent"
            await trio.sleep(0.33)
        await trio.sleep(20)
        assert not world.silences
        world.network.cut("near", "far")
        assert await world.silence_after(5) < 1.5

    run(body, delay=0.11)


def test_who_is_watched_before_the_pulse_runs_is_asked_when_it_does() -> None:
    async def body(world: World) -> None:
        early = Pulse(world.near)
        early.watch("far", world.tell)
        await trio.sleep(5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(early.run)
            await trio.sleep(2)
            world.network.cut("near", "far")
            assert await world.silence_after(5) < 1.2
            nursery.cancel_scope.cancel()

    run(body)


def test_all_who_watch_are_told_but_none_after_its_release() -> None:
    async def body(world: World) -> None:
        told: list[str] = []

        def watch(name: str) -> None:
            def tell(_: str) -> None:
                told.append(name)
                watches["partner"].release()

            watches[name] = world.pulse.watch("far", tell)

        watches: dict[str, Watch] = {}
        for name in ("first", "partner", "second", "released"):
            watch(name)
        watches["released"].release()
        watches["released"].release()
        assert world.pulse.watched == {"far"}
        await trio.sleep(3)
        world.network.cut("near", "far")
        await trio.sleep(5)
        assert told == ["first", "second"]

    run(body)


def test_who_begins_to_watch_a_silent_peer_gives_it_a_wait_of_its_own() -> None:
    async def body(world: World) -> None:
        world.pulse.watch("far", lambda _: None)
        await trio.sleep(3)
        world.network.cut("near", "far")
        await trio.sleep(10)
        world.pulse.watch("far", world.tell)
        assert 0.75 < await world.silence_after(5) < 1.0

    run(body)


def test_who_is_watched_again_is_given_what_its_answers_taught() -> None:
    async def body(world: World) -> None:
        first = world.pulse.watch("far", lambda _: None)
        await trio.sleep(3)
        first.release()
        await trio.sleep(60)
        world.network.cut("near", "far")
        world.pulse.watch("far", world.tell)
        assert 0.75 < await world.silence_after(5) < 1.0

    run(body)


def test_no_more_peers_are_remembered_than_may_be_watched() -> None:
    async def body(world: World) -> None:
        for number in range(MOST_WATCHED + 10):
            world.pulse.watch(f"nobody {number}", lambda _: None).release()
        assert len(world.pulse._known) == MOST_WATCHED
        assert f"nobody {MOST_WATCHED + 9}" in world.pulse._known

    run(body)


def test_a_hundred_watches_leave_no_stream_no_task_and_no_timer() -> None:
    async def body(world: World) -> None:
        await world.near.dial("far", within=1.0)
        tasks = trio.lowlevel.current_statistics().tasks_living
        for number in range(100):
            watch = world.pulse.watch("far", world.tell)
            await trio.sleep(0.013 * (number % 25))
            watch.release()
        await trio.sleep(1.0)
        statistics = trio.lowlevel.current_statistics()
        assert statistics.tasks_living == tasks
        assert not world.network.line("near", "far").pipes
        assert statistics.seconds_to_next_deadline == float("inf")
        assert not world.pulse.watched

    run(body)


CHILD = """
import sys, threading, trio
from swarm.host import open_host
from swarm.identity import new_identity
from swarm.pulse import Pulse

def compute():
    while True:
        sum(range(100_000))

async def main():
    sys.setswitchinterval(0.0005)
    async with open_host(new_identity(), b"secret", gossip=False) as host:
        threading.Thread(target=compute, daemon=True).start()
        print(host.peer, *host.addresses, flush=True)
        await Pulse(host).run()

trio.run(main)
"""


def test_a_process_that_computes_is_alive_and_one_that_is_stopped_is_silent() -> None:
    async def main(said: list[str]) -> float:
        silent = trio.Event()
        async with (
            open_host(new_identity(), b"secret", gossip=False) as host,
            trio.open_nursery() as nursery,
        ):
            host.learn(said[0], said[1:])
            pulse = Pulse(host)
            nursery.start_soon(pulse.run)
            watch = pulse.watch(said[0], lambda _: silent.set())
            await trio.sleep(2.5)
            assert not silent.is_set()
            assert pulse.verdict(said[0]) == "alive"
            os.kill(child.pid, signal.SIGSTOP)
            stopped = trio.current_time()
            with trio.fail_after(10):
                await silent.wait()
            watch.release()
            nursery.cancel_scope.cancel()
        return trio.current_time() - stopped

    root = Path(__file__).parent.parent.parent
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, cwd=root
    )
    with child:
        try:
            assert child.stdout is not None
            seconds = trio.run(main, child.stdout.readline().split())
        finally:
            child.kill()
    assert 0.5 < seconds < 5.0  # a second when the machine is idle
