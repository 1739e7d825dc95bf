"""Launches the FlashLLA cubins on PyTorch tensors through CuPy: what the Rust engine does, in a few lines, for checks and timings."""
import math
import os
import re

import cupy
import numpy as np
import torch

CAUSAL, WINDOW, RANGES, LEAVE_ONE_OUT, GIVEN, HEAVY_FIRST = (1 << i for i in range(6))
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
i32, i64, f32 = np.int32, np.int64, np.float32
SELDOM = 8  # blocks' worth of work of a block in kernels that nearly always find nothing to do, as in crates/flashlla/src/cuda/plan.rs
LONG_FROM = {"lla_forward": 1536, "lla_backward_solve": 3072}  # mean keys per query from which on larger tiles are faster, as there


def ptr(tensor):
    return np.uint64(0 if tensor is None else tensor.data_ptr())


def aligned(x):
    """Whether `x` can be read 16 bytes at a time."""
    step = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and all(s % step == 0 for s in x.stride()[:-1]) and x.shape[-1] % step == 0


def up(x, to):
    return (x + to - 1) // to * to


def limits(tol, err, cap, options, n, m, offset, bias):
    """When solves end. `err`: the expected error of the results, or that and what it is for blocks that make no pass where every query sees its
    sequence from the first token on (which packed sequences given as ranges may do too: not looked at here)."""
    error, growing = err if isinstance(err, tuple) else (err, err)
    first = growing if options & (CAUSAL | WINDOW | RANGES) == CAUSAL and offset <= 0 and n + offset <= m and bias is None else error
    return [f32(tol * tol), f32(error * error), i32(cap), f32(first * first)]


