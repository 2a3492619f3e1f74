"""The questions of the suite `per_example`, asked of PyTorch, Opacus and BackPACK."""
# pyright: reportMissingImports=false

import copy
import itertools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler reports every start otherwise

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from benchmarks.harness import Prepared
from benchmarks.problems import Problem

Twin = tuple[nn.Module, Callable[[Any, Any], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""The same network as a module; cost of each example from outputs and targets; examples."""


def prepare(problem: Problem, name: str, question: str) -> Prepared:
    """Returns what a contender runs; every run returns (rows or None, leaves).

    Raises:
      NotImplementedError: the library cannot do it for this network.
    """
    if _device().type == "cuda":
        if not torch.cuda.is_available():
            raise NotImplementedError("this PyTorch sees no GPU")
        torch.backends.cudnn.allow_tf32 = False  # as all other products, exact in float32
    module, costs, batch = _TWINS[problem.name.removesuffix("_untied")](problem)
    route = {"PyTorch": _plain, "torch.func": _by_func, "Opacus": _by_opacus}
    run = route.get(name.split(",")[0], _by_backpack)(module, costs, batch, question, problem)
    return Prepared(run, _peak_bytes(run))


def _peak_bytes(run: Callable[[], object]) -> int | None:
    """The most that PyTorch's allocator held during a run beyond what it held before."""
    if _device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = run()
    del result
    kineto = profile.profiler.kineto_results if profile.profiler else None
    if kineto is None:
        return None
    events = [e for e in kineto.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max(initial=0))


# --- the ways ---


def _plain(
    module: nn.Module, costs: Callable, batch: tuple, question: str, problem: Problem
) -> Callable[[], object]:
    del question, problem
    params = list(module.parameters())

    def run() -> object:
        loss = costs(module(batch[0]), batch[1]).mean()
        return None, torch.autograd.grad(loss, params)

    return run


def _by_func(
    module: nn.Module, costs: Callable, batch: tuple, question: str, problem: Problem
) -> Callable[[], object]:
    params = {name: p.detach() for name, p in module.named_parameters()}

    def cost(params: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return costs(functional_call(module, params, (x[None],)), y[None])[0]

    gradients = vmap(grad(cost), in_dims=(None, 0, 0))

    def run() -> object:
        written = [g.flatten(1) for g in gradients(params, *batch).values()]
        if question == "Gram matrix":
            return sum(g @ g.T for g in written), ()
        if question.startswith("second"):
            return None, ([g.square().mean(0) for g in written], [g.mean(0) for g in written])
        squared_norms = sum(g.square().sum(1) for g in written)
        if question.startswith("norms"):
            return squared_norms, [g.mean(0) for g in written]
        clip = (problem.max_norm / torch.sqrt(torch.as_tensor(squared_norms))).clamp(max=1)
        return None, [clip @ g / len(g) for g in written]

    return run


def _by_opacus(
    module: nn.Module, costs: Callable, batch: tuple, question: str, problem: Problem
) -> Callable[[], object]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    max_norm = problem.max_norm if question.startswith("clipped") else 1.0
    ghost = GradSampleModuleFastGradientClipping(
        module, max_grad_norm=max_norm, use_ghost_clipping=True
    )
    params = list(ghost.parameters())

    def run() -> object:
        ghost.zero_grad(set_to_none=True)
        ghost.enable_hooks()
        each = costs(ghost(batch[0]), batch[1])
        each.mean().backward(retain_graph=question.startswith("clipped"))
        if question.startswith("norms"):
            return ghost.get_norm_sample().square(), [p.grad for p in params]
        clip = ghost.get_clipping_coef()
        ghost.zero_grad(set_to_none=True)
        ghost.disable_hooks()
        (clip * each).mean().backward()
        return None, [p.grad for p in params]

    return run


def _by_backpack(
    module: nn.Module, costs: Callable, batch: tuple, question: str, problem: Problem
) -> Callable[[], object]:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad, SumGradSquared

    if not isinstance(module, nn.Sequential):
        raise NotImplementedError("BackPACK has no rule for LayerNorm")
    extended, n = extend(copy.deepcopy(module)), len(batch[0])
    params = list(extended.parameters())
    norms = question.startswith("norms")

    def run() -> object:
        extended.zero_grad(set_to_none=True)
        loss = costs(extended(batch[0]), batch[1]).mean()
        with backpack(BatchL2Grad() if norms else SumGradSquared()):
            loss.backward()
        mean = [p.grad for p in params]
        # BackPACK's gradients are those of the terms of the mean: g_i / n.
        if norms:
            return sum(p.batch_l2 for p in params) * n**2, mean
        return None, ([p.sum_grad_squared * n for p in params], mean)

    return run


# --- the networks ---


def _device() -> torch.device:
    """Of the kind that JAX computes on."""
    return torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array, order="C")).to(_device())


def _load(module: nn.Module, leaves: list[np.ndarray]) -> nn.Module:
    with torch.no_grad():
        for parameter, leaf in zip(module.parameters(), leaves, strict=True):
            parameter.copy_(_tensor(leaf))
    return module.to(_device()).train()


def _leaves(problem: Problem) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(problem.params)]


