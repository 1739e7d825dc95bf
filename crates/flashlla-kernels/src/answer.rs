//! The end of decoding one query: the solve with its formed covariance, and everything that is written.

#[cutile::module]
pub mod answer {
    use super::super::tiles::tiles::*;
    use cutile::core::*;

    /// What a query gets that sees no key.
    pub unsafe fn write_nothing<E: ElementType, const D: i32>(
        out: *mut E,
        out_at: i64,
        lse: *mut f32,
        key_mean: *mut f32,
        probe: *mut f32,
        iterations: *mut i32,
        relative: *mut f32,
        row: i32,
        d: i32,
        dv: i32,
        options: i32,
        save_state: i32,
        diagnostics: i32,
    ) {
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
    }

    /// The probe that solves `(C + ridge) x = delta` by conjugate gradients, as 8 equal columns; its steps, and what is left of the
    /// residual's square. C is in two fp16 terms, its rows in units of their own.
    ///
    /// What the matrix makes of a direction is a product on tensor cores, and a step's other products are one sum: a step is a chain of
    /// waits, with 4 barriers. A direction may be rounded as it likes: it is made conjugate to the last one by what the matrix made of that.
    pub fn probe_of<const D: i32>(
        first: Tile<f16, { [D, D] }>,
        second: Tile<f16, { [D, D] }>,
        unit: Tile<f32, { [D, 8] }>,
        delta: Tile<f32, { [D] }>,
        lambda: f32,
        tolerance2: f32,
        max_iterations: i32,
    ) -> (Tile<f32, { [D, 8] }>, i32, f32) {
        let mut r: Tile<f32, { [D, 8] }> = delta.reshape(const_shape![D, 1]).broadcast(const_shape![D, 8]);
        let mut x: Tile<f32, { [D, 8] }> = constant(0.0f32, const_shape![D, 8]);
        let mut along: Tile<f32, { [D, 8] }> = r;
        let start: Tile<f32, { [8] }> = reduce_sum(r * r, 0i32);
        let start: f32 = first_of(start, 0i32);
        let mut rr: f32 = start;
        // Below the smallest normal number a norm is none.
        let enough: f32 = max(tolerance2 * start, 1.0e-37f32);
        let mut it: i32 = 0i32;
        let zero: Tile<f32, { [D, 8] }> = constant(0.0f32, const_shape![D, 8]);
        let column: Tile<i32, { [8] }> = iota(const_shape![8]);
        let column: Tile<i32, { [D, 8] }> = column.reshape(const_shape![1, 8]).broadcast(const_shape![D, 8]);
        let one: Tile<i32, { [D, 8] }> = constant(1i32, const_shape![D, 8]);
        let in_0: Tile<bool, { [D, 8] }> = lt_tile(column, one);
        let in_1: Tile<bool, { [D, 8] }> = eq_tile(column, one);
        let in_2: Tile<bool, { [D, 8] }> = eq_tile(column, one + one);
        let in_3: Tile<bool, { [D, 8] }> = eq_tile(column, one + one + one);
        let in_4: Tile<bool, { [D, 8] }> = eq_tile(column, one + one + one + one);
        while (it < max_iterations) && (rr > enough) {
            // Counted loops keep what they carry as products have it.
            for _round in 0i32..8i32 {
                if (it < max_iterations) && (rr > enough) {
                    for _turn in 0i32..4i32 {
                        if (it < max_iterations) && (rr > enough) {
                            let inverse: Tile<f32, { [1, 1] }> = rsqrt(number(rr), ftz::Enabled);
                            // The direction is what is left of it in fp16.
                            let t: Tile<f16, { [D, 8] }> =
                                convert_tile(along * broadcast_scalar(single(inverse), const_shape![D, 8]));
                            let tf: Tile<f32, { [D, 8] }> = convert_tile(t);
                            let of_second: Tile<f32, { [D, 8] }> = mma(second, t, zero);
                            let product: Tile<f32, { [D, 8] }> = mma(first, t, of_second);
                            let a: Tile<f32, { [D, 8] }> =
                                product * unit + tf * broadcast_scalar(lambda, const_shape![D, 8]);
                            // Products in one sum: r.t, t.a, r.a, a.a, r.r.
                            let left: Tile<f32, { [D, 8] }> =
                                select(in_0, r, select(in_1, tf, select(in_2, r, select(in_3, a, r))));
                            let right: Tile<f32, { [D, 8] }> = select(in_0, tf, select(in_4, r, a));
                            let dots: Tile<f32, { [8] }> = reduce_sum(left * right, 0i32);
                            let rt: f32 = first_of(dots, 0i32);
                            let ta: f32 = first_of(dots, 1i32);
                            let ra: f32 = first_of(dots, 2i32);
                            let aa: f32 = first_of(dots, 3i32);
                            let rr_now: f32 = first_of(dots, 4i32);
                            let mut one_ta: f32 = single(quotient::<{ [1, 1] }>(number(1.0f32), number(ta)));
                            // Nothing is left of the direction: the next one is the residual, if there is any.
                            if ta == 0.0f32 {
                                one_ta = 0.0f32;
                            }
                            let step: f32 = rt * one_ta;
                            x = x + tf * broadcast_scalar(step, const_shape![D, 8]);
                            r = r - a * broadcast_scalar(step, const_shape![D, 8]);
                            let turn: f32 = (step * aa - ra) * one_ta;
                            along = r + tf * broadcast_scalar(turn, const_shape![D, 8]);
                            // A difference, which knows no less of it than this.
                            rr = max(rr_now - step * (2.0f32 * ra - step * aa), 5.0e-7f32 * rr_now);
                            it = it + 1i32;
                        }
                    }
                }
            }
        }
        let mut left: f32 = 0.0f32;
        if start > 0.0f32 {
            left = rr / start;
        }
        // A system that holds no numbers ends at once: its answer is no number either.
        if start != start {
            x = broadcast_scalar(start, const_shape![D, 8]);
        }
        (x, it, left)
    }

