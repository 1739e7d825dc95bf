"""Decoding on PyTorch tensors, in host memory and on a GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashlla import _flashlla
from flashlla._cuda import placed_ridge, stream
from flashlla._operators import NAMES, host, host_results, laid_out, sums
from flashlla._options import Options, as_laid_out, bias_axes, check_axes, heads_first, integers, ridge_axes
from flashlla._tensors import _check, _floating, _number


def _counts(argument: str, x: Any) -> Tensor | list[int]:
    """Integers: a tensor as it is, or a list."""
    if not isinstance(x, Tensor):
        return integers(argument, x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{argument}: dtype {x.dtype} is not allowed; it must be an integer type")
    return x


def _device_counts(argument: str, x: Tensor | list[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    x = torch.tensor(x, dtype=torch.int32) if isinstance(x, list) else x
    if x.shape != shape:
        raise ValueError(f"{argument}: shape {list(x.shape)} does not fit; it must be {list(shape)}")
    return x.to(device, torch.int32, non_blocking=True).contiguous()


def decode(
    q: Tensor,
    k_cache: Any,
    v_cache: Any,
    lengths: Any,
    block_table: Any,
    ridge: Any,
    scale: Any,
    bias: Any,
    probe: Any,
    options: Options,
    layout: str,
    max_length: int | None,
    diagnostics: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    device = q.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"q: device {device} is not allowed; it must be cpu or cuda")
    _check("q", q, q)
    _check("k_cache", k_cache, q)
    _check("v_cache", v_cache, q)
    for argument, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_axes(argument, x.shape, layout)
    given = (q, k_cache, v_cache, ridge, scale, bias, probe)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given):
        raise ValueError("q: gradients are not allowed; decode under torch.no_grad() (or see attention)")
    q, k, v = (heads_first(x, layout) for x in (q, k_cache, v_cache))
    lengths = _counts("lengths", lengths)
    if block_table is not None:
        block_table = _counts("block_table", block_table)
        table_shape = block_table.shape if isinstance(block_table, Tensor) else ()
        if len(table_shape) != 2 or table_shape[0] != q.shape[0]:
            raise ValueError(
                f"block_table: shape {list(table_shape)} does not fit; it must be a tensor [{q.shape[0]}, n] "
                "(sequences, pages per sequence)"
            )
    if isinstance(ridge, Tensor):
        ridge = _floating("ridge", ridge).to(device)
        ridge = ridge.reshape(ridge_axes(() if ridge.shape == (1,) else ridge.shape))
    else:
        options, ridge = options._replace(ridge=_number("ridge", ridge)), None
    if isinstance(scale, Tensor):
        _floating("scale", scale)
        if scale.dim() > 1 or scale.numel() not in (1, k.shape[1]):
            raise ValueError(
                f"scale: shape {list(scale.shape)} does not fit; it must be a number, [] or [{k.shape[1]}] (KV heads)"
            )
        scale = scale.detach().reshape(-1)
    elif scale is not None:
        options, scale = options._replace(scale=_number("scale", scale)), None
    if probe is not None:
        probe = _floating("probe", probe).to(device, sums(q))
        check_axes("probe", probe.shape, layout)
        probe = heads_first(probe, layout)
    out = laid_out(q, (*q.shape[:3], v.shape[3]), q.dtype, layout == "bnhd")
    if device.type == "cpu":
        if bias is not None:
            bias = _floating("bias", bias).to(device, sums(q)).reshape(bias_axes(bias.shape))
        rest = _on_cpu(q, k, v, lengths, block_table, ridge, scale, bias, probe, options, out, diagnostics)
    else:
        if bias is not None:
            raise ValueError("bias: a tensor is not allowed; it must be None when decoding on a GPU")
        rest = _on_cuda(q, k, v, lengths, block_table, ridge, scale, probe, options, max_length, out, diagnostics)
    return as_laid_out(out, layout), rest


def _rest(q: Tensor, diagnostics: bool) -> tuple[Tensor, ...]:
    """Memory for what is returned beside the outputs: log-sum-exps, key means, probes, iterations, residuals."""
    if not diagnostics:
        return ()
    wide, (b, h, n, d) = sums(q), q.shape
    return (
        q.new_empty((b, h, n), dtype=wide),
        q.new_empty((b, h, n, d), dtype=wide),
        q.new_empty((b, h, n, d), dtype=wide),
        q.new_zeros((b, h, n), dtype=torch.int32),
        q.new_zeros((b, h, n), dtype=torch.float32),
    )


def _on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | list[int],
    table: Tensor | None,
    ridge: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    probe: Tensor | None,
    options: Options,
    out: Tensor,
    diagnostics: bool,
) -> tuple[Tensor, ...]:
    kept = lengths if isinstance(lengths, list) else lengths.tolist()
    pages = None if table is None else table.flatten().tolist()
    if scale is not None and scale.numel() == 1:
        options, scale = options._replace(scale=scale.item()), None
    rest = _rest(q, diagnostics)
    # The engine knows one scale: with one for each KV head there is a call for each.
    heads = [(slice(None), slice(None))]
    if scale is not None:
        group = q.shape[1] // k.shape[1]
        heads = [(slice(h * group, (h + 1) * group), slice(h, h + 1)) for h in range(k.shape[1])]
    for number, (of_q, of_k) in enumerate(heads):
        one = options if scale is None else options._replace(scale=float(scale[number]))

        def part(x: Tensor | None, of: slice = of_q) -> Tensor | None:
            return x if x is None or x.shape[1] == 1 else x[:, of]

        of_bias = None if bias is None else part(bias, of_q if bias.shape[1] == q.shape[1] else of_k)
        tensors = {
            "q": q[:, of_q],
            "k": k[:, of_k],
            "v": v[:, of_k],
            "ridge": part(ridge),
            "bias": of_bias,
            "probe": part(probe),
        }
        inputs = {"options": one.given(None, None), **{name: host(x) for name, x in tensors.items()}}
        if scale is None:
            found: tuple[Tensor | None, ...] = rest or (None,) * 5
        else:
            found = tuple(torch.empty_like(x[:, of_q]).contiguous() for x in rest) or (None,) * 5
        as_floats = [None if x is None else x.view(torch.float32) if x.dtype == torch.int32 else x for x in found]
        _flashlla.cpu_decode(inputs, kept, pages, host(out[:, of_q]), host_results(*as_floats))
        if scale is not None:
            for to, x in zip(rest, found, strict=False):
                if x is not None:
                    to[:, of_q] = x
    return rest


@lru_cache(maxsize=1024)
def _plan(
    device: int,
    dtype: torch.dtype,
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    table_width: int | None,
    options: Options,
) -> Any:
    if k[1:3] != v[1:3] or k[0] != v[0]:
        raise ValueError(f"v_cache: shape {list(v)} does not fit; it must be {list(k[:3])} and value_dim")
    if k[3] != q[3] or (table_width is None and k[0] != q[0]):
        raise ValueError(
            f"k_cache: shape {list(k)} does not fit; head_dim (and without a block table batch) must be q's"
        )
    sizes = {"q": q, "k": k, "v": v, "table_width": table_width}
    return _flashlla.cuda_decode_plan(device, NAMES[dtype], sizes, options.given(None, None))


def _pool(argument: str, x: Tensor) -> tuple[int, tuple[int, ...]]:
    if x.stride(3) != 1:
        raise ValueError(f"{argument}: strides {list(x.stride())} are not allowed; dims must lie side by side on a GPU")
    return x.data_ptr(), x.stride()[:3]


def _on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | list[int],
    table: Tensor | None,
    ridge: Tensor | None,
    scale: Tensor | None,
    probe: Tensor | None,
    options: Options,
    max_length: int | None,
    out: Tensor,
    diagnostics: bool,
) -> tuple[Tensor, ...]:
    if q.dtype == torch.float64:
        raise TypeError("q: float64 is not computed on a GPU; use float32, bfloat16 or float16, or the CPU")
    (b, h, n, d), device = q.shape, q.device
    q = q if q.stride(3) == 1 or d == 1 else q.contiguous()
    width = None if table is None else table.shape[1]
    plan = _plan(q.get_device(), q.dtype, tuple(q.shape), tuple(k.shape), tuple(v.shape), width, options)
    room = k.shape[2] if width is None else width * k.shape[2]
    longest = room if max_length is None else min(max(max_length, 0), room)
    known = lengths if isinstance(lengths, list) else lengths.tolist() if lengths.device.type == "cpu" else None
    if known is not None:
        for sequence, length in enumerate(known):
            if not (length == 0 or n <= length <= room):
                raise ValueError(
                    f"lengths: {length} (sequence {sequence}) is not allowed; it must be 0, or from the {n} queries to the "
                    f"{room} tokens there is room for"
                )
        longest = min(longest, max(known, default=0))
    lengths = _device_counts("lengths", lengths, (b,), device)
    if table is not None:
        table = _device_counts("block_table", table, (b, table.shape[1]), device)
    ridge = None if ridge is None else ridge.to(torch.float32)
    scales = None
    if scale is not None:
        scale = scale.to(device, torch.float32).contiguous()
        scales = (scale.data_ptr(), 0 if scale.numel() == 1 else 1)
    if probe is not None:
        if probe.shape != q.shape:
            raise ValueError(f"probe: shape {list(probe.shape)} does not fit; it must be that of q, {list(q.shape)}")
        probe = probe.contiguous()
    rest = _rest(q, diagnostics)
    if diagnostics and probe is not None:
        rest[2].copy_(probe)
    scratch = q.new_empty(plan.scratch_bytes(longest), dtype=torch.uint8)
    plan.run(
        stream(q.get_device()),
        scratch.data_ptr(),
        longest,
        (q.data_ptr(), q.stride()),
        _pool("k_cache", k),
        _pool("v_cache", v),
        None if table is None else table.data_ptr(),
        lengths.data_ptr(),
        (out.data_ptr(), out.stride()),
        placed_ridge(ridge, (b, h, n)),
        scales,
        None if probe is None else probe.data_ptr(),
        rest[0].data_ptr() if rest else None,
        (rest[1].data_ptr(), rest[2].data_ptr()) if rest else None,
        (rest[3].data_ptr(), rest[4].data_ptr()) if rest else None,
    )
    return rest
