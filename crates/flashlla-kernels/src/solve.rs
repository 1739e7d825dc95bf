//! Conjugate gradients for the probe: `A x = kbar - q` with `A = C + ridge`, one system per query, `BM` of them at once.
//!
//! Search directions and probes are rounded to fp16 after a power-of-two scaling per row (`HIGH` = 1: in two terms), and the
//! weights carry a power of two so that small ones stay in fp16's normal range.
//!
//! A block ends when every row's residual *after one more step* is predicted to be under the tolerance: that step needs the next
//! direction, which is known, and its length, for which the last one's stands. It costs no pass over the keys.

#[cutile::module]
pub mod solve {
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// Grid (batch * heads, blocks of BM queries).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_solve<const BM: i32, const BN: i32, const D: i32, const HIGH: i32, const BIAS: i32>(
        qh: *mut f16,       // [batch * heads, np, D], by lla_weights
        kh: *mut f16,       // [batch * kv_heads, mp, D]
        unit: *mut f32,     // [2, batch * kv_heads]
        key_mean: *mut f32, // [batch * heads, np, D], by lla_weights
        row: *mut f32, // [8, batch * heads, np]: rows 0..2 by lla_weights; out: 3 -(unit of xh * unit of keys), 4 1 + x.kbar,
        // 5 -lse + log2 of the output boost, 6 1 / that boost
        xh: *mut f16, // out [1 + HIGH, batch * heads, np, D]: x / row unit, and what that rounding left
        x_out: *mut f32, // out [batch * heads, np, D] if save_probe; in if option 16
        rhs: *mut f32, // [batch * heads, np, D]: right-hand side instead of kbar - q, option 64 only
        ridge: *mut f32, // [batch, heads, n], strided
        iterations: *mut i32, // out [batch * heads, n] if diagnostics
        residual: *mut f32, // out [batch * heads, n] if diagnostics
        options: i32,
        heads: i32,
        kv_heads: i32,
        n: i32,
        np: i32, // n rounded up to 128
        m: i32,
        mp: i32, // m rounded up to 128
        offset: i32,
        window: i32,
        lo: *mut i32, // [batch, n]: first visible key; option 4 only
        hi: *mut i32, // [batch, n]: one past the last
        range_batch: i32,
        bounds: *mut i32, // [batch, blocks of BM queries, 4]: min lo, max lo, min hi, max hi; option 4 only
        bounds_batch: i32,
        bias: *mut f32, // [batch, heads, m], strided, unit last; BIAS = 1 only
        bias_batch: i32,
        bias_head: i32,
        ridge_batch: i32,
        ridge_head: i32,
        ridge_row: i32,
        tolerance2: f32,
        max_iterations: i32,
        save_probe: i32,
        diagnostics: i32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let grid: (i32, i32, i32) = get_num_tile_blocks();
        let bh: i32 = pid.0;
        let batch: i32 = bh / heads;
        let head: i32 = bh % heads;
        let kv: i32 = batch * kv_heads + head / (heads / kv_heads);
        let kvs: i32 = grid.0 / heads * kv_heads;
        let mi: i32 = block_index(options, pid.1, grid.1);
        let first: i32 = mi * BM;
        let rows: i32 = n - first;
        let tile: i32 = bh * (np / BM) + mi;
        let at_row: i64 = wide(bh) * wide(np) + wide(first);
        let all_rows: i64 = wide(grid.0) * wide(np);
        let pos: Tile<i32, { [BM, 1] }> = positions::<BM>(first, n, offset);
        let range_at: i64 = wide(batch) * wide(range_batch) + wide(first);
        let row_lo: Tile<i32, { [BM, 1] }> = first_keys::<BM>(options, pos, m, window, lo, range_at, rows);
        let row_hi: Tile<i32, { [BM, 1] }> = end_keys::<BM>(options, pos, m, hi, range_at, rows);
        let skip: Tile<i32, { [BM, 1] }> = skipped_keys::<BM>(options, pos);
        // Key tiles [begin, end); every row sees all of [full0, full1).
        let last: i32 = min(first + BM, n) - 1i32;
        let bounds_at: i64 = wide(batch * bounds_batch + mi * 4i32);
        let begin: i32 = bound(0i32, options, bounds, bounds_at, first, last, offset, m, window) / BN;
        let end: i32 =
            max(ceil_div(bound(3i32, options, bounds, bounds_at, first, last, offset, m, window), BN), begin);
        let mut full0: i32 =
            ceil_div(bound(1i32, options, bounds, bounds_at, first, last, offset, m, window), BN);
        let mut full1: i32 = bound(2i32, options, bounds, bounds_at, first, last, offset, m, window) / BN;
        if (full1 <= full0) || ((options & 8i32) != 0i32) {
            full0 = begin;
            full1 = begin;
        }
        let kt0: Tensor<f16, { [-1, D] }> = packed::<f16, D>(kh, kvs * mp);
        let kp: Partition<f16, { [BN, D] }> = kt0.partition(const_shape![BN, D]);
        let kv0: i32 = kv * (mp / BN);
        let ku: f32 = load_scalar(slice::<f32>(unit, wide(kv)));
        let zero: Tile<f32, { [BM, 1] }> = constant(0.0f32, const_shape![BM, 1]);
        let one: Tile<f32, { [BM, 1] }> = constant(1.0f32, const_shape![BM, 1]);
        let kun: Tile<f32, { [BM, 1] }> = broadcast_scalar(ku, const_shape![BM, 1]);
        let never: Tile<f32, { [BM, BN] }> = constant(f32::NEG_INFINITY, const_shape![BM, BN]);
        let bias_at: i64 = wide(batch) * wide(bias_batch) + wide(head) * wide(bias_head);

