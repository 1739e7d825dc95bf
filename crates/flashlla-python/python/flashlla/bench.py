"""`python -m flashlla bench`: this operator, PyTorch's scaled_dot_product_attention and the dense reference on the same tensors."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashlla._public import attention
from flashlla.ops.naive import lla_forward_naive

# Beyond, the dense reference's tokens² and tokens·dim² tensors are too large to be timed beside the others.
_DENSE = 1 << 27


def _sdpa(q: Tensor, k: Tensor, v: Tensor, ridge: float, causal: bool) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=causal)


def _lla(q: Tensor, k: Tensor, v: Tensor, ridge: float, causal: bool) -> Tensor:
    out: Tensor = attention(q, k, v, ridge=ridge, causal=causal)
    return out


def _dense(q: Tensor, k: Tensor, v: Tensor, ridge: float, causal: bool) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return lla_forward_naive(q, k, v, q.shape[2] ** -0.5, ridge, 0.0)[0]


def _median(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Milliseconds of the middle one of some runs, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times[1:])[repeats // 2]


def measure(
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    ridge: float = 10.0,
    causal: bool = True,
    repeats: int = 5,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Times of forward and backward on random normal tensors `[batch, head, token, dim]`, one row per method.

    The dense reference is causal only, and left out where its tensors would not fit.

    >>> from flashlla.bench import measure
    >>> [row["method"] for row in measure((1, 1, 64, 16), repeats=1)]
    ['flashlla', 'sdpa', 'dense']
    """
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {device} is not allowed; it must be cpu or cuda")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device} is not there; PyTorch sees no GPU")
    if repeats < 1:
        raise ValueError(f"repeats: {repeats} is not allowed; it must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(place, dtype).requires_grad_(i < 3) for i in range(4))
    batch, heads, tokens, dim = shape
    methods: dict[str, Callable[..., Tensor]] = {"flashlla": _lla, "sdpa": _sdpa}
    if causal and batch * heads * tokens * max(tokens, dim * dim) <= _DENSE:
        methods["dense"] = _dense
    rows = []
    for name, method in methods.items():
        with torch.no_grad():
            forward = _median(partial(method, q, k, v, ridge, causal), place, repeats)
        out = method(q, k, v, ridge, causal)
        weights = grad.detach().reshape(out.shape)

        def backward(out: Tensor = out, weights: Tensor = weights) -> object:
            return torch.autograd.grad(out, (q, k, v), weights, retain_graph=True)

        rows.append({"method": name, "forward_ms": forward, "backward_ms": _median(backward, place, repeats)})
    return rows
