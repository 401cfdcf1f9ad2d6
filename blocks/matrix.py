"""The trials of many families, each in a process of its own with a time limit.

1. A crash or a hang of one family is a reason in its row, never the end of the others.
2. At most `PROCESSES` run at a time, each with one torch thread, so that results do not depend on
   how many cores there are.
3. No process outlives `examine_all`, however it ends.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from blocks.report import Check, Family, Takes, check_of

PROCESSES = 2
LIMIT_SECONDS = 60.0  # the slowest family, in pure Python, takes half of it on one busy core
_JOIN_SECONDS = 5.0

Tell = Callable[[Check | Takes], None]
Examine = Callable[["Request", Tell], None]


@dataclass(frozen=True, slots=True)
class Request:
    """A family to try: its default config made tiny, or the given one made tiny."""

    model_type: str
    config: Mapping[str, Any] | None = None


@dataclass(slots=True)
class _Running:
    process: Any  # of the forkserver's context; typeshed names no common class
    request: Request
    deadline: float
    checks: list[Check] = field(default_factory=list)
    trouble: str = ""
    takes: str = ""

    @property
    def family(self) -> Family:
        return Family(self.request.model_type, tuple(self.checks), self.trouble, self.takes)


def examine_all(
    requests: Sequence[Request],
    *,
    limit_seconds: float = LIMIT_SECONDS,
    on_done: Callable[[Family], None] = lambda family: None,
    examine: Examine | None = None,
) -> list[Family]:
    """Try all families, in processes; the answer is in the order of the requests.

    `on_done` hears of each as it ends. `examine` is what the processes run, `examine_here` if not
    told otherwise; they import it by its name.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["blocks.families"])  # imports take seconds: once is enough
    waiting = list(reversed(list(enumerate(requests))))
    running: dict[Connection, tuple[int, _Running]] = {}
    found: dict[int, Family] = {}
    try:
        while waiting or running:
            while waiting and len(running) < PROCESSES:
                number, request = waiting.pop()
                connection, one = _start(context, request, limit_seconds, examine or examine_here)
                running[connection] = (number, one)
            for connection in _ended(running, limit_seconds):
                number, one = running.pop(connection)
                connection.close()
                found[number] = one.family
                on_done(found[number])
    finally:
        for connection, (_, one) in running.items():
            _kill(one.process)
            connection.close()
    return [found[number] for number in range(len(requests))]


def _start(
    context: Any, request: Request, limit_seconds: float, examine: Examine
) -> tuple[Connection, _Running]:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, request, examine), daemon=True)
    process.start()
    theirs.close()
    return ours, _Running(process, request, time.monotonic() + limit_seconds)


def _ended(
    running: Mapping[Connection, tuple[int, _Running]], limit_seconds: float
) -> Iterator[Connection]:
    """Wait until something happens; take in what was told and name the connections that ended."""
    nearest = min(one.deadline for _, one in running.values())
    ready = wait(list(running), timeout=max(0.0, nearest - time.monotonic()))
    for connection, (_, one) in list(running.items()):
        if connection in ready:
            if _is_last(connection, one):
                yield connection
        elif time.monotonic() >= one.deadline:
            _kill(one.process)
            one.trouble = f"was not done after {limit_seconds:.0f} s"
            yield connection


def _is_last(connection: Connection, one: _Running) -> bool:
    """Take in one message; is the process done?"""
    try:
        message = json.loads(connection.recv_bytes())
    except EOFError:
        one.process.join(_JOIN_SECONDS)
        code = one.process.exitcode
        one.trouble = f"its process died ({'signal' if code and code < 0 else 'exit code'} {code})"
    else:
        if "check" in message:
            one.checks.append(check_of(message["check"]))
            return False
        if "takes" in message:
            one.takes = message["takes"]
            return False
        one.trouble = message["trouble"]
    _kill(one.process)
    return True


def _kill(process: Any) -> None:
    process.kill()
    process.join(_JOIN_SECONDS)


def _child(connection: Connection, request: Request, examine: Examine) -> None:
    """What a process runs: tells each check, then its trouble, empty if there was none."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # families warn of kernels they miss, some from C
        os.dup2(silence, stream)

    def send(message: Mapping[str, Any]) -> None:
        connection.send_bytes(json.dumps(message).encode())

    try:
        examine(request, lambda told: send(_as_message(told)))
        send({"trouble": ""})
    except Exception as error:  # noqa: BLE001  # the border of the process: all of it is told
        from blocks.reference import Trouble, told

        send({"trouble": str(error) if isinstance(error, Trouble) else told(error)})
    with suppress(OSError):
        sys.stdout.flush()


def _as_message(told: Check | Takes) -> dict[str, Any]:
    return {"takes": told.text} if isinstance(told, Takes) else {"check": told.as_json()}


def examine_here(request: Request, tell: Tell) -> None:
    """Try one family in this process, in a temporary folder."""
    import torch

    from blocks.families import examine
    from blocks.hf.models import CONFIG_MAPPING
    from blocks.hf.models import logging as transformers_logging
    from blocks.reference import Trouble, told
    from blocks.shrink import shrunk, tiny_config

    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if request.config is None:
            config = tiny_config(request.model_type)
        else:
            kind = CONFIG_MAPPING[request.model_type]
            config = shrunk(kind.from_dict(dict(request.config)))
    except Exception as error:
        raise Trouble(f"its config cannot be made tiny: {told(error)}") from error
    with tempfile.TemporaryDirectory(prefix="swarm-family-") as folder:
        examine(config, Path(folder), tell, tell)
