"""The command `swarm`: how it begins, and how it ends.

1. Whatever goes wrong is one sentence and an exit code of the contract, a misspelt option too.
2. With --json stdout holds JSON, errors among it, and nothing else.
3. From its first line on an interruption is no traceback (`swarm.interrupts`).
"""

import io
import os
import sys
import threading
from contextlib import suppress

from swarm import interrupts

_YES = ("1", "true", "t", "yes", "y", "on")  # of a variable that switches an option on


def main() -> None:
    """The entry point of the command."""
    interrupts.end_at_once()
    code = run(sys.argv[1:] or ["--help"])
    if threading.active_count() > 1:
        # A thread may still load weights or read from the hub: nobody waits for it.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or none
                stream.flush()
        os._exit(code)
    sys.exit(code)


def run(words: list[str]) -> int:
    """Run the command that the words name; return its exit code."""
    from swarm.commands.app import called
    from swarm.console import readable_errors

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model's text may not fit the locale
    try:
        with readable_errors(is_json=_is_json(words)):
            return called(words)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)


def _is_json(words: list[str]) -> bool:
    """Is JSON asked for? Also where it is the rest of what was asked that is wrong."""
    variables = (os.environ.get("SWARM_JSON"), os.environ.get("SWARM_STREAM_JSON"))
    is_set = any((text or "").lower() in _YES for text in variables)
    return is_set or bool({"--json", "--stream-json"}.intersection(words))


if __name__ == "__main__":
    main()
