"""A computation recorded once, and repeated with what its tensors hold then.

On a GPU the launching of a small step's kernels takes longer than they do; a CUDA graph launches
them all at once. Recording by torch's tracer does the same for a CPU, at no gain but this: it, too,
repeats exactly what was recorded, so whatever a step takes from Python, or from a tensor that is
made anew each time, shows as a wrong word.

1. What is repeated reads and writes the very tensors that were there when it was recorded.
2. Recording may run the computation any number of times, on what its tensors hold at the moment.
3. What cannot be recorded raises; nothing is then left behind but what running it leaves.
4. What a repetition returns is where the last one's was: valid until the next one.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Outputs = tuple[torch.Tensor, ...]

_WARM_RUNS = 2  # libraries choose and set up their kernels in the first ones


class Recorder(Protocol):
    """Records computations without arguments."""

    def record(
        self, run: Callable[[], Outputs], tensors: Sequence[torch.Tensor]
    ) -> Callable[[], Outputs]:
        """What repeats `run`. `tensors` are all that it reads or writes and others change."""


class GraphRecorder:
    """Records by CUDA graphs, which share one room for what they compute."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._room: Any = None
        self._stream: Any = None

    def record(
        self, run: Callable[[], Outputs], tensors: Sequence[torch.Tensor]
    ) -> Callable[[], Outputs]:
        """What repeats `run` on the stream that is current then."""
        cuda = torch.cuda
        if self._stream is None:
            self._room, self._stream = cuda.graph_pool_handle(), cuda.Stream(self._device)
        current = cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with cuda.stream(self._stream):
            for _ in range(_WARM_RUNS):
                run()
        current.wait_stream(self._stream)
        graph = cuda.CUDAGraph()
        # other threads may load weights or copy meanwhile
        with cuda.graph(
            graph, pool=self._room, stream=self._stream, capture_error_mode="thread_local"
        ):
            outputs = run()

        def repeat() -> Outputs:
            graph.replay()
            return outputs

        return repeat


class TraceRecorder:
    """Records by torch's tracer of real tensors, on any device. For tests."""

    def record(
        self, run: Callable[[], Outputs], tensors: Sequence[torch.Tensor]
    ) -> Callable[[], Outputs]:
        """What repeats `run`, operation by operation."""
        from torch.fx.experimental.proxy_tensor import make_fx  # seconds, and only tests want it

        # what is given to the tracer is known to it by identity, so `run` needs no arguments
        traced = make_fx(lambda *_: run())(*tensors)
        outputs: Outputs = tuple(traced(*tensors))

        def repeat() -> Outputs:
            for output, again in zip(outputs, traced(*tensors), strict=True):
                output.copy_(again)  # as a graph leaves it where it was
            return outputs

        return repeat
