//! Decoding: weighted moments of a cache's keys and values in one pass, split over the keys, and the solve that ends it.
//!
//! A query needs `l = sum w`, `sum w k`, `sum w v`, `S = sum w k k^T` and `T = sum w v k^T`, with keys shifted by the first one that it
//! sees. What the two steps, `decode_split` and `decode_merge`, have in common.

#[cutile::module]
pub mod decode {
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// What a row's query is: which of its sequence's new tokens, which query head of its KV head; its sequence, its KV head.
    pub fn row_place(row: i32, t: i32, group: i32, kv_heads: i32) -> (i32, i32, i32, i32) {
        let i: i32 = row % t;
        let g: i32 = row / t % group;
        let kv: i32 = row / t / group;
        let batch: i32 = kv / kv_heads;
        let head: i32 = kv % kv_heads;
        (i, g, batch, head)
    }

    /// Of tile `tile` of up to 16 of the `count` queries of each KV head: its KV head among those of all sequences, its first query; its
    /// sequence, its KV head there.
    pub fn tile_place(tile: i32, count: i32, kv_heads: i32) -> (i32, i32, i32, i32) {
        let per: i32 = ceil_div(count, 16i32);
        let kv: i32 = tile / per;
        let start: i32 = tile % per * 16i32;
        let batch: i32 = kv / kv_heads;
        let head: i32 = kv % kv_heads;
        (kv, start, batch, head)
    }

    /// First key that query `i` of `t` sees of `length`. Options: 1 causal, 2 window.
    pub fn decode_first(options: i32, length: i32, t: i32, i: i32, window: i32) -> i32 {
        let mut x: i32 = 0i32;
        if (options & 2i32) != 0i32 {
            x = max(length - t + i + 1i32 - window, 0i32);
        }
        x
    }

    /// One past the last.
    pub fn decode_end(options: i32, length: i32, t: i32, i: i32) -> i32 {
        let mut x: i32 = length;
        if (options & 1i32) != 0i32 {
            x = length - t + i + 1i32;
        }
        x
    }

    /// The keys of a sequence: no more than there is room for, whatever the list of lengths says.
    pub unsafe fn length_of(lengths: *mut i32, batch: i32, most: i32) -> i32 {
        min(load_integer(slice::<i32>(lengths, wide(batch))), most)
    }

    /// The page that holds key `key` of a sequence: one of the pool's, whatever the table says.
    pub unsafe fn page_of<const PAGED: i32>(
        table: *mut i32,
        width: i32,
        batch: i32,
        key: i32,
        page_size: i32,
        pages: i32,
    ) -> i32 {
        let mut page: i32 = batch;
        if PAGED != 0i32 {
            page = load_integer(slice::<i32>(table, wide(batch) * wide(width) + wide(key / page_size)));
            page = min(max(page, 0i32), pages - 1i32);
        }
        page
    }

    /// Whether a query's moments are wanted: under option 256 only where `todo` says so.
    pub unsafe fn is_wanted(options: i32, todo: *mut i32, row: i32) -> bool {
        let mut what: i32 = 1i32;
        if (options & 256i32) != 0i32 {
            what = load_integer(slice::<i32>(todo, wide(row)));
        }
        what != 0i32
    }

    /// A row of up to `D` numbers.
    pub unsafe fn load_one<E: ElementType, const D: i32>(
        ptr: *mut E,
        at: i64,
        cols: i32,
    ) -> Tile<f32, { [D] }> {
        let x: Tile<E, { [D] }> = load_column::<E, D>(slice::<E>(ptr, at), 1i32, cols);
        convert_tile(x)
    }

    /// A pool `[pages, page_size, cols]` of one head, whose base, strides and columns are multiples of 16 bytes.
    pub unsafe fn pool<E: ElementType>(
        ptr: *mut E,
        at: i64,
        pages: i32,
        page_size: i32,
        cols: i32,
        page_stride: i32,
        row_stride: i32,
    ) -> Tensor<E, { [-1, -1, -1] }> {
        let cols: i32 = assume_div_by::<_, 8>(cols);
        let page_stride: i32 = assume_div_by::<_, 8>(page_stride);
        let row_stride: i32 = assume_div_by::<_, 8>(row_stride);
        let shape: Shape<{ [-1, -1, -1] }> = Shape::<{ [-1, -1, -1] }> { dims: &[pages, page_size, cols] };
        let strides: Array<{ [-1, -1, 1] }> = Array::<{ [-1, -1, 1] }> { dims: &[page_stride, row_stride] };
        let view: Tensor<E, { [-1, -1, -1] }> =
            make_tensor_view(slice_aligned::<E>(ptr, at), shape, strides, new_token_unordered());
        view
    }

