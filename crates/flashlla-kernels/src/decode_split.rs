//! The first step of decoding: moments of the keys and values of one split, for one query.

#[cutile::module]
pub mod decode_split {
    use super::super::decode::decode::*;
    use super::super::moments::moments::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// Moments of the keys of one split, for one query.
    /// `PAGED`: 0 page = sequence, 1 pages of a multiple of BN keys, 2 pages of 16 or 32. `WIDE` = 1: f32, whose logits tensor cores would
    /// round.
    /// Grid (batch * kv_heads * group * t, splits).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_decode_split<
        E: ElementType,
        const BN: i32,
        const D: i32,
        const PAGED: i32,
        const WIDE: i32,
    >(
        q: *mut E,         // [batch, heads, t, d], strided
        k: *mut E,         // [pages, kv_heads, page_size, d], strided
        v: *mut E,         // [pages, kv_heads, page_size, dv], strided
        table: *mut i32,   // [batch, width]; not with PAGED 0
        lengths: *mut i32, // [batch]
        moments: *mut f32, // out [rows, splits, 2 D + 2, D]: S, T, sum of keys, sum of values
        state: *mut f32,   // out [rows, splits, 2]: largest logit (base 2), sum of weights
        scale: *mut f32,   // [kv_heads], strided
        todo: *mut i32,    // [batch * heads * t]: option 256 only
        options: i32,      // 1 causal, 2 window, 256 only queries that `todo` names
        first_row: i32,    // the row of block 0
        kv_heads: i32,
        group: i32, // query heads per KV head
        t: i32,     // new queries per sequence
        window: i32,
        most: i32, // keys that a sequence has room for
        width: i32,
        pages: i32,
        page_size: i32,
        split_tiles: i32, // key tiles of a split
        d: i32,
        dv: i32,
        q_batch: i64,
        q_head: i64,
        q_row: i32,
        k_page: i32,
        k_head: i64,
        k_row: i32,
        v_page: i32,
        v_head: i64,
        v_row: i32,
        scale_head: i32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let grid: (i32, i32, i32) = get_num_tile_blocks();
        let row: i32 = first_row + pid.0;
        let (i, g, batch, head): (i32, i32, i32, i32) = row_place(row, t, group, kv_heads);
        let length: i32 = length_of(lengths, batch, most);
        let lo: i32 = decode_first(options, length, t, i, window);
        let hi: i32 = decode_end(options, length, t, i);
        let first: i32 = lo / BN + pid.1 * split_tiles;
        let end: i32 = min(first + split_tiles, ceil_div(hi, BN));
        if (first < end) && is_wanted(options, todo, row) {
            let at: i64 = wide(batch) * q_batch + wide(head * group + g) * q_head + wide(i) * wide(q_row);
            let (s, t, k_sum, v_sum, m, l): (
                Tile<f32, { [D, D] }>,
                Tile<f32, { [D, D] }>,
                Tile<f32, { [D] }>,
                Tile<f32, { [D] }>,
                f32,
                f32,
            ) = moments_of::<E, BN, D, PAGED, WIDE>(
                q, at, k, v, table, scale, batch, head, lo, hi, first, end, width, pages, page_size, d, dv,
                k_page, k_head, k_row, v_page, v_head, v_row, scale_head,
            );
            let part: i32 = pid.0 * grid.1 + pid.1;
            store_square::<D>(moments, part, 0i32, s);
            store_square::<D>(moments, part, 1i32, t);
            let at: i64 = wide(part) * wide(2i32 * D * D + 2i32 * D) + wide(2i32 * D * D);
            store_column::<f32, D>(slice::<f32>(moments, at), D, k_sum);
            store_column::<f32, D>(slice::<f32>(moments, at + wide(D)), D, v_sum);
            store_number(state, wide(part) * wide(2i32), m);
            store_number(state, wide(part) * wide(2i32) + wide(1i32), l);
        }
    }
}
