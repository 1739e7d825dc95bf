//! Solving `(C + λI) x = b` for every row of a block at once.
//!
//! `C d = Σ p_j ((k_j − k̄)·d) k_j − k̄ Σ p_j ((k_j − k̄)·d)`: two tile products per step. The last sum is 0 up to rounding;
//! keeping it is free accuracy.

use super::block::{Arith, Weights, at_least};
use super::product::{Finish, Left, Right};
use super::simd::SimdReal;
use super::{TILE, direct};
use crate::{Real, Solver};
use pulp::Simd;

/// The systems of a block: one per row.
pub struct Systems<'a, C> {
    /// `k̄` less the reference key, rows of the keys' packed width.
    pub key_mean: &'a [C],
    pub ridge: &'a [C],
    pub solver: Solver,
    /// Of a single row, a vector and what its matrix makes of it: conjugate gradients then begin with a step along it.
    pub first: Option<[&'a [C]; 2]>,
}

/// The matrices `C + λI` of some rows, never formed: what a solver can ask of them.
pub trait Matrices<C: Real> {
    /// How many there are.
    fn rows(&self) -> usize;
    /// Their dimension.
    fn dim(&self) -> usize;
    /// The distance of vectors.
    fn width(&self) -> usize;
    /// Keys that each is a sum over.
    fn keys(&self) -> usize;
    /// One over the sum of each row's weights; 0 where it sees no key.
    fn inv_sum(&self) -> &[C];
    /// `out_i = A_row d_i` for the vectors `d_i` of the rows named.
    fn apply(&mut self, arith: &Arith, systems: &Systems<C>, rows: &[usize], d: &[C], out: &mut [C]);
    /// Told that `length · d` was added to a row's `x`, where `d` is what [`Matrices::apply`] was last given for it, or [`Systems::first`] if that
    /// was not called yet.
    fn moved(&mut self, _arith: &Arith, _row: usize, _length: C, _d: &[C]) {}
    /// `Σ p_j k_j k_jᵀ` of the rows named, each `dim` rows of `width` of which entries `b ≥ a` of row `a` are filled; relative to
    /// unnormalised weights.
    fn second_moments(&mut self, arith: &Arith, rows: &[usize], matrices: &mut [C]);
    /// How much longer an operation of [`Matrices::apply`] takes than one of [`Matrices::second_moments`].
    fn slowness(&self) -> f64 {
        1.0
    }
    /// Whether [`Matrices::apply`] costs little beside [`Matrices::second_moments`]. If not, a direct solve does without where
    /// rounding hardly touches it.
    fn applies_cheaply(&self) -> bool;
    /// What entries of [`Matrices::second_moments`] are off by, relative to terms of their sums, and the relative residual that this may
    /// leave before it is looked at.
    fn moments_error(&self) -> [f64; 2] {
        rounding::<C>()
    }
}

/// [`Matrices::moments_error`] of sums in the type of arithmetic: a residual of 16 ε is near what refinement would leave.
pub fn rounding<C: Real>() -> [f64; 2] {
    [1.0, 16.0].map(|x| x * C::EPSILON.as_f64())
}

/// A block's softmax weights and its buffer for a tile of products.
pub struct Block<'a, 'b, C> {
    pub weights: &'a mut Weights<'b, C>,
    pub tile: &'a mut Vec<C>,
}

impl<C: Real> Matrices<C> for Block<'_, '_, C> {
    fn rows(&self) -> usize {
        self.weights.rows()
    }
    fn dim(&self) -> usize {
        self.weights.scores.head.k.dim
    }
    fn width(&self) -> usize {
        self.weights.scores.head.k.width
    }
    fn keys(&self) -> usize {
        self.weights.tiles.len() * TILE
    }
    fn inv_sum(&self) -> &[C] {
        &self.weights.inv_sum
    }
    fn apply(&mut self, arith: &Arith, systems: &Systems<C>, rows: &[usize], d: &[C], out: &mut [C]) {
        apply(arith, self.weights, systems, rows, d, out, self.tile);
    }
    fn second_moments(&mut self, arith: &Arith, rows: &[usize], matrices: &mut [C]) {
        direct::second_moments(arith, self.weights, rows, matrices);
    }
    fn applies_cheaply(&self) -> bool {
        true
    }
}

