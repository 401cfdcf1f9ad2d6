"""What the API was asked to be: where it listens, who may use it, and its bounds."""

import re
from dataclasses import dataclass
from pathlib import Path

from swarm.errors import BadInput

LOOPBACK = "127.0.0.1"
OWN_NAMES = (LOOPBACK, "::1", "localhost")  # by which a machine calls itself
_ADDRESS = re.compile(r"(?:(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^:\[\]]*):)?(?P<port>[0-9]{1,5})")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[\x21-\x2e\x30-\x7e]+")  # an app's own scheme, too
_KEY = re.compile(r"[\x21-\x7e]{1,512}")  # what fits into a header, on one line


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Where to listen, and how much is taken on. No keys: whoever reaches the port may ask."""

    host: str = LOOPBACK
    port: int = 0  # 0: any
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()  # whose pages may ask; "*": any
    most_running: int = 64  # choices being generated at once; one more waits for room
    most_waiting: int = 256  # choices; one more is told to come again
    queue_seconds: float = 120.0  # clients wait longer than this, and then try again by themselves
    most_body_bytes: int = 8 << 20  # ten times the text of the longest contexts
    most_choices: int = 32  # of one request
    default_tokens: int = 4096  # of a chat that names none: servers keep room for all of them
    route_seconds: float = 10.0  # to find a route, now or at a repair
    body_seconds: float = 30.0  # until a request has come whole
    answer_seconds: float = 3600.0
    keep_alive_seconds: float = 5.0  # of silence in a stream, then a comment is sent

    @property
    def is_open(self) -> bool:
        """True when others than this machine's own users may ask, and need no key."""
        return not self.keys and self.host not in OWN_NAMES


def parse_address(text: str) -> tuple[str, int]:
    """Read --api: "HOST:PORT", ":PORT" or "PORT"; without a host, loopback. BadInput otherwise."""
    match = _ADDRESS.fullmatch(text.strip())
    if match is None or int(match["port"]) > 65535:
        raise BadInput(
            f"--api {text} is not an address to listen on", next_step="give one like 127.0.0.1:8000"
        )
    host = (match["host"] or "").strip("[]")
    return host or LOOPBACK, int(match["port"])


def read_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Return the origins of --allow-origin as browsers write them. BadInput names what is none."""
    found = tuple(origin.strip().rstrip("/").lower() for origin in origins)
    for origin in found:
        if origin != "*" and _ORIGIN.fullmatch(origin) is None:
            raise BadInput(
                f"--allow-origin {origin} is not an origin",
                next_step="give one like https://chat.example.org, or * for any",
            )
    return found


def read_keys(keys: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    """Return the keys given, and those of the file, one a line. BadInput names what is no key."""
    found = list(keys)
    if file is not None:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeError) as error:
            raise BadInput(f"the keys in {file} cannot be read: {error}") from error
        found += [line for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise BadInput(f"{file} holds no key", next_step="write one on a line of its own")
    stripped = tuple(key.strip() for key in found)
    if any(_KEY.fullmatch(key) is None for key in stripped):
        raise BadInput("an API key must be 1 to 512 printable characters without spaces")
    return stripped
