//! Random inputs.

use flashlla::{Attention, Tensor, bf16, f16};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};

/// The inputs of one problem beside its description, in `f64`.
#[derive(Debug, Clone)]
pub struct Data {
    pub q: Tensor<f64>,
    pub k: Tensor<f64>,
    pub v: Tensor<f64>,
    pub grad_out: Tensor<f64>,
    pub bias: Option<Tensor<f64>>,
    pub probe: Option<Tensor<f64>>,
}

/// Numbers that the inputs are rounded to, so that several storage types see exactly the same ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grid {
    /// Not rounded: for `f64` only.
    F64,
    /// Exact in `f64` and `f32`.
    F32,
    /// Exact in every storage type.
    Half,
}

impl Grid {
    pub const ALL: [Self; 3] = [Self::F64, Self::F32, Self::Half];

    pub fn round(self, x: f64) -> f64 {
        match self {
            Self::F64 => x,
            Self::F32 => x as f32 as f64,
            // Numbers of bf16 in the range of f16; where f16 rounds small ones off, bf16 has bits to spare.
            Self::Half => f16::from_f64(bf16::from_f64(x).to_f64()).to_f64(),
        }
    }

    /// The storage types that hold these numbers exactly.
    pub fn dtypes(self) -> &'static [super::Dtype] {
        use super::Dtype;
        match self {
            Self::F64 => &[Dtype::F64],
            Self::F32 => &[Dtype::F64, Dtype::F32],
            Self::Half => &Dtype::ALL,
        }
    }
}

/// Standard normal numbers on a grid.
pub fn normal(rng: &mut impl Rng, shape: &[usize], grid: Grid) -> Tensor<f64> {
    let len = shape.iter().product();
    let data = (0..len).map(|_| grid.round(StandardNormal.sample(rng))).collect();
    Tensor::new(data, shape)
}

impl Data {
    /// Standard normal q, k, v and grad_out, without bias and probe.
    pub fn random(attention: &Attention, seed: u64, grid: Grid) -> Self {
        let rng = &mut StdRng::seed_from_u64(seed);
        Self {
            q: normal(rng, &attention.query_shape(), grid),
            k: normal(rng, &attention.key_shape(), grid),
            v: normal(rng, &attention.value_shape(), grid),
            grad_out: normal(rng, &attention.out_shape(), grid),
            bias: None,
            probe: None,
        }
    }

    /// Adds a random bias of that shape.
    pub fn with_bias(mut self, shape: [usize; 4], seed: u64, grid: Grid) -> Self {
        self.bias = Some(normal(&mut StdRng::seed_from_u64(!seed), &shape, grid));
        self
    }

    /// Adds a random probe of about the size that solved ones have.
    pub fn with_probe(mut self, seed: u64, grid: Grid) -> Self {
        let mut probe = normal(&mut StdRng::seed_from_u64(seed ^ 0x9e37), self.q.shape(), grid);
        probe.data_mut().iter_mut().for_each(|x| *x = grid.round(*x * 0.25));
        self.probe = Some(probe);
        self
    }
}
