//! Small Cholesky factorisations, with scratch memory that is kept.

use crate::Real;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::{factor, solve};
use faer::{Conj, MatMut, MatRef, Par};

/// For matrices of one dimension, of which entries `b ≥ a` of row `a` are given; rows are `width` apart.
pub struct Cholesky {
    memory: MemBuffer,
    dim: usize,
    width: usize,
}

impl Cholesky {
    pub fn new(dim: usize, width: usize) -> Self {
        let scratch = factor::cholesky_in_place_scratch::<f64>(dim, Par::Seq, Default::default());
        Self { memory: MemBuffer::new(scratch), dim, width }
    }

    /// Factors in place; false when the matrix is not positive definite in this arithmetic.
    pub fn factor<C: Real>(&mut self, matrix: &mut [C]) -> bool {
        // The upper half by rows is the lower half by columns.
        let matrix = MatMut::from_column_major_slice_with_stride_mut(matrix, self.dim, self.dim, self.width);
        let stack = MemStack::new(&mut self.memory);
        factor::cholesky_in_place(matrix, Default::default(), Par::Seq, stack, Default::default()).is_ok()
    }

    /// Solves in place with the factors; always true.
    pub fn solve<C: Real>(&mut self, factors: &[C], rhs: &mut [C]) -> bool {
        let factors = MatRef::from_column_major_slice_with_stride(factors, self.dim, self.dim, self.width);
        let rhs = MatMut::from_column_major_slice_mut(&mut rhs[..self.dim], self.dim, 1);
        solve::solve_in_place_with_conj(factors, Conj::No, rhs, Par::Seq, MemStack::new(&mut self.memory));
        true
    }
}
