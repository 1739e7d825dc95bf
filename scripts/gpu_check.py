"""Checks and times the GPU kernels against float64 PyTorch: `python3 gpu_check.py FOLDER [--no-check] [--no-time]`.

FOLDER holds the cubins that `cargo xtask kernels` leaves in target/kernels/sm_90. Needs PyTorch and CuPy. Every check draws fresh
inputs; NaN never passes. The last lines are a table: time and ratio to scaled_dot_product_attention on the same tensors.
"""
import sys
import time

import torch

from gpu_kernels import Kernels, error, gradients, graph_ms, perpendicular, reference, visible

TOLERANCE = {64: 3e-3, 128: 2.1e-3}  # what the library passes by default, beside
# The expected errors of outputs and gradients at which its solves end, and those at which they make no pass where contexts grow.
ERRORS = (2.2e-3, 5.4e-3), (2.5e-3, 5e-3)
SHAPES = [(64, 1024, 64), (16, 4096, 64), (4, 16384, 64), (32, 1024, 128), (8, 4096, 128), (2, 16384, 128)]
failures = 0


def line(what, errors, limit):
    global failures
    ok = all(e <= limit for e in errors.values())
    failures += not ok
    print(f"{'ok  ' if ok else 'FAIL'} {what:58s} limit {limit:.1e}  " + "  ".join(f"{n} {e:.2e}" for n, e in errors.items()), flush=True)


def tensors(kind, batch, heads, kv_heads, n, m, d, dv, dtype):
    sigma = torch.logspace(0.7, -1.3, d, device="cuda") if kind == "anisotropic" else torch.ones(d, device="cuda")
    q = torch.randn(batch, heads, n, d, device="cuda").to(dtype)
    k = (torch.randn(batch, kv_heads, m, d, device="cuda") * sigma).to(dtype)
    v = torch.randn(batch, kv_heads, m, dv, device="cuda").to(dtype)
    return q, k, v, torch.randn(batch, heads, n, dv, device="cuda").to(dtype)


