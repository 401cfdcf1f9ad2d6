"""What a trouble of a session means: who is to blame, who has no room, what routing hears of it.

1. Nobody is blamed for having no room, for having evicted a cache or dropped a history.
"""

from collections.abc import Sequence
from math import ceil

from routing import repair
from routing.span import Span
from swarm.errors import Refusal
from swarm.messages import HopName
from swarm.session import Trouble


def has_no_room(trouble: Trouble) -> bool:
    """Return whether a hop has no room, and told when that may change."""
    return is_refusal(trouble) and trouble.retry_seconds > 0


def is_refusal(trouble: Trouble) -> bool:
    """Return whether a hop kept its word and said no."""
    return trouble.failure in ("refused", "evicted")


def is_passing(trouble: Trouble) -> bool:
    """Return whether it may be over soon, and speaks against nobody."""
    return has_no_room(trouble) or trouble.failure in ("evicted", "forgotten")


def named_hops(hops: Sequence[repair.RepairedHop], troubles: Sequence[Trouble]) -> list[HopName]:
    """Return the repaired route as Open names it; a hop that was evicted begins anew there."""
    evicted = {
        (trouble.peer, trouble.span)
        for trouble in troubles
        if trouble.failure == "evicted" and not has_no_room(trouble)
    }
    return [
        HopName(
            hop.peer, str(hop.span), "anew" if (hop.peer, str(hop.span)) in evicted else hop.mode
        )
        for hop in hops
    ]


def refusal_of(trouble: Trouble) -> Refusal:
    """Return what the user is told of servers that go on refusing."""
    seconds = ceil(trouble.retry_seconds)
    return Refusal(
        f"the servers refuse: {trouble.message}",
        next_step=f"try again in {seconds} seconds" if seconds else "try again soon",
        retry_seconds=trouble.retry_seconds,
    )


def as_routing(trouble: Trouble) -> list[repair.Trouble]:
    """Return the trouble in routing's words; none if it is nobody's."""
    kind: repair.Kind
    match trouble.failure:
        case "forgotten" | "dropped":
            return []
        case "closed":
            kind = "downlink" if trouble.is_downlink else "link"
        case "evicted" if not trouble.retry_seconds:
            return []
        case "refused" | "draining" | "evicted":
            kind = "refused"
        case "silent" | "unreachable" | "failed" | "broke_word":
            kind = trouble.failure
    return [repair.Trouble(trouble.peer, Span.parse(trouble.span), kind, trouble.is_downlink)]
