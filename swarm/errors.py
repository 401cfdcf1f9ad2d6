"""What can go wrong, and whose fault it is.

    SwarmError                 one sentence and the next step; an exit code
    ├── BadInput               the user's: an unknown folder, a malformed token, a prompt too long
    ├── Refusal                a peer kept its word and said no: full, draining, wrong secret
    ├── PeerFault              a peer broke its word: a malformed frame, a gap in the serials
    ├── Unreachable            a peer went silent, or its stream ended
    └── NoRoute                the swarm's: blocks nobody serves, or no route in time

Errors of libp2p become ours in `swarm.host` and nowhere else. Errors of `blocks` and `routing`
(which import nothing of ours) become ours where they are called.
"""

EXIT_BUG = 1
EXIT_BAD_INPUT = 2
EXIT_UNCOVERED = 3
EXIT_NO_ROUTE = 4
EXIT_REFUSED = 5
EXIT_INTERRUPTED = 130


class SwarmError(Exception):
    """An error with a sentence for people, the next step, and the command's exit code."""

    kind = "error"
    exit_code = EXIT_BUG

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def sentence(self) -> str:
        """The whole line a user reads."""
        return f"{self.message}: {self.next_step}" if self.next_step else self.message


class BadInput(SwarmError):
    """The user asked for something that cannot be: the message names it."""

    kind = "bad_input"
    exit_code = EXIT_BAD_INPUT


class Refusal(SwarmError):
    """A peer declined with a reason; it is not to blame."""

    kind = "refused"
    exit_code = EXIT_REFUSED

    def __init__(
        self, message: str, *, next_step: str = "", reason: str = "", retry_seconds: float = 0.0
    ) -> None:
        super().__init__(message, next_step=next_step)
        self.reason = reason
        self.retry_seconds = retry_seconds


class PeerFault(SwarmError):
    """A peer broke its word: what it sent cannot be right."""

    kind = "peer_fault"
    exit_code = EXIT_NO_ROUTE


class Unreachable(SwarmError):
    """A peer cannot be reached, fell silent, or its stream ended."""

    kind = "unreachable"
    exit_code = EXIT_NO_ROUTE


class NoRoute(SwarmError):
    """No chain of servers through all blocks.

    `uncovered` holds the spans nobody serves, as text: "4:6". `is_full`: all blocks are served,
    but nobody has room.
    """

    kind = "no_route"
    exit_code = EXIT_NO_ROUTE

    def __init__(
        self,
        message: str,
        *,
        next_step: str = "",
        uncovered: tuple[str, ...] = (),
        is_full: bool = False,
    ) -> None:
        super().__init__(message, next_step=next_step)
        self.uncovered = uncovered
        if uncovered:
            self.kind, self.exit_code = "uncovered", EXIT_UNCOVERED
        elif is_full:
            self.kind, self.exit_code = "refused", EXIT_REFUSED
