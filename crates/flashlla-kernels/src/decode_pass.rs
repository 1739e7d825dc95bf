//! Decoding for queries that share a KV head: one pass over the keys of a split, for 16 queries at once.
//!
//! Where several queries read the same keys, their moments would each cost products of their own, while conjugate gradients read
//! the keys a few times for all of them. Three kinds of pass (`KIND`): 0 finds the weights and applies the covariance to the query, which
//! is the first direction; 1 applies it to a direction; 2 makes the outputs. `lla_decode_step` comes after each.
//!
//! Keys and values go into the products as the cache has them, as rows; queries are columns. Weights and probes go in two and three
//! terms of the cache's type, so that nothing but the direction is rounded to it; which direction is taken is no matter of precision.
// A tile program's variables need a value before a branch gives them theirs.
#![allow(unused_assignments)]

#[cutile::module]
pub mod decode_pass {
    use super::super::decode::decode::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// `x` in two terms: what the first of them leaves, and their sum.
    pub fn two_terms<E: ElementType, const R: i32, const C: i32>(
        x: Tile<f32, { [R, C] }>,
    ) -> (Tile<E, { [R, C] }>, Tile<E, { [R, C] }>, Tile<f32, { [R, C] }>) {
        let hi: Tile<E, { [R, C] }> = convert_tile(x);
        let h: Tile<f32, { [R, C] }> = convert_tile(hi);
        let lo: Tile<E, { [R, C] }> = convert_tile(x - h);
        let l: Tile<f32, { [R, C] }> = convert_tile(lo);
        (hi, lo, h + l)
    }

