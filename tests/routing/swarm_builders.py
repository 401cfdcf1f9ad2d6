"""Offers and links for the tests of `routing`, small and random ones by seed."""

from itertools import combinations
from random import Random

from routing.cost import CLIENT, CostModel, MeasuredLinks, Work
from routing.offer import Offer
from routing.span import Span


def offer(
    peer: str,
    span: str,
    *,
    decode: float = 0.01,
    prefill: float = 0.001,
    head: float = 0.0,
    wait: float = 0.0,
    free_tokens: int = 1000,
    is_online: bool = True,
    is_joining: bool = False,
) -> Offer:
    return Offer(
        peer=peer,
        span=Span.parse(span),
        decode_seconds_per_block=decode,
        prefill_seconds_per_block_token=prefill,
        head_seconds=head,
        wait_seconds=wait,
        free_tokens=free_tokens,
        is_online=is_online,
        is_joining=is_joining,
    )


def decode_cost(
    blocks: int,
    rtt: dict[tuple[str, str], float] | None = None,
    *,
    default_rtt: float = 0.02,
    penalty: float = 0.001,
) -> CostModel:
    work = Work(blocks=blocks, tokens=1, bytes_per_token=0, is_prefill=False, answer_bytes=0)
    return CostModel(MeasuredLinks(rtt or {}, default_rtt), work, penalty)


def random_swarm(random: Random, *, blocks: int, peers: int) -> list[Offer]:
    """Some servers of very different speed; not always enough of them."""
    offers = []
    for index in range(peers):
        start = random.choice([0, random.randrange(blocks)])
        stop = random.randint(start + 1, blocks)
        offers.append(
            offer(
                f"p{index}",
                f"{start}:{stop}",
                decode=random.choice([0.001, 0.01, 0.05]) * random.uniform(0.5, 1.5),
                prefill=random.uniform(0, 0.02),
                head=random.choice([0.0, 0.0, 0.02, 0.2]),
                wait=random.choice([0.0, 0.0, 0.03]),
                free_tokens=random.choice([0, 100, 1000]),
                is_online=random.random() < 0.9,
            )
        )
    return offers


def random_cost(random: Random, offers: list[Offer], *, blocks: int) -> CostModel:
    """Links without any triangle inequality, some unmeasured; either kind of step."""
    names = [CLIENT, *(each.peer for each in offers)]
    rtt = {
        pair: random.choice([0.001, 0.02, 0.3]) * random.uniform(0.5, 1.5)
        for pair in combinations(names, 2)
        if random.random() < 0.8
    }
    work = Work(
        blocks=blocks,
        tokens=random.choice([1, 7]),
        bytes_per_token=random.choice([0, 100_000]),
        is_prefill=random.random() < 0.5,
    )
    return CostModel(MeasuredLinks(rtt, 0.1), work, random.choice([0.0, 0.005]))