def masks(n, m):
    """Name and mask arguments; the ranges are three packed sequences, causal inside."""
    cuts = [0, n // 5, n // 2, n]
    start = torch.zeros(n, dtype=torch.int32, device="cuda")
    for a, b in zip(cuts, cuts[1:]):
        start[a:b] = a
    end = torch.arange(1, n + 1, dtype=torch.int32, device="cuda")
    yield "full", dict(causal=False)
    yield "causal with offset", dict(causal=True, offset=m - n)
    yield "causal window", dict(causal=True, window=max(m // 3, 1), offset=m - n)
    if n == m:
        yield "window alone", dict(causal=False, window=max(m // 3, 1))
        yield "leave one out", dict(causal=False, skip_self=True)
        yield "packed", dict(causal=False, ranges=(start, end))


def check(kernels):
    for dtype, limit in ((torch.bfloat16, 2.5e-3), (torch.float16, 1.5e-3), (torch.float32, 1.5e-3)):
        for n, m, d, dv in ((257, 257, 64, 64), (70, 301, 128, 128), (129, 129, 40, 33), (1, 5, 64, 64)):
            q, k, v, g = tensors("gaussian", 2, 4, 2, n, m, d, dv, dtype)
            for name, args in masks(n, m):
                mask = visible(n, m, **args)
                # Solved further than the library does: a single query's residual may be all of its tolerance.
                saved = kernels.forward(q, k, v, 10.0, save=True, tol=3e-4, **args)
                want, probe, lse = reference(q, k, v, 10.0, mask)
                finite = mask.any(-1)
                got_lse = saved["lse"].view(lse.shape)
                errors = dict(out=error(saved["out"], want), lse=error(got_lse[:, :, finite], lse[:, :, finite]))
                if not bool((torch.isneginf(got_lse[:, :, ~finite]).all())):
                    errors["empty rows"] = float("nan")
                line(f"forward {str(dtype)[6:]} {n}x{m} d{d} dv{dv} {name}", errors, limit)
                if bool(finite.all()) and n > 1:
                    got = kernels.backward(q, k, v, g, saved, 10.0, tol=3e-4, **args)
                    ref = gradients(q, k, v, g, 10.0, mask)
                    line(f"   backward", {x: error(got[x], r) for x, r in zip(("dq", "dk", "dv", "dridge"), ref)}, 6e-3)
    # per-query ridge, bias, strides, given probe, high
    q, k, v, g = tensors("gaussian", 1, 4, 4, 200, 200, 64, 64, torch.bfloat16)
    mask = visible(200, 200)
    ridge = torch.rand(1, 4, 200, device="cuda") * 9 + 1
    line("ridge per query", dict(out=error(kernels.forward(q, k, v, ridge)["out"], reference(q, k, v, ridge, mask)[0])), 2.5e-3)
    bias = torch.randn(1, 4, 200, device="cuda")
    saved = kernels.forward(q, k, v, 10.0, bias=bias, save=True)
    line("bias", dict(out=error(saved["out"], reference(q, k, v, 10.0, mask, bias=bias)[0])), 2.5e-3)
    got, ref = kernels.backward(q, k, v, g, saved, 10.0, bias=bias), gradients(q, k, v, g, 10.0, mask, bias=bias)
    line("   backward", {x: error(got[x].reshape(r.shape), r) for x, r in (("dq", ref[0]), ("dk", ref[1]), ("dv", ref[2]), ("dbias", ref[5]))}, 6e-3)
    given = torch.randn(4, 256, 64, device="cuda") * 0.3
    given[:, 200:] = 0
    line("given probe", dict(out=error(kernels.forward(q, k, v, 10.0, given=given)["out"], reference(q, k, v, 10.0, mask, given=given.view(1, 4, 256, 64))[0])), 2.5e-3)
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    line("rows between heads", dict(out=error(kernels.forward(*swapped, 10.0)["out"], reference(q, k, v, 10.0, mask)[0])), 2.5e-3)
    odd = [torch.nn.functional.pad(t, (0, 1))[..., :-1] for t in (q, k, v)]
    line("odd row stride", dict(out=error(kernels.forward(*odd, 10.0)["out"], reference(q, k, v, 10.0, mask)[0])), 2.5e-3)
    big, small = q.float() * 1e-4, k.float() * 1e6
    line("keys of 1e6", dict(out=error(kernels.forward(big, small, v.float(), 1e13, scale=1e-3)["out"], reference(big, small, v.float(), 1e13, mask, scale=1e-3)[0])), 2.5e-3)
    # Units are guessed from a head's first 16 rows: others far larger, and first rows that say nothing. 1500 rows are more than the blocks that put a
    # guess right take at once.
    for n in (300, 1500):
        for what in ("rows 100 times as large as the first", "first rows 1e-4 of the others", "first rows zero"):
            for d in (64, 128):
                q, k, v, g = tensors("gaussian", 1, 2, 2, n, n, d, d, torch.bfloat16)
                if what.startswith("rows"):
                    q, k[:, 1, n - 100], v[0, 0, n - 50], g[0, 1, n - 30] = q / 30, k[:, 1, n - 100] * 100, v[0, 0, n - 50] * 1000, g[0, 1, n - 30] * 100
                    q[0, 0, n - 20] *= 100
                else:
                    small = 0.0 if "zero" in what else 1e-4
                    k[:, :, :16], v[:, 1, :20], q[:, 0, :16], g[:, :, :16] = k[:, :, :16] * small, v[:, 1, :20] * small, q[:, 0, :16] * small, g[:, :, :16] * small
                saved, mask = kernels.forward(q, k, v, 10.0, tol=3e-4, save=True), visible(n, n)
                line(f"{what}, {n} rows, d{d}", dict(out=error(saved["out"], reference(q, k, v, 10.0, mask)[0])), 2.5e-3)
                got, ref = kernels.backward(q, k, v, g, saved, 10.0, tol=3e-4), gradients(q, k, v, g, 10.0, mask)
                errors = {x: error(got[x], r) for x, r in zip(("dq", "dk", "dv"), ref)}
                if what.startswith("rows"):
                    # A key a hundred times as long as the others makes a hundred times as much of what fp16 leaves of y and the probe: queries
                    # that see it have a dq of another precision (docs/performance.md). Its own dv is next to nothing, for they fit its value: it counts
                    # as a part of its head's.
                    own = torch.zeros(2, n, dtype=torch.bool, device="cuda")
                    own[1, n - 100:] = True
                    wrong = got["dv"][:, 1, n - 100].double() - ref[2][:, 1, n - 100]
                    line("   dq of queries that see the long key", dict(dq=error(got["dq"][:, own], ref[0][:, own])), 1.0)
                    line("   dv of the long key", dict(dv=float(wrong.norm() / ref[2][:, 1].norm())), 5e-2)
                    errors["dq"] = error(got["dq"][:, ~own], ref[0][:, ~own])
                    own[1, n - 99:] = False
                    errors["dv"] = error(got["dv"][:, ~own], ref[2][:, ~own])
                line("   backward", errors, 6e-3)
    for kind, ridge, high, limit in (("gaussian", 10.0, False, 2.5e-3), ("gaussian", 1.0, False, 2.5e-3), ("gaussian", 0.1, True, 3e-3),
                                     ("gaussian", 0.01, True, 3e-3), ("anisotropic", 1.0, True, 3e-3), ("anisotropic", 0.1, True, 3e-3)):
        for d in (64, 128):
            q, k, v, _ = tensors(kind, 1, 2, 2, 1024, 1024, d, d, torch.bfloat16)
            limits = dict(tol=1e-4) if high else dict(tol=TOLERANCE[d], err=ERRORS[0])
            got = kernels.forward(q, k, v, ridge, high=high, cap=400, diagnostics=True, **limits)
            line(f"{kind} ridge {ridge} d{d} {'high' if high else 'default'} ({got['iterations'].float().mean():.1f} iterations)",
                 dict(out=error(got["out"], reference(q, k, v, ridge, visible(1024, 1024))[0])), limit)
    # Where no pass is made, what is left is as large as it may be where all queries see as many keys. Which ridges make such cases depends on how many.
    for ridge in (1.0, 3.0, 10.0, 30.0, 100.0):
        for d in (64, 128):
            errors = {}
            for n in (512, 1024, 3072, 6144):
                q, k, v, _ = tensors("gaussian", 1, 2, 2, n, n, d, d, torch.bfloat16)
                rows = torch.arange(0, n, max(n // 512, 1), device="cuda")
                for name, causal in (("full", False), ("causal", True)):
                    got = kernels.forward(q, k, v, ridge, tol=TOLERANCE[d], err=ERRORS[0], causal=causal)
                    errors[f"{name} {n}"] = error(got["out"][:, :, rows], reference(q, k, v, ridge, visible(n, n, causal=causal), rows=rows)[0])
            line(f"gaussian ridge {ridge} d{d}, default", errors, 2.6e-3)
    # Where a key has much of a query's weight, roundings along it grow from step to step, and a last step that no pass follows must not meet them
    # unseen: without care one query in thousands is off by a tenth.
    for wide in (1.5, 2.0):
        for d in (64, 128):
            errors = {}
            for n in (1024, 4096):
                q, k, v, _ = tensors("gaussian", 1, 8, 8, n, n, d, d, torch.bfloat16)
                q = (q * wide).bfloat16()
                for name, causal in (("full", False), ("causal", True)):
                    got = kernels.forward(q, k, v, 1.0, tol=TOLERANCE[d], err=ERRORS[0], causal=causal)["out"]
                    want = reference(q, k, v, 1.0, visible(n, n, causal=causal))[0]
                    errors[f"{name} {n}"] = max(error(got[:, h], want[:, h]) for h in range(8))
            line(f"logits {wide} times as wide, ridge 1, d{d}, worst head", errors, 2.5e-3)
            q, k, v, g = tensors("gaussian", 1, 2, 2, 1024, 1024, d, d, torch.bfloat16)
            q = (q * wide).bfloat16()
            saved = kernels.forward(q, k, v, 1.0, tol=TOLERANCE[d], err=ERRORS[0], save=True)
            got, ref = kernels.backward(q, k, v, g, saved, 1.0, tol=TOLERANCE[d], err=ERRORS[1]), gradients(q, k, v, g, 1.0, visible(1024, 1024))
            # The expected error of gradients was measured on logits of width 1.
            line("   backward", {x: error(got[x], r) for x, r in zip(("dq", "dk", "dv"), ref)}, 6e-3 if wide < 2 else 8e-3)
    # Queries perpendicular to all that the keys differ by: what A does to them says nothing of what it does to the rest of the first residual.
    for d in (64, 128):
        q, k, v, g = tensors("gaussian", 1, 4, 4, 256, 17, d, d, torch.bfloat16)
        (q, k, v), mask = perpendicular(q, k, v), visible(256, 17, causal=False)
        for ridge in (10.0, 1.0):
            want = reference(q, k, v, ridge, mask)[0]
            errors = {name: error(kernels.forward(q, k, v, ridge, causal=False, **how)["out"], want)
                      for name, how in (("residuals", dict(tol=3e-4)), ("high", dict(tol=1e-4, high=True)))}
            line(f"queries perpendicular to the keys' differences, ridge {ridge}, d{d}", errors, 2.5e-3)
            saved = kernels.forward(q, k, v, ridge, causal=False, save=True, tol=TOLERANCE[d], err=ERRORS[0])
            # What the default allows follows from |C q|^2 / q.Cq, which is made of roundings here: too much at ridge 1 and D = 128 (docs/performance.md).
            line("   default", dict(out=error(saved["out"], want)), 6e-3 if (ridge, d) == (1.0, 128) else 2.5e-3)
            got, ref = kernels.backward(q, k, v, g, saved, ridge, causal=False, tol=TOLERANCE[d], err=ERRORS[1]), gradients(q, k, v, g, ridge, mask)
            line("   backward", {x: error(got[x], r) for x, r in zip(("dq", "dk", "dv"), ref)}, 6e-3)
    # a key that is no number, an infinite value, a query that is no number: only who sees them
    for n in (300, 1500):
        q, k, v, _ = tensors("gaussian", 1, 2, 2, n, n, 64, 64, torch.bfloat16)
        want = reference(q, k, v, 10.0, visible(n, n))[0]
        k[0, 0, n // 2, 3], v[0, 1, n - 20, 0], q[0, 0, 20, 1] = float("nan"), float("inf"), float("nan")
        out = kernels.forward(q, k, v, 10.0)["out"]
        hit = torch.isnan(out).any(-1)
        expected = torch.zeros_like(hit)
        expected[0, 0, n // 2:], expected[0, 1, n - 20:], expected[0, 0, 20] = True, True, True
        line(f"not-a-number stays where it is seen, {n} rows", dict(out=error(out[~expected], want[~expected]), rows=float((hit != expected).sum())), 2.5e-3)
    q, k, v, g = tensors("gaussian", 1, 2, 1, 333, 333, 64, 64, torch.bfloat16)
    runs = []
    for _ in range(2):
        saved = kernels.forward(q, k, v, 10.0, save=True)
        grads = kernels.backward(q, k, v, g, saved, 10.0)
        runs.append([saved["out"], grads["dq"], grads["dk"], grads["dv"]])
    line("the same bits again", dict(differ=float(sum((a != b).sum() for a, b in zip(*runs)))), 0.0)
    # What most calls use has kernels of its own: diagnostics take the others.
    for d in (64, 128):
        for causal in (True, False):
            q, k, v, g = tensors("gaussian", 1, 4, 2, 700, 700, d, d, torch.bfloat16)
            runs = []
            for diagnostics in (False, True):
                how = dict(causal=causal, tol=TOLERANCE[d], diagnostics=diagnostics)
                saved = kernels.forward(q, k, v, 3.0, err=ERRORS[0], save=True, **how)
                grads = kernels.backward(q, k, v, g, saved, 3.0, err=ERRORS[1], **how)
                runs.append([saved["out"], saved["lse"], grads["dq"], grads["dk"], grads["dv"]])
            line(f"the same bits with diagnostics, d{d}, {'causal' if causal else 'full'}", dict(differ=float(sum((a != b).sum() for a, b in zip(*runs)))), 0.0)


def timings(kernels):
    print("\nbf16, causal, ridge 10, the library's default tolerance; milliseconds, ratio to scaled_dot_product_attention in brackets")
    print("| B, N, D | forward | SDPA | error of out at ridge 10 / 1 | passes | backward | SDPA | error of dq dk dv at ridge 10 / 1 |")
    print("|---|---|---|---|---|---|---|---|")
    parts = []
    for heads, n, d in SHAPES:
        q, k, v, g = tensors("gaussian", 1, heads, heads, n, n, d, d, torch.bfloat16)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        base = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
        f = graph_ms(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        for _ in range(5):
            torch.autograd.grad(base, leaves, g, retain_graph=True)
        times = []
        for _ in range(5):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(20_000_000)  # the queue fills while the device waits: no host time between the calls
            a.record()
            for _ in range(10):
                torch.autograd.grad(base, leaves, g, retain_graph=True)
            b.record()
            torch.cuda.synchronize()
            times.append(a.elapsed_time(b) / 10)
        back = sorted(times)[2]
        lam = torch.full((1, heads, n), 10.0, device="cuda")
        ahead, back_too = (dict(tol=TOLERANCE[d], err=e) for e in ERRORS)
        out = torch.empty_like(q)
        tf = graph_ms(lambda: kernels.forward(q, k, v, lam, **ahead, out=out))
        saved = kernels.forward(q, k, v, lam, **ahead, save=True)
        tb = graph_ms(lambda: kernels.backward(q, k, v, g, saved, lam, **back_too))
        for what, call in (("forward", lambda: kernels.forward(q, k, v, lam, **ahead, out=out)),
                           ("backward", lambda: kernels.backward(q, k, v, g, saved, lam, **back_too))):
            parts.append(f"{heads}, {n}, {d} {what}: " + " ".join(f"{entry[4:]} {ms:.3f}" for entry, ms in kernels.times(call)))
        part = slice(0, 2)
        rows = torch.cat([torch.arange(256, device="cuda"), torch.randint(256, n, (256,), device="cuda").sort()[0]])
        errs, grads = [], []
        for ridge in (10.0, 1.0):
            if ridge == 10.0:
                passes = kernels.forward(q, k, v, ridge, **ahead, diagnostics=True)["iterations"].float().mean().item()
            # Of the kernels that are timed: diagnostics take others.
            got = kernels.forward(q, k, v, ridge, **ahead)
            errs.append(error(got["out"][:, part, rows], reference(q[:, part], k[:, part], v[:, part], ridge, visible(n, n), rows=rows)[0]))
            if n <= 1024:
                got = kernels.backward(q, k, v, g, kernels.forward(q, k, v, ridge, **ahead, save=True), ridge, **back_too)
                ref = gradients(*(t[:, :1] for t in (q, k, v, g)), ridge, visible(n, n))
                grads.append(" ".join(f"{error(got[x][:, :1], r):.1e}" for x, r in zip(("dq", "dk", "dv"), ref)))
        print(f"| {heads}, {n}, {d} | {tf:.3f} ({tf / f:.2f}) | {f:.4f} | {errs[0]:.1e} / {errs[1]:.1e} | {passes:.2f} | {tb:.3f} ({tb / back:.2f}) "
              f"| {back:.4f} | {' / '.join(grads)} |", flush=True)
    print("\neach launch, milliseconds\n" + "\n".join(parts))


def long_contexts(kernels):
    """One head, with the memory that everything takes together: inputs, outputs, gradients and scratch."""
    print("\none head; milliseconds, ratio to scaled_dot_product_attention in brackets\n| N, D | forward | backward | peak memory, inputs and outputs in it |\n|---|---|---|---|")
    for d in (64, 128):
        for n in (32768, 65536, 131072):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            q, k, v, g = tensors("gaussian", 1, 1, 1, n, n, d, d, torch.bfloat16)
            lam = torch.full((1, 1, n), 10.0, device="cuda")
            ahead, back_too = (dict(tol=TOLERANCE[d], err=e) for e in ERRORS)
            saved = kernels.forward(q, k, v, lam, **ahead, save=True)
            kernels.backward(q, k, v, g, saved, lam, **back_too)
            torch.cuda.synchronize()
            peak, own = torch.cuda.max_memory_allocated() - before, 8 * n * d * 2
            f = graph_ms(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), 5)
            tf = graph_ms(lambda: kernels.forward(q, k, v, lam, **ahead), 5)
            tb = graph_ms(lambda: kernels.backward(q, k, v, g, saved, lam, **back_too), 5)
            print(f"| {n}, {d} | {tf:.2f} ({tf / f:.2f}) | {tb:.2f} | {peak / 2**20:.0f} MiB, {own / 2**20:.0f} MiB |", flush=True)
            del q, k, v, g, lam, saved


def main():
    torch.manual_seed(int(time.time()))
    kernels = Kernels(sys.argv[1])
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    if "--no-check" not in sys.argv:
        check(kernels)
        print(f"{failures} failed" if failures else "all passed")
    if "--no-time" not in sys.argv:
        timings(kernels)
        long_contexts(kernels)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
