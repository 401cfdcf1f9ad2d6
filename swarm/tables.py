"""Tables of peers on the wire: whole and in pages for those who serve, a view for clients.

1. Every wait on a peer has a deadline; what it can make us hold is bounded.
2. What an older program says is understood: it knows nothing of views, so it asks for whole tables
   and answers with them.
"""

from collections.abc import Collection, Mapping
from itertools import islice
from typing import Annotated, NamedTuple, TypeVar

import msgspec
import trio

from swarm.errors import PeerFault, Unreachable
from swarm.messages import Count, Number, PeerName
from swarm.peers import MOST_PEERS, Page
from swarm.record import MOST_RECORD_BYTES
from swarm.transport import Host, MessageStream, Stream
from swarm.wire import Frame, Limits

PEERS_PROTOCOL = "/swarm/peers/1"
MOST_KNOWN = 512  # peers whose sequence a client tells: more than a view holds, and 32 KB
MOST_AVOIDED = 64
BEHIND_ALL = "~"  # no peer id sorts behind it: asks for an empty page

_LIMITS = Limits(frame_bytes=1 << 20, tensors=0)
_MOST_RECORDS = 2 * MOST_PEERS  # of one answer, tombstones among them

_PeerId = Annotated[str, msgspec.Meta(max_length=128)]


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ask for the page after this peer; `own` is the asker's own signed record, or empty.

    Or for a view: the best of each block, and whatever is newer of those `known` (peer to
    sequence), with enough others beside those to `avoid`.
    """

    after: _PeerId = ""
    own: Annotated[bytes, msgspec.Meta(max_length=MOST_RECORD_BYTES)] = b""
    is_view: bool = False
    known: Annotated[dict[PeerName, Count], msgspec.Meta(max_length=MOST_KNOWN)] = {}
    avoid: Annotated[tuple[PeerName, ...], msgspec.Meta(max_length=MOST_AVOIDED)] = ()


class _Answer(msgspec.Struct, frozen=True):
    """A page or a view: (signed record, age in seconds), what to ask for next, empty at the end,
    and how many records the giver holds; older programs do not tell.
    """

    records: tuple[tuple[bytes, Number], ...]
    following: _PeerId = ""
    held: Count = 0


_Checked = TypeVar("_Checked", Request, _Answer)


class Given(NamedTuple):
    """What a peer gave of its table: signed records with their ages, nothing verified yet."""

    records: list[tuple[bytes, float]]
    held: int

    @property
    def is_empty(self) -> bool:
        """Whether the giver knows nobody. One that has only no news for us is not empty."""
        return not self.records and not self.held


async def fetch_table(
    host: Host, peer: str, within: float, *, own: bytes = b"", after: str = ""
) -> Given:
    """Return every signed record that a peer knows, each with its age: for `PeerTable.add`.

    `own` is a record of ours to leave there; `after` the peer id behind which to begin.
    Unreachable after `within` seconds, PeerFault if an answer is malformed.
    """
    return await _fetch(host, peer, within, Request(after=after, own=own))


async def fetch_view(
    host: Host,
    peer: str,
    within: float,
    *,
    known: Mapping[str, int],
    avoid: Collection[str] = (),
) -> Given:
    """Return what a client lacks of a peer's table: see `PeerTable.view`.

    Of `known` and `avoid` the first MOST_KNOWN and MOST_AVOIDED count. The whole table comes from
    one that knows no views. Raises as `fetch_table` does.
    """
    request = Request(
        is_view=True,
        known=dict(islice(known.items(), MOST_KNOWN)),
        avoid=tuple(sorted(avoid)[:MOST_AVOIDED]),
    )
    return await _fetch(host, peer, within, request)


async def _fetch(host: Host, peer: str, within: float, request: Request) -> Given:
    given: list[tuple[bytes, float]] = []
    with trio.move_on_after(within):
        stream = MessageStream(await host.open(peer, PEERS_PROTOCOL, within=within), _LIMITS)
        try:
            while True:
                await stream.send_frame(Frame(msgspec.to_builtins(request, builtin_types=(bytes,))))
                answer = _checked(await stream.receive_frame(), _Answer, peer)
                given += answer.records
                if not answer.following:
                    return Given(given, max(answer.held, len(answer.records)))
                is_going_on = answer.records and answer.following > request.after
                if not is_going_on or len(given) > _MOST_RECORDS:
                    raise PeerFault(f"{peer} gives a table without end")
                request = Request(after=answer.following)
        finally:
            await stream.close()
    raise Unreachable(f"{peer} did not give its table within {within:g} seconds")


class Requests:
    """The giver's side of one stream."""

    def __init__(self, stream: Stream) -> None:
        self._messages = MessageStream(stream, _LIMITS)

    async def receive(self, *, within: float) -> Request:
        """Return the next request. Unreachable after `within` seconds, PeerFault if malformed."""
        frame = await self._messages.receive_frame(within=within)
        return _checked(frame, Request, self._messages.peer)

    async def answer(self, page: Page) -> None:
        """Give the page."""
        await self._messages.send_frame(Frame(page._asdict()))


def _checked(frame: Frame, kind: type[_Checked], peer: str) -> _Checked:
    try:
        # bytes are bytes: without this, text would be taken as base64
        return msgspec.convert(dict(frame.header), kind, builtin_types=(bytes,))
    except (msgspec.ValidationError, RecursionError) as error:
        raise PeerFault(f"{peer} breaks the protocol {PEERS_PROTOCOL}: {error}") from error
