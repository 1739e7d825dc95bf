//! The caller's tensors as rows in the type of arithmetic.
//!
//! What tensors are stored in, and with which strides, ends here: past it the engine is compiled for `f32` and `f64` only, not
//! for every combination of storage types.

use crate::{Attention, Element, Real, Shape, View, ViewMut};

/// A tensor to read, token by token.
pub trait ReadRows<C>: Sync {
    fn shape(&self) -> Shape;
    /// Reads one token into the beginning of `row`. When an entry is not finite the row becomes zeros, and the answer false.
    fn read(&self, b: usize, h: usize, n: usize, row: &mut [C]) -> bool;
    /// One entry, whatever it is.
    fn entry(&self, b: usize, h: usize, n: usize, d: usize) -> C;
}

impl<T: Element, C: Real> ReadRows<C> for View<'_, T> {
    fn shape(&self) -> Shape {
        View::shape(self)
    }

    fn read(&self, b: usize, h: usize, n: usize, row: &mut [C]) -> bool {
        let dim = self.shape()[3];
        self.row(b, h, n).for_each(|d, x| row[d] = x.to_real());
        let finite = row[..dim].iter().all(|x| x.is_finite());
        if !finite {
            row[..dim].fill(C::ZERO);
        }
        finite
    }

    fn entry(&self, b: usize, h: usize, n: usize, d: usize) -> C {
        self.at(b, h, n, d).to_real()
    }
}

/// A tensor to write, token by token.
pub trait WriteRows<C>: Sync {
    /// # Safety
    /// No other thread may write the same token at the same time.
    unsafe fn write(&self, b: usize, h: usize, n: usize, values: &[C]);
}

impl<O: Element, C: Real> WriteRows<C> for ViewMut<'_, O> {
    unsafe fn write(&self, b: usize, h: usize, n: usize, values: &[C]) {
        // SAFETY: the caller's promise is the one asked for.
        unsafe { self.write_row(b, h, n, values) }
    }
}

/// A problem in the type of arithmetic.
pub struct Inputs<'a, C> {
    pub attention: &'a Attention,
    pub q: &'a dyn ReadRows<C>,
    pub k: &'a dyn ReadRows<C>,
    pub v: &'a dyn ReadRows<C>,
    pub bias: Option<&'a dyn ReadRows<C>>,
    pub probe: Option<&'a dyn ReadRows<C>>,
}
