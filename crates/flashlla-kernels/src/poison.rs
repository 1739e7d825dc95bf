//! NaN for every query that sees a key or value that is no number or infinite, and for no other.

#[cutile::module]
pub mod poison {
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// NaN for every query that sees a marked key, 0 for the others.
    unsafe fn spoilt(
        marks: *mut f32, // from `at` on, 1 or 0 for every key
        at: i64,
        chunks: i32,
        lo: Tile<i32, { [64, 1] }>,
        hi: Tile<i32, { [64, 1] }>,
        skip: Tile<i32, { [64, 1] }>,
    ) -> Tile<f32, { [64] }> {
        let none: Tile<f32, { [64, 64] }> = constant(0.0f32, const_shape![64, 64]);
        let mut any: Tile<f32, { [64] }> = constant(0.0f32, const_shape![64]);
        for j in 0i32..chunks {
            let marked: Tile<f32, { [64] }> =
                load_column::<f32, 64>(slice::<f32>(marks, at + wide(j * 64i32)), 1i32, 64i32);
            let marked: Tile<f32, { [64, 64] }> =
                marked.reshape(const_shape![1, 64]).broadcast(const_shape![64, 64]);
            let seen: Tile<bool, { [64, 64] }> = visible::<64, 64>(lo, hi, skip, j * 64i32);
            any = max_tile(any, reduce_max(select(seen, marked, none), 1i32));
        }
        // inf - inf where there is one
        let one: Tile<f32, { [64] }> = constant(1.0f32, const_shape![64]);
        let x: Tile<f32, { [64] }> = one / (one - any);
        x - x
    }

    /// Grid (batch * heads, blocks of 64 queries or fewer). Leaves at once when the head is not marked.
    #[cutile::entry(unchecked_accesses = true)]
    pub unsafe fn lla_poison<E: ElementType, const D: i32>(
        unit: *mut f32, // [6, batch * kv_heads], by lla_adjust: behind the units, 1 of heads whose keys, or values, are marked
        marks: *mut f32, // [2, batch * kv_heads, mp], by lla_convert: 1 where a row holds what is not finite
        out: *mut E,    // [batch, heads, n, dv], strided
        lse: *mut f32,  // [batch * heads, n], if save_lse
        options: i32,
        heads: i32,
        kv_heads: i32,
        n: i32,
        m: i32,
        mp: i32,
        offset: i32,
        window: i32,
        lo: *mut i32,
        hi: *mut i32,
        range_batch: i32,
        dv: i32,
        out_batch: i64,
        out_head: i64,
        out_row: i32,
        save_lse: i32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let grid: (i32, i32, i32) = get_num_tile_blocks();
        let bh: i32 = pid.0;
        let batch: i32 = bh / heads;
        let head: i32 = bh % heads;
        let kv: i32 = batch * kv_heads + head / (heads / kv_heads);
        let kvs: i32 = grid.0 / heads * kv_heads;
        let bad_keys: f32 = load_scalar(slice::<f32>(unit, wide(kvs + kvs + kv)));
        let bad_values: f32 = load_scalar(slice::<f32>(unit, wide(kvs + kvs + kvs + kv)));
        if bad_keys + bad_values > 0.0f32 {
            for block in 0i32..ceil_div(ceil_div(n, 64i32) - pid.1, grid.1) {
                let first: i32 = (pid.1 + block * grid.1) * 64i32;
                let rows: i32 = n - first;
                let pos: Tile<i32, { [64, 1] }> = positions::<64>(first, n, offset);
                let range_at: i64 = wide(batch) * wide(range_batch) + wide(first);
                let row_lo: Tile<i32, { [64, 1] }> =
                    first_keys::<64, 0>(options, pos, m, window, lo, range_at, rows);
                let row_hi: Tile<i32, { [64, 1] }> = end_keys::<64, 0>(options, pos, m, hi, range_at, rows);
                let skip: Tile<i32, { [64, 1] }> = skipped_keys::<64, 0>(options, pos);
                let chunks: i32 = mp / 64i32;
                let mut k: Tile<f32, { [64] }> = constant(0.0f32, const_shape![64]);
                let mut v: Tile<f32, { [64] }> = k;
                if bad_keys > 0.0f32 {
                    k = spoilt(marks, wide(kv) * wide(mp), chunks, row_lo, row_hi, skip);
                }
                if bad_values > 0.0f32 {
                    v = spoilt(marks, wide(kvs + kv) * wide(mp), chunks, row_lo, row_hi, skip);
                }
                let all: Tile<f32, { [64, D] }> =
                    (k + v).reshape(const_shape![64, 1]).broadcast(const_shape![64, D]);
                let at: i64 = wide(batch) * out_batch + wide(head) * out_head + wide(first) * wide(out_row);
                let o: Tile<E, { [64, D] }> = load_rows::<E, 64, D>(slice::<E>(out, at), out_row, rows, dv);
                let o: Tile<f32, { [64, D] }> = convert_tile(o);
                let o: Tile<E, { [64, D] }> = convert_tile(o + all);
                store_rows::<E, 64, D>(slice::<E>(out, at), out_row, rows, dv, o);
                if save_lse != 0i32 {
                    let l: PointerTile<*mut f32, { [] }> =
                        slice::<f32>(lse, wide(bh) * wide(n) + wide(first));
                    let t: Tile<f32, { [64] }> = load_column::<f32, 64>(l, 1i32, rows);
                    store_column::<f32, 64>(l, rows, t + k);
                }
            }
        }
    }
}
