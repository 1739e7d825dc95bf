//! Forming and factoring the matrix of every row.
//!
//! The second moments of all rows of a block are one product: the weights (rows × keys) times the pairwise products of the
//! keys' coordinates (keys × D(D+1)/2), built tile by tile. Then a Cholesky factorisation per row, and one step of iterative
//! refinement, whose residual comes from the keys themselves rather than from the formed matrix.

use super::block::{Arith, Weights};
use super::cholesky::Cholesky;
use super::product::{Left, Right};
use super::solve::{Cg, Matrices, Systems, relative};
use super::{LANES, TILE};
use crate::Real;

/// Columns of pairwise products held at once: with a block's rows, they stay in the second-level cache.
const COLUMNS: usize = 1024;

/// What a direct solve costs per row, in floating-point operations at the rate of the products.
pub fn flop(keys: f64, dim: usize) -> f64 {
    // The factorisation of a small matrix runs at about an eighth of that rate.
    let d = dim as f64;
    keys * d * (d + LANES as f64) + 8.0 * d * d * d / 3.0
}

/// Solves the rows named; returns those whose matrix is not positive definite in this arithmetic.
pub fn solve<C: Real>(
    arith: &Arith,
    source: &mut impl Matrices<C>,
    systems: &Systems<C>,
    rows: &[usize],
    run: &mut Cg<C>,
) -> Vec<usize> {
    let (dim, width) = (source.dim(), source.width());
    let mut matrices = vec![C::ZERO; rows.len() * dim * width];
    source.second_moments(arith, rows, &mut matrices);
    let mut cholesky = Cholesky::new(dim, width);

    let mut refine = source.applies_cheaply();
    // A = C + λI from the second moments, its lower triangle column by column.
    let mut failed = vec![];
    let mut x = vec![C::ZERO; rows.len() * width];
    for (i, &row) in rows.iter().enumerate() {
        let matrix = &mut matrices[i * dim * width..][..dim * width];
        let mean = &systems.key_mean[row * width..][..width];
        centre(matrix, dim, source.inv_sum()[row], mean, systems.ridge[row]);
        let x = &mut x[i * width..][..width];
        // From whatever point conjugate gradients came to.
        x.copy_from_slice(&run.residual[row * width..][..width]);
        let largest = (0..dim).map(|a| matrix[a * width + a].as_f64()).fold(0.0, f64::max);
        let solved = cholesky.factor(matrix) && cholesky.solve(matrix, x) && x.iter().all(|x| x.is_finite());
        if solved {
            arith.combine(&mut run.x[row * width..][..width], C::ONE, C::ONE, x);
            // What errors of the matrix's entries leave of the residual, relative.
            let ratio = (arith.dot(x, x) / run.norms[row]).root().as_f64();
            let [epsilon, hardly] = source.moments_error();
            let left = epsilon * (dim as f64).sqrt() * largest * ratio;
            refine |= left > hardly || left.is_nan();
            run.solved.residual[row] = left as f32;
        } else {
            refine = true;
            failed.push(row);
            // Conjugate gradients will start anew.
            let so_far = run.x[row * width..][..width].to_vec();
            x.copy_from_slice(&so_far);
            run.x[row * width..][..width].fill(C::ZERO);
        }
    }

    if !refine {
        return failed;
    }
    // residual −= A (what was added), then once more with the factors that are there.
    let mut image = vec![C::ZERO; x.len()];
    for refined in [false, true] {
        source.apply(arith, systems, rows, &x, &mut image);
        for (i, &row) in rows.iter().enumerate() {
            let residual = &mut run.residual[row * width..][..width];
            if failed.contains(&row) {
                if !refined {
                    arith.combine(residual, C::ONE, C::ONE, &image[i * width..][..width]);
                }
                continue;
            }
            arith.combine(residual, C::ONE, -C::ONE, &image[i * width..][..width]);
            run.solved.residual[row] = relative(arith.dot(residual, residual), run.norms[row]);
            if !refined {
                let x = &mut x[i * width..][..width];
                x.copy_from_slice(residual);
                cholesky.solve(&matrices[i * dim * width..][..dim * width], x);
                arith.combine(&mut run.x[row * width..][..width], C::ONE, C::ONE, x);
            }
        }
    }
    failed
}

/// From second moments, relative to weights whose sum is one over `inv_sum`, to `A = C + λI`: entries `b ≥ a` of row `a`.
pub fn centre<C: Real>(matrix: &mut [C], dim: usize, inv_sum: C, mean: &[C], ridge: C) {
    for (a, column) in matrix.chunks_exact_mut(mean.len()).enumerate() {
        for (b, entry) in column.iter_mut().enumerate().take(dim).skip(a) {
            *entry = *entry * inv_sum - mean[a] * mean[b];
        }
        column[a] += ridge;
    }
}

/// `Σ p_j k_j k_jᵀ` of the rows named, each `dim` rows of `width` of which entries `b ≥ a` of row `a` are filled; relative to
/// unnormalised weights.
pub fn second_moments<C: Real>(arith: &Arith, weights: &mut Weights<C>, rows: &[usize], matrices: &mut [C]) {
    let head = weights.scores.head;
    let (dim, width) = (head.k.dim, head.k.width);
    let from = |a: usize| a / LANES * LANES;
    let mut picked = vec![C::ZERO; rows.len() * TILE];
    let mut first = 0;
    while first < dim {
        // Coordinates first..last, each times all from its own register on.
        let mut columns = 0;
        let mut last = first;
        while last < dim && (last == first || columns + width - from(last) <= COLUMNS) {
            columns += width - from(last);
            last += 1;
        }
        let mut pairs = vec![C::ZERO; TILE * columns];
        let mut sums = vec![C::ZERO; rows.len() * columns];
        for t in weights.tiles.clone() {
            let p = weights.tile(arith, t);
            for (picked, &row) in picked.chunks_exact_mut(TILE).zip(rows) {
                picked.copy_from_slice(&p[row * TILE..][..TILE]);
            }
            for (key, pairs) in head.k.tile(t).chunks_exact(width).zip(pairs.chunks_exact_mut(columns)) {
                let mut at = 0;
                for a in first..last {
                    let others = &key[from(a)..];
                    for (pair, &other) in pairs[at..][..others.len()].iter_mut().zip(others) {
                        *pair = key[a] * other;
                    }
                    at += others.len();
                }
            }
            let left = Left { data: &picked, row: TILE, col: 1 };
            arith.add_product(
                [rows.len(), columns, TILE],
                left,
                Right { data: &pairs, row: columns },
                &mut sums,
            );
        }
        for (sums, matrix) in sums.chunks_exact(columns).zip(matrices.chunks_exact_mut(dim * width)) {
            let mut at = 0;
            for a in first..last {
                let len = width - from(a);
                matrix[a * width + from(a)..][..len].copy_from_slice(&sums[at..][..len]);
                at += len;
            }
        }
        first = last;
    }
}
