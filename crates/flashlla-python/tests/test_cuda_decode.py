"""Decoding on an NVIDIA GPU: the CPU's results, the caller's stream, no waiting. Skipped where there is none."""

import flashlla
import pytest
import torch
from conftest import error
from flashlla.nn import LocalLinearAttention
from test_decode import pool_of, random, seeded  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# Outputs' rounding, and fp16 inside.
CLOSE = {torch.float32: 2e-3, torch.bfloat16: 4e-3, torch.float16: 2e-3}


def on_gpu(x):
    return x.cuda() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("page_size", [None, 16, 64])
@pytest.mark.parametrize("d", [64, 128])
def test_as_on_the_cpu(dtype, layout, page_size, d) -> None:
    lengths, t = torch.tensor([384, 133, 0, 5]), 3
    q, k, v = random(4, 4, t, d, dtype=dtype), random(4, 2, 384, d, dtype=dtype), random(4, 2, 384, 40, dtype=dtype)
    table = None
    if page_size is not None:
        (k, table), (v, _) = (pool_of(x, page_size, 384 // page_size, layout) for x in (k, v))
    elif layout == "bnhd":
        k, v = (x.swapaxes(1, 2).contiguous() for x in (k, v))
    q = q if layout == "bhnd" else q.swapaxes(1, 2)
    for options in (
        {"ridge": 1.0},
        {"ridge": torch.rand(4, 4, t) + 0.5, "scale": torch.tensor([0.08, 0.15]), "window": 50},
        {"ridge": torch.tensor([1.0, 2.0, 3.0, 4.0]), "causal": False, "max_length": 384},
        {"probe": 0.1 * random(*q.shape)},
    ):
        here = flashlla.decode(q, k, v, lengths, block_table=table, layout=layout, return_diagnostics=True, **options)
        there = {name: on_gpu(x) for name, x in options.items()}
        tables = {"block_table": on_gpu(table), "layout": layout, "return_diagnostics": True}
        for of in (lengths, lengths.cuda()):
            got, rest = flashlla.decode(q.cuda(), k.cuda(), v.cuda(), of, **tables, **there)
            assert error(got.cpu(), here[0]) < CLOSE[dtype], options
            seen = lengths > 0
            for name in ("lse", "key_mean", "probe"):
                mine, theirs = getattr(rest, name).cpu()[seen], getattr(here[1], name)[seen]
                assert error(mine, theirs) < 1e-2, name


@pytest.mark.parametrize("options", [{}, {"page_size": 64}, {"page_size": 16, "layout": "bnhd"}])
def test_a_cache_does_as_on_the_cpu(options) -> None:
    laid = (lambda x: x) if options.get("layout") != "bnhd" else (lambda x: x.swapaxes(1, 2))
    caches = [
        flashlla.KvCache(3, 2, 64, 300, dtype=torch.bfloat16, device=device, **options) for device in ("cpu", "cuda")
    ]
    k, v, q = (random(*shape, dtype=torch.bfloat16) for shape in ((3, 2, 90, 64), (3, 2, 90, 64), (3, 4, 2, 64)))
    outs = []
    for cache in caches:

        def here(x, cache=cache):
            return laid(x.to(cache.k.device))

        cache.append(here(k[:1, :, :70]), here(v[:1, :, :70]), sequence=0)
        cache.fork(0, 2)
        cache.append(here(k[1:2, :, :33]), here(v[1:2, :, :33]), sequence=1)
        cache.append(here(k[:, :, 70:73]), here(v[:, :, 70:73]))
        cache.append(here(k[:, :, 80:85]), here(v[:, :, 80:85]))
        cache.truncate(1, 34)
        outs.append([cache.decode(here(q), ridge=1.0).cpu()])
        cache.free(0)
        outs[-1].append(cache.decode(here(q), ridge=1.0, window=40).cpu())
    assert caches[0].lengths == caches[1].lengths == [0, 34, 78]
    for a, b in zip(*outs, strict=True):
        assert error(b, a) < CLOSE[torch.bfloat16]


def test_many_rows() -> None:
    q, k, v = random(16, 8, 16, 128), random(16, 8, 40, 128), random(16, 8, 40, 128)
    lengths, probe = [40 - i for i in range(16)], random(16, 8, 16, 128) * 0.1
    for options in ({"ridge": torch.rand(16, 8, 16) + 0.5}, {"probe": probe}):
        want, of_want = flashlla.decode(q, k, v, lengths, return_diagnostics=True, **options)
        there = {name: x.cuda() for name, x in options.items()}
        got, of_got = flashlla.decode(q.cuda(), k.cuda(), v.cuda(), lengths, return_diagnostics=True, **there)
        for a, b in ((got, want), (of_got.lse, of_want.lse), (of_got.probe, of_want.probe)):
            assert max(error(a[i].cpu(), b[i]) for i in range(16)) < 1e-2


@pytest.mark.parametrize("dim", [64, 128])
def test_contexts_that_are_split(dim: int) -> None:
    q, k, v = random(3, 4, 3, dim), random(3, 2, 2500, dim), random(3, 2, 2500, dim)
    lengths, probe = [2500, 900, 3], random(3, 4, 3, dim) * 0.1
    for options in ({"ridge": torch.rand(3, 4, 3) + 0.5}, {"probe": probe}, {"ridge": 1.0, "window": 1500}):
        want, of_want = flashlla.decode(q, k, v, lengths, return_diagnostics=True, **options)
        there = {name: x.cuda() if torch.is_tensor(x) else x for name, x in options.items()}
        got, of_got = flashlla.decode(q.cuda(), k.cuda(), v.cuda(), lengths, return_diagnostics=True, **there)
        for a, b in ((got, want), (of_got.lse, of_want.lse), (of_got.probe, of_want.probe)):
            assert max(error(a[i].cpu(), b[i]) for i in range(3)) < 1e-2


def test_the_module_generates_what_its_forward_gives() -> None:
    torch.manual_seed(3)
    block = LocalLinearAttention(256, 4, num_kv_heads=2, rope=True, qk_norm=True, causal=True).cuda().bfloat16()
    with torch.no_grad():
        x = torch.randn(2, 230, 256).cuda().bfloat16()
        want = block(x)
        for options in ({}, {"page_size": 64}):
            cache = block.make_cache(2, 256, **options)
            parts = [block(x[:, :30], cache=cache)]
            parts += [block(x[:, i : i + 1], cache=cache) for i in range(30, 230)]
            assert error(torch.cat(parts, 1).float().cpu(), want.float().cpu()) < 1e-2


def test_does_not_wait_and_can_be_captured() -> None:
    k, v, q = random(2, 2, 512, 64), random(2, 2, 512, 64), random(2, 4, 1, 64)
    k, v, q = (x.cuda() for x in (k, v, q))
    lengths, ridge = torch.tensor([200, 100], dtype=torch.int32).cuda(), torch.ones(4).cuda()

    def call():
        return flashlla.decode(q, k, v, lengths, ridge=ridge)

    want = call()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        got = call()
        assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    # A graph reads lengths when it is replayed.
    for length in (150, 512, 1):
        lengths.fill_(length)
        graph.replay()
        assert torch.equal(out, call())


def test_wrong_lengths_and_tables_reach_nothing_else() -> None:
    k, v, q = (random(2, 2, 64, 64).cuda(), random(2, 2, 64, 64).cuda(), random(2, 2, 1, 64).cuda())
    lengths = torch.tensor([10**9, -5], dtype=torch.int32).cuda()
    out = flashlla.decode(q, k, v, lengths)
    assert torch.equal(out[0], flashlla.decode(q, k, v, [64, 64])[0]) and not out[1].any()
    table = torch.tensor([[10**6], [-7]], dtype=torch.int32).cuda()
    flashlla.decode(q, k, v, torch.tensor([20, 20], dtype=torch.int32).cuda(), block_table=table)
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lengths": [65, 1]}, "lengths: 65"),
        ({"lengths": torch.ones(3, dtype=torch.int32)}, "lengths: shape"),
        ({"bias": torch.zeros(64)}, "bias"),
        ({"solver": "direct"}, "solver"),
        ({"ridge": torch.ones(3)}, "ridge: shape"),
        ({"q": torch.randn(2, 4, 17, 64)}, "queries: 17"),
        ({"v_cache": torch.randn(2, 2, 64, 60)}, "value_dim: 60"),
        ({"v_cache": torch.randn(2, 2, 63, 64)}, "v_cache: shape"),
    ],
)
def test_what_is_wrong_is_named(change: dict, words: str) -> None:
    k = torch.randn(2, 2, 64, 64)
    arguments = {"q": torch.randn(2, 4, 1, 64), "k_cache": k, "v_cache": k, "lengths": [64, 10], **change}
    with pytest.raises((ValueError, TypeError), match=words):
        flashlla.decode(**{name: on_gpu(x) for name, x in arguments.items()})


def test_caches_are_read_in_place_or_not_at_all() -> None:
    k, q = torch.randn(2, 2, 64, 64).cuda(), torch.randn(2, 4, 1, 64).cuda()
    for cache, words in ((torch.randn(2, 2, 64, 65).cuda()[..., :64], "multiples of 8"), (k[..., ::2], "side by side")):
        with pytest.raises(ValueError, match=f"k_cache: .*{words}"):
            flashlla.decode(q[..., : cache.shape[-1]], cache, k, [64, 10])
    wide = torch.randn(2, 2, 64, 72).cuda()
    wide[..., :64] = k
    assert torch.equal(flashlla.decode(q, wide[..., :64], k, [64, 10]), flashlla.decode(q, k, k, [64, 10]))
