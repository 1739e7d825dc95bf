//! Conjugate gradients over a cache's keys for 16 queries that share them: a pass over the keys, and the step after it.
//!
//! Queries are columns of products: keys and values go into these as the cache has them, as rows. Between passes they are rows, so that
//! a reduction of one query stays within a warp. Weights and probes go in two and three
//! terms of the cache's type, so that nothing but the direction is rounded to it; which direction is taken is no matter of precision.
//!
//! Directions are made conjugate to the last one by its product with the matrix, so that a direction may be rounded or be any vector:
//! the first one is the query (see `forward`). A query ends when the step that needs no pass brings its residual far enough down, or
//! gives up when the passes that are left will not do: then its moments are summed instead.
// A tile program's variables need a value before a branch gives them theirs.
#![allow(unused_assignments)]

#[cutile::module]
pub mod columns {
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

    /// Which of 16 places hold one of `count` queries.
    pub fn queries_there(count: i32) -> Tile<bool, { [16, 1] }> {
        let there: Tile<i32, { [16] }> = iota(const_shape![16]);
        let there: Tile<bool, { [16] }> = lt_tile(there, broadcast_scalar(count, const_shape![16]));
        there.reshape(const_shape![16, 1])
    }

    /// Numbers per query as they go with columns.
    pub fn as_columns(x: Tile<f32, { [16, 1] }>) -> Tile<f32, { [1, 16] }> {
        x.reshape(const_shape![1, 16])
    }

    /// As they go with rows.
    pub fn as_rows(x: Tile<f32, { [1, 16] }>) -> Tile<f32, { [16, 1] }> {
        x.reshape(const_shape![16, 1])
    }

