"""Checks and times the GPU decode kernels against float64 PyTorch: `python3 gpu_decode.py FOLDER [--no-check] [--no-time]`.

FOLDER holds the cubins that `cargo xtask kernels` leaves in target/kernels/sm_90. Needs PyTorch and CuPy. Every check draws fresh
inputs; NaN never passes. The last lines are a table: time, bytes of keys and values over time as a share of the rate of a device
copy (bytes read and written) in the same run, and the ratio to scaled_dot_product_attention on the same cache.
"""
import math
import re
import sys
import time

import torch

from gpu_kernels import NAMES, Kernels, aligned, error, f32, graph_ms, i32, i64, perpendicular, ptr

BLOCKS = {64: 264, 128: 132}  # tile blocks that an H100 runs at a time
SPLITS_COST = {64: (8, 0.08), 128: (4, 0.13)}  # a context is split where that saves more key tiles than this, and this for each query
RESIDENT_WARPS = 132 * 32  # tile blocks of one warp that an H100 runs at a time
# As in crates/flashlla/src/cuda/decode_shared.rs: nanoseconds of moments, of a tile block that makes all passes, of split passes.
COSTS = {64: ((18e3, 40, 0.087), (100e3, 82), (85e3, 0.168)), 128: ((20e3, 130, 0.235), (255e3, 150), (100e3, 0.37))}
RESIDENT = {64: 528, 128: 396}  # tile blocks of a pass that an H100 runs at a time
TOGETHER = 264  # tile blocks that make all passes
TOGETHER_LIMIT = 16
TOLERANCE, OUTPUT_ERROR = 4e-4, 5e-4
# Ways to decode, each to be forced: moments in one launch (where it is chosen), of splits of two tiles, and queries solved together.
WAYS = {"moments": dict(how="moments"), "moments of splits": dict(how="moments", split_tiles=2), "together": dict(how="together"), "passes": dict(how="passes")}
failures = 0


def variant(kernels, entry, dtype, d, paged, page_size):
    """(name, keys of a tile): for the largest pages that these are multiples of."""
    found = []
    for name in kernels.names:
        if match := re.fullmatch(rf"{entry}_{NAMES[dtype]}_n(\d+)_d{d}_p(\d+)", name):
            pages = int(match[2])
            if paged == (pages > 0) and page_size % max(pages, 1) == 0:
                found.append((pages, name, int(match[1])))
    if not found:
        raise KeyError(f"no {entry} for {dtype} d={d} paged={paged} pages of {page_size} in {kernels.folder}")
    return max(found)[1:]


