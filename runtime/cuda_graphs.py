"""Replaying a graph's kernels as one CUDA graph, so that small models do not wait for Python to launch them.

At 2K a step is seconds of work and launches are lost in it; at the size of `nano` they are most of the time.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..engine.spec import Executable, Feed, GraphSpec, check_feed
from .acceleration import check_acceleration
from .cuda_probe import cuda_runtime

PLAIN_CALLS = 2  # run as usual first: they warm up what may not happen during capture, and are no work lost


CAPTURING = threading.Lock()  # of the process: beginning a capture waits for the whole device


class CapturedExecutable:
    """An executable whose third call is captured, and every later one replayed.

    Inputs are copied to fixed places (the text of a 14B model, 0.4 GB, takes a tenth of a millisecond; a reused context
    at 2K has 2.6 GB), and outputs are cloned from theirs, so the caller owns them. Captured graphs share the memory of
    `pool`: they run one after another.
    """

    def __init__(self, inner: Executable, pool: Any) -> None:
        self.spec: GraphSpec = inner.spec
        self._inner: Executable | None = inner
        self._pool = pool
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def __call__(self, feed: Feed) -> dict[str, Tensor]:
        if self._inner is None:
            raise RuntimeError(f"{self.spec.name}: called after close()")
        self._calls += 1
        if self._calls <= PLAIN_CALLS:
            return self._inner(feed)
        check_feed(self.spec, feed)
        if self._graph is None:
            with torch.cuda.device(next(iter(feed.values())).device):  # capture is on the current one
                self._capture(self._inner, feed)
        else:
            for name, fixed in self._inputs.items():
                fixed.copy_(feed[name])
        assert self._graph is not None
        self._graph.replay()
        return {name: output.clone() for name, output in self._outputs.items()}

    def close(self) -> None:
        """Free the captured graph and its tensors, and close what it was captured from."""
        self._graph = None
        self._inputs, self._outputs = {}, {}
        if self._inner is not None:
            self._inner.close()
        self._inner = None

    def kernels(self) -> Counter[str]:
        """How many nodes of each type the captured graph has; empty before the third call."""
        return Counter() if self._graph is None else node_types(self._graph)

    def _capture(self, inner: Executable, feed: Feed) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in feed.items()}
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # A stream of this device: torch's own one for captures is of the device that captured first in this process.
        # thread_local: another thread may wait for frames, or free memory, meanwhile; but not capture too.
        options = {"pool": self._pool, "stream": torch.cuda.Stream(), "capture_error_mode": "thread_local"}
        with CAPTURING, torch.cuda.graph(graph, **options):
            self._outputs = inner(self._inputs)
        self._graph = graph


def capture_steps(graphs: Mapping[str, Executable], device: torch.device) -> dict[str, Executable]:
    """The same executables, with the denoising steps captured."""
    capture = step_capture(device)
    return {name: capture(graph) for name, graph in graphs.items()}


def step_capture(device: torch.device) -> Callable[[Executable], Executable]:
    """What captures a denoising step and leaves other graphs as they are; all that it captures shares its memory.

    The other graphs are not: a clip calls most of them once, and a VAE's caches stay where they are and are written in
    place. Fixed places for them would be a second copy of 12.9 GB at 2K, overwritten under a caller with two streams.
    """
    check_acceleration("eager", True, device)
    with torch.cuda.device(device):
        pool = torch.cuda.graph_pool_handle()
    return lambda graph: CapturedExecutable(graph, pool) if is_step(graph.spec) else graph


def is_step(spec: GraphSpec) -> bool:
    """Whether a graph is a denoising step: the only ones that a clip calls again and again without caches."""
    return spec.outputs[0].name == "velocity"


def node_types(graph: torch.cuda.CUDAGraph) -> Counter[str]:
    """Node types of a captured graph: kernels and copies on the device are as they should be, host nodes are not."""
    runtime = cuda_runtime()
    raw = runtime.cudaGraph_t(graph.raw_cuda_graph())
    _, _, count = runtime.cudaGraphGetNodes(raw)
    _, nodes, _ = runtime.cudaGraphGetNodes(raw, count)
    return Counter(runtime.cudaGraphNodeGetType(node)[1].name for node in nodes)