    /// `PAGED`: 0 page = sequence, 1 pages of a multiple of BN keys, 2 pages of 16 or 32.
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
        sums: *mut f32, // out [tiles, splits, 2, D, 16]: of keys times weights (0), of keys or values times the other weights
        parts: *mut f32, // out [tiles, splits, 4, 16]: largest logit (base 2), sum of weights, sum of the other weights
        vectors: *mut E, // [tiles, 3, D, 16]: the direction, or the probe in three terms
        record: *mut f32, // [tiles, 16, 16]: numbers per query
        live: *mut i32,  // [tiles]: KIND 1 has something to do
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
        let per: i32 = ceil_div(group * t, 16i32);
        let kv: i32 = tile / per;
        let start: i32 = tile % per * 16i32;
        let batch: i32 = kv / kv_heads;
        let head: i32 = kv % kv_heads;
        let length: i32 = length_of(lengths, batch, most);
        let lo: i32 = decode_first(options, length, t, 0i32, window);
        let hi: i32 = decode_end(options, length, t, t - 1i32);
        let first: i32 = lo / BN + pid.1 * split_tiles;
        let mut end: i32 = min(first + split_tiles, ceil_div(hi, BN));
        if KIND == 1i32 {
            if load_integer(slice::<i32>(live, wide(tile))) == 0i32 {
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
            let query: Tile<E, { [D, 16] }> =
                queries::<E, D>(slice::<E>(q, at), start, group * t, t, q_head, q_row, d);
            let scale: f32 = load_scalar(slice::<f32>(scale, wide(head * scale_head)));
            let sc: Tile<f32, { [BN, 16] }> =
                broadcast_scalar(scale * 1.4426950408889634f32, const_shape![BN, 16]);
            // What each query sees; all of them see all of keys full0 to full1.
            let row_lo: Tile<i32, { [1, 16] }> = first_seen(options, start, length, t, window);
            let row_hi: Tile<i32, { [1, 16] }> = end_seen(options, start, length, t, group * t);
            let full0: i32 = decode_first(options, length, t, t - 1i32, window);
            let full1: i32 = decode_end(options, length, t, 0i32);
            let never: Tile<f32, { [BN, 16] }> = constant(-3.0e38f32, const_shape![BN, 16]);
            let zero: Tile<f32, { [BN, 16] }> = constant(0.0f32, const_shape![BN, 16]);
            let mut m: Tile<f32, { [1, 16] }> = constant(-1.0e30f32, const_shape![1, 16]);
            let mut sum: Tile<f32, { [D, 16] }> = constant(0.0f32, const_shape![D, 16]);
            let mut other: Tile<f32, { [D, 16] }> = constant(0.0f32, const_shape![D, 16]);
            let mut l: Tile<f32, { [BN, 16] }> = zero;
            let mut total: Tile<f32, { [BN, 16] }> = zero;
            // KIND 0: products are counted from that with the first key, so that a common mean of the keys does not cancel, and in
            // units of the query's norm. Otherwise from the mean key's.
            let mut from: Tile<f32, { [1, 16] }> = constant(0.0f32, const_shape![1, 16]);
            let mut factor: Tile<f32, { [1, 16] }> = constant(1.0f32, const_shape![1, 16]);
            let mut x1: Tile<E, { [D, 16] }> = query;
            let mut x2: Tile<E, { [D, 16] }> = query;
            let mut x3: Tile<E, { [D, 16] }> = query;
            if KIND == 0i32 {
                let page: i32 = page_of::<PAGED>(table, width, batch, lo, page_size, pages);
                let first_key: Tile<f32, { [D] }> = load_one::<E, D>(
                    k,
                    wide(page) * wide(k_page) + wide(head) * k_head + wide(lo % page_size) * wide(k_row),
                    d,
                );
                let first_key: Tile<f32, { [D, 16] }> =
                    first_key.reshape(const_shape![D, 1]).broadcast(const_shape![D, 16]);
                let qf: Tile<f32, { [D, 16] }> = convert_tile(query);
                from = column_dot::<D>(qf, first_key);
                factor = query_factor::<D>(qf);
                // Logits are counted from the largest of the first tile: bf16 has room for all that come, up to 2^120 times as large a
                // weight. What overflows in spite of that is left to the moments, as all is that is not finite.
                let key: i32 = first * BN;
                let page: i32 = page_of::<PAGED>(table, width, batch, key, page_size, pages);
                let kt: Tile<E, { [BN, D] }> = if PAGED == 2i32 {
                    four_parts::<E, BN, D>(&key_parts, table, width, batch, key, page_size, pages)
                } else {
                    let kt: Tile<E, { [1, BN, D] }> = kp.load([page, key % page_size / BN, 0i32]);
                    kt.reshape(const_shape![BN, D])
                };
                let product: Tile<f32, { [BN, 16] }> = mma(kt, query, zero);
                let top: Tile<f32, { [16] }> = reduce_max(product * sc, 0i32);
                m = max_tile(top.reshape(const_shape![1, 16]), m);
            } else {
                m = zero_minus::<1, 16>(record_row(record, tile, 0i32));
                from = record_row(record, tile, 1i32);
                factor = record_row(record, tile, 2i32);
                x1 = load_packed::<E, D, 16>(vectors, grid.0 * 3i32 * D, tile * 3i32);
                if KIND == 2i32 {
                    x2 = load_packed::<E, D, 16>(vectors, grid.0 * 3i32 * D, tile * 3i32 + 1i32);
                    x3 = load_packed::<E, D, 16>(vectors, grid.0 * 3i32 * D, tile * 3i32 + 2i32);
                }
            }
            for j in first..end {
                let key: i32 = j * BN;
                let page: i32 = page_of::<PAGED>(table, width, batch, key, page_size, pages);
                let slot: i32 = key % page_size / BN;
                // How far ahead the compiler works, as it was fastest.
                let kt: Tile<E, { [BN, D] }> = if PAGED == 2i32 {
                    four_parts::<E, BN, D>(&key_parts, table, width, batch, key, page_size, pages)
                } else {
                    let kt: Tile<E, { [1, BN, D] }> = if KIND == 0i32 {
                        kp.load_pipelined::<8>([page, slot, 0i32])
                    } else {
                        if KIND == 1i32 {
                            kp.load_pipelined::<2>([page, slot, 0i32])
                        } else {
                            kp.load([page, slot, 0i32])
                        }
                    };
                    kt.reshape(const_shape![BN, D])
                };
                let product: Tile<f32, { [BN, 16] }> = mma(kt, query, zero);
                let mut s: Tile<f32, { [BN, 16] }> = product * sc;
                if (key < full0) || (key + BN > full1) {
                    s = select(seen::<BN>(key, row_lo, row_hi), s, never);
                }
                if (KIND == 0i32) && (NARROW == 1i32) {
                    let top: Tile<f32, { [16] }> = reduce_max(s, 0i32);
                    let top: Tile<f32, { [1, 16] }> = top.reshape(const_shape![1, 16]);
                    let over: Tile<f32, { [16] }> = (top - m).reshape(const_shape![16]);
                    let over: Tile<f32, { [] }> = reduce_max(over, 0i32);
                    let over: f32 = tile_to_scalar(over);
                    // Weights stay below 2^8, so that few tiles move a maximum.
                    if over > 8.0f32 {
                        let new: Tile<f32, { [1, 16] }> = max_tile(m, top);
                        let f: Tile<f32, { [1, 16] }> = exp2(m - new, ftz::Enabled);
                        sum = sum * f.broadcast(const_shape![D, 16]);
                        other = other * f.broadcast(const_shape![D, 16]);
                        l = l * f.broadcast(const_shape![BN, 16]);
                        total = total * f.broadcast(const_shape![BN, 16]);
                        m = new;
                    }
                }
                let p: Tile<f32, { [BN, 16] }> = exp2(s - m.broadcast(const_shape![BN, 16]), ftz::Enabled);
                let mut along: Tile<f32, { [BN, 16] }> = product;
                let mut weight: Tile<f32, { [BN, 16] }> = p;
                if KIND == 0i32 {
                    let (hi, lo, both): (
                        Tile<E, { [BN, 16] }>,
                        Tile<E, { [BN, 16] }>,
                        Tile<f32, { [BN, 16] }>,
                    ) = two_terms::<E, BN, 16>(p);
                    l = l + both;
                    weight = both;
                    sum = mma(kt.transpose(), hi, sum);
                    sum = mma(kt.transpose(), lo, sum);
                } else {
                    if KIND == 2i32 {
                        let third: Tile<f32, { [BN, 16] }> = mma(kt, x3, zero);
                        along = mma(kt, x2, third);
                        along = mma(kt, x1, along);
                    } else {
                        along = mma(kt, x1, zero);
                    }
                }
                let w: Tile<f32, { [BN, 16] }> = weight
                    * (along - from.broadcast(const_shape![BN, 16]))
                    * factor.broadcast(const_shape![BN, 16]);
                let (hi, lo, both): (Tile<E, { [BN, 16] }>, Tile<E, { [BN, 16] }>, Tile<f32, { [BN, 16] }>) =
                    two_terms::<E, BN, 16>(w);
                if KIND == 2i32 {
                    let vt: Tile<E, { [BN, D] }> = if PAGED == 2i32 {
                        four_parts::<E, BN, D>(&value_parts, table, width, batch, key, page_size, pages)
                    } else {
                        let vt: Tile<E, { [1, BN, D] }> = vp.load([page, slot, 0i32]);
                        vt.reshape(const_shape![BN, D])
                    };
                    other = mma(vt.transpose(), hi, other);
                    other = mma(vt.transpose(), lo, other);
                } else {
                    total = total + both;
                    other = mma(kt.transpose(), hi, other);
                    other = mma(kt.transpose(), lo, other);
                }
            }
            let part: i32 = pid.0 * grid.1 + pid.1;
            let rows: i32 = grid.0 * grid.1 * 2i32 * D;
            let _stored: Token = store_packed::<f32, D, 16>(sums, rows, part * 2i32 + 1i32, other);
            if KIND == 0i32 {
                let _stored: Token = store_packed::<f32, D, 16>(sums, rows, part * 2i32, sum);
                let l: Tile<f32, { [16] }> = reduce_sum(l, 0i32);
                let at: i64 = wide(part) * wide(64i32);
                store_column::<f32, 16>(slice::<f32>(parts, at), 16i32, m.reshape(const_shape![16]));
                store_column::<f32, 16>(slice::<f32>(parts, at + wide(16i32)), 16i32, l);
            }
            if KIND != 2i32 {
                let total: Tile<f32, { [16] }> = reduce_sum(total, 0i32);
                let at: i64 = wide(part) * wide(64i32) + wide(32i32);
                store_column::<f32, 16>(slice::<f32>(parts, at), 16i32, total);
            }
        }
    }
}
