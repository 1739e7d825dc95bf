"""`torch.ops.flashlla.forward` and `.backward`: the operator as PyTorch knows it.

Registered with schemas, fake kernels and autograd, so that `torch.compile`, export, checkpointing and the like see one opaque
operator. Tensors have the axes `[batch, head, token, dim]` in any strides; ridges `[batch, query head, query]` and biases
`[batch, head, key, 1]` have 1 where they are constant. `flashlla.attention` is the same with checks and layouts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlla import _cuda, _flashlla
from flashlla._options import Options

NAMES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? ridge, Tensor? scale, Tensor? bias, Tensor? probe, Tensor? cu_seqlens"
_OPTIONS = (
    "float ridge_value, float? scale_value, bool causal, SymInt? window, SymInt q_offset, bool leave_one_out, "
    "str solver, float? tolerance, int? max_iters, str precision"
)

_library = torch.library.Library("flashlla", "DEF")
_library.define(
    f"forward({_TENSORS}, {_OPTIONS}, ScalarType? out_dtype, bool tokens_first, bool save, bool diagnostics) -> "
    "(Tensor out, Tensor lse, Tensor state, Tensor solves)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"backward(Tensor grad_out, Tensor lse, Tensor state, {_TENSORS}, {_OPTIONS}, "
    "bool tokens_first) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dridge, Tensor dscale, Tensor dbias, Tensor dprobe)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def sums(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def laid_out(like: Tensor, shape: Any, dtype: torch.dtype, tokens_first: bool) -> Tensor:
    """New memory for `[batch, head, token, dim]`, in that order or with tokens before heads."""
    b, h, n, d = shape
    if tokens_first:
        return like.new_empty((b, n, h, d), dtype=dtype).transpose(1, 2)
    return like.new_empty((b, h, n, d), dtype=dtype)


def _state_shape(q: Tensor, v: Tensor) -> tuple[Any, ...]:
    return _cuda.state_shape(q, v) if q.device.type == "cuda" else tuple(q.shape)


def _forward_outputs(
    q: Tensor, v: Tensor, out_dtype: torch.dtype | None, tokens_first: bool, save: bool, diagnostics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything that a forward returns, not yet computed; empty where it is not asked for.

    `state` is key means and probes, one after the other; `solves` residuals and, as int32 under float32's name, iterations.
    """
    b, h, n, _ = q.shape
    return (
        laid_out(q, (b, h, n, v.shape[3]), out_dtype or q.dtype, tokens_first),
        q.new_empty((b, h, n), dtype=sums(q)),
        q.new_empty((2, *_state_shape(q, v)) if save or diagnostics else (0,), dtype=sums(q)),
        q.new_empty((2, b, h, n) if diagnostics else (0,), dtype=torch.float32),
    )


def _backward_outputs(tensors: tuple[Any, ...], tokens_first: bool) -> tuple[Tensor, ...]:
    """Everything that a backward returns, not yet computed; empty where there is nothing to differentiate for."""
    q, k, v, ridge, scale, bias, probe, _ = tensors

    def others(x: Tensor | None) -> Tensor:
        return q.new_empty((0,)) if x is None else x.new_empty(x.shape)

    def gradient(x: Tensor) -> Tensor:
        return laid_out(x, x.shape, x.dtype, tokens_first)

    return (gradient(q), gradient(k), gradient(v), others(ridge), others(scale), others(bias), others(probe))


def host(x: Tensor | None) -> Any:
    return None if x is None else (x.data_ptr(), NAMES[x.dtype], x.shape, x.stride())


def host_results(*results: Tensor | None) -> dict[str, Any]:
    """Where to write log-sum-exps, key means, probes, iterations (int32 under float32's name) and residuals."""
    return dict(zip(("lse", "key_mean", "probe", "iterations", "residual"), map(host, results), strict=True))


def _host_inputs(tensors: tuple[Tensor | None, ...], options: Options) -> dict[str, Any]:
    q, k, v, ridge, scale, bias, probe, cu_seqlens = tensors
    sequences = None if cu_seqlens is None else cu_seqlens.tolist()
    given = options.given(None if scale is None else scale.item(), sequences)
    named = {"q": q, "k": k, "v": v, "ridge": ridge, "bias": bias, "probe": probe}
    return {"options": given, **{name: host(x) for name, x in named.items()}}


def _forward_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, options = arguments[:8], Options(*arguments[8:18])
    out_dtype, tokens_first, save, diagnostics = arguments[18:]
    q, _, v = tensors[:3]
    out, lse, state, solves = _forward_outputs(q, v, q.dtype, tokens_first, save, diagnostics)
    key_mean, probe = (state[0], state[1]) if save or diagnostics else (None, None)
    residual, iterations = (solves[0], solves[1]) if diagnostics else (None, None)
    results = host_results(lse, key_mean, probe, iterations, residual)
    _flashlla.cpu_forward(_host_inputs(tensors, options), host(out), results)
    return out if out_dtype is None else out.to(out_dtype), lse, state, solves


