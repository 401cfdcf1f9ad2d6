"""A client enters by its token, finds routes among fresh records, and trusts no file unseen."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import trio
from gossiping import IDENTITIES, SECRET, SWARM_ID, Member, record, until
from gossiping import run as run_network

from routing.repair import NOTHING_RETRIED, Kind, Retried, Trouble
from routing.route import Hop
from routing.span import Span
from swarm.client import (
    ANSWER_ROUND_TRIPS,
    ANSWER_SECONDS,
    REFRESH_SECONDS,
    open_client,
)
from swarm.client_session import Broken
from swarm.errors import NoRoute, Refusal, Unreachable
from swarm.files import FileCache, SmallFiles, fingerprint_of, serve_files
from swarm.identity import Identity
from swarm.invite import Invite, swarm_id_of
from swarm.memory import MemoryHost, MemoryNetwork
from swarm.model_card import GenerationDefaults, ModelCard
from swarm.peers import PeerTable
from swarm.probe import serve_probe
from swarm.prompt import PromptSettings, sampling_of
from swarm.reading import read_tables, read_views
from swarm.record import PeerRecord, sign_record, tombstone_of
from swarm.settings import DEMO_FOLDER

CARD = ModelCard(
    format=1,
    name="tiny",
    model_type="llama",
    blocks=8,
    hidden_size=4,
    vocabulary_size=512,
    context_length=64,
    end_of_sequence_ids=(2,),
)
FILES = SmallFiles(
    {
        "model.json": CARD.written(),
        "tokenizer.json": (DEMO_FOLDER / "tokenizer.json").read_bytes(),
    }
)
FINGERPRINT = fingerprint_of("checkpoint", FILES.digest)
ME = Identity(b"\x77" * 32)
MANY = [Identity(number.to_bytes(2, "big") * 16) for number in range(1, 201)]


class Swarm:
    """Members of one model's swarm; nobody computes."""

    def __init__(self, network: MemoryNetwork, nursery: trio.Nursery) -> None:
        self.network = network
        self.nursery = nursery
        self.members: list[Member] = []

    async def add(self, span: str, **changes: object) -> Member:
        member = Member(self.network, IDENTITIES[len(self.members)], self.nursery)
        member.gossip._table._swarm_id = swarm_id_of(FINGERPRINT)
        serve_files(member.host, FILES)
        if self.members:
            await member.join(self.members[0])
        self.members.append(member)
        facts = {
            "fingerprint": FINGERPRINT,
            "checkpoint_digest": "checkpoint",
            "files_digest": FILES.digest,
            "free_tokens": 100,
            "span": span,
        }
        await member.announce(**{**facts, **changes})
        return member

    def tell_of(self, number: int, sequence: int = 1, **changes: object) -> PeerRecord:
        """Let all members know of a server that is not there."""
        facts = {
            "fingerprint": FINGERPRINT,
            "span": "0:8",
            "free_tokens": 1000,
            "decode_seconds_per_block": 0.001 * number + 0.01,
            "valid_seconds": 100.0,
        }
        told = record(MANY[number], sequence=sequence, **{**facts, **changes})
        for member in self.members:
            member.table.add(sign_record(told, MANY[number]), trio.current_time())
        return told

    def tell_of_the_end(self, told: PeerRecord) -> None:
        number = next(n for n, identity in enumerate(MANY) if identity.peer == told.peer)
        gone = tombstone_of(record(MANY[number], sequence=told.sequence + 1, span=told.span))
        gone = msgspec.structs.replace(gone, fingerprint=FINGERPRINT)
        for member in self.members:
            member.table.add(sign_record(gone, MANY[number]), trio.current_time())

    def invite(self, secret: bytes = SECRET, swarm_id: str = swarm_id_of(FINGERPRINT)) -> Invite:
        peer = self.members[0].peer
        return Invite(addresses=(f"/memory/p2p/{peer}",), secret=secret, swarm_id=swarm_id)

    async def client_host(self, secret: bytes = SECRET) -> "object":
        host = self.network.attach(ME, secret, is_listening=False)
        first = self.members[0]
        learn = host.learn

        def known(peer: str, addresses: object) -> None:
            learn(peer, (f"/memory/{peer}",))

        host.learn = known  # type: ignore[method-assign, assignment]
        assert first.host.addresses == (f"/memory/{first.peer}",)
        return host


