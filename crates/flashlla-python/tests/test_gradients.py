"""Outputs and gradients in float64, against the definition and against finite differences."""

import dense
import flashlla
import pytest
import torch
from conftest import assert_near, random

MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 4},
    "offset": {"causal": True, "q_offset": 3},
    "packed": {"cu_seqlens": [0, 3, 3, 9], "causal": True},
    "leave_one_out": {"leave_one_out": True},
    "all": {"cu_seqlens": [0, 5, 9], "causal": True, "window": 3, "leave_one_out": True},
}


def inputs(grad: bool = True) -> list[torch.Tensor]:
    """2 batches, 4 query heads on 2 KV heads, 7 queries, 9 keys, 5 and 3 dims."""
    shapes = [(2, 4, 7, 5), (2, 2, 9, 5), (2, 2, 9, 3)]
    return [random(*shape, seed=i, grad=grad) for i, shape in enumerate(shapes)]


def positive(*shape: int) -> torch.Tensor:
    return (random(*shape, seed=9).abs() + 0.2).requires_grad_()


OTHERS = {
    "ridge": lambda: {"ridge": positive()},
    "ridge_one": lambda: {"ridge": positive(1)},
    "ridge_head": lambda: {"ridge": positive(4)},
    "ridge_query": lambda: {"ridge": positive(2, 1, 7)},
    "scale": lambda: {"scale": positive(), "ridge": 0.5},
    "scale_head": lambda: {"scale": positive(2), "ridge": positive(4)},
    "bias": lambda: {"bias": random(9, seed=5, grad=True), "ridge": 0.5},
    "bias_kv_head": lambda: {"bias": random(1, 2, 9, seed=5, grad=True), "ridge": 0.5},
    "bias_head": lambda: {"bias": random(2, 4, 9, seed=5, grad=True), "ridge": 0.5},
    "probe": lambda: {"probe": random(2, 4, 7, 5, seed=6, grad=True)},
    "probe_scale_head": lambda: {"probe": random(2, 4, 7, 5, seed=6, grad=True), "scale": positive(2)},
    "everything": lambda: {"bias": random(2, 1, 9, seed=5, grad=True), "ridge": positive(4), "scale": positive()},
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str) -> None:
    q, k, v = inputs()
    q = q[:, :, : 9 if mask != "offset" else 6]
    got = flashlla.attention(q, k, v, ridge=0.7, **MASKS[mask])
    want = dense.attention(q, k, v, ridge=0.7, **MASKS[mask])
    assert_near(got, want, 1e-12, "out")
    weights = random(*got.shape, seed=7)
    for name, mine, theirs in zip(
        "qkv",
        torch.autograd.grad(got, (q, k, v), weights),
        torch.autograd.grad(want, (q, k, v), weights),
        strict=True,
    ):
        assert_near(mine, theirs, 1e-10, name)


@pytest.mark.parametrize("case", OTHERS)
def test_other_gradients(case: str) -> None:
    others = OTHERS[case]()
    leaves = [*inputs(), *(x for x in others.values() if isinstance(x, torch.Tensor))]
    got = flashlla.attention(*leaves[:3], causal=True, q_offset=2, **others)
    want = dense.attention(*leaves[:3], causal=True, q_offset=2, **others)
    assert_near(got, want, 1e-12, "out")
    weights = random(*got.shape, seed=7)
    mine, theirs = (torch.autograd.grad(x, leaves, weights) for x in (got, want))
    for name, a, b in zip(["q", "k", "v", *others], mine, theirs, strict=False):
        assert a.dtype == b.dtype
        assert_near(a, b, 1e-10, name)


@pytest.mark.parametrize("case", OTHERS)
def test_finite_differences(case: str) -> None:
    others = OTHERS[case]()
    names = [name for name, x in others.items() if isinstance(x, torch.Tensor)]
    fixed = {name: x for name, x in others.items() if name not in names}

    def call(q, k, v, *rest):
        return flashlla.attention(q, k, v, causal=True, q_offset=2, **dict(zip(names, rest, strict=True)), **fixed)

    assert torch.autograd.gradcheck(call, (*inputs(), *(others[name] for name in names)), fast_mode=True)


@pytest.mark.parametrize("solver", ["auto", "cg", "direct"])
def test_solvers(solver: str) -> None:
    q, k, v = inputs(grad=False)
    got = flashlla.attention(q, k, v, ridge=0.3, solver=solver)
    assert_near(got, dense.attention(q, k, v, ridge=0.3), 1e-10)