    /// One pass over the key tiles `first` to `end`, for queries that see keys `row_lo` to `row_hi`; all of them see all of keys `full0`
    /// to `full1`.
    ///
    /// `KIND` 0 finds the weights and applies the covariance to the query, which is the first direction; 1 applies it to a direction, `x1`;
    /// 2 makes the outputs of a probe in three terms. Products with it are counted from `from`, times `factor`.
    ///
    /// The shift of the logits (the largest of the first tile in KIND 0, given otherwise), sums of keys times weights (0), of keys or
    /// values times the other weights, of weights (0) and of the other weights (0, 1).
    pub unsafe fn pass_over<
        E: ElementType,
        const BN: i32,
        const D: i32,
        const PAGED: i32,
        const KIND: i32,
        const NARROW: i32,
    >(
        kp: &Partition<E, { [1, BN, D] }>,
        key_parts: &Partition<E, { [1, 16, D] }>,
        vp: &Partition<E, { [1, BN, D] }>,
        value_parts: &Partition<E, { [1, 16, D] }>,
        table: *mut i32,
        width: i32,
        batch: i32,
        pages: i32,
        page_size: i32,
        first: i32,
        end: i32,
        full0: i32,
        full1: i32,
        row_lo: Tile<i32, { [1, 16] }>,
        row_hi: Tile<i32, { [1, 16] }>,
        scale: f32,
        query: Tile<E, { [16, D] }>,
        shift: Tile<f32, { [1, 16] }>,
        from: Tile<f32, { [1, 16] }>,
        factor: Tile<f32, { [1, 16] }>,
        x1: Tile<E, { [16, D] }>,
        x2: Tile<E, { [16, D] }>,
        x3: Tile<E, { [16, D] }>,
    ) -> (
        Tile<f32, { [1, 16] }>,
        Tile<f32, { [D, 16] }>,
        Tile<f32, { [D, 16] }>,
        Tile<f32, { [1, 16] }>,
        Tile<f32, { [1, 16] }>,
    ) {
        let sc: Tile<f32, { [BN, 16] }> =
            broadcast_scalar(scale * 1.4426950408889634f32, const_shape![BN, 16]);
        let never: Tile<f32, { [BN, 16] }> = constant(-3.0e38f32, const_shape![BN, 16]);
        let zero: Tile<f32, { [BN, 16] }> = constant(0.0f32, const_shape![BN, 16]);
        let mut m: Tile<f32, { [1, 16] }> = shift;
        let mut sum: Tile<f32, { [D, 16] }> = constant(0.0f32, const_shape![D, 16]);
        let mut other: Tile<f32, { [D, 16] }> = constant(0.0f32, const_shape![D, 16]);
        let mut l: Tile<f32, { [BN, 16] }> = zero;
        let mut total: Tile<f32, { [BN, 16] }> = zero;
        if KIND == 0i32 {
            // Logits are counted from the largest of the first tile: bf16 has room for all that come, up to 2^120 times as large a
            // weight. What overflows in spite of that is left to the moments, as all is that is not finite.
            let key: i32 = first * BN;
            let page: i32 = page_of::<PAGED>(table, width, batch, key, page_size, pages);
            let kt: Tile<E, { [BN, D] }> = if PAGED == 2i32 {
                four_parts::<E, BN, D>(key_parts, table, width, batch, key, page_size, pages)
            } else {
                let kt: Tile<E, { [1, BN, D] }> = kp.load([page, key % page_size / BN, 0i32]);
                kt.reshape(const_shape![BN, D])
            };
            let product: Tile<f32, { [BN, 16] }> = mma(kt, query.transpose(), zero);
            let top: Tile<f32, { [16] }> = reduce_max(product * sc, 0i32);
            m = max_tile(top.reshape(const_shape![1, 16]), m);
        }
        for j in first..end {
            let key: i32 = j * BN;
            let page: i32 = page_of::<PAGED>(table, width, batch, key, page_size, pages);
            let slot: i32 = key % page_size / BN;
            // How far ahead the compiler works, as it was fastest.
            let kt: Tile<E, { [BN, D] }> = if PAGED == 2i32 {
                four_parts::<E, BN, D>(key_parts, table, width, batch, key, page_size, pages)
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
            let product: Tile<f32, { [BN, 16] }> = mma(kt, query.transpose(), zero);
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
                let (hi, lo, both): (Tile<E, { [BN, 16] }>, Tile<E, { [BN, 16] }>, Tile<f32, { [BN, 16] }>) =
                    two_terms::<E, BN, 16>(p);
                l = l + both;
                weight = both;
                sum = mma(kt.transpose(), hi, sum);
                sum = mma(kt.transpose(), lo, sum);
            } else {
                if KIND == 2i32 {
                    let third: Tile<f32, { [BN, 16] }> = mma(kt, x3.transpose(), zero);
                    along = mma(kt, x2.transpose(), third);
                    along = mma(kt, x1.transpose(), along);
                } else {
                    along = mma(kt, x1.transpose(), zero);
                }
            }
            let w: Tile<f32, { [BN, 16] }> = weight
                * (along - from.broadcast(const_shape![BN, 16]))
                * factor.broadcast(const_shape![BN, 16]);
            let (hi, lo, both): (Tile<E, { [BN, 16] }>, Tile<E, { [BN, 16] }>, Tile<f32, { [BN, 16] }>) =
                two_terms::<E, BN, 16>(w);
            if KIND == 2i32 {
                let vt: Tile<E, { [BN, D] }> = if PAGED == 2i32 {
                    four_parts::<E, BN, D>(value_parts, table, width, batch, key, page_size, pages)
                } else {
                    let vt: Tile<E, { [1, BN, D] }> = vp.load([page, slot, 0i32]);
                    vt.reshape(const_shape![BN, D])
                };
                other = mma(vt.transpose(), hi, other);
                sum = mma(vt.transpose(), lo, sum);
            } else {
                total = total + both;
                other = mma(kt.transpose(), hi, other);
                if KIND == 1i32 {
                    sum = mma(kt.transpose(), lo, sum);
                } else {
                    other = mma(kt.transpose(), lo, other);
                }
            }
        }
        if KIND != 0i32 {
            other = other + sum;
        }
        let mut l_sum: Tile<f32, { [1, 16] }> = m;
        let mut total_sum: Tile<f32, { [1, 16] }> = m;
        if KIND == 0i32 {
            let l: Tile<f32, { [16] }> = reduce_sum(l, 0i32);
            l_sum = l.reshape(const_shape![1, 16]);
        }
        if KIND != 2i32 {
            let total: Tile<f32, { [16] }> = reduce_sum(total, 0i32);
            total_sum = total.reshape(const_shape![1, 16]);
        }
        (m, sum, other, l_sum, total_sum)
    }

