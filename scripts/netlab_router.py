#!/usr/bin/env python3
"""The wire between the hosts of a lab: a process of its own that carries packets between TUNs.

Started by netlab_lab. Reads one JSON object a line from stdin and answers each with one on stdout:

    {"hosts": [{"tun": NAME, "address": "10.77.0.1"}...], "seed": 0, "cable": {...}}   the first
    {"change": [[0, 1], {"rtt_ms": 20, ...}]}     the cable between hosts 0 and 1, both ways
    {"tallies": true}                             {"tallies": [[0, 1, {...}], ...]}

Invariants:
 1. A packet is passed on as it came, byte for byte, with what the kernel says of its checksum and
    its segments (the virtio header), so kernels may hand over 64 KiB at a time.
 2. While a cable of a host can lose packets, that host's kernel cuts its own segments: chance meets
    each packet of the size that would travel, not a bundle of forty.
 3. An answer means that the change holds for every packet sent from now on, and for none before.
 4. When stdin ends, so does the router, and its TUNs with it.
"""

import fcntl
import gc
import json
import os
import random
import select
import socket
import struct
import sys
import time
from contextlib import suppress
from heapq import heappop, heappush
from typing import Any

from netlab_wire import OFFLOAD_BYTES, QUEUE_PACKETS, Cable, Direction

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
VIRTIO_HEADER = 10  # bytes before the IP packet
BURST = 32
"""Packets read from one host before others are looked after: a millisecond's work at most."""
EARLY_NS = 200_000

Way = tuple[int, int]
"""From one host to another, by their numbers."""


class Router:
    """The TUNs of all hosts and what is on its way between them."""

    def __init__(self, hosts: list[dict[str, str]], cable: Cable, seed: int) -> None:
        """Make one TUN per host, in the network namespace of this process. OSError if refused."""
        self.tuns = [open_tun(host["tun"]) for host in hosts]
        self._numbers = {
            socket.inet_aton(host["address"]): number for number, host in enumerate(hosts)
        }
        ways = [(a, b) for a in range(len(hosts)) for b in range(len(hosts)) if a != b]
        self.directions = {way: Direction(cable) for way in ways}
        self._chances = {way: random.Random(f"{seed} {way}") for way in ways}
        self._flying: list[tuple[int, int, Way, int, bytes]] = []  # arrival, tie, way, cuts, packet
        self._ties = 0
        for number in range(len(hosts)):
            self._choose_offload(number)

    def change(self, way: Way, cable: Cable) -> None:
        """Make the cable between two hosts such a one, both ways."""
        for each in (way, way[::-1]):
            self.directions[each].change(cable)
        for number in way:
            self._choose_offload(number)

    def _choose_offload(self, number: int) -> None:
        others = (other for other in range(len(self.tuns)) if other != number)
        is_lossy = any(self.directions[number, other].cable.loss for other in others)
        fcntl.ioctl(self.tuns[number], TUNSETOFFLOAD, 0 if is_lossy else TUN_F_CSUM | TUN_F_TSO4)

    def seconds_to_sleep(self) -> float | None:
        """How long to sleep before something arrives; None: nothing is on its way.

        A long sleep ends late, by a tenth of a millisecond, so it is taken in two.
        """
        if not self._flying:
            return None
        left = max(0, self._flying[0][0] - time.monotonic_ns())
        return (left - EARLY_NS if left > 5 * EARLY_NS else left) / 1e9

    def deliver(self) -> None:
        """Hand over what has arrived."""
        while self._flying and self._flying[0][0] <= time.monotonic_ns():
            _, _, way, cuts, packet = heappop(self._flying)
            if self.directions[way].is_intact(cuts):
                self._hand_over(way, packet)

    def read(self, number: int, most: int = BURST) -> None:
        """Take what a host has sent, at most so many packets."""
        tun = self.tuns[number]
        for _ in range(most):
            try:
                packet = os.read(tun, VIRTIO_HEADER + OFFLOAD_BYTES)
            except BlockingIOError:
                return
            self._take(number, packet)

    def read_all(self) -> None:
        """Take what all hosts have sent until now."""
        for number in range(len(self.tuns)):
            self.read(number, QUEUE_PACKETS)

    def _take(self, number: int, packet: bytes) -> None:
        target = self._numbers.get(packet[VIRTIO_HEADER + 16 : VIRTIO_HEADER + 20])
        if packet[VIRTIO_HEADER] >> 4 != 4 or target is None or target == number:
            return  # not IPv4, or to nobody in this lab
        way = number, target
        direction, now = self.directions[way], time.monotonic_ns()
        chance = self._chances[way].random() if direction.cable.loss else 1.0
        arrival = direction.enter(now, len(packet) - VIRTIO_HEADER, chance)
        if arrival is None:
            return
        if arrival <= now:
            self._hand_over(way, packet)
            return
        self._ties += 1
        heappush(self._flying, (arrival, self._ties, way, direction.cuts, packet))

    def _hand_over(self, way: Way, packet: bytes) -> None:
        with suppress(OSError):  # the host's end is down: as with a real wire, nobody is told
            os.write(self.tuns[way[1]], packet)
            tally = self.directions[way].tally
            tally.packets += 1
            tally.byte_count += len(packet) - VIRTIO_HEADER


def open_tun(name: str) -> int:
    """Make a TUN device and return its descriptor, which does not block."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    return tun


def answer(router: Router, command: dict[str, Any]) -> dict[str, Any]:
    """Do what the lab asks, and say that it is done."""
    router.read_all()
    if "change" in command:
        (a, b), facts = command["change"]
        router.change((a, b), Cable(**facts))
    if "tallies" in command:
        tallies = [[*way, each.tally.as_dict()] for way, each in router.directions.items()]
        return {"tallies": tallies}
    return {"done": True}


def hurry() -> None:
    """Come before ordinary processes: this one stands for a wire, which waits for nobody."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        with suppress(OSError):
            os.nice(-10)


def main() -> None:
    """Make the TUNs, say so, and carry packets until stdin ends."""
    first = json.loads(sys.stdin.readline())
    router = Router(first["hosts"], Cable(**first["cable"]), first["seed"])
    print(json.dumps({"done": True}), flush=True)
    gc.disable()  # nothing here makes cycles, and a collection is a late packet
    hurry()
    numbers = {tun: number for number, tun in enumerate(router.tuns)}
    watched = [sys.stdin.fileno(), *router.tuns]
    while True:
        # select, because epoll counts whole milliseconds
        ready, _, _ = select.select(watched, [], [], router.seconds_to_sleep())
        router.deliver()
        for descriptor in ready:
            if descriptor in numbers:
                router.read(numbers[descriptor])
            elif line := sys.stdin.readline():  # one command waits for its answer: never two
                print(json.dumps(answer(router, json.loads(line))), flush=True)
            else:
                return


if __name__ == "__main__":
    main()