    /// `BN` = 64 keys or values from `key` on, where pages hold 16 or 32.
    pub unsafe fn four_parts<E: ElementType, const BN: i32, const D: i32>(
        parts: &Partition<E, { [1, 16, D] }>,
        table: *mut i32,
        width: i32,
        batch: i32,
        key: i32,
        page_size: i32,
        pages: i32,
    ) -> Tile<E, { [BN, D] }> {
        let last: i32 = width * page_size - 16i32;
        let k1: i32 = min(key + 16i32, last);
        let k2: i32 = min(key + 32i32, last);
        let k3: i32 = min(key + 48i32, last);
        let p0: i32 = page_of::<1>(table, width, batch, key, page_size, pages);
        let p1: i32 = page_of::<1>(table, width, batch, k1, page_size, pages);
        let p2: i32 = page_of::<1>(table, width, batch, k2, page_size, pages);
        let p3: i32 = page_of::<1>(table, width, batch, k3, page_size, pages);
        let x0: Tile<E, { [1, 16, D] }> = parts.load([p0, key % page_size / 16i32, 0i32]);
        let x1: Tile<E, { [1, 16, D] }> = parts.load([p1, k1 % page_size / 16i32, 0i32]);
        let x2: Tile<E, { [1, 16, D] }> = parts.load([p2, k2 % page_size / 16i32, 0i32]);
        let x3: Tile<E, { [1, 16, D] }> = parts.load([p3, k3 % page_size / 16i32, 0i32]);
        let x01: Tile<E, { [1, 32, D] }> = cat(x0, x1, 1i32);
        let x23: Tile<E, { [1, 32, D] }> = cat(x2, x3, 1i32);
        let x: Tile<E, { [1, 64, D] }> = cat(x01, x23, 1i32);
        x.reshape(const_shape![BN, D])
    }

    /// `2^x`.
    pub fn power(x: f32) -> f32 {
        single(exp2(number(x), ftz::Enabled))
    }

    /// The unit for magnitudes up to `x` in a sample: they become 1 to 2, so that others may be 2000 times as large under weights
    /// of up to 2^8, and fp16's least is 2^-24 of them.
    pub fn unit_for(x: f32) -> f32 {
        let mut unit: f32 = single(pow2_floor::<{ [1, 1] }>(number(x)));
        if x == 0.0f32 {
            unit = 1.0f32;
        }
        unit
    }

    /// Which of `BN` keys from `first` lie in `lo..hi`.
    pub fn between<const BN: i32>(first: i32, lo: i32, hi: i32) -> Tile<bool, { [BN] }> {
        let index: Tile<i32, { [BN] }> = iota(const_shape![BN]);
        let index: Tile<i32, { [BN] }> = index + broadcast_scalar(first, const_shape![BN]);
        ge_tile(index, broadcast_scalar(lo, const_shape![BN]))
            & lt_tile(index, broadcast_scalar(hi, const_shape![BN]))
    }

    /// Four of `rows` rows, evenly apart, zero past `cols`.
    pub unsafe fn sample<E: ElementType, const D: i32>(
        base: PointerTile<*mut E, { [] }>,
        stride: i32,
        rows: i32,
        cols: i32,
    ) -> Tile<f32, { [4, D] }> {
        let row: Tile<i32, { [4] }> = iota(const_shape![4]);
        let row: Tile<i32, { [4] }> = row * broadcast_scalar(rows, const_shape![4]);
        let row: Tile<i32, { [4] }> = row / constant(4i32, const_shape![4]);
        let row: Tile<i32, { [4] }> = row * broadcast_scalar(stride, const_shape![4]);
        let row: Tile<i32, { [4, D] }> = row.reshape(const_shape![4, 1]).broadcast(const_shape![4, D]);
        let col: Tile<i32, { [D] }> = iota(const_shape![D]);
        let col: Tile<i32, { [4, D] }> = col.reshape(const_shape![1, D]).broadcast(const_shape![4, D]);
        let mask: Tile<bool, { [4, D] }> = lt_tile(col, broadcast_scalar(cols, const_shape![4, D]));
        let one: PointerTile<*mut E, { [1, 1] }> = base.reshape(const_shape![1, 1]);
        let all: PointerTile<*mut E, { [4, D] }> = one.broadcast(const_shape![4, D]);
        let ptrs: PointerTile<*mut E, { [4, D] }> = all.offset_tile(row + col);
        let zero: Tile<E, { [4, D] }> = constant(E::ZERO, const_shape![4, D]);
        let (x, _tok): (Tile<E, { [4, D] }>, Token) = load_ptr_tko(
            ptrs,
            ordering::Weak,
            None::<scope::TileBlock>,
            Some(mask),
            None,
            None,
            Latency::<0>,
        );
        let x: Tile<E, { [4, D] }> = select(mask, x, zero);
        convert_tile(x)
    }

