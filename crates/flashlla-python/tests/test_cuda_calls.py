"""What Python does around the kernels of a GPU, on any machine: with plans that compute in host memory (see `emulated`)."""

import dense
import flashlla
import pytest
import torch
from conftest import assert_near, random
from emulated import BACKWARD, FORWARD, Plans
from flashlla import _cuda, _eager, _flashlla, _operators
from flashlla._options import as_laid_out, checked, heads_first

B, HQ, H, N, M, D, DV = 2, 4, 2, 5, 7, 6, 3
# Outputs and gradients in bfloat16 against float64 on the same numbers: they are rounded once, and where a scale is folded
# into them computed from float32.
ROUNDED = 5e-3


@pytest.fixture
def plans(monkeypatch):
    made = Plans()
    monkeypatch.setattr(_flashlla, "cuda_forward_plan", made.make_forward)
    monkeypatch.setattr(_flashlla, "cuda_backward_plan", made.make_backward)
    monkeypatch.setattr(_cuda, "stream", lambda device: 77)
    monkeypatch.setattr(_cuda, "_head_dims", lambda device: (64, 128))
    monkeypatch.setattr(_operators, "_state_shape", _cuda.state_shape)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _cuda.prepared.cache_clear()
    yield made
    _cuda.prepared.cache_clear()


def options(causal=True, window=None, q_offset=0, leave_one_out=False):
    return checked(causal, window, q_offset, leave_one_out, "auto", None, None, "standard")


