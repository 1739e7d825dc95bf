//! Linear attention with normalisation.

use super::{Mixer, MixerConfig};
use crate::heads::Heads;
use crate::nn::causal;
use candle_core::{D, Result, Tensor};
use candle_nn::VarBuilder;

/// `out_i = Σ_{j ≤ i} φ(q_i)·φ(k_j) v_j / Σ_{j ≤ i} φ(q_i)·φ(k_j)` with `φ = elu + 1` (Katharopoulos et al., 2020,
/// equations 7 to 9), in its `O(N²)` form.
#[derive(Debug)]
pub struct Linear {
    heads: Heads,
}

/// Keeps denominators away from 0.
pub(super) const EPS: f64 = 1e-6;

impl Linear {
    pub fn new(config: &MixerConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self { heads: Heads::new(config, false, &vb)? })
    }
}

impl Mixer for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [q, k, v] = self.heads.project_wide(x)?;
        self.heads.merge(&linear(&q, &k, &v)?, x)
    }
}

/// Of `[B, H, N, D]` each.
pub(super) fn linear(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let n = q.dim(2)?;
    let feature = |x: &Tensor| x.elu(1.0)? + 1.0;
    let weights = feature(q)?.matmul(&feature(k)?.t()?)?;
    let weights = weights.broadcast_mul(&causal(n, n, false, q.dtype(), q.device())?)?;
    let total = (weights.sum_keepdim(D::Minus1)? + EPS)?;
    weights.matmul(v)?.broadcast_div(&total)
}
