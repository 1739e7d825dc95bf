"""`decode`, `KvCache` and `forward(..., cache=)` on the CPU, against `attention`; `test_cuda.py` does it on a GPU."""

import flashlla
import numpy as np
import pytest
import torch
from conftest import error
from flashlla.nn import LocalLinearAttention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Decoding and a forward differ by the rounding of their sums, and of outputs in half precision.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def pool_of(x, page_size, width, layout):
    """Keys or values `[B, H, room, D]` in shuffled pages, NaN in those that nobody owns, and the block table."""
    b, h, _, d = x.shape
    table = torch.randperm(b * width + 2, generator=torch.Generator().manual_seed(1))[: b * width].reshape(b, width)
    pool = torch.full((b * width + 2, h, page_size, d), float("nan"), dtype=x.dtype)
    for i in range(b):
        for j in range(width):
            pool[table[i, j]] = x[i, :, j * page_size : (j + 1) * page_size]
    return (pool if layout == "bhnd" else pool.swapaxes(1, 2).contiguous()), table


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("paged", [False, True])
def test_is_the_attention_of_the_last_queries(dtype, layout, paged):
    lengths, t = [96, 33, 5], 3
    q, k, v = random(3, 4, t, 16, dtype=dtype), random(3, 2, 96, 16, dtype=dtype), random(3, 2, 96, 8, dtype=dtype)
    ridge, scale = torch.rand(3, 4, t) + 0.5, torch.tensor([0.2, 0.4])
    options = {"ridge": ridge, "scale": scale, "window": 40}
    want = torch.cat(
        [
            flashlla.attention(
                *(q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n]),
                **{**options, "ridge": ridge[i : i + 1]},
                causal=True,
                q_offset=n - t,
            )
            for i, n in enumerate(lengths)
        ]
    )
    table, caches = None, (k, v)
    if paged:
        (kp, table), (vp, _) = (pool_of(x, 32, 3, layout) for x in (k, v))
        caches = (kp, vp)
    elif layout == "bnhd":
        caches = tuple(x.swapaxes(1, 2).contiguous() for x in (k, v))
    given = q if layout == "bhnd" else q.swapaxes(1, 2)
    got = flashlla.decode(given, *caches, torch.tensor(lengths), block_table=table, layout=layout, **options)
    assert got.dtype == dtype and got.is_contiguous()
    assert error(got if layout == "bhnd" else got.swapaxes(1, 2), want) < CLOSE[dtype]


def test_bias_probe_and_diagnostics():
    q, k, v = random(2, 4, 2, 8), random(2, 2, 20, 8), random(2, 2, 20, 8)
    bias, probe = random(2, 2, 20), random(2, 4, 2, 8)
    for extra in ({"bias": bias}, {"probe": probe}, {"scale": torch.tensor(0.3)}, {"causal": False}):
        same = {"causal": True, "q_offset": 18, **extra}
        want, of_want = flashlla.attention(q, k, v, ridge=1.0, return_diagnostics=True, **same)
        got, of_got = flashlla.decode(q, k, v, [20, 20], ridge=1.0, return_diagnostics=True, **extra)
        assert error(got, want) < 1e-5
        for name in ("lse", "key_mean", "probe"):
            assert error(getattr(of_got, name), getattr(of_want, name)) < 1e-4, name
        assert of_got.iterations.shape == of_got.residual.shape == (2, 4, 2)


def test_numpy():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 4, 1, 8)), rng.normal(size=(2, 2, 64, 8)), rng.normal(size=(2, 2, 64, 8))
    out = flashlla.decode(q, k, v, [64, 0], ridge=1.0)
    assert isinstance(out, np.ndarray) and not out[1].any()
    want = flashlla.attention(q[:1], k[:1], v[:1], ridge=1.0)
    assert np.allclose(out[:1], want, rtol=0, atol=1e-9)
    cache = flashlla.KvCache(2, 2, 8, 64, page_size=16, dtype=np.float64)
    cache.append(k[:, :, :40], v[:, :, :40])
    cache.append(k[:, :, 40:], v[:, :, 40:])
    assert np.allclose(cache.decode(q, ridge=1.0)[:1], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"page_size": 16}, {"page_size": 32, "layout": "bnhd"}])
def test_a_cache_grows_forks_and_forgets(options):
    laid = (lambda x: x) if options.get("layout") != "bnhd" else (lambda x: x.swapaxes(1, 2))
    cache = flashlla.KvCache(3, 2, 8, 70, **options)
    k, v, q = random(1, 2, 70, 8), random(1, 2, 70, 8), random(3, 4, 1, 8)
    cache.append(laid(k[:, :, :37]), laid(v[:, :, :37]), sequence=0)
    used = cache.nbytes_used
    cache.fork(0, 2)
    assert cache.lengths == [37, 0, 37] and (not options or cache.nbytes_used == used)
    # The fork goes another way: what it writes is its own.
    other = random(1, 2, 5, 8)
    cache.append(laid(other), laid(other), sequence=2)
    cache.append(laid(k[:, :, 37:60]), laid(v[:, :, 37:60]), sequence=0)
    cache.append(laid(other), laid(other), sequence=0)
    cache.truncate(0, 60)
    out = laid(cache.decode(laid(q), ridge=1.0))
    assert error(out[:1], flashlla.attention(q[:1], k[:, :, :60], v[:, :, :60], ridge=1.0)) < 1e-5
    forked = [torch.cat((x[:, :, :37], other), 2) for x in (k, v)]
    assert error(out[2:], flashlla.attention(q[2:], *forked, ridge=1.0)) < 1e-5
    assert not out[1].any()
    cache.free(0)
    cache.free(2)
    assert cache.nbytes_used == 0 and cache.nbytes >= 2 * 3 * 70 * 2 * 8 * 4


