"""`attention`: one function for tensors and arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

from flashlla._options import check_layout, checked
from flashlla._torch import torch

if torch is not None:
    from flashlla import _tensors


class Diagnostics(NamedTuple):
    """What a forward computes beside its outputs; none of it carries gradients.

    The axes are those of `[batch, query head, query]`, whatever the layout of the call.
    """

    lse: Any
    """`[B, HQ, N]`: natural logarithm of Σ exp(logit); minus infinity where a query sees no key."""
    key_mean: Any
    """`[B, HQ, N, D]`: the softmax-weighted mean key k̄."""
    probe: Any
    """`[B, HQ, N, D]`: the probe x = (C + λI)⁻¹ (k̄ − q), or the given one."""
    iterations: Any
    """`[B, HQ, N]`, int32: conjugate-gradient steps of each query."""
    residual: Any
    """`[B, HQ, N]`: relative residual |δ − Ax| / |δ| at the end of the solve."""


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    ridge: Any = 10.0,
    scale: Any = None,
    causal: bool = False,
    window: int | None = None,
    cu_seqlens: Any = None,
    q_offset: int = 0,
    leave_one_out: bool = False,
    bias: Any = None,
    probe: Any = None,
    solver: str = "auto",
    tolerance: float | None = None,
    max_iters: int | None = None,
    precision: str = "standard",
    layout: str = "bhnd",
    return_diagnostics: bool = False,
) -> Any:
    """Local Linear Attention of queries over keys and values.

    PyTorch tensors give a tensor, with gradients for `q`, `k`, `v`, `ridge`, `scale`, `bias` and `probe`; NumPy arrays give
    an array. CPU tensors may be float64, float32, bfloat16 or float16; CUDA tensors float32, bfloat16 or float16, computed
    in the current stream. Sums are kept in float64 for float64 and in float32 for the others.

    Args:
        q: queries `[B, HQ, N, D]` (see `layout`), D at most 256.
        k: keys `[B, H, M, D]`; HQ is a multiple of H, and query head h reads KV head h // (HQ // H).
        v: values `[B, H, M, DV]`, DV at most 256.
        ridge: the penalty λ > 0: a number, or a tensor `[]`, `[HQ]` or `[B, HQ, N]` with 1 where it is constant. In squared
            key units, relative to weights that sum to 1. What is not greater than 0 is an error on the CPU; on a GPU tensors
            are not looked at, because that would wait for the GPU.
        scale: factor on q·k in the logits, the inverse bandwidth (default D^-0.5): a number, or a tensor `[]` or `[H]` of
            positive numbers, one for each KV head. Its gradient is a sum over queries whose terms may nearly cancel. Their
            errors do not: relative to the root of the sum of the terms' squares the error is about that of the solves, on a
            GPU 3e-3, or 1e-3 with precision "high".
        causal: a query sees the keys up to its own position.
        window: a query at position i sees only keys j > i - window.
        cu_seqlens: running sums of the lengths of packed sequences, from 0 to M; a list, or an integer tensor (on a GPU it is
            copied to the host, which waits for the stream: give one in host memory).
        q_offset: the position of query 0; with a cache of M keys whose last N belong to the queries, M - N.
        leave_one_out: a query does not see the key at its own position.
        bias: added to the logits, one number per key: `[M]`, or `[B, H or HQ, M]` with 1 where it is constant. Minus infinity
            hides a key.
        probe: given in place of the solve, in the shape of `q`: "Parallax" attention. The ridge then has no effect.
        solver: "auto" (conjugate gradients, directly where that is cheaper), "cg", or "direct" (CPU only).
        tolerance: relative residual |δ − Ax| / |δ| of conjugate gradients; by default near what the arithmetic resolves: 1e-12
            in float64 and 1e-6 otherwise. On a GPU 1e-4 with precision "high"; with "standard", "cg" takes 3e-3 (2e-3 beyond 64
            dims), and "auto" ends when the expected error of a block's outputs is 2.2e-3, of its gradients 2.5e-3 (5.4e-3 and
            5e-3 for blocks that make no pass under a causal mask: what is left falls along the sequence).
        max_iters: the most steps; with "auto" on the CPU the solve is direct from there.
        precision: "standard", or "high": float64 inside on the CPU, two fp16 terms on a GPU.
        layout: the axes of q, k, v, probe and the result: "bhnd", "bnhd", "bnd" (one head), or "nhd" (packed, batch 1).
        return_diagnostics: return `(out, Diagnostics)`.

    Returns:
        `[B, HQ, N, DV]` in the layout and dtype of `q`. A query that sees no key gives zeros.

        Queries that are not finite, or see a key or value that is not, give NaN, and no others do. Gradients are NaN for these
        queries, for those whose output's gradient is not finite, and for the keys that any of them sees. On a GPU this differs
        a little: they may be infinite rather than NaN; a query that is not finite may spoil the gradients of keys up to 256
        tokens beyond those that it sees; a value that is not finite counts as zero in gradients; and a bias does not hide a
        key that is not finite.

    Raises:
        ValueError, TypeError: with the name of the argument, what was given and what is allowed.

    Example, 8 query heads that share 2 KV heads, with a learned ridge per head:

    >>> import torch, flashlla
    >>> q = torch.randn(2, 8, 32, 16, requires_grad=True)
    >>> k, v = torch.randn(2, 2, 2, 32, 16)
    >>> ridge = torch.ones(8, requires_grad=True)
    >>> out = flashlla.attention(q, k, v, ridge=ridge, causal=True)
    >>> out.square().mean().backward()
    >>> out.shape, ridge.grad.shape
    (torch.Size([2, 8, 32, 16]), torch.Size([8]))

    With NumPy, and tokens before heads:

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(1, 32, 4, 16))
    >>> flashlla.attention(x, x, x, layout="bnhd", window=8, causal=True).shape
    (1, 32, 4, 16)
    """
    check_layout(layout)
    options = checked(causal, window, q_offset, leave_one_out, solver, tolerance, max_iters, precision)
    out: Any
    rest: tuple[Any, ...]
    if torch is not None and isinstance(q, torch.Tensor):
        out, rest = _tensors.attention(
            q, k, v, ridge, scale, bias, probe, cu_seqlens, options, layout, return_diagnostics
        )
    else:
        from flashlla import _arrays

        out, rest = _arrays.attention(
            q, k, v, ridge, scale, bias, probe, cu_seqlens, options, layout, return_diagnostics
        )
    return (out, Diagnostics(*rest)) if return_diagnostics else out
