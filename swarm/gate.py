"""Who may enter: proofs of the swarm's secret, and names that only members can tell.

1. A proof is good for one prover, one verifier and one role: handed on or sent back it proves
   nothing, since the transport has authenticated both ids.
2. Comparing takes the same time whatever differs.
"""

import hmac
from typing import Literal

Role = Literal["dialler", "listener"]

GATE_PROTOCOL = "/swarm/gate/1"
PROOF_BYTES = 32

_PROOF_DOMAIN = b"swarm gate proof 1"
_NAME_DOMAIN = b"swarm keyed name 1"


def proof(secret: bytes, prover: str, verifier: str, role: Role) -> bytes:
    """Return the 32 bytes by which `prover` shows `verifier` that it knows the secret."""
    return _keyed(secret, _PROOF_DOMAIN, prover, verifier, role)


def holds(secret: bytes, prover: str, verifier: str, role: Role, given: bytes) -> bool:
    """Tell whether `given` is the proof that `prover` owes `verifier`."""
    return hmac.compare_digest(proof(secret, prover, verifier, role), given)


def keyed_name(secret: bytes, name: str) -> str:
    """Return a name for a topic that means nothing to those without the secret."""
    return _keyed(secret, _NAME_DOMAIN, name).hex()


def _keyed(secret: bytes, domain: bytes, *parts: str) -> bytes:
    """Hash the parts under the secret, each after its length: none can borrow from the next."""
    mac = hmac.new(secret, digestmod="sha256")
    for part in (domain, *(part.encode() for part in parts)):
        mac.update(len(part).to_bytes(4, "big") + part)
    return mac.digest()
