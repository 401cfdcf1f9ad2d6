"""Does a family compute the same when it is cut? The trial of one configuration.

A tiny random model is saved, cut in three stacks with ends at both sides, each loaded from the
folder by `load_stack`, the very code that serves, and compared with the whole model.

1. The reference runs what the stacks run: the same ids in the same chunks, with its own cache.
2. A check that cannot fail proves nothing: one whose reference says nothing, or does not depend on
   the blocks in the middle or on the past, is a failed one.
3. Each check is told as it is judged, so that a hang or a crash loses the later ones only.
4. Everything is seeded: one configuration, one result per machine and libraries.
5. Where positions are computed by the length of a text, decode, chunked and joined cross a length
   where that changes, and are compared with what `generate` computes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from blocks.cache import StackCache
from blocks.carve import forwards_of
from blocks.checkpoint import open_checkpoint
from blocks.config import length_scaling
from blocks.errors import BlocksError, StepError
from blocks.hf.forwards import takes_of
from blocks.hf.models import PretrainedConfig
from blocks.load import load_stack
from blocks.needed import empty_model
from blocks.reference import TheirsError, Trouble, saved_model, some_ids, told
from blocks.report import Check, Takes, outcome_of
from blocks.stack import Stack

_LEAST_EFFECT = 1e-4  # of what a check must depend on

# A prefill, then decode: in one go, and in chunks; longer than all windows.
_DECODE = (9, 1, 1, 1, 1)
_CHUNKED = (6, 3, 1, 1, 1, 1)
_LONG = (6, 6)  # a prefill beyond the length where positions change
_GOING_BACK_TO = 9

# How far transformers' own cached run may be from its uncached one, for logits of about 1: rounding
# of other kernels stays below it, a lost past does not.
_MOST_OWN_DIFFERENCE = 1e-4

Tell = Callable[[Check], None]


class _NotOfferedError(Exception):
    """The code refuses this for the family; the sentence says why."""


class _BlindError(Exception):
    """The check could not have failed."""


def examine(
    config: PretrainedConfig,
    folder: Path,
    tell: Tell,
    tell_takes: Callable[[Takes], None] = lambda takes: None,
) -> None:
    """Try the family of a tiny config and tell each check. Trouble if there is nothing to try.

    `folder` is empty, and the caller's to remove.
    """
    trial = _Trial(config, folder)
    tell_takes(trial.takes)
    forward = _judged("forward", trial.forward)
    tell(forward)
    if forward.outcome != "holds":
        return  # all else is built on it
    for name, check in (
        ("decode", trial.decode),
        ("chunked", trial.chunked),
        ("interleaved", trial.interleaved),
        ("rollback", trial.rollback),
        ("joined", trial.joined),
        ("gradient", trial.gradient),
        ("batch", trial.batch),  # last, as padding takes some recurrent families long
    ):
        tell(_judged(name, check))


def _judged(name: str, check: Callable[[], tuple[float, str]]) -> Check:
    try:
        difference, note = check()
    except _NotOfferedError as why:
        return Check(name, "not offered", note=str(why))
    except TheirsError as why:
        return Check(name, "fails", note=f"transformers' own whole model fails: {why}")
    except _BlindError as why:
        return Check(name, "fails", note=f"the check is blind: {why}")
    except (MemoryError, OSError) as error:  # the machine's fault, and no verdict on the family
        raise Trouble(told(error)) from error
    except Exception as error:  # noqa: BLE001  # a family's own code may raise anything
        return Check(name, "fails", note=told(error))
    outcome = outcome_of(name, difference)
    if outcome == "fails":
        note = f"differs by {difference:.1e}" + (f"; {note}" if note else "")
    return Check(name, outcome, difference, note)


class _Trial:
    """The whole model and its three stacks, and what is compared."""

    def __init__(self, config: PretrainedConfig, folder: Path) -> None:
        self.whole = saved_model(config, folder)
        try:
            checkpoint = open_checkpoint(folder)
            blocks = checkpoint.blocks
            self.takes = Takes(takes_of(forwards_of(empty_model(checkpoint, 0, blocks))))
            cut = (range(blocks // 3), range(blocks // 3, blocks - 1), range(blocks - 1, blocks))
            self.stacks = [
                load_stack(checkpoint, span.start, span.stop, is_trial=True) for span in cut
            ]
            self.scaling = length_scaling(checkpoint.config)
        except Exception as error:
            # the folder is another one in every run
            why = told(error).replace(str(folder), "what was saved")
            raise Trouble(f"cannot be cut: {why}") from error

    def forward(self) -> tuple[float, str]:
        """Ids to logits of two rows in one go."""
        ids = some_ids(13, seed=0, rows=2)
        theirs = self.whole.run(ids)
        first, _, last = self.stacks
        if not last.needs:  # else its blocks cannot even run without those in the middle
            without = _run([first, last], ids)
            _must_matter(without, theirs, "the middle stack changes nothing")
        return _difference(_run(self.stacks, ids), theirs), ""

    def decode(self) -> tuple[float, str]:
        """A prefill in one go, then one position at a time."""
        if self.scaling is not None:
            return self._lengthening(some_ids(sum(_DECODE), seed=1), _DECODE[:1])
        return self._session(some_ids(sum(_DECODE), seed=1), _DECODE)

    def chunked(self) -> tuple[float, str]:
        """A prefill in chunks, then one position at a time."""
        if self.scaling is not None:
            return self._lengthening(some_ids(sum(_LONG) + 2, seed=1), _LONG)
        return self._session(some_ids(sum(_CHUNKED), seed=1), _CHUNKED)

    def _session(self, ids: torch.Tensor, chunks: Sequence[int]) -> tuple[float, str]:
        """Against the whole model's own cached run, if that is worth anything.

        Where transformers forgets the past of all but single positions, against its run of these.
        """
        own_chunks = chunks
        if any(stack.forgets_state for stack in self.stacks):
            own_chunks = (chunks[0], *[1] * sum(chunks[1:]))
        theirs, truth = self.whole.session(ids, own_chunks), self.whole.run(ids)
        _must_matter(self.whole.run(ids[:, -1:]), theirs[:, -1:], "the past changes nothing")
        _must_agree(theirs, truth)
        return _difference(_session(self.stacks, ids, chunks, _caches(self.stacks)), theirs), ""

    def _lengthening(self, ids: torch.Tensor, chunks: Sequence[int]) -> tuple[float, str]:
        """A text that is longer at its end than where positions change."""
        caches = _caches(self.stacks)
        ours, prompt, done = [], sum(chunks), 0
        for chunk in chunks:
            done += chunk
            part = ids[:, done - chunk : done]
            ours = [_run(self.stacks, part, caches, sequence_length=prompt)[:, -1:]]
        for end in range(prompt + 1, ids.shape[1] + 1):
            ours.append(self._grown(ids[:, :end], caches))
        theirs, truth = self.whole.said(ids, *chunks), self.whole.said(ids, prompt)
        _must_agree(theirs, truth)
        short = ids.shape[1] // 2
        long = self.whole.run(ids)[:, :short]
        _must_matter(self.whole.run(ids[:, :short]), long, "the length of a text changes nothing")
        return _difference(torch.cat(ours, dim=1), theirs), ""

    def _grown(self, ids: torch.Tensor, caches: Sequence[StackCache]) -> torch.Tensor:
        """The logits of the last position of a text that has grown by it."""
        length = ids.shape[1]
        if self._is_anew(length):
            for cache in caches:
                cache.rollback(0)
            return _run(self.stacks, ids, caches)[:, -1:]
        return _run(self.stacks, ids[:, -1:], caches)

    def _is_anew(self, length: int) -> bool:
        return self.scaling is not None and length - 1 == self.scaling.anew_after

    def interleaved(self) -> tuple[float, str]:
        """Two sessions, step by step in turn: each as if alone."""
        texts = [some_ids(8, seed=seed) for seed in (2, 3)]
        chunks = (5, 1, 1, 1)
        theirs = [self.whole.session(text, chunks) for text in texts]
        caches = [_caches(self.stacks) for _ in texts]
        parts: list[list[torch.Tensor]] = [[], []]
        for steps in zip(*(text.split(chunks, dim=1) for text in texts), strict=True):
            for step, cache, part in zip(steps, caches, parts, strict=True):
                part.append(_run(self.stacks, step, cache))
        both = [torch.cat(part, dim=1) for part in parts]
        return max(_difference(*pair) for pair in zip(both, theirs, strict=True)), ""

    def rollback(self) -> tuple[float, str]:
        """Another text from a position that was passed."""
        ids, other = some_ids(13, seed=4), some_ids(5, seed=5)
        caches = _caches(self.stacks)
        _session(self.stacks, ids, (9, 4), caches)
        if not all(cache.can_roll_back(_GOING_BACK_TO) for cache in caches):
            raise _NotOfferedError("its states cannot go back")
        for cache in caches:
            cache.rollback(_GOING_BACK_TO)
        ours = _session(self.stacks, other, (1, 3, 1), caches)
        text = torch.cat([ids[:, :_GOING_BACK_TO], other], dim=1)
        theirs = self.whole.session(text, (9, 1, 3, 1))[:, _GOING_BACK_TO:]
        return _difference(ours, theirs), ""

    def joined(self) -> tuple[float, str]:
        """Decode steps of three sessions of different lengths as one batch."""
        for stack in self.stacks:
            if stack.why_not_joined is not None:
                raise _NotOfferedError(stack.why_not_joined)
        lengths, steps = (9, 4, 6), 4
        texts = [some_ids(length + steps, seed=6 + n) for n, length in enumerate(lengths)]
        theirs = torch.cat(
            [
                self.whole.said(text, length)[:, 1:]
                if self.scaling is not None
                else self.whole.session(text, (length, *(1,) * steps))[:, length:]
                for text, length in zip(texts, lengths, strict=True)
            ]
        )
        caches = [_caches(self.stacks) for _ in texts]
        for text, length, own in zip(texts, lengths, caches, strict=True):
            _run(self.stacks, text[:, :length], own)
        parts = []
        for step in range(steps):
            grown = [
                text[:, : length + step + 1] for text, length in zip(texts, lengths, strict=True)
            ]
            joint = [n for n, text in enumerate(grown) if not self._is_anew(text.shape[1])]
            values = [grown[n][:, -1:] for n in joint]
            together = iter(_run_joined(self.stacks, values, [caches[n] for n in joint]).split(1))
            parts.append(
                torch.cat(
                    [
                        next(together) if n in joint else self._grown(text, caches[n])
                        for n, text in enumerate(grown)
                    ]
                )
            )
        return _relative(torch.cat(parts, dim=1), theirs), ""

    def gradient(self) -> tuple[float, str]:
        """Of a loss in the last block's output, in what enters the first stack that can be sent
        hidden states: not the first of all where only ids make what its blocks need beside them.
        """
        first = 1 if self.stacks[0].needs else 0
        stacks = self.stacks[first:]
        ids = some_ids(9, seed=9, rows=2)
        values, ours, theirs = self.whole.gradient(ids, stacks[0].start)
        sides: dict[str, torch.Tensor] = {}
        if first:
            self.stacks[0].run(ids, sides=sides)
        sent = []
        for stack in stacks:
            sent.append((stack, values, dict(sides)))
            values = stack.run(values, sides=sides)
        try:
            for stack, values, beside in reversed(sent):
                ours = stack.backward(values, ours, sides=beside)
        except StepError:
            raise
        except BlocksError as why:
            raise _NotOfferedError(str(why)) from why
        return _relative(ours, theirs), ""

    def batch(self) -> tuple[float, str]:
        """Two texts of different lengths, padded on the left; prefill and decode."""
        ids = some_ids(9, seed=10, rows=2)
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        chunks = (7, 1, 1)
        theirs = self.whole.session(ids, chunks, mask)
        ours = _session(self.stacks, ids, chunks, _caches(self.stacks), mask)
        return _difference(ours[mask.bool()], theirs[mask.bool()]), ""


def _caches(stacks: Sequence[Stack]) -> list[StackCache]:
    return [stack.new_cache() for stack in stacks]


def _run(
    stacks: Sequence[Stack],
    ids: torch.Tensor,
    caches: Sequence[StackCache | None] | None = None,
    mask: torch.Tensor | None = None,
    sequence_length: int | None = None,
) -> torch.Tensor:
    """Ids through the stacks, one after the other, going on from the caches."""
    values = ids
    sides: dict[str, torch.Tensor] = {}
    for stack, cache in zip(stacks, caches or [None] * len(stacks), strict=True):
        values = stack.run(
            values,
            cache=cache,
            start=cache.length if cache else 0,
            mask=mask,
            logits_for=0 if stack.holds_head else None,
            sides=sides,
            sequence_length=sequence_length,
        )
    return values


def _session(
    stacks: Sequence[Stack],
    ids: torch.Tensor,
    chunks: Sequence[int],
    caches: Sequence[StackCache],
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    parts, done = [], caches[0].length
    for chunk in ids.split(list(chunks), dim=1):
        done += chunk.shape[1]
        parts.append(_run(stacks, chunk, caches, None if mask is None else mask[:, :done]))
    return torch.cat(parts, dim=1)


def _run_joined(
    stacks: Sequence[Stack], values: Sequence[torch.Tensor], caches: Sequence[Sequence[StackCache]]
) -> torch.Tensor:
    """One decode step of several sessions; `caches` are those of each session, stack by stack."""
    sides: list[dict[str, torch.Tensor]] = [{} for _ in values]
    for number, stack in enumerate(stacks):
        own = [session[number] for session in caches]
        wanted = [stack.holds_head] * len(own)
        values = stack.run_joined(values, own, wants_logits=wanted, sides=sides)
    return torch.cat(list(values))


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest; what has nothing in it is no reference."""
    if not bool(theirs.isfinite().all()) or float(theirs.std()) < _LEAST_EFFECT:
        raise _BlindError("transformers' own result is constant or not finite")
    if ours.shape != theirs.shape:
        raise BlocksError(f"its shape is {tuple(ours.shape)}, not {tuple(theirs.shape)}")
    return float((ours - theirs).abs().max())


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference as a part of the largest value: rounding grows with the values."""
    return _difference(ours, theirs) / max(1.0, float(theirs.abs().max()))


def _must_agree(theirs: torch.Tensor, truth: torch.Tensor) -> None:
    own = float((truth - theirs).abs().max() / truth.abs().max().clamp(min=1))
    if own > _MOST_OWN_DIFFERENCE:
        raise BlocksError(
            f"run so, transformers' model differs by {own:.0e} from its own single forward"
        )


def _must_matter(without: torch.Tensor, theirs: torch.Tensor, otherwise: str) -> None:
    if float((without - theirs).abs().max()) < _LEAST_EFFECT:
        raise _BlindError(otherwise)