def run(body: Callable[[Swarm, Path], Awaitable[None]], cache: Path) -> None:
    run_network(lambda network, nursery: body(Swarm(network, nursery), cache))


def test_a_server_that_comes_while_a_client_waits_is_found(tmp_path: Path) -> None:
    async def body(swarm: Swarm, cache: Path) -> None:
        await swarm.add("0:4")
        host = await swarm.client_host()
        async with open_client(host, ME, swarm.invite(), FileCache(cache)) as client:
            with pytest.raises(NoRoute) as missing:
                await client.find_route(frozenset(), 10)
            assert missing.value.uncovered == ("4:8",)
            late = await swarm.add("4:8")
            await until(lambda: swarm.members[0].knows(late), within=30.0)
            route = await client.find_route(frozenset(), 10)
            assert [hop.peer for hop in route.hops] == [m.peer for m in swarm.members]
            with pytest.raises(NoRoute) as full:
                await client.find_route(frozenset(), 101)
            assert full.value.exit_code == 5

    run(body, tmp_path)


def test_a_client_without_any_link_dials_the_servers_it_knows(tmp_path: Path) -> None:
    async def body(swarm: Swarm, cache: Path) -> None:
        first, other = await swarm.add("0:8"), await swarm.add("0:8")
        await until(lambda: first.knows(other), within=30.0)
        host = await swarm.client_host()
        async with open_client(host, ME, swarm.invite(), FileCache(cache)) as client:
            for member in (first, other):
                if member.peer in host.links():
                    swarm.network.break_link(ME.peer, member.peer)
            assert not host.links()
            await client.refresh()
            assert host.links()

    run(body, tmp_path)


def test_a_client_of_a_large_swarm_holds_the_best_and_hears_what_becomes_of_them(
    tmp_path: Path,
) -> None:
    async def body(swarm: Swarm, cache: Path) -> None:
        await swarm.add("0:8", decode_seconds_per_block=0.001)
        told = [swarm.tell_of(number) for number in range(200)]
        host = await swarm.client_host()
        async with open_client(host, ME, swarm.invite(), FileCache(cache)) as client:
            assert len(client.records()) < 12
            fastest, slowest = told[0].peer, told[199].peer
            assert client.record_of(fastest) is not None
            assert client.record_of(slowest) is None
            swarm.tell_of_the_end(told[0])
            moved = swarm.tell_of(1, 2, span="2:6", decode_seconds_per_block=9.0)
            await trio.sleep(5.5)  # the records are read again every five seconds
            assert client.record_of(fastest) is None
            assert client.record_of(moved.peer) == moved
            await client.refresh(is_whole=True)
            assert client.record_of(slowest) is not None

    run(body, tmp_path)


def test_a_client_that_avoids_all_it_knows_is_shown_others(tmp_path: Path) -> None:
    async def body(swarm: Swarm, cache: Path) -> None:
        await swarm.add("0:8")
        for number in range(200):
            swarm.tell_of(number)
        host = await swarm.client_host()
        async with open_client(host, ME, swarm.invite(), FileCache(cache)) as client:
            avoid: frozenset[str] = frozenset()
            for _ in range(4):
                route = await client.find_route(avoid, 10)
                assert not {hop.peer for hop in route.hops} & avoid
                avoid |= {found.peer for found in client.records()}

    run(body, tmp_path)


def test_if_all_with_room_that_a_client_knows_refuse_it_is_shown_others(tmp_path: Path) -> None:
    async def body(swarm: Swarm, cache: Path) -> None:
        await swarm.add("4:8", free_tokens=9000)
        for number in range(200):
            swarm.tell_of(number)
        slow = range(196, 200)  # so that nothing but their room speaks for them
        roomy = [swarm.tell_of(n, 2, span="0:4", free_tokens=9000 - n).peer for n in slow]
        host = await swarm.client_host()
        async with open_client(host, ME, swarm.invite(), FileCache(cache)) as client:
            assert [p for p in roomy if client.record_of(p)] == roomy[:2]
            spans = [Span(0, 2), Span(2, 4), Span(4, 8)]
            peers = [*roomy[:2], swarm.members[0].peer]
            broken = Broken(
                hops=tuple(Hop(peer, span) for peer, span in zip(peers, spans, strict=True)),
                troubles=tuple(Trouble(peers[n], spans[n], "refused") for n in range(2)),
                retried=NOTHING_RETRIED,
                suspects=(),
            )
            mended = await client.repair_route(broken, 5000)
            assert {hop.peer for hop in mended.hops} <= {*roomy[2:], swarm.members[0].peer}

    run(body, tmp_path)


