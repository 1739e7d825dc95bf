//! NaN for every query that sees a key or value that is no number or infinite, and for no other.

#[cutile::module]
pub mod poison {
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// Grid (batch * heads, blocks of 64 queries). Leaves at once when no chunk of keys is marked.
    #[cutile::entry(unchecked_accesses = true)]
    pub unsafe fn lla_poison<E: ElementType, const D: i32>(
        bad: *mut f32,     // [2, batch * kv_heads, mp / 64], by lla_range
        bad_row: *mut f32, // [2, batch * kv_heads, mp], by lla_range
        out: *mut E,       // [batch, heads, n, dv], strided
        lse: *mut f32,     // [batch * heads, n], if save_lse
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
        let chunks: i32 = mp / 64i32;
        let mut suspect: Tile<f32, { [64] }> = constant(0.0f32, const_shape![64]);
        for c in 0i32..ceil_div(chunks, 64i32) {
            let at: i64 = wide(c * 64i32);
            let a: Tile<f32, { [64] }> =
                load_column::<f32, 64>(slice::<f32>(bad, wide(kv * chunks) + at), 1i32, chunks - c * 64i32);
            let b: Tile<f32, { [64] }> = load_column::<f32, 64>(
                slice::<f32>(bad, wide((kvs + kv) * chunks) + at),
                1i32,
                chunks - c * 64i32,
            );
            suspect = max_tile(suspect, max_tile(a, b));
        }
        let suspect: Tile<f32, { [] }> = reduce_max(suspect, 0i32);
        let suspect: f32 = tile_to_scalar(suspect);
        if suspect > 0.0f32 {
            let first: i32 = pid.1 * 64i32;
            let rows: i32 = n - first;
            let pos: Tile<i32, { [64, 1] }> = positions::<64>(first, n, offset);
            let range_at: i64 = wide(batch) * wide(range_batch) + wide(first);
            let row_lo: Tile<i32, { [64, 1] }> =
                first_keys::<64>(options, pos, m, window, lo, range_at, rows);
            let row_hi: Tile<i32, { [64, 1] }> = end_keys::<64>(options, pos, m, hi, range_at, rows);
            let skip: Tile<i32, { [64, 1] }> = skipped_keys::<64>(options, pos);
            let clear: Tile<f32, { [64, 64] }> = constant(0.0f32, const_shape![64, 64]);
            let mut from_key: Tile<f32, { [64] }> = constant(0.0f32, const_shape![64]);
            let mut from_value: Tile<f32, { [64] }> = constant(0.0f32, const_shape![64]);
            for j in 0i32..chunks {
                let seen: Tile<bool, { [64, 64] }> = visible::<64, 64>(row_lo, row_hi, skip, j * 64i32);
                let a: Tile<f32, { [64] }> = load_column::<f32, 64>(
                    slice::<f32>(bad_row, wide(kv) * wide(mp) + wide(j * 64i32)),
                    1i32,
                    64i32,
                );
                let b: Tile<f32, { [64] }> = load_column::<f32, 64>(
                    slice::<f32>(bad_row, wide(kvs + kv) * wide(mp) + wide(j * 64i32)),
                    1i32,
                    64i32,
                );
                let a: Tile<f32, { [64, 64] }> =
                    a.reshape(const_shape![1, 64]).broadcast(const_shape![64, 64]);
                let b: Tile<f32, { [64, 64] }> =
                    b.reshape(const_shape![1, 64]).broadcast(const_shape![64, 64]);
                let ka: Tile<f32, { [64] }> = reduce_max(select(seen, a, clear), 1i32);
                let vb: Tile<f32, { [64] }> = reduce_max(select(seen, b, clear), 1i32);
                from_key = max_tile(from_key, ka);
                from_value = max_tile(from_value, vb);
            }
            // inf - inf where marked, 0 elsewhere
            let one: Tile<f32, { [64] }> = constant(1.0f32, const_shape![64]);
            let k: Tile<f32, { [64] }> = one / (one - from_key);
            let v: Tile<f32, { [64] }> = one / (one - from_value);
            let k: Tile<f32, { [64] }> = k - k;
            let all: Tile<f32, { [64, D] }> =
                (k + (v - v)).reshape(const_shape![64, 1]).broadcast(const_shape![64, D]);
            let at: i64 = wide(batch) * out_batch + wide(head) * out_head + wide(first) * wide(out_row);
            let o: Tile<E, { [64, D] }> = load_rows::<E, 64, D>(slice::<E>(out, at), out_row, rows, dv);
            let o: Tile<f32, { [64, D] }> = convert_tile(o);
            let o: Tile<E, { [64, D] }> = convert_tile(o + all);
            store_rows::<E, 64, D>(slice::<E>(out, at), out_row, rows, dv, o);
            if save_lse != 0i32 {
                let l: PointerTile<*mut f32, { [] }> = slice::<f32>(lse, wide(bh) * wide(n) + wide(first));
                let t: Tile<f32, { [64] }> = load_column::<f32, 64>(l, 1i32, rows);
                store_column::<f32, 64>(l, rows, t + k);
            }
        }
    }
}
