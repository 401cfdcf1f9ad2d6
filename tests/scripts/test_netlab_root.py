"""The laboratory itself: what programs meet on its hosts, and that it leaves nothing behind.

Bounds are those that a busy machine keeps too: a round trip is never shorter than asked, a rate
never higher. How exact both are, `scripts/netlab.py --check` measures.
"""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import netlab
import netlab_check
import netlab_lab
import pytest
from netlab_lab import Cable, Host, Lab, Nat, why_not
from netlab_namespace import NAMESPACES

pytestmark = pytest.mark.root

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
PORT = 7000
SILENCE_SECONDS = 0.6
"""Long against what a reset or an answer needs on a wire without delay."""


@pytest.fixture(autouse=True)
def laboratory() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def translation() -> None:
    if reason := why_not(with_nat=True):
        pytest.skip(reason)


@contextmanager
def connected(client: Host, server: Host) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection from one host to another; both ends wait at most ten seconds."""
    with closing(server.socket()) as listening, closing(client.socket()) as near:
        listening.bind(("0.0.0.0", PORT))
        listening.listen()
        near.settimeout(10)
        near.connect((server.address, PORT))
        far, _ = listening.accept()
        with closing(far):
            far.settimeout(10)
            yield near, far


@contextmanager
def datagrams(host: Host, port: int = PORT) -> Iterator[socket.socket]:
    with closing(host.socket(socket.SOCK_DGRAM)) as made:
        made.bind(("0.0.0.0", port))
        made.settimeout(10)
        yield made


def is_silent(end: socket.socket) -> bool:
    """Whether nothing comes, neither bytes nor an end."""
    end.settimeout(SILENCE_SECONDS)
    try:
        end.recv(1)
    except TimeoutError:
        return True
    finally:
        end.settimeout(10)
    return False


def left_over(process: int) -> list[str]:
    """What of a process' labs is still there: namespaces and devices."""
    devices = [name for _, name in socket.if_nameindex() if name.startswith(f"nl{process:x}.")]
    return devices + [path.name for path in NAMESPACES.glob(f"netlab-{process}-*")]


