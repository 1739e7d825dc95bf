//! Moments in the matrix unit of newer x86 processors: the first pass over a cache for one query, when arithmetic is `f32`.
//!
//! Its products are of `bf16` numbers, summed in `f32`. What is not `bf16` exactly is split into two terms that are (`pack.rs`), so that
//! weighted keys are within 2⁻¹⁷; keys and values of a `bf16` cache are multiplied as they are. Arithmetic is then so cheap that values
//! are looked at in the same pass: beside `Σ w k kᵀ` it sums `Σ w k vᵀ`, and the output needs no second look at the keys.

#[cfg(target_arch = "x86_64")]
mod moments;
#[cfg(target_arch = "x86_64")]
mod pack;
#[cfg(target_arch = "x86_64")]
mod pass;
#[cfg(target_arch = "x86_64")]
mod raw;
#[cfg(target_arch = "x86_64")]
mod tiles;

#[cfg(all(test, target_arch = "x86_64"))]
mod tests;

#[cfg(target_arch = "x86_64")]
pub use tiles::Unit;

use super::stream::{Found, Stream};
use crate::Real;
use crate::cpu::Run;
use crate::cpu::block::Arith;
use std::ops::Range;

/// A processor without the unit.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Debug, Clone, Copy)]
pub enum Unit {}

#[cfg(not(target_arch = "x86_64"))]
impl Unit {
    pub fn get() -> Option<Self> {
        None
    }
}

/// What a term of the moments is off by, relatively.
pub const EPSILON: f64 = 1.0 / (1 << 18) as f64;

/// Second moments and products with values as [`FirstPass::fast`] leaves them.
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "there is no unit that leaves any"))]
pub struct Sums<'a, C> {
    /// Keys, summed with their weights.
    pub mean: &'a [C],
    pub moments: &'a mut Vec<C>,
    pub cross: &'a mut Vec<C>,
}

/// A type of arithmetic, in which a first pass with moments for one row may have a faster way.
pub trait FirstPass: Real {
    /// That way, if there is one here. It knows nothing of keys that are not finite, but that its sums are not finite then.
    fn fast(stream: &Stream<Self>, arith: &Arith, split: &Range<usize>) -> Option<Found<Self>>;

    /// Lays out what it found as others do.
    fn settle(stream: &Stream<Self>, sums: Sums<Self>);

    /// Whether there is that way.
    fn has_unit(run: Run) -> bool {
        size_of::<Self>() == size_of::<f32>() && run.unit.is_some()
    }
}

impl FirstPass for f64 {
    fn fast(_: &Stream<f64>, _: &Arith, _: &Range<usize>) -> Option<Found<f64>> {
        None
    }

    fn settle(_: &Stream<f64>, _: Sums<f64>) {}
}

#[cfg(target_arch = "x86_64")]
impl FirstPass for f32 {
    fn fast(stream: &Stream<f32>, arith: &Arith, split: &Range<usize>) -> Option<Found<f32>> {
        Some(pass::first_pass(stream.run.unit?, stream, arith, split))
    }

    fn settle(stream: &Stream<f32>, sums: Sums<f32>) {
        pass::settle(stream, sums);
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl FirstPass for f32 {
    fn fast(stream: &Stream<f32>, _: &Arith, _: &Range<usize>) -> Option<Found<f32>> {
        match stream.run.unit? {}
    }

    fn settle(_: &Stream<f32>, _: Sums<f32>) {}
}
