"""A swarm of machines that together run one large language model.

`swarm` carries (trio; only `swarm.host` imports libp2p), `routing` decides, `blocks` computes.
"""

__version__ = "0.1.0"
