//! Error and time against the number of conjugate-gradient steps.

use super::measure::{Cost, measure};
use super::normal;
use crate::device::AnyEngine;
use crate::options::Device;
use crate::{Error, Result};
use flashlla::{Attention, Cpu, Engine, Mask, Precision, Solver, Tensor};

/// How the keys are distributed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    /// Standard deviation 1 in every direction.
    Gaussian,
    /// Standard deviations from 5 to 0.05, by a geometric sequence.
    Anisotropic,
}

impl Keys {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Gaussian, Self::Anisotropic];

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gaussian => "Gaussian",
            Self::Anisotropic => "anisotropic",
        }
    }

    fn scale(self, coordinate: usize, dim: usize) -> f32 {
        match self {
            Self::Gaussian => 1.0,
            Self::Anisotropic => 5.0 * 100f32.powf(-(coordinate as f32) / (dim as f32 - 1.0).max(1.0)),
        }
    }
}

/// At one of [`STEPS`].
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// Relative Frobenius error of the output against a direct solve in f64.
    pub error: f64,
    /// Of the forward.
    pub cost: Cost,
}

/// The numbers of steps that are tried.
pub const STEPS: [usize; 9] = [1, 2, 3, 4, 6, 8, 12, 16, 32];

/// One head of `tokens` queries and keys, causal, in f32.
pub fn curve(
    tokens: usize,
    dim: usize,
    ridge: f64,
    keys: Keys,
    seed: u64,
    device: Device,
) -> Result<Vec<Point>> {
    let engine = AnyEngine::open(device)?;
    let size = [1, 1, tokens, dim];
    let random = |stream: u64, keys: Keys| {
        let mut numbers = normal::<f32>(4 * seed + stream, tokens * dim);
        numbers.chunks_exact_mut(dim).for_each(|row| {
            row.iter_mut().enumerate().for_each(|(i, x)| *x *= keys.scale(i, dim));
        });
        Tensor::new(numbers, &size)
    };
    let (q, k, v) = (random(0, keys), random(1, keys), random(2, Keys::Gaussian));
    let describe = |solver: Solver, precision: Precision| {
        let attention = Attention::builder().queries(tokens).head_dim(dim).mask(Mask::causal());
        attention.ridge(ridge).solver(solver).precision(precision).build().map_err(Error::failed)
    };
    let exact = describe(Solver::Direct, Precision::High)?;
    let problem = exact.problem(q.view(), k.view(), v.view()).map_err(Error::failed)?;
    let truth = Cpu::new().forward(&problem).map_err(Error::failed)?.out;
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let size_of_truth = norm(&mut truth.data().iter().map(|&x| f64::from(x)));
    STEPS
        .iter()
        .map(|&steps| {
            let attention = describe(Solver::Cg { tolerance: 0.0, max_iters: steps }, Precision::Standard)?;
            let problem = attention.problem(q.view(), k.view(), v.view()).map_err(Error::failed)?;
            let mut out = Tensor::<f32>::zeros(&size);
            let cost = measure(|| engine.forward_into(&problem, out.view_mut()).map_err(Error::failed))?;
            let off = |(a, b): (&f32, &f32)| f64::from(*a) - f64::from(*b);
            let error = norm(&mut out.data().iter().zip(truth.data()).map(off)) / size_of_truth;
            Ok(Point { error, cost })
        })
        .collect()
}
