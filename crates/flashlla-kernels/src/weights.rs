//! First pass of the forward: softmax normaliser and mean key of every query.
//!
//! Keys come as `lla_convert` leaves them: fp16, one power of two per head, padded with zero rows and columns.

#[cutile::module]
pub mod weights {
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// `ALIGNED` = 1: q's base, strides and columns are multiples of 16 bytes.
    /// Grid (batch * heads, blocks of BM queries).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_weights<
        E: ElementType,
        const BM: i32,
        const BN: i32,
        const D: i32,
        const BIAS: i32,
        const ALIGNED: i32,
    >(
        q: *mut E,          // [batch, heads, n, d], strided
        kh: *mut f16,       // [batch * kv_heads, mp, D]
        unit: *mut f32,     // [2, batch * kv_heads]: units of keys and values
        qh: *mut f16,       // out [batch * heads, np, D]: q * sign(scale) / row unit
        key_mean: *mut f32, // out [batch * heads, np, D]
        row: *mut f32, // out [8, batch * heads, np]: 0 logit scale (base 2), 1 -lse (base 2; 0 if no key is seen), 2 row unit of q
        lse: *mut f32, // out [batch * heads, n], natural; any pointer if save_lse = 0
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
        q_batch: i64,
        q_head: i64,
        q_row: i32,
        scale: f32,
        save_lse: i32,
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

        // Queries, scaled to norm 1..2 per row; the softmax scale's sign goes into them.
        let q_at: i64 = wide(batch) * q_batch + wide(head) * q_head + wide(first) * wide(q_row);
        let tq: Tile<E, { [BM, D] }> = if ALIGNED == 1i32 {
            load_rows_aligned::<E, BM, D>(slice_aligned::<E>(q, q_at), q_row, rows, d)
        } else {
            load_rows::<E, BM, D>(slice::<E>(q, q_at), q_row, rows, d)
        };
        let qf: Tile<f32, { [BM, D] }> = convert_tile(tq);
        let qn: Tile<f32, { [BM, 1] }> =
            pow2_floor::<{ [BM, 1] }>(sqrt(row_dot::<BM, D>(qf, qf), rounding::NearestEven, ftz::Disabled));
        let mut sign: f32 = 1.0f32;
        let mut magnitude: f32 = scale;
        if scale < 0.0f32 {
            sign = 0.0f32 - 1.0f32;
            magnitude = 0.0f32 - scale;
        }
        let qu: Tile<f32, { [BM, 1] }> = broadcast_scalar(sign, const_shape![BM, 1]) * qn;
        let tq: Tile<f16, { [BM, D] }> = convert_tile(qf * across::<BM, D>(one / qu));
        // exp's base is 2 inside. The floor keeps a scale of 0 from meeting a masked logit of -inf.
        let least: Tile<f32, { [BM, 1] }> = constant(1.0e-30f32, const_shape![BM, 1]);
        let sc_true: Tile<f32, { [BM, 1] }> = max_tile(
            qn * broadcast_scalar(magnitude * ku * 1.4426950408889634f32, const_shape![BM, 1]),
            least,
        );
        let mut sc: Tile<f32, { [BM, 1] }> = sc_true;
        if BIAS == 1i32 {
            sc = one;
        }
        store_packed::<f16, BM, D>(qh, grid.0 * np, tile, tq);

        let mut m_i: Tile<f32, { [BM, 1] }> = constant(-1.0e30f32, const_shape![BM, 1]);
        let mut l_i: Tile<f32, { [BM, 1] }> = zero;
        let mut kbar: Tile<f32, { [BM, D] }> = constant(0.0f32, const_shape![BM, D]);
        for j in begin..end {
            let kt: Tile<f16, { [BN, D] }> = kp.load([kv0 + j, 0i32]);
            let mut s: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(tq, kt);
            if BIAS == 1i32 {
                s = add_bias::<BM, BN>(s, sc_true, bias, bias_at, j * BN, m);
            }
            if (j < full0) || (j >= full1) {
                s = select(visible::<BM, BN>(row_lo, row_hi, skip, j * BN), s, never);
            }
            let mx: Tile<f32, { [BM] }> = reduce_max(s, 1i32);
            let mn: Tile<f32, { [BM, 1] }> = max_tile(m_i, mx.reshape(const_shape![BM, 1]) * sc);
            let p: Tile<f32, { [BM, BN] }> = weights::<BM, BN>(s, sc, zero - mn);
            let al: Tile<f32, { [BM, 1] }> = exp2(m_i - mn, ftz::Enabled);
            let ps: Tile<f32, { [BM] }> = reduce_sum(p, 1i32);
            l_i = l_i * al + ps.reshape(const_shape![BM, 1]);
            let pb: Tile<f16, { [BM, BN] }> = convert_tile(p);
            kbar = mma(pb, kt, kbar * across::<BM, D>(al));
            m_i = mn;
        }
        let none: Tile<bool, { [BM, 1] }> = eq_tile(l_i, zero);
        let lse2: Tile<f32, { [BM, 1] }> = m_i + log2(l_i);
        let inv_l: Tile<f32, { [BM, 1] }> = select(none, zero, kun / l_i);
        kbar = kbar * across::<BM, D>(inv_l);
        store_packed::<f32, BM, D>(key_mean, grid.0 * np, tile, kbar);
        store_column::<f32, BM>(slice::<f32>(row, at_row), BM, sc_true.reshape(const_shape![BM]));
        store_column::<f32, BM>(
            slice::<f32>(row, all_rows + at_row),
            BM,
            select(none, zero, zero - lse2).reshape(const_shape![BM]),
        );
        store_column::<f32, BM>(
            slice::<f32>(row, all_rows + all_rows + at_row),
            BM,
            qu.reshape(const_shape![BM]),
        );
        if save_lse != 0i32 {
            let ln2: Tile<f32, { [BM, 1] }> = constant(0.6931471805599453f32, const_shape![BM, 1]);
            store_column::<f32, BM>(
                slice::<f32>(lse, wide(bh) * wide(n) + wide(first)),
                rows,
                (lse2 * ln2).reshape(const_shape![BM]),
            );
        }
    }
}
