//! Gradients with respect to queries and scale, and the scalars per query that the key pass needs.

#[cutile::module]
pub mod backward_query {
    use super::super::numbers::numbers::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// `ALIGNED` = 1: dq's base, strides and columns are multiples of 16 bytes.
    /// Grid (batch * heads, blocks of BM queries).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_backward_query<
        E: ElementType,
        const BM: i32,
        const BN: i32,
        const D: i32,
        const BIAS: i32,
        const ALIGNED: i32,
        const USUAL: i32,
    >(
        qh: *mut f16,       // [batch * heads, np, D], one unit per head
        gh: *mut f16,       // the same of the output's gradient
        xh: *mut f16,       // the same of the probe
        yh: *mut f16,       // the same of y
        kh: *mut f16,       // [batch * kv_heads, mp, D]
        vh: *mut f16,       // [batch * kv_heads, mp, D]
        q_unit: *mut f32,   // [2, batch * heads]: units of qh and gh
        x_unit: *mut f32,   // [batch * heads]: unit of xh
        y_unit: *mut f32,   // [batch * heads]: unit of yh
        unit: *mut f32,     // [2, batch * kv_heads]: units of kh and vh
        key_mean: *mut f32, // [batch * heads, np, D]
        y: *mut f32,        // [batch * heads, np, D]
        lse: *mut f32,      // [batch * heads, n], natural
        scalars: *mut f32,  // [4, batch * heads, np], from lla_backward_solve
        numbers: *mut bf16, // out [batch * heads, np, 16], see `numbers`
        dq: *mut E,         // out [batch, heads, n, d], strided
        dscale: *mut f32,   // out [batch * heads, n]: each query's part
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
        d: i32,
        dq_batch: i64,
        dq_head: i64,
        dq_row: i32,
        scale: f32,
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
        let tx: Tile<f16, { [BM, D] }> = load_packed::<f16, BM, D>(xh, grid.0 * np, tile);
        let ty: Tile<f16, { [BM, D] }> = load_packed::<f16, BM, D>(yh, grid.0 * np, tile);
        let one: Tile<f32, { [BM, 1] }> = constant(1.0f32, const_shape![BM, 1]);
        let kbar: Tile<f32, { [BM, D] }> = load_packed::<f32, BM, D>(key_mean, grid.0 * np, tile);
        let scalars_at: i64 = wide(bh) * wide(np) + wide(first);
        let plane: i64 = wide(grid.0) * wide(np);
        let mean: Tile<f32, { [BM, 1] }> =
            load_rowwise::<f32, BM>(slice::<f32>(scalars, scalars_at), 1i32, BM);
        // dq takes a step of this length from y: -C y of it joins the sum that scale multiplies.
        let beyond: Tile<f32, { [BM, 1] }> =
            load_rowwise::<f32, BM>(slice::<f32>(scalars, plane + scalars_at), 1i32, BM);
        let per_scale: f32 = ratio(1.0f32, max(scale, 1.0e-30f32));
        let beyond: Tile<f32, { [BM, 1] }> = beyond * broadcast_scalar(per_scale, const_shape![BM, 1]);
        // Means are taken out with the roundings that the products have.
        let xu: f32 = load_scalar(slice::<f32>(x_unit, wide(bh)));
        let yu: f32 = load_scalar(slice::<f32>(y_unit, wide(bh)));
        let xun: Tile<f32, { [BM, 1] }> = broadcast_scalar(xu, const_shape![BM, 1]);
        let yun: Tile<f32, { [BM, 1] }> = broadcast_scalar(yu, const_shape![BM, 1]);
        let xf: Tile<f32, { [BM, D] }> = convert_tile(tx);
        let yf: Tile<f32, { [BM, D] }> = convert_tile(ty);
        let xk: Tile<f32, { [BM, 1] }> = one + row_dot::<BM, D>(xf, kbar) * xun;
        let ek: Tile<f32, { [BM, 1] }> = row_dot::<BM, D>(yf, kbar) * yun - mean;
        // e in units of eu, so that fp16 holds it: |g.v| stays near sqrt(D) units of g times units of v.
        let eu: f32 = gu * 8.0f32;
        let g_in: Tile<f32, { [BM, BN] }> = constant(0.125f32, const_shape![BM, BN]);
        let x_in: f32 = probe_factor(xu * ku);
        let x_in1: Tile<f32, { [BM, 1] }> = broadcast_scalar(x_in, const_shape![BM, 1]);
        let y_in: f32 = 0.0f32 - ratio(yu * ku, eu);
        let x_in: Tile<f32, { [BM, BN] }> = broadcast_scalar(x_in, const_shape![BM, BN]);
        let y_in: Tile<f32, { [BM, BN] }> = broadcast_scalar(y_in, const_shape![BM, BN]);
        let eun: Tile<f32, { [BM, 1] }> = broadcast_scalar(eu, const_shape![BM, 1]);
        let xk_b: Tile<f32, { [BM, BN] }> = across::<BM, BN>(xk);
        let eke: Tile<f32, { [BM, 1] }> = quotient::<{ [BM, 1] }>(ek, eun);
        let ek_b: Tile<f32, { [BM, BN] }> = across::<BM, BN>(eke);
        let beyond_b: Tile<f32, { [BM, BN] }> = across::<BM, BN>(beyond);
        let boost: Tile<f32, { [BM, 1] }> = constant(7.0f32, const_shape![BM, 1]);
        let undo: Tile<f32, { [BM, 1] }> = constant(0.0078125f32, const_shape![BM, 1]);
        let sh: Tile<f32, { [BM, 1] }> = shift + boost;
        let mut acc: Tile<f32, { [BM, D] }> = constant(0.0f32, const_shape![BM, D]);
        let mut sums: Tile<f32, { [BM, 8] }> = constant(0.0f32, const_shape![BM, 8]);
        let ones: Tile<f16, { [BN, 8] }> = ones::<BN, 8>();
        for j in begin..end {
            let kt: Tile<f16, { [BN, D] }> = kp.load([kv0 + j, 0i32]);
            let mut s: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(tq, kt);
            let vt: Tile<f16, { [BN, D] }> = vp.load([kv0 + j, 0i32]);
            let gamma: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(tg, vt);
            let xx: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(tx, kt);
            let yy: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(ty, kt);
            if BIAS == 1i32 {
                s = add_bias::<BM, BN>(s, sc_true, bias, bias_at, j * BN, m);
            }
            if (j < full0) || (j >= full1) {
                s = select(visible::<BM, BN>(row_lo, row_hi, skip, j * BN), s, never);
            }
            let p: Tile<f32, { [BM, BN] }> = weights::<BM, BN>(s, sc, sh);
            let a: Tile<f32, { [BM, BN] }> = fma(xx, x_in, xk_b, rounding::NearestEven, ftz::Enabled);
            let b: Tile<f32, { [BM, BN] }> = fma(yy, y_in, ek_b, rounding::NearestEven, ftz::Enabled);
            let e: Tile<f32, { [BM, BN] }> = fma(gamma, g_in, b, rounding::NearestEven, ftz::Enabled);
            // b's part of mean g.v, times the mean key, leaves the sum with the mean weight.
            let w: Tile<f32, { [BM, BN] }> = p * fma(b, beyond_b, e * a, rounding::NearestEven, ftz::Enabled);
            let wb: Tile<f16, { [BM, BN] }> = convert_tile(w);
            sums = mma(wb, ones, sums);
            acc = mma(wb, kt, acc);
        }
        let total: Tile<f32, { [BM, 1] }> = summed::<BM, 8>(sums) * undo;
        let mean_weight: Tile<f32, { [BM, 1] }> = total + quotient::<{ [BM, 1] }>(beyond * mean, eun);
        let mut terms: Tile<f32, { [BM, 16] }> = constant(0.0f32, const_shape![BM, 16]);
        // In the units of the sums that the key pass adds them to.
        let finer: Tile<f32, { [BM, 1] }> = constant(8.0f32, const_shape![BM, 1]);
        terms = with_number::<BM>(terms, 0i32, quotient::<{ [BM, 1] }>(sh, sc_true));
        terms = with_number::<BM>(terms, 1i32, quotient::<{ [BM, 1] }>(xk, x_in1));
        terms = with_number::<BM>(terms, 2i32, eke * finer);
        terms = with_number::<BM>(terms, 3i32, negf(mean_weight) * finer);
        let terms: Tile<bf16, { [BM, 16] }> = convert_tile(terms);
        store_packed::<bf16, BM, 16>(numbers, grid.0 * np, tile, terms);
        let total: Tile<f32, { [BM, 1] }> = total * eun;
        let coef: Tile<f32, { [BM, 1] }> = eun * undo;
        let coef: Tile<f32, { [BM, 1] }> = coef * broadcast_scalar(ku, const_shape![BM, 1]);
        // sum ds k = sum p e a k - m kbar
        let kbar: Tile<f32, { [BM, D] }> = load_packed::<f32, BM, D>(key_mean, grid.0 * np, tile);
        let sk: Tile<f32, { [BM, D] }> = add_scaled::<BM, D>(acc * across::<BM, D>(coef), zero - total, kbar);
        let share: Tile<f32, { [BM, 1] }> =
            load_rowwise::<f32, BM>(slice::<f32>(scalars, plane + plane + scalars_at), 1i32, BM);
        let yf: Tile<f32, { [BM, D] }> = load_packed::<f32, BM, D>(y, grid.0 * np, tile);
        let scn: Tile<f32, { [BM, 1] }> = broadcast_scalar(scale, const_shape![BM, 1]);
        let mut grad: Tile<f32, { [BM, D] }> = sk * across::<BM, D>(scn);
        let given: bool = asked::<USUAL>(options, 16i32);
        if given == false {
            grad = add_scaled::<BM, D>(grad, share, yf);
        }
        let gb: Tile<E, { [BM, D] }> = convert_tile(grad);
        let dq_at: i64 = wide(batch) * dq_batch + wide(head) * dq_head + wide(first) * wide(dq_row);
        if ALIGNED == 1i32 {
            store_rows_aligned::<E, BM, D>(slice_aligned::<E>(dq, dq_at), dq_row, rows, d, gb);
        } else {
            store_rows::<E, BM, D>(slice::<E>(dq, dq_at), dq_row, rows, d, gb);
        }
        let qf: Tile<f32, { [BM, D] }> = convert_tile(tq);
        let qun: Tile<f32, { [BM, 1] }> =
            broadcast_scalar(load_scalar(slice::<f32>(q_unit, wide(bh))), const_shape![BM, 1]);
        let at: i64 = wide(bh) * wide(n) + wide(first);
        // The step is no part of the logits' gradient.
        let logits: Tile<f32, { [BM, 1] }> =
            load_rowwise::<f32, BM>(slice::<f32>(scalars, plane + plane + plane + scalars_at), 1i32, BM);
        let logits: Tile<f32, { [BM, 1] }> = logits * broadcast_scalar(per_scale, const_shape![BM, 1]);
        store_column::<f32, BM>(
            slice::<f32>(dscale, at),
            rows,
            (row_dot::<BM, D>(qf, sk) * qun + logits).reshape(const_shape![BM]),
        );
    }
}
