"""Others that speak libp2p may take part: our shortcuts are within its protocols."""

from typing import Any

import trio
from host_worlds import ECHO, QUIET, SECRET, SOON, Hosts, echo, until
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID, Transport
from multiaddr import Multiaddr

from swarm.gate import PROOF_BYTES, holds, proof


async def _read(stream: Any, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await stream.read(size - len(data))
    return data


def test_a_stock_libp2p_host_enters_and_is_served() -> None:
    async def main(make: Hosts) -> None:
        ours = await make()
        ours.serve(ECHO, echo)
        keys = create_new_key_pair(bytes(range(32)))
        noise = Transport(keys, noise_privkey=create_noise_key_pair().private_key)
        local = Multiaddr("/ip4/127.0.0.1/tcp/0")
        stock = new_host(key_pair=keys, sec_opt={PROTOCOL_ID: noise}, listen_addrs=[local])
        async with stock.run(listen_addrs=[local]):
            name, remote = stock.get_id().to_base58(), ID.from_string(ours.peer)
            await stock.get_network().dial_addr(Multiaddr(ours.addresses[0]), remote)
            gate = await stock.new_stream(remote, ["/swarm/gate/1"])
            await gate.write(proof(SECRET, name, ours.peer, "dialler"))
            reply = await _read(gate, 1 + PROOF_BYTES)
            assert holds(SECRET, ours.peer, name, "listener", reply[1:])
            await until(lambda: name in ours.links())
            stream = await stock.new_stream(remote, ["/unheard-of/1", ECHO])
            sent = bytes(range(256)) * 2000
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.write, sent)
                assert await _read(stream, len(sent)) == sent
            with trio.CancelScope(shield=True):
                await stock.close()

    QUIET.run(main)


def test_we_dial_a_stock_libp2p_host() -> None:
    async def main(make: Hosts) -> None:
        ours = await make()
        keys = create_new_key_pair(bytes(range(32)))
        noise = Transport(keys, noise_privkey=create_noise_key_pair().private_key)
        local = Multiaddr("/ip4/127.0.0.1/tcp/0")
        stock = new_host(key_pair=keys, sec_opt={PROTOCOL_ID: noise}, listen_addrs=[local])
        name = stock.get_id().to_base58()

        async def gate(stream: Any) -> None:
            given = await _read(stream, PROOF_BYTES)
            assert holds(SECRET, ours.peer, name, "dialler", given)
            await stream.write(b"\x01" + proof(SECRET, name, ours.peer, "listener"))

        async def shout(stream: Any) -> None:
            await stream.write((await _read(stream, 5)).upper())

        async with stock.run(listen_addrs=[local]):
            stock.set_stream_handler("/swarm/gate/1", gate)
            stock.set_stream_handler("/test/shout/1", shout)
            ours.learn(name, [str(address) for address in stock.get_addrs()])
            stream = await ours.open(name, "/test/shout/1", within=SOON)
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"HELLO"
            with trio.CancelScope(shield=True):
                await stock.close()

    QUIET.run(main)
