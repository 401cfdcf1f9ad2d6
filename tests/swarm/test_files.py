from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from swarm.errors import PeerFault, SwarmError, Unreachable
from swarm.files import (
    CHUNK_BYTES,
    FILES_PROTOCOL,
    TOTAL_BYTES,
    FileCache,
    SmallFiles,
    digest_of,
    fetch_files,
    serve_files,
)
from swarm.memory import MemoryHost, MemoryNetwork
from swarm.transport import MessageStream, Stream
from swarm.wire import Frame, Tensor

FILES = SmallFiles(
    {
        "model.json": b'{"format": 1}',
        "tokenizer.json": bytes(range(256)) * (10 * CHUNK_BYTES // 256) + b"end",
        "config.json": b"",
        "chat_template.jinja": b"x" * CHUNK_BYTES,
    }
)
Say = Callable[[MessageStream, Frame], Awaitable[None]]


def between(
    server: Callable[[MemoryHost], None], client: Callable[[MemoryHost], Awaitable[None]]
) -> None:
    """Run a server's and a client's side over a network in virtual time."""

    async def main() -> None:
        async with MemoryNetwork(delay_seconds=0.02) as network:
            serving, asking = network.attach("server"), network.attach("client")
            network.introduce()
            server(serving)
            await client(asking)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def failure(server: Callable[[MemoryHost], None], wanted: str = FILES.digest) -> SwarmError:
    """What fetching from this server raises."""
    raised: list[SwarmError] = []

    async def client(host: MemoryHost) -> None:
        started = trio.current_time()
        with pytest.raises(SwarmError) as caught:
            await fetch_files(host, "server", wanted, within=10)
        raised.append(caught.value)
        assert trio.current_time() < started + 11

    between(server, client)
    return raised[0]


def liar(say: Say) -> Callable[[MemoryHost], None]:
    """A server that gives the true manifest and then answers each request as `say` likes."""

    def serve(host: MemoryHost) -> None:
        async def answer(stream: Stream) -> None:
            messages = MessageStream(stream)
            await messages.receive_frame()
            await messages.send_frame(Frame({"k": "manifest", "files": FILES.manifest}))
            while True:
                await say(messages, await messages.receive_frame())

        host.serve(FILES_PROTOCOL, answer)

    return serve


def chunk(data: bytes, *, is_last: bool = True) -> Frame:
    return Frame({"k": "chunk", "last": is_last}, {"data": Tensor("uint8", (len(data),), data)})


def test_files_of_any_size_arrive_as_they_were() -> None:
    async def client(host: MemoryHost) -> None:
        files = await fetch_files(host, "server", FILES.digest, within=10)
        assert files == FILES
        assert files.digest == FILES.digest

    between(lambda host: serve_files(host, FILES), client)


def test_the_digest_changes_with_each_name_and_each_byte() -> None:
    one = SmallFiles({"config.json": b"a", "model.json": b"b"})
    others = [
        {"config.json": b"b", "model.json": b"a"},
        {"config.json": b"a"},
        {"config.json": b"a", "model.json": b"c"},
        {"config.json": b"a", "tokenizer.json": b"b"},
        {},
    ]
    assert len({SmallFiles(files).digest for files in others} | {one.digest}) == 6
    assert digest_of(dict(reversed(one.manifest.items()))) == one.digest


def test_other_files_than_the_record_announces_are_the_peers_fault() -> None:
    fault = failure(lambda host: serve_files(host, FILES), wanted="0" * 64)
    assert isinstance(fault, PeerFault)


def test_a_damaged_file_is_the_peers_fault_and_named() -> None:
    async def say(stream: MessageStream, request: Frame) -> None:
        await stream.send_frame(chunk(FILES[request.header["name"]][:100] + b"!"))

    fault = failure(liar(say))
    assert isinstance(fault, PeerFault)
    assert "chat_template.jinja" in fault.message


@pytest.mark.parametrize(
    "manifest",
    [
        {"../../etc/passwd": "0" * 64},
        {"model.safetensors": "0" * 64},
        {"config.json": "short"},
        {"config.json": 7},
        ["config.json"],
        None,
    ],
    ids=str,
)
def test_a_manifest_with_strange_names_or_digests_is_the_peers_fault(manifest: object) -> None:
    def serve(host: MemoryHost) -> None:
        async def answer(stream: Stream) -> None:
            messages = MessageStream(stream)
            await messages.receive_frame()
            await messages.send_frame(Frame({"k": "manifest", "files": manifest}))

        host.serve(FILES_PROTOCOL, answer)

    wanted = digest_of(manifest) if manifest == {"model.safetensors": "0" * 64} else "0" * 64
    fault = failure(serve, wanted)
    assert isinstance(fault, PeerFault)


@pytest.mark.parametrize(
    "answer",
    [
        Frame({"k": "manifest", "files": {}}),
        Frame({"k": "chunk", "last": True}),
        Frame({"k": "chunk", "last": True}, {"data": Tensor("int32", (1,), b"1234")}),
        chunk(b"", is_last=False),
    ],
    ids=["kind", "no data", "dtype", "endless"],
)
def test_anything_but_parts_of_a_file_is_the_peers_fault(answer: Frame) -> None:
    async def say(stream: MessageStream, _: Frame) -> None:
        await stream.send_frame(answer)

    assert isinstance(failure(liar(say)), PeerFault)


def test_a_peer_that_sends_without_end_is_cut_off_at_the_bound() -> None:
    sent = 0

    async def say(stream: MessageStream, _: Frame) -> None:
        nonlocal sent
        while True:
            await stream.send_frame(chunk(bytes(CHUNK_BYTES), is_last=False))
            sent += CHUNK_BYTES

    assert isinstance(failure(liar(say)), PeerFault)
    assert sent <= TOTAL_BYTES + 16 * CHUNK_BYTES


def test_a_chunk_above_the_frame_limit_is_the_peers_fault() -> None:
    async def say(stream: MessageStream, _: Frame) -> None:
        await stream.send_frame(chunk(bytes(2 * CHUNK_BYTES)))

    assert isinstance(failure(liar(say)), PeerFault)


def test_a_peer_that_falls_silent_meets_the_deadline() -> None:
    async def say(stream: MessageStream, _: Frame) -> None:
        await trio.sleep_forever()

    fault = failure(liar(say))
    assert isinstance(fault, Unreachable)
    assert "10 seconds" in fault.message


def test_a_peer_without_files_is_unreachable() -> None:
    assert isinstance(failure(lambda host: None), Unreachable)


@pytest.mark.parametrize(
    "requests",
    [
        [{"k": "file", "name": "generation_config.json"}],
        [{"k": "file", "name": "../secret"}],
        [{"k": "file", "name": ["config.json"]}],
        [{"k": "everything"}],
        [{"k": "file", "name": "config.json"}, {"k": "file", "name": "config.json"}],
    ],
    ids=str,
)
def test_a_server_ends_the_stream_of_a_client_that_asks_for_what_it_may_not(
    requests: list[dict[str, object]],
) -> None:
    async def client(host: MemoryHost) -> None:
        stream = MessageStream(await host.open("server", FILES_PROTOCOL, within=1))
        for request in requests:
            await stream.send_frame(Frame(request))
        for _ in requests[1:]:
            await stream.receive_frame(within=1)
        with pytest.raises(Unreachable, match=r"^(?!.*silent)"):
            await stream.receive_frame(within=5)
        assert await fetch_files(host, "server", FILES.digest, within=10) == FILES

    between(lambda host: serve_files(host, FILES), client)


def test_a_client_that_asks_nothing_does_not_keep_its_stream() -> None:
    async def client(host: MemoryHost) -> None:
        stream = MessageStream(await host.open("server", FILES_PROTOCOL, within=1))
        await stream.send_frame(Frame({"k": "manifest"}))
        await stream.receive_frame(within=1)
        with pytest.raises(Unreachable, match=r"^(?!.*silent)"):
            await stream.receive_frame(within=60)

    between(lambda host: serve_files(host, FILES), client)


def test_names_outside_the_fixed_set_and_too_many_bytes_cannot_be_served() -> None:
    with pytest.raises(ValueError, match="weights"):
        SmallFiles({"weights.safetensors": b""})
    half = bytes(TOTAL_BYTES // 2 + 1)
    with pytest.raises(ValueError, match="bytes"):
        SmallFiles({"config.json": half, "tokenizer.json": half})


# the cache


def test_a_cache_gives_back_what_it_was_given(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "deep" / "cache")
    assert cache.load(FILES.digest) is None
    cache.store(FILES)
    cache.store(FILES)
    assert FileCache(tmp_path / "deep" / "cache").load(FILES.digest) == FILES
    assert [path.name for path in (tmp_path / "deep" / "cache").iterdir()] == [FILES.digest]


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "not a folder"])
def test_a_damaged_cache_entry_counts_as_absent_and_is_replaced(
    damage: str, tmp_path: Path
) -> None:
    cache = FileCache(tmp_path)
    cache.store(FILES)
    entry = cache.path(FILES.digest)
    match damage:
        case "changed":
            (entry / "model.json").write_bytes(b'{"format": 2}')
        case "missing":
            (entry / "model.json").unlink()
        case "added":
            (entry / "generation_config.json").write_bytes(b"{}")
        case _:
            for path in entry.iterdir():
                path.unlink()
            entry.rmdir()
            entry.write_bytes(b"")
    assert cache.load(FILES.digest) is None
    cache.store(FILES)
    assert cache.load(FILES.digest) == FILES
    assert [path.name for path in tmp_path.iterdir()] == [FILES.digest]


def test_a_cache_that_is_interrupted_while_writing_has_no_half_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = Path.write_bytes

    def interrupted(path: Path, data: bytes) -> int:
        if len(written) == 2:
            raise OSError("the disk is full")
        written.append(path.name)
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(OSError, match="full"):
        FileCache(tmp_path).store(FILES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("digest", ["", "../..", "0" * 63, "G" * 64, "A" * 64, "0" * 64 + "\n"])
def test_a_digest_that_is_none_never_becomes_a_path(digest: str, tmp_path: Path) -> None:
    with pytest.raises(PeerFault):
        FileCache(tmp_path).load(digest)