    /// What the first pass counts the products of queries from: those with the first key, so that a common mean of the keys does not cancel; in
    /// units of the query's norm.
    pub unsafe fn first_counts<E: ElementType, const D: i32>(
        k: *mut E,
        at: i64,
        d: i32,
        query: Tile<E, { [16, D] }>,
    ) -> (Tile<f32, { [16, 1] }>, Tile<f32, { [16, 1] }>) {
        let first_key: Tile<f32, { [D] }> = load_one::<E, D>(k, at, d);
        let first_key: Tile<f32, { [16, D] }> =
            first_key.reshape(const_shape![1, D]).broadcast(const_shape![16, D]);
        let qf: Tile<f32, { [16, D] }> = convert_tile(query);
        (row_dot::<16, D>(qf, first_key), query_factor::<D>(qf))
    }

    /// A direction or probe's power of two, and it in that unit.
    pub fn in_unit<const D: i32>(
        x: Tile<f32, { [16, D] }>,
    ) -> (Tile<f32, { [16, 1] }>, Tile<f32, { [16, D] }>) {
        let unit: Tile<f32, { [16, 1] }> = root_floor::<{ [16, 1] }>(row_dot::<16, D>(x, x));
        let inverse: Tile<f32, { [16, 1] }> = inverse_of_power::<{ [16, 1] }>(unit);
        (unit, x * inverse.broadcast(const_shape![16, D]))
    }

    /// From the first pass's sums: the mean key, what the matrix makes of the query, the log-sum-exp (base 2), and where no key is seen.
    pub fn first_product<const D: i32>(
        m: Tile<f32, { [16, 1] }>,
        l: Tile<f32, { [16, 1] }>,
        sum: Tile<f32, { [16, D] }>,
        other: Tile<f32, { [16, D] }>,
        total: Tile<f32, { [16, 1] }>,
        qf: Tile<f32, { [16, D] }>,
        lam: Tile<f32, { [16, 1] }>,
    ) -> (Tile<f32, { [16, D] }>, Tile<f32, { [16, D] }>, Tile<f32, { [16, 1] }>, Tile<bool, { [16, 1] }>)
    {
        let zero: Tile<f32, { [16, 1] }> = constant(0.0f32, const_shape![16, 1]);
        let one: Tile<f32, { [16, 1] }> = constant(1.0f32, const_shape![16, 1]);
        let none: Tile<bool, { [16, 1] }> = eq_tile(l, zero);
        let inverse: Tile<f32, { [16, 1] }> = select(none, zero, one / l);
        let kbar: Tile<f32, { [16, D] }> = sum * inverse.broadcast(const_shape![16, D]);
        let weight: Tile<f32, { [16, 1] }> = quotient::<{ [16, 1] }>(inverse, query_factor::<D>(qf));
        let a_along: Tile<f32, { [16, D] }> = (other - kbar * total.broadcast(const_shape![16, D]))
            * weight.broadcast(const_shape![16, D])
            + qf * lam.broadcast(const_shape![16, D]);
        (kbar, a_along, m + log2(l), none)
    }