/// How each row's solve went.
pub struct Solved {
    pub iterations: Vec<u32>,
    pub residual: Vec<f32>,
    pub direct: usize,
}

/// `w = p (t − c)`, 0 where `p` is, and its sum: from the products `t_j = d·k_j` to the weights of `C d`.
#[derive(Clone, Copy)]
struct CovarianceWeights<'a, T> {
    /// The tile's softmax weights.
    p: &'a [T],
    /// Which row of `p` each row of the product belongs to.
    rows: &'a [usize],
    /// `c = k̄·d`
    shift: &'a [T],
    /// `Σ w`, added to. One thread writes it.
    sum: *mut T,
}

impl<T: SimdReal + std::ops::AddAssign> Finish<T> for CovarianceWeights<'_, T> {
    #[inline(always)]
    unsafe fn finish<S: Simd, const N: usize>(
        self,
        simd: S,
        row: usize,
        col: usize,
        mut t: [T::V<S>; N],
    ) -> [T::V<S>; N] {
        debug_assert!(row < self.rows.len() && row < self.shift.len());
        // SAFETY: `apply` made `rows`, `shift` and `sum` as long as the product has rows, and every entry of `rows` a row of
        // `p`, whose rows are TILE long.
        unsafe {
            let shift = T::splat(simd, *self.shift.get_unchecked(row));
            let p = self.p.as_ptr().add(*self.rows.get_unchecked(row) * TILE + col);
            let mut sum = None;
            for (i, t) in t.iter_mut().enumerate() {
                let p = T::load::<S>(p.add(i * T::lanes::<S>()));
                *t = T::where_positive(simd, p, T::v_mul(simd, p, T::v_sub(simd, *t, shift)));
                sum = Some(sum.map_or(*t, |sum| T::v_add(simd, sum, *t)));
            }
            if let Some(sum) = sum {
                *self.sum.add(row) += T::reduce_sum(simd, sum);
            }
        }
        t
    }
}

fn apply<C: Real>(
    arith: &Arith,
    weights: &mut Weights<C>,
    systems: &Systems<C>,
    rows: &[usize],
    d: &[C],
    out: &mut [C],
    tile: &mut Vec<C>,
) {
    let (n, width) = (rows.len(), weights.scores.head.k.width);
    assert!(rows.iter().all(|&row| row < weights.rows()));
    let shift: Vec<C> = rows
        .iter()
        .zip(d.chunks_exact(width))
        .map(|(&row, d)| arith.dot(d, row_of(systems.key_mean, row, width)))
        .collect();
    let mut sum = vec![C::ZERO; n];
    let products = at_least(tile, n * TILE);
    out[..n * width].fill(C::ZERO);
    let head = weights.scores.head;
    for t in weights.tiles.clone() {
        let p = weights.tile(arith, t);
        let left = Left { data: d, row: width, col: 1 };
        let right = Right { data: head.k.tile_transposed(t), row: TILE };
        let finish = CovarianceWeights { p, rows, shift: &shift, sum: sum.as_mut_ptr() };
        arith.product([n, TILE, head.k.dim], left, right, products, finish);
        let left = Left { data: products, row: TILE, col: 1 };
        arith.add_product(
            [n, width, TILE],
            left,
            Right { data: head.k.tile(t), row: width },
            &mut out[..n * width],
        );
    }
    for (i, &row) in rows.iter().enumerate() {
        let out = &mut out[i * width..][..width];
        let inv = weights.inv_sum[row];
        arith.combine(out, inv, -(sum[i] * inv), row_of(systems.key_mean, row, width));
        arith.combine(out, C::ONE, systems.ridge[row], &d[i * width..][..width]);
    }
}

