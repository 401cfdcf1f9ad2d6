"""Trials that child processes run in tests: they import them by name."""

import os
import signal
import time
from collections.abc import Callable

from blocks.matrix import Request
from blocks.report import SERVING, Check


def behave(request: Request, tell: Callable[[Check], None]) -> None:
    """Do what the model type says: hold, raise, hang, die, or leave."""
    tell(Check("forward", "holds", 0.0))
    if request.model_type == "raises":
        raise RuntimeError("it cannot\nbe done")
    if request.model_type == "hangs":
        time.sleep(600)  # killed long before
    if request.model_type == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if request.model_type == "leaves":
        os._exit(3)
    for name in SERVING[1:]:
        tell(Check(name, "holds", 1e-7))