    /// The step along a direction, what the one that needs no pass would leave, and who ends.
    ///
    /// Residual `r`, solution `x`, the direction `along` and what the matrix makes of it; ridges, |delta|^2, |r|^2 before, the last step
    /// length, the direction's unit, passes made, states (0 goes on, 1 solved, 2 gave up), |r|^2 that is `allowed`, |r|^2 that counted as
    /// reached, what roundings of directions have left of r along that of the largest curvature, squared, and that curvature; which queries
    /// are `there`, their number; passes that may follow; the bounds of `lla_decode_step`.
    ///
    /// The new residual, solution, next direction, |r|^2, step length along it, passes, states, allowed, reached, and the two of roundings.
    ///
    /// The step that needs no pass makes of roundings what it does in `state::advance` (there is the reasoning). Here it is directions that
    /// are rounded: of a direction's rounding, 2^-9 of its elements, a part may lie along the largest curvature, and a step
    /// leaves of it what the product has there.
    pub fn step_along<const D: i32, const KIND: i32>(
        r: Tile<f32, { [16, D] }>,
        x: Tile<f32, { [16, D] }>,
        along: Tile<f32, { [16, D] }>,
        a_along: Tile<f32, { [16, D] }>,
        lam: Tile<f32, { [16, 1] }>,
        dd: Tile<f32, { [16, 1] }>,
        before: Tile<f32, { [16, 1] }>,
        last: Tile<f32, { [16, 1] }>,
        unit: Tile<f32, { [16, 1] }>,
        passes: Tile<f32, { [16, 1] }>,
        state: Tile<f32, { [16, 1] }>,
        bound: Tile<f32, { [16, 1] }>,
        reached: Tile<f32, { [16, 1] }>,
        rounded: Tile<f32, { [16, 1] }>,
        largest: Tile<f32, { [16, 1] }>,
        there: Tile<bool, { [16, 1] }>,
        rows: i32,
        left: i32,
        tolerance2: f32,
        error2: f32,
    ) -> (
        Tile<f32, { [16, D] }>,
        Tile<f32, { [16, D] }>,
        Tile<f32, { [16, D] }>,
        Tile<f32, { [16, 1] }>,
        Tile<f32, { [16, 1] }>,
        Tile<f32, { [16, 1] }>,
        Tile<f32, { [16, 1] }>,
        Tile<f32, { [16, 1] }>,
        Tile<f32, { [16, 1] }>,
        Tile<f32, { [16, 1] }>,
        Tile<f32, { [16, 1] }>,
    ) {
        let zero: Tile<f32, { [16, 1] }> = constant(0.0f32, const_shape![16, 1]);
        let one: Tile<f32, { [16, 1] }> = constant(1.0f32, const_shape![16, 1]);
        let two: Tile<f32, { [16, 1] }> = constant(2.0f32, const_shape![16, 1]);
        let least: Tile<f32, { [16, 1] }> = constant(1.0e-30f32, const_shape![16, 1]);
        let start: Tile<f32, { [16, D] }> = r;
        // The step along the direction.
        let runs: Tile<bool, { [16, 1] }> = eq_tile(state, zero);
        let dad: Tile<f32, { [16, 1] }> = row_dot::<16, D>(along, a_along);
        let good: Tile<bool, { [16, 1] }> = runs & gt_tile(dad, zero);
        let a: Tile<f32, { [16, 1] }> = select(good, row_dot::<16, D>(r, along) / max_tile(dad, least), zero);
        let mut r: Tile<f32, { [16, D] }> = r - a_along * a.broadcast(const_shape![16, D]);
        let mut x: Tile<f32, { [16, D] }> = x + along * a.broadcast(const_shape![16, D]);
        let mut rr: Tile<f32, { [16, 1] }> = row_dot::<16, D>(r, r);
        let r_a: Tile<f32, { [16, 1] }> = row_dot::<16, D>(r, a_along);
        let mut beta: Tile<f32, { [16, 1] }> = select(good, zero - r_a / max_tile(dad, least), zero);
        // The step along the next one that needs no pass, and what it leaves.
        let mut free: Tile<f32, { [16, 1] }> = quotient::<{ [16, 1] }>(a, unit);
        let mut ahead: Tile<f32, { [16, 1] }> = rr;
        let mut rate: Tile<f32, { [16, 1] }> = one;
        let mut allowed: Tile<f32, { [16, 1] }> = bound;
        let mut rounded: Tile<f32, { [16, 1] }> = rounded;
        let mut largest: Tile<f32, { [16, 1] }> = largest;
        if KIND == 0i32 {
            // As if A acted on it as it does on q; twice the squared spread of A about that bounds what is left, roughly.
            let aa: Tile<f32, { [16, 1] }> = row_dot::<16, D>(a_along, a_along);
            let qq: Tile<f32, { [16, 1] }> = max_tile(row_dot::<16, D>(along, along), least);
            let theta: Tile<f32, { [16, 1] }> = max_tile(quotient::<{ [16, 1] }>(dad, qq), least);
            let part: Tile<f32, { [16, 1] }> = constant(0.3f32, const_shape![16, 1]);
            free = rr / max_tile(max_tile(theta * rr + beta * r_a, theta * rr * part), least);
            let spread: Tile<f32, { [16, 1] }> = aa / max_tile(theta * dad, least) - one;
            rate = max_tile(spread, zero);
            // With C the keys' covariance: |C q|^2 / q.Cq is its largest eigenvalue where weights are on two keys, and one that
            // counts for more elsewhere. (q.Cq / |q|^2, the variance along the query, says little about other directions then.)
            let curve: Tile<f32, { [16, 1] }> = max_tile(dad - lam * qq, zero);
            let bend: Tile<f32, { [16, 1] }> = max_tile(aa - lam * (dad + curve), zero);
            let eigen: Tile<f32, { [16, 1] }> = bend / max_tile(curve, least);
            allowed = dd * broadcast_scalar(tolerance2, const_shape![16, 1]);
            let mut times: Tile<f32, { [16, 1] }> = constant(4.0f32, const_shape![16, 1]);
            if error2 > 0.0f32 {
                // What is expected of the outputs, as in the forward (there is the reasoning).
                times = two;
                let tenth: Tile<f32, { [16, 1] }> = constant(0.1f32, const_shape![16, 1]);
                let of_keys: Tile<f32, { [16, 1] }> = max_tile(max_tile(eigen, theta * tenth), least);
                let size: Tile<f32, { [16, 1] }> = one + a * a * curve;
                let error2: Tile<f32, { [16, 1] }> = broadcast_scalar(error2, const_shape![16, 1]);
                let of_output: Tile<f32, { [16, 1] }> = error2 * size * lam * (lam / of_keys);
                let most: Tile<f32, { [16, 1] }> = constant(1.6e-5f32, const_shape![16, 1]);
                let share: Tile<f32, { [16, 1] }> = constant(0.0625f32, const_shape![16, 1]);
                allowed = max_tile(allowed * share, min_tile(of_output, dd * most));
            }
            // Where weights are on few keys what is left lies along these, where A is not as it is along the query (as in the forward).
            let apart: Tile<f32, { [16, 1] }> = max_tile(eigen + lam - theta, zero) / theta;
            ahead = rr * max_tile(times * rate, min_tile(apart * apart, one));
            // Where the query is no good direction, it says nothing about the others: the first is delta then.
            let quarter: Tile<f32, { [16, 1] }> = constant(0.25f32, const_shape![16, 1]);
            let poor: Tile<bool, { [16, 1] }> = gt_tile(rr, dd * quarter);
            let poor_d: Tile<bool, { [16, D] }> = poor.broadcast(const_shape![16, D]);
            r = select(poor_d, start, r);
            let zeros: Tile<f32, { [16, D] }> = constant(0.0f32, const_shape![16, D]);
            x = select(poor_d, zeros, x);
            rr = select(poor, dd, rr);
            beta = select(poor, zero, beta);
            free = select(poor, zero, free);
            let unknown: Tile<f32, { [16, 1] }> = constant(1.0e30f32, const_shape![16, 1]);
            ahead = select(poor, unknown, ahead);
            // |A q|^2 / q.Aq
            largest = quotient::<{ [16, 1] }>(aa, max_tile(dad, least));
        } else {
            rate = rr / max_tile(before, least);
            let change: Tile<f32, { [16, 1] }> =
                min_tile(absf(free - last) / max_tile(absf(free), least), one);
            largest = max_tile(largest, quotient::<{ [16, 1] }>(one, max_tile(free, least)));
            let curved: Tile<f32, { [16, 1] }> = free * largest;
            let most: Tile<f32, { [16, 1] }> = constant(1.0e6f32, const_shape![16, 1]);
            let rounding2: Tile<f32, { [16, 1] }> = constant(1.0e-7f32, const_shape![16, 1]);
            let grows: Tile<f32, { [16, 1] }> = min_tile((curved - one) * (curved - one), most);
            rounded = min_tile(rounded * grows + before * rounding2 * curved * curved, rr);
            ahead = rr * (rate + change * change) + rounded * grows;
        }
        let gains: Tile<bool, { [16, 1] }> = le_tile(ahead, rr);
        let next: Tile<f32, { [16, D] }> = r + along * beta.broadcast(const_shape![16, D]);
        // What the passes that may follow will leave: rates grow, the more the earlier (seen on normal and anisotropic keys, at ridges from
        // 0.1 to 10).
        let left: Tile<f32, { [16, 1] }> = convert_tile(broadcast_scalar(left, const_shape![16, 1]));
        let four: Tile<f32, { [16, 1] }> = constant(4.0f32, const_shape![16, 1]);
        let soon: Tile<f32, { [16, 1] }> = constant(2.5f32, const_shape![16, 1]);
        let later: Tile<f32, { [16, 1] }> = constant(1.5f32, const_shape![16, 1]);
        let faster: Tile<f32, { [16, 1] }> =
            select(eq_tile(passes, zero), four, select(le_tile(passes, four), soon, later));
        // Where the query was no good direction the first pass is the first step, after which the residual may be as large as before.
        let half: Tile<f32, { [16, 1] }> = constant(0.5f32, const_shape![16, 1]);
        let as_large: Tile<f32, { [16, 1] }> = constant(1.5f32, const_shape![16, 1]);
        let unsure: Tile<bool, { [16, 1] }> = eq_tile(passes, zero) & le_tile(rate, as_large);
        let coming: Tile<f32, { [16, 1] }> = select(unsure, min_tile(rate, half), rate);
        let expected: Tile<f32, { [16, 1] }> = ahead * exp2(log2(coming) * left * faster, ftz::Enabled);
        // A tile's queries count together, as a block's do in the forward: they end when the mean of what is left is allowed, and
        // none has more than nine times as much.
        let tiny: Tile<f32, { [16, 1] }> = constant(1.0e-36f32, const_shape![16, 1]);
        let part: Tile<f32, { [16, 1] }> =
            quotient::<{ [16, 1] }>(min_tile(ahead, rr), max_tile(allowed, tiny));
        let nine: Tile<f32, { [16, 1] }> = constant(9.0f32, const_shape![16, 1]);
        let much: Tile<f32, { [16, 1] }> = constant(1000.0f32, const_shape![16, 1]);
        let part: Tile<f32, { [16, 1] }> = select(le_tile(part, nine), part, much);
        let eight: Tile<f32, { [16, 1] }> = constant(8.0f32, const_shape![16, 1]);
        let mut hope: Tile<bool, { [16, 1] }> = gt_tile(left, zero) & le_tile(expected, allowed * eight);
        if KIND == 0i32 {
            hope = gt_tile(left, zero) & eq_tile(rr, rr);
        }
        let hope: Tile<bool, { [16, 1] }> = (hope | le_tile(part, one)) & good;
        let counted: Tile<f32, { [16, 1] }> = select(there & runs & hope, part, zero);
        let counted: Tile<f32, { [] }> = reduce_sum(counted.reshape(const_shape![16]), 0i32);
        let counted: f32 = tile_to_scalar(counted);
        let rows: Tile<i32, { [1, 1] }> = broadcast_scalar(rows, const_shape![1, 1]);
        let rows: Tile<f32, { [1, 1] }> = convert_tile(rows);
        // What is hardly left stays as it is; the others go on as long as one of them has to.
        let mut enough: Tile<f32, { [16, 1] }> = constant(1.0e-4f32, const_shape![16, 1]);
        if counted <= single(rows) {
            enough = nine;
        }
        let ended: Tile<f32, { [16, 1] }> = select(hope, select(le_tile(part, enough), one, zero), two);
        let now: Tile<f32, { [16, 1] }> = select(runs, ended, state);
        let step: Tile<f32, { [16, 1] }> = select(runs & eq_tile(now, one) & gains, free, zero);
        let x: Tile<f32, { [16, D] }> = x + next * step.broadcast(const_shape![16, D]);
        let reached: Tile<f32, { [16, 1] }> = select(runs, min_tile(ahead, rr), reached);
        let passes: Tile<f32, { [16, 1] }> =
            if KIND == 0i32 { passes } else { passes + select(runs, one, zero) };
        (r, x, next, rr, free, passes, now, allowed, reached, rounded, largest)
    }