def test_only_what_is_asked_for_has_a_gradient() -> None:
    q, k, v = inputs(grad=False)
    v.requires_grad_()
    ridge = torch.tensor(1.0)
    flashlla.attention(q, k, v, ridge=ridge).sum().backward()
    assert v.grad is not None and q.grad is None and k.grad is None and ridge.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scale_per_head_in_half_precision(dtype: torch.dtype) -> None:
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs()]
    scale = positive(2).detach().float().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (*leaves, scale)]
    out = flashlla.attention(*leaves, scale=scale, ridge=0.5)
    want = dense.attention(*exact[:3], scale=exact[3], ridge=0.5)
    assert out.dtype == dtype
    assert_near(out, want, 3e-3)
    weights = random(*out.shape, seed=7, dtype=dtype)
    mine = torch.autograd.grad(out, (*leaves, scale), weights)
    theirs = torch.autograd.grad(want, exact, weights.double())
    for a, b, leaf in zip(mine, theirs, (*leaves, scale), strict=True):
        assert a.dtype == leaf.dtype
        assert_near(a, b, 1e-2)


def test_error_of_a_scales_gradient_goes_with_its_terms() -> None:
    """In float64, with the tolerance that solves have on a GPU: the terms of the queries nearly cancel, their errors do not."""
    q, k, v = (random(1, 2, 120, 48, seed=i, dtype=torch.bfloat16).double() for i in range(3))
    scale = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    weights = random(1, 2, 120, 48, seed=9)
    options = {"ridge": 2.0, "causal": True}
    terms = dense.scale_terms(q, k, v, scale.detach(), weights, **options)
    for tolerance in (3e-3, 1e-4):
        out = flashlla.attention(q, k, v, scale=scale, solver="cg", tolerance=tolerance, **options)
        off = (torch.autograd.grad(out, scale, weights)[0] - terms.sum()).abs()
        print(
            f"tolerance {tolerance}: {off / terms.norm():.1e} of the terms' norm, {off / terms.sum().abs():.1e} of their sum"
        )
        assert off <= 3 * tolerance * terms.norm()


def test_a_ridge_in_single_precision_keeps_its_type() -> None:
    q, k, v = inputs(grad=False)
    ridge = torch.ones(4, requires_grad=True)
    flashlla.attention(q, k, v, ridge=ridge).sum().backward()
    assert ridge.grad.dtype == torch.float32 and ridge.grad.abs().sum() > 0


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    q, k, v = inputs()
    out, diagnostics = flashlla.attention(q, k, v, causal=True, q_offset=-3, return_diagnostics=True)
    assert (out[:, :, :3] == 0).all() and (diagnostics.lse[:, :, :3] == -torch.inf).all()
    out.sum().backward()
    assert (q.grad[:, :, :3] == 0).all() and q.grad.isfinite().all()


def test_diagnostics() -> None:
    q, k, v = inputs()
    bias = random(9, seed=3)
    out, d = flashlla.attention(q, k, v, bias=bias, ridge=0.5, solver="cg", return_diagnostics=True)
    logits = (q @ k.repeat_interleave(2, 1).mT * 5**-0.5 + bias).detach()
    assert_near(d.lse, logits.logsumexp(-1), 1e-12)
    assert_near(d.key_mean, logits.softmax(-1) @ k.detach().repeat_interleave(2, 1), 1e-12)
    assert d.iterations.dtype == torch.int32 and d.iterations.min() >= 1
    assert d.residual.shape == (2, 4, 7) and d.residual.max() <= 1e-11
    assert not any(x.requires_grad for x in d)
    given = flashlla.attention(q, k, v, bias=bias, probe=d.probe)
    assert_near(given, out, 1e-12)
    scale = torch.full((2,), 0.9, dtype=torch.float64)
    one, many = (flashlla.attention(q, k, v, scale=s, return_diagnostics=True)[1] for s in (0.9, scale))
    assert_near(many.probe, one.probe, 1e-10)
    assert_near(many.key_mean, one.key_mean, 1e-12)


def test_second_derivatives_are_refused() -> None:
    q, k, v = inputs()
    (dq,) = torch.autograd.grad(flashlla.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients"):
        dq.sum().backward()