    /// Writes square tile `which` (0: S, 1: T) of a part, an array of its own.
    pub unsafe fn store_square<const D: i32>(
        moments: *mut f32,
        part: i32,
        which: i32,
        x: Tile<f32, { [D, D] }>,
    ) {
        let at: i64 = wide(part) * wide(2i32 * D * D + 2i32 * D) + wide(which * D * D);
        let ptr: PointerTile<*mut f32, { [] }> = slice_aligned::<f32>(moments, at);
        let shape: Shape<{ [D, D] }> = Shape::<{ [D, D] }> { dims: &[] };
        let strides: Array<{ [D, 1] }> = Array::<{ [D, 1] }> { dims: &[] };
        let view: Tensor<f32, { [D, D] }> = make_tensor_view(ptr, shape, strides, new_token_unordered());
        let all: PartitionMut<f32, { [D, D] }> = view.partition_full_mut(const_shape![D, D]);
        let _stored: Token = store_inside::<f32, D, D>(&all, 0i32, x);
    }

    /// Largest logits of up to 64 parts of a query, far below any where there is no part.
    pub unsafe fn part_logits(state: *mut f32, first: i32, used: i32) -> Tile<f32, { [64] }> {
        let m: Tile<f32, { [64] }> =
            load_column::<f32, 64>(slice::<f32>(state, wide(first) * wide(2i32)), 2i32, used);
        let there: Tile<i32, { [64] }> = iota(const_shape![64]);
        let there: Tile<bool, { [64] }> = lt_tile(there, broadcast_scalar(used, const_shape![64]));
        let never: Tile<f32, { [64] }> = constant(-1.0e30f32, const_shape![64]);
        select(there, m, never)
    }

    /// 16 queries from query `start` of the `count` of a KV head (`t` per query head), as rows, zero past the last.
    pub unsafe fn queries<E: ElementType, const D: i32>(
        base: PointerTile<*mut E, { [] }>,
        start: i32,
        count: i32,
        t: i32,
        head_stride: i32,
        row_stride: i32,
        cols: i32,
    ) -> Tile<E, { [16, D] }> {
        let (offset, mask): (Tile<i32, { [16, D] }>, Tile<bool, { [16, D] }>) =
            places::<D>(start, count, t, head_stride, row_stride, cols);
        let one: PointerTile<*mut E, { [1, 1] }> = base.reshape(const_shape![1, 1]);
        let all: PointerTile<*mut E, { [16, D] }> = one.broadcast(const_shape![16, D]);
        let ptrs: PointerTile<*mut E, { [16, D] }> = all.offset_tile(offset);
        let zero: Tile<E, { [16, D] }> = constant(E::ZERO, const_shape![16, D]);
        let (x, _token): (Tile<E, { [16, D] }>, Token) = load_ptr_tko(
            ptrs,
            ordering::Weak,
            None::<scope::TileBlock>,
            Some(mask),
            None,
            None,
            Latency::<0>,
        );
        select(mask, x, zero)
    }

    /// Writes such rows.
    pub unsafe fn store_queries<E: ElementType, const D: i32>(
        base: PointerTile<*mut E, { [] }>,
        start: i32,
        count: i32,
        t: i32,
        head_stride: i32,
        row_stride: i32,
        cols: i32,
        x: Tile<E, { [16, D] }>,
    ) {
        let (offset, mask): (Tile<i32, { [16, D] }>, Tile<bool, { [16, D] }>) =
            places::<D>(start, count, t, head_stride, row_stride, cols);
        let one: PointerTile<*mut E, { [1, 1] }> = base.reshape(const_shape![1, 1]);
        let all: PointerTile<*mut E, { [16, D] }> = one.broadcast(const_shape![16, D]);
        let ptrs: PointerTile<*mut E, { [16, D] }> = all.offset_tile(offset);
        store_ptr_tko(ptrs, x, ordering::Weak, None::<scope::TileBlock>, Some(mask), None, Latency::<0>);
    }

    /// Where these rows' numbers lie, and which there are.
    pub fn places<const D: i32>(
        start: i32,
        count: i32,
        t: i32,
        head_stride: i32,
        row_stride: i32,
        cols: i32,
    ) -> (Tile<i32, { [16, D] }>, Tile<bool, { [16, D] }>) {
        let r: Tile<i32, { [16] }> = iota(const_shape![16]);
        let r: Tile<i32, { [16] }> = r + broadcast_scalar(start, const_shape![16]);
        let there: Tile<bool, { [16] }> = lt_tile(r, broadcast_scalar(count, const_shape![16]));
        let g: Tile<i32, { [16] }> = r / broadcast_scalar(t, const_shape![16]);
        let i: Tile<i32, { [16] }> = r - g * broadcast_scalar(t, const_shape![16]);
        let at: Tile<i32, { [16] }> = g * broadcast_scalar(head_stride, const_shape![16])
            + i * broadcast_scalar(row_stride, const_shape![16]);
        let at: Tile<i32, { [16, D] }> = at.reshape(const_shape![16, 1]).broadcast(const_shape![16, D]);
        let there: Tile<bool, { [16, D] }> =
            there.reshape(const_shape![16, 1]).broadcast(const_shape![16, D]);
        let col: Tile<i32, { [D] }> = iota(const_shape![D]);
        let col: Tile<i32, { [16, D] }> = col.reshape(const_shape![1, D]).broadcast(const_shape![16, D]);
        (at + col, there & lt_tile(col, broadcast_scalar(cols, const_shape![16, D])))
    }