    /// States once a solution is lossy, and what comes next: 1 passes go on, 0 an output is wanted, 2 all queries gave up.
    pub fn what_next<const D: i32>(
        now: Tile<f32, { [16, 1] }>,
        x: Tile<f32, { [16, D] }>,
        kbar: Tile<f32, { [16, D] }>,
        there: Tile<bool, { [16, 1] }>,
    ) -> (Tile<f32, { [16, 1] }>, i32) {
        let zero: Tile<f32, { [16, 1] }> = constant(0.0f32, const_shape![16, 1]);
        let one: Tile<f32, { [16, 1] }> = constant(1.0f32, const_shape![16, 1]);
        let two: Tile<f32, { [16, 1] }> = constant(2.0f32, const_shape![16, 1]);
        // Products of the probe with keys are sums of f32 on tensor cores, which lose this much of it where the keys have much in common;
        // moments are those of shifted keys.
        let size: Tile<f32, { [16, 1] }> = row_dot::<16, D>(kbar, kbar) * row_dot::<16, D>(x, x);
        let most: Tile<f32, { [16, 1] }> = constant(2.0e6f32, const_shape![16, 1]);
        let lossy: Tile<bool, { [16, 1] }> = eq_tile(now, one) & gt_tile(size, most);
        let mut now: Tile<f32, { [16, 1] }> = select(lossy, two, now);
        // Where most have given up, passes for the others would only keep the moments of these waiting.
        let gone: Tile<f32, { [16, 1] }> = select(there & eq_tile(now, two), one, zero);
        let gone: Tile<f32, { [] }> = reduce_sum(gone.reshape(const_shape![16]), 0i32);
        let gone: f32 = tile_to_scalar(gone);
        let rows: Tile<f32, { [16, 1] }> = select(there, one, zero);
        let rows: Tile<f32, { [] }> = reduce_sum(rows.reshape(const_shape![16]), 0i32);
        let rows: f32 = tile_to_scalar(rows);
        if gone * 2.0f32 > rows {
            now = select(eq_tile(now, zero), two, now);
        }
        let nobody: Tile<i32, { [16, 1] }> = constant(0i32, const_shape![16, 1]);
        let somebody: Tile<i32, { [16, 1] }> = constant(1i32, const_shape![16, 1]);
        let on: Tile<i32, { [16, 1] }> = select(there & eq_tile(now, zero), somebody, nobody);
        let on: Tile<i32, { [] }> = reduce_max(on.reshape(const_shape![16]), 0i32);
        let on: i32 = tile_to_scalar(on);
        let well: Tile<i32, { [16, 1] }> = select(there & eq_tile(now, one), somebody, nobody);
        let well: Tile<i32, { [] }> = reduce_max(well.reshape(const_shape![16]), 0i32);
        let well: i32 = tile_to_scalar(well);
        let mut what: i32 = 2i32;
        if on == 1i32 {
            what = 1i32;
        } else {
            if well == 1i32 {
                what = 0i32;
            }
        }
        (now, what)
    }