def leaves(layout: str = "bhnd", dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    single = layout == "bnd"
    shapes = [(B, 1 if single else HQ, N, D), (B, 1 if single else H, M, D), (B, 1 if single else H, M, DV)]
    if layout == "nhd":
        shapes = [(1, *shape[1:]) for shape in shapes]
    tensors = (random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    return [as_laid_out(x, layout).contiguous() for x in tensors]


def short(
    q, k, v, layout="bhnd", out_dtype=None, ridge=2.0, scale=None, bias=None, probe=None, cu_seqlens=None, **mask
):
    """The short way, whatever device the tensors say that they are on."""
    return _eager.attention(q, k, v, ridge, scale, bias, probe, cu_seqlens, options(**mask), layout, out_dtype)


def operator(q, k, v, layout="bhnd", out_dtype=None, ridge=2.0, scale=None, bias=None, probe=None, **mask):
    """The operator's own functions for GPUs, as its dispatcher and autograd would call them."""

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            q, k, v, ridge, scale, bias, probe, cu_seqlens = ctx.inputs = tensors
            results = _operators._forward_cuda(*tensors, 2.0, *given[1:], out_dtype, tokens_first, True, False)
            ctx.state = results[1:3]
            return results[0]

        @staticmethod
        def backward(ctx, grad_out):
            found = _operators._backward_cuda(grad_out, *ctx.state, *ctx.inputs, 2.0, *given[1:], tokens_first)
            fake = _operators._backward_outputs(ctx.inputs, tokens_first)
            for a, b in zip(found, fake, strict=True):
                assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
            return (*(x if given is not None else None for x, given in zip(found, ctx.inputs, strict=False)), None)

    given, tokens_first = options(**mask), layout in ("bnhd", "nhd")
    tensors = (heads_first(x, layout) for x in (q, k, v))
    if isinstance(ridge, torch.Tensor):
        ridge = ridge.reshape(_operators_axes(ridge))
    else:
        ridge = None
    bias = None if bias is None else bias.reshape(bias.shape if bias.dim() == 3 else (1, 1, -1))[..., None]
    probe = None if probe is None else heads_first(probe, layout)
    return as_laid_out(Operator.apply(*tensors, ridge, scale, bias, probe, None), layout)


def _operators_axes(ridge: torch.Tensor) -> tuple:
    return ridge.shape if ridge.dim() == 3 else (1, *ridge.shape, 1) if ridge.dim() == 1 else (1, 1, 1)


def both(call, layout: str, dtype: torch.dtype, others: dict, tolerance: float, **mask) -> None:
    names = ("q", "k", "v", *others)
    mine = dict(
        zip(names, [x.clone().requires_grad_() for x in (*leaves(layout, dtype), *others.values())], strict=True)
    )
    theirs = {name: x.detach().double().requires_grad_() for name, x in mine.items()}
    got = call(**mine, layout=layout, **{"causal": True} | mask)
    tensors = {name: heads_first(x, layout) if name in ("q", "k", "v", "probe") else x for name, x in theirs.items()}
    want = as_laid_out(dense.attention(**{"ridge": 2.0} | tensors, **{"causal": True} | mask), layout)
    assert_near(got, want, tolerance, "out")
    weights = random(*want.shape, seed=9)
    found = torch.autograd.grad(got, list(mine.values()), weights.to(got.dtype))
    wanted = torch.autograd.grad(want, list(theirs.values()), weights.to(got.dtype).double(), allow_unused=True)
    for name, a, b in zip(names, found, wanted, strict=True):
        assert a.dtype == mine[name].dtype and a.shape == mine[name].shape
        if b is None:
            assert (a == 0).all(), name  # A ridge beside a given probe.
        else:
            assert_near(a, b, tolerance, f"d{name}")


def test_the_signatures_are_the_extensions() -> None:
    for name, plan in (("ForwardPlan", FORWARD), ("BackwardPlan", BACKWARD)):
        signature = getattr(_flashlla, name).run.__text_signature__
        assert signature.replace("$self, ", "").strip("()") == ", ".join(plan.split())


@pytest.mark.parametrize("call", [short, operator])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "bnd", "nhd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layouts(plans, call, layout: str, dtype: torch.dtype) -> None:
    both(call, layout, dtype, {}, 1e-5 if dtype == torch.float32 else ROUNDED)


OTHERS = {
    "ridge": torch.tensor(1.5),
    "ridge1": torch.tensor([1.5]),
    "ridge_heads": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "ridge_queries": 1 + torch.rand(B, 1, N, generator=torch.Generator().manual_seed(0)),
    "scale": torch.tensor(0.7),
    "scale_heads": torch.tensor([0.3, 0.9]),
    "bias": random(M, seed=5, dtype=torch.float32),
    "bias_kv": random(1, H, M, seed=5, dtype=torch.float32),
    "bias_all": random(B, HQ, M, seed=5, dtype=torch.float32),
    "bias_batch": random(B, 1, M, seed=5, dtype=torch.float32),
    "probe": random(B, HQ, N, D, seed=6, dtype=torch.float32),
}


@pytest.mark.parametrize("call", [short, operator])
@pytest.mark.parametrize(
    "names",
    [
        *((name,) for name in OTHERS),
        ("ridge_heads", "scale"),
        ("ridge_heads", "scale_heads"),
        ("ridge_queries", "scale_heads", "bias_kv"),
        ("scale_heads", "probe", "ridge"),
    ],
    ids="-".join,
)
def test_other_tensors(plans, call, names: tuple) -> None:
    others = {name.rstrip("1").split("_")[0]: OTHERS[name] for name in names}
    both(call, "bhnd", torch.bfloat16, others, ROUNDED)


@pytest.mark.parametrize("layout", ["bnhd", "bnd", "nhd"])
def test_scales_and_probes_of_other_layouts(plans, layout: str) -> None:
    scale = torch.tensor([0.3]) if layout == "bnd" else torch.tensor([0.3, 0.9])
    probe = random(*leaves(layout)[0].shape, seed=6, dtype=torch.float32)
    for others in ({"scale": scale}, {"scale": scale, "probe": probe}, {"probe": probe}):
        both(short, layout, torch.float32, others, 1e-5)


def test_masks_reach_the_plan(plans) -> None:
    both(short, "bhnd", torch.float32, {}, 1e-5, window=3, q_offset=2, leave_one_out=True)
    q, k, v = leaves(dtype=torch.float32)
    got = short(q, k[:, :, :N], v[:, :, :N], cu_seqlens=torch.tensor([0, 3, N]))
    want = dense.attention(q, k[:, :, :N], v[:, :, :N], ridge=2.0, causal=True, cu_seqlens=[0, 3, N])
    assert_near(got, want, 1e-5)


def test_gradient_of_a_scale_does_not_cancel(plans) -> None:
    """The derivative by log s is far below those by log |q| and log |k|, of which it is a difference."""
    q, k, v = (random(1, 1, 200, 32, seed=i, dtype=torch.bfloat16) for i in range(3))
    scale = torch.tensor(32**-0.5, requires_grad=True)
    weights = random(1, 1, 200, 32, seed=4).bfloat16()
    (got,) = torch.autograd.grad(short(q, k, v, scale=scale), scale, weights)
    exact = scale.detach().double().requires_grad_()
    out = dense.attention(q.double(), k.double(), v.double(), ridge=2.0, scale=exact, causal=True)
    (want,) = torch.autograd.grad(out, exact, weights.double())
    assert_near(got, want, 1e-4)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "bnd", "nhd"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_queries_are_marked_where_the_gradient_of_their_output_is_not_finite(plans, layout: str, number: float) -> None:
    q, k, v = (x.requires_grad_() for x in leaves(layout, torch.float16))
    out = short(q, k, v, layout=layout)
    weights = torch.full_like(out, 6e4)  # Whose sums are beyond float16.
    torch.autograd.grad(out, q, weights, retain_graph=True)
    rows = heads_first(weights, layout)
    rows[0, -1, 3, 1] = number
    torch.autograd.grad(out, q, weights, retain_graph=True)
    want = torch.zeros(rows.shape[:3], dtype=torch.bool)
    want[0, -1, 3] = True
    # What the forward left stays as it is.
    torch.autograd.grad(out, q, torch.ones_like(out))
    clean, spoilt, after = (run["marked"] for run in plans.backward[0].runs)
    assert torch.equal(spoilt, want) and not clean.any() and not after.any()


def test_calls_of_one_kind_are_made_ready_once(plans) -> None:
    q, k, v = leaves()
    for ridge in (2.0, 2, 2.0):
        short(q, k, v, ridge=ridge)
    assert len(plans.forward) == 1 and len(plans.forward[0].runs) == 3
    short(q, k, v, ridge=3.0)
    short(q, k, v, window=4)
    assert len(plans.forward) == 3
    run = plans.forward[0].runs[0]
    assert run["stream"] == 77 and run["q"] == (q.data_ptr(), q.stride())
    unused = "bias ridge probe lse key_mean probe_out diagnostics".split()
    assert all(run[name] is None for name in unused), "nothing is kept where no gradients are wanted"


@pytest.mark.parametrize("requires_grad", [False, True])
def test_outputs_in_another_type(plans, requires_grad: bool) -> None:
    q, k, v = (x.requires_grad_(requires_grad) for x in leaves(dtype=torch.float32))
    out = short(q, k, v, out_dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    if requires_grad:
        out.sum().backward()
        assert q.grad.dtype == torch.float32


def test_dims_that_do_not_lie_side_by_side(plans) -> None:
    q, k, v = leaves(dtype=torch.float32)
    apart = q.mT.contiguous().mT.requires_grad_()
    out = short(apart, k, v)
    assert torch.equal(out, short(q, k, v))
    # An expanded gradient, too, is written out.
    out.sum().backward()
    assert apart.grad.isfinite().all()


def test_diagnostics_of_the_operator(plans) -> None:
    q, k, v = leaves()
    none = (None,) * 5
    out, lse, state, solves = _operators._forward_cuda(q, k, v, *none, 2.0, *options()[1:], None, False, False, True)
    run = plans.forward[0].runs[0]
    assert run["lse"] == lse.data_ptr() and run["key_mean"] == state.data_ptr()
    assert run["probe_out"] == state[1].data_ptr()
    assert run["diagnostics"] == (solves[1].data_ptr(), solves[0].data_ptr())
    probe = random(B, HQ, N, D, seed=5, dtype=torch.float32)
    none = (None, None, None, probe, None)
    *_, state, solves = _operators._forward_cuda(q, k, v, *none, 2.0, *options()[1:], None, False, False, True)
    run = plans.forward[1].runs[0]
    assert run["probe"] == state[1].data_ptr() and run["probe_out"] is None and run["diagnostics"] is None
    assert torch.equal(state[1][:, :, :N, :D], probe) and state[1].abs().sum() == probe.abs().sum()
    assert (solves == 0).all()


def test_gradients_of_gradients_are_refused(plans) -> None:
    q, k, v = (x.requires_grad_() for x in leaves(dtype=torch.float32))
    (gradient,) = torch.autograd.grad(short(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients"):
        gradient.sum().backward()


def test_the_operator_is_called_where_operators_are_watched(plans) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    q, k, v = leaves()
    with Watching():
        assert short(q, k, v) is None
    assert torch.vmap(lambda x: x if short(x, x, x) is None else None)(q) is not None
    for wrong in (q.float(), q.as_subclass(type("Sub", (torch.Tensor,), {})), [1.0]):
        assert short(q, wrong, v) is None
    for ridge in ("10", None, torch.tensor(1), torch.tensor(1.0, dtype=torch.float64)):
        assert short(q, k, v, ridge=ridge) is None
    assert short(q.double(), k.double(), v.double()) is None
    assert short(q, k, v, cu_seqlens=[0, 7]) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.ones(B, N, D)),
        ("k", torch.ones(B, H, M, D + 1)),
        ("k", torch.ones(1, H, M, D)),
        ("v", torch.ones(B, H, M - 1, DV)),
        ("ridge", torch.ones(3)),
        ("ridge", torch.ones(1, 1)),
        ("ridge", torch.ones(B, HQ, N + 1)),
        ("scale", torch.ones(3)),
        ("scale", torch.ones(1, 2)),
        ("bias", torch.ones(M - 1)),
        ("bias", torch.ones(B, 3, M)),
        ("bias", torch.ones(H, M)),
        ("probe", torch.ones(B, HQ, N, D - 1)),
    ],
)
def test_errors_name_the_argument(plans, name: str, value: torch.Tensor) -> None:
    arguments = dict(zip("qkv", leaves(dtype=torch.float32), strict=True)) | {name: value}
    with pytest.raises(ValueError, match=f"^{name}: shape"):
        short(**arguments)


def test_the_public_function_takes_the_short_way(plans, monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    q, k, v = leaves()
    flashlla.attention(q, k, v)
    assert len(plans.forward) == 1