/// `k̄·x` of every row, for `α_j = k_j·x − k̄·x`.
///
/// Where `x` is large that difference loses digits: `k̄·x` and the `k_j·x` are rounded each in its own way. Then `k̄·x` is taken
/// as `Σ p_j (k_j·x)`, over the very products that it will be subtracted from, so that `Σ p_j α_j = 0` holds again; a query
/// that sees one key, or weighs one alone, gets that key's value to the last digit.
pub fn shifts<C: Real>(
    arith: &Arith,
    weights: &mut Weights<C>,
    key_mean: &[C],
    x: &[C],
    tile: &mut Vec<C>,
) -> Vec<C> {
    let head = weights.scores.head;
    let (n, width, dim) = (weights.rows(), head.k.width, head.k.dim);
    let rows = || x.chunks_exact(width).zip(key_mean.chunks_exact(width));
    let mut shift: Vec<C> = rows().map(|(x, mean)| arith.dot(x, mean)).collect();
    // Rounding errors of a product are about ε |x| |k|.
    let large = C::of_f64(16.0) / head.k.longest;
    if rows().all(|(x, _)| arith.dot(x, x) <= large * large) {
        return shift;
    }
    let mut sum = vec![C::ZERO; n];
    let all: Vec<usize> = (0..n).collect();
    let products = at_least(tile, n * TILE);
    for t in weights.tiles.clone() {
        let p = weights.tile(arith, t);
        let finish = CovarianceWeights { p, rows: &all, shift: &shift, sum: sum.as_mut_ptr() };
        let right = Right { data: head.k.tile_transposed(t), row: TILE };
        arith.product([n, TILE, dim], Left { data: x, row: width, col: 1 }, right, products, finish);
    }
    for ((shift, sum), &inv) in shift.iter_mut().zip(sum).zip(&weights.inv_sum) {
        *shift += sum * inv;
    }
    shift
}

fn row_of<C>(rows: &[C], row: usize, width: usize) -> &[C] {
    &rows[row * width..][..width]
}

/// Solves for `x`; `residual` holds the right-hand sides and becomes what is left of them.
pub fn solve<C: Real>(
    arith: &Arith,
    matrices: &mut impl Matrices<C>,
    systems: &Systems<C>,
    residual: &mut [C],
    x: &mut [C],
) -> Solved {
    let (rows, width) = (matrices.rows(), matrices.width());
    x.fill(C::ZERO);
    let scales = normalise(residual, width);
    let mut solved = Solved { iterations: vec![0; rows], residual: vec![0.0; rows], direct: 0 };
    let norms: Vec<C> = residual.chunks_exact(width).map(|r| arith.dot(r, r)).collect();
    // A row that sees nothing has nothing to solve; one with a NaN has nothing to find.
    let todo: Vec<usize> = (0..rows)
        .filter(|&row| matrices.inv_sum()[row] > C::ZERO && norms[row] > C::ZERO && norms[row].is_finite())
        .collect();
    for row in 0..rows {
        if !norms[row].is_finite() || !matrices.inv_sum()[row].is_finite() {
            solved.residual[row] = f32::NAN;
            x[row * width..][..width].fill(C::NAN);
        }
    }
    let mut run = Cg { norms: &norms, residual, x, solved: &mut solved };
    let left = match systems.solver {
        Solver::Cg { tolerance, max_iters } => {
            run.conjugate_gradients(arith, matrices, systems, todo, tolerance, max_iters, false);
            vec![]
        }
        Solver::Auto { tolerance, max_iters } => {
            let tolerance = tolerance.unwrap_or(Solver::default_tolerance(size_of::<C>() == 8));
            let limit = max_iters.unwrap_or(usize::MAX);
            run.conjugate_gradients(arith, matrices, systems, todo, tolerance, limit, true)
        }
        Solver::Direct => todo,
    };
    if !left.is_empty() {
        let failed = direct::solve(arith, matrices, systems, &left, &mut run);
        // Not positive definite in this arithmetic. Conjugate gradients never need that of the whole matrix.
        run.solved.direct += left.len() - failed.len();
        let (tolerance, limit) = (Solver::default_tolerance(size_of::<C>() == 8), 4 * matrices.dim());
        run.conjugate_gradients(arith, matrices, systems, failed, tolerance, limit, false);
    }
    for (row, &scale) in scales.iter().enumerate().filter(|(_, scale)| **scale != C::ONE) {
        for values in [&mut *residual, &mut *x] {
            values[row * width..][..width].iter_mut().for_each(|value| *value *= scale);
        }
    }
    solved
}

