"""On an NVIDIA GPU: the same results, the caller's stream, no waiting. Skipped where there is none."""

import functools
import gc
import time

import dense
import flashlla
import pytest
import torch
from conftest import assert_near, random
from flashlla import LLAFunction, _cuda, _flashlla, lla_attention
from flashlla.ops.naive import lla_backward_naive, lla_forward_naive

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# Of outputs and gradients, relative to float64 on the rounded inputs, at ridges of 1 and above: search directions are fp16,
# outputs are rounded to their type.
OUT, GRADIENT = 5e-3, 2e-2
# Of a scale's gradient, relative to the norm of its terms, one for each query: solves to 3e-3 and roundings to fp16 leave
# independent errors in them, and so an error in their sum that goes with their norm, however small the sum is.
SCALE = {"standard": 1e-2, "high": 3e-3}


def leaves(dtype=torch.bfloat16, shapes=((2, 4, 200, 64), (2, 2, 200, 64), (2, 2, 200, 48))) -> list[torch.Tensor]:
    return [random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def both(call, tensors: dict[str, torch.Tensor]) -> None:
    """Holds a call on the GPU, and its gradients, against float64 on the CPU."""
    here = {name: x.double().requires_grad_() for name, x in tensors.items()}
    there = {name: x.detach().cuda().requires_grad_() for name, x in tensors.items()}
    want, got = call(**here), call(**there)
    assert got.is_cuda
    assert_near(got.cpu(), want, OUT, "out")
    weights = random(*want.shape, seed=9).bfloat16()
    mine = torch.autograd.grad(got, list(there.values()), weights.to(got))
    theirs = torch.autograd.grad(want, list(here.values()), weights.to(want))
    for name, a, b in zip(tensors, mine, theirs, strict=True):
        assert a.dtype == there[name].dtype
        assert_near(a.cpu(), b, GRADIENT, f"d{name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"causal": True, "window": 37}, {"cu_seqlens": [0, 70, 200]}])
def test_tensors(dtype: torch.dtype, mask: dict) -> None:
    tensors = dict(zip("qkv", leaves(dtype), strict=True))
    both(lambda **x: flashlla.attention(**x, ridge=2.0, **mask), tensors)


@pytest.mark.parametrize(
    "others",
    [
        {"ridge": torch.tensor(2.0)},
        {"ridge": torch.tensor([1.0, 2.0, 3.0, 4.0])},
        {"ridge": 1 + torch.rand(2, 1, 200, generator=torch.Generator().manual_seed(0))},
        {"bias": random(200, seed=5, dtype=torch.float32)},
        {"bias": random(1, 2, 200, seed=5, dtype=torch.float32)},
        {"bias": random(2, 4, 200, seed=5, dtype=torch.float32)},
        {"probe": 0.1 * random(2, 4, 200, 64, seed=6, dtype=torch.float32)},
    ],
    ids=lambda others: "-".join(f"{name}{list(x.shape)}" for name, x in others.items()),
)
def test_other_gradients(others: dict) -> None:
    tensors = dict(zip("qkv", leaves(), strict=True)) | others
    both(lambda **x: flashlla.attention(**({"ridge": 2.0} | x), causal=True), tensors)


@pytest.mark.parametrize("precision", ["standard", "high"])
@pytest.mark.parametrize("scale", [torch.tensor(0.1), torch.tensor([0.1, 0.2])], ids=["one", "heads"])
def test_gradients_with_a_scale(scale: torch.Tensor, precision: str) -> None:
    options = {"ridge": 2.0, "causal": True}
    exact = [x.double().requires_grad_() for x in (*leaves(), scale)]
    mine = [x.cuda().requires_grad_() for x in (*leaves(), scale)]
    out = flashlla.attention(*mine[:3], scale=mine[3], precision=precision, **options)
    want = flashlla.attention(*exact[:3], scale=exact[3], **options)
    assert_near(out.cpu(), want, OUT, "out")
    weights = random(*want.shape, seed=9).bfloat16()
    terms = dense.scale_terms(*(x.detach() for x in exact), weights.double(), **options)
    found = torch.autograd.grad(out, mine, weights.cuda(), retain_graph=True)
    wanted = torch.autograd.grad(want, exact, weights.double(), retain_graph=True)
    for name, a, b in zip("qkv", found, wanted, strict=False):
        assert_near(a.cpu(), b, GRADIENT, f"d{name}")
    off = (found[3].cpu().double() - wanted[3]).norm()
    print(
        f"dscale {found[3].tolist()}, exactly {wanted[3].tolist()}: off by {off / terms.norm():.1e} of its terms' norm"
    )
    assert off <= SCALE[precision] * terms.norm()
    # Where all terms have one sign nothing cancels, and the sum itself is as good as they are.
    signed = weights * terms.sign()
    found = torch.autograd.grad(out, mine[3], signed.cuda())[0]
    wanted = torch.autograd.grad(want, exact[3], signed.double())[0]
    assert_near(found.cpu(), wanted, 5e-3, "dscale of one sign")


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "grad_out"])
def test_numbers_that_are_not_finite(where: str, number: float) -> None:
    n, token, window = 1024, 500, 37
    tensors = leaves(shapes=((2, 4, n, 64), (2, 2, n, 64), (2, 2, n, 48)))
    tensors.append(random(2, 4, n, 48, seed=9, dtype=torch.bfloat16))

    def results(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        *inputs, weights = (x.cuda().requires_grad_() for x in tensors)
        out = flashlla.attention(*inputs, ridge=2.0, causal=True, window=window)
        return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, inputs, weights))]

    place = ["q", "k", "v", "grad_out"].index(where)
    spoilt = [x.clone() for x in tensors]
    spoilt[place][1, 1, token, 3] = number
    # Query head 1 reads KV head 0, as 0 does; queries 2 and 3 read KV head 1.
    of_query = where in ("q", "grad_out")
    heads, kv_head = ([1], 0) if of_query else ([2, 3], 1)
    seeing = range(token, token + (1 if of_query else window))
    queries = torch.zeros(2, 4, n, dtype=torch.bool)
    queries[1, heads, seeing.start : seeing.stop] = True
    keys = torch.zeros(2, 2, n, dtype=torch.bool)
    keys[1, kv_head, token - window + 1 : seeing.stop] = True
    # Two blocks of queries and keys, the largest that kernels have, to either side.
    around = torch.zeros_like(keys)
    around[1, kv_head, token - window - 256 : seeing.stop + 256] = True

    def bad(x: torch.Tensor) -> torch.Tensor:
        return ~x.isfinite().all(-1)

    clean, (out, dq, dk, dv) = results(tensors), results(spoilt)
    if where == "grad_out":
        assert_near(out, clean[0], 1e-6, "out")
    else:
        assert torch.equal(out.isnan().all(-1), queries)
        assert_near(out[~queries], clean[0][~queries], OUT, "out of the others")
    if where == "v":
        # The gradients are those with a zero in its place.
        spoilt[place][1, 1, token, 3] = 0
        for name, a, b in zip(("dq", "dk", "dv"), (dq, dk, dv), results(spoilt)[1:], strict=True):
            assert_near(a, b, 1e-6, name)
        return
    assert torch.equal(bad(dq), queries) and torch.equal(bad(dv), keys)
    # A query that is not finite has no mean key, and that reaches all keys of the blocks that its own is held against.
    assert bad(dk)[keys].all() and not bad(dk)[~(keys | around if where == "q" else keys)].any()
    for name, a, b in (("dq", dq, clean[1]), ("dk", dk, clean[2]), ("dv", dv, clean[3])):
        assert_near(a[~bad(a)], b[~bad(a)], GRADIENT, f"{name} of the others")


