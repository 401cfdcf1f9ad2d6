"""Sessions whose keys lie in pages, with recorded steps, get what each gets without, alone."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_models import BLOCKS, TinyModel, assert_same, some_ids

from blocks.cache import StackCache
from blocks.decoding import Decoder
from blocks.errors import BlocksError
from blocks.forward import Carved
from blocks.hf.forwards import CACHE_NAMES
from blocks.load import Dtype, load_stack
from blocks.recorder import GraphRecorder, Recorder, TraceRecorder
from blocks.stack import Stack
from blocks.trial import Paging

Get = Callable[[str, bool], TinyModel]
PAGE = 8  # positions: so that texts cross pages
MOST_SESSIONS = 16


def stacks_of(model: TinyModel, start: int = 0, **paging: Any) -> tuple[Stack, Stack]:
    """The blocks from `start` on as they are on a CPU, and with keys in pages."""
    plain = load_stack(model.checkpoint, start, BLOCKS)
    recorder: Recorder | None = paging.pop("recorder", TraceRecorder())
    wish = Paging(PAGE, recorder, **paging)
    return plain, Stack.of(plain._carved.model, start, BLOCKS, wish)


def decoder_of(stack: Stack) -> Decoder:
    assert stack._decoder is not None
    return stack._decoder


@dataclass
class Session:
    """One session as it is without pages, and with."""

    plain: StackCache
    paged: StackCache

    def fork(self, length: int) -> "Session":
        return Session(self.plain.fork(length), self.paged.fork(length))

    def lengths(self) -> Iterator[int]:
        """Those it could be forked at."""
        ours, theirs = self.paged.shortest_fork, self.plain.shortest_fork
        if ours is not None and theirs is not None:
            yield from range(max(ours, theirs), self.plain.length + 1)


class World:
    """Sessions that come and go, and every step taken both ways."""

    def __init__(self, plain: Stack, paged: Stack, seed: int) -> None:
        self.plain, self.paged = plain, paged
        self.random = random.Random(seed)
        self.sessions: list[Session] = []
        self.forks = self.rollbacks = self.freed = self.steps = 0

    def comes(self) -> None:
        session = Session(self.plain.new_cache(), self.paged.new_cache())
        self._run(session, self._inputs(self.random.randint(1, 14)))
        self.sessions.append(session)

    def forked(self) -> None:
        donor = self.random.choice(self.sessions)
        lengths = list(donor.lengths())
        if lengths and len(self.sessions) < MOST_SESSIONS:
            self.sessions.append(donor.fork(self.random.choice(lengths)))
            self.forks += 1

    def rolled_back(self) -> None:
        session = self.random.choice(self.sessions)
        length = self.random.randrange(max(1, session.plain.length - 9), session.plain.length + 1)
        if session.plain.can_roll_back(length) and session.paged.can_roll_back(length):
            session.plain.rollback(length)
            session.paged.rollback(length)
            self.rollbacks += 1

    def goes_on(self) -> None:
        """One session reads a few positions more, in a step by itself."""
        self._run(self.random.choice(self.sessions), self._inputs(3))

    def goes(self) -> None:
        self.sessions.remove(self.random.choice(self.sessions))
        self.freed += 1

    def step(self) -> None:
        """Some of the sessions take a step together, and each alone."""
        count = min(self.random.choice([1, 3, MOST_SESSIONS]), len(self.sessions))
        chosen = self.random.sample(self.sessions, count)
        ids = [self._inputs(1) for _ in chosen]
        wants = [True] * count
        found = self.paged.run_joined(ids, [one.paged for one in chosen], wants_logits=wants)
        for session, one, ours in zip(chosen, ids, found, strict=True):
            past = session.plain.length
            theirs = self.plain.run(one, cache=session.plain, start=past, logits_for=1)
            assert_same(ours, theirs)
            assert ours.argmax() == theirs.argmax()
            assert session.paged.length == past + 1
        self.steps += 1

    def _inputs(self, tokens: int) -> torch.Tensor:
        seed = self.random.randrange(10**6)
        if self.plain.holds_embedding:
            return some_ids(tokens, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, tokens, self.plain.hidden_size, generator=generator)

    def _run(self, session: Session, ids: torch.Tensor) -> None:
        past = session.plain.length
        ours, theirs = (
            stack.run(ids, cache=cache, start=past, logits_for=0)
            for stack, cache in ((self.paged, session.paged), (self.plain, session.plain))
        )
        assert_same(ours, theirs)

    def lives(self, rounds: int) -> None:
        self.comes()
        for pool in decoder_of(self.paged).pools:
            pool.reserve(400)  # when it moves all is recorded anew, which takes seconds
        for _ in range(rounds):
            happens = self.random.random()
            if happens < 0.25 and len(self.sessions) < MOST_SESSIONS:
                self.comes()
            elif happens < 0.4:
                self.forked()
            elif happens < 0.55:
                self.rolled_back()
            elif happens < 0.65:
                self.goes_on()
            elif happens < 0.75 and len(self.sessions) > 1:
                self.goes()
            self.step()


def assert_lives_as_alone(
    model: TinyModel, recorder: Recorder | None, *, rounds: int, start: int = 0
) -> Decoder:
    """Sessions come and go; returns what ran their steps together."""
    world = World(*stacks_of(model, start, recorder=recorder), seed=11)
    world.lives(rounds)
    decoder = decoder_of(world.paged)
    assert min(world.forks, world.rollbacks, world.freed) >= 3
    assert max(len(session.paged.numbers) for session in world.sessions) == BLOCKS - start
    assert all(session.paged.is_paged for session in world.sessions)
    world.sessions.clear()
    assert sum(pool.held for pool in decoder.pools) == 0
    return decoder


@pytest.mark.parametrize(
    ("family", "start"),  # recording takes long for each block
    [("llama", 4), ("qwen3", 4), ("gemma3_text", 4), ("mistral", 4), ("qwen3_moe", 5)],
)
def test_sessions_that_come_go_fork_and_roll_back_get_by_recordings_what_each_gets_alone(
    tiny_model: Get, family: str, start: int
) -> None:
    model = tiny_model(family, False)
    decoder = assert_lives_as_alone(model, TraceRecorder(), rounds=60, start=start)
    assert decoder.repeated > 30


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_without_a_recorder_they_get_by_tables_what_each_gets_alone(
    tiny_model: Get, family: str
) -> None:
    decoder = assert_lives_as_alone(tiny_model(family, False), None, rounds=80)
    assert (decoder.repeated, decoder.recordings) == (0, 0)


def begun(stack: Stack, lengths: Sequence[int]) -> list[StackCache]:
    """Sessions of all blocks with pasts of these lengths."""
    caches = [stack.new_cache() for _ in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        stack.run(some_ids(length, seed=length), cache=cache)
    return caches


def step_ids(count: int, seed: int) -> list[torch.Tensor]:
    return [some_ids(1, seed=seed + number) for number in range(count)]


def test_sixteen_texts_of_ids_are_those_that_each_session_writes_alone(llama: TinyModel) -> None:
    plain, paged = stacks_of(llama)
    lengths = [1 + number % 7 for number in range(16)]
    alone, together = begun(plain, lengths), begun(paged, lengths)
    ids = step_ids(16, 0)
    texts: list[list[int]] = []
    for _ in range(8):
        found = paged.run_joined(ids, together, wants_logits=[True] * 16)
        theirs = [
            plain.run(one, cache=cache, start=cache.length, logits_for=1)
            for one, cache in zip(ids, alone, strict=True)
        ]
        chosen = [int(logits.argmax()) for logits in found]
        assert chosen == [int(logits.argmax()) for logits in theirs]
        texts.append(chosen)
        ids = [torch.tensor([[one]]) for one in chosen]
    assert decoder_of(paged).repeated >= 4
    assert len({tuple(text) for text in zip(*texts, strict=True)}) > 4


def test_one_session_alone_is_recorded_too(llama: TinyModel) -> None:
    plain, paged = stacks_of(llama, 4)
    hidden = plain.sample(9)[0]
    caches = plain.new_cache(), paged.new_cache()
    for number in range(9):
        place = hidden[:, number : number + 1]
        ours, theirs = (
            stack.run(place, cache=cache, start=number, logits_for=1)
            for stack, cache in zip((paged, plain), reversed(caches), strict=True)
        )
        assert_same(ours, theirs)
    assert (
        decoder_of(paged).repeated == 6
    )  # all but who begins, and the first of a kind: at 1 and 8


def test_what_a_step_gave_stays_when_the_next_is_repeated(llama: TinyModel) -> None:
    _, paged = stacks_of(llama, 4)
    hidden = paged.sample(4)[0]
    cache = paged.new_cache()
    paged.run(hidden[:, :1], cache=cache)
    for _ in range(2):
        paged.run(hidden[:, 1:2], cache=cache, start=cache.length)
    first = paged.run(hidden[:, 2:3], cache=cache, start=cache.length)
    kept = first.clone()
    paged.run(hidden[:, 3:], cache=cache, start=cache.length)
    assert torch.equal(first, kept)


def test_sessions_of_different_spans_run_by_a_recording_for_each_piece_they_share(
    llama: TinyModel,
) -> None:
    plain, paged = stacks_of(llama)
    spans = [(3, 6), (4, 6), (3, 5)]
    hidden = plain.sample(12)[0]
    pairs = []
    for number, span in enumerate(spans):
        pair = plain.part(*span).new_cache(), paged.part(*span).new_cache()
        for stack, cache in zip((plain, paged), pair, strict=True):
            stack.part(*span).run(hidden[:, : 2 + number], cache=cache)
        pairs.append(pair)
    wants = [stop == BLOCKS for _, stop in spans]
    for step in range(3):
        place = hidden[:, 6 + step : 7 + step]
        found = paged.run_joined([place] * 3, [pair[1] for pair in pairs], wants_logits=wants)
        for ours, (cache, _), span, wish in zip(found, pairs, spans, wants, strict=True):
            part, wanted = plain.part(*span), 1 if wish else None
            assert_same(ours, part.run(place, cache=cache, start=cache.length, logits_for=wanted))
    assert decoder_of(paged).recordings == 3  # 3:4, 4:5 and 5:6


def test_who_asks_for_no_logits_gets_hidden_states(llama: TinyModel) -> None:
    plain, paged = stacks_of(llama, recorder=None)
    caches, theirs = begun(paged, [3, 5]), begun(plain, [3, 5])
    ids = step_ids(2, 7)
    found = paged.run_joined(ids, caches, wants_logits=[False, True])
    for values, one, cache, wanted in zip(found, ids, theirs, (None, 1), strict=True):
        assert_same(values, plain.run(one, cache=cache, start=cache.length, logits_for=wanted))


def test_ids_and_hidden_states_may_enter_block_0_in_one_step(llama: TinyModel) -> None:
    plain, paged = stacks_of(llama, recorder=None)
    caches, theirs = begun(paged, [3, 5]), begun(plain, [3, 5])
    ids = some_ids(1, seed=5)
    hidden = plain._carved.model.get_input_embeddings()(ids).detach()
    found = paged.run_joined([ids, hidden], caches, wants_logits=[True, True])
    for ours, one, cache in zip(found, (ids, hidden), theirs, strict=True):
        assert_same(ours, plain.run(one, cache=cache, start=cache.length, logits_for=1))


def test_sessions_in_pages_and_others_share_a_step(llama: TinyModel) -> None:
    plain, paged = stacks_of(llama, recorder=None)
    ours = [*begun(paged, [3, 5]), *begun(plain, [4, 2])]
    theirs = begun(plain, [3, 5, 4, 2])
    ids = step_ids(4, 9)
    found = paged.run_joined(ids, ours, wants_logits=[True] * 4)
    for values, one, cache in zip(found, ids, theirs, strict=True):
        assert_same(values, plain.run(one, cache=cache, start=cache.length, logits_for=1))


def test_nothing_is_padded_where_keys_lie_in_pages_though_none_are_read_by_rows(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Carved, "attention", lambda self, *, is_joint: None)  # as on a GPU
    plain, paged = stacks_of(llama, 5, recorder=None)
    assert (plain.joins_by_rows, paged.joins_by_rows) == (False, True)


def test_no_more_recordings_are_kept_than_may_be_and_those_used_last(llama: TinyModel) -> None:
    _, paged = stacks_of(llama, 5)
    decoder = decoder_of(paged)
    decoder.most_recordings = 2
    hidden = paged.sample(3)[0]
    caches = [paged.new_cache() for _ in range(4)]
    for cache in caches:
        paged.run(hidden, cache=cache)

    def repeats(count: int) -> bool:
        before = decoder.repeated
        paged.run_joined([hidden[:, :1]] * count, caches[:count])
        for cache in caches[:count]:
            cache.rollback(3)
        return decoder.repeated > before

    assert [repeats(1), repeats(1)] == [False, True]
    assert [repeats(2), repeats(2), repeats(1)] == [False, True, True]
    assert [repeats(4), repeats(4)] == [False, True]
    assert decoder.recordings == 2
    assert [repeats(1), repeats(2)] == [True, False]


def test_recordings_are_made_anew_when_the_pool_has_moved(llama: TinyModel) -> None:
    plain, paged = stacks_of(llama, 5)
    decoder = decoder_of(paged)
    hidden = plain.sample(8)[0]
    caches = plain.new_cache(), paged.new_cache()
    for number in range(8):
        place = hidden[:, number : number + 1]
        ours, theirs = (
            stack.run(place, cache=cache, start=number, logits_for=1)
            for stack, cache in zip((paged, plain), reversed(caches), strict=True)
        )
        assert_same(ours, theirs)
        if number == 4:
            assert decoder.recordings
            (pool,) = decoder.pools
            pool.reserve(99)
    assert decoder.repeated == 5  # of 1 to 7 not 1, nor 5


def test_what_cannot_be_recorded_is_computed_all_the_same(llama: TinyModel) -> None:
    class Refusing(TraceRecorder):
        refusals = 0

        def record(self, run: Any, tensors: Any) -> Any:
            self.refusals += 1
            raise RuntimeError("no")

    plain, paged = stacks_of(llama, 5)
    decoder = decoder_of(paged)
    refusing = decoder.recorder = Refusing()
    hidden = plain.sample(6)[0]
    caches = plain.new_cache(), paged.new_cache()
    for number in range(6):
        place = hidden[:, number : number + 1]
        ours, theirs = (
            stack.run(place, cache=cache, start=number)
            for stack, cache in zip((paged, plain), reversed(caches), strict=True)
        )
        assert_same(ours, theirs)
    assert (refusing.refusals, decoder.repeated) == (1, 0)


def test_a_session_without_numbers_leaves_nothing_that_hurts_who_has_its_pages_next(
    llama: TinyModel,
) -> None:
    plain, paged = stacks_of(llama, 5, most_pages=2)
    hidden = plain.sample(3)[0]
    sick = paged.new_cache()
    paged.run(torch.full((1, 2 * PAGE - 1, paged.hidden_size), torch.nan), cache=sick)
    del sick
    caches = plain.new_cache(), paged.new_cache()
    for number in range(3):
        place = hidden[:, number : number + 1]
        ours, theirs = (
            stack.run(place, cache=cache, start=number)
            for stack, cache in zip((paged, plain), reversed(caches), strict=True)
        )
        assert_same(ours, theirs)


def test_a_joint_step_without_pages_for_all_changes_nothing(llama: TinyModel) -> None:
    _, paged = stacks_of(llama, 5, most_pages=3)
    hidden = paged.sample(PAGE)[0]
    caches = []
    for _ in range(3):
        caches.append(paged.new_cache())
        paged.run(hidden, cache=caches[-1])
    with pytest.raises(BlocksError, match="all 3 pages for keys are held"):
        paged.run_joined([hidden[:, :1]] * 3, caches)
    assert [(cache.length, cache.is_torn) for cache in caches] == [(PAGE, False)] * 3
    caches.pop()
    with pytest.raises(BlocksError):
        paged.run_joined([hidden[:, :1]] * 2, caches)
    paged.run(hidden[:, :1], cache=caches[0], start=PAGE)


def hooked(stack: Stack, change: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """Let what each layer of a stack gives depend on what it was called with."""

    def hook(layer: Any, args: Any, named: Any, output: torch.Tensor) -> torch.Tensor:
        return change(named, output)

    for number in range(stack.start, stack.stop):
        layer = stack._carved.parts.layers[number]
        layer.register_forward_hook(hook, with_kwargs=True)


def by_baked_positions(named: Any, hidden: torch.Tensor) -> torch.Tensor:
    # numpy is where the tracer cannot follow: right today, and true for ever
    positions = torch.from_numpy(named["position_ids"].detach().numpy() * 1.0)
    return hidden + positions.to(hidden)[..., None]


def by_length(named: Any, hidden: torch.Tensor) -> torch.Tensor:
    cache = next(named[name] for name in CACHE_NAMES if name in named)
    return hidden + cache.get_seq_length()


@pytest.mark.parametrize(
    ("change", "is_paged"),
    [(by_baked_positions, True), (by_length, False)],
)
def test_a_family_that_takes_in_a_number_is_not_recorded_and_one_that_asks_for_lengths_not_paged(
    llama: TinyModel, change: Any, is_paged: bool
) -> None:
    plain = load_stack(llama.checkpoint, 4, BLOCKS)
    hooked(plain, change)
    paged = Stack.of(plain._carved.model, 4, BLOCKS, Paging(PAGE, TraceRecorder()))
    assert (paged._decoder is not None) == is_paged
    if paged._decoder is not None:
        assert paged._decoder.recorder is None


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", "block 0"),  # its bias by distance has a length
        ("gemma2", "softcap"),
        ("gpt_oss", "s_aux"),
        ("qwen3_next", "more than keys and values"),
        ("deepseek_v32", "more than keys and values"),
        ("gemma3n_text", "beside its hidden states"),
    ],
)
def test_families_of_another_attention_stay_as_they_were_and_it_is_said_why(
    tiny_model: Get, family: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blocks.trial")
    _, stack = stacks_of(tiny_model(family, False))
    assert stack._decoder is None
    (record,) = (record for record in caplog.records if record.name == "blocks.trial")
    assert "are not in pages" in record.getMessage()
    assert reason in record.getMessage()
    caches = begun(stack, [3, 5])
    stack.run_joined(step_ids(2, 0), caches)
    assert not any(cache.is_paged for cache in caches)


def test_on_a_cpu_nothing_is_in_pages_unless_it_is_asked_for(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    assert stack._decoder is None
    assert stack.new_cache().ledger is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_on_a_gpu_sessions_get_by_graphs_what_each_gets_alone(
    tiny_model: Get, family: str, kind: Dtype
) -> None:
    checkpoint = tiny_model(family, False).checkpoint
    stack = load_stack(checkpoint, 0, BLOCKS, dtype=kind, device="cuda")
    plain = load_stack(checkpoint, 0, BLOCKS, dtype=kind)
    decoder = decoder_of(stack)
    assert isinstance(decoder.recorder, GraphRecorder)
    lengths = [1 + 37 * number for number in range(3)] + [2, 9]  # up to 75 of the 128 there are
    ours, theirs = begun(stack, lengths), begun(plain, lengths)
    for step in range(12):
        ids = step_ids(5, 5 * step)
        found = stack.run_joined(ids, ours, wants_logits=[True] * 5)
        for values, one, cache in zip(found, ids, theirs, strict=True):
            wanted = plain.run(one, cache=cache, start=cache.length, logits_for=1)
            scale = float(wanted.abs().max())
            atol = (1e-4 if kind == "float32" else 5e-2) * scale
            torch.testing.assert_close(values.cpu(), wanted, rtol=0, atol=atol)
    assert decoder.repeated >= 10
