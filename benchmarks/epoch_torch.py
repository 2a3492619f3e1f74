"""The epoch of the suites `epoch` and `gpu` in PyTorch, of one network or of many at once.

All data are on the device before the clock starts. Products are exact in float32, which is what
PyTorch does by itself.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import torch
from torch import nn

from benchmarks.epoch_peers import COMPILED, EAGER, GRAPHS, GRAPHS_OF_COMPILED
from benchmarks.harness import Run

if TYPE_CHECKING:
    from benchmarks.epoch import EpochProblem

_MOST_STEPS_A_GRAPH = 100

Step = Callable[[list, Any, Any, Any], list]
"""(params, pixels of all, targets of all, indices of a mini-batch) -> params."""


class _Tensors(NamedTuple):
    """A problem on the device of PyTorch that is of the kind that JAX computes on."""

    params: list[torch.Tensor]
    """Weights and biases by turns; of many networks each with a leading axis."""
    pixels: torch.Tensor
    targets: torch.Tensor
    batches: torch.Tensor

    @classmethod
    def of(cls, problem: EpochProblem, networks: Any = None) -> _Tensors:
        device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise NotImplementedError("this PyTorch sees no GPU")
        leaves = jax.tree.leaves(problem.network if networks is None else networks)
        arrays = (
            *(np.array(leaf, np.float32) for leaf in leaves),
            problem.pixels,
            np.eye(problem.sizes[-1], dtype=np.float32)[problem.labels],
            problem.batches.astype(np.int64),
        )
        *params, pixels, targets, batches = (torch.from_numpy(a).to(device) for a in arrays)
        return cls(params, pixels, targets, batches)

    @property
    def walked_over(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pixels, self.targets


def prepare(way: str, problem: EpochProblem) -> Run:
    """Returns an epoch in one of the ways of `epoch_peers`, from params to params.

    Raises:
      NotImplementedError: PyTorch cannot go this way here.
    """
    tensors = _Tensors.of(problem)
    if way == EAGER:
        return _eager(problem, tensors)
    return _functional(way, _make_step(problem), tensors)


def prepare_many(way: str, problem: EpochProblem, networks: Any) -> Run:
    """Returns an epoch of many networks, whose leaves have a leading axis, in one of these ways.

    The step is that of one network under `torch.func.vmap`; all take the same mini-batches.

    Raises:
      NotImplementedError: PyTorch cannot go this way here.
    """
    step = torch.func.vmap(_make_step(problem), in_dims=(0, None, None, None))
    return _functional(way, step, _Tensors.of(problem, networks))


def _eager(problem: EpochProblem, tensors: _Tensors) -> Run:
    """`nn.Sequential` and `optim.SGD`, as in PyTorch's tutorials; inputs float32 beforehand."""
    layers = []
    for weights, biases in problem.network:
        layers += [nn.Linear(weights.shape[1], len(biases)), nn.Sigmoid()]
    module = nn.Sequential(*layers).to(tensors.pixels.device)
    inputs, targets = tensors.pixels.float() / 255, tensors.targets
    optimizer = torch.optim.SGD(module.parameters(), lr=problem.learning_rate)

    def run() -> object:
        with torch.no_grad():
            for parameter, leaf in zip(module.parameters(), tensors.params, strict=True):
                parameter.copy_(leaf)
        for indices in tensors.batches:
            errors = module(inputs[indices]) - targets[indices]
            optimizer.zero_grad()
            (errors.square().sum(1).mean() / 2).backward()
            optimizer.step()
        return [parameter.detach() for parameter in module.parameters()]

    return run


def _make_step(problem: EpochProblem) -> Step:
    """Returns a step as a function: gathering, gradient and update; pixels stay uint8."""

    def step(params: Any, pixels: Any, targets: Any, indices: Any) -> Any:
        x, y = pixels[indices].float() / 255, targets[indices]

        def mean_cost(params: Any) -> Any:
            a = x
            for weights, biases in zip(params[::2], params[1::2], strict=True):
                a = torch.sigmoid(nn.functional.linear(a, weights, biases))
            return (a - y).square().sum(1).mean() / 2

        gradients = torch.func.grad(mean_cost)(params)
        return [p - problem.learning_rate * g for p, g in zip(params, gradients, strict=True)]

    return step


def _functional(way: str, step: Step, tensors: _Tensors) -> Run:
    """Returns an epoch by a step that is a function, by graphs or not, compiled or not."""
    if way in (COMPILED, GRAPHS_OF_COMPILED):
        _check_compiler(tensors.pixels.device)
        step = torch.compile(step, fullgraph=True, dynamic=False)
        step(tensors.params, *tensors.walked_over, tensors.batches[0])  # compiles
    if way in (GRAPHS, GRAPHS_OF_COMPILED):
        return _replayed(step, tensors)

    def run() -> object:
        params = tensors.params
        for indices in tensors.batches:
            params = step(params, *tensors.walked_over, indices)
        return params

    return run


def _check_compiler(device: torch.device) -> None:
    """Raises NotImplementedError where `torch.compile` lacks what makes its code."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise NotImplementedError("torch.compile needs triton on a GPU")
        return
    compilers = (os.environ.get("CXX") or "g++", "clang++")
    if not any(map(shutil.which, compilers)):
        raise NotImplementedError(f"torch.compile needs a C++ compiler: {' or '.join(compilers)}")


def _replayed(step: Step, tensors: _Tensors) -> Run:
    """Returns an epoch that replays CUDA graphs of up to a hundred steps each."""
    if tensors.pixels.device.type != "cuda":
        raise NotImplementedError("CUDA graphs need a GPU of NVIDIA's")
    num_steps, m = tensors.batches.shape
    most = min(_MOST_STEPS_A_GRAPH, num_steps)
    length = max(d for d in range(1, most + 1) if num_steps % d == 0)
    params = [leaf.clone() for leaf in tensors.params]
    indices = tensors.batches[:length].clone()

    def walk() -> None:
        ended = params
        for row in indices:
            ended = step(ended, *tensors.walked_over, row)
        for leaf, new in zip(params, ended, strict=True):
            leaf.copy_(new)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what must happen once happens before the graph is recorded
        for _ in range(3):
            walk()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        walk()

    def run() -> object:
        for leaf, first in zip(params, tensors.params, strict=True):
            leaf.copy_(first)
        for chunk in tensors.batches.reshape(-1, length, m):
            indices.copy_(chunk)
            graph.replay()
        return params

    return run