@pytest.mark.parametrize("layout", ["bnhd", "bnd", "nhd"])
def test_layouts(layout: str) -> None:
    shapes = {
        "bnhd": ((2, 100, 4, 64), (2, 100, 2, 64), (2, 100, 2, 64)),
        "bnd": ((2, 100, 64),) * 3,
        "nhd": ((100, 4, 64), (100, 2, 64), (100, 2, 64)),
    }[layout]
    tensors = dict(zip("qkv", leaves(shapes=shapes), strict=True))
    both(lambda **x: flashlla.attention(**x, ridge=2.0, causal=True, layout=layout), tensors)


def test_strided_inputs() -> None:
    packed = random(2, 130, 3, 4, 64, seed=0, dtype=torch.bfloat16).cuda()
    q, k, v = packed.unbind(2)
    assert torch.equal(
        flashlla.attention(q, k, v, layout="bnhd"),
        flashlla.attention(*(x.contiguous() for x in (q, k, v)), layout="bnhd"),
    )
    flipped = q.mT.contiguous().mT
    assert torch.equal(flashlla.attention(flipped, k, v, layout="bnhd"), flashlla.attention(q, k, v, layout="bnhd"))


def test_diagnostics() -> None:
    q, k, v = (x.cuda() for x in leaves())
    out, got = flashlla.attention(q, k, v, ridge=2.0, return_diagnostics=True)
    want = flashlla.attention(*(x.double() for x in leaves()), ridge=2.0, return_diagnostics=True)[1]
    assert_near(got.lse.cpu(), want.lse, 1e-4)
    assert_near(got.key_mean.cpu(), want.key_mean, 5e-3)
    assert_near(got.probe.cpu(), want.probe, 1e-2)
    assert got.iterations.shape == got.residual.shape == (2, 4, 200)
    assert got.iterations.min() >= 1 and got.residual.max() < 5e-3
    assert out.shape == (2, 4, 200, 48)


