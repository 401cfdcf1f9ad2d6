#!/usr/bin/env python3
"""Time what it takes to learn of a large swarm over loopback: the whole table, and a view of it.

    python scripts/table_size.py [--peers 2000] [--blocks 80] [--rounds 5]

One host holds the records of so many servers, of the size that real ones have; another reads them,
verifies each signature and keeps them. `renewed`: a view read five seconds later, when as many
records are new as a swarm of this size announces in that time. `choosing`: what it costs the
giver's processor to rank all servers, at most once a second and again when one comes or goes.
"""

import argparse
import json
import time
from random import Random
from statistics import median

import msgspec
import trio

from routing.span import Span
from swarm.gossip import Gossip
from swarm.host import open_host
from swarm.identity import Identity, new_identity
from swarm.peers import PeerTable
from swarm.record import PeerRecord, sign_record
from swarm.tables import MOST_KNOWN, Given, fetch_table, fetch_view
from swarm.transport import Host

SECRET = b"0123456789abcdef"
FINGERPRINT = "ab" * 32
WITHIN = 120.0
REFRESH_SECONDS = 5.0
ANNOUNCE_SECONDS = 30.0  # of a swarm of a thousand and more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=int, default=2000)
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    print(json.dumps(trio.run(measure, asked.peers, asked.blocks, asked.rounds), indent=2))


def records_of(peers: int, blocks: int) -> dict[Identity, PeerRecord]:
    random = Random(0)
    made = {}
    for number in range(peers):
        identity = Identity(number.to_bytes(4, "big") * 8)
        start = random.randrange(blocks - 7)
        address = f"/ip4/203.0.113.{number % 256}/tcp/{random.randint(1024, 65535)}"
        made[identity] = PeerRecord(
            peer=identity.peer,
            sequence=1,
            addresses=(f"{address}/p2p/{identity.peer}",),
            fingerprint=FINGERPRINT,
            checkpoint_digest="cd" * 32,
            files_digest="ef" * 32,
            hub_name="organization/a-model-of-80-blocks",
            model_name="a-model-of-80-blocks",
            blocks=blocks,
            span=str(Span(start, start + random.randint(4, 8))),
            decode_seconds_per_block=random.uniform(0.001, 0.05),
            prefill_seconds_per_block_token=random.uniform(0.0001, 0.001),
            free_tokens=random.randrange(100_000),
            place=tuple(round(random.uniform(0.01, 0.1), 5) for _ in range(6)),
            name=f"server {number}",
            version="0.1.0",
            valid_seconds=105.0,
        )
    return made


async def measure(peers: int, blocks: int, rounds: int) -> dict[str, object]:
    made = records_of(peers, blocks)
    giver_is, reader_is = new_identity(), new_identity()
    table = PeerTable()
    async with (
        open_host(giver_is, SECRET) as giver,
        open_host(reader_is, SECRET) as reader,
        trio.open_nursery() as nursery,
    ):
        gossip = Gossip(giver, SECRET, table, identity=giver_is, rng=Random(0))
        nursery.start_soon(gossip.run)
        reader.learn(giver.peer, giver.addresses)
        await reader.dial(giver.peer, within=10)
        results = await read(reader, giver.peer, table, made, rounds)
        nursery.cancel_scope.cancel()
    return {"peers": peers, "blocks": blocks, **results}


async def read(
    reader: Host, peer: str, table: PeerTable, made: dict[Identity, PeerRecord], rounds: int
) -> dict[str, object]:
    whole, view, renewed, choosing = [], [], [], []
    random = Random(1)
    for _ in range(rounds):
        renew(table, made, list(made))
        own, fewer = PeerTable(), PeerTable()
        whole.append(await timed(fetch_table(reader, peer, WITHIN), own))
        view.append(await timed(fetch_view(reader, peer, WITHIN, known={}), fewer))
        share = min(1.0, REFRESH_SECONDS / ANNOUNCE_SECONDS)
        renew(table, made, random.sample(list(made), round(share * len(made))))
        known = fewer.known(MOST_KNOWN)
        renewed.append(await timed(fetch_view(reader, peer, WITHIN, known=known), fewer))
        began = time.thread_time()
        table.view(trio.current_time() + 2.0, {})
        choosing.append(time.thread_time() - began)
    return {
        "whole": summed(whole),
        "view": summed(view),
        "renewed": summed(renewed),
        "choosing_ms": round(1000 * min(choosing), 1),
    }


def renew(table: PeerTable, made: dict[Identity, PeerRecord], which: list[Identity]) -> None:
    for identity in which:
        made[identity] = msgspec.structs.replace(
            made[identity], sequence=made[identity].sequence + 1
        )
        table.add(sign_record(made[identity], identity), trio.current_time())


async def timed(fetching: object, table: PeerTable) -> tuple[float, int, int]:
    """Seconds until everything is verified and kept, records, bytes."""
    began = time.perf_counter()
    given: Given = await fetching  # type: ignore[misc]
    for signed, age in given.records:
        table.add(signed, trio.current_time(), age)
        await trio.lowlevel.checkpoint()
    seconds = time.perf_counter() - began
    return seconds, len(given.records), sum(len(signed) for signed, _ in given.records)


def summed(runs: list[tuple[float, int, int]]) -> dict[str, float]:
    seconds, records, size = zip(*runs, strict=True)
    return {
        "ms": round(1000 * median(seconds), 1),
        "least_ms": round(1000 * min(seconds), 1),
        "records": median(records),
        "kilobytes": round(median(size) / 1000, 1),
    }


if __name__ == "__main__":
    main()
