"""Generation over sessions: chunks, endings, drafts, seeds, and lies of the last hop."""

from collections.abc import Sequence

import pytest
from session_worlds import World, candidates, next_token, run, said_after

from swarm.errors import BadInput, PeerFault
from swarm.generate import CHUNK_TOKENS, GenerateSettings, Generation, check_prompt, generate
from swarm.model_card import ModelCard
from swarm.sampling import SamplingSettings

PROMPT = [3, 1, 4, 1, 5]
CARD = ModelCard(
    format=1,
    name="arithmetic",
    model_type="none",
    blocks=4,
    hidden_size=1,
    vocabulary_size=97,
    context_length=8,
    end_of_sequence_ids=(0,),
)


def settings(most: int = 12, ends: Sequence[int] = (), **sampling: float) -> GenerateSettings:
    chosen = SamplingSettings(**sampling)  # type: ignore[arg-type]
    return GenerateSettings(most_tokens=most, end_ids=frozenset(ends), sampling=chosen)


def made(
    asked: GenerateSettings, prompt: Sequence[int] = PROMPT, draft: object = None
) -> Generation:
    kept: list[Generation] = []

    async def body(world: World) -> None:
        await world.add("0:2", "2:4")
        async with world.session() as session:
            kept.append(await generate(session, prompt, asked, draft=draft))  # type: ignore[arg-type]

    run(body)
    return kept[0]


def test_a_long_prompt_travels_in_chunks_and_only_the_last_wants_an_output() -> None:
    prompt = [n % 97 for n in range(2 * CHUNK_TOKENS + 7)]

    async def body(world: World) -> None:
        first, last = await world.add("0:2", "2:4")
        async with world.session(max_tokens=len(prompt) + 1) as session:
            said = await generate(session, prompt, settings(1))
        assert said.token_ids == [next_token(prompt)]
        for served in (first, last):
            jobs = [(job.start, job.outputs) for job in served.executor.jobs]
            assert jobs == [(0, "none"), (CHUNK_TOKENS, "none"), (2 * CHUNK_TOKENS, "last")]

    run(body)


def test_generation_ends_at_its_length_an_end_or_when_told() -> None:
    full = said_after(PROMPT, 12)
    assert made(settings(3)).finish_reason == "length"
    ended = made(settings(12, ends=[full[4]]))
    assert (ended.finish_reason, ended.token_ids) == ("end", full[: full.index(full[4]) + 1])

    async def body(world: World) -> None:
        await world.add("0:4")
        async with world.session() as session:
            stopped = await generate(session, PROMPT, settings(), lambda token: token == full[2])
        assert (stopped.finish_reason, stopped.token_ids) == ("stop", full[:3])

    run(body)


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    said = [made(settings(24, temperature=1.0, seed=seed)).token_ids for seed in (5, 5, 6)]
    assert said[0] == said[1] != said[2]


class Oracle:
    """Guesses what really comes, but each `wrong`-th token."""

    def __init__(self, wrong: int) -> None:
        self.wrong = wrong

    def guess(self, ids: Sequence[int]) -> list[int]:
        guessed = said_after(ids, 4)
        return [t + (len(ids) + n) % self.wrong // (self.wrong - 1) for n, t in enumerate(guessed)]


@pytest.mark.parametrize("wrong", [2, 3, 100])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_changes_how_many_steps_it_takes_and_not_the_tokens(
    wrong: int, temperature: float
) -> None:
    asked = settings(20, temperature=temperature, seed=1)
    plain, drafted = made(asked), made(asked, draft=Oracle(wrong))
    assert drafted.token_ids == plain.token_ids
    assert drafted.steps <= plain.steps
    assert wrong < 100 or temperature or drafted.steps <= 6


def test_the_hops_seconds_are_counted_once_a_decode_step() -> None:
    said = made(settings(20), draft=Oracle(100))
    assert said.computed_seconds == (said.steps - 1) * 2 * 0.5


@pytest.mark.parametrize("positions", [0, 2])
def test_more_or_fewer_positions_than_asked_for_are_the_last_hops_fault(positions: int) -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        lie = candidates([1] * positions)
        served.executor._computed = lambda job: (  # type: ignore[method-assign]
            (served.executor.caches.setdefault(job.key, []) and {}) or lie
        )
        async with world.session() as session:
            with pytest.raises(PeerFault, match=f"{positions} positions"):
                await generate(session, PROMPT, settings())

    run(body)


@pytest.mark.parametrize(("prompt", "word"), [([], "empty"), ([1] * 8, "context"), ([97], "97")])
def test_a_prompt_that_cannot_be_is_bad_input(prompt: list[int], word: str) -> None:
    with pytest.raises(BadInput, match=word):
        check_prompt(prompt, CARD)
