"""`decode`: new queries that look at a cache of keys and values."""

from __future__ import annotations

from typing import Any

from flashlla._options import checked
from flashlla._public import Diagnostics
from flashlla._torch import torch

LAYOUTS = ("bhnd", "bnhd")


def check_layout(layout: Any) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: '{layout}' is not allowed; it must be one of {', '.join(LAYOUTS)} when decoding")


def decode(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    lengths: Any,
    *,
    block_table: Any = None,
    ridge: Any = 10.0,
    scale: Any = None,
    causal: bool = True,
    window: int | None = None,
    bias: Any = None,
    probe: Any = None,
    solver: str = "auto",
    tolerance: float | None = None,
    max_iters: int | None = None,
    precision: str = "standard",
    layout: str = "bhnd",
    max_length: int | None = None,
    return_diagnostics: bool = False,
) -> Any:
    """Local Linear Attention of the newest queries of each sequence over a cache, in one pass over it, or in a few.

    The answer is that of `attention` at those positions. The cache must already hold the queries' own keys and values: query i
    of t stands at token `lengths - t + i` of its sequence. There are no gradients.

    Args:
        q: queries `[B, HQ, t, D]`, 1 to 16 of each sequence.
        k_cache: keys `[B, H, room, D]`, or with a block table a pool of pages `[pages, H, page_size, D]`, page sizes being
            powers of two from 16. HQ is a multiple of H.
        v_cache: values `[B, H, room, DV]` or `[pages, H, page_size, DV]`.
        lengths: tokens of each sequence, `[B]`, new ones included: a list, or an integer tensor. 0 for a sequence that is not in
            use, whose outputs are 0.
        block_table: `[B, pages per sequence]`: page `block_table[b, j // page_size]` holds token j of sequence b. Sequences may
            share the pages of a common past.
        ridge: the penalty λ > 0: a number, or a tensor `[]`, `[HQ]` or `[B, HQ, t]` with 1 where it is constant.
        scale: factor on q·k in the logits (default D^-0.5): a number, or a tensor `[]` or `[H]`, one for each KV head.
        causal: a query sees the tokens up to its own position; otherwise all of its sequence.
        window: a query at position i sees only tokens j > i - window.
        bias: added to the logits, one number per token of the room: `[room]` or `[B, H or HQ, room]`. CPU only.
        probe: given in place of the solve, in the shape of `q`: "Parallax" attention.
        solver, tolerance, max_iters, precision: as for `attention`. On a GPU the matrix of each query is formed and solved to 1e-5
            as two float16 terms. Where many queries of a bfloat16 or float16 cache share a KV head and there is enough to do, they are
            solved together instead, to an expected relative error of the outputs of 5e-4; `precision="high"` rules that out.
        layout: the axes of q, the caches, probe and the result: "bhnd", or "bnhd" (`[B, t, HQ, D]`, `[B, room, H, D]`,
            `[pages, page_size, H, D]`).
        max_length: a bound of `lengths`, which makes short sequences in a large room faster where `lengths` are on the GPU. Longer
            ones are taken to be that long.
        return_diagnostics: return `(out, Diagnostics)`.

    Returns:
        `[B, HQ, t, DV]` in the layout and dtype of `q`.

    Raises:
        ValueError, TypeError: with the name of the argument, what was given and what is allowed. Lengths and block tables on a GPU
            are not looked at, because that would wait for the GPU: wrong ones give outputs that mean nothing, but never reach
            beyond the cache.

    On a GPU head dimensions are multiples of 8, at most 128, and keys and values are read as float16 relative to a sample of each
    stretch of the context: where others are more than 2000 times as large as the sample, the outputs are NaN.

    >>> import torch, flashlla
    >>> k, v = torch.randn(2, 2, 4, 100, 16)
    >>> q = torch.randn(2, 8, 1, 16)
    >>> out = flashlla.decode(q, k, v, lengths=[100, 37], ridge=1.0)
    >>> full = flashlla.attention(q[1:], k[1:, :, :37], v[1:, :, :37], ridge=1.0)
    >>> torch.allclose(out[1:], full, atol=1e-4)
    True
    """
    check_layout(layout)
    options = checked(causal, window, 0, False, solver, tolerance, max_iters, precision)
    out: Any
    rest: tuple[Any, ...]
    arguments = (q, k_cache, v_cache, lengths, block_table, ridge, scale, bias, probe, options, layout)
    if torch is not None and isinstance(q, torch.Tensor):
        from flashlla import _tensors_decode

        out, rest = _tensors_decode.decode(*arguments, max_length, return_diagnostics)
    else:
        from flashlla import _arrays

        out, rest = _arrays.decode(*arguments, return_diagnostics)
    return (out, Diagnostics(*rest)) if return_diagnostics else out