def plan(rows, tiles, wanted):
    """Key tiles of a split: as many splits as fill the device, of 2 to 256 tiles (the tensor cores' sums lose
    digits over more), and no more than 64."""
    return max(2, min(256, -(-tiles // max(1, wanted // rows))), -(-tiles // 64))


def split_tiles(keys, tiles, resident):
    """Key tiles of a split of a pass: every wave of tile blocks costs as much as its key tiles and five more, adding up splits as much as 0.6 for each."""
    cost = lambda splits: -(-tiles * splits // resident) * (-(-keys // splits) + 5) + 0.6 * splits
    return -(-keys // min(range(1, max(1, min(keys, 256)) + 1), key=cost))


def fastest(rows, tiles, keys, pad):
    """Moments of every query, all passes in one launch ("together"), or split passes."""
    (launches, solve, each), (steps, key), (start, tile_key) = COSTS[pad]
    times = {"moments": launches + rows * (solve + keys * each), "together": -(-tiles // TOGETHER) * (steps + keys * key), "passes": start + tiles * (keys + 2500) * tile_key}
    return min(times, key=times.get)


def rowed(x):
    """Strides of queries or outputs, as kernels take them that decode each query by itself."""
    return [i64(x.stride(0)), i64(x.stride(1)), i32(x.stride(2))]


def near(x):
    """The same for kernels that reach all queries of a KV head with 32 bits."""
    return [i64(x.stride(0)), i32(x.stride(1)), i32(x.stride(2))]


def paged(x):
    """Strides of a pool."""
    return [i32(x.stride(0)), i64(x.stride(1)), i32(x.stride(2))]


class Shared:
    """Launches for queries that share a KV head: passes over the cache for 16 of them at once, and a step after each. `todo` says which
    queries are left to the moments."""

    def __init__(self, kernels, q, k, v, lengths, lam, scale, table, options, window, probe, out, lse, key_mean, iterations, relative, save):
        batch, heads, t, d = q.shape
        pages, kv_heads, page_size, dv = v.shape
        pad, dev, kind = (64 if max(d, dv) <= 64 else 128), q.device, NAMES[q.dtype]
        passes = [variant(kernels, f"lla_decode_pass{n}", q.dtype, pad, table is not None, page_size) for n in range(3)]
        bn, queries = passes[0][1], heads // kv_heads * t
        tiles = batch * kv_heads * -(-queries // 16)
        width = 1 if table is None else table.shape[1]
        keys = -(-min(int(lengths.max()), page_size * width) // bn)
        keys = max(1, keys if window is None else min(keys, -(-(window + t) // bn) + 1))
        step = split_tiles(keys, tiles, RESIDENT[pad])
        splits, limit = -(-keys // step), max(4, min(10, queries * pad // 32))
        empty = lambda *shape, dtype=torch.float32: torch.empty(*shape, device=dev, dtype=dtype)
        sums, parts, record = empty(tiles, splits, 2, pad, 16), empty(tiles, splits, 4, 16), empty(tiles, 16, 16)
        vectors, kept = empty(tiles, 3, pad, 16, dtype=q.dtype), empty(tiles, 3, pad, 16)
        live, self.todo = empty(tiles, dtype=torch.int32), empty(batch * heads * t, dtype=torch.int32)
        where = [i32(options), i32(kv_heads), i32(heads // kv_heads), i32(t), i32(window or 0), i32(page_size * width)]
        of_pass = ([ptr(x) for x in (q, k, v, table, lengths, sums, parts, vectors, record, live, scale)] + where
                   + [i32(width), i32(pages), i32(page_size), i32(step), i32(d), i32(dv)] + near(q) + paged(k) + paged(v) + [i32(0)])
        of_step = ([ptr(x) for x in (q, lengths, sums, parts, vectors, record, kept, live, self.todo, lam, out, lse, key_mean, probe, iterations, relative)]
                   + where + [i32(splits), i32(step * bn), i32(bn), i32(d), i32(dv)] + near(q) + [i32(x) for x in lam.stride()] + near(out)
                   + [f32(TOLERANCE**2), f32(OUTPUT_ERROR**2)])

        def turn(n, left):
            return [(passes[n][0], "lla_decode_pass", (tiles, splits), of_pass),
                    (f"lla_decode_step{n}_{kind}_d{pad}", "lla_decode_step", (tiles,), of_step + [i32(left), i32(save), i32(save)])]
        between = [] if options & 16 else [launch for left in reversed(range(limit)) for launch in turn(1, left)]
        self.launches = turn(0, limit) + between + turn(2, 0)
        self.keep = (sums, parts, vectors, record, kept, live)


class Together:
    """One launch for queries that share a KV head: a tile block makes all passes for 16 of them."""

    def __init__(self, kernels, q, k, v, lengths, lam, scale, table, options, window, probe, out, lse, key_mean, iterations, relative, save):
        batch, heads, t, d = q.shape
        pages, kv_heads, page_size, dv = v.shape
        pad = 64 if max(d, dv) <= 64 else 128
        name, _ = variant(kernels, "lla_decode_together", q.dtype, pad, table is not None, page_size)
        queries = heads // kv_heads * t
        width, limit = 1 if table is None else table.shape[1], TOGETHER_LIMIT
        self.todo = torch.empty(batch * heads * t, device=q.device, dtype=torch.int32)
        tiles = batch * kv_heads * -(-queries // 16)
        self.keep = torch.empty(tiles, 8, pad, 16, device=q.device), torch.empty(tiles, 2, 16, 16, device=q.device)
        self.launches = [(name, "lla_decode_together", (tiles,),
                          [ptr(x) for x in (q, k, v, table, lengths, scale, lam, out, lse, key_mean, probe, iterations, relative, self.todo, *self.keep)]
                          + [i32(options), i32(kv_heads), i32(heads // kv_heads), i32(t), i32(window or 0), i32(page_size * width), i32(width), i32(pages), i32(page_size), i32(d), i32(dv)]
                          + near(q) + paged(k) + paged(v) + [i32(0)] + [i32(x) for x in lam.stride()] + near(out)
                          + [f32(TOLERANCE**2), f32(OUTPUT_ERROR**2), i32(0 if options & 16 else limit), i32(save), i32(save)])]


class Decode:
    """Buffers and launch arguments of one shape. `k`, `v`: pools [pages, kv_heads, page_size, d]; contiguous without a table."""

    def __init__(self, kernels, q, k, v, lengths, ridge, table=None, causal=True, window=None, scale=None, given=None, split_tiles=None, state=True, how=None, whole=None):
        self.kernels = kernels
        batch, heads, t, d = q.shape
        pages, kv_heads, page_size, dv = v.shape
        pad, dev = (64 if max(d, dv) <= 64 else 128), q.device
        assert aligned(k) and aligned(v)
        split, bn = variant(kernels, "lla_decode_split", q.dtype, pad, table is not None, page_size)
        rows = batch * heads * t
        tiles = -(-page_size * (1 if table is None else table.shape[1]) // bn)
        most = -(-int(lengths.max()) // bn) + 1
        tiles = min(tiles, most if window is None else -(-window // bn) + 1)
        step = split_tiles or (tiles if whole else plan(rows, tiles, BLOCKS[pad]))
        worth = SPLITS_COST[pad][0] + SPLITS_COST[pad][1] * rows
        if split_tiles is None and whole is not False and tiles - step <= worth and tiles <= 256:
            step = tiles
        assert -(-tiles // step) <= 64
        splits = max(1, -(-tiles // step))
        self.out, self.lse = torch.empty(batch, heads, t, dv, device=dev, dtype=q.dtype), torch.empty(batch, heads, t, device=dev)
        self.probe = given if given is not None else torch.empty(batch, heads, t, d, device=dev)
        self.key_mean = torch.empty(batch, heads, t, d, device=dev)
        self.iterations, self.relative = torch.empty(rows, dtype=torch.int32, device=dev), torch.empty(rows, device=dev)
        moments = torch.empty(rows * splits + 8, 2 * pad + 2, pad, device=dev)
        parts = torch.empty(rows, splits, 2, device=dev)
        folded, sums = torch.empty(rows, 4 * pad, pad, device=dev, dtype=torch.float16), torch.empty(rows, 4 * pad + 16, device=dev)
        lam = ridge if torch.is_tensor(ridge) else torch.full((batch, heads, t), float(ridge), device=dev)
        options = int(causal) + 2 * (window is not None) + 16 * (given is not None)
        scale = torch.full((1,), d ** -0.5 if scale is None else scale, device=dev)
        lengths = lengths.to(device=dev, dtype=torch.int32)
        width = 1 if table is None else table.shape[1]
        where = [i32(0), i32(kv_heads), i32(heads // kv_heads), i32(t), i32(window or 0), i32(page_size * width)]
        how = how or fastest(rows, batch * kv_heads * -(-(heads // kv_heads * t) // 16), tiles * bn, pad)
        if q.dtype == torch.float32 or heads // kv_heads * t < 2:
            how = "moments"
        self.how, self.shared = how, None
        if how != "moments":
            self.shared = (Together if how == "together" else Shared)(kernels, q, k, v, lengths, lam, scale, table, options, window, self.probe, self.out, self.lse, self.key_mean, self.iterations,
                                                                      self.relative, state)
        todo = self.shared.todo if self.shared else None
        options |= 256 * bool(self.shared)
        self.split = (split, "lla_decode_split", (rows, splits),
                      [ptr(q), ptr(k), ptr(v), ptr(table), ptr(lengths), ptr(moments), ptr(parts), ptr(scale), ptr(todo), i32(options)] + where
                      + [i32(width), i32(pages), i32(page_size), i32(step), i32(d), i32(dv)] + rowed(q) + paged(k) + paged(v) + [i32(0)])
        self.fold = (f"lla_decode_fold_d{pad}", "lla_decode_fold", (rows, max(8, min(2 * pad * pad // 128 + 1, RESIDENT_WARPS // rows))),
                     [ptr(x) for x in (lengths, moments, parts, folded, sums, todo)] + [i32(options)] + where + [i32(splits), i32(step * bn), i32(bn)])
        self.merge = (f"lla_decode_merge_{NAMES[q.dtype]}_d{pad}", "lla_decode_merge", (rows,),
                      [ptr(x) for x in (q, k, table, lengths, folded, sums, lam, self.out, self.lse, self.key_mean, self.probe, self.iterations, self.relative, todo)]
                      + [i32(options + 64 * (table is not None))] + where + [i32(width), i32(pages), i32(page_size), i32(d), i32(dv)] + rowed(q) + paged(k)
                      + [i32(x) for x in lam.stride()] + rowed(self.out) + [f32(1e-10), i32(8 * pad), i32(state), i32(state)])
        self.whole = None
        if splits == 1 and whole is not False:
            self.whole = (variant(kernels, "lla_decode_whole", q.dtype, pad, table is not None, page_size)[0], "lla_decode_whole", (rows,),
                          [ptr(q), ptr(k), ptr(v), ptr(table), ptr(lengths), ptr(scale), ptr(lam), ptr(self.out), ptr(self.lse), ptr(self.key_mean), ptr(self.probe),
                           ptr(self.iterations), ptr(self.relative), ptr(todo), i32(options)] + where[1:] + [i32(width), i32(pages), i32(page_size), i32(d), i32(dv)]
                          + rowed(q) + paged(k) + paged(v) + [i32(0)] + [i32(x) for x in lam.stride()] + rowed(self.out)
                          + [f32(1e-10), i32(8 * pad), i32(state), i32(state)])
        self.splits = splits
        self.keep = (q, k, v, table, lengths, moments, parts, folded, sums, scale, lam)

    def __call__(self):
        for launch in self.shared.launches if self.shared else []:
            self.kernels(*launch)
        if self.whole:
            self.kernels(*self.whole)
            return self
        for launch in (self.split, self.fold, self.merge):
            self.kernels(*launch)
        return self


def reference(q, k, v, lengths, ridge, table=None, causal=True, window=None, scale=None, given=None):
    """Float64, sequence by sequence: (out, lse)."""
    batch, heads, t, d = q.shape
    group = heads // k.shape[1]
    scale = d ** -0.5 if scale is None else scale
    out, lse = torch.zeros(batch, heads, t, v.shape[-1], device=q.device, dtype=torch.float64), torch.full((batch, heads, t), -math.inf, device=q.device, dtype=torch.float64)
    for b in range(batch):
        length = int(lengths[b])
        for h in range(heads):
            kk, vv = (x[b, h // group] if table is None else x[table[b, :-(-length // x.shape[2])].long(), h // group].flatten(0, 1) for x in (k, v))
            for i in range(t):
                pos = length - t + i
                lo, hi = (max(0, pos + 1 - window) if window else 0), (pos + 1 if causal else length)
                if hi <= lo:
                    continue
                ks, vs, qs = kk[lo:hi].double(), vv[lo:hi].double(), q[b, h, i].double()
                s = scale * ks @ qs
                lse[b, h, i] = s.logsumexp(0)
                p = (s - lse[b, h, i]).exp()
                mean = p @ ks
                z = ks - mean
                lam = float(ridge[b, h, i]) if torch.is_tensor(ridge) else ridge
                eye = torch.eye(d, device=q.device, dtype=torch.float64)
                x = given[b, h, i].double() if given is not None else torch.linalg.solve((z * p[:, None]).T @ z + lam * eye, mean - qs)
                out[b, h, i] = (p * (1 - z @ x)) @ vs
    return out, lse


def line(what, errors, limit):
    global failures
    ok = all(e <= limit for e in errors.values())
    failures += not ok
    print(f"{'ok  ' if ok else 'FAIL'} {what:76s} limit {limit:.1e}  " + "  ".join(f"{n} {e:.2e}" for n, e in errors.items()), flush=True)


def tensors(batch, heads, kv_heads, t, m, d, dv, dtype, mean=0.0, kind="gaussian"):
    sigma = torch.logspace(0.7, -1.3, d, device="cuda") if kind == "anisotropic" else torch.ones(d, device="cuda")
    common = mean * torch.randn(1, kv_heads, 1, d, device="cuda")
    q = torch.randn(batch, heads, t, d, device="cuda").to(dtype)
    k = (torch.randn(batch, kv_heads, m, d, device="cuda") * sigma + common).to(dtype)
    return q, k, torch.randn(batch, kv_heads, m, dv, device="cuda").to(dtype)


def compare(kernels, what, q, k, v, lengths, ridge, limit, **args):
    lengths = torch.tensor(lengths, device="cuda")
    split_tiles, how = args.pop("split_tiles", None), args.pop("how", None)
    got = Decode(kernels, q, k, v, lengths, ridge, split_tiles=split_tiles, how=how, **args)()
    want, lse = reference(q, k, v, lengths, ridge, **args)
    seen = torch.isfinite(lse)
    errors = dict(out=error(got.out, want), lse=error(got.lse[seen], lse[seen]) if bool(seen.any()) else 0.0)
    if not torch.equal(torch.isneginf(got.lse), ~seen):
        errors["rows that see nothing"] = math.nan
    unsolved = ~seen if args.get("given") is None else torch.ones_like(seen)
    if bool(unsolved.any()):
        errors["residual without a solve"] = float(got.relative.view_as(lse)[unsolved].max() + got.iterations.view_as(lse)[unsolved].max())
    left = f", {got.how}, {got.shared.todo.float().mean():.0%} by moments" if got.shared else ""
    line(f"{what} ({got.splits} splits, {got.iterations.float().mean():.1f} steps{left})", errors, limit)
    return got, want


def pool_of(k, v, lengths, page_size, width):
    """The same keys and values in pages [pages, page_size, H, D], in random order, with a table."""
    batch, heads, m, _ = k.shape
    table = torch.randperm(batch * width + 3, device="cuda")[: batch * width].view(batch, width).int()
    pools = []
    for x in (k, v):
        pool = torch.full((batch * width + 3, page_size, heads, x.shape[-1]), math.nan, device="cuda", dtype=x.dtype)
        for b in range(batch):
            for j in range(lengths[b]):
                pool[table[b, j // page_size], j % page_size] = x[b, :, j]
        pools.append(pool.transpose(1, 2))
    return pools[0], pools[1], table


def check(kernels):
    for d in (64, 128):
        for ridge, limit in ((10.0, 2.5e-3), (1.0, 2.5e-3), (0.1, 5e-3)):
            for mean in (0.0, 10.0):
                for m in (1, 3, 100, 1000, 5000):
                    q, k, v = tensors(2, 4, 4, 1, m, d, d, torch.bfloat16, mean)
                    if mean:
                        q = (q + k[:, :, :1].float()).bfloat16()
                    compare(kernels, f"bf16 d{d} ridge {ridge} mean {mean} {m} keys", q, k, v, [m, (m + 1) // 2], ridge, limit)
        for ridge, limit in ((10.0, 2.5e-3), (1.0, 2.5e-3), (0.1, 5e-3)):
            for mean in (0.0, 10.0):
                for m in (1, 3, 100, 1000, 3000, 5000, 40000):
                    q, k, v = tensors(2, 16, 2, 1, m, d, d, torch.bfloat16, mean)
                    if mean:
                        q = (q + k[:, :, :1].repeat_interleave(8, 1).float()).bfloat16()
                    # One tile block's sums lose digits over many keys with a mean (at ridge 1 up to 4e-3 over 40000): it is chosen up to some 3000.
                    for how in ("together", "passes") if m <= (3000 if mean else 5000) else ("passes",):
                        compare(kernels, f"bf16 d{d} ridge {ridge} mean {mean} {m} keys, groups of 8", q, k, v, [m, (m + 1) // 2], ridge, limit, how=how)
        for ridge in (10.0, 1.0, 0.1):
            for group, how in ((1, "moments"), (4, "together"), (4, "passes")):
                q, k, v = tensors(2, 4, 4 // group, 1, 4000, d, d, torch.bfloat16, kind="anisotropic")
                compare(kernels, f"bf16 d{d} ridge {ridge} anisotropic, groups of {group}", q, k, v, [4000, 300], ridge, 5e-3, how=how)
        q, k, v = tensors(2, 4, 4, 1, 4000, d, d, torch.bfloat16)
        for factor in (5, 100):
            compare(kernels, f"bf16 d{d} logits {factor} times as wide", q * factor, k, v, [4000, 300], 1.0, 5e-3)
            for how in ("together", "passes"):
                compare(kernels, f"bf16 d{d} logits {factor} times as wide, groups of 4", q * factor, k[:, :1], v[:, :1], [4000, 300], 1.0, 5e-3, how=how)
        # The last step, which no pass follows, must not blow up what roundings of directions have left in one query of many.
        for factor in (1.0, 1.5, 2.0):
            for how in ("together", "passes"):
                many = tensors(8, 128, 8, 1, 1000, d, d, torch.bfloat16)
                name = f"bf16 d{d} logits {factor} times as wide, groups of 16"
                got, want = compare(kernels, name, many[0] * factor, *many[1:], [1000] * 8, 1.0, 2e-3, how=how)
                worst = ((got.out - want).norm(dim=-1) / want.norm(dim=-1)).max()
                line(f"{name}, {how}: the worst of 1024 queries", dict(out=float(worst)), 6e-3)
        # Queries perpendicular to all that keys differ by: what the matrix does to them says nothing of the rest.
        for ridge in (10.0, 1.0):
            for how, way in WAYS.items():
                few = tensors(2, 8, 8, 16, 17, d, d, torch.bfloat16)
                compare(kernels, f"bf16 d{d} ridge {ridge} queries perpendicular to the keys' differences, {how}", *perpendicular(*few), [17, 17], ridge, 2.5e-3, causal=False, **way)
        # Rows with a single one, of which a solve's residual may leave nothing.
        ones = [torch.nn.functional.one_hot(torch.randint(d, x.shape[:-1], device="cuda"), d).bfloat16() for x in (q, k)]
        for ridge in (10.0, 1.0, 0.1):
            for how, way in WAYS.items():
                compare(kernels, f"bf16 d{d} one-hot queries and keys, ridge {ridge}, {how}", ones[0], ones[1][:, :1], v[:, :1], [4000, 1], ridge, 2.5e-3, **way)
        k[:, :, :64], v[:, :, :64] = k[:, :, :64] / 256, 0
        compare(kernels, f"bf16 d{d} first keys near 0, first values 0", q, k, v, [4000, 300], 1.0, 5e-3)
        q, k, v = tensors(3, 8, 2, 5, 700, d, d, torch.bfloat16)
        ridge = torch.rand(3, 8, 5, device="cuda") * 9 + 1
        for name, args in (("causal", {}), ("window 100", dict(window=100)), ("all keys", dict(causal=False)), ("one tile a split", dict(split_tiles=1)),
                           ("given probe", dict(given=torch.randn(3, 8, 5, d, device="cuda") * 0.3)), ("scale 0", dict(scale=0.0))):
            for how, way in WAYS.items():
                compare(kernels, f"bf16 d{d} 5 queries, groups of 4, a ridge each, {name}, {how}", q, k, v, [700, 0, 5], ridge, 2.5e-3, **{**way, **args})
        k[:, :, 700:], v[1, :, 5:], k[2, :, 5:] = math.nan, math.nan, math.nan
        for how, way in WAYS.items():
            compare(kernels, f"bf16 d{d} NaN past the end, {how}", q, k, v, [700, 5, 5], ridge, 2.5e-3, **way)
            a, b = (Decode(kernels, q, k, v, torch.tensor([700, 5, 5], device="cuda"), ridge, **way)() for _ in range(2))
            line(f"bf16 d{d} the same bits again, {how}", dict(differ=float((a.out != b.out).sum() + (a.lse != b.lse).sum())), 0.0)
    for dtype in (torch.float16, torch.float32):
        for d, dv in ((64, 64), (40, 64), (128, 72)):
            try:
                for group, how in ((1, "moments"), (4, "together"), (4, "passes")):
                    q, k, v = tensors(2, 4, 4 // group, 1, 1000, d, dv, dtype)
                    compare(kernels, f"{NAMES[dtype]} d{d} dv{dv}, groups of {group}", q, k, v, [1000, 77], 1.0, 2e-3, how=how)
            except KeyError as e:
                print("skipped:", e)
    for d in (64, 128):
        for page_size in (16, 64, 256):
            q, k, v = tensors(2, 8, 2, 2, 600, d, d, torch.bfloat16)
            try:
                kp, vp, table = pool_of(k, v, [600, 131], page_size, -(-600 // page_size))
                for how, way in WAYS.items():
                    compare(kernels, f"bf16 d{d} pages of {page_size}, {how}", q, kp, vp, [600, 131], 1.0, 2.5e-3, table=table, **way)
            except KeyError as e:
                print("skipped:", e)


def copy_rate():
    """Bytes per second of a device copy, read and written."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / graph_ms(lambda: b.copy_(a)) * 1e3


def timings(kernels, quick=False):
    rate = copy_rate()
    print(f"\ndevice copy {rate / 1e12:.2f} TB/s (read and written); milliseconds\n| B, KV heads, D, group, context | decode | by moments / together / passes | share of copy rate | SDPA | ratio | error |")
    print("|---|---|---|---|---|---|---|")
    shapes = []
    for d in (64, 128):
        for batch in (1, 32):
            for m in ((16384, 131072) if quick else (512, 2048, 8192, 16384, 32768, 131072)):
                shapes += [(batch, d, group, m) for group in ((1, 8) if quick else (1, 2, 4, 8))]
    for batch, d, group, m in shapes:
        if batch * 8 * m * d * 4 > 36e9:
            continue
        k = torch.randn(batch, 8, m, d, device="cuda", dtype=torch.bfloat16)
        v = torch.randn(batch, 8, m, d, device="cuda", dtype=torch.bfloat16)
        q = torch.randn(batch, 8 * group, 1, d, device="cuda").bfloat16()
        lengths = torch.full((batch,), m)
        # Small caches would stay in L2 between repetitions; both sides have that.
        try:
            run = Decode(kernels, q, k, v, lengths, 1.0)
        except KeyError as e:
            print("skipped:", e)
            continue
        ms = graph_ms(run)
        ways = {how: Decode(kernels, q, k, v, lengths, 1.0, how=how) for how in ("moments", "together", "passes") if group > 1 or how == "moments"}
        if group > 1 and m > 8192:
            del ways["together"]  # far from fastest
        others = " / ".join(f"{graph_ms(way):.4f}" for way in ways.values())
        sdpa = graph_ms(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1))
        few = slice(0, 1), slice(0, group)
        want, _ = reference(q[few], k[few[0], :1], v[few[0], :1], lengths, 1.0)
        bytes_ = k.numel() * 4
        left = f", {run.shared.todo.float().mean():.1%} by moments" if run.shared else ""
        print(f"| {batch}, 8, {d}, {group}, {m} | {ms:.4f} {run.how} | {others} ({run.splits} splits, {run.iterations.float().mean():.1f} steps{left}) "
              f"| {bytes_ / ms * 1e3 / rate:.2f} | {sdpa:.4f} | {ms / sdpa:.2f} | {error(run.out[few], want):.1e} |", flush=True)
        del run, ways, k, v


def page_timings(kernels):
    """The same with a block table, pages in random order, beside a contiguous cache."""
    print("\n| B, KV heads, D, group, context | contiguous | pages of 16 | of 64 | errors |\n|---|---|---|---|---|")
    for d in (64, 128):
        for group in (1, 8):
            batch, m = 32, 16384
            k, v = (torch.randn(batch, 8, m, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            q, lengths = torch.randn(batch, 8 * group, 1, d, device="cuda").bfloat16(), torch.full((batch,), m)
            want = Decode(kernels, q, k, v, lengths, 1.0)
            times, errors = [graph_ms(want)], []
            for page in (16, 64):
                table = torch.randperm(batch * m // page, device="cuda").view(batch, -1).int()
                pools = []
                for x in (k, v):
                    pool = torch.empty(batch * m // page, 8, page, d, device="cuda", dtype=x.dtype)
                    pool[table.flatten().long()] = x.view(batch, 8, -1, page, d).transpose(1, 2).flatten(0, 1)
                    pools.append(pool)
                run = Decode(kernels, q, *pools, lengths, 1.0, table=table)
                times.append(graph_ms(run))
                errors.append(error(run.out, want.out))
            print(f"| {batch}, 8, {d}, {group}, {m} | " + " | ".join(f"{ms:.4f}" for ms in times) + " | " + " ".join(f"{e:.1e}" for e in errors) + " |", flush=True)


def main():
    torch.manual_seed(int(time.time()))
    kernels = Kernels(sys.argv[1])
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    if "--no-check" not in sys.argv:
        check(kernels)
        print(f"{failures} failed" if failures else "all passed")
    if "--no-time" not in sys.argv:
        timings(kernels, "--quick" in sys.argv)
        page_timings(kernels)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