        let qt0: Tensor<f16, { [-1, D] }> = packed::<f16, D>(qh, grid.0 * np);
        let qp: Partition<f16, { [BM, D] }> = qt0.partition(const_shape![BM, D]);
        let tq: Tile<f16, { [BM, D] }> = qp.load([tile, 0i32]);
        let sc_true: Tile<f32, { [BM, 1] }> = load_rowwise_product::<BM>(slice::<f32>(row, at_row), 1i32, BM);
        let mut sc: Tile<f32, { [BM, 1] }> = sc_true;
        if BIAS == 1i32 {
            sc = one;
        }
        let shift: Tile<f32, { [BM, 1] }> =
            load_rowwise_product::<BM>(slice::<f32>(row, all_rows + at_row), 1i32, BM);
        let qu: Tile<f32, { [BM, 1] }> =
            load_rowwise_product::<BM>(slice::<f32>(row, all_rows + all_rows + at_row), 1i32, BM);
        let mt0: Tensor<f32, { [-1, D] }> = packed::<f32, D>(key_mean, grid.0 * np);
        let mp0: Partition<f32, { [BM, D] }> = mt0.partition(const_shape![BM, D]);
        let kbar: Tile<f32, { [BM, D] }> = as_product::<BM, D>(mp0.load([tile, 0i32]));
        let least: Tile<f32, { [BM, 1] }> = constant(1.0e-30f32, const_shape![BM, 1]);
        let lam: Tile<f32, { [BM, 1] }> = load_rowwise_product::<BM>(
            slice::<f32>(
                ridge,
                wide(batch) * wide(ridge_batch)
                    + wide(head) * wide(ridge_head)
                    + wide(first) * wide(ridge_row),
            ),
            ridge_row,
            rows,
        );
        let zero_i: Tile<i32, { [BM, 1] }> = constant(0i32, const_shape![BM, 1]);
        let one_i: Tile<i32, { [BM, 1] }> = constant(1i32, const_shape![BM, 1]);
        let inv_ku: Tile<f32, { [BM, 1] }> = one / kun;
        let origin: Tile<f32, { [BM, D] }> = constant(0.0f32, const_shape![BM, D]);
        let mut x: Tile<f32, { [BM, D] }> = origin;
        let mut count: Tile<i32, { [BM, 1] }> = zero_i;
        let mut res: Tile<f32, { [BM, 1] }> = zero;
        // Bound of |p alpha| in the output, from which its fp16 scale follows.
        let mut reach: Tile<f32, { [BM, 1] }> = zero;
        if (options & 16i32) != 0i32 {
            let gt: Tensor<f32, { [-1, D] }> = packed::<f32, D>(x_out, grid.0 * np);
            let gp: Partition<f32, { [BM, D] }> = gt.partition(const_shape![BM, D]);
            x = gp.load([tile, 0i32]);
            // |alpha| <= |x| |k - kbar|, and keys have norm at most 2 sqrt(D) units.
            let most: Tile<f32, { [BM, 1] }> = constant(64.0f32, const_shape![BM, 1]);
            reach = sqrt(row_dot::<BM, D>(x, x), rounding::NearestEven, ftz::Disabled) * kun * most;
        } else {
            let qf: Tile<f32, { [BM, D] }> = convert_tile(tq);
            let mut r: Tile<f32, { [BM, D] }> = add_scaled::<BM, D>(kbar, zero - qu, qf);
            if (options & 64i32) != 0i32 {
                let ct: Tensor<f32, { [-1, D] }> = packed::<f32, D>(rhs, grid.0 * np);
                let cp: Partition<f32, { [BM, D] }> = ct.partition(const_shape![BM, D]);
                r = as_product::<BM, D>(cp.load([tile, 0i32]));
            }
            let mut dir: Tile<f32, { [BM, D] }> = r;
            let rr0: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(r, r);
            let rr0: Tile<f32, { [BM, 1] }> = select(gt_tile(rr0, least), rr0, zero);
            let mut rr: Tile<f32, { [BM, 1] }> = rr0;
            let thr: Tile<f32, { [BM, 1] }> = rr0 * broadcast_scalar(tolerance2, const_shape![BM, 1]);
            let tiny: Tile<f32, { [BM, 1] }> = constant(1.0e-4f32, const_shape![BM, 1]);
            let floor_: Tile<f32, { [BM, 1] }> = thr * tiny;
            // |dir|^2, by the orthogonality of residuals to earlier directions; only its power of two is used.
            let mut dd: Tile<f32, { [BM, 1] }> = rr0;
            let mut a_last: Tile<f32, { [BM, 1] }> = zero;
            let mut last_step: Tile<f32, { [BM, 1] }> = zero;
            // delta.x = sum a rr, by the same orthogonality.
            let mut energy: Tile<f32, { [BM, 1] }> = zero;
            let mut it: i32 = 0i32;
            let mut worst: f32 = 1.0f32;
            while (it < max_iterations) && (worst > 0.0f32) {
                let mut head_room: Tile<f32, { [BM, 1] }> = constant(1.0f32, const_shape![BM, 1]);
                let mut boost: Tile<f32, { [BM, 1] }> = constant(10.0f32, const_shape![BM, 1]);
                let mut undo: Tile<f32, { [BM, 1] }> = constant(9.765625e-4f32, const_shape![BM, 1]);
                if HIGH == 1i32 {
                    head_room = constant(0.0625f32, const_shape![BM, 1]);
                    boost = constant(6.0f32, const_shape![BM, 1]);
                    undo = constant(0.015625f32, const_shape![BM, 1]);
                }
                let ds: Tile<f32, { [BM, 1] }> =
                    pow2_floor::<{ [BM, 1] }>(sqrt(dd, rounding::NearestEven, ftz::Disabled)) * head_room;
                let ids: Tile<f32, { [BM, 1] }> = quotient::<{ [BM, 1] }>(one, ds);
                let ds_d: Tile<f32, { [BM, D] }> = dir * across::<BM, D>(ids);
                let d_hi: Tile<f16, { [BM, D] }> = convert_tile(ds_d);
                let d_lo: Tile<f16, { [BM, D] }> = low_part::<BM, D>(ds_d, d_hi);
                let dk: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(dir, kbar) * ids * inv_ku;
                let dk_b: Tile<f32, { [BM, BN] }> = across::<BM, BN>(dk);
                let sh: Tile<f32, { [BM, 1] }> = shift + boost;
                let mut acc: Tile<f32, { [BM, D] }> = constant(0.0f32, const_shape![BM, D]);
                for j in begin..end {
                    let kt: Tile<f16, { [BN, D] }> = kp.load([kv0 + j, 0i32]);
                    let mut s: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(tq, kt);
                    let t: Tile<f32, { [BM, BN] }> = scores2::<BM, BN, D, HIGH>(d_hi, d_lo, kt);
                    if BIAS == 1i32 {
                        s = add_bias::<BM, BN>(s, sc_true, bias, bias_at, j * BN, m);
                    }
                    if (j < full0) || (j >= full1) {
                        s = select(visible::<BM, BN>(row_lo, row_hi, skip, j * BN), s, never);
                    }
                    let p: Tile<f32, { [BM, BN] }> = weights::<BM, BN>(s, sc, sh);
                    let wb: Tile<f16, { [BM, BN] }> = convert_tile(p * (t - dk_b));
                    acc = mma(wb, kt, acc);
                }
                let coef: Tile<f32, { [BM, 1] }> = ds * kun * kun * undo;
                let ad: Tile<f32, { [BM, D] }> = add_scaled::<BM, D>(acc * across::<BM, D>(coef), lam, dir);
                let dad: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(dir, ad);
                let good: Tile<bool, { [BM, 1] }> = gt_tile(rr, zero) & gt_tile(dad, zero);
                let a: Tile<f32, { [BM, 1] }> = select(good, quotient::<{ [BM, 1] }>(rr, dad), zero);
                energy = energy + a * rr;
                x = add_scaled::<BM, D>(x, a, dir);
                r = add_scaled::<BM, D>(r, zero - a, ad);
                let rn: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(r, r);
                let be: Tile<f32, { [BM, 1] }> = select(good, quotient::<{ [BM, 1] }>(rn, rr), zero);
                // Residual after the free step x += a dir.
                let mut change: Tile<f32, { [BM, 1] }> = one;
                if it > 0i32 {
                    change = min_tile(quotient::<{ [BM, 1] }>(absf(a - a_last), a), one);
                }
                let ahead: Tile<f32, { [BM, 1] }> = rn * (be + change * change);
                let enough: Tile<bool, { [BM, 1] }> = le_tile(ahead, thr);
                let more: Tile<bool, { [BM, 1] }> = good & gt_tile(ahead, floor_);
                res = select(good, select(enough, ahead, rn), res);
                // A row that has nothing more to gain stays as it is: x, r and dir no longer change.
                let good_b: Tile<bool, { [BM, D] }> = good.broadcast(const_shape![BM, D]);
                dir = select(good_b, add_scaled::<BM, D>(r, be, dir), dir);
                last_step = select(good & enough, a, select(good, zero, last_step));
                dd = rn + be * be * dd;
                count = count + select(good, one_i, zero_i);
                rr = select(more, rn, zero);
                a_last = a;
                worst = any_positive::<BM>(select(good & gt_tile(ahead, thr), one, zero));
                it = it + 1i32;
            }
            x = add_scaled::<BM, D>(x, last_step, dir);
            res = sqrt(res / max_tile(rr0, least), rounding::NearestEven, ftz::Disabled);
            // p |alpha| <= sqrt(sum p alpha^2) <= sqrt(delta.x)
            let two: Tile<f32, { [BM, 1] }> = constant(2.0f32, const_shape![BM, 1]);
            reach = two * sqrt(energy, rounding::NearestEven, ftz::Disabled);
        }

