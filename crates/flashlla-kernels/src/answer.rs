//! The end of decoding one query: the solve with its formed covariance, and everything that is written.

#[cutile::module]
pub mod answer {
    use super::super::decode::decode::*;
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

    /// The probe that solves `(S / l - kbar kbar^T + ridge) x = delta` by conjugate gradients, its steps, and what is left of the
    /// residual's square.
    pub fn probe_of<const D: i32>(
        s: Tile<f32, { [D, D] }>,
        mean: Tile<f32, { [D] }>,
        delta: Tile<f32, { [D] }>,
        inverse: f32, // 1 / l
        lambda: f32,
        tolerance2: f32,
        max_iterations: i32,
    ) -> (Tile<f32, { [1, D] }>, i32, f32) {
        let mean_r: Tile<f32, { [1, D] }> = mean.reshape(const_shape![1, D]);
        let mean_c: Tile<f32, { [D, 1] }> = mean.reshape(const_shape![D, 1]);
        let mut x: Tile<f32, { [1, D] }> = constant(0.0f32, const_shape![1, D]);
        let mut it: i32 = 0i32;
        let mut left: f32 = 0.0f32;
        // Vectors are rows; the covariance is symmetric, so that a product with a column gives a row.
        let c: Tile<f32, { [D, D] }> = s * broadcast_scalar(inverse, const_shape![D, D])
            - mean_c.broadcast(const_shape![D, D]) * mean_r.broadcast(const_shape![D, D]);
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
        (x, it, left)
    }

    /// Output, log-sum-exp, and what else is asked for.
    pub unsafe fn write_answer<E: ElementType, const D: i32>(
        t: Tile<f32, { [D, D] }>, // sum w v k^T
        v_mean: Tile<f32, { [D] }>,
        mean: Tile<f32, { [D] }>,
        shift: Tile<f32, { [D] }>,
        x: Tile<f32, { [1, D] }>,
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
        let inverse: f32 = 1.0f32 / l;
        let mean_r: Tile<f32, { [1, D] }> = mean.reshape(const_shape![1, D]);
        let v_c: Tile<f32, { [D, 1] }> = v_mean.reshape(const_shape![D, 1]);
        let cov: Tile<f32, { [D, D] }> = t * broadcast_scalar(inverse, const_shape![D, D])
            - v_c.broadcast(const_shape![D, D]) * mean_r.broadcast(const_shape![D, D]);
        let along: Tile<f32, { [D] }> = reduce_sum(cov * x.broadcast(const_shape![D, D]), 1i32);
        let found: Tile<f32, { [D] }> = v_mean - along;
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