def test_state_shape_is_the_plans() -> None:
    q, k, v = (x.cuda() for x in leaves())
    given = flashlla._options.Options(1.0, None, True, None, 0, False, "auto", None, None, "standard")
    sizes = {"q": q.shape, "k": k.shape, "v": v.shape, "bias": False, "probe": False}
    plan = _flashlla.cuda_forward_plan(0, "bhnd", "bf16", sizes, given.given(None, None))
    assert tuple(plan.state_shape) == _cuda.state_shape(q, v)


def test_float64_is_refused() -> None:
    x = torch.ones(1, 1, 4, 8, dtype=torch.float64, device="cuda")
    with pytest.raises(TypeError, match="^q: float64"):
        flashlla.attention(x, x, x)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ridge", -1.0),
        ("ridge", torch.ones(3)),
        ("k", torch.ones(2, 2, 200, 60).bfloat16()),
        ("v", torch.ones(2, 2, 100, 64).bfloat16()),
        ("bias", torch.ones(7)),
        ("probe", torch.ones(2, 4, 200, 8)),
        ("solver", "direct"),
        ("window", 0),
    ],
)
def test_errors(name: str, value: object) -> None:
    arguments = dict(zip("qkv", (x.cuda() for x in leaves()), strict=True))
    arguments[name] = value.cuda() if isinstance(value, torch.Tensor) else value
    with pytest.raises(ValueError, match=f"^{name}"):
        flashlla.attention(**arguments)


@pytest.mark.parametrize("tokens", [64, 128, 256, 512, 1024])
def test_the_published_interface(tokens: int) -> None:
    q, k, v = (random(1, tokens, 64, seed=i, dtype=torch.float32, grad=False).cuda() for i in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ridge = torch.tensor(10.0, device="cuda")
    o, omega = LLAFunction.apply(*leaves, ridge, 64**-0.5, 1e-6, 1e-6, 1e-6, 32, False)
    assert o.dtype == torch.bfloat16 and omega.shape == (1, tokens, 1) and omega.dtype == torch.float32
    want, rho, denom, m = lla_forward_naive(*(x.detach() for x in leaves), 64**-0.5, 10.0, 1e-6)
    torch.testing.assert_close(o.float(), want, rtol=1e-2, atol=1e-2)
    grad_o = torch.randn_like(o)
    o.backward(grad_o)
    detached = (x.detach() for x in leaves)
    gradients = lla_backward_naive(*detached, rho, denom, m, grad_o.float(), 64**-0.5, 10.0)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad.float(), gradient, rtol=1e-2, atol=1e-1)


