"""The operator in the memory of an NVIDIA GPU: plans, addresses, padding. Nothing here waits for the GPU."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from flashlla import _flashlla
from flashlla._options import Options, as_laid_out, check_axes, heads_first, ridge_axes, sizes

# Tokens are padded to whole tiles on the device.
_TOKENS = 128

_NAMES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

# The shape of one number per KV head beside q, k and v of a layout.
_PER_HEAD = {"bhnd": (-1, 1, 1), "bnhd": (-1, 1), "nhd": (-1, 1), "bnd": (1, 1)}

# A log-sum-exp that makes every weight of its query infinite, and is not minus infinity, which says that there are none.
_SPOILT = -1e30

# Calls that a graph of CUDA's may repeat.
_CAPTURED: set[Call] = set()


def stream(device: int) -> int:
    """The address of the current stream. `torch.cuda.current_stream` makes an object around it, at 10 times the cost."""
    return torch._C._cuda_getCurrentRawStream(device)


@lru_cache
def _head_dims(device: int) -> tuple[int, ...]:
    return tuple(_flashlla.cuda_info(device)["head_dims"])


def state_shape(q: Tensor, v: Tensor) -> tuple[Any, ...]:
    """The shape of key means and probes: tokens and dims rounded up to those of the kernels."""
    b, h, n, d = q.shape
    needed = max(d, v.shape[3])
    index = q.device.index if q.device.index is not None else torch.cuda.current_device()
    width = next((w for w in _head_dims(index) if w >= needed), needed)
    return (b, h, (n + _TOKENS - 1) // _TOKENS * _TOKENS, width)


def _rows(x: Tensor) -> Tensor:
    """With its dims side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _view(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return (x.data_ptr(), x.stride())


def _steps(x: Tensor) -> tuple[int, ...]:
    """Strides, 0 where there is one element."""
    return tuple([stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)])


def placed_ridge(ridge: Tensor | None, rows: tuple[int, int, int]) -> Any:
    """The address of ridges `[]`, `[HQ]` or `[B, HQ, N]`, 1 where constant, and their strides; `rows` are B, HQ and N."""
    if ridge is None:
        return None
    if ridge.dim() == 0:
        return (ridge.data_ptr(), (0, 0, 0))
    shape = (1, 1, 1) if ridge.shape == (1,) else ridge_axes(ridge.shape)
    if not all(size in (1, full) for size, full in zip(shape, rows, strict=True)):
        raise ValueError(
            f"ridge: shape {list(ridge.shape)} does not fit; it must be {list(rows)} (batch, query heads, "
            "queries) with 1 where it is constant"
        )
    steps = _steps(ridge)
    return (ridge.data_ptr(), steps if len(steps) == 3 else (0, *steps, 0))