def mean_keys(n, m, causal, offset):
    """Keys that a query sees, in the mean over the queries."""
    return min(max(offset + n // 2, 0), m) if causal else m


def usual(options, diagnostics=False):
    """Whether kernels without code for rarer options will do."""
    return options & ~(CAUSAL | HEAVY_FIRST) == 0 and not diagnostics


class Kernels:
    """Cubins of one folder, loaded when first used."""

    def __init__(self, folder):
        self.folder, self.loaded, self.trace = folder, {}, None
        self.names = [f[:-6] for f in sorted(os.listdir(folder)) if f.endswith(".cubin")]

    def find(self, entry, dtype, d, high=False, bias=False, is_aligned=False, usual=False, keys=0):
        """(name, query rows, key rows) of the variant, the unaligned one where no aligned one was compiled. `usual`: that without rarer options, where
        there is one; of these that with larger tiles where a query sees many `keys` in the mean."""
        kind = f"_{dtype}" if dtype else ""
        for which in (["1_usual"] if is_aligned and usual else []) + (["1"] if is_aligned else []) + ["0"]:
            pattern = re.compile(rf"{entry}{kind}_m(\d+)_n(\d+)_d{d}_h{int(high)}_b{int(bias)}_a{which}")
            tiles = [(int(match[2]), int(match[1]), name) for name in self.names if (match := pattern.fullmatch(name))]
            if tiles:
                n, m, name = max(tiles) if keys >= LONG_FROM.get(entry, 0) else min(tiles)
                return name, m, n
        raise KeyError(f"no {entry} for {dtype} d={d} high={high} bias={bias} in {self.folder}")

    def __call__(self, name, entry, grid, args):
        if name not in self.loaded:
            module = cupy.RawModule(path=os.path.join(self.folder, name + ".cubin"))
            self.loaded[name] = module.get_function(entry + "_entry")
        if self.trace is None:
            self.loaded[name](grid, (1, 1, 1), args)
            return
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        self.loaded[name](grid, (1, 1, 1), args)
        b.record()
        self.trace.append((entry, a, b))

    def times(self, f, repeats=7):
        """Median milliseconds of every launch in `f`, in order. The queue is kept full, so that no host time is measured."""
        f()
        runs = []
        for _ in range(repeats):
            self.trace = []
            torch.cuda._sleep(10_000_000)
            f()
            torch.cuda.synchronize()
            runs.append(self.trace)
            self.trace = None
        return [(run[0][0], float(np.median([a.elapsed_time(b) for _, a, b in run]))) for run in zip(*runs)]

    def convert(self, groups, pad, found=None):
        """Converts one or two groups of [B, H, n, d] tensors, each of one or two of the same heads and rows, to padded fp16 rows and their
        units: (rows, units, marks) for each group. `found` are largest magnitudes that a kernel has already written."""
        results, magnitudes, shape, strides = [], [], [], []
        for tensors in (groups[0], groups[-1]):
            batch, heads, rows, _ = tensors[0].shape
            padded, dev = up(rows, 128), tensors[0].device
            if len(results) < len(groups):
                amax = torch.empty(2, batch * heads, padded // 64, device=dev) if found is None else found
                results.append((torch.empty(2, batch * heads, padded, pad, device=dev, dtype=torch.float16), torch.empty(6, batch * heads, device=dev),
                                torch.empty(2, batch * heads, padded, device=dev)))
                magnitudes.append(amax)
            shape += [i32(batch * heads), i32(heads), i32(rows), i32(padded // 64)]
            for t in (tensors[0], tensors[-1]):
                strides += [i32(t.shape[-1]), i64(t.stride(0)), i64(t.stride(1)), i32(t.stride(2))]
        pairs = [(tensors[0], tensors[-1]) for tensors in (groups[0], groups[-1])]
        sources = [ptr(t) for pair in pairs for t in pair]
        both = [(r, m) for r, m in zip(results, magnitudes)]
        both = [both[0], both[-1]]
        halves = [ptr(half) for r, _ in both for half in r[0]]
        everything = [t for tensors in groups for t in tensors]
        grid = (max(m.shape[2] for m in magnitudes), max(m.shape[1] for m in magnitudes), len(everything))
        kind = f"{NAMES[everything[0].dtype]}_d{pad}_a{int(all(aligned(t) for t in everything))}"
        if found is None:
            noted = [ptr(t) for (_, unit, marks), m in both for t in (m, marks, unit)]
            self(f"lla_convert_{kind}", "lla_convert", grid, sources + noted + halves + shape + strides)
        noted = [ptr(t) for (_, unit, _), m in both for t in (m, unit)]
        grid = grid if found is not None else (-(-grid[0] // SELDOM), *grid[1:])
        self(f"lla_adjust_{kind}", "lla_adjust", grid, sources + noted + halves + shape + strides + [i32(found is None)])
        return results

    def forward(self, q, k, v, ridge, causal=True, window=None, offset=0, ranges=None, skip_self=False, given=None, bias=None,
                scale=None, tol=2e-3, err=0.0, cap=64, save=False, diagnostics=False, out=None, high=False):
        batch, heads, n, d = q.shape
        kv_heads, m, dv = k.shape[1], k.shape[2], v.shape[-1]
        pad, dev, rows = (64 if max(d, dv) <= 64 else 128), q.device, batch * heads
        [(kvh, unit, marks)] = self.convert([(k, v)], pad)
        qh = torch.empty(rows, up(n, 128), pad, device=dev, dtype=torch.float16)
        np_, mp = up(n, 128), up(m, 128)
        out = torch.empty(batch, heads, n, dv, device=dev, dtype=q.dtype) if out is None else out
        options = (CAUSAL * causal | WINDOW * (window is not None) | RANGES * (ranges is not None) | LEAVE_ONE_OUT * skip_self
                   | GIVEN * (given is not None) | HEAVY_FIRST * causal)
        lse = torch.empty(rows, n, device=dev) if save else None
        key_mean = torch.empty(rows, np_, pad, device=dev)
        probe = given if given is not None else torch.empty(rows, np_, pad, device=dev) if save else None
        kept = []
        its = torch.empty(rows, n, device=dev, dtype=torch.int32) if diagnostics else None
        res = torch.empty(rows, n, device=dev) if diagnostics else None
        lam = ridge if torch.is_tensor(ridge) else torch.tensor(float(ridge), device=dev)
        lam = lam.expand(batch, heads, n) if lam.dim() == 0 else lam
        lo, hi, scale = *(ranges or (None, None)), d ** -0.5 if scale is None else scale

        def common(block):
            bounds = block_ranges(ranges, n, block)
            kept.append(bounds)
            return [i32(options), i32(heads), i32(kv_heads), i32(n), i32(np_), i32(m), i32(mp), i32(offset), i32(window or 0),
                    ptr(lo), ptr(hi), i32(0), ptr(bounds), i32(0),
                    ptr(bias), i32(0 if bias is None else bias.stride(0)), i32(0 if bias is None else bias.stride(1))]
        kind, has = NAMES[q.dtype], bias is not None
        name, bm, _ = self.find("lla_forward", kind, pad, high, has, aligned(q) and aligned(out), usual(options, diagnostics), mean_keys(n, m, causal, offset))
        self(name, "lla_forward", (rows, -(-n // bm)),
             [ptr(q), ptr(kvh[0]), ptr(kvh[1]), ptr(unit), ptr(qh), ptr(out), ptr(key_mean), ptr(probe), ptr(lse), ptr(lam), ptr(its), ptr(res)]
             + common(bm)
             + [i32(d), i64(q.stride(0)), i64(q.stride(1)), i32(q.stride(2)), f32(scale), i32(dv), i64(out.stride(0)), i64(out.stride(1)),
                i32(out.stride(2))] + [i32(x) for x in lam.stride()] + limits(tol, err, cap, options, n, m, offset, bias)
             + [i32(save), i32(save and given is None), i32(diagnostics)])
        self.poison(kind, pad, unit, marks, out, lse, options, (rows, heads, kv_heads, n, m, mp, offset, window), lo, hi, dv, save)
        return dict(out=out, lse=lse, key_mean=key_mean, probe=probe, iterations=its, residual=res)

    def poison(self, kind, pad, unit, marks, out, lse, options, shape, lo, hi, dv, save):
        rows, heads, kv_heads, n, m, mp, offset, window = shape
        self(f"lla_poison_{kind}_d{pad}", "lla_poison", (rows, -(-n // (64 * SELDOM))),
             [ptr(unit), ptr(marks), ptr(out), ptr(lse), i32(options), i32(heads), i32(kv_heads), i32(n), i32(m), i32(mp), i32(offset), i32(window or 0),
              ptr(lo), ptr(hi), i32(0), i32(dv), i64(out.stride(0)), i64(out.stride(1)), i32(out.stride(2)), i32(save)])

    def backward(self, q, k, v, grad, saved, ridge, causal=True, window=None, offset=0, ranges=None, skip_self=False, bias=None,
                 scale=None, tol=2e-3, err=0.0, cap=64, high=False, diagnostics=False):
        """`saved` is what forward(save=True) gave."""
        batch, heads, n, d = q.shape
        kv_heads, m, dv = k.shape[1], k.shape[2], v.shape[-1]
        pad, dev, rows = (64 if max(d, dv) <= 64 else 128), q.device, batch * heads
        np_, mp = up(n, 128), up(m, 128)
        scale = d ** -0.5 if scale is None else scale
        (kvh, unit, _), (qgh, q_unit, _) = self.convert([(k, v), (q, grad)], pad)
        x = saved["probe"]
        options = CAUSAL * causal | WINDOW * (window is not None) | RANGES * (ranges is not None) | LEAVE_ONE_OUT * skip_self | HEAVY_FIRST * causal
        lo, hi = ranges or (None, None)
        lam = ridge if torch.is_tensor(ridge) else torch.tensor(float(ridge), device=dev)
        lam = lam.expand(batch, heads, n) if lam.dim() == 0 else lam
        kept = []

        def common(block):
            bounds = block_ranges(ranges, n, block)
            kept.append(bounds)
            return [i32(options), i32(heads), i32(kv_heads), i32(n), i32(np_), i32(m), i32(mp), i32(offset), i32(window or 0), ptr(lo), ptr(hi),
                    i32(0), ptr(bounds), i32(0), ptr(bias), i32(0 if bias is None else bias.stride(0)), i32(0 if bias is None else bias.stride(1))]
        kind, has = NAMES[q.dtype], bias is not None
        dq, dk, dvv = (torch.empty(t.shape, device=dev, dtype=t.dtype) for t in (q, k, v))
        solve, sm, _ = self.find("lla_backward_solve", "", pad, high, has, True, usual(options, diagnostics), mean_keys(n, m, causal, offset))
        query, qm, _ = self.find("lla_backward_query", kind, pad, False, has, aligned(dq), usual(options))
        key, _, bn = self.find("lla_backward_key", kind, pad, False, has, aligned(dk) and aligned(dvv))
        y = torch.empty(rows, np_, pad, device=dev)
        amax = torch.empty(2, rows, np_ // 64, device=dev)
        scalars = torch.empty(4, rows, np_, device=dev)
        dridge, dscale = torch.empty(2, rows, n, device=dev)
        numbers = torch.empty(rows, np_, 16, device=dev, dtype=torch.bfloat16)
        its = torch.empty(rows, n, device=dev, dtype=torch.int32) if diagnostics else None
        res = torch.empty(rows, n, device=dev) if diagnostics else None
        key_mean = saved["key_mean"]
        self(solve, "lla_backward_solve", (rows, -(-n // sm)),
             [ptr(qgh[0]), ptr(qgh[1]), ptr(kvh[0]), ptr(kvh[1]), ptr(q_unit), ptr(unit), ptr(saved["lse"]), ptr(key_mean), ptr(x), ptr(None), ptr(y),
              ptr(amax), ptr(scalars), ptr(dridge), ptr(its), ptr(res)] + common(sm) + [f32(scale), ptr(lam)] + [i32(s) for s in lam.stride()]
             + limits(tol, err, cap, options, n, m, offset, bias) + [i32(diagnostics)])
        [((xh, yh), (x_unit, y_unit, *_), _)] = self.convert([[t.view(batch, heads, np_, pad)[:, :, :n] for t in (x, y)]], pad, amax)
        dbias = torch.empty(rows, m, device=dev) if has else None
        self(query, "lla_backward_query", (rows, -(-n // qm)),
             [ptr(qgh[0]), ptr(qgh[1]), ptr(xh), ptr(yh), ptr(kvh[0]), ptr(kvh[1]), ptr(q_unit), ptr(x_unit), ptr(y_unit), ptr(unit),
              ptr(key_mean), ptr(y), ptr(saved["lse"]), ptr(scalars), ptr(numbers), ptr(dq), ptr(dscale)]
             + common(qm) + [i32(d), i64(dq.stride(0)), i64(dq.stride(1)), i32(dq.stride(2)), f32(scale)])
        first = end = None
        blocks = -(-m // bn)
        if ranges is not None:
            seen = visible(n, m, ranges=ranges, device=dev)
            seen = torch.nn.functional.pad(seen, (0, blocks * bn - m)).view(n, blocks, bn).any(-1)
            index = torch.arange(n, device=dev)[:, None]
            first = torch.where(seen, index, n).amin(0).int().contiguous()
            end = torch.where(seen, index + 1, 0).amax(0).int().contiguous()
        self(key, "lla_backward_key", (batch * kv_heads, blocks),
             [ptr(qgh[0]), ptr(qgh[1]), ptr(xh), ptr(yh), ptr(kvh[0]), ptr(kvh[1]), ptr(q_unit), ptr(x_unit), ptr(y_unit), ptr(unit), ptr(numbers),
              ptr(dk), ptr(dvv), ptr(dbias), ptr(first), ptr(end), i32(0), i32(options), i32(heads), i32(kv_heads), i32(n), i32(np_), i32(m), i32(mp),
              i32(offset), i32(window or 0), ptr(lo), ptr(hi), i32(0), ptr(bias), i32(0 if bias is None else bias.stride(0)),
              i32(0 if bias is None else bias.stride(1)), i32(d), i32(dv), i64(dk.stride(0)), i64(dk.stride(1)), i32(dk.stride(2)),
              i64(dvv.stride(0)), i64(dvv.stride(1)), i32(dvv.stride(2)), f32(scale)])
        return dict(dq=dq, dk=dk, dv=dvv, dridge=dridge.view(batch, heads, n), dscale=dscale.view(batch, heads, n), dbias=dbias, iterations=its, residual=res)


def block_ranges(ranges, n, block):
    """Bounds of the first and end keys of every block of queries."""
    if ranges is None:
        return None
    low, high = (torch.cat([t, t[-1:].expand(up(n, block) - n)]).view(-1, block) for t in ranges)
    return torch.stack([low.amin(1), low.amax(1), high.amin(1), high.amax(1)], 1).int().contiguous()


def perpendicular(q, k, v):
    """The same with all keys but the last equal, and queries perpendicular, up to rounding, to the difference of the two. As many query heads as key heads."""
    k = torch.cat([k[:, :, :1].expand(-1, -1, k.shape[2] - 1, -1), k[:, :, -1:]], 2).contiguous()
    u, wide = (k[:, :, -1:].double() - k[:, :, :1].double()), q.double()
    return (wide - (wide * u).sum(-1, keepdim=True) / (u * u).sum(-1, keepdim=True) * u).to(q.dtype), k, v


def gradients(q, k, v, grad, ridge, mask, scale=None, bias=None):
    """Float64 gradients by automatic differentiation of the dense form; a mask without empty rows."""
    leaves = [t.double().detach().requires_grad_() for t in (q, k, v)]
    lam = (ridge.double() if torch.is_tensor(ridge) else torch.tensor(float(ridge), device=q.device, dtype=torch.float64)).expand(q.shape[:3]).clone().requires_grad_()
    sc = torch.tensor(q.shape[-1] ** -0.5 if scale is None else scale, device=q.device, dtype=torch.float64, requires_grad=True)
    bd = None if bias is None else bias.double().detach().requires_grad_()
    group = q.shape[1] // k.shape[1]
    qq, kk, vv = leaves[0], leaves[1].repeat_interleave(group, 1), leaves[2].repeat_interleave(group, 1)
    s = sc * qq @ kk.transpose(-1, -2)
    if bd is not None:
        s = s + bd[:, :, None, :]
    p = torch.softmax(s.masked_fill(~mask, -math.inf), -1)
    kb = p @ kk
    eye = torch.eye(q.shape[-1], device=q.device, dtype=torch.float64)
    total = 0
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            z = p[b, h][:, :, None] * kk[b, h][None]
            cov = z.transpose(1, 2) @ kk[b, h] - kb[b, h][:, :, None] * kb[b, h][:, None, :]
            x = torch.linalg.solve(cov + lam[b, h][:, None, None] * eye, kb[b, h] - qq[b, h])
            a = 1 + (x * kb[b, h]).sum(-1, keepdim=True) - x @ kk[b, h].T
            total = total + (((p[b, h] * a) @ vv[b, h]) * grad[b, h].double()).sum()
    wanted = leaves + [lam, sc] + ([] if bd is None else [bd])
    return torch.autograd.grad(total, wanted)


def visible(n, m, causal=True, window=None, offset=0, ranges=None, skip_self=False, device="cuda"):
    """[n, m] mask of the keys that each query sees."""
    pos = torch.arange(n, device=device)[:, None] + offset
    key = torch.arange(m, device=device)[None]
    mask = torch.ones(n, m, dtype=torch.bool, device=device)
    if causal:
        mask &= key <= pos
    if window is not None:
        mask &= key > pos - window
    if ranges is not None:
        mask = (key >= ranges[0][:, None]) & (key < ranges[1][:, None])
    if skip_self:
        mask &= key != pos
    return mask


def reference(q, k, v, ridge, mask, scale=None, bias=None, given=None, rows=None):
    """Dense float64 by the covariance form; `rows` limits the queries."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lam = ridge.double() if torch.is_tensor(ridge) else torch.full(q.shape[:3], float(ridge), device=q.device, dtype=torch.float64)
    lam = lam.expand(q.shape[:3])
    rows = torch.arange(q.shape[2], device=q.device) if rows is None else rows
    outs, probes, lses = [], [], []
    eye = torch.eye(q.shape[-1], device=q.device, dtype=torch.float64)
    for part in rows.split(256):
        qs, ms = q[:, :, part], mask[part]
        s = scale * qs @ k.transpose(-1, -2)
        if bias is not None:
            s = s + bias.double()[:, :, None, :]
        s = s.masked_fill(~ms, -math.inf)
        lse = s.logsumexp(-1)
        p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0)[..., None])
        kb, vb = p @ k, p @ v
        x = torch.zeros_like(qs)
        if given is not None:
            x = given.double()[:, :, part]
        else:
            for b in range(q.shape[0]):
                for h in range(q.shape[1]):
                    c = torch.einsum("ij,jd,je->ide", p[b, h], k[b, h], k[b, h]) - kb[b, h][:, :, None] * kb[b, h][:, None, :]
                    x[b, h] = torch.linalg.solve(c + lam[b, h, part][:, None, None] * eye, kb[b, h] - qs[b, h])
        a = 1 + (x * kb).sum(-1, keepdim=True) - x @ k.transpose(-1, -2)
        outs.append(torch.where(ms.any(-1)[:, None], (p * a) @ v, 0))
        probes.append(x)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(probes, 2), torch.cat(lses, 2)


def error(got, want):
    """Relative Frobenius error; NaN if either holds one."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def graph_ms(f, repeats=11):
    """Median time of one call, from replays of a captured graph: free of the host's launch cost."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), cupy.cuda.Stream.from_external(stream):
        f()
        f()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            f()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b) / 2)
    return float(np.median(times))
