"""The network over libp2p. Importing this imports libp2p, which takes half a second: do it late.

`open_host` gives a `swarm.transport.Host`. libp2p provides Noise, Yamux and GossipSub; sockets,
dialling, links and the gate are ours, because libp2p 0.8.1's own fall to one malformed line.
"""

from swarm.host.host import Libp2pHost, open_host

__all__ = ["Libp2pHost", "open_host"]
