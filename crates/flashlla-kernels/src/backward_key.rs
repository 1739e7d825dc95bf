//! Gradients with respect to keys, values and bias. One tile block per `BN` keys of one key head; it walks the queries that see
//! them, of every query head in the group, in a fixed order: no atomics, the same bits every time.

#[cutile::module]
pub mod backward_key {
    use super::super::numbers::numbers::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// `ALIGNED` = 1: bases, strides and columns of dk and dv are multiples of 16 bytes.
    /// Grid (batch * kv_heads, blocks of BN keys).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_backward_key<
        E: ElementType,
        const BM: i32,
        const BN: i32,
        const D: i32,
        const BIAS: i32,
        const ALIGNED: i32,
    >(
        qh: *mut f16,          // [batch * heads, np, D], one unit per head
        gh: *mut f16,          // the same of the output's gradient
        xh: *mut f16,          // the same of the probe
        yh: *mut f16,          // the same of y
        kh: *mut f16,          // [batch * kv_heads, mp, D]
        vh: *mut f16,          // [batch * kv_heads, mp, D]
        q_unit: *mut f32,      // [2, batch * heads]: units of qh and gh
        x_unit: *mut f32,      // [batch * heads]: unit of xh
        y_unit: *mut f32,      // [batch * heads]: unit of yh
        unit: *mut f32,        // [2, batch * kv_heads]: units of kh and vh
        numbers: *mut bf16,    // [batch * heads, np, 16], from lla_backward_query
        dk: *mut E,            // out [batch, kv_heads, m, d], strided
        dv: *mut E,            // out [batch, kv_heads, m, dv], strided
        dbias: *mut f32,       // out [batch * heads, m]; BIAS = 1 only
        first_query: *mut i32, // [batch, blocks of BN keys]: first query that sees any of them; option 4 only
        end_query: *mut i32,   // the same: one past the last
        block_batch: i32,      // stride of the batch in those two
        options: i32,
        heads: i32,
        kv_heads: i32,
        n: i32,
        np: i32,
        m: i32,
        mp: i32,
        offset: i32,
        window: i32,
        lo: *mut i32, // [batch, n]; option 4 only
        hi: *mut i32,
        range_batch: i32,
        bias: *mut f32, // [batch, heads, m], strided, unit last; BIAS = 1 only
        bias_batch: i32,
        bias_head: i32,
        d: i32,
        dvs: i32, // columns of dv
        dk_batch: i64,
        dk_head: i64,
        dk_row: i32,
        dv_batch: i64,
        dv_head: i64,
        dv_row: i32,
        scale: f32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let grid: (i32, i32, i32) = get_num_tile_blocks();
        let kv: i32 = pid.0;
        let batch: i32 = kv / kv_heads;
        let group: i32 = heads / kv_heads;
        let kvs: i32 = grid.0;
        let all_heads: i32 = kvs / kv_heads * heads;
        let head0: i32 = batch * heads + (kv % kv_heads) * group;
        // Under a causal mask the first keys are seen most: they come first without reversal.
        let ki: i32 = pid.1;
        let first: i32 = ki * BN;

        // Queries [q0, q1) see some key of this block; all of [f0, f1) see every one.
        let mut q0: i32 = 0i32;
        let mut q1: i32 = n;
        let mut f0: i32 = 0i32;
        let mut f1: i32 = n;
        if (options & 1i32) != 0i32 {
            q0 = max(first - offset, 0i32);
            f0 = max(first + BN - 1i32 - offset, 0i32);
        }
        if (options & 2i32) != 0i32 {
            q1 = min(max(first + BN - 1i32 + window - offset, 0i32), n);
            f1 = min(max(first + window - offset, 0i32), n);
        }
        if (options & 4i32) != 0i32 {
            let at: i64 = wide(batch * block_batch + ki);
            q0 = min(max(load_integer(slice::<i32>(first_query, at)), 0i32), n);
            q1 = min(max(load_integer(slice::<i32>(end_query, at)), 0i32), n);
            f1 = 0i32;
        }
        // A block with padded keys, or queries that leave a key out, is masked throughout.
        if (first + BN > m) || ((options & 8i32) != 0i32) {
            f1 = 0i32;
        }
        let begin: i32 = q0 / BM;
        let end: i32 = max(ceil_div(q1, BM), begin);
        let full0: i32 = ceil_div(f0, BM);
        let full1: i32 = f1 / BM;

        let kt0: Tensor<f16, { [-1, D] }> = packed::<f16, D>(kh, kvs * mp);
        let kp: Partition<f16, { [BN, D] }> = kt0.partition(const_shape![BN, D]);
        let vt0: Tensor<f16, { [-1, D] }> = packed::<f16, D>(vh, kvs * mp);
        let vp: Partition<f16, { [BN, D] }> = vt0.partition(const_shape![BN, D]);
        let kt: Tile<f16, { [BN, D] }> = kp.load([kv * (mp / BN) + ki, 0i32]);
        let vt: Tile<f16, { [BN, D] }> = vp.load([kv * (mp / BN) + ki, 0i32]);
        let qt0: Tensor<f16, { [-1, D] }> = packed::<f16, D>(qh, all_heads * np);
        let qp: Partition<f16, { [BM, D] }> = qt0.partition(const_shape![BM, D]);
        let gt0: Tensor<f16, { [-1, D] }> = packed::<f16, D>(gh, all_heads * np);
        let gp: Partition<f16, { [BM, D] }> = gt0.partition(const_shape![BM, D]);
        let xt0: Tensor<f16, { [-1, D] }> = packed::<f16, D>(xh, all_heads * np);
        let xp: Partition<f16, { [BM, D] }> = xt0.partition(const_shape![BM, D]);
        let yt0: Tensor<f16, { [-1, D] }> = packed::<f16, D>(yh, all_heads * np);
        let yp: Partition<f16, { [BM, D] }> = yt0.partition(const_shape![BM, D]);
        let nt0: Tensor<bf16, { [-1, 16] }> = packed::<bf16, 16>(numbers, all_heads * np);
        let np0: Partition<bf16, { [BM, 16] }> = nt0.partition(const_shape![BM, 16]);
        let ku: f32 = load_scalar(slice::<f32>(unit, wide(kv)));
        let vu: f32 = load_scalar(slice::<f32>(unit, wide(kvs + kv)));
        let never: Tile<f32, { [BN, BM] }> = constant(f32::NEG_INFINITY, const_shape![BN, BM]);
        let zero: Tile<f32, { [BN, BM] }> = constant(0.0f32, const_shape![BN, BM]);

        // dk in units of kc, dv in units of vc, which change from head to head.
        let mut dk_sum: Tile<f32, { [BN, D] }> = constant(0.0f32, const_shape![BN, D]);
        let mut dv_sum: Tile<f32, { [BN, D] }> = constant(0.0f32, const_shape![BN, D]);
        let mut kc: f32 = 0.0f32;
        let mut vc: f32 = 0.0f32;
        for g in 0i32..group {
            let bh: i32 = head0 + g;
            let qu: f32 = load_scalar(slice::<f32>(q_unit, wide(bh)));
            let gu: f32 = load_scalar(slice::<f32>(q_unit, wide(all_heads + bh)));
            let xu: f32 = load_scalar(slice::<f32>(x_unit, wide(bh)));
            let yu: f32 = load_scalar(slice::<f32>(y_unit, wide(bh)));
            // e in units of eu / 8. Every factor of an fp16 operand is at most about 1, unless what is there already is so much greater
            // that this head's part vanishes beside it.
            let eu: f32 = gu * vu * 8.0f32;
            let yue: f32 = yu / eu;
            let sq: f32 = scale * qu;
            let top: f32 = max(max(max(max(sq, 0.0f32 - sq), xu), yue), kc * 1.0e-20f32 / eu);
            let kept: Tile<f32, { [BN, D] }> = broadcast_scalar(kc / (eu * top), const_shape![BN, D]);
            dk_sum = dk_sum * kept;
            kc = eu * top;
            let mut last: i32 = end;
            let vc_new: f32 = max(gu, vc * 1.0e-20f32);
            if (BIAS == 0i32) && (vc_new > gu) {
                last = begin;
            }
            let kept: Tile<f32, { [BN, D] }> = broadcast_scalar(vc / vc_new, const_shape![BN, D]);
            dv_sum = dv_sum * kept;
            vc = vc_new;
            let g_out: Tile<f32, { [BN, BM] }> = broadcast_scalar(gu / vc_new, const_shape![BN, BM]);
            let sc: Tile<f32, { [BN, BM] }> =
                broadcast_scalar(logit_scale(scale, qu * ku), const_shape![BN, BM]);
            let q_out: Tile<f32, { [BN, BM] }> = broadcast_scalar(sq / top * 0.125f32, const_shape![BN, BM]);
            let x_out: Tile<f32, { [BN, BM] }> =
                broadcast_scalar(0.0f32 - xu / top * 0.125f32, const_shape![BN, BM]);
            let y_out: Tile<f32, { [BN, BM] }> = broadcast_scalar(0.0f32 - yue / top, const_shape![BN, BM]);
            let x_in: Tile<f32, { [BN, BM] }> = broadcast_scalar(probe_factor(xu * ku), const_shape![BN, BM]);
            let y_in: Tile<f32, { [BN, BM] }> =
                broadcast_scalar(0.0f32 - yue * ku * 8.0f32, const_shape![BN, BM]);
            let mut db: Tile<f32, { [BN, 1] }> = constant(0.0f32, const_shape![BN, 1]);
            for i in begin..last {
                let tile: i32 = bh * (np / BM) + i;
                let tq: Tile<f16, { [BM, D] }> = qp.load([tile, 0i32]);
                let tg: Tile<f16, { [BM, D] }> = gp.load([tile, 0i32]);
                let tx: Tile<f16, { [BM, D] }> = xp.load([tile, 0i32]);
                let ty: Tile<f16, { [BM, D] }> = yp.load([tile, 0i32]);
                let terms: Tile<bf16, { [BM, 16] }> = np0.load([tile, 0i32]);
                // Each number is added by a product onto the same sums as the products that it belongs to: no tile of its own.
                let s: Tile<f32, { [BN, BM] }> = add_number::<BM, BN>(terms, 0i32, zero);
                let mut s: Tile<f32, { [BN, BM] }> = mma(kt, tq.transpose(), s) * sc;
                if BIAS == 1i32 {
                    let bias_at: i64 = wide(batch) * wide(bias_batch)
                        + wide(bh - batch * heads) * wide(bias_head)
                        + wide(first);
                    let b: Tile<f32, { [BN, 1] }> =
                        load_rowwise::<f32, BN>(slice::<f32>(bias, bias_at), 1i32, m - first);
                    let log2e: Tile<f32, { [BN, 1] }> = constant(1.4426950408889634f32, const_shape![BN, 1]);
                    s = s + across::<BN, BM>(b * log2e);
                }
                if (i < full0) || (i >= full1) {
                    let rows: i32 = n - i * BM;
                    if (options & 14i32) == 0i32 {
                        let causal: bool = (options & 1i32) != 0i32;
                        s = hide_across::<BM, BN>(s, never, causal, first, i * BM + offset, rows);
                    } else {
                        let pos: Tile<i32, { [BM, 1] }> = positions::<BM>(i * BM, n, offset);
                        let range_at: i64 = wide(batch) * wide(range_batch) + wide(i * BM);
                        let row_lo: Tile<i32, { [BM, 1] }> =
                            first_keys::<BM, 0>(options, pos, m, window, lo, range_at, rows);
                        let row_hi: Tile<i32, { [BM, 1] }> =
                            end_keys::<BM, 0>(options, pos, m, hi, range_at, rows);
                        let skip: Tile<i32, { [BM, 1] }> = skipped_keys::<BM, 0>(options, pos);
                        s = select(visible_across::<BM, BN>(row_lo, row_hi, skip, first, rows), s, never);
                    }
                }
                // In an order that keeps few tiles alive.
                let p: Tile<f32, { [BN, BM] }> = exp2(s, ftz::Enabled);
                let a: Tile<f32, { [BN, BM] }> = add_number::<BM, BN>(terms, 1i32, zero);
                let a: Tile<f32, { [BN, BM] }> = mma(kt, tx.transpose(), a) * x_in;
                let pa: Tile<f32, { [BN, BM] }> = p * a;
                let mut pv: Tile<f32, { [BN, BM] }> = pa;
                if BIAS == 1i32 {
                    pv = pa * g_out;
                }
                let w: Tile<f16, { [BN, BM] }> = convert_tile(pv);
                dv_sum = mma(w, tg, dv_sum);
                let w: Tile<f16, { [BN, BM] }> = convert_tile(pa * y_out);
                dk_sum = mma(w, ty, dk_sum);
                let e: Tile<f32, { [BN, BM] }> = scores::<BN, BM, D>(kt, ty) * y_in;
                let e: Tile<f32, { [BN, BM] }> = add_number::<BM, BN>(terms, 2i32, e);
                let e: Tile<f32, { [BN, BM] }> = mma(vt, tg.transpose(), e);
                let w: Tile<f16, { [BN, BM] }> = convert_tile(p * e * x_out);
                dk_sum = mma(w, tx, dk_sum);
                let ds: Tile<f32, { [BN, BM] }> = p * add_number::<BM, BN>(terms, 3i32, a * e);
                let w: Tile<f16, { [BN, BM] }> = convert_tile(ds * q_out);
                dk_sum = mma(w, tq, dk_sum);
                if BIAS == 1i32 {
                    let sum: Tile<f32, { [BN] }> = reduce_sum(ds, 1i32);
                    db = db + sum.reshape(const_shape![BN, 1]);
                }
            }
            if BIAS == 1i32 {
                let bc: Tile<f32, { [BN, 1] }> = broadcast_scalar(eu * 0.0009765625f32, const_shape![BN, 1]);
                store_column::<f32, BN>(
                    slice::<f32>(dbias, wide(bh) * wide(m) + wide(first)),
                    m - first,
                    (db * bc).reshape(const_shape![BN]),
                );
            }
        }
        let keys: i32 = m - first;
        let kvh: i32 = kv % kv_heads;
        let unit: Tile<f32, { [BN, D] }> = broadcast_scalar(kc * 0.0078125f32, const_shape![BN, D]);
        let kb: Tile<E, { [BN, D] }> = convert_tile(dk_sum * unit);
        let at: i64 = wide(batch) * dk_batch + wide(kvh) * dk_head + wide(first) * wide(dk_row);
        if ALIGNED == 1i32 {
            store_rows_aligned::<E, BN, D>(slice_aligned::<E>(dk, at), dk_row, keys, d, kb);
        } else {
            store_rows::<E, BN, D>(slice::<E>(dk, at), dk_row, keys, d, kb);
        }
        let unit: Tile<f32, { [BN, D] }> = broadcast_scalar(vc * 0.0078125f32, const_shape![BN, D]);
        let vb: Tile<E, { [BN, D] }> = convert_tile(dv_sum * unit);
        let at: i64 = wide(batch) * dv_batch + wide(kvh) * dv_head + wide(first) * wide(dv_row);
        if ALIGNED == 1i32 {
            store_rows_aligned::<E, BN, D>(slice_aligned::<E>(dv, at), dv_row, keys, dvs, vb);
        } else {
            store_rows::<E, BN, D>(slice::<E>(dv, at), dv_row, keys, dvs, vb);
        }
    }
}
