"""The benches of a running swarm, with servers whose model is arithmetic, in virtual time."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import pytest
import trio
from gossiping import record
from session_worlds import BLOCKS, FINGERPRINT, VOCABULARY, Served, World, run

from routing.route import Route
from swarm.bench.parts import link_times
from swarm.bench.route import RouteSettings, bench_route
from swarm.bench.rows import PARTS, TokenTimes
from swarm.bench.users import UsersSettings, bench_users, crowd, crowd_of
from swarm.bench.watch import Stamps, stamped, watched
from swarm.client import Client
from swarm.client_session import ClientSession
from swarm.console import Console
from swarm.errors import BadInput
from swarm.fetching import Model
from swarm.files import SmallFiles
from swarm.messages import CHAIN_PROTOCOL
from swarm.model_card import ModelCard
from swarm.peers import PeerTable
from swarm.probe import PROBE_PROTOCOL, serve_probe
from swarm.record import sign_record
from swarm.settings import DEMO_FOLDER
from swarm.text import Tokens

DELAY_SECONDS = 0.01
CARD = ModelCard(
    format=1,
    name="arithmetic",
    model_type="none",
    blocks=BLOCKS,
    hidden_size=1,
    vocabulary_size=VOCABULARY,
    context_length=64,
    end_of_sequence_ids=(0,),
)
TOKENS = Tokens(SmallFiles({"tokenizer.json": (DEMO_FOLDER / "tokenizer.json").read_bytes()}))


class BenchClient(Client):
    """A client whose sessions are the world's."""

    def __init__(self, world: World) -> None:
        world.host = watched(world.host)  # type: ignore[assignment]
        model = Model(fingerprint=FINGERPRINT, card=CARD, tokens=TOKENS)
        super().__init__(world.host, world.identity, PeerTable(FINGERPRINT[:16]), model)
        self.world = world
        self.rooms: list[int] = []

    def session(
        self, max_tokens: int, *, route_seconds: float = 30.0
    ) -> AbstractAsyncContextManager[ClientSession]:
        self.rooms.append(max_tokens)
        return self.world.session(max_tokens=max_tokens, route_seconds=route_seconds)

    def tell_of(self, served: Served) -> None:
        told = record(
            served.identity,
            blocks=BLOCKS,
            span=str(served.span),
            model_name="sums",
            name=f"at {served.span.start}",
        )
        self.table.add(sign_record(told, served.identity), trio.current_time())


def in_swarm(body: Callable[[BenchClient], Awaitable[None]], *spans: str) -> None:
    """Run the body with a client of a swarm of two hops, or of these."""

    async def main(world: World) -> None:
        client = BenchClient(world)
        for served in await world.add(*(spans or ("0:2", "2:4"))):
            serve_probe(served.host)
            client.tell_of(served)
        await body(client)

    run(main, delay_seconds=DELAY_SECONDS)


def test_the_parts_of_a_tokens_time_over_known_links_are_found_and_add_up() -> None:
    async def body(client: BenchClient) -> None:
        settings = RouteSettings(prompt_tokens=40, tokens=8, repetitions=2)
        report = await bench_route(client, settings, Console())
        parts = report["per_token_ms"]
        assert parts["total"] == pytest.approx(3 * DELAY_SECONDS * 1000)
        assert sum(parts[name] for name in PARTS) == pytest.approx(parts["total"])
        assert parts["link"] == pytest.approx(2 * DELAY_SECONDS * 1000)
        assert parts["compute"] == pytest.approx(2 * 500.0)  # as these hops say
        assert parts["codec"] > 0
        assert [(hop["span"], hop["name"]) for hop in report["route"]] == [
            ("0:2", "at 0"),
            ("2:4", "at 2"),
        ]
        assert [hop["computed_ms"] for hop in report["route"]] == [500.0, 500.0]
        assert [link["source"] for link in report["links"]] == ["measured", "unknown", "measured"]
        assert (report["model"], report["routes"], report["failovers"]) == ("sums", 1, 0)

    in_swarm(body)


def test_prefill_and_decode_are_told_in_tokens_per_second() -> None:
    async def body(client: BenchClient) -> None:
        settings = RouteSettings(prompt_tokens=40, tokens=8, repetitions=3)
        prefill, decode = (await bench_route(client, settings, Console()))["rows"]
        assert (prefill["test"], decode["test"]) == ("pp40", "tg8")
        assert len(prefill["samples_tokens_per_second"]) == 3
        assert decode["tokens_per_second"] == pytest.approx(1 / (3 * DELAY_SECONDS))
        assert prefill["tokens_per_second"] > 10 * decode["tokens_per_second"]

    in_swarm(body)


def test_no_prompt_of_a_bench_is_like_another() -> None:
    async def body(client: BenchClient) -> None:
        settings = RouteSettings(prompt_tokens=20, tokens=1, repetitions=3)
        await bench_route(client, settings, Console())
        first = client.world.servers[0]
        firsts = [job for job in first.executor.jobs if job.start == 0]
        prompts = [bytes(job.payload["ids"][2]) for job in firsts]
        long = [prompt for prompt in prompts if len(prompt) == 20 * 4]
        assert len(long) == len(set(long)) == 4

    in_swarm(body, "0:4")


