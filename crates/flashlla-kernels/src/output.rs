//! Last pass of the forward: `out = sum p (1 - (k - kbar).x) v`.

#[cutile::module]
pub mod output {
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// `ALIGNED` = 1: out's base, strides and columns are multiples of 16 bytes.
    /// Grid (batch * heads, blocks of BM queries).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_output<
        E: ElementType,
        const BM: i32,
        const BN: i32,
        const D: i32,
        const HIGH: i32,
        const BIAS: i32,
        const ALIGNED: i32,
    >(
        qh: *mut f16,   // [batch * heads, np, D]
        xh: *mut f16,   // [1 + HIGH, batch * heads, np, D]
        kh: *mut f16,   // [batch * kv_heads, mp, D]
        vh: *mut f16,   // [batch * kv_heads, mp, D]
        unit: *mut f32, // [2, batch * kv_heads]
        row: *mut f32,  // [8, batch * heads, np], by lla_weights and lla_solve
        out: *mut E,    // out [batch, heads, n, dv], strided
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
        dv: i32,
        out_batch: i64,
        out_head: i64,
        out_row: i32,
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
        let sc_true: Tile<f32, { [BM, 1] }> = load_rowwise::<f32, BM>(slice::<f32>(row, at_row), 1i32, BM);
        let mut sc: Tile<f32, { [BM, 1] }> = sc_true;
        if BIAS == 1i32 {
            sc = one;
        }
        let xt0: Tensor<f16, { [-1, D] }> = packed::<f16, D>(xh, grid.0 * np * (1i32 + HIGH));
        let xp: Partition<f16, { [BM, D] }> = xt0.partition(const_shape![BM, D]);
        let x_hi: Tile<f16, { [BM, D] }> = xp.load([tile, 0i32]);
        let mut x_lo: Tile<f16, { [BM, D] }> = x_hi;
        if HIGH == 1i32 {
            x_lo = xp.load([grid.0 * (np / BM) + tile, 0i32]);
        }
        let vt0: Tensor<f16, { [-1, D] }> = packed::<f16, D>(vh, kvs * mp);
        let vp: Partition<f16, { [BN, D] }> = vt0.partition(const_shape![BN, D]);
        let base: i64 = all_rows + all_rows + all_rows + at_row;
        let xt: Tile<f32, { [BM, 1] }> = load_rowwise::<f32, BM>(slice::<f32>(row, base), 1i32, BM);
        let xk: Tile<f32, { [BM, 1] }> =
            load_rowwise::<f32, BM>(slice::<f32>(row, base + all_rows), 1i32, BM);
        let sh: Tile<f32, { [BM, 1] }> =
            load_rowwise::<f32, BM>(slice::<f32>(row, base + all_rows + all_rows), 1i32, BM);
        let undo: Tile<f32, { [BM, 1] }> =
            load_rowwise::<f32, BM>(slice::<f32>(row, base + all_rows + all_rows + all_rows), 1i32, BM);
        let xk_b: Tile<f32, { [BM, BN] }> = across::<BM, BN>(xk);
        let xt_b: Tile<f32, { [BM, BN] }> = across::<BM, BN>(xt);
        let mut o: Tile<f32, { [BM, D] }> = constant(0.0f32, const_shape![BM, D]);
        for j in begin..end {
            let kt: Tile<f16, { [BN, D] }> = kp.load([kv0 + j, 0i32]);
            let mut s: Tile<f32, { [BM, BN] }> = scores::<BM, BN, D>(tq, kt);
            let t: Tile<f32, { [BM, BN] }> = scores2::<BM, BN, D, HIGH>(x_hi, x_lo, kt);
            let vt: Tile<f16, { [BN, D] }> = vp.load([kv0 + j, 0i32]);
            if BIAS == 1i32 {
                s = add_bias::<BM, BN>(s, sc_true, bias, bias_at, j * BN, m);
            }
            if (j < full0) || (j >= full1) {
                s = select(visible::<BM, BN>(row_lo, row_hi, skip, j * BN), s, never);
            }
            let p: Tile<f32, { [BM, BN] }> = weights::<BM, BN>(s, sc, sh);
            let wb: Tile<f16, { [BM, BN] }> =
                convert_tile(p * fma(t, xt_b, xk_b, rounding::NearestEven, ftz::Enabled));
            o = mma(wb, vt, o);
        }
        let vu: f32 = load_scalar(slice::<f32>(unit, wide(kvs + kv)));
        let ob: Tile<E, { [BM, D] }> =
            convert_tile(o * across::<BM, D>(undo * broadcast_scalar(vu, const_shape![BM, 1])));
        let out_at: i64 = wide(batch) * out_batch + wide(head) * out_head + wide(first) * wide(out_row);
        if ALIGNED == 1i32 {
            store_rows_aligned::<E, BM, D>(slice_aligned::<E>(out, out_at), out_row, rows, dv, ob);
        } else {
            store_rows::<E, BM, D>(slice::<E>(out, out_at), out_row, rows, dv, ob);
        }
    }
}