    /// A probe in three terms, and what products with keys are counted from and multiplied by.
    pub fn probe_terms<E: ElementType, const D: i32>(
        x: Tile<f32, { [16, D] }>,
        kbar: Tile<f32, { [16, D] }>,
    ) -> (
        Tile<E, { [16, D] }>,
        Tile<E, { [16, D] }>,
        Tile<E, { [16, D] }>,
        Tile<f32, { [16, 1] }>,
        Tile<f32, { [16, 1] }>,
    ) {
        let zero: Tile<f32, { [16, 1] }> = constant(0.0f32, const_shape![16, 1]);
        let one: Tile<f32, { [16, 1] }> = constant(1.0f32, const_shape![16, 1]);
        let (unit, scaled): (Tile<f32, { [16, 1] }>, Tile<f32, { [16, D] }>) = in_unit::<D>(x);
        let first: Tile<E, { [16, D] }> = convert_tile(scaled);
        let of_first: Tile<f32, { [16, D] }> = convert_tile(first);
        let second: Tile<E, { [16, D] }> = convert_tile(scaled - of_first);
        let of_second: Tile<f32, { [16, D] }> = convert_tile(second);
        let third: Tile<E, { [16, D] }> = convert_tile(scaled - of_first - of_second);
        // 1 - x.(k - kbar) = (x.k - (1 + x.kbar)) (-1), in the probe's unit
        let from: Tile<f32, { [16, 1] }> =
            row_dot::<16, D>(kbar, scaled) + quotient::<{ [16, 1] }>(one, unit);
        (first, second, third, from, zero - unit)
    }

