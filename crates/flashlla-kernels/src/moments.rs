//! Weighted moments of a run of keys and values, for one query.
//!
//! All are entries of `X^T X` with rows `X_j = sqrt(w_j) [k_j, v_j, 1]`. X is rounded to fp16 once and every moment is made from the
//! rounded X: what comes out is then the exact answer for keys and values off by 2^-11 of themselves, where moments rounded apart
//! would not cancel in `S / l - kbar kbar^T`.
// A tile program's variables need a value before a branch gives them theirs.
#![allow(unused_assignments)]

#[cutile::module]
pub mod moments {
    use super::super::decode::decode::*;
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// `sum w k k^T`, `sum w v k^T`, `sum w k`, `sum w v`, the largest logit (base 2) and `sum w`, of the keys from `lo` to `hi` in tiles
    /// `first` to `end`, shifted by key `lo`. Weights are those of logits less the largest.
    ///
    /// `PAGED`: 0 page = sequence, 1 pages of a multiple of BN keys, 2 pages of 16 or 32. `WIDE` = 1: f32, whose logits tensor cores would
    /// round.
    pub unsafe fn moments_of<
        E: ElementType,
        const BN: i32,
        const D: i32,
        const PAGED: i32,
        const WIDE: i32,
    >(
        q: *mut E,
        q_at: i64,
        k: *mut E,
        v: *mut E,
        table: *mut i32,
        scale: *mut f32,
        batch: i32,
        head: i32, // KV head
        lo: i32,
        hi: i32,
        first: i32,
        end: i32,
        width: i32,
        pages: i32,
        page_size: i32,
        d: i32,
        dv: i32,
        k_page: i32,
        k_head: i64,
        k_row: i32,
        v_page: i32,
        v_head: i64,
        v_row: i32,
        scale_head: i32,
    ) -> (Tile<f32, { [D, D] }>, Tile<f32, { [D, D] }>, Tile<f32, { [D] }>, Tile<f32, { [D] }>, f32, f32)
    {
        let kv0: Tensor<E, { [-1, -1, -1] }> =
            pool::<E>(k, wide(head) * k_head, pages, page_size, d, k_page, k_row);
        let kp: Partition<E, { [1, BN, D] }> = kv0.partition(const_shape![1, BN, D]);
        let vv0: Tensor<E, { [-1, -1, -1] }> =
            pool::<E>(v, wide(head) * v_head, pages, page_size, dv, v_page, v_row);
        let vp: Partition<E, { [1, BN, D] }> = vv0.partition(const_shape![1, BN, D]);
        let page: i32 = page_of::<PAGED>(table, width, batch, lo, page_size, pages);
        let first_key: Tile<f32, { [D] }> = load_one::<E, D>(
            k,
            wide(page) * wide(k_page) + wide(head) * k_head + wide(lo % page_size) * wide(k_row),
            d,
        );
        let shift: Tile<f32, { [1, D] }> = first_key.reshape(const_shape![1, D]);
        let shift: Tile<f32, { [BN, D] }> = shift.broadcast(const_shape![BN, D]);
        let row: Tile<E, { [D] }> = load_column::<E, D>(slice::<E>(q, q_at), 1i32, d);
        let row: Tile<E, { [1, D] }> = row.reshape(const_shape![1, D]);
        let query: Tile<E, { [16, D] }> = row.broadcast(const_shape![16, D]);
        let row: Tile<f32, { [1, D] }> = convert_tile(row);
        let scale: f32 = load_scalar(slice::<f32>(scale, wide(head * scale_head)));
        // Logits are halved: roots of weights are wanted.
        let sc: Tile<f32, { [BN] }> = broadcast_scalar(scale * 0.7213475204444817f32, const_shape![BN]);
        let none: Tile<f32, { [BN, D] }> = constant(0.0f32, const_shape![BN, D]);
        let never: Tile<f32, { [BN] }> = constant(-1.0e30f32, const_shape![BN]);
        let no_key: Tile<E, { [BN, D] }> = constant(E::ZERO, const_shape![BN, D]);
        let mut m: f32 = -5.0e29f32;
        // Units from four of the split's keys and values, which lie in one page.
        let a: i32 = max(lo, first * BN);
        let mut more: i32 = min(hi, first * BN + BN) - a;
        if PAGED == 2i32 {
            more = min(more, page_size - a % page_size);
        }
        let page: i32 = page_of::<PAGED>(table, width, batch, a, page_size, pages);
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
        let k_log: f32 = single(log2(number(ku)));
        let to_v: f32 = 0.015625f32 / vu;
        let mut l: Tile<f32, { [BN] }> = constant(0.0f32, const_shape![BN]);
        let mut s_kk: Tile<f32, { [D, D] }> = constant(0.0f32, const_shape![D, D]);
        let mut s_vk: Tile<f32, { [D, D] }> = constant(0.0f32, const_shape![D, D]);
        let mut s_k: Tile<f32, { [D, 8] }> = constant(0.0f32, const_shape![D, 8]);
        let mut s_v: Tile<f32, { [D, 8] }> = constant(0.0f32, const_shape![D, 8]);
        let key_parts: Partition<E, { [1, 16, D] }> = kv0.partition(const_shape![1, 16, D]);
        let value_parts: Partition<E, { [1, 16, D] }> = vv0.partition(const_shape![1, 16, D]);
        for j in first..end {
            let key: i32 = j * BN;
            let page: i32 = page_of::<PAGED>(table, width, batch, key, page_size, pages);
            let slot: i32 = key % page_size / BN;
            let kt: Tile<E, { [BN, D] }> = if PAGED == 2i32 {
                four_parts::<E, BN, D>(&key_parts, table, width, batch, key, page_size, pages)
            } else {
                let kt: Tile<E, { [1, BN, D] }> = kp.load([page, slot, 0i32]);
                kt.reshape(const_shape![BN, D])
            };
            let products: Tile<f32, { [BN] }> = if WIDE == 1i32 {
                let kf: Tile<f32, { [BN, D] }> = convert_tile(kt);
                reduce_sum(kf * row.broadcast(const_shape![BN, D]), 1i32)
            } else {
                let zero: Tile<f32, { [BN, 16] }> = constant(0.0f32, const_shape![BN, 16]);
                let products: Tile<f32, { [BN, 16] }> = mma(kt, query.transpose(), zero);
                reduce_max(products, 1i32)
            };
            let mut s: Tile<f32, { [BN] }> = products * sc;
            let edge: bool = (key < lo) || (key + BN > hi);
            if edge {
                s = select(between::<BN>(key, lo, hi), s, never);
            }
            // Keys become numbers while their logits are on their way; 128 wide, only once their weights are known: there would be no
            // registers to hold them, and what is outside is taken out before.
            let mut kf: Tile<f32, { [BN, D] }> = none;
            if D == 64i32 {
                let x: Tile<f32, { [BN, D] }> = convert_tile(kt);
                kf = x - shift;
                if edge {
                    kf = select(rows_between::<BN, D>(key, lo, hi), kf, none);
                }
            }
            let top: Tile<f32, { [] }> = reduce_max(s, 0i32);
            let top: f32 = tile_to_scalar(top);
            // Weights stay below 2^8, so that few tiles move the maximum.
            if top > m + 4.0f32 {
                let f: f32 = power((m - top) * 2.0f32);
                l = l * broadcast_scalar(f, const_shape![BN]);
                s_kk = s_kk * broadcast_scalar(f, const_shape![D, D]);
                s_vk = s_vk * broadcast_scalar(f, const_shape![D, D]);
                s_k = s_k * broadcast_scalar(f, const_shape![D, 8]);
                s_v = s_v * broadcast_scalar(f, const_shape![D, 8]);
                m = top;
            }
            // In the keys' unit.
            let root: Tile<f32, { [BN] }> =
                exp2(s - broadcast_scalar(m + k_log, const_shape![BN]), ftz::Enabled);
            if D != 64i32 {
                let mut kt: Tile<E, { [BN, D] }> = kt;
                if edge {
                    kt = select(rows_between::<BN, D>(key, lo, hi), kt, no_key);
                }
                let x: Tile<f32, { [BN, D] }> = convert_tile(kt);
                kf = x - shift;
            }
            let of_k: Tile<f32, { [BN, D] }> =
                root.reshape(const_shape![BN, 1]).broadcast(const_shape![BN, D]);
            let xk: Tile<f16, { [BN, D] }> = convert_tile(kf * of_k);
            let raised: Tile<f32, { [BN] }> = root * broadcast_scalar(ku * 64.0f32, const_shape![BN]);
            let x1: Tile<f16, { [BN] }> = convert_tile(raised);
            let w: Tile<f32, { [BN] }> = convert_tile(x1);
            l = l + w * w;
            let x1: Tile<f16, { [BN, 8] }> = x1.reshape(const_shape![BN, 1]).broadcast(const_shape![BN, 8]);
            s_kk = mma(xk.transpose(), xk, s_kk);
            s_k = mma(xk.transpose(), x1, s_k);
            let vt: Tile<E, { [BN, D] }> = if PAGED == 2i32 {
                four_parts::<E, BN, D>(&value_parts, table, width, batch, key, page_size, pages)
            } else {
                let vt: Tile<E, { [1, BN, D] }> = vp.load([page, slot, 0i32]);
                vt.reshape(const_shape![BN, D])
            };
            let mut vf: Tile<f32, { [BN, D] }> = none;
            if D == 64i32 {
                vf = convert_tile(vt);
                if edge {
                    vf = select(rows_between::<BN, D>(key, lo, hi), vf, none);
                }
            } else {
                let mut vt: Tile<E, { [BN, D] }> = vt;
                if edge {
                    vt = select(rows_between::<BN, D>(key, lo, hi), vt, no_key);
                }
                vf = convert_tile(vt);
            }
            let of_v: Tile<f32, { [BN] }> = raised * broadcast_scalar(to_v, const_shape![BN]);
            let of_v: Tile<f32, { [BN, D] }> =
                of_v.reshape(const_shape![BN, 1]).broadcast(const_shape![BN, D]);
            let xv: Tile<f16, { [BN, D] }> = convert_tile(vf * of_v);
            s_vk = mma(xv.transpose(), xk, s_vk);
            s_v = mma(xv.transpose(), x1, s_v);
        }
        let s_kk: Tile<f32, { [D, D] }> = s_kk * broadcast_scalar(ku * ku, const_shape![D, D]);
        let s_vk: Tile<f32, { [D, D] }> = s_vk * broadcast_scalar(vu * ku, const_shape![D, D]);
        let k_sum: Tile<f32, { [D] }> = reduce_max(s_k, 1i32);
        let v_sum: Tile<f32, { [D] }> = reduce_max(s_v, 1i32);
        let k_sum: Tile<f32, { [D] }> = k_sum * broadcast_scalar(ku * 0.015625f32, const_shape![D]);
        let v_sum: Tile<f32, { [D] }> = v_sum * broadcast_scalar(vu * 0.015625f32, const_shape![D]);
        let l: Tile<f32, { [] }> = reduce_sum(l, 0i32);
        let l: f32 = tile_to_scalar(l);
        (s_kk, s_vk, k_sum, v_sum, m * 2.0f32, l * 0.000244140625f32)
    }

    /// Which rows of a tile of `BN` keys from `first` lie in `lo..hi`.
    fn rows_between<const BN: i32, const D: i32>(first: i32, lo: i32, hi: i32) -> Tile<bool, { [BN, D] }> {
        let seen: Tile<bool, { [BN] }> = between::<BN>(first, lo, hi);
        seen.reshape(const_shape![BN, 1]).broadcast(const_shape![BN, D])
    }
}
