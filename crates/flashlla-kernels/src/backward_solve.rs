//! First part of the backward: `c`, the covariance of g.v and k under each query's weights, and the second solve, `A y = c`.

#[cutile::module]
pub mod backward_solve {
    use super::super::state::state::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// Grid (batch * heads, blocks of BM queries).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_backward_solve<
        const BM: i32,
        const BN: i32,
        const D: i32,
        const HIGH: i32,
        const BIAS: i32,
    >(
        qh: *mut f16,         // [batch * heads, np, D], one unit per head
        gh: *mut f16,         // the same of the output's gradient
        kh: *mut f16,         // [batch * kv_heads, mp, D]
        vh: *mut f16,         // [batch * kv_heads, mp, D]
        q_unit: *mut f32,     // [2, batch * heads]: units of qh and gh
        unit: *mut f32,       // [2, batch * kv_heads]: units of kh and vh
        lse: *mut f32,        // [batch * heads, n], natural
        key_mean: *mut f32,   // [batch * heads, np, D]
        x: *mut f32,          // [batch * heads, np, D]: the forward's probe
        c: *mut f32,          // out [batch * heads, np, D], option 16 only
        y: *mut f32,          // out [batch * heads, np, D]
        amax: *mut f32, // out [2, batch * heads, np / BM]: largest magnitudes of the probe and of y, as lla_range finds them
        mean_out: *mut f32, // out [batch * heads, np]: mean of g.v
        iterations: *mut i32, // out [batch * heads, n] if diagnostics
        relative: *mut f32, // out [batch * heads, n] if diagnostics: |r| / |c|
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
        scale: f32,
        ridge: *mut f32, // [batch, heads, n], strided
        ridge_batch: i32,
        ridge_head: i32,
        ridge_row: i32,
        tolerance2: f32, // square of the relative residual asked for
        max_iterations: i32,
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
        let never: Tile<f32, { [BM, BN] }> = constant(f32::NEG_INFINITY, const_shape![BM, BN]);
        let bias_at: i64 = wide(batch) * wide(bias_batch) + wide(head) * wide(bias_head);
        let scl: f32 = logit_scale(scale, load_scalar(slice::<f32>(q_unit, wide(bh))) * ku);
        let sc_true: Tile<f32, { [BM, 1] }> = broadcast_scalar(scl, const_shape![BM, 1]);
        let mut sc: Tile<f32, { [BM, 1] }> = sc_true;
        if BIAS == 1i32 {
            sc = constant(1.0f32, const_shape![BM, 1]);
        }
        let vt0: Tensor<f16, { [-1, D] }> = packed::<f16, D>(vh, kvs * mp);
        let vp: Partition<f16, { [BN, D] }> = vt0.partition(const_shape![BN, D]);
        let tq: Tile<f16, { [BM, D] }> = load_packed::<f16, BM, D>(qh, grid.0 * np, tile);
        let tg: Tile<f16, { [BM, D] }> = load_packed::<f16, BM, D>(gh, grid.0 * np, tile);
        let gu: f32 = load_scalar(slice::<f32>(q_unit, wide(grid.0 + bh)))
            * load_scalar(slice::<f32>(unit, wide(kvs + kv)));
        let shift: Tile<f32, { [BM, 1] }> = base2_shift::<BM>(load_rowwise::<f32, BM>(
            slice::<f32>(lse, wide(bh) * wide(n) + wide(first)),
            1i32,
            rows,
        ));
        let boost: Tile<f32, { [BM, 1] }> = constant(7.0f32, const_shape![BM, 1]);
        let undo: Tile<f32, { [BM, 1] }> = constant(0.0078125f32, const_shape![BM, 1]);
        let sh: Tile<f32, { [BM, 1] }> = shift + boost;
        let mut acc: Tile<f32, { [BM, D] }> = constant(0.0f32, const_shape![BM, D]);
        let mut mean: Tile<f32, { [BM, 1] }> = zero;
        for j in begin..end {
            let kt: Tile<f16, { [BN, D] }> = kp.load([kv0 + j, 0i32]);
            let mut s: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(tq, kt);
            let vt: Tile<f16, { [BN, D] }> = vp.load([kv0 + j, 0i32]);
            let gamma: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(tg, vt);
            if BIAS == 1i32 {
                s = add_bias::<BM, BN>(s, sc_true, bias, bias_at, j * BN, m);
            }
            if (j < full0) || (j >= full1) {
                s = select(visible::<BM, BN>(row_lo, row_hi, skip, j * BN), s, never);
            }
            let p: Tile<f32, { [BM, BN] }> = weights::<BM, BN>(s, sc, sh);
            let w: Tile<f32, { [BM, BN] }> = p * gamma;
            let sum: Tile<f32, { [BM] }> = reduce_sum(w, 1i32);
            mean = mean + sum.reshape(const_shape![BM, 1]);
            let wb: Tile<f16, { [BM, BN] }> = convert_tile(w);
            acc = mma(wb, kt, acc);
        }
        let gun: Tile<f32, { [BM, 1] }> = broadcast_scalar(gu, const_shape![BM, 1]) * undo;
        let mean: Tile<f32, { [BM, 1] }> = mean * gun;
        let kbar: Tile<f32, { [BM, D] }> = load_packed::<f32, BM, D>(key_mean, grid.0 * np, tile);
        let coef: Tile<f32, { [BM, 1] }> = gun * broadcast_scalar(ku, const_shape![BM, 1]);
        let cov: Tile<f32, { [BM, D] }> = add_scaled::<BM, D>(acc * across::<BM, D>(coef), zero - mean, kbar);
        // The forward's solution knows about how A acts: x.delta = x.Ax. That makes the first step's length a second one.
        let least: Tile<f32, { [BM, 1] }> = constant(1.0e-30f32, const_shape![BM, 1]);
        let tx: Tile<f32, { [BM, D] }> = load_packed::<f32, BM, D>(x, grid.0 * np, tile);
        let qf: Tile<f32, { [BM, D] }> = convert_tile(tq);
        let qu: f32 = load_scalar(slice::<f32>(q_unit, wide(bh)));
        let qun: Tile<f32, { [BM, 1] }> = broadcast_scalar(qu, const_shape![BM, 1]);
        let delta: Tile<f32, { [BM, D] }> = add_scaled::<BM, D>(kbar, zero - qun, qf);
        let x_delta: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(tx, delta);
        let usual: Tile<f32, { [BM, 1] }> = select(
            gt_tile(x_delta, least),
            quotient::<{ [BM, 1] }>(row_dot::<BM, D>(tx, tx), max_tile(x_delta, least)),
            zero,
        );
        let rr: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(cov, cov);
        let rr: Tile<f32, { [BM, 1] }> = select(rows_there::<BM>(rows) & gt_tile(rr, least), rr, zero);
        let lam: Tile<f32, { [BM, 1] }> = load_rowwise::<f32, BM>(
            slice::<f32>(
                ridge,
                wide(batch) * wide(ridge_batch)
                    + wide(head) * wide(ridge_head)
                    + wide(first) * wide(ridge_row),
            ),
            ridge_row,
            rows,
        );
        store_column::<f32, BM>(
            slice::<f32>(mean_out, wide(bh) * wide(np) + wide(first)),
            BM,
            mean.reshape(const_shape![BM]),
        );
        if (options & 16i32) != 0i32 {
            store_packed::<f32, BM, D>(c, grid.0 * np, tile, cov);
        }
        let mut record: Tile<f32, { [BM, 16] }> = constant(0.0f32, const_shape![BM, 16]);
        record = put::<BM>(record, 0i32, sc_true);
        record = put::<BM>(record, 1i32, shift);
        record = put::<BM>(record, 2i32, rr);
        record = put::<BM>(record, 7i32, lam);
        record = put::<BM>(record, 8i32, rr);
        record = put::<BM>(record, 9i32, rr);
        record = put::<BM>(record, 10i32, usual);
        let mut worst: f32 = any_positive::<BM>(rr);
        if (options & 16i32) != 0i32 {
            worst = 0.0f32;
        }
        let (first_record, first_hi, first_lo): (
            Tile<f32, { [BM, 16] }>,
            Tile<f16, { [BM, D] }>,
            Tile<f16, { [BM, D] }>,
        ) = direction::<BM, D, HIGH>(record, cov, kbar, ku);
        record = first_record;
        let mut d_hi: Tile<f16, { [BM, D] }> = first_hi;
        let mut d_lo: Tile<f16, { [BM, D] }> = first_lo;
        let mut r: Tile<f32, { [BM, D] }> = cov;
        let mut solution: Tile<f32, { [BM, D] }> = constant(0.0f32, const_shape![BM, D]);
        let mut it: i32 = 0i32;
        while (it < max_iterations) && (worst > 0.0f32) {
            let acc: Tile<f32, { [BM, D] }> = pass::<BM, BN, D, HIGH, BIAS>(
                record, tq, d_hi, d_lo, &kp, kv0, begin, end, full0, full1, row_lo, row_hi, skip, bias,
                bias_at, m,
            );
            let (next_record, next_hi, next_lo, next_r, next_solution): (
                Tile<f32, { [BM, 16] }>,
                Tile<f16, { [BM, D] }>,
                Tile<f16, { [BM, D] }>,
                Tile<f32, { [BM, D] }>,
                Tile<f32, { [BM, D] }>,
            ) = advance::<BM, D, HIGH>(record, acc, d_hi, d_lo, r, solution, kbar, tolerance2, ku);
            record = next_record;
            d_hi = next_hi;
            d_lo = next_lo;
            r = next_r;
            solution = next_solution;
            worst = any_positive::<BM>(pick::<BM>(record, 4i32));
            it = it + 1i32;
        }
        let d: Tile<f32, { [BM, D] }> = direction_in_unit::<BM, D, HIGH>(d_hi, d_lo);
        if (options & 16i32) == 0i32 {
            let free: Tile<f32, { [BM, 1] }> = pick::<BM>(record, 11i32) * pick::<BM>(record, 12i32);
            solution = add_scaled::<BM, D>(solution, free, d);
        }
        store_packed::<f32, BM, D>(y, grid.0 * np, tile, solution);
        // Padding behind the last block counts as zeros.
        let blocks: i32 = np / BM;
        let tx: Tile<f32, { [BM, D] }> = load_packed::<f32, BM, D>(x, grid.0 * np, tile);
        let of_x: f32 = largest::<BM, D>(tx);
        let of_y: f32 = largest::<BM, D>(solution);
        store_number(amax, wide(bh * blocks + mi), of_x);
        store_number(amax, wide((grid.0 + bh) * blocks + mi), of_y);
        if (mi + 1i32 == grid.1) && (grid.1 < blocks) {
            store_number(amax, wide(bh * blocks + grid.1), 0.0f32);
            store_number(amax, wide((grid.0 + bh) * blocks + grid.1), 0.0f32);
        }
        if diagnostics != 0i32 {
            store_diagnostics::<BM>(record, iterations, relative, wide(bh) * wide(n) + wide(first), rows);
        }
    }
}
