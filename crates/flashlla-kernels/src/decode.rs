//! Decoding: weighted moments of a cache's keys and values in one pass, split over the keys, and the solve that ends it.
//!
//! A query needs `l = sum w`, `sum w k`, `sum w v`, `S = sum w k k^T` and `T = sum w v k^T`, with keys shifted by the first one that it
//! sees. All are entries of `X^T X` with rows `X_j = sqrt(w_j) [k_j, v_j, 1]`. X is rounded to fp16 once and every moment is made
//! from the rounded X: what comes out is then the exact answer for keys and values off by 2^-11 of themselves, where moments
//! rounded apart would not cancel in `S / l - kbar kbar^T`.

#[cutile::module]
pub mod decode {
    use super::super::tiles::tiles::*;
    use cutile::core::*;

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

    /// The page that holds key `key` of a sequence.
    pub unsafe fn page_of<const PAGED: i32>(
        table: *mut i32,
        width: i32,
        batch: i32,
        key: i32,
        page_size: i32,
    ) -> i32 {
        let mut page: i32 = batch;
        if PAGED == 1i32 {
            page = load_integer(slice::<i32>(table, wide(batch) * wide(width) + wide(key / page_size)));
        }
        page
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

    /// A number as a tile.
    pub fn number(x: f32) -> Tile<f32, { [1, 1] }> {
        broadcast_scalar(x, const_shape![1, 1])
    }

    /// A tile of one number as that number.
    pub fn single(x: Tile<f32, { [1, 1] }>) -> f32 {
        let x: Tile<f32, { [] }> = x.reshape(const_shape![]);
        let x: f32 = tile_to_scalar(x);
        x
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

    /// Square tile `which` (0: S, 1: T) of a part, as an array of its own.
    pub unsafe fn square<const D: i32>(moments: *mut f32, part: i32, which: i32) -> Tensor<f32, { [D, D] }> {
        let at: i64 = wide(part) * wide(2i32 * D * D + 2i32 * D) + wide(which * D * D);
        let ptr: PointerTile<*mut f32, { [] }> = slice_aligned::<f32>(moments, at);
        let shape: Shape<{ [D, D] }> = Shape::<{ [D, D] }> { dims: &[] };
        let strides: Array<{ [D, 1] }> = Array::<{ [D, 1] }> { dims: &[] };
        let view: Tensor<f32, { [D, D] }> = make_tensor_view(ptr, shape, strides, new_token_unordered());
        view
    }

    /// Writes it.
    pub unsafe fn store_square<const D: i32>(
        moments: *mut f32,
        part: i32,
        which: i32,
        x: Tile<f32, { [D, D] }>,
    ) {
        let view: Tensor<f32, { [D, D] }> = square::<D>(moments, part, which);
        let all: PartitionMut<f32, { [D, D] }> = view.partition_full_mut(const_shape![D, D]);
        store_inside::<f32, D, D>(&all, 0i32, x);
    }

    /// Reads it.
    pub unsafe fn load_square<const D: i32>(
        moments: *mut f32,
        part: i32,
        which: i32,
    ) -> Tile<f32, { [D, D] }> {
        let view: Tensor<f32, { [D, D] }> = square::<D>(moments, part, which);
        let all: Partition<f32, { [D, D] }> = view.partition(const_shape![D, D]);
        let tile: Tile<f32, { [D, D] }> = load_inside::<f32, D, D>(&all, 0i32);
        tile
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

    /// Moments of the keys of one split, for one query.
    /// `PAGED` = 1: a block table says where keys are; otherwise page = sequence. `WIDE` = 1: f32, whose logits tensor cores would
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
        table: *mut i32,   // [batch, width]; PAGED only
        lengths: *mut i32, // [batch]
        moments: *mut f32, // out [rows, splits, 2 D + 2, D]: S, T, sum of keys, sum of values
        state: *mut f32,   // out [rows, splits, 2]: largest logit (base 2), sum of weights
        options: i32,      // 1 causal, 2 window
        kv_heads: i32,
        group: i32, // query heads per KV head
        t: i32,     // new queries per sequence
        window: i32,
        width: i32,
        pages: i32,
        page_size: i32,   // a multiple of BN, or width 1
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
        scale: f32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let grid: (i32, i32, i32) = get_num_tile_blocks();
        let i: i32 = pid.0 % t;
        let g: i32 = pid.0 / t % group;
        let kv: i32 = pid.0 / t / group;
        let batch: i32 = kv / kv_heads;
        let head: i32 = kv % kv_heads;
        let length: i32 = load_integer(slice::<i32>(lengths, wide(batch)));
        let lo: i32 = decode_first(options, length, t, i, window);
        let hi: i32 = decode_end(options, length, t, i);
        let first: i32 = lo / BN + pid.1 * split_tiles;
        let end: i32 = min(first + split_tiles, ceil_div(hi, BN));
        if first < end {
            let kv0: Tensor<E, { [-1, -1, -1] }> =
                pool::<E>(k, wide(head) * k_head, pages, page_size, d, k_page, k_row);
            let kp: Partition<E, { [1, BN, D] }> = kv0.partition(const_shape![1, BN, D]);
            let vv0: Tensor<E, { [-1, -1, -1] }> =
                pool::<E>(v, wide(head) * v_head, pages, page_size, dv, v_page, v_row);
            let vp: Partition<E, { [1, BN, D] }> = vv0.partition(const_shape![1, BN, D]);
            let page: i32 = page_of::<PAGED>(table, width, batch, lo, page_size);
            let first_key: Tile<f32, { [D] }> = load_one::<E, D>(
                k,
                wide(page) * wide(k_page) + wide(head) * k_head + wide(lo % page_size) * wide(k_row),
                d,
            );
            let shift: Tile<f32, { [1, D] }> = first_key.reshape(const_shape![1, D]);
            let shift: Tile<f32, { [BN, D] }> = shift.broadcast(const_shape![BN, D]);
            let at: i64 = wide(batch) * q_batch + wide(head * group + g) * q_head + wide(i) * wide(q_row);
            let row: Tile<E, { [D] }> = load_column::<E, D>(slice::<E>(q, at), 1i32, d);
            let row: Tile<E, { [1, D] }> = row.reshape(const_shape![1, D]);
            let query: Tile<E, { [16, D] }> = row.broadcast(const_shape![16, D]);
            let row: Tile<f32, { [1, D] }> = convert_tile(row);
            let sc: Tile<f32, { [BN] }> = broadcast_scalar(scale * 1.4426950408889634f32, const_shape![BN]);
            let none: Tile<f32, { [BN, D] }> = constant(0.0f32, const_shape![BN, D]);
            let never: Tile<f32, { [BN] }> = constant(-1.0e30f32, const_shape![BN]);
            let half: Tile<f32, { [BN] }> = constant(0.5f32, const_shape![BN]);
            let mut m: f32 = -1.0e30f32;
            // Units from four of the split's keys and values, which lie in one page.
            let a: i32 = max(lo, first * BN);
            let more: i32 = min(hi, first * BN + BN) - a;
            let page: i32 = page_of::<PAGED>(table, width, batch, a, page_size);
            let at: i64 = wide(page) * wide(k_page) + wide(head) * k_head + wide(a % page_size) * wide(k_row);
            let some: Tile<f32, { [4, D] }> = sample::<E, D>(slice::<E>(k, at), k_row, more, d);
            let unshifted: Tile<f32, { [4, D] }> =
                first_key.reshape(const_shape![1, D]).broadcast(const_shape![4, D]);
            let k_most: f32 = max(largest::<4, D>(some - unshifted), 0.0625f32 * largest::<4, D>(unshifted));
            let at: i64 = wide(page) * wide(v_page) + wide(head) * v_head + wide(a % page_size) * wide(v_row);
            let some: Tile<f32, { [4, D] }> = sample::<E, D>(slice::<E>(v, at), v_row, more, dv);
            let v_most: f32 = largest::<4, D>(some);
            let ku: f32 = unit_for(k_most);
            let vu: f32 = unit_for(v_most);
            let to_k: f32 = 1.0f32 / ku;
            let to_v: f32 = 1.0f32 / vu;
            let mut l: Tile<f32, { [BN] }> = constant(0.0f32, const_shape![BN]);
            let mut s_kk: Tile<f32, { [D, D] }> = constant(0.0f32, const_shape![D, D]);
            let mut s_vk: Tile<f32, { [D, D] }> = constant(0.0f32, const_shape![D, D]);
            let mut s_k: Tile<f32, { [D, 16] }> = constant(0.0f32, const_shape![D, 16]);
            let mut s_v: Tile<f32, { [D, 16] }> = constant(0.0f32, const_shape![D, 16]);
            for j in first..end {
                let key: i32 = j * BN;
                let page: i32 = page_of::<PAGED>(table, width, batch, key, page_size);
                let slot: i32 = key % page_size / BN;
                let kt: Tile<E, { [1, BN, D] }> = kp.load([page, slot, 0i32]);
                let kt: Tile<E, { [BN, D] }> = kt.reshape(const_shape![BN, D]);
                let kf: Tile<f32, { [BN, D] }> = convert_tile(kt);
                let products: Tile<f32, { [BN] }> = if WIDE == 1i32 {
                    reduce_sum(kf * row.broadcast(const_shape![BN, D]), 1i32)
                } else {
                    let zero: Tile<f32, { [BN, 16] }> = constant(0.0f32, const_shape![BN, 16]);
                    let products: Tile<f32, { [BN, 16] }> = mma(kt, query.transpose(), zero);
                    reduce_max(products, 1i32)
                };
                let mut s: Tile<f32, { [BN] }> = products * sc;
                let mut kf: Tile<f32, { [BN, D] }> = kf - shift;
                let edge: bool = (key < lo) || (key + BN > hi);
                if edge {
                    let seen: Tile<bool, { [BN] }> = between::<BN>(key, lo, hi);
                    s = select(seen, s, never);
                    let seen: Tile<bool, { [BN, D] }> =
                        seen.reshape(const_shape![BN, 1]).broadcast(const_shape![BN, D]);
                    kf = select(seen, kf, none);
                }
                let top: Tile<f32, { [] }> = reduce_max(s, 0i32);
                let top: f32 = tile_to_scalar(top);
                // Weights stay below 2^8, so that few tiles move the maximum.
                if top > m + 8.0f32 {
                    let f: f32 = power(m - top);
                    l = l * broadcast_scalar(f, const_shape![BN]);
                    s_kk = s_kk * broadcast_scalar(f, const_shape![D, D]);
                    s_vk = s_vk * broadcast_scalar(f, const_shape![D, D]);
                    s_k = s_k * broadcast_scalar(f, const_shape![D, 16]);
                    s_v = s_v * broadcast_scalar(f, const_shape![D, 16]);
                    m = top;
                }
                let root: Tile<f32, { [BN] }> =
                    exp2((s - broadcast_scalar(m, const_shape![BN])) * half, ftz::Enabled);
                let of_k: Tile<f32, { [BN] }> = root * broadcast_scalar(to_k, const_shape![BN]);
                let of_k: Tile<f32, { [BN, D] }> =
                    of_k.reshape(const_shape![BN, 1]).broadcast(const_shape![BN, D]);
                let xk: Tile<f16, { [BN, D] }> = convert_tile(kf * of_k);
                let sixty_four: Tile<f32, { [BN] }> = constant(64.0f32, const_shape![BN]);
                let x1: Tile<f16, { [BN] }> = convert_tile(root * sixty_four);
                let w: Tile<f32, { [BN] }> = convert_tile(x1);
                l = l + w * w;
                let x1: Tile<f16, { [BN, 16] }> =
                    x1.reshape(const_shape![BN, 1]).broadcast(const_shape![BN, 16]);
                s_kk = mma(xk.transpose(), xk, s_kk);
                s_k = mma(xk.transpose(), x1, s_k);
                let vt: Tile<E, { [1, BN, D] }> = vp.load([page, slot, 0i32]);
                let vt: Tile<E, { [BN, D] }> = vt.reshape(const_shape![BN, D]);
                let mut vf: Tile<f32, { [BN, D] }> = convert_tile(vt);
                if edge {
                    let seen: Tile<bool, { [BN] }> = between::<BN>(key, lo, hi);
                    let seen: Tile<bool, { [BN, D] }> =
                        seen.reshape(const_shape![BN, 1]).broadcast(const_shape![BN, D]);
                    vf = select(seen, vf, none);
                }
                let of_v: Tile<f32, { [BN] }> = root * broadcast_scalar(to_v, const_shape![BN]);
                let of_v: Tile<f32, { [BN, D] }> =
                    of_v.reshape(const_shape![BN, 1]).broadcast(const_shape![BN, D]);
                let xv: Tile<f16, { [BN, D] }> = convert_tile(vf * of_v);
                s_vk = mma(xv.transpose(), xk, s_vk);
                s_v = mma(xv.transpose(), x1, s_v);
            }
            let part: i32 = pid.0 * grid.1 + pid.1;
            store_square::<D>(moments, part, 0i32, s_kk * broadcast_scalar(ku * ku, const_shape![D, D]));
            store_square::<D>(moments, part, 1i32, s_vk * broadcast_scalar(vu * ku, const_shape![D, D]));
            let k_sum: Tile<f32, { [D] }> = reduce_max(s_k, 1i32);
            let v_sum: Tile<f32, { [D] }> = reduce_max(s_v, 1i32);
            let at: i64 = wide(part) * wide(2i32 * D * D + 2i32 * D) + wide(2i32 * D * D);
            let k_sum: Tile<f32, { [D] }> = k_sum * broadcast_scalar(ku * 0.015625f32, const_shape![D]);
            let v_sum: Tile<f32, { [D] }> = v_sum * broadcast_scalar(vu * 0.015625f32, const_shape![D]);
            store_column::<f32, D>(slice::<f32>(moments, at), D, k_sum);
            store_column::<f32, D>(slice::<f32>(moments, at + wide(D)), D, v_sum);
            let l: Tile<f32, { [] }> = reduce_sum(l, 0i32);
            let l: f32 = tile_to_scalar(l);
            store_number(state, wide(part) * wide(2i32), m);
            store_number(state, wide(part) * wide(2i32) + wide(1i32), l * 0.000244140625f32);
        }
    }

    /// Folds the parts of one query (up to 64) into the first, in a fixed order.
    /// Grid (batch * kv_heads * group * t, D + 1).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_decode_fold<const D: i32, const W: i32>(
        lengths: *mut i32,
        moments: *mut f32, // [rows, splits, 2 D + 2, D], and memory for 16 more parts behind
        state: *mut f32,
        options: i32,
        kv_heads: i32,
        group: i32,
        t: i32,
        window: i32,
        splits: i32,
        split_keys: i32, // keys of a split: a multiple of `tile`
        tile: i32,       // keys of a tile of the split
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let i: i32 = pid.0 % t;
        let batch: i32 = pid.0 / t / group / kv_heads;
        let length: i32 = load_integer(slice::<i32>(lengths, wide(batch)));
        let lo: i32 = decode_first(options, length, t, i, window);
        let hi: i32 = decode_end(options, length, t, i);
        let used: i32 = ceil_div(hi - lo / tile * tile, split_keys);
        if used > 1i32 {
            let all: Tile<f32, { [] }> = reduce_max(part_logits(state, pid.0 * splits, used), 0i32);
            let m: f32 = tile_to_scalar(all);
            let mut sum: Tile<f32, { [W] }> = constant(0.0f32, const_shape![W]);
            let at: i64 = wide(pid.0 * splits) * wide(2i32 * D * D + 2i32 * D) + wide(pid.1 * W);
            let base: PointerTile<*mut f32, { [] }> = slice_aligned::<f32>(moments, at);
            let shape: Shape<{ [-1, W] }> = Shape::<{ [-1, W] }> { dims: &[64i32] };
            let strides: Array<{ [-1, 1] }> = Array::<{ [-1, 1] }> { dims: &[2i32 * D * D + 2i32 * D] };
            let view: Tensor<f32, { [-1, W] }> =
                make_tensor_view(base, shape, strides, new_token_unordered());
            let view: Partition<f32, { [16, W] }> = view.partition(const_shape![16, W]);
            let nothing: Tile<f32, { [16, W] }> = constant(0.0f32, const_shape![16, W]);
            for c in 0i32..ceil_div(used, 16i32) {
                let (x, _token): (Tile<f32, { [16, W] }>, Token) = load_view_raw(
                    &view,
                    [c, 0i32],
                    Some(new_token_unordered()),
                    ordering::Weak,
                    scope::TileBlock,
                    tma::Disabled,
                    None,
                    [true, true],
                    const_shape![16, W],
                );
                let at: i64 = wide(pid.0 * splits + c * 16i32) * wide(2i32);
                let of: Tile<f32, { [16] }> =
                    load_column::<f32, 16>(slice::<f32>(state, at), 2i32, used - c * 16i32);
                let f: Tile<f32, { [16] }> = exp2(of - broadcast_scalar(m, const_shape![16]), ftz::Enabled);
                let there: Tile<i32, { [16] }> = iota(const_shape![16]);
                let there: Tile<bool, { [16] }> =
                    lt_tile(there, broadcast_scalar(used - c * 16i32, const_shape![16]));
                let there: Tile<bool, { [16, W] }> =
                    there.reshape(const_shape![16, 1]).broadcast(const_shape![16, W]);
                let f: Tile<f32, { [16, W] }> = f.reshape(const_shape![16, 1]).broadcast(const_shape![16, W]);
                let part: Tile<f32, { [W] }> = reduce_sum(select(there, x * f, nothing), 0i32);
                sum = sum + part;
            }
            store_column::<f32, W>(base, W, sum);
        }
    }

    /// Solves for one query and writes its output, from its folded parts.
    /// Grid (batch * kv_heads * group * t).
    #[cutile::entry(unchecked_accesses = true, optimization_hints = (sm_90 = (max_divisibility = 16,),))]
    pub unsafe fn lla_decode_merge<E: ElementType, const D: i32>(
        q: *mut E,
        k: *mut E,
        table: *mut i32,
        lengths: *mut i32,
        moments: *mut f32,
        state: *mut f32,
        ridge: *mut f32,      // [batch, heads, t], strided
        out: *mut E,          // out [batch, heads, t, dv], strided
        lse: *mut f32,        // out [batch, heads, t], natural
        key_mean: *mut f32,   // out [batch, heads, t, d] if save_state
        probe: *mut f32,      // out [batch, heads, t, d] if save_state; in: the given one under option 16
        iterations: *mut i32, // out [batch, heads, t] if diagnostics
        relative: *mut f32,   // out [batch, heads, t] if diagnostics: |r| / |delta|
        options: i32,         // 1 causal, 2 window, 16 probe given, 64 block table
        kv_heads: i32,
        group: i32,
        t: i32,
        window: i32,
        width: i32,
        page_size: i32,
        splits: i32,
        split_keys: i32, // keys of a split: a multiple of `tile`
        tile: i32,       // keys of a tile of the split
        d: i32,
        dv: i32,
        q_batch: i64,
        q_head: i64,
        q_row: i32,
        k_page: i32,
        k_head: i64,
        k_row: i32,
        _scale: f32,
        ridge_batch: i32,
        ridge_head: i32,
        ridge_row: i32,
        out_batch: i64,
        out_head: i64,
        out_row: i32,
        tolerance2: f32, // square of the relative residual asked for
        max_iterations: i32,
        save_state: i32,
        diagnostics: i32,
    ) {
        let pid: (i32, i32, i32) = get_tile_block_id();
        let i: i32 = pid.0 % t;
        let g: i32 = pid.0 / t % group;
        let kv: i32 = pid.0 / t / group;
        let batch: i32 = kv / kv_heads;
        let head: i32 = kv % kv_heads;
        let query_head: i32 = head * group + g;
        let length: i32 = load_integer(slice::<i32>(lengths, wide(batch)));
        let lo: i32 = decode_first(options, length, t, i, window);
        let hi: i32 = decode_end(options, length, t, i);
        let row: i32 = pid.0;
        let out_at: i64 = wide(batch) * out_batch + wide(query_head) * out_head + wide(i) * wide(out_row);
        if hi <= lo {
            let zero: Tile<E, { [D] }> = constant(E::ZERO, const_shape![D]);
            let zeros: Tile<f32, { [D] }> = constant(0.0f32, const_shape![D]);
            store_column::<E, D>(slice::<E>(out, out_at), dv, zero);
            let empty: Tile<f32, { [1] }> = constant(f32::NEG_INFINITY, const_shape![1]);
            store_column::<f32, 1>(slice::<f32>(lse, wide(row)), 1i32, empty);
            if save_state != 0i32 {
                store_column::<f32, D>(slice::<f32>(key_mean, wide(row) * wide(d)), d, zeros);
                if (options & 16i32) == 0i32 {
                    store_column::<f32, D>(slice::<f32>(probe, wide(row) * wide(d)), d, zeros);
                }
            }
            if diagnostics != 0i32 {
                let none: Tile<i32, { [1] }> = constant(0i32, const_shape![1]);
                store_column::<i32, 1>(slice::<i32>(iterations, wide(row)), 1i32, none);
                store_number(relative, wide(row), 0.0f32);
            }
        } else {
            let used: i32 = ceil_div(hi - lo / tile * tile, split_keys);
            let logits: Tile<f32, { [64] }> = part_logits(state, row * splits, used);
            let all: Tile<f32, { [] }> = reduce_max(logits, 0i32);
            let m: f32 = tile_to_scalar(all);
            let weights: Tile<f32, { [64] }> = load_column::<f32, 64>(
                slice::<f32>(state, wide(row * splits) * wide(2i32) + wide(1i32)),
                2i32,
                used,
            );
            let f: Tile<f32, { [64] }> = exp2(logits - broadcast_scalar(m, const_shape![64]), ftz::Enabled);
            let all: Tile<f32, { [] }> = reduce_sum(weights * f, 0i32);
            let l: f32 = tile_to_scalar(all);
            let s: Tile<f32, { [D, D] }> = load_square::<D>(moments, row * splits, 0i32);
            let at: i64 = wide(row * splits) * wide(2i32 * D * D + 2i32 * D) + wide(2i32 * D * D);
            let k_sum: Tile<f32, { [D] }> = load_one::<f32, D>(moments, at, D);
            let v_sum: Tile<f32, { [D] }> = load_one::<f32, D>(moments, at + wide(D), D);
            let inverse: f32 = 1.0f32 / l;
            let mean: Tile<f32, { [D] }> = k_sum * broadcast_scalar(inverse, const_shape![D]);
            let v_mean: Tile<f32, { [D] }> = v_sum * broadcast_scalar(inverse, const_shape![D]);
            let mut page: i32 = batch;
            if (options & 64i32) != 0i32 {
                page = page_of::<1>(table, width, batch, lo, page_size);
            }
            let shift: Tile<f32, { [D] }> = load_one::<E, D>(
                k,
                wide(page) * wide(k_page) + wide(head) * k_head + wide(lo % page_size) * wide(k_row),
                d,
            );
            let at: i64 = wide(batch) * q_batch + wide(query_head) * q_head + wide(i) * wide(q_row);
            let query: Tile<f32, { [D] }> = load_one::<E, D>(q, at, d);
            let delta: Tile<f32, { [D] }> = mean - (query - shift);
            let mean_r: Tile<f32, { [1, D] }> = mean.reshape(const_shape![1, D]);
            let mean_c: Tile<f32, { [D, 1] }> = mean.reshape(const_shape![D, 1]);
            let mut x: Tile<f32, { [1, D] }> = constant(0.0f32, const_shape![1, D]);
            let mut it: i32 = 0i32;
            let mut left: f32 = 0.0f32;
            if (options & 16i32) != 0i32 {
                let given: Tile<f32, { [D] }> = load_one::<f32, D>(probe, wide(row) * wide(d), d);
                x = given.reshape(const_shape![1, D]);
            } else {
                // Vectors are rows; the covariance is symmetric, so that a product with a column gives a row.
                let c: Tile<f32, { [D, D] }> = s * broadcast_scalar(inverse, const_shape![D, D])
                    - mean_c.broadcast(const_shape![D, D]) * mean_r.broadcast(const_shape![D, D]);
                let ridge_at: i32 = batch * ridge_batch + query_head * ridge_head + i * ridge_row;
                let lambda: f32 = load_scalar(slice::<f32>(ridge, wide(ridge_at)));
                let mut r_r: Tile<f32, { [1, D] }> = delta.reshape(const_shape![1, D]);
                let mut d_r: Tile<f32, { [1, D] }> = r_r;
                let rr: Tile<f32, { [1] }> = reduce_sum(r_r * r_r, 1i32);
                let mut rr: f32 = single(rr.reshape(const_shape![1, 1]));
                let start: f32 = rr;
                while (it < max_iterations) && (rr > tolerance2 * start) {
                    let d_c: Tile<f32, { [D, 1] }> = d_r.reshape(const_shape![D, 1]);
                    let c_d: Tile<f32, { [D] }> = reduce_sum(c * d_c.broadcast(const_shape![D, D]), 0i32);
                    let c_d: Tile<f32, { [1, D] }> = c_d.reshape(const_shape![1, D]);
                    let a_r: Tile<f32, { [1, D] }> = c_d + d_r * broadcast_scalar(lambda, const_shape![1, D]);
                    let along: Tile<f32, { [1] }> = reduce_sum(d_r * a_r, 1i32);
                    let step: f32 = rr / single(along.reshape(const_shape![1, 1]));
                    x = x + d_r * broadcast_scalar(step, const_shape![1, D]);
                    r_r = r_r - a_r * broadcast_scalar(step, const_shape![1, D]);
                    let now: Tile<f32, { [1] }> = reduce_sum(r_r * r_r, 1i32);
                    let now: f32 = single(now.reshape(const_shape![1, 1]));
                    let turn: f32 = now / rr;
                    d_r = r_r + d_r * broadcast_scalar(turn, const_shape![1, D]);
                    rr = now;
                    it = it + 1i32;
                }
                if start > 0.0f32 {
                    left = rr / start;
                }
                // A system that holds no numbers ends at once: its answer is no number either.
                if start != start {
                    x = broadcast_scalar(start, const_shape![1, D]);
                }
            }
            let cov: Tile<f32, { [D, D] }> = load_square::<D>(moments, row * splits, 1i32);
            let v_c: Tile<f32, { [D, 1] }> = v_mean.reshape(const_shape![D, 1]);
            let cov: Tile<f32, { [D, D] }> = cov * broadcast_scalar(inverse, const_shape![D, D])
                - v_c.broadcast(const_shape![D, D]) * mean_r.broadcast(const_shape![D, D]);
            let part: Tile<f32, { [D] }> = reduce_sum(cov * x.broadcast(const_shape![D, D]), 1i32);
            let result: Tile<E, { [D] }> = convert_tile(v_mean - part);
            store_column::<E, D>(slice::<E>(out, out_at), dv, result);
            let log: Tile<f32, { [1, 1] }> = log2(number(l));
            store_number(lse, wide(row), (m + single(log)) * 0.6931471805599453f32);
            if save_state != 0i32 {
                store_column::<f32, D>(slice::<f32>(key_mean, wide(row) * wide(d)), d, mean + shift);
                if (options & 16i32) == 0i32 {
                    let x: Tile<f32, { [D] }> = x.reshape(const_shape![D]);
                    store_column::<f32, D>(slice::<f32>(probe, wide(row) * wide(d)), d, x);
                }
            }
            if diagnostics != 0i32 {
                store_column::<i32, 1>(
                    slice::<i32>(iterations, wide(row)),
                    1i32,
                    broadcast_scalar(it, const_shape![1]),
                );
                store_number(
                    relative,
                    wide(row),
                    single(sqrt(number(left), rounding::NearestEven, ftz::Disabled)),
                );
            }
        }
    }
}