/// The length of the step from 0 along `d`, of which the matrix makes `image`, if it takes most of the residual; and the next direction,
/// conjugate to it.
fn step_along<C: Real>(
    arith: &Arith,
    d: &[C],
    image: &[C],
    residual: &mut [C],
    x: &mut [C],
) -> Option<(C, Vec<C>)> {
    let (curvature, norm) = (arith.dot(d, image), arith.dot(residual, residual));
    let length = arith.dot(d, residual) / curvature;
    let mut left = residual.to_vec();
    arith.combine(&mut left, C::ONE, -length, image);
    // False where something is no number, or the vector says nothing.
    let gains = curvature > C::ZERO && C::of_f64(4.0) * arith.dot(&left, &left) <= norm;
    gains.then(|| {
        residual.copy_from_slice(&left);
        arith.combine(x, C::ZERO, length, d);
        let back = arith.dot(&left, image) / curvature;
        arith.combine(&mut left, C::ONE, -back, d);
        (length, left)
    })
}

/// Brings right-hand sides whose squares would leave the range of the arithmetic near 1, by powers of two; returns the factors
/// that undo it.
fn normalise<C: Real>(rhs: &mut [C], width: usize) -> Vec<C> {
    let (low, high) = (1e-12, 1e12);
    rhs.chunks_exact_mut(width)
        .map(|row| {
            let largest = row.iter().fold(0.0, |largest: f64, x| largest.max(x.as_f64().abs()));
            if largest == 0.0 || !largest.is_finite() || (low..high).contains(&largest) {
                return C::ONE;
            }
            let exponent = largest.log2().round() as i32;
            // In two steps: the inverse of the smallest numbers is beyond the largest.
            let half = C::of_f64(2f64.powi(-exponent / 2));
            let rest = C::of_f64(2f64.powi(-exponent + exponent / 2));
            row.iter_mut().for_each(|x| *x = *x * half * rest);
            C::of_f64(2f64.powi(exponent))
        })
        .collect()
}

/// A relative residual from two squared norms. The recurrence can fall below what `x` itself resolves; the report does not.
pub fn relative<C: Real>(residual: C, rhs: C) -> f32 {
    let ratio = (residual / rhs).root();
    if ratio < C::EPSILON { C::EPSILON.as_f32() } else { ratio.as_f32() }
}

/// The state of a block's solve.
pub struct Cg<'a, C> {
    /// `|b|²` of each row.
    pub norms: &'a [C],
    /// `b − A x` of each row.
    pub residual: &'a mut [C],
    pub x: &'a mut [C],
    pub solved: &'a mut Solved,
}