def test_what_is_wrong_is_named():
    cache = flashlla.KvCache(2, 1, 8, 64, page_size=16, pages=3)
    x = random(1, 1, 40, 8)
    cache.append(x, x, sequence=0)
    with pytest.raises(flashlla.CacheFullError, match="pages"):
        cache.append(x, x, sequence=1)
    assert cache.lengths == [40, 0]
    for call, words in (
        (lambda: cache.append(x, x), r"k: shape .* does not fit; it must be \[2, 1, 40, 8\]"),
        (lambda: cache.append(x.double(), x, sequence=0), "k: dtype"),
        (lambda: cache.append(x.numpy(), x, sequence=0), "k: ndarray"),
        (lambda: cache.append(x, x, sequence=2), "sequence: 2"),
        (lambda: cache.append(x, x, sequence=-1), "sequence: -1"),
        (lambda: cache.fork(0, 0), "to: "),
        (lambda: cache.fork(-1, 0), "source: -1"),
        (lambda: cache.truncate(0, 41), "length: 41"),
        (lambda: cache.decode(random(2, 1, 41, 8)), "q: 41 queries"),
        (lambda: cache.decode(random(2, 1, 1, 8).requires_grad_()), "no_grad"),
        (lambda: cache.decode(random(2, 1, 17, 8)), "queries: 17"),
        (lambda: flashlla.KvCache(1, 1, 8, 64, page_size=24), "page_size: 24"),
        (lambda: flashlla.KvCache(1, 1, 8, 64, page_size=-1), "page_size: -1"),
        (lambda: flashlla.KvCache(1, 1, 8, 64, pages=3), "pages: 3"),
        (lambda: flashlla.KvCache(1, 1, 257, 64), "head_dim: 257"),
        (lambda: flashlla.KvCache(1, 0, 8, 64), "kv_heads: 0"),
        (lambda: flashlla.KvCache(1, 1, 8, 64, layout="bnd"), "layout: 'bnd'"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            call()
    q, k = random(2, 1, 1, 8), random(2, 1, 64, 8)
    for change, words in (
        ({"lengths": [65, 1]}, "lengths: 65"),
        ({"lengths": [-1, 1]}, "lengths: -1"),
        ({"lengths": [1]}, "lengths"),
        ({"lengths": torch.ones(2)}, "lengths: dtype"),
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, "block_table: shape"),
        ({"block_table": torch.tensor([[0], [2]])}, r"block_table\[1, 0\] = 2"),
        ({"layout": "nhd"}, "layout: 'nhd'"),
        ({"ridge": 0.0}, "ridge"),
        ({"ridge": torch.ones(3)}, "ridge"),
        ({"scale": torch.ones(2)}, "scale: shape"),
        ({"probe": random(2, 1, 2, 8)}, "probe"),
        ({"v_cache": random(2, 1, 63, 8)}, "v"),
    ):
        arguments = {"q": q, "k_cache": k, "v_cache": k, "lengths": [64, 10], **change}
        with pytest.raises((ValueError, TypeError), match=words):
            flashlla.decode(**arguments)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("options", [{}, {"page_size": 16}])
def test_the_module_generates_what_its_forward_gives(window, options):
    torch.manual_seed(3)
    block = LocalLinearAttention(32, 4, num_kv_heads=2, rope=True, qk_norm=True, causal=True, window=window)
    with torch.no_grad():
        block.log_ridge.add_(torch.randn(4) * 0.2)
        block.log_scale.add_(torch.randn(2) * 0.2)
        x = torch.randn(2, 70, 32)
        want = block(x)
        cache = block.make_cache(2, 80, **options)
        # A prompt, single tokens, a speculation, and a piece longer than what is decoded at a time.
        parts = [block(x[:, :30], cache=cache), block(x[:, 30:31], cache=cache), block(x[:, 31:34], cache=cache)]
        block(torch.randn(2, 4, 32), cache=cache)
        for i in range(2):
            cache.truncate(i, 34)
        parts.append(block(x[:, 34:], cache=cache))
        assert error(torch.cat(parts, 1), want) < 1e-4
        # Sequences of different lengths are rotated each by its own.
        cache.truncate(0, 50)
        cache.truncate(1, 60)
        ragged = block(torch.stack((x[0, 50:51], x[1, 60:61])), cache=cache)
        assert error(ragged[:, 0], torch.stack((want[0, 50], want[1, 60]))) < 1e-4
        # All of the tokens, or none.
        lengths = cache.lengths
        with pytest.raises(flashlla.CacheFullError):
            block(torch.randn(2, 40, 32), cache=cache)
        assert cache.lengths == lengths
        with pytest.raises(ValueError, match="cache: "):
            block(x, x, x, cache=cache)
        with pytest.raises(ValueError, match="does not fit"):
            block(torch.randn(3, 1, 32), cache=cache)
    with pytest.raises(ValueError, match="no_grad"):
        block(x[:, :1], cache=cache)