class Call:
    """Calls of one kind: what sizes, types and options alone decide, checked and worked out once.

    Tensors come in the layout of the call, in any strides; ridges `[]`, `[HQ]` or `[B, HQ, N]` and biases `[M]` or `[B, H, M]`
    with 1 where they are constant, all in float32. The kernels know one scale, a number. A scale in device memory, per KV head
    or one, is folded into what they read: queries and keys times its root `a` with scale 1 have the same logits, and with
    ridges times `a²` the same fit; a given probe is divided by `a`, because it meets keys that are multiplied with it. Half
    precision would round `a·q` and `a·k` once more, so they become float32.
    """

    def __init__(
        self,
        device: int,
        layout: str,
        dtype: torch.dtype,
        q: tuple[int, ...],
        k: tuple[int, ...],
        v: tuple[int, ...],
        bias: bool,
        probe: bool,
        folded: bool,
        sequences: tuple[int, ...] | None,
        ridge: float,
        scale: float | None,
        options: Options,
    ) -> None:
        for argument, shape in (("q", q), ("k", k), ("v", v)):
            check_axes(argument, shape, layout)
        of_q, of_k, of_v = sizes(q, layout), sizes(k, layout), sizes(v, layout)
        b, h, n, d = of_q
        # What the description cannot see, because it is made from these very sizes.
        if of_k[0] != b or of_k[3] != d:
            raise ValueError(f"k: shape {list(k)} does not fit; batch and head_dim must be those of q, {b} and {d}")
        if of_v[:3] != of_k[:3]:
            raise ValueError(f"v: shape {list(v)} does not fit; it must be {list(k[:-1])} and value_dim")
        self.device, self.layout, self.q_shape, self.ridge = device, layout, q, ridge
        self.rows, self.kv_heads, self.keys, self.head_dim = (b, h, n), of_k[1], of_k[2], d
        self.dtype = torch.float32 if folded else dtype
        self.out_shape = (*q[:-1], v[-1])
        given = options._replace(ridge=ridge, scale=1.0 if folded else scale)
        described = {"q": of_q, "k": of_k, "v": of_v, "bias": bias, "probe": probe}
        self._made_from = (described, given.given(None, None if sequences is None else list(sequences)))
        self._forward = _flashlla.cuda_forward_plan(device, layout, _NAMES[self.dtype], *self._made_from)
        self._backward: dict[torch.dtype, Any] = {}
        self._packed = sequences is not None
        # Scratch is allocated in the type of q, which costs less than to name another.
        self._scratch = -(-self._forward.scratch_bytes // self.dtype.itemsize)
        self.state_shape = tuple(self._forward.state_shape)
        self.state_numel = prod(self.state_shape)

    def _stream(self) -> int:
        # Where sequences begin and end is copied from the plans at every replay of a graph: they must stay.
        if self._packed and torch.cuda.is_current_stream_capturing():
            _CAPTURED.add(self)
        return stream(self.device)

    def _bias(self, bias: Tensor | None) -> tuple[Tensor | None, Any]:
        if bias is None:
            return None, None
        (b, h, _), m = self.rows, self.keys
        fits = (
            bias.shape[0] in (1, b) and bias.shape[1] in (1, h, self.kv_heads) if bias.dim() == 3 else bias.dim() == 1
        )
        if not fits or bias.shape[-1] != m:
            raise ValueError(
                f"bias: shape {list(bias.shape)} does not fit; it must be [{m}], or [{b} or 1, {h} or {self.kv_heads} or 1, "
                f"{m}] (batch, query heads or KV heads, keys)"
            )
        if bias.dim() == 1:
            bias = bias[None, None]
        if bias.shape[1] not in (1, h):
            bias = bias.repeat_interleave(h // self.kv_heads, 1)
        bias = bias.contiguous()
        return bias, (bias.data_ptr(), _steps(bias)[:2])

    def _check_probe(self, probe: Tensor | None) -> None:
        if probe is not None and probe.shape != self.q_shape:
            raise ValueError(
                f"probe: shape {list(probe.shape)} does not fit; it must be that of q, {list(self.q_shape)}"
            )

    def _square(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """a² of every KV head and of every query head, or one `[1]` for all, which fits every axis."""
        if scale.dim() > 1 or scale.numel() not in (1, self.kv_heads):
            raise ValueError(
                f"scale: shape {list(scale.shape)} does not fit; it must be a number, [] or [{self.kv_heads}] (KV heads)"
            )
        square = scale.to(torch.float32).reshape(-1)
        group = self.rows[1] // self.kv_heads
        # `repeat_interleave` takes several kernels.
        return square, square if scale.numel() == 1 or group == 1 else square[:, None].expand(-1, group).reshape(-1)

    def _roots(self, square: Tensor, grouped: Tensor) -> tuple[Tensor, Tensor]:
        """a of query heads and of KV heads, shaped to multiply queries and keys."""
        root = square.sqrt()
        if len(square) == 1:
            return root, root
        axes = _PER_HEAD[self.layout]
        return (root if grouped is square else grouped.sqrt()).reshape(axes), root.reshape(axes)

    def _folded(
        self, q: Tensor, k: Tensor, v: Tensor, ridge: Tensor | None, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        square, grouped = self._square(scale)
        of_q, of_k = self._roots(square, grouped)
        ridges = self.ridge if ridge is None else ridge.reshape(1, -1, 1) if ridge.dim() == 1 else ridge
        by_head = grouped if len(grouped) == 1 else grouped.reshape(1, -1, 1)
        # Products with float32 are float32.
        return q * of_q, k * of_k, v.float(), by_head * ridges

    def _pad(self, probe: Tensor, scale: Tensor | None, into: Tensor) -> int:
        self._check_probe(probe)
        narrow = into.zero_()[:, :, : self.rows[2], : self.head_dim]
        narrow.copy_(heads_first(probe, self.layout))
        if scale is not None:
            narrow.div_(self._square(scale)[1].sqrt().reshape(-1, 1, 1))
        return into.data_ptr()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ridge: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        probe: Tensor | None,
        out: Tensor | None = None,
        lse: int | None = None,
        state: Tensor | None = None,
        diagnostics: tuple[int, int] | None = None,
    ) -> Tensor:
        """Puts a forward into the current stream, and returns its outputs (`out`, if given) in the type of this call.

        `state` begins with memory for key means and probes, float32; `lse` and `diagnostics` (iterations, residuals) are
        addresses.
        """
        ridge_at = placed_ridge(ridge, self.rows)
        if scale is not None:
            q, k, v, ridge = self._folded(q, k, v, ridge, scale)
            ridge_at = placed_ridge(ridge, self.rows)
        q, k, v = _rows(q), _rows(k), _rows(v)
        if out is None:
            out = q.new_empty(self.out_shape)
        bias, bias_at = self._bias(bias)
        key_mean = None if state is None else state.data_ptr()
        used = None if key_mean is None else key_mean + 4 * self.state_numel
        given, padded = None, None
        if probe is not None:
            if state is None:
                padded = q.new_empty(self.state_shape, dtype=torch.float32)
            else:
                padded = state.view(-1)[self.state_numel : 2 * self.state_numel].view(self.state_shape)
            given, used = self._pad(probe, scale, padded), None
        scratch = q.new_empty(self._scratch)
        self._forward.run(
            self._stream(),
            scratch.data_ptr(),
            _view(q),
            _view(k),
            _view(v),
            _view(out),
            bias_at,
            ridge_at,
            given,
            lse,
            key_mean,
            used,
            diagnostics,
        )
        return out

    def _marked(self, lse: Tensor, grad_out: Tensor) -> Tensor:
        """`lse`, and far below any other where it is NaN or a row of `grad_out` is not finite.

        The kernels read what is not finite as zeros. A scaled loss that overflowed would so get gradients that are finite and
        wrong, and nobody would know that the step is to be skipped. With such a sum all weights of the query are infinite but
        those of keys that it does not see, which stay 0: its gradients and those of the keys that it sees are no numbers, and
        no others. NaN would leave the query out of the keys' gradients.
        """
        sums = heads_first(grad_out, self.layout).sum(-1, dtype=torch.float32)
        return torch.add(lse, sums, alpha=0).nan_to_num_(_SPOILT, torch.inf, -torch.inf)

    def _backward_plan(self, grad: torch.dtype) -> Any:
        plan = self._backward.get(grad)
        if plan is None:
            names = (_NAMES[self.dtype], _NAMES[grad])
            plan = _flashlla.cuda_backward_plan(self.device, self.layout, *names, *self._made_from)
            self._backward[grad] = plan
        return plan

    def backward(
        self,
        grad_out: Tensor,
        lse: Tensor,
        state: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ridge: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        probe: Tensor | None,
        gradients: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Puts a backward into the current stream, and returns the gradients of q, k, v (`gradients`, if given), ridge, scale,
        bias and probe. `lse`, `[batch, query head, query]`, and `state` are what the forward wrote."""
        plan = self._backward_plan(grad_out.dtype)
        given = (q, k, v)
        ridge_at = placed_ridge(ridge, self.rows)
        of_ridge: Tensor | None = None
        if scale is not None:
            q, k, v, of_ridge = self._folded(q, k, v, ridge, scale)
            ridge_at = placed_ridge(of_ridge, self.rows)
        q, k, v, grad_out = _rows(q), _rows(k), _rows(v), _rows(grad_out)
        if gradients is None or scale is not None:
            dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        else:
            dq, dk, dv = gradients
        marked = self._marked(lse, grad_out)
        rows, bias_at = self._bias(bias)
        per_query = q.new_empty((2, *self.rows), dtype=torch.float32)
        per_key = None if bias is None else q.new_empty((*self.rows[:2], self.keys), dtype=torch.float32)
        covariance = None if probe is None else q.new_empty(self.state_shape, dtype=torch.float32)
        scratch = q.new_empty(-(-plan.scratch_bytes // self.dtype.itemsize))
        key_mean, sums = state.data_ptr(), per_query.data_ptr()
        plan.run(
            self._stream(),
            scratch.data_ptr(),
            _view(q),
            _view(k),
            _view(v),
            bias_at,
            ridge_at,
            _view(grad_out),
            marked.data_ptr(),
            key_mean,
            key_mean + 4 * self.state_numel,
            _view(dq),
            _view(dk),
            _view(dv),
            sums,
            sums + 2 * per_query.numel(),
            None if per_key is None else per_key.data_ptr(),
            None if covariance is None else covariance.data_ptr(),
        )
        dscale = None
        if scale is not None:
            dq, dk, dv, dscale = self._unfolded((dq, dk, dv), given, gradients, per_query, scale)
        return (
            *(dq, dk, dv),
            None if ridge is None else self._ridge_gradient(ridge, probe, per_query[0]),
            dscale,
            None if bias is None or per_key is None else self._bias_gradient(bias, per_key),
            None if covariance is None else self._probe_gradient(covariance, scale),
        )

    def _unfolded(
        self,
        found: tuple[Tensor, Tensor, Tensor],
        given: tuple[Tensor, Tensor, Tensor],
        into: tuple[Tensor, Tensor, Tensor] | None,
        per_query: Tensor,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients by what was given, from those by what the kernels read; `per_query`, those of ridges and scales, in place.

        With a² = s held fast the call is that of `a q`, `a k`, `a² λ` and scale s/a², so that its derivative by s is the
        kernels' by their scale over a². None of it goes by way of the gradients of q and k, whose sums cancel.
        """
        square, grouped = self._square(scale)
        of_q, of_k = self._roots(square, grouped)
        dq, dk, dv = (torch.empty_like(x) for x in given) if into is None else into
        torch.mul(found[0], of_q, out=dq)
        torch.mul(found[1], of_k, out=dk)
        dv.copy_(found[2])
        per_query[0].mul_(grouped.reshape(-1, 1))
        heads = per_query[1].sum((0, 2)) / grouped
        by_head = heads.sum() if scale.numel() == 1 else heads.reshape(self.kv_heads, -1).sum(1)
        return dq, dk, dv, by_head.reshape(scale.shape).to(scale.dtype)

    def _ridge_gradient(self, ridge: Tensor, probe: Tensor | None, per_query: Tensor) -> Tensor:
        if probe is not None:
            return torch.zeros_like(ridge)
        if ridge.numel() == 1:
            return per_query.sum().reshape(ridge.shape)
        return per_query.sum_to_size(ridge_axes(ridge.shape)).reshape(ridge.shape)

    def _bias_gradient(self, bias: Tensor, per_key: Tensor) -> Tensor:
        (b, h, _), m = self.rows, self.keys
        if bias.dim() == 3 and bias.shape[1] == self.kv_heads != h:
            per_key = per_key.reshape(b, self.kv_heads, h // self.kv_heads, m).sum(2)
        return per_key.sum_to_size(bias.shape)

    def _probe_gradient(self, covariance: Tensor, scale: Tensor | None) -> Tensor:
        gradient = -covariance[:, :, : self.rows[2], : self.head_dim]
        if scale is not None:
            gradient = gradient / self._square(scale)[1].sqrt().reshape(-1, 1, 1)
        laid_out: Tensor = as_laid_out(gradient, self.layout).contiguous()
        return laid_out


@lru_cache(maxsize=1024)
def prepared(*kind: Any) -> Call:
    """The `Call` made from these arguments, kept."""
    return Call(*kind)
