"""`LocalLinearAttention`: a module that can stand where `torch.nn.MultiheadAttention` or an SDPA block stood."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from flashlla._cache import KvCache
from flashlla._public import attention

__all__ = ["LocalLinearAttention"]


# The most queries per sequence that are decoded at a time.
_STEP = 16


def _rotated(x: Tensor, first: Tensor, base: float) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of `[batch, token, head, dim]`, halves of dims paired; `first` is the position
    of the first token, of each sequence or of all."""
    half = x.shape[3] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    position = first.reshape(-1, 1) + torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
    angle = (position[..., None] * frequency)[:, :, None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class LocalLinearAttention(nn.Module):
    """Local Linear Attention with projections, grouped-query heads, and a learned ridge and bandwidth per head.

    Args:
        embed_dim: width of the input and the output.
        num_heads: query heads HQ.
        num_kv_heads: key and value heads H, a divisor of `num_heads` (default: `num_heads`).
        head_dim: width of a head, at most 256 (default `embed_dim // num_heads`).
        bias: whether projections add a bias.
        kdim, vdim: widths of `key` and `value` (default `embed_dim`).
        causal: a query sees the keys up to its own position.
        window: a query sees only the last `window` keys.
        ridge: the λ that training starts from, in squared key units.
        learn_ridge: learn λ per query head, as `exp(log_ridge)`.
        learn_scale: learn the factor on q·k per KV head, as `head_dim^-0.5 · exp(log_scale)`. Costs a copy of queries and
            keys.
        rope: rotate queries and keys by their positions.
        rope_base: base of the rotation's frequencies.
        qk_norm: RMS-normalise queries and keys in every head.
        batch_first: `[batch, token, dim]` rather than `[token, batch, dim]`. Unlike `nn.MultiheadAttention`, the default.

    Shapes: `forward(x)` takes and returns `[batch, token, embed_dim]`, or `[token, embed_dim]` without a batch.

    >>> import torch
    >>> from flashlla.nn import LocalLinearAttention
    >>> block = LocalLinearAttention(64, 4, num_kv_heads=2, rope=True, causal=True)
    >>> block(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])

    In the place of `nn.MultiheadAttention`, it is called the same way and returns `(out, None)`:

    >>> x = torch.randn(2, 10, 64)
    >>> out, weights = block(x, x, x, need_weights=False)
    >>> out.shape, weights
    (torch.Size([2, 10, 64]), None)

    Generation, a prompt first and then token by token:

    >>> cache = block.make_cache(2, max_len=100)
    >>> with torch.no_grad():
    ...     _ = block(x, cache=cache)
    ...     block(torch.randn(2, 1, 64), cache=cache).shape
    torch.Size([2, 1, 64])
    """

    # What `nn.TransformerEncoderLayer` looks at before it decides that its fused path does not fit.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        causal: bool = False,
        window: int | None = None,
        ridge: float = 1.0,
        learn_ridge: bool = True,
        learn_scale: bool = True,
        rope: bool = False,
        rope_base: float = 10000.0,
        qk_norm: bool = False,
        batch_first: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if num_heads < 1:
            raise ValueError(f"num_heads: {num_heads} is not allowed; it must be at least 1")
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if kv_heads < 1 or num_heads % kv_heads != 0:
            raise ValueError(
                f"num_kv_heads: {kv_heads} is not allowed; it must be a divisor of num_heads ({num_heads})"
            )
        if head_dim is None and embed_dim % num_heads != 0:
            raise ValueError(f"embed_dim: {embed_dim} is not allowed; it must be a multiple of num_heads ({num_heads})")
        width = embed_dim // num_heads if head_dim is None else head_dim
        if not 1 <= width <= 256:
            raise ValueError(f"head_dim: {width} is not allowed; it must be from 1 to 256")
        if rope and width % 2 != 0:
            raise ValueError(f"head_dim: {width} is not allowed; it must be even with rope")
        if not (ridge > 0 and math.isfinite(ridge)):
            raise ValueError(f"ridge: {ridge} is not allowed; it must be finite and greater than 0")
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, kv_heads, width
        self.causal, self.window, self.ridge = causal, window, ridge
        self.rope, self.rope_base, self.batch_first = rope, rope_base, batch_first
        self.q_proj = nn.Linear(embed_dim, num_heads * width, bias, **made)
        self.k_proj = nn.Linear(embed_dim if kdim is None else kdim, kv_heads * width, bias, **made)
        self.v_proj = nn.Linear(embed_dim if vdim is None else vdim, kv_heads * width, bias, **made)
        self.out_proj = nn.Linear(num_heads * width, embed_dim, bias, **made)
        self.q_norm = nn.RMSNorm(width, **made) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width, **made) if qk_norm else nn.Identity()
        # In float32 whatever the rest is in: they are few, and bfloat16 would round λ to 2 digits.
        single: dict[str, Any] = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        start = torch.full((num_heads,), math.log(ridge), **single)
        self.log_ridge = nn.Parameter(start) if learn_ridge else None
        self.log_scale = nn.Parameter(torch.zeros(kv_heads, **single)) if learn_scale else None

    def extra_repr(self) -> str:
        names = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "causal", "window", "ridge", "rope")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """What is done between the projections: `flashlla.attention`, for subclasses to replace."""
        out: Tensor = attention(q, k, v, **options)
        return out

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        cache: KvCache | None = None,
    ) -> Any:
        """Attention of `query` over `key` and `value`, or over itself.

        Args:
            query: `[batch, token, embed_dim]`.
            key, value: `[batch, key, kdim]` and `[batch, key, vdim]`. With them the result is `(out, None)`, as that of
                `nn.MultiheadAttention`; without, it is `out`.
            key_padding_mask: `[batch, key]`, true (or minus infinity) where a key is to be ignored.
            need_weights: must be false: no weights are formed.
            attn_mask: only together with `is_causal=True`, of which it is then taken to be the mask.
            is_causal: causal for this call.
            cache: of a causal module (see `make_cache`): `query` holds the next tokens of each of its sequences, whose keys and
                values are appended, and attends to all that it then holds. Under `torch.no_grad()`; up to 16 tokens at a time
                are one pass over the cache, more are fast where the cache was empty.

        Returns:
            `[batch, token, embed_dim]`.
        """
        if need_weights:
            raise ValueError("need_weights: True is not allowed; it must be False (no weights are formed)")
        if attn_mask is not None and not is_causal and not self.causal:
            raise ValueError(
                "attn_mask: a mask is not allowed; it must be None, or a causal one together with is_causal=True "
                "(see causal, window and key_padding_mask)"
            )
        alone = key is None and value is None
        if cache is not None and not (alone and key_padding_mask is None and (self.causal or is_causal)):
            raise ValueError(
                "cache: a cache is not allowed; it must be None unless the module is causal and called with query alone, "
                "without key, value or key_padding_mask"
            )
        key = query if key is None else key
        value = key if value is None else value
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.k_proj.in_features),
            ("value", value, self.v_proj.in_features),
        ):
            if x.dim() != query.dim() or x.dim() not in (2, 3) or x.shape[-1] != width:
                raise ValueError(
                    f"{name}: shape {list(x.shape)} does not fit; it must be [batch, token, {width}], or [token, {width}] "
                    "without a batch, as that of query"
                )
        single = query.dim() == 2
        if single:
            query, key, value = query[None], key[None], value[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q = self.q_norm(self.q_proj(query).unflatten(2, (self.num_heads, self.head_dim)))
        k = self.k_norm(self.k_proj(key).unflatten(2, (self.num_kv_heads, self.head_dim)))
        v = self.v_proj(value).unflatten(2, (self.num_kv_heads, self.head_dim))
        # The last query stands at the last key where a query sees only what came before.
        causal = self.causal or is_causal
        offset = k.shape[1] - q.shape[1] if causal or self.window is not None else 0
        start = torch.zeros(1, device=q.device)
        if cache is not None:
            self._check_cache(cache, q)
            start = torch.tensor(cache.lengths, dtype=torch.float32).to(q.device)
        if self.rope:
            q, k = _rotated(q, start + offset, self.rope_base), _rotated(k, start, self.rope_base)
        bias = None
        if key_padding_mask is not None:
            padding = key_padding_mask[None] if key_padding_mask.dim() == 1 else key_padding_mask
            if padding.shape not in (k.shape[:2], (1, k.shape[1])):
                raise ValueError(
                    f"key_padding_mask: shape {list(key_padding_mask.shape)} does not fit; it must be {list(k.shape[:2])} "
                    "(batch, keys)"
                )
            if padding.dtype != torch.bool and not padding.is_floating_point():
                raise TypeError(
                    f"key_padding_mask: dtype {padding.dtype} is not allowed; it must be torch.bool or a floating-point type"
                )
            if padding.dtype == torch.bool:
                padding = torch.zeros(padding.shape, device=q.device).masked_fill(padding, float("-inf"))
            bias = padding[:, None]
        options: dict[str, Any] = {
            "ridge": self.ridge if self.log_ridge is None else self.log_ridge.exp(),
            "scale": None if self.log_scale is None else self.log_scale.exp() * self.head_dim**-0.5,
            "window": self.window,
        }
        if cache is not None:
            out = self._from_cache(q, k, v, cache, options)
        else:
            out = self.attend(q, k, v, causal=causal, q_offset=offset, bias=bias, layout="bnhd", **options)
        out = self.out_proj(out.flatten(2))
        if single:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out if alone else (out, None)

    def make_cache(self, sequences: int, max_len: int, **options: Any) -> KvCache:
        """A cache for `forward`, on the device and in the dtype of the module; `options` are those of `flashlla.KvCache`."""
        weight = self.k_proj.weight
        given = {"dtype": weight.dtype, "device": weight.device, **options, "layout": "bnhd"}
        return KvCache(sequences, self.num_kv_heads, self.head_dim, max_len, **given)

    def _check_cache(self, cache: KvCache, q: Tensor) -> None:
        if not isinstance(cache, KvCache):
            raise TypeError(f"cache: {type(cache).__name__} is not allowed; it must be a flashlla.KvCache")
        given = (len(cache.lengths), cache.kv_heads, cache.head_dim, cache.value_dim, cache.layout)
        expected = (q.shape[0], self.num_kv_heads, self.head_dim, self.head_dim, "bnhd")
        if given != expected:
            raise ValueError(
                f"cache: {given} does not fit; it must be {expected} (batch, KV heads, head_dim, value_dim, layout): see make_cache"
            )

    def _from_cache(self, q: Tensor, k: Tensor, v: Tensor, cache: KvCache, options: dict[str, Any]) -> Tensor:
        if torch.is_grad_enabled():
            raise ValueError("cache: a cache is not allowed while gradients are recorded; call under torch.no_grad()")
        # Under autocast projections may differ from the cache.
        q, k, v = (x.to(cache.k.dtype) for x in (q, k, v))
        if q.shape[1] > _STEP and not any(cache.lengths):
            cache.append(k, v)
            return self.attend(q, k, v, causal=True, layout="bnhd", **options)
        parts, before = [], cache.lengths
        try:
            for at in range(0, q.shape[1], _STEP):
                cache.append(k[:, at : at + _STEP], v[:, at : at + _STEP])
                parts.append(cache.decode(q[:, at : at + _STEP], **options))
        except ValueError:
            # All of the tokens, or none.
            for sequence, length in enumerate(before):
                cache.truncate(sequence, length)
            raise
        return torch.cat(parts, 1)