    /// Number `which` of eight.
    fn first_of(x: Tile<f32, { [8] }>, which: i32) -> f32 {
        let column: Tile<i32, { [8] }> = iota(const_shape![8]);
        let wanted: Tile<bool, { [8] }> = eq_tile(column, broadcast_scalar(which, const_shape![8]));
        let none: Tile<f32, { [8] }> = constant(0.0f32, const_shape![8]);
        let x: Tile<f32, { [] }> = reduce_sum(select(wanted, x, none), 0i32);
        let x: f32 = tile_to_scalar(x);
        x
    }

    /// Output, log-sum-exp, and what else is asked for.
    pub unsafe fn write_answer<E: ElementType, const D: i32>(
        found: Tile<f32, { [D] }>, // the output
        mean: Tile<f32, { [D] }>,
        shift: Tile<f32, { [D] }>,
        x: Tile<f32, { [D, 8] }>, // the probe, in equal columns
        m: f32,
        l: f32,
        it: i32,
        left: f32,
        out: *mut E,
        out_at: i64,
        lse: *mut f32,
        key_mean: *mut f32,
        probe: *mut f32,
        iterations: *mut i32,
        relative: *mut f32,
        row: i32,
        d: i32,
        dv: i32,
        options: i32,
        save_state: i32,
        diagnostics: i32,
    ) {
        // One number of it that is not finite makes all of it not a number.
        let nothing: Tile<f32, { [D] }> = constant(0.0f32, const_shape![D]);
        let spoilt: Tile<f32, { [D] }> = found * nothing;
        let sum: Tile<f32, { [] }> = reduce_sum(spoilt, 0i32);
        let sum: f32 = tile_to_scalar(sum);
        let spoilt: Tile<f32, { [D] }> = broadcast_scalar(sum, const_shape![D]);
        let found: Tile<f32, { [D] }> = found + spoilt;
        let result: Tile<E, { [D] }> = convert_tile(found);
        store_column::<E, D>(slice::<E>(out, out_at), dv, result);
        let log: Tile<f32, { [1, 1] }> = log2(number(l));
        store_number(lse, wide(row), (m + single(log)) * 0.6931471805599453f32);
        if save_state != 0i32 {
            store_column::<f32, D>(slice::<f32>(key_mean, wide(row) * wide(d)), d, mean + shift);
            if (options & 16i32) == 0i32 {
                let x: Tile<f32, { [D] }> = reduce_max(x, 1i32);
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
