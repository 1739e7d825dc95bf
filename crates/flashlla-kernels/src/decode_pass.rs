//! Decoding for queries that share a KV head: one pass over the keys of a split, for 16 queries at once.
//!
//! Where several queries read the same keys, their moments would each cost products of their own, while conjugate gradients read
//! the keys a few times for all of them (`columns`). `lla_decode_step` comes after each pass.
// A tile program's variables need a value before a branch gives them theirs.
#![allow(unused_assignments)]

#[cutile::module]
pub mod decode_pass {
    use super::super::columns::columns::*;
    use super::super::decode::decode::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// `KIND`: as in `pass_over`. `PAGED`: 0 page = sequence, 1 pages of a multiple of BN keys, 2 pages of 16 or 32.
    /// Grid (tiles, splits), a tile being up to 16 queries of a KV head.
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_decode_pass<
        E: ElementType,
        const BN: i32,
        const D: i32,
        const PAGED: i32,
        const KIND: i32,
        const NARROW: i32, // 1: fp16, whose largest number is small
    >(
        q: *mut E,         // [batch, heads, t, d], strided
        k: *mut E,         // [pages, kv_heads, page_size, d], strided
        v: *mut E,         // [pages, kv_heads, page_size, dv], strided; KIND 2 only
        table: *mut i32,   // [batch, width]; not with PAGED 0
        lengths: *mut i32, // [batch]
        sums: *mut f32, // out [tiles, splits, 2, 16, D]: of keys times weights (0), of keys or values times the other weights
        parts: *mut f32, // out [tiles, splits, 4, 16]: largest logit (base 2), sum of weights, sum of the other weights
        vectors: *mut E, // [tiles, 3, 16, D]: the direction, or the probe in three terms
        record: *mut f32, // [tiles, 16, 16]: numbers per query
        live: *mut i32,  // [tiles]: 1 passes go on, 0 an output is wanted, 2 neither
        scale: *mut f32, // [kv_heads], strided
        options: i32,    // 1 causal, 2 window
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
        q_head: i32,
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
        let tile: i32 = pid.0;
        let (_kv, start, batch, head): (i32, i32, i32, i32) = tile_place(tile, group * t, kv_heads);
        let length: i32 = length_of(lengths, batch, most);
        let lo: i32 = decode_first(options, length, t, 0i32, window);
        let hi: i32 = decode_end(options, length, t, t - 1i32);
        let first: i32 = lo / BN + pid.1 * split_tiles;
        let mut end: i32 = min(first + split_tiles, ceil_div(hi, BN));
        if KIND != 0i32 {
            // 1 passes go on, 0 an output is wanted, 2 neither.
            if load_integer(slice::<i32>(live, wide(tile))) != 2i32 - KIND {
                end = first;
            }
        }
        if first < end {
            let keys: Tensor<E, { [-1, -1, -1] }> =
                pool::<E>(k, wide(head) * k_head, pages, page_size, d, k_page, k_row);
            let kp: Partition<E, { [1, BN, D] }> = keys.partition(const_shape![1, BN, D]);
            let values: Tensor<E, { [-1, -1, -1] }> =
                pool::<E>(v, wide(head) * v_head, pages, page_size, dv, v_page, v_row);
            let vp: Partition<E, { [1, BN, D] }> = values.partition(const_shape![1, BN, D]);
            let key_parts: Partition<E, { [1, 16, D] }> = keys.partition(const_shape![1, 16, D]);
            let value_parts: Partition<E, { [1, 16, D] }> = values.partition(const_shape![1, 16, D]);
            let at: i64 = wide(batch) * q_batch + wide(head * group) * wide(q_head);
            let query: Tile<E, { [16, D] }> =
                queries::<E, D>(slice::<E>(q, at), start, group * t, t, q_head, q_row, d);
            let scale: f32 = load_scalar(slice::<f32>(scale, wide(head * scale_head)));
            // What each query sees; all of them see all of keys full0 to full1.
            let row_lo: Tile<i32, { [1, 16] }> = first_seen(options, start, length, t, window);
            let row_hi: Tile<i32, { [1, 16] }> = end_seen(options, start, length, t, group * t);
            let full0: i32 = decode_first(options, length, t, t - 1i32, window);
            let full1: i32 = decode_end(options, length, t, 0i32);
            let mut shift: Tile<f32, { [1, 16] }> = constant(-1.0e30f32, const_shape![1, 16]);
            let mut from: Tile<f32, { [1, 16] }> = shift;
            let mut factor: Tile<f32, { [1, 16] }> = shift;
            let mut x1: Tile<E, { [16, D] }> = query;
            let mut x2: Tile<E, { [16, D] }> = query;
            let mut x3: Tile<E, { [16, D] }> = query;
            if KIND == 0i32 {
                let page: i32 = page_of::<PAGED>(table, width, batch, lo, page_size, pages);
                let at: i64 =
                    wide(page) * wide(k_page) + wide(head) * k_head + wide(lo % page_size) * wide(k_row);
                let (counted, unit): (Tile<f32, { [16, 1] }>, Tile<f32, { [16, 1] }>) =
                    first_counts::<E, D>(k, at, d, query);
                from = as_columns(counted);
                factor = as_columns(unit);
            } else {
                shift = as_columns(zero_minus::<16, 1>(record_row(record, tile, 0i32)));
                from = as_columns(record_row(record, tile, 1i32));
                factor = as_columns(record_row(record, tile, 2i32));
                x1 = load_packed::<E, 16, D>(vectors, grid.0 * 48i32, tile * 3i32);
                if KIND == 2i32 {
                    x2 = load_packed::<E, 16, D>(vectors, grid.0 * 48i32, tile * 3i32 + 1i32);
                    x3 = load_packed::<E, 16, D>(vectors, grid.0 * 48i32, tile * 3i32 + 2i32);
                }
            }
            let (m, sum, other, l, total): (
                Tile<f32, { [1, 16] }>,
                Tile<f32, { [D, 16] }>,
                Tile<f32, { [D, 16] }>,
                Tile<f32, { [1, 16] }>,
                Tile<f32, { [1, 16] }>,
            ) = pass_over::<E, BN, D, PAGED, KIND, NARROW>(
                &kp,
                &key_parts,
                &vp,
                &value_parts,
                table,
                width,
                batch,
                pages,
                page_size,
                first,
                end,
                full0,
                full1,
                row_lo,
                row_hi,
                scale,
                query,
                shift,
                from,
                factor,
                x1,
                x2,
                x3,
            );
            let part: i32 = pid.0 * grid.1 + pid.1;
            let rows: i32 = grid.0 * grid.1 * 2i32 * 16i32;
            let _stored: Token =
                store_packed::<f32, 16, D>(sums, rows, part * 2i32 + 1i32, other.transpose());
            if KIND == 0i32 {
                let _stored: Token = store_packed::<f32, 16, D>(sums, rows, part * 2i32, sum.transpose());
                let at: i64 = wide(part) * wide(64i32);
                store_column::<f32, 16>(slice::<f32>(parts, at), 16i32, m.reshape(const_shape![16]));
                store_column::<f32, 16>(
                    slice::<f32>(parts, at + wide(16i32)),
                    16i32,
                    l.reshape(const_shape![16]),
                );
            }
            if KIND != 2i32 {
                let at: i64 = wide(part) * wide(64i32) + wide(32i32);
                store_column::<f32, 16>(slice::<f32>(parts, at), 16i32, total.reshape(const_shape![16]));
            }
        }
    }
}
