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
        const USUAL: i32,
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
        amax: *mut f32, // out [2, batch * heads, np / BM]: largest magnitudes of the probe and of y, as lla_convert finds them
        scalars: *mut f32, // out [4, batch * heads, np]: mean of g.v; of the step beyond y: length, y's share of dq, part of dscale
        dridge: *mut f32,  // out [batch * heads, n]
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
        error2: f32, // if positive, a block ends at this mean square of its gradients' expected relative errors instead
        max_iterations: i32,
        first_error2: f32, // the mean square at which no pass is made
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
        let row_lo: Tile<i32, { [BM, 1] }> =
            first_keys::<BM, USUAL>(options, pos, m, window, lo, range_at, rows);
        let row_hi: Tile<i32, { [BM, 1] }> = end_keys::<BM, USUAL>(options, pos, m, hi, range_at, rows);
        let skip: Tile<i32, { [BM, 1] }> = skipped_keys::<BM, USUAL>(options, pos);
        let last: i32 = min(first + BM, n) - 1i32;
        let bounds_at: i64 = wide(batch * bounds_batch + mi * 4i32);
        let (begin, end, full0, full1): (i32, i32, i32, i32) =
            key_tiles::<BN, USUAL>(options, bounds, bounds_at, first, last, offset, m, window);
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
        let mut sums: Tile<f32, { [BM, 16] }> = constant(0.0f32, const_shape![BM, 16]);
        let ones: Tile<f16, { [BN, 16] }> = ones::<BN, 16>();
        for j in begin..end {
            let kt: Tile<f16, { [BN, D] }> = kp.load([kv0 + j, 0i32]);
            let mut s: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(tq, kt);
            let vt: Tile<f16, { [BN, D] }> = vp.load([kv0 + j, 0i32]);
            let gamma: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(tg, vt);
            if BIAS == 1i32 {
                s = add_bias::<BM, BN>(s, sc_true, bias, bias_at, j * BN, m);
            }
            if (j < full0) || (j >= full1) {
                s = select(sees::<BM, BN, D, USUAL>(row_lo, row_hi, skip, j * BN), s, never);
            }
            let p: Tile<f32, { [BM, BN] }> = weights::<BM, BN>(s, sc, sh);
            let wb: Tile<f16, { [BM, BN] }> = convert_tile(p * gamma);
            // Summed as they are rounded, so that what the keys have in common leaves c.
            sums = mma(wb, ones, sums);
            acc = mma(wb, kt, acc);
        }
        let gun: Tile<f32, { [BM, 1] }> = broadcast_scalar(gu, const_shape![BM, 1]) * undo;
        let mean: Tile<f32, { [BM, 1] }> = summed::<BM, 16>(sums) * gun;
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
        let x_x: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(tx, tx);
        let d_d: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(delta, delta);
        // Where both are rounding alone, the angle between them says nothing; that of a solution is never so near to a right one.
        let cosine2: Tile<f32, { [BM, 1] }> = constant(1.0e-8f32, const_shape![BM, 1]);
        let known: Tile<bool, { [BM, 1] }> =
            gt_tile(x_delta, least) & gt_tile(x_delta * x_delta, cosine2 * x_x * d_d);
        let usual: Tile<f32, { [BM, 1] }> =
            select(known, quotient::<{ [BM, 1] }>(x_x, max_tile(x_delta, least)), zero);
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
        let scalars_at: i64 = wide(bh) * wide(np) + wide(first);
        let plane: i64 = wide(grid.0) * wide(np);
        store_column::<f32, BM>(slice::<f32>(scalars, scalars_at), BM, mean.reshape(const_shape![BM]));
        // A step of no pass. The squared spread of A about theta that x has seen is how much of c's square such a step leaves. c,
        // a sum of keys, is longer where they vary more: A acts on it as theta + 1.8 spread theta^2 / (theta - ridge) (measured, on
        // normal keys and values; theory has the form).
        let one: Tile<f32, { [BM, 1] }> = constant(1.0f32, const_shape![BM, 1]);
        let spread: Tile<f32, { [BM, 1] }> = select(
            known,
            max_tile(quotient::<{ [BM, 1] }>(d_d * usual, max_tile(x_delta, least)) - one, zero),
            one,
        );
        let small: Tile<f32, { [BM, 1] }> = constant(1.0e-3f32, const_shape![BM, 1]);
        let longer: Tile<f32, { [BM, 1] }> = constant(1.8f32, const_shape![BM, 1]);
        let longer: Tile<f32, { [BM, 1] }> =
            quotient::<{ [BM, 1] }>(longer * spread, max_tile(one - lam * usual, small));
        let step: Tile<f32, { [BM, 1] }> = select(known, quotient::<{ [BM, 1] }>(usual, one + longer), zero);
        let by_output: bool = error2 > 0.0f32;
        let mut allowed: Tile<f32, { [BM, 1] }> = rr * broadcast_scalar(tolerance2, const_shape![BM, 1]);
        let two: Tile<f32, { [BM, 1] }> = constant(2.0f32, const_shape![BM, 1]);
        let mut part: Tile<f32, { [BM, 1] }> = two;
        let mut free: Tile<f32, { [BM, 1] }> = zero - step;
        if by_output {
            // What a residual does to the gradients was measured: 0.22 of its length, over the square of the ridge's share of A, or,
            // for the first step, which dq improves by another, 3 times the square of its length.
            let error2: Tile<f32, { [BM, 1] }> = broadcast_scalar(error2, const_shape![BM, 1]);
            let nine: Tile<f32, { [BM, 1] }> = constant(9.0f32, const_shape![BM, 1]);
            let twenty: Tile<f32, { [BM, 1] }> = constant(20.0f32, const_shape![BM, 1]);
            let quarter: Tile<f32, { [BM, 1] }> = constant(0.25f32, const_shape![BM, 1]);
            let steady: Tile<f32, { [BM, 1] }> = lam * step * lam * step;
            allowed = max_tile(allowed * quarter, rr * twenty * error2 * steady * steady);
            // dq's other step is counted in its sum of keys, as a part of scale.
            let four: Tile<f32, { [BM, 1] }> = constant(4.0f32, const_shape![BM, 1]);
            let fits: Tile<bool, { [BM, 1] }> =
                known & le_tile(step, four * broadcast_scalar(scale, const_shape![BM, 1]));
            // Half of the lengthening may be wrong.
            let left: Tile<f32, { [BM, 1] }> = spread + quarter * longer * longer;
            let first_error2: Tile<f32, { [BM, 1] }> = broadcast_scalar(first_error2, const_shape![BM, 1]);
            part = select(fits, unfinished::<BM>(nine * left * left, first_error2, by_output), two);
            free = step;
        }
        let mut worst: f32 = together::<BM>(select(gt_tile(rr, zero), part, zero));
        let given: bool = asked::<USUAL>(options, 16i32);
        if given {
            store_packed::<f32, BM, D>(c, grid.0 * np, tile, cov);
            worst = 0.0f32;
        }
        let along: Tile<f32, { [BM, 1] }> =
            quotient::<{ [BM, 1] }>(row_dot::<BM, D>(qf, tx) * qun, max_tile(x_x, least));
        let (first_hi, first_lo): (Tile<f16, { [BM, D] }>, Tile<f16, { [BM, D] }>) =
            direction::<BM, D, HIGH>(cov, rr);
        let record: Tile<f32, { [BM, 8] }> = new_record::<BM>(rr, rr * min_tile(spread, one), free, rr, zero);
        let nothing: Tile<f32, { [BM, D] }> = constant(0.0f32, const_shape![BM, D]);
        let (record, d, found): (Tile<f32, { [BM, 8] }>, Tile<f32, { [BM, D] }>, Tile<f32, { [BM, D] }>) =
            solve::<BM, BN, D, HIGH, BIAS, USUAL>(
                record,
                first_hi,
                first_lo,
                cov,
                nothing,
                worst,
                max_iterations,
                lam,
                allowed,
                by_output,
                key_mean,
                grid.0 * np,
                tile,
                new_token_unordered(),
                sc_true,
                shift,
                tq,
                &kp,
                ku,
                kv0,
                begin,
                end,
                full0,
                full1,
                row_lo,
                row_hi,
                skip,
                bias,
                bias_at,
                m,
            );
        let mut solution: Tile<f32, { [BM, D] }> = found;
        let free: Tile<f32, { [BM, 1] }> = max_tile(pick::<BM>(record, 2i32), zero);
        if given == false {
            let whole: Tile<f32, { [BM, D] }> =
                add_scaled::<BM, D>(solution, free * direction_unit::<BM, HIGH>(pick::<BM>(record, 3i32)), d);
            solution = if_sound::<BM, D>(whole, record, rr);
        }
        store_packed::<f32, BM, D>(y, grid.0 * np, tile, solution);
        let tx: Tile<f32, { [BM, D] }> = load_packed::<f32, BM, D>(x, grid.0 * np, tile);
        let qf: Tile<f32, { [BM, D] }> = convert_tile(tq);
        let kbar: Tile<f32, { [BM, D] }> = load_packed::<f32, BM, D>(key_mean, grid.0 * np, tile);
        let y_q: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(qf, solution) * qun;
        let y_delta: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(kbar, solution) - y_q;
        let y_x: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(tx, solution);
        // A first step alone, y = s c, is not close enough for dq, which gets y + s (c - A y) = (2 - s ridge) y - s C y. The last term
        // needs the keys. What it adds to dq.q is no part of dscale: q.C y, where x.C y = (delta - ridge x).y is known and C acts on the
        // rest of q nearly as on y.
        let alone: Tile<bool, { [BM, 1] }> = le_tile(pick::<BM>(record, 4i32), zero);
        let beyond: Tile<f32, { [BM, 1] }> = select(alone, free, zero);
        // At great ridges y is right without, and what is left of these sums is rounding.
        let great: Tile<f32, { [BM, 1] }> = constant(0.95f32, const_shape![BM, 1]);
        // dridge needs none, as x.A is delta.
        store_column::<f32, BM>(
            slice::<f32>(dridge, wide(bh) * wide(n) + wide(first)),
            rows,
            select(gt_tile(beyond, zero), y_x + y_x - beyond * y_delta, y_x).reshape(const_shape![BM]),
        );
        let goes: Tile<bool, { [BM, 1] }> = gt_tile(beyond, zero) & le_tile(beyond * lam, great);
        let beyond: Tile<f32, { [BM, 1] }> = select(goes, beyond, zero);
        let share: Tile<f32, { [BM, 1] }> = select(goes, two - beyond * lam, one);
        let logits: Tile<f32, { [BM, 1] }> =
            beyond * along * (y_delta - lam * y_x) + (one - beyond * lam) * (y_q - along * y_x);
        let logits: Tile<f32, { [BM, 1] }> = select(goes, logits, zero);
        let at: i64 = plane + scalars_at;
        store_column::<f32, BM>(slice::<f32>(scalars, at), BM, beyond.reshape(const_shape![BM]));
        store_column::<f32, BM>(slice::<f32>(scalars, at + plane), BM, share.reshape(const_shape![BM]));
        store_column::<f32, BM>(
            slice::<f32>(scalars, at + plane + plane),
            BM,
            logits.reshape(const_shape![BM]),
        );
        // Padding behind the last block counts as zeros.
        let blocks: i32 = np / BM;
        let of_x: f32 = largest::<BM, D>(tx);
        let of_y: f32 = largest::<BM, D>(solution);
        store_number(amax, wide(bh * blocks + mi), of_x);
        store_number(amax, wide((grid.0 + bh) * blocks + mi), of_y);
        if (mi + 1i32 == grid.1) && (grid.1 < blocks) {
            store_number(amax, wide(bh * blocks + grid.1), 0.0f32);
            store_number(amax, wide((grid.0 + bh) * blocks + grid.1), 0.0f32);
        }
        store_diagnostics::<BM, USUAL>(diagnostics, record, rr, iterations, relative, bh, n, first);
    }
}