def children() -> set[int]:
    """The ids of the processes that this one started and has not reaped."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # others come and go
            words = path.read_text().rpartition(") ")[2].split()
            if int(words[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


def test_a_round_trip_takes_what_was_asked_and_changes_when_it_is_changed() -> None:
    with Lab(2, rtt_ms=40) as lab:
        for asked in (40, 10):
            found = netlab_check.measure_round_trip(lab, asked, pings=5)
            assert asked <= found.least < asked + 20


def test_a_rate_is_nearly_reached_and_never_passed() -> None:
    with Lab(2, rtt_ms=5) as lab:
        assert 10 < netlab_check.measure_rate(lab, 20, warm_seconds=1, seconds=1) < 22


def test_each_pair_has_a_cable_of_its_own() -> None:
    with Lab(["a", "b", "c"]) as lab:
        lab.link("a", "c").set(rtt_ms=300)
        began = time.monotonic()
        with connected(lab.host("a"), lab.host("b")):
            assert time.monotonic() - began < 0.3
        began = time.monotonic()
        with connected(lab.host("a"), lab.host("c")):
            assert time.monotonic() - began >= 0.3


def test_a_cut_cable_is_silent_for_both_sides_and_what_was_sent_comes_after_the_mend() -> None:
    with Lab(2) as lab, connected(lab.host("h1"), lab.host("h2")) as (near, far):
        lab.cut("h1", "h2")
        near.sendall(b"n")
        far.sendall(b"f")
        assert is_silent(near)
        assert is_silent(far)
        lab.mend("h1", "h2")
        assert (near.recv(1), far.recv(1)) == (b"f", b"n")
        assert lab.tallies()["h1", "h2"].severed > 0


def test_a_host_without_cables_is_alone_and_the_others_are_not() -> None:
    with Lab(3) as lab:
        lab.cut("h1")
        with connected(lab.host("h2"), lab.host("h3")), closing(lab.host("h2").socket()) as lonely:
            lonely.settimeout(SILENCE_SECONDS)
            with pytest.raises(TimeoutError):
                lonely.connect((lab.host("h1").address, PORT))


def test_the_seed_decides_which_packets_a_lossy_cable_loses() -> None:
    def arrived(seed: int) -> bytes:
        with (
            Lab(2, loss=0.5, seed=seed) as lab,
            datagrams(lab.host("h1")) as near,
            datagrams(lab.host("h2")) as far,
        ):
            for number in range(64):
                near.sendto(bytes([number]), (lab.host("h2").address, PORT))
            lab.link("h1", "h2").set(loss=0)
            near.sendto(b"\xff", (lab.host("h2").address, PORT))
            got = b""
            while not got.endswith(b"\xff"):
                got += far.recv(1)
            return got

    assert arrived(1) == arrived(1) != arrived(2)


def test_a_loss_meets_single_segments_of_a_stream_which_arrives_whole() -> None:
    with (
        Lab(2, loss=0.02) as lab,
        connected(lab.host("h1"), lab.host("h2")) as (near, far),
    ):
        near.sendall(bytes(300_000))
        near.shutdown(socket.SHUT_WR)
        assert sum(iter(lambda: len(far.recv(1 << 16)), 0)) == 300_000
        tally = lab.tallies()["h1", "h2"]
        assert tally.lost > 0
        assert tally.byte_count / tally.packets <= 1500


def test_what_was_sent_before_a_change_travels_as_things_were() -> None:
    before = children()
    with (
        Lab(2) as lab,
        datagrams(lab.host("h1")) as near,
        datagrams(lab.host("h2")) as far,
    ):
        [router] = children() - before
        os.kill(router, signal.SIGSTOP)  # so that it finds the packets and the change together
        for number in range(50):
            near.sendto(bytes([number]), (lab.host("h2").address, PORT))
        changing = threading.Thread(target=lab.link("h1", "h2").set, kwargs={"loss": 1})
        changing.start()
        changing.join(0.2)  # it has asked and waits
        os.kill(router, signal.SIGCONT)
        changing.join()
        near.sendto(b"\xff", (lab.host("h2").address, PORT))
        assert [far.recv(1)[0] for _ in range(50)] == list(range(50))
        assert is_silent(far)


def test_a_full_queue_drops_what_comes_last() -> None:
    with (
        Lab(2, mbit=0.1, queue_ms=200) as lab,
        datagrams(lab.host("h1")) as near,
        datagrams(lab.host("h2")) as far,
    ):
        for number in range(20):  # 82 ms each
            near.sendto(bytes([number]) * 1000, (lab.host("h2").address, PORT))
        assert [far.recv(2000)[0] for _ in range(3)] == [0, 1, 2]
        assert lab.tallies()["h1", "h2"].overflowed > 0


@pytest.mark.parametrize("nat", ["preserving", "random"])
def test_behind_a_nat_one_reaches_others_and_is_seen_at_its_address(
    nat: Nat, translation: None
) -> None:
    with Lab(2, nats={"h1": nat}) as lab, datagrams(lab.host("h2")) as far:
        with connected(lab.host("h1"), lab.host("h2")) as (near, _):
            assert near.getsockname()[0] == lab.host("h1").own_address
            assert near.getpeername()[0] == lab.host("h2").address
        with datagrams(lab.host("h1"), 5555) as near:
            near.sendto(b"who am I", (lab.host("h2").address, PORT))
            _, seen = far.recvfrom(100)
            assert seen[0] == lab.host("h1").address != lab.host("h1").own_address
            assert (seen[1] == 5555) == (nat == "preserving")
            far.sendto(b"you", seen)
            assert near.recv(100) == b"you"


def test_a_nat_lets_nobody_in_unasked_and_says_nothing(translation: None) -> None:
    with (
        Lab(2, nats={"h1": "preserving"}) as lab,
        datagrams(lab.host("h1")) as behind,
        datagrams(lab.host("h2")) as outside,
        closing(lab.host("h2").socket()) as knocking,
    ):
        outside.sendto(b"let me in", (lab.host("h1").address, PORT))
        assert is_silent(behind)
        knocking.settimeout(SILENCE_SECONDS)
        with pytest.raises(TimeoutError):
            knocking.connect((lab.host("h1").address, PORT))


def test_two_labs_of_one_process_do_not_meet() -> None:
    with (
        Lab(2) as one,
        Lab(2) as other,
        datagrams(one.host("h1")) as near,
        datagrams(other.host("h2")) as far,
    ):
        near.sendto(b"x", (other.host("h2").address, PORT))
        assert is_silent(far)


def test_a_lab_leaves_nothing_behind_even_when_something_fails_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(netlab_lab, "GRACE_SECONDS", 0.5)
    before = children()

    def use_a_lab() -> None:
        with Lab(2) as lab:
            lab.host("h1").popen(["sleep", "100"])
            lab.host("h2").popen(["sh", "-c", "sleep 100 & wait"])
            lab.host("h2").popen(["sh", "-c", "trap '' TERM; sleep 100 & wait; sleep 100"])
            assert left_over(os.getpid())
            assert len(children() - before) == 4  # the router too
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use_a_lab()
    assert not left_over(os.getpid())
    assert children() <= before


def test_a_lab_that_cannot_be_built_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(2)
    monkeypatch.setattr(lab, "_first", "no cable")
    with pytest.raises(TypeError), lab:
        pass
    assert not left_over(os.getpid())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing_behind(number: signal.Signals) -> None:
    command = [sys.executable, str(SCRIPTS / "netlab.py"), "--", "sh", "-c", "echo $$; sleep 100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said = [process.stdout.readline() for _ in range(2)] if process.stdout else []
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    shells = [int(line.split("|")[1]) for line in said]
    assert not left_over(process.pid)
    assert not [pid for pid in shells if Path(f"/proc/{pid}").exists()]


def test_what_a_killed_lab_left_is_removed_when_the_next_one_starts() -> None:
    program = "from netlab_lab import Lab; import os; Lab(2).__enter__().host('h1').popen(['sleep', '99']); os.kill(os.getpid(), 9)"  # noqa: E501
    with subprocess.Popen([sys.executable, "-c", program], cwd=SCRIPTS) as process:
        process.wait(20)
    assert left_over(process.pid)
    with Lab(1):
        assert not left_over(process.pid)


def test_a_command_runs_on_every_host_and_its_lines_tell_whose_they_are(
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = 'echo "$NETLAB_ADDRESS $NETLAB_PEERS"; test $NETLAB_HOST != h2'
    assert netlab.main(["--hosts", "3", "--", "sh", "-c", words]) == 1
    assert sorted(capfd.readouterr().out.splitlines()) == [
        "h1| 10.77.0.1 h2=10.77.0.2 h3=10.77.0.3",
        "h2| 10.77.0.2 h1=10.77.0.1 h3=10.77.0.3",
        "h3| 10.77.0.3 h1=10.77.0.1 h2=10.77.0.2",
    ]


class SlowPaper(io.StringIO):
    """Takes its time over every word, so that others could put in theirs."""

    def write(self, text: str) -> int:
        written = super().write(text)
        time.sleep(0.005)
        return written


def test_lines_of_different_hosts_never_run_into_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paper = SlowPaper()
    monkeypatch.setattr(sys, "stdout", paper)
    assert (
        netlab.main(["--hosts", "3", "--", "sh", "-c", "for i in 1 2 3 4; do echo $i; done"]) == 0
    )
    expected = [f"h{host}| {line}" for host in (1, 2, 3) for line in (1, 2, 3, 4)]
    assert sorted(paper.getvalue().splitlines()) == expected


def test_a_scenario_ends_with_the_host_it_names_after_what_befell_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(
        """
        until = "b"
        events = ["at 0.5 s kill a", "at 0.7 s start a", "at 1.0 s cut a b"]
        [hosts.a]
        command = "echo here >> $NETLAB_FOLDER/seen; sleep 100"
        [hosts.b]
        command = "sleep 1.5; cat $NETLAB_FOLDER/seen; exit 3"
        """
    )
    assert netlab.main(["--scenario", str(scenario)]) == 3
    told = capfd.readouterr()
    assert told.out.splitlines() == ["b| here", "b| here"]
    assert told.err.splitlines() == ["netlab: kill a at 0.5 s", "netlab: cut a b at 1 s"]


def test_a_play_that_names_nobody_is_over_when_all_have_ended_and_a_kill_is_no_failure(
    tmp_path: Path,
) -> None:
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(
        """
        events = ["at 0.2 s kill a"]
        [hosts.a]
        command = "sleep 100"
        [hosts.b]
        starts_at = 0.4
        command = "true"
        [hosts.c]
        """
    )
    assert netlab.main(["--scenario", str(scenario)]) == 0


def test_a_play_is_too_late_when_the_host_it_awaits_has_not_ended(tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.toml"
    scenario.write_text("until = 'a'\nseconds = 0.3\n[hosts.a]\ncommand = 'sleep 100'")
    assert netlab.main(["--scenario", str(scenario)]) == 124


def test_bad_input_is_told_with_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert netlab.main(["--loss", "2", "--", "true"]) == 2
    assert "from 0 to 1" in capsys.readouterr().err


def test_a_lab_of_unlike_cables_is_described_by_one() -> None:
    with Lab(2, cable=Cable(rtt_ms=1), mbit=5) as lab:
        assert lab.link("h1", "h2").cable == Cable(rtt_ms=1, mbit=5)