@pytest.mark.parametrize("read", [read_tables, read_views])
def test_a_newcomers_empty_table_does_not_end_the_wait_for_those_who_know(
    read: Callable[[MemoryHost, PeerTable], Awaitable[None]],
) -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        newcomer, far = (Member(network, IDENTITIES[n], nursery) for n in range(2))
        await far.announce()
        client = network.attach(ME, SECRET, is_listening=False)
        network.delay(ME.peer, far.peer, 0.5)
        for member in (newcomer, far):
            client.learn(member.peer, member.host.addresses)
            await client.dial(member.peer, within=5.0)
        table = PeerTable(SWARM_ID)
        await read(client, table)
        assert table.record_of(far.peer) is not None

    run_network(body)


@pytest.mark.parametrize("is_known_already", [False, True])
def test_once_one_has_answered_a_silent_one_delays_no_reading(is_known_already: bool) -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        near, silent = (Member(network, IDENTITIES[n], nursery) for n in range(2))
        await near.announce()
        client = network.attach(ME, SECRET, is_listening=False)
        for member in (near, silent):
            client.learn(member.peer, member.host.addresses)
            await client.dial(member.peer, within=5.0)
        network.cut(ME.peer, silent.peer)
        table = PeerTable(SWARM_ID)
        for _ in range(1 + is_known_already):
            started = trio.current_time()
            await read_views(client, table)
            assert trio.current_time() - started < 0.5
        assert table.record_of(near.peer) is not None

    run_network(body)


def test_whom_a_table_names_can_be_dialled_at_once() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        near, far = (Member(network, IDENTITIES[n], nursery) for n in range(2))
        for member in (near, far):
            await member.announce()
        await far.join(near)
        await until(lambda: near.knows(far), within=30.0)
        newcomer = Member(network, IDENTITIES[2], nursery)
        await newcomer.join(near)
        await read_tables(newcomer.host, newcomer.table)  # gossip takes them for old news then
        await newcomer.host.dial(far.peer, within=1.0)

    run_network(body)


def test_a_server_whose_weights_most_others_contradict_is_on_no_route(tmp_path: Path) -> None:
    async def body(swarm: Swarm, cache: Path) -> None:
        honest = [await swarm.add("0:8", digests=b"a" * 48) for _ in range(2)]
        wrong = b"a" * 42 + b"X" * 6
        damaged = await swarm.add("0:8", digests=wrong, decode_seconds_per_block=0.0001)
        await until(lambda: swarm.members[0].knows(damaged), within=30.0)
        host = await swarm.client_host()
        async with open_client(host, ME, swarm.invite(), FileCache(cache)) as client:
            route = await client.find_route(frozenset(), 10)
            assert route.hops[0].peer in {member.peer for member in honest}

    run(body, tmp_path)


def test_who_wants_exact_words_asks_no_quantized_server(tmp_path: Path) -> None:
    async def body(swarm: Swarm, cache: Path) -> None:
        plain = await swarm.add("0:4")
        fast = await swarm.add("0:8", quantization="nf4", decode_seconds_per_block=0.0001)
        await until(lambda: plain.knows(fast), within=30.0)
        host = await swarm.client_host()
        async with open_client(host, ME, swarm.invite(), FileCache(cache)) as client:
            assert (await client.find_route(frozenset(), 10)).hops[0].peer == fast.peer
            client.is_exact = True
            with pytest.raises(NoRoute, match="blocks 4:8 are served by nobody") as missing:
                await client.find_route(frozenset(), 10)
            assert "--exact" in str(missing.value.next_step)
            late = await swarm.add("4:8")
            await until(lambda: plain.knows(late), within=30.0)
            route = await client.find_route(frozenset(), 10)
            assert [hop.peer for hop in route.hops] == [plain.peer, late.peer]

    run(body, tmp_path)


