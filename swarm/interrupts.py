"""Ctrl-C and SIGTERM, from a command's first line to its last.

Python raises KeyboardInterrupt wherever the main thread is just then: in an import, which may take
it for a package that is missing, or in a callback, where it is printed and lost. Here nothing is
raised out of nowhere.

1. Outside of `run` an interruption ends the process at once: there is nothing to undo.
2. Within `run` the first cancels what runs, and the second ends the process at once, unless that
   would leave processes behind.
3. What was ignored when the process began stays ignored: a shell's background ignores Ctrl-C.
"""

import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import TypeVar

from swarm.errors import EXIT_INTERRUPTED

Result = TypeVar("Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


def end_at_once() -> None:
    """From now on an interruption ends the process. In the main thread."""
    for number in _heeded():
        signal.signal(number, _end)


def run(
    main: Callable[..., Awaitable[Result]], *arguments: object, is_hasty: bool = True
) -> Result:
    """Run `main(*arguments)` in an event loop; return what it returns.

    Interrupted, it is cancelled; KeyboardInterrupt is raised once it has undone what it did.
    `is_hasty`: see `first`.
    """
    import trio

    async def whole() -> Result:
        cancel = partial(trio.lowlevel.current_trio_token().run_sync_soon, scope.cancel)
        try:
            with scope, first(cancel, is_hasty=is_hasty):
                return await main(*arguments)
        except Exception as error:
            if not scope.cancel_called:
                raise
            raise KeyboardInterrupt from error  # whoever said stop is not told what else failed
        raise KeyboardInterrupt

    scope = trio.CancelScope()
    return trio.run(whole)


@contextmanager
def first(act: Callable[[], object], *, is_hasty: bool = True) -> Iterator[None]:
    """Call `act` at the first interruption in the block; the second ends the process at once.

    Not `is_hasty`: the second changes nothing, as what was begun would outlive the process.
    """

    def heed(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, _end if is_hasty else _pass_over)
        act()

    numbers = _heeded()
    before = [signal.getsignal(number) for number in numbers]
    try:
        for number in numbers:
            signal.signal(number, heed)
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def interrupt() -> None:
    """What `first` may do where no loop runs: raise KeyboardInterrupt."""
    raise KeyboardInterrupt


def _heeded() -> list[signal.Signals]:
    return [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _pass_over(_number: int, _frame: FrameType | None) -> None:
    pass


def _end(_number: int, _frame: FrameType | None) -> None:
    with suppress(OSError, ValueError, AttributeError):  # stderr may be closed, or none
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), _SHOW_CURSOR)
    os._exit(EXIT_INTERRUPTED)