def test_a_default_prompt_fits_a_short_context_and_what_does_not_fit_is_refused() -> None:
    async def body(client: BenchClient) -> None:
        settings = RouteSettings(tokens=8, repetitions=1)
        assert (await bench_route(client, settings, Console()))["rows"][0]["test"] == "pp64"
        for impossible in (RouteSettings(prompt_tokens=65), RouteSettings(tokens=63)):
            with pytest.raises(BadInput, match="context of 64"):
                await bench_route(client, impossible, Console())
        with pytest.raises(BadInput) as refused:
            await bench_users(client, UsersSettings(prompt_lengths=(1, 60)), Console())
        assert "--prompts" in refused.value.next_step

    in_swarm(body)


def test_users_at_once_are_counted_together_and_each() -> None:
    async def body(client: BenchClient) -> None:
        settings = UsersSettings(users=(1, 4), prompt_lengths=(5, 20), tokens=6, repetitions=2)
        report = await bench_users(client, settings, Console())
        one, four = report["rows"]
        assert (one["users"], four["users"]) == (1, 4)
        assert one["tokens_per_second"] == pytest.approx(1 / (3 * DELAY_SECONDS))
        assert four["over_one_user"] == pytest.approx(4.0)  # arithmetic takes no time
        assert four["user_median_tokens_per_second"] == pytest.approx(one["tokens_per_second"])
        assert four["slowest_over_median"] == pytest.approx(1.0)
        assert four["gap_p50_ms"] == pytest.approx(3 * DELAY_SECONDS * 1000)
        assert sorted(client.rooms) == sorted([12 + 7, *(n + 7 for n in (5, 10, 15, 20))] * 3)

    in_swarm(body)


def test_users_begin_to_decode_together_though_one_comes_late() -> None:
    async def body(client: BenchClient) -> None:
        find, came = client.world.find, 0

        async def find_slowly(avoid: frozenset[str], needed: int) -> Route:
            nonlocal came
            came += 1
            await trio.sleep(1.0 if came == 1 else 0.0)
            return await find(avoid, needed)

        client.world.find = find_slowly  # type: ignore[method-assign]
        made = await crowd(client, [[1] * 3, [2] * 30, [3]], 5)
        assert len({times[0].began for times in made.times}) == 1
        assert [len(times) for times in made.times] == [5, 5, 5]

    in_swarm(body)


def _steady(seconds: float, tokens: int) -> list[TokenTimes]:
    began = [number * seconds for number in range(tokens)]
    return [TokenTimes(began=at, written=at, came=at, ended=at + seconds) for at in began]


def test_a_slow_user_counts_for_what_it_got_until_the_first_had_all() -> None:
    made = crowd_of([_steady(0.1, 10), _steady(0.25, 5)], 10, failovers=0)
    assert made.seconds == pytest.approx(1.0)
    assert made.speeds == pytest.approx([10.0, 4.0])


def test_the_wait_for_a_swarm_that_is_gone_ends_with_its_reason() -> None:
    async def body(client: BenchClient) -> None:
        with pytest.raises(BaseExceptionGroup) as raised:
            await crowd(client, [[1], [2]], 5, patience_seconds=1.0)
        assert "block 2" in str(raised.value.exceptions[0])

    in_swarm(body, "0:2")


def test_streams_are_stamped_for_the_task_that_asked_and_only_those_of_the_chain() -> None:
    async def body(client: BenchClient) -> None:
        server = client.world.servers[0].peer
        unwatched = await client.host.open(server, CHAIN_PROTOCOL, within=1.0)
        stamps = stamped()
        chain = await client.host.open(server, CHAIN_PROTOCOL, within=1.0)
        probe = await client.host.open(server, PROBE_PROTOCOL, within=1.0)
        for other in (unwatched, probe):
            await other.send_all(b"\0")
        assert stamps.written is None
        await trio.sleep(1.0)
        await chain.send_all(b"\0")
        assert (stamps.written, chain.peer) == (trio.current_time(), server)
        for stream in (unwatched, chain, probe):
            await stream.close()

    in_swarm(body)


def test_the_first_write_of_a_step_counts_and_the_last_read() -> None:
    async def body(client: BenchClient) -> None:
        stamps = Stamps()
        for _ in range(2):
            stamps.write()
            stamps.read()
            await trio.sleep(1.0)
        began = trio.current_time() - 2.0
        assert (stamps.written, stamps.came) == (began, began + 1.0)
        stamps.expect()
        stamps.write()
        assert stamps.written == began + 2.0

    in_swarm(body)


def test_a_link_that_coordinates_predict_is_told_as_such() -> None:
    async def body(client: BenchClient) -> None:
        place = (0.01, 0.0, 0.0, 0.0, 0.005, 0.1)
        for served in client.world.servers:
            told = record(served.identity, sequence=2, span=str(served.span), place=place)
            client.table.add(sign_record(told, served.identity), trio.current_time())
        peers = [served.peer for served in client.world.servers]
        inner = link_times(client, peers)[1]
        assert (inner.source, inner.facts()["one_way_ms"]) == ("predicted", pytest.approx(5.0))

    in_swarm(body)