def test_a_client_keeps_links_to_servers_that_came_later(tmp_path: Path) -> None:
    async def body(swarm: Swarm, cache: Path) -> None:
        await swarm.add("0:8")
        host = await swarm.client_host()
        async with open_client(host, ME, swarm.invite(), FileCache(cache)) as client:
            later = await swarm.add("0:8")
            await until(lambda: later.peer in client.host.links(), within=4 * REFRESH_SECONDS)

    run(body, tmp_path)


def test_another_swarms_token_is_refused_and_nobody_is_unreachable(tmp_path: Path) -> None:
    async def body(swarm: Swarm, cache: Path) -> None:
        await swarm.add("0:8")
        host = await swarm.client_host(b"x" * 16)
        with pytest.raises(Refusal, match="secret"):
            async with open_client(host, ME, swarm.invite(b"x" * 16), FileCache(cache)):
                pass
        swarm.network.kill(swarm.members[0].peer)
        with pytest.raises(Unreachable, match="answers"):
            async with open_client(host, ME, swarm.invite(), FileCache(cache)):
                pass

    run(body, tmp_path)


def test_a_server_whose_digests_do_not_prove_its_fingerprint_gives_no_files(
    tmp_path: Path,
) -> None:
    async def body(swarm: Swarm, cache: Path) -> None:
        await swarm.add("0:8", checkpoint_digest="another")
        host = await swarm.client_host()
        with pytest.raises(Exception, match="which files"):
            async with open_client(host, ME, swarm.invite(), FileCache(cache)):
                pass

    run(body, tmp_path)


def test_the_users_choice_is_completed_by_the_models_own() -> None:
    defaults = GenerationDefaults(top_p=0.9, top_k=7, repetition_penalty=1.5)
    plain = sampling_of(defaults, PromptSettings(prompt="x", temperature=1.0))
    assert (plain.top_p, plain.top_k, plain.repetition_penalty) == (0.9, 7, 1.5)
    chosen = PromptSettings(prompt="x", temperature=1.0, top_p=0.5, top_k=0, seed=3)
    asked = sampling_of(defaults, chosen)
    assert (asked.top_p, asked.top_k, asked.seed) == (0.5, 0, 3)


@pytest.mark.parametrize(
    ("kind", "is_passed_over"), [("silent", True), ("unreachable", True), ("link", False)]
)
def test_after_a_silence_a_server_that_is_silent_too_takes_nobodys_place(
    tmp_path: Path, kind: Kind, is_passed_over: bool
) -> None:
    """A closed stream is mended at once: nothing says then that others are in trouble."""

    async def body(swarm: Swarm, cache: Path) -> None:
        whole = await swarm.add("0:8")
        for _ in range(2):
            await swarm.add("4:8", decode_seconds_per_block=0.0001)
        fast = [member.peer for member in swarm.members[1:]]
        for member in swarm.members:
            serve_probe(member.host)
        async with open_client(
            await swarm.client_host(), ME, swarm.invite(), FileCache(cache)
        ) as client:
            await client.refresh(is_whole=True)
            assert len(client.records()) == 3
            for peer in fast:
                await client.host.dial(peer, within=1.0)
            swarm.network.cut(client.host.peer, fast[0])
            swarm.network.cut(client.host.peer, fast[1])
            hops = (Hop(whole.peer, Span(0, 4)), Hop("gone", Span(4, 8)))
            broken = Broken(
                hops=hops,
                troubles=(Trouble("gone", Span(4, 8), kind),),
                retried=Retried(frozenset({("gone", Span(4, 8))})),
                suspects=(),
            )
            began = trio.current_time()
            mended = await client.repair_route(broken, 10)
            chosen = {hop.peer for hop in mended.hops}
            assert bool(chosen & {*fast}) != is_passed_over
            assert trio.current_time() - began < 3 * (ANSWER_SECONDS + ANSWER_ROUND_TRIPS * 0.15)

    run(body, tmp_path)