    /// Which of its sequence's new tokens each of 16 queries is.
    pub fn new_tokens(start: i32, t: i32) -> Tile<i32, { [1, 16] }> {
        let r: Tile<i32, { [16] }> = iota(const_shape![16]);
        let r: Tile<i32, { [16] }> = r + broadcast_scalar(start, const_shape![16]);
        let g: Tile<i32, { [16] }> = r / broadcast_scalar(t, const_shape![16]);
        let i: Tile<i32, { [16] }> = r - g * broadcast_scalar(t, const_shape![16]);
        i.reshape(const_shape![1, 16])
    }

    /// First key that each of 16 queries sees.
    pub fn first_seen(options: i32, start: i32, length: i32, t: i32, window: i32) -> Tile<i32, { [1, 16] }> {
        let zero: Tile<i32, { [1, 16] }> = constant(0i32, const_shape![1, 16]);
        let mut x: Tile<i32, { [1, 16] }> = zero;
        if (options & 2i32) != 0i32 {
            let from: Tile<i32, { [1, 16] }> =
                broadcast_scalar(length - t + 1i32 - window, const_shape![1, 16]);
            x = max_tile(new_tokens(start, t) + from, zero);
        }
        x
    }

    /// One past the last; those that there are not see none.
    pub fn end_seen(options: i32, start: i32, length: i32, t: i32, count: i32) -> Tile<i32, { [1, 16] }> {
        let zero: Tile<i32, { [1, 16] }> = constant(0i32, const_shape![1, 16]);
        let mut x: Tile<i32, { [1, 16] }> = broadcast_scalar(length, const_shape![1, 16]);
        if (options & 1i32) != 0i32 {
            let from: Tile<i32, { [1, 16] }> = broadcast_scalar(length - t + 1i32, const_shape![1, 16]);
            x = new_tokens(start, t) + from;
        }
        let r: Tile<i32, { [16] }> = iota(const_shape![16]);
        let there: Tile<bool, { [16] }> = lt_tile(r, broadcast_scalar(count - start, const_shape![16]));
        select(there.reshape(const_shape![1, 16]), x, zero)
    }

    /// Which of `BN` keys from `first` each of 16 queries sees.
    pub fn seen<const BN: i32>(
        first: i32,
        lo: Tile<i32, { [1, 16] }>,
        hi: Tile<i32, { [1, 16] }>,
    ) -> Tile<bool, { [BN, 16] }> {
        let key: Tile<i32, { [BN] }> = iota(const_shape![BN]);
        let key: Tile<i32, { [BN] }> = key + broadcast_scalar(first, const_shape![BN]);
        let key: Tile<i32, { [BN, 16] }> = key.reshape(const_shape![BN, 1]).broadcast(const_shape![BN, 16]);
        ge_tile(key, lo.broadcast(const_shape![BN, 16])) & lt_tile(key, hi.broadcast(const_shape![BN, 16]))
    }

    /// One over the power of two of a query's norm.
    pub fn query_factor<const D: i32>(q: Tile<f32, { [16, D] }>) -> Tile<f32, { [16, 1] }> {
        inverse_of_power::<{ [16, 1] }>(root_floor::<{ [16, 1] }>(row_dot::<16, D>(q, q)))
    }

    /// Number `which` of a tile's queries.
    pub unsafe fn record_row(record: *mut f32, tile: i32, which: i32) -> Tile<f32, { [16, 1] }> {
        let at: i64 = wide(tile) * wide(256i32) + wide(which * 16i32);
        let x: Tile<f32, { [16] }> = load_column::<f32, 16>(slice::<f32>(record, at), 1i32, 16i32);
        x.reshape(const_shape![16, 1])
    }

    /// Writes it.
    pub unsafe fn set_record_row(record: *mut f32, tile: i32, which: i32, x: Tile<f32, { [16, 1] }>) {
        let at: i64 = wide(tile) * wide(256i32) + wide(which * 16i32);
        store_column::<f32, 16>(slice::<f32>(record, at), 16i32, x.reshape(const_shape![16]));
    }
}