def _mlp(problem: Problem) -> Twin:
    sizes = problem.options["sizes"]
    pairs = itertools.pairwise(sizes)
    layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.Sigmoid())]
    module = _load(nn.Sequential(*layers), _leaves(problem))
    x, y = problem.examples
    return module, lambda out, y: (out - y).square().sum(1) / 2, (_tensor(x), _tensor(y))


def _conv(problem: Problem) -> Twin:
    side, channels = problem.options["side"], problem.options["channels"]
    sizes, layers = (1, *channels), []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    flat = (side // 4) ** 2 * channels[-1]
    leaves = _leaves(problem)
    for k in (0, 2):
        leaves[k] = leaves[k].transpose(3, 2, 0, 1)
    pixels = leaves[4].reshape(10, side // 4, side // 4, channels[-1])
    leaves[4] = pixels.transpose(0, 3, 1, 2).reshape(10, flat)
    module = _load(nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 10)), leaves)
    x, labels = problem.examples
    # Copied, as a permuted image of one channel would pass for one with its channels last.
    batch = (_tensor(np.asarray(x).transpose(0, 3, 1, 2)), _tensor(labels).long())
    return module, lambda out, y: functional.cross_entropy(out, y, reduction="none"), batch


class _Transformer(nn.Module):
    def __init__(self, length: int, width: int, heads: int, vocabulary: int, tied: bool) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm_3 = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = (
            torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape).contiguous()
        )
        x = self.embedding(tokens) + self.positions(positions)
        x = x + self.out(self.attention(self.qkv(self.norm_1(x))))
        hidden = functional.gelu(self.up(self.norm_2(x)), approximate="tanh")
        return self.head(self.norm_3(x + self.down(hidden)))

    def attention(self, qkv: torch.Tensor) -> torch.Tensor:
        n, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        split = qkv.reshape(n, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        # Written out, as torch.func has no batching rule for PyTorch's fused attention on a CPU.
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        future = torch.ones(length, length, dtype=torch.bool, device=qkv.device).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        return mixed.transpose(1, 2).reshape(n, length, width)


def _transformer(problem: Problem) -> Twin:
    leaves = _leaves(problem)
    for k in (4, 6, 10, 12):  # (in, out) in JAX, (out, in) in PyTorch
        leaves[k] = leaves[k].T
    module = _load(_Transformer(**problem.options), leaves)
    tokens = _tensor(problem.examples).long()

    def costs(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        flat = functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none")
        return flat.reshape(targets.shape).mean(1)

    return module, costs, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


_TWINS = {"mlp": _mlp, "conv": _conv, "transformer": _transformer}