def _backward_cpu(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    lse, state = arguments[:2]
    tensors, options = arguments[2:10], Options(*arguments[10:20])
    q, _, _, ridge, scale, bias, probe, _ = tensors
    dq, dk, dv, dridge, dscale, dbias, dprobe = _backward_outputs(tensors, arguments[20])
    # Named, so that it lives while its address is in use.
    grad_out = grad_out.to(q.dtype)
    # The engine leaves the rest in the type of its sums.
    ridge_sums = None if ridge is None else dridge.to(sums(q))
    grad = _flashlla.cpu_backward(
        _host_inputs(tensors, options),
        (host(lse), host(state[0]), host(state[1])),
        host(grad_out),
        (host(dq), host(dk), host(dv)),
        {
            "ridge": host(ridge_sums),
            "bias": None if bias is None else host(dbias),
            "probe": None if probe is None else host(dprobe),
        },
    )
    if ridge is not None and ridge_sums is not None:
        dridge = ridge_sums.to(ridge.dtype)
    if scale is not None:
        dscale.fill_(grad)
    return dq, dk, dv, dridge, dscale, dbias, dprobe


def _call(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> _cuda.Call:
    q, k, v, _, scale, bias, probe, cu_seqlens = tensors
    # Reads device memory, and so waits, only if the sequences are there.
    sequences = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    given = (bias is not None, probe is not None, scale is not None)
    shapes = (q.shape, k.shape, v.shape)
    return _cuda.prepared(
        q.get_device(), "bhnd", q.dtype, *shapes, *given, sequences, *options[:2], Options(0.0, None, *options[2:])
    )


def _as_call_takes(ridge: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    ridge = None if ridge is None else ridge.to(torch.float32)
    return ridge, None if bias is None else bias[..., 0]


def _forward_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    tensors = arguments[:8]
    q, k, v, ridge, scale, bias, probe, _ = tensors
    out, lse, state, solves = _forward_outputs(q, v, *arguments[18:])
    call = _call(tensors, arguments[8:18])
    ridge, bias = _as_call_takes(ridge, bias)
    diagnostics = None
    if solves.numel() > 0 and probe is None:
        diagnostics = (solves.data_ptr() + 2 * solves.numel(), solves.data_ptr())
    else:
        solves.zero_()
    # The kernels write the type that they read.
    written = out if out.dtype == call.dtype else torch.empty_like(out, dtype=call.dtype)
    kept = state if state.numel() > 0 else None
    call.forward(q, k, v, ridge, scale, bias, probe, written, lse.data_ptr(), kept, diagnostics)
    if written is not out:
        out.copy_(written)
    return out, lse, state, solves


def _backward_cuda(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    lse, state = arguments[:2]
    tensors = arguments[2:10]
    q, k, v, ridge, scale, bias, probe, _ = tensors
    results = _backward_outputs(tensors, arguments[20])
    dq, dk, dv = results[:3]
    call = _call(tensors, arguments[10:20])
    float_ridge, rows = _as_call_takes(ridge, bias)
    others = (float_ridge, scale, rows, probe)
    _, _, _, dridge, dscale, dbias, dprobe = call.backward(grad_out, lse, state, q, k, v, *others, (dq, dk, dv))
    return (
        *(dq, dk, dv),
        results[3] if ridge is None or dridge is None else dridge.to(ridge.dtype),
        results[4] if dscale is None else dscale,
        results[5] if dbias is None else dbias[..., None],
        results[6] if dprobe is None else dprobe,
    )


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _forward_outputs(arguments[0], arguments[2], *arguments[18:])


def _backward_fake(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _backward_outputs(arguments[2:10], arguments[20])


class _Forward(torch.autograd.Function):
    """The forward with its gradients recorded.

    `torch.library.register_autograd` would make the same, and spend 0.3 ms of every call on looking up the schema's defaults.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            results: tuple[Tensor, ...] = forward(*arguments)
        ctx.save_for_backward(results[1], results[2], *arguments[:8])
        ctx.options, ctx.tokens_first = arguments[8:18], arguments[19]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 22
        results = backward(grad_out, *ctx.saved_tensors, *ctx.options, ctx.tokens_first)
        wanted = zip(results, ctx.needs_input_grad, strict=False)
        return (*(x if needed else None for x, needed in wanted), *(None,) * 15)


class _Backward(torch.autograd.Function):
    """The backward, which has no gradients of its own."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            results: tuple[Tensor, ...] = backward(*arguments)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError("flashlla: gradients of gradients are not implemented")


def _forward_autograd(*arguments: Any) -> tuple[Tensor, ...]:
    # `save` is set by whoever wants gradients; without it there is nothing to record.
    results: tuple[Tensor, ...]
    if arguments[20]:
        results = _Forward.apply(*arguments)
        return results
    with torch._C._AutoDispatchBelowAutograd():
        results = forward(*arguments)
    return results


_library.impl("forward", _forward_cpu, "CPU")
_library.impl("backward", _backward_cpu, "CPU")
_library.impl("forward", _forward_cuda, "CUDA")
_library.impl("backward", _backward_cuda, "CUDA")
torch.library.register_fake("flashlla::forward", _forward_fake, lib=_library)
torch.library.register_fake("flashlla::backward", _backward_fake, lib=_library)
_library.impl("forward", _forward_autograd, "Autograd")
_library.impl("backward", _Backward.apply, "Autograd")

forward = torch.ops.flashlla.forward.default
backward = torch.ops.flashlla.backward.default
