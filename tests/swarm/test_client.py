"""A client enters by its token, finds routes among fresh records, and trusts no file unseen."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from gossiping import IDENTITIES, SECRET, Member, until
from gossiping import run as run_network

from swarm.client import open_client
from swarm.errors import NoRoute, Refusal, Unreachable
from swarm.files import FileCache, SmallFiles, fingerprint_of, serve_files
from swarm.identity import Identity
from swarm.invite import Invite, swarm_id_of
from swarm.memory import MemoryNetwork
from swarm.prompt import PromptSettings, sampling_of
from swarm.settings import DEMO_FOLDER
from swarm.text import GenerationDefaults, ModelCard

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
