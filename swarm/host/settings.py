"""What must be so before libp2p is used, and the figures of the host.

Import this before anything of libp2p.

1. The version of libp2p is the one whose muxer, handshake and gossip were read and measured.
2. libp2p prints nothing: what matters comes back as an error of ours.
"""

import importlib
import logging
import os
from importlib.metadata import version

LIBP2P_VERSION = "0.8.1"

# Credit for read bytes is given back at half a window, not with each read: a fifth less CPU.
os.environ.setdefault("PY_YAMUX_RELEASE_ON_READ", "0")

HANDSHAKE_SECONDS = 10.0  # from the first byte to the proof of the secret: 3 round trips
CONNECT_STAGGER_SECONDS = 0.15  # head start of a better address over the next
CLOSE_SECONDS = 2.0  # a polite end; afterwards the socket is closed without
ANSWER_SECONDS = 10.0  # how long a stranger's stream waits for its protocol, or for the gate
MOST_ADDRESSES = 16  # of one peer
MOST_LINKS = 600
MOST_LINKS_PER_PEER = 8  # both dial at once, reconnects; more is a flood, the oldest goes
MOST_STRANGERS = 64  # connections without proof; the oldest goes
MOST_STREAMS_PER_LINK = 512  # opened by the other side and not yet ended
MOST_STREAMS_OF_STRANGER = 8
MOST_UNREAD_BYTES = 64 << 20  # of all streams of a link: an honest muxer stays below
USER_TIMEOUT_MILLISECONDS = 15_000  # the kernel's limit for unacknowledged bytes
GOSSIP_BACKLOG = 1024  # messages a subscriber may lag behind before they are dropped


def check_version() -> None:
    """Raise RuntimeError if another version of libp2p is installed than this host was made for."""
    found = version("libp2p")
    if found != LIBP2P_VERSION:
        raise RuntimeError(
            f"swarm.host relies on the inside of libp2p {LIBP2P_VERSION}, found {found}: "
            f"pip install libp2p=={LIBP2P_VERSION}"
        )


check_version()
importlib.import_module("libp2p")  # sets up its logging, so ours comes after
logging.getLogger("libp2p").setLevel(logging.CRITICAL)
