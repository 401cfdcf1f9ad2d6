"""Attention of one position to a past, each session's keys where they lie: nothing is padded.

transformers lets attention be exchanged by name. Within `Rows.attached` a family's layers call
ours: it runs the family's own for each session with that session's keys, so that a session gets to
the bit what it gets alone.

1. By rows only the family's own function attends, but for half precision on a CPU: there the query
   heads that share a key head go as positions of one query. The sums are the same; the kernel for
   shared heads takes many times longer.
2. A mask that is more than causal, or a window, is refused before a layer has run. One position
   sees all of a causal past, and sliding layers give the window's keys only.
3. Keys that a family changes between its cache and its attention are refused, never approximated.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from blocks.errors import BlocksError
from blocks.hf.attention import (
    causal_mask_function,
    is_window,
    name_attention,
    own_attention,
    register,
)

_NAME = "swarm_rows"
_HALVES = (torch.bfloat16, torch.float16)

Past = tuple[torch.Tensor, torch.Tensor]  # keys and values of one session [1, heads, length, d]


@dataclass(slots=True)
class Attached:
    """An attention in the place of the family's own: of one position each of some sessions.

    `base` is the family's own implementation, by transformers' name, and `configs` are where its
    layers look for it.
    """

    base: str
    configs: Sequence[Any]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within, layers with these configs attend so; one forward runs in it."""
        token = _running.set(self)
        try:
            name_attention(self.configs, _NAME)
            yield
        finally:
            _running.reset(token)
            name_attention(self.configs, self.base)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **named: Any,
    ) -> torch.Tensor:
        """What each row attends to [N, 1, heads, d], of queries [N, heads, 1, d]."""
        raise NotImplementedError


@dataclass(slots=True)
class Rows(Attached):
    """The attention of one step of one position for each of some sessions, each by its own past.

    The layers are on a CPU. A joint step's caches keep here whose past is which; in a step of one
    session layers have its past themselves.
    """

    is_joint: bool
    pasts: dict[int, tuple[torch.Tensor, torch.Tensor, Sequence[Past]]] = field(
        default_factory=dict
    )
    used: set[int] = field(default_factory=set)

    def keep(self, keys: torch.Tensor, values: torch.Tensor, pasts: Sequence[Past]) -> None:
        """Note the pasts of all rows under the new keys and values, which stand for them."""
        self.pasts[id(keys)] = keys, values, pasts

    @property
    def is_whole(self) -> bool:
        """Has attention looked at every past that was kept?"""
        return self.used == self.pasts.keys()

    def is_faster(self, kind: torch.dtype) -> bool:
        """Is this attention faster than the family's own for one session, too?"""
        return self.base == "sdpa" and kind in _HALVES

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **named: Any,
    ) -> torch.Tensor:
        """What each row attends to [N, 1, heads, d], of queries [N, heads, 1, d].

        Key and value are a past, or in a joint step what stands for the pasts of all rows.
        """
        if not self.is_joint:
            return self._apart(module, query, [(key, value)], named)
        keys, values, pasts = self.pasts.get(id(key), (None, None, ()))
        if keys is not key or values is not value:
            raise BlocksError(f"{type(module).__name__} changes what its cache gives it")
        self.used.add(id(key))
        return self._apart(module, query, pasts, named)

    def _apart(
        self,
        module: nn.Module,
        query: torch.Tensor,
        pasts: Sequence[Past],
        named: Mapping[str, Any],
    ) -> torch.Tensor:
        if self.is_faster(query.dtype) and named.get("position_bias") is None:
            return _by_key_head(query, pasts, named.get("scaling"))
        own = own_attention(module, self.base)
        queries = query.split(1) if len(pasts) > 1 else (query,)
        return torch.cat(
            [
                own(module, one, *past, None, **named)[0]
                for one, past in zip(queries, pasts, strict=True)
            ]
        )


_running: ContextVar[Attached | None] = ContextVar("attached", default=None)


def _by_key_head(query: torch.Tensor, pasts: Sequence[Past], scale: float | None) -> torch.Tensor:
    """Attention of one position, with the query heads of a key head as so many positions."""
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, pasts[0][0].shape[1], -1, width)
    queries = grouped.split(1) if len(pasts) > 1 else (grouped,)
    attended = [
        functional.scaled_dot_product_attention(one, keys, values, scale=scale)
        for one, (keys, values) in zip(queries, pasts, strict=True)
    ]
    return torch.cat(attended).reshape(rows, 1, heads, -1)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """What layers call in the place of their family's attention."""
    attached = _running.get()
    if attached is None or attention_mask is not None or query.shape[2] != 1:
        raise BlocksError(f"{type(module).__name__} attends to more than a past")
    return attached.attend(module, query, key, value, **named), None


def _no_mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **named: Any,
) -> None:
    """No mask where a causal one, or a sliding window's, would hide nothing; BlocksError else."""
    is_sliding = is_window(config, local_size)
    is_causal = mask_function is causal_mask_function
    if attention_mask is not None or not allow_is_causal_skip or not (is_sliding or is_causal):
        raise BlocksError("this family hides more than the future")


register(_NAME, _attend, _no_mask)