impl<C: Real> Cg<'_, C> {
    /// Steps until every row has converged, or until the rows left are to be solved directly; returns those.
    #[expect(clippy::too_many_arguments)]
    fn conjugate_gradients(
        &mut self,
        arith: &Arith,
        matrices: &mut impl Matrices<C>,
        systems: &Systems<C>,
        mut rows: Vec<usize>,
        tolerance: f64,
        max_iters: usize,
        may_change: bool,
    ) -> Vec<usize> {
        let (width, dim, keys) = (matrices.width(), matrices.dim(), matrices.keys());
        let tolerance = C::of_f64(tolerance.max(4.0 * C::EPSILON.as_f64()));
        let done = tolerance * tolerance;
        // Search directions and their images, of the rows that are not done, close together.
        let mut d: Vec<C> =
            rows.iter().flat_map(|&row| &self.residual[row * width..][..width]).copied().collect();
        let mut norm: Vec<C> = rows.iter().map(|&row| self.norms[row]).collect();
        let (mut step, mut enough_steps) = (0, 3);
        let first = systems.first.filter(|_| rows == [0]).and_then(|[along, image]| {
            let (length, next) = step_along(arith, along, image, self.residual, self.x)?;
            matrices.moved(arith, 0, length, along);
            Some(next)
        });
        if let Some(start) = first {
            (step, enough_steps) = (1, 1);
            d.copy_from_slice(self.residual);
            norm[0] = arith.dot(&d, &d);
            self.solved.iterations[0] = 1;
            self.solved.residual[0] = relative(norm[0], self.norms[0]);
            if norm[0] <= done * self.norms[0] {
                return vec![];
            }
            d = start;
        }
        let mut image = vec![C::ZERO; d.len()];
        while !rows.is_empty() && step < max_iters {
            if may_change && step >= enough_steps {
                let per_step = 4.0 * keys as f64 * dim as f64 * matrices.slowness();
                if self.is_direct_cheaper(per_step, direct::flop(keys as f64, dim), &rows, &norm, step, done)
                {
                    break;
                }
            }
            step += 1;
            matrices.apply(arith, systems, &rows, &d[..rows.len() * width], &mut image);
            let mut kept = 0;
            for i in 0..rows.len() {
                let row = rows[i];
                let at = i * width..(i + 1) * width;
                let curvature = arith.dot(&d[at.clone()], &image[at.clone()]);
                let residual = &mut self.residual[row * width..][..width];
                self.solved.iterations[row] = step as u32;
                let mut going = curvature > C::ZERO;
                if going {
                    let length = norm[i] / curvature;
                    arith.combine(&mut self.x[row * width..][..width], C::ONE, length, &d[at.clone()]);
                    matrices.moved(arith, row, length, &d[at.clone()]);
                    arith.combine(residual, C::ONE, -length, &image[at.clone()]);
                    let new = arith.dot(residual, residual);
                    let ratio = new / norm[i];
                    norm[i] = new;
                    // False for NaN as well: what is not finite has nothing more to gain.
                    going = new > done * self.norms[row] && new.is_finite();
                    if going {
                        arith.combine(&mut d[at.clone()], ratio, C::ONE, residual);
                    }
                }
                self.solved.residual[row] = relative(norm[i], self.norms[row]);
                if going {
                    d.copy_within(at, kept * width);
                    (rows[kept], norm[kept]) = (row, norm[i]);
                    kept += 1;
                }
            }
            rows.truncate(kept);
        }
        if may_change { rows } else { vec![] }
    }

    /// Whether going on, at the rate of convergence so far, takes longer than forming and factoring the matrices.
    fn is_direct_cheaper(
        &self,
        per_step: f64,
        direct: f64,
        rows: &[usize],
        norm: &[C],
        step: usize,
        done: C,
    ) -> bool {
        let worst = rows.iter().zip(norm).map(|(&row, &norm)| {
            // Squared norms on both sides: rate^step = norm / norms, steps left = log(done norms / norm) / log(rate).
            let fallen = (norm / self.norms[row]).as_f64().ln() / step as f64;
            let missing = done.as_f64().ln() - (norm / self.norms[row]).as_f64().ln();
            if fallen < -1e-3 { missing / fallen } else { f64::INFINITY }
        });
        // One slow row decides nothing alone: compare what all of them need together.
        let (mut cg, mut n) = (0.0, 0.0);
        for steps in worst {
            cg += steps.min(1e6) * per_step;
            n += 1.0;
        }
        cg > n * direct
    }
}
