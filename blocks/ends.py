"""What a client without torch gets instead of a whole row of logits.

1. `candidates` is a pure function, equal on every server that has the same logits; `chosen` is it
   for a device that is not to be waited for.
2. The first candidate of a row is the lowest id among its largest permitted logits, so greedy
   choice from candidates is greedy choice from logits.
3. Candidates, penalised ids and `left` together account for the whole row, each id once.
"""

import math
from dataclasses import dataclass

import torch

from blocks.errors import BlocksError, StepError
from blocks.transfer import sent

NO_NUMBERS = "the logits are not numbers: these weights do not work in this dtype"


@dataclass(frozen=True, slots=True)
class CandidateWish:
    """Which logits a client wants of each position. `allowed` None allows every id."""

    count: int  # the most candidates, 0 for all
    penalised: tuple[int, ...] = ()  # never candidates; their logits are named instead
    bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit) before all else
    allowed: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.count < 0 or any(math.isnan(amount) for _, amount in self.bias):
            raise ValueError(f"a wish needs count >= 0 and biases that are numbers, not {self}")


def candidates(logits: torch.Tensor, wish: CandidateWish) -> dict[str, torch.Tensor]:
    """Pick the candidates of S positions from float32 logits [S, V].

    "tokens" int32 [S, K] and "logits" float32 [S, K]: the K largest among allowed ids that are not
    penalised, largest first, equal ones by lower id; K is `wish.count` or as many as there are.
    "named" float32 [S, P]: those of the penalised ids, then of the biased ids, in order; -inf for
    ids that are not allowed. "left" float32 [S]: log-sum-exp of all other ids, -inf without any.

    Raises StepError for ids beyond the vocabulary or an empty choice, BlocksError for NaN.
    """
    check_wish(wish, logits.shape[-1])
    if bool(logits.isnan().any()):
        raise BlocksError(NO_NUMBERS)
    return _chosen(logits, wish)


def chosen(
    logits: torch.Tensor, wish: CandidateWish
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same for a wish that was checked, and which positions have numbers for logits [S].

    Nothing here waits for the device. What the other positions get means nothing.
    """
    # NaN is no more than anything: as many would not be found as are asked for
    numbers = logits.nan_to_num(-math.inf, math.inf, -math.inf)
    return _chosen(numbers, wish), ~logits.isnan().any(-1)


def _chosen(logits: torch.Tensor, wish: CandidateWish) -> dict[str, torch.Tensor]:
    biased = [token for token, _ in wish.bias]
    if wish.bias:
        amounts = sent(torch.tensor([amount for _, amount in wish.bias]), logits.device)
        logits = logits.index_add(1, _ids(biased, logits), amounts.expand(len(logits), -1))
    if wish.allowed is not None:
        kept = torch.full_like(logits, -math.inf)
        allowed = _ids(wish.allowed, logits)
        logits = kept.index_copy(1, allowed, logits[:, allowed])
    tokens, values, left = _largest(logits, _permitted(wish, logits), wish.count)
    return {
        "tokens": tokens.to(torch.int32),
        "logits": values,
        "named": logits[:, _ids((*wish.penalised, *biased), logits)],
        "left": left,
    }


def check_wish(wish: CandidateWish, vocabulary: int) -> None:
    """StepError for what no logits of so many ids could give."""
    ids = (*wish.penalised, *(token for token, _ in wish.bias), *(wish.allowed or ()))
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise StepError(f"a wish names ids that are not below the vocabulary's {vocabulary}")
    if wish.allowed is not None and not wish.allowed:
        raise StepError("a wish that allows no id has no candidates")


def _permitted(wish: CandidateWish, logits: torch.Tensor) -> torch.Tensor | None:
    """The ids that can be candidates, ascending; None for all."""
    if wish.allowed is None and not wish.penalised:
        return None
    permitted = torch.ones(logits.shape[-1], dtype=torch.bool)
    if wish.allowed is not None:
        permitted.zero_()
        permitted[list(wish.allowed)] = True
    permitted[list(wish.penalised)] = False
    return sent(permitted.nonzero()[:, 0], logits.device)


def _largest(
    logits: torch.Tensor, ids: torch.Tensor | None, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, logits and log-sum-exp of the rest, for the `count` largest among `ids`."""
    if ids is not None:
        logits = logits[:, ids]
    rows, choices = logits.shape
    count = min(count or choices, choices)
    if count == choices:
        picked = torch.arange(choices, device=logits.device).expand(rows, -1)
        left = logits.new_full((rows,), -math.inf)
    else:
        is_picked = _is_among_largest(logits, count)
        picked = _places(is_picked, count)
        left = logits.masked_fill(is_picked, -math.inf).logsumexp(-1)
    # picked ids ascend, so a stable sort leaves equal logits in their order
    values, order = logits.gather(1, picked).sort(dim=1, descending=True, stable=True)
    tokens = picked.gather(1, order)
    return tokens if ids is None else ids[tokens], values, left


def _is_among_largest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Mark exactly `count` of each row; `topk` itself picks any among equal ones."""
    threshold = logits.topk(count, dim=1).values[:, -1:]
    above, equal = logits > threshold, logits == threshold
    missing = count - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= missing))


def _places(marked: torch.Tensor, count: int) -> torch.Tensor:
    """Where `count` of each row are marked [rows, count], ascending."""
    if marked.device.type == "cpu":
        return marked.nonzero()[:, 1].view(len(marked), count)
    return _places_unseen(marked, count)


def _places_unseen(marked: torch.Tensor, count: int) -> torch.Tensor:
    """The same without counting them, for which a device would have to be waited for.

    Where not as many are marked, because something was no number, the rest are 0.
    """
    rows, width = marked.shape
    goal = torch.where(marked, marked.cumsum(1) - 1, count)
    ids = torch.arange(width, device=marked.device).expand(rows, -1)
    return ids.new_zeros(rows, count + 1).scatter_(1, goal, ids)[:, :count]


def _ids(ids: tuple[int, ...] | list[int], like: torch.Tensor) -> torch.Tensor:
    return sent(torch.tensor(ids, dtype=torch.long), like.device)