    /// Which of the outputs stand: those of solved queries, of finite numbers. (Moments say what becomes of the others.)
    pub fn standing<const D: i32>(
        found: Tile<f32, { [16, D] }>,
        state: Tile<f32, { [16, 1] }>,
    ) -> Tile<bool, { [16, 1] }> {
        let zero: Tile<f32, { [16, 1] }> = constant(0.0f32, const_shape![16, 1]);
        let one: Tile<f32, { [16, 1] }> = constant(1.0f32, const_shape![16, 1]);
        let spoilt: Tile<f32, { [16, D] }> = constant(0.0f32, const_shape![16, D]);
        let spoilt: Tile<f32, { [16, 1] }> = row_dot::<16, D>(found, spoilt);
        eq_tile(state, one) & eq_tile(spoilt, zero)
    }

    /// What diagnostics say of the residual: its norm over that of the right side.
    pub fn relative_of(
        reached: Tile<f32, { [16, 1] }>,
        dd: Tile<f32, { [16, 1] }>,
    ) -> Tile<f32, { [16, 1] }> {
        let zero: Tile<f32, { [16, 1] }> = constant(0.0f32, const_shape![16, 1]);
        let least: Tile<f32, { [16, 1] }> = constant(1.0e-30f32, const_shape![16, 1]);
        sqrt(
            select(gt_tile(dd, zero), reached / max_tile(dd, least), zero),
            rounding::NearestEven,
            ftz::Disabled,
        )
    }
}
