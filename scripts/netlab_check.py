"""How true a lab is: what plain TCP programs measure on its hosts, beside what was asked.

Invariants:
 1. The programs know nothing of the lab: one answers every byte or takes all it gets, the other
    times a byte's way there and back, or counts what arrives.
 2. Round trips are the median of many on an idle wire; a rate is what arrives within a window that
    opens when the connection has found its speed.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from netlab_lab import Lab

ROUND_TRIPS_MS = (0, 1, 5, 20, 50, 100, 200, 300)
RATES_MBIT = (10, 30, 100, 300, 1000)
PINGS = 25

COMMON = """
import json, socket, sys, time
def listening():
    made = socket.create_server(("0.0.0.0", 7000))
    print("ready", flush=True)
    met, _ = made.accept()
    met.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return met
def connected():
    made = socket.create_connection((sys.argv[1], 7000))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made
"""
ECHO = """
met = listening()
while got := met.recv(1):
    met.sendall(got)
"""
PING = """
made, took = connected(), []
for _ in range(int(sys.argv[2]) + 1):
    began = time.monotonic()
    made.sendall(b"x")
    made.recv(1)
    took.append((time.monotonic() - began) * 1000)
    time.sleep(0.01)
took = sorted(took[1:])
print(json.dumps([took[0], took[len(took) // 2], took[-1]]))
"""
SOURCE = """
met, block = listening(), bytes(1 << 18)
try:
    while True:
        met.sendall(block)
except OSError:
    pass
"""
SINK = """
made, space = connected(), bytearray(1 << 18)
opens = time.monotonic() + float(sys.argv[2])
while time.monotonic() < opens:
    made.recv_into(space)
began, count = time.monotonic(), 0
while (now := time.monotonic()) < began + float(sys.argv[3]):
    count += made.recv_into(space)
print(json.dumps(count * 8 / (now - began) / 1e6))
"""


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Milliseconds."""

    asked: float
    least: float
    median: float
    most: float


def python(program: str, *arguments: object) -> list[str]:
    """The command of one of the programs above."""
    return [sys.executable, "-c", COMMON + program, *map(str, arguments)]


@contextmanager
def running(lab: Lab, program: str) -> Iterator[None]:
    """Run a program on h1 that others can reach, until the block ends."""
    with lab.host("h1").popen(python(program), stdout=subprocess.PIPE) as process:
        if process.stdout is not None:
            process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def measure_round_trip(lab: Lab, asked_ms: float, pings: int = PINGS) -> RoundTrip:
    """Set the cable of h1 and h2 to a round trip and return what a byte takes over it."""
    lab.link("h1", "h2").set(rtt_ms=asked_ms)
    with running(lab, ECHO):
        said = lab.host("h2").run(python(PING, lab.host("h1").address, pings))
    return RoundTrip(asked_ms, *json.loads(said))


def measure_rate(lab: Lab, asked_mbit: float, warm_seconds: float, seconds: float) -> float:
    """Set the cable of h1 and h2 to a rate; return the Mbit/s of bytes that a program gets."""
    lab.link("h1", "h2").set(mbit=asked_mbit)
    with running(lab, SOURCE):
        said = lab.host("h2").run(python(SINK, lab.host("h1").address, warm_seconds, seconds))
    return float(said)


def check() -> Iterator[str]:
    """Measure all and give the lines of a table as they come."""
    yield "round trip, ms, idle: asked, measured (least, median, most of 25), median off by"
    with Lab(2) as lab:
        for asked in ROUND_TRIPS_MS:
            found = measure_round_trip(lab, asked)
            row = f"{found.least:9.2f} {found.median:9.2f} {found.most:9.2f}"
            yield f"{asked:9} {row} {found.median - asked:+9.2f}"
    yield "rate, Mbit/s, over a round trip of 10 ms: asked, measured in 4 s after 2 s, off by"
    for mbit in RATES_MBIT:
        with Lab(2, rtt_ms=10) as lab:
            rate = measure_rate(lab, mbit, warm_seconds=2, seconds=4)
            dropped = lab.tallies()["h1", "h2"].overflowed
        yield f"{mbit:9} {rate:9.1f} {(rate / mbit - 1) * 100:+8.1f} %   {dropped} dropped"
