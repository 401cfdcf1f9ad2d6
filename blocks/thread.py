"""The one thread of a process in which torch computes, and the bell that tells of its results."""

import logging
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable
from types import TracebackType

import torch

logger = logging.getLogger(__name__)

# The thread that talks to the network must get the interpreter's lock soon while torch is busy
# with small operations: ten times sooner than by default.
_SWITCH_SECONDS = 0.0005

# Longer than any sensible step; a thread that is stuck in torch cannot be ended at all.
_STOP_SECONDS = 30.0


class ComputeThread:
    """The one thread of a process in which torch computes. A context manager: start, then stop.

    Sets two things for the whole process as it starts: the interpreter's switch interval and, with
    `torch_threads`, how many threads torch computes with.
    """

    def __init__(self, torch_threads: int | None = None) -> None:
        self._torch_threads = torch_threads
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._is_stopping = False
        # a daemon: a thread stuck in torch must not keep the process from ending
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def start(self) -> None:
        """Start computing. At most once."""
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._thread.start()

    def stop(self, timeout_seconds: float = _STOP_SECONDS) -> None:
        """Finish the job at hand, drop the others, and wait that long at most for the end."""
        self._is_stopping = True
        self._work.put(None)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            logger.warning("the compute thread is still busy after %s s", timeout_seconds)

    def __enter__(self) -> "ComputeThread":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def submit(self, work: Callable[[], object]) -> None:
        """Run `work` in the thread, after what was submitted before. From any thread."""
        self._work.put(work)

    def _run(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        while (work := self._work.get()) is not None and not self._is_stopping:
            try:
                work()
            except Exception:  # one executor's trouble must not stop the others' computing
                logger.exception("work in the compute thread failed")
            del work  # or the last job's tensors would live until the next one comes


class Bell:
    """A file descriptor that is readable between `ring` and `silence`. Safe between two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a closed descriptor's number may be another's by now
        self._is_closed = False
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        if sys.platform == "linux":
            self._reading = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._sockets = socket.socketpair()
            for one in self._sockets:
                one.setblocking(False)
            self._reading = self._sockets[0].fileno()

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._reading

    def ring(self) -> None:
        """Make it readable."""
        with self._lock:
            if self._is_closed:
                return
            try:
                if sys.platform == "linux":
                    os.eventfd_write(self._reading, 1)
                elif self._sockets is not None:
                    self._sockets[1].send(b"!")
            except BlockingIOError:
                pass  # it is ringing as loud as it can

    def silence(self) -> None:
        """Make it wait for the next ring."""
        with self._lock:
            try:
                if not self._is_closed:
                    os.read(self._reading, 4096)
            except BlockingIOError:
                pass  # it was silent

    def close(self) -> None:
        """Give the descriptor back. May be repeated."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            if self._sockets is None:
                os.close(self._reading)
            else:
                for one in self._sockets:
                    one.close()
