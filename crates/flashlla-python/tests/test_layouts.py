"""Storage types, layouts and strides; tensors and arrays."""

import dense
import flashlla
import numpy as np
import pytest
import torch
from conftest import assert_near, random

# Relative error against float64 on the rounded inputs: outputs are rounded to their type, sums are in float32.
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
B, HQ, H, N, D, DV = 2, 4, 2, 40, 16, 8


def heads_first(x, layout: str):
    return {
        "bhnd": lambda: x,
        "bnhd": lambda: x.swapaxes(1, 2),
        "bnd": lambda: x[:, None],
        "nhd": lambda: x[None].swapaxes(1, 2),
    }[layout]()


def shapes(layout: str) -> list[tuple[int, ...]]:
    if layout == "bnd":
        return [(B, N, D), (B, N, D), (B, N, DV)]
    sizes = [(HQ, D), (H, D), (H, DV)]
    return {
        "bhnd": [(B, h, N, d) for h, d in sizes],
        "bnhd": [(B, N, h, d) for h, d in sizes],
        "nhd": [(N, h, d) for h, d in sizes],
    }[layout]


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "bnd", "nhd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors(dtype: torch.dtype, layout: str) -> None:
    leaves = [random(*shape, seed=i, dtype=dtype, grad=True) for i, shape in enumerate(shapes(layout))]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out = flashlla.attention(*leaves, ridge=1.0, causal=True, layout=layout)
    want = dense.attention(*(heads_first(x, layout) for x in exact), ridge=1.0, causal=True)
    assert out.dtype == dtype and out.is_contiguous()
    assert_near(heads_first(out, layout), want, DTYPES[dtype], "out")
    weights = random(*out.shape, seed=5, dtype=dtype)
    mine = torch.autograd.grad(out, leaves, weights)
    theirs = torch.autograd.grad(want, exact, heads_first(weights.double(), layout))
    for name, a, b, leaf in zip("qkv", mine, theirs, leaves, strict=True):
        assert a.dtype == dtype and a.shape == leaf.shape
        assert_near(a, b, 5 * DTYPES[dtype], f"d{name}")


NUMPY = [np.float64, np.float32, np.float16]


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "bnd", "nhd"])
@pytest.mark.parametrize("dtype", NUMPY, ids=lambda t: t.__name__)
def test_arrays(dtype, layout: str) -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=shape).astype(dtype) for shape in shapes(layout)]
    out = flashlla.attention(*arrays, ridge=1.0, causal=True, layout=layout)
    exact = [heads_first(torch.from_numpy(x.astype(np.float64)), layout) for x in arrays]
    want = dense.attention(*exact, ridge=1.0, causal=True)
    assert isinstance(out, np.ndarray) and out.dtype == dtype
    tolerance = {np.float64: 1e-12, np.float32: 2e-6, np.float16: 4e-4}[dtype]
    assert_near(heads_first(torch.from_numpy(out), layout), want, tolerance)


def test_arrays_give_what_tensors_give() -> None:
    q, k, v = (random(*shape, seed=i) for i, shape in enumerate(shapes("bhnd")))
    ridge, bias, probe = random(HQ, seed=4).abs() + 0.1, random(N, seed=5), random(B, HQ, N, D, seed=6)
    options = {"causal": True, "scale": 0.3, "window": 9, "cu_seqlens": [0, 11, N], "return_diagnostics": True}
    for others in ({"ridge": ridge, "bias": bias}, {"probe": probe}, {"ridge": ridge[:, None].expand(2, HQ, N)}):
        want = flashlla.attention(q, k, v, **others, **options)
        arrays = {name: x.numpy() for name, x in others.items()}
        got = flashlla.attention(q.numpy(), k.numpy(), v.numpy(), **arrays, **options)
        for mine, theirs in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
            assert mine.dtype == theirs.numpy().dtype
            np.testing.assert_array_equal(mine, theirs.numpy())


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    if how == "transposed":
        return x.swapaxes(-1, -2).contiguous().swapaxes(-1, -2)
    if how == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"), dtype=x.dtype)
        wide[..., 3::2] = x
        return wide[..., 3::2]
    packed = torch.full((x.shape[0], x.shape[2], 3, x.shape[1], x.shape[3]), float("nan"), dtype=x.dtype)
    packed[:, :, 1] = x.swapaxes(1, 2)
    return packed[:, :, 1].swapaxes(1, 2)


@pytest.mark.parametrize("how", ["transposed", "sliced", "packed"])
def test_strides_do_not_change_a_bit(how: str) -> None:
    tensors = [random(*shape, seed=i) for i, shape in enumerate(shapes("bhnd"))]
    weights = random(B, HQ, N, DV, seed=5)
    results = []
    for arrange in (lambda x: x, lambda x: strided(x, how)):
        leaves = [arrange(x.clone()).detach().requires_grad_() for x in tensors]
        out = flashlla.attention(*leaves, causal=True)
        results.append([out, *torch.autograd.grad(out, leaves, arrange(weights))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_broadcast_inputs_and_gradients() -> None:
    q, k, v = (random(*shape, seed=i) for i, shape in enumerate(shapes("bhnd")))
    one = k[:1, :1].requires_grad_()
    out = flashlla.attention(q, one.expand(B, H, N, D), v)
    want = flashlla.attention(q, one.repeat(B, H, 1, 1), v)
    assert torch.equal(out, want)
    (mine,) = torch.autograd.grad(out.sum(), one)  # a gradient of ones, expanded
    (theirs,) = torch.autograd.grad(want, one, torch.ones_like(want))
    assert_near(mine, theirs, 1e-12)


def test_arrays_backwards_and_from_the_other_end() -> None:
    x = np.random.default_rng(0).normal(size=(1, 2, 10, 8))
    want = flashlla.attention(x, x, x)
    for other in (x[:, :, ::-1].copy()[:, :, ::-1], np.asfortranarray(x), x.astype(">f8")):
        np.testing.assert_array_equal(flashlla.attention(other, other, other), want)


@pytest.mark.parametrize("sizes", [(0, 2, 5, 4), (2, 2, 0, 4)])
def test_nothing_to_do(sizes: tuple[int, ...]) -> None:
    q = torch.empty(sizes, requires_grad=True)
    out = flashlla.attention(q, q, q)
    assert out.shape == sizes
    out.sum().backward()
    assert q.grad.shape == sizes
    assert flashlla.attention(*[np.empty(sizes)] * 3).shape == sizes


def test_queries_without_keys() -> None:
    q, k = random(1, 1, 3, 4, seed=0, grad=True), torch.empty(1, 1, 0, 4, dtype=torch.float64)
    out = flashlla.attention(q, k, k)
    out.sum().backward()
    assert (out == 0).all() and (q.grad == 0).all()
