"""Eight hosts over real sockets learn of each other, whatever the order in which they came."""

from collections.abc import Iterable
from contextlib import AsyncExitStack

import trio

from routing.span import Span
from swarm.host import open_host
from swarm.identity import new_identity
from swarm.invite import new_secret
from swarm.model import describe
from swarm.node import Holding, Node, open_node
from swarm.pace import Speeds
from swarm.settings import DEMO_FOLDER

HOSTS = 8


class IdleExecutor:
    """Never gets a job here; its file is never readable."""

    def __init__(self) -> None:
        import os

        self._file = os.eventfd(0, os.EFD_NONBLOCK)

    def submit(self, job: object) -> None:
        raise AssertionError("nothing is computed in this test")

    def collect(self) -> list[object]:
        return []

    def fileno(self) -> int:
        return self._file


async def until(nodes: list[Node], count: int, which: Iterable[int]) -> None:
    """Wait until each of these knows of exactly so many servers."""
    with trio.fail_after(30):
        for number in which:
            node, news = nodes[number], trio.Event()
            while len(node.records()) != count:
                news = trio.Event()
                node.gossip.watch(lambda _peer, _record, news=news: news.set())
                await news.wait()


def test_eight_hosts_know_each_other_and_forget_who_leaves() -> None:
    described = describe(DEMO_FOLDER)
    secret = new_secret()

    async def add(stack: AsyncExitStack, known: tuple[str, tuple[str, ...]] | None) -> Node:
        identity = new_identity()
        host = await stack.enter_async_context(open_host(identity, secret))
        seeds = ()
        if known is not None:
            host.learn(*known)
            await host.dial(known[0], within=10)
            seeds = (known[0],)
        node = await stack.enter_async_context(
            open_node(host, identity, secret, described, seeds=seeds)
        )
        await node.hold(
            Holding(
                span=Span(0, 8),
                executor=IdleExecutor(),
                cache_tokens=1000,
                speeds=Speeds(
                    decode_seconds_per_block=0.001,
                    prefill_seconds_per_block_token=0.001,
                    head_seconds=0.0,
                ),
                dtype="float32",
                device="cpu",
            )
        )
        return node

    async def main() -> None:
        async with AsyncExitStack() as stack:
            nodes = [await add(stack, None)]
            while len(nodes) < HOSTS:
                last = nodes[-1].host
                nodes.append(await add(stack, (last.peer, last.addresses)))
            await until(nodes, HOSTS, range(HOSTS))
            await nodes[3].drain(within=1.0)
            await until(nodes, HOSTS - 1, [0, 1, 2, 4, 5, 6, 7])

    trio.run(main)