def test_nothing_waits_and_graphs_replay() -> None:
    q, k, v = (x.cuda().requires_grad_() for x in leaves())
    ridge = torch.full((4,), 2.0, device="cuda", requires_grad=True)
    weights = torch.ones(2, 4, 200, 48, dtype=torch.bfloat16, device="cuda")

    def step() -> list[torch.Tensor]:
        out = flashlla.attention(q, k, v, ridge=ridge, causal=True)
        return [out, *torch.autograd.grad(out, (q, k, v, ridge), weights)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Anything that waits for the GPU ends a capture with an error.
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in (q, k, v):
            x.copy_(x.flip(2))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


def test_host_time_of_a_call() -> None:
    """Prints it: see `pytest -s`."""
    q, k, v = (torch.randn(1, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    ridge = torch.tensor(10.0, device="cuda")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    calls = [
        lambda: lla_attention(q, k, v),
        lambda: lla_attention(q, k, v, ridge_lambda=ridge),
        lambda: lla_attention(*leaves),
    ]
    for call in calls:
        medians = []
        for _ in range(20):
            times = []
            torch.cuda.synchronize()  # So that the queue of launches never fills.
            for _ in range(50):
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
            medians.append(1e6 * sorted(times)[25])
        # Not held to a limit: machines differ by a factor of 2, and a shared one can be half as fast for a while.
        print(f"host time of a forward at (1, 64, 64), medians of 50: {min(medians):.1f} to {max(medians):.1f} µs")


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("scale", [None, torch.tensor([0.1, 0.2])])
def test_the_short_way_is_the_operators(layout: str, scale: torch.Tensor | None) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    shapes = ((2, 4, 200, 64), (2, 2, 200, 64), (2, 2, 200, 48))
    inputs = [x.cuda() if layout == "bhnd" else x.cuda().transpose(1, 2).contiguous() for x in leaves(shapes=shapes)]
    inputs += [torch.full((4,), 2.0, device="cuda")] + ([] if scale is None else [scale.cuda()])
    inputs = [x.requires_grad_() for x in inputs]

    def step() -> list[torch.Tensor]:
        q, k, v, ridge, *rest = inputs
        out = flashlla.attention(q, k, v, ridge=ridge, scale=rest[0] if rest else None, causal=True, layout=layout)
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    direct = step()
    with Watching():
        watched = step()
    assert any("flashlla.forward" in name for name in seen) and any("flashlla.backward" in name for name in seen)
    for a, b in zip(direct, watched, strict=True):
        assert torch.equal(a, b)


def test_packed_sequences_in_a_graph() -> None:
    q, k, v = (x.cuda() for x in leaves())
    cu_seqlens = torch.tensor([0, 70, 200])
    call = functools.partial(flashlla.attention, causal=True, cu_seqlens=cu_seqlens)
    want = call(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(q, k, v)
    # A graph reads where sequences begin and end again at every replay, long after the call was dropped from the cache.
    _cuda.prepared.cache_clear()
    gc.collect()
    graph.replay()
    assert torch.equal(out, want)


def test_compiles() -> None:
    def model(q, k, v, ridge):
        return flashlla.attention(q * 2, k, v, ridge=ridge, causal=True).float().tanh()

    q, k, v = (x.cuda().requires_grad_() for x in leaves())
    ridge = torch.full((4,), 2.0, device="cuda", requires_grad=True)
    compiled = torch.compile(model, fullgraph=True)
    for function in (model, compiled):
        out = function(q, k, v, ridge)
        results = [out, *torch.autograd.grad(out.sum(), (q, k, v, ridge))]
        if function is model:
            want = results
    for a, b in zip(results, want, strict=True):
        assert_near(a, b, 1e-2)


def test_streams_side_by_side() -> None:
    q, k, v = (x.cuda() for x in leaves())
    want = flashlla.attention(q, k, v, causal=True)
    torch.cuda.synchronize()
    results = []
    streams = [torch.cuda.Stream() for _ in range(4)]
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(flashlla.attention(q, k, v, causal=True))
    torch.cuda.synchronize()
    assert all(torch.equal(x, want) for x in results)


def test_trains() -> None:
    from test_training import recall

    losses, right = recall.train(200, device="cuda")
    assert losses[-1] < 0.05 and right > 0.98
