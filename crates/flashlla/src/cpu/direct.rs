//! Forming and factoring the matrix of every row.
//!
//! The second moments of all rows of a block are one product: the weights (rows × keys) times the pairwise products of the
//! keys' coordinates (keys × D(D+1)/2), built tile by tile. Then a Cholesky factorisation per row, and one step of iterative
//! refinement, whose residual comes from the keys themselves rather than from the formed matrix.

use super::block::{Arith, Weights};
use super::product::{Left, Right};
use super::solve::{Cg, Systems, apply, relative};
use super::{LANES, TILE};
use crate::Real;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::{factor, solve as triangular};
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{Conj, MatMut, Par};

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
    weights: &mut Weights<C>,
    systems: &Systems<C>,
    rows: &[usize],
    run: &mut Cg<C>,
    tile: &mut Vec<C>,
) -> Vec<usize> {
    let (dim, width) = (weights.scores.head.k.dim, weights.scores.head.k.width);
    let mut matrices = vec![C::ZERO; rows.len() * dim * width];
    second_moments(arith, weights, rows, &mut matrices);

    let stack_size = factor::cholesky_in_place_scratch::<C>(dim, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(stack_size);
    let mut solve_once = |matrix: &mut [C], rhs: &mut [C], factored: bool| -> bool {
        let mut matrix = MatMut::from_column_major_slice_with_stride_mut(matrix, dim, dim, width);
        if !factored {
            let stack = MemStack::new(&mut memory);
            let regularisation = Default::default();
            if factor::cholesky_in_place(matrix.rb_mut(), regularisation, Par::Seq, stack, Default::default())
                .is_err()
            {
                return false;
            }
        }
        let rhs = MatMut::from_column_major_slice_mut(&mut rhs[..dim], dim, 1);
        let stack = MemStack::new(&mut memory);
        triangular::solve_in_place_with_conj(matrix.rb(), Conj::No, rhs, Par::Seq, stack);
        true
    };

    // A = C + λI from the second moments, its lower triangle column by column.
    let mut failed = vec![];
    let mut x = vec![C::ZERO; rows.len() * width];
    for (i, &row) in rows.iter().enumerate() {
        let mean = &systems.key_mean[row * width..][..width];
        let matrix = &mut matrices[i * dim * width..][..dim * width];
        for (a, column) in matrix.chunks_exact_mut(width).enumerate() {
            for (b, entry) in column.iter_mut().enumerate().take(dim).skip(a) {
                *entry = *entry * weights.inv_sum[row] - mean[a] * mean[b];
            }
            column[a] += systems.ridge[row];
        }
        let x = &mut x[i * width..][..width];
        // From whatever point conjugate gradients came to.
        x.copy_from_slice(&run.residual[row * width..][..width]);
        let solved = solve_once(matrix, x, false) && x.iter().all(|x| x.is_finite());
        if solved {
            arith.combine(&mut run.x[row * width..][..width], C::ONE, C::ONE, x);
        } else {
            failed.push(row);
            // Conjugate gradients will start anew.
            let so_far = run.x[row * width..][..width].to_vec();
            x.copy_from_slice(&so_far);
            run.x[row * width..][..width].fill(C::ZERO);
        }
    }

    // residual −= A (what was added), then once more with the factors that are there.
    let mut image = vec![C::ZERO; x.len()];
    for refined in [false, true] {
        apply(arith, weights, systems, rows, &x, &mut image, tile);
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
                solve_once(&mut matrices[i * dim * width..][..dim * width], x, true);
                arith.combine(&mut run.x[row * width..][..width], C::ONE, C::ONE, x);
            }
        }
    }
    failed
}

/// `Σ p_j k_j k_jᵀ` of the rows named, each `dim` rows of `width` of which entries `b ≥ a` of row `a` are filled; relative to
/// unnormalised weights.
fn second_moments<C: Real>(arith: &Arith, weights: &mut Weights<C>, rows: &[usize], matrices: &mut [C]) {
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
