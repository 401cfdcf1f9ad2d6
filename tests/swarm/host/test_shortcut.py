"""What goes past the muxer's reader arrives as if the reader had read it."""

import struct

import trio
from hypothesis import given
from hypothesis import strategies as st

from swarm.host.shortcut import Shortcut

HEADER = struct.Struct("!BBHII")
DATA, WINDOW, PING = 0, 1, 2
SYN, FIN = 1, 4
WINDOW_BYTES = 1 << 10

Frame = tuple[int, int, int, bytes]  # kind, flags, stream, payload


class FakeStream:
    def __init__(self) -> None:
        self.recv_window = WINDOW_BYTES
        self.recv_closed = False


class FakeMuxer:
    """The part of the muxer that reads frames: slowly, one at a time, whatever the cuts."""

    def __init__(self) -> None:
        self.streams: dict[int, FakeStream] = {}
        self.stream_buffers: dict[int, bytearray] = {}
        self.stream_events: dict[int, trio.Event] = {}
        self.streams_lock = trio.Lock()
        self.others: list[Frame] = []
        self.frames_read = 0
        self._held = bytearray()

    def read(self, data: bytes) -> None:
        self._held += data
        while len(self._held) >= HEADER.size:
            _, kind, flags, stream, length = HEADER.unpack_from(self._held)
            end = HEADER.size + (length if kind == DATA else 0)
            if len(self._held) < end:
                return
            payload = bytes(self._held[HEADER.size : end])
            del self._held[:end]
            self.frames_read += 1
            self._obey(kind, flags, stream, payload)

    def _obey(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if flags & SYN:
            self.streams[stream] = FakeStream()
            self.stream_buffers[stream] = bytearray()
            self.stream_events[stream] = trio.Event()
        if kind != DATA:
            self.others.append((kind, flags, stream, payload))
        elif stream in self.streams:
            muxed = self.streams[stream]
            self.stream_buffers[stream] += payload
            muxed.recv_window = max(0, muxed.recv_window - len(payload))
            muxed.recv_closed |= bool(flags & FIN)

    def state(self) -> object:
        streams = {
            number: (bytes(self.stream_buffers[number]), one.recv_window, one.recv_closed)
            for number, one in self.streams.items()
        }
        return streams, self.others


def packed(frame: Frame) -> bytes:
    kind, flags, stream, payload = frame
    length = len(payload) if kind == DATA else 7
    return HEADER.pack(0, kind, flags, stream, length) + payload


def frames() -> st.SearchStrategy[list[Frame]]:
    number = st.integers(1, 4)
    payload = st.binary(max_size=300)
    data = st.tuples(st.just(DATA), st.sampled_from([0, 0, 0, FIN]), number, payload)
    other = st.tuples(st.sampled_from([WINDOW, PING]), st.just(0), number, st.just(b""))
    opening = st.tuples(st.sampled_from([DATA, WINDOW]), st.just(SYN), number, st.just(b""))
    return st.lists(st.one_of(data, data, other, opening), max_size=30)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({place % (len(data) + 1) for place in cuts})
    return [data[begin:end] for begin, end in zip([0, *places], [*places, len(data)], strict=True)]


@given(frames(), st.lists(st.integers(0, 10_000), max_size=12), st.integers(0, 3))
def test_a_stream_holds_the_same_bytes_whoever_filed_them(
    sent: list[Frame], cuts: list[int], known: int
) -> None:
    whole, beside = FakeMuxer(), FakeMuxer()
    openings = b"".join(packed((WINDOW, SYN, number, b"")) for number in range(1, known + 1))
    stream = openings + b"".join(map(packed, sent))
    whole.read(stream)
    shortcut = Shortcut(beside)
    for piece in cut(stream, cuts):
        beside.read(shortcut.rest(piece))
    assert beside.state() == whole.state()


def opened(*numbers: int) -> FakeMuxer:
    muxer = FakeMuxer()
    for number in numbers:
        muxer.read(packed((WINDOW, SYN, number, b"")))
    muxer.frames_read = 0
    return muxer


def test_whole_frames_of_known_streams_cost_the_muxer_nothing() -> None:
    muxer = opened(1, 2)
    data = packed((DATA, 0, 1, b"one")) + packed((DATA, 0, 2, b"two")) + packed((DATA, 0, 1, b"!"))
    assert Shortcut(muxer).rest(data) == b""
    assert bytes(muxer.stream_buffers[1]) == b"one!"
    assert bytes(muxer.stream_buffers[2]) == b"two"
    assert all(event.is_set() for event in muxer.stream_events.values())


def test_what_the_muxer_is_changing_is_left_to_it() -> None:
    muxer = opened(1)
    data = packed((DATA, 0, 1, b"one"))

    async def hold_the_lock() -> None:
        async with muxer.streams_lock:
            assert Shortcut(muxer).rest(data) == data

    trio.run(hold_the_lock)


def test_a_frame_larger_than_any_window_is_left_to_the_muxer_which_ends_the_link() -> None:
    muxer = opened(1)
    shortcut = Shortcut(muxer)
    head = HEADER.pack(0, DATA, 0, 1, 1 << 31)
    assert shortcut.rest(head) == head
    assert shortcut.rest(packed((DATA, 0, 1, b"later"))) == packed((DATA, 0, 1, b"later"))
    assert not muxer.stream_buffers[1]


def test_after_a_torn_frame_the_next_ones_are_filed_again() -> None:
    muxer = opened(1)
    shortcut = Shortcut(muxer)
    data = packed((DATA, 0, 1, b"torn in the middle"))
    for piece in (data[:5], data[5:20], data[20:]):
        rest = shortcut.rest(piece)
        assert rest == piece
        muxer.read(rest)
    assert shortcut.rest(packed((DATA, 0, 1, b"!"))) == b""
    assert bytes(muxer.stream_buffers[1]) == b"torn in the middle!"
    assert muxer.frames_read == 1