        let room: Tile<f32, { [BM, 1] }> = constant(32768.0f32, const_shape![BM, 1]);
        let top: Tile<f32, { [BM, 1] }> = constant(1024.0f32, const_shape![BM, 1]);
        let boost: Tile<f32, { [BM, 1] }> = min_tile(pow2_floor::<{ [BM, 1] }>(room / (one + reach)), top);
        let mut xs: Tile<f32, { [BM, 1] }> =
            pow2_floor::<{ [BM, 1] }>(sqrt(row_dot::<BM, D>(x, x), rounding::NearestEven, ftz::Disabled));
        if HIGH == 1i32 {
            let sixteenth: Tile<f32, { [BM, 1] }> = constant(0.0625f32, const_shape![BM, 1]);
            xs = xs * sixteenth;
        }
        let xs_x: Tile<f32, { [BM, D] }> = x * across::<BM, D>(one / xs);
        let x_hi: Tile<f16, { [BM, D] }> = convert_tile(xs_x);
        store_packed::<f16, BM, D>(xh, grid.0 * np * (1i32 + HIGH), tile, x_hi);
        if HIGH == 1i32 {
            let x_lo: Tile<f16, { [BM, D] }> = low_part::<BM, D>(xs_x, x_hi);
            store_packed::<f16, BM, D>(xh, grid.0 * np * 2i32, grid.0 * (np / BM) + tile, x_lo);
        }
        let base: i64 = all_rows + all_rows + all_rows + at_row;
        store_column::<f32, BM>(slice::<f32>(row, base), BM, (zero - xs * kun).reshape(const_shape![BM]));
        store_column::<f32, BM>(
            slice::<f32>(row, base + all_rows),
            BM,
            (one + row_dot::<BM, D>(x, kbar)).reshape(const_shape![BM]),
        );
        store_column::<f32, BM>(
            slice::<f32>(row, base + all_rows + all_rows),
            BM,
            (shift + log2(boost)).reshape(const_shape![BM]),
        );
        store_column::<f32, BM>(
            slice::<f32>(row, base + all_rows + all_rows + all_rows),
            BM,
            (one / boost).reshape(const_shape![BM]),
        );
        if save_probe != 0i32 {
            store_packed::<f32, BM, D>(x_out, grid.0 * np, tile, x);
        }
        if diagnostics != 0i32 {
            let at: i64 = wide(bh) * wide(n) + wide(first);
            store_column::<i32, BM>(slice::<i32>(iterations, at), rows, count.reshape(const_shape![BM]));
            store_column::<f32, BM>(slice::<f32>(residual, at), rows, res.reshape(const_shape![BM]));
        }
    }
}
