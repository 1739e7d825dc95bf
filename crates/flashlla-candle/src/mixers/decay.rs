//! Sums over the past that forget.

use crate::nn::{causal, sigmoid, softplus};
use candle_core::{Result, Tensor};
use candle_nn::{Init, Module, VarBuilder};

/// `[.., N]` logarithms of decays, at most 0, to `[.., N, N]`: `exp(Σ_{j < t ≤ i} log α_t)` for `j ≤ i`, else 0.
pub fn decay_matrix(log_decay: &Tensor) -> Result<Tensor> {
    let n = log_decay.dim(log_decay.rank() - 1)?;
    let total = log_decay.cumsum(log_decay.rank() - 1)?;
    let past = total.unsqueeze(log_decay.rank())?.broadcast_sub(&total.unsqueeze(log_decay.rank() - 1)?)?;
    masked_exp(&past, &causal(n, n, false, log_decay.dtype(), log_decay.device())?)
}

/// `exp(x)` where the mask is 1, else 0: masked before the exponential too, which could overflow there.
pub fn masked_exp(x: &Tensor, mask: &Tensor) -> Result<Tensor> {
    x.broadcast_mul(mask)?.exp()?.broadcast_mul(mask)
}

/// The scalar decay per head and token of Mamba-2, Gated DeltaNet and MesaNet: `log α = −exp(a_log) Δ` with a step
/// `Δ = softplus(projection + dt_bias)`.
///
/// They start as Mamba-2's do: `exp(a_log)` between 1 and 16, Δ between 0.001 and 0.1.
#[derive(Debug)]
pub struct ScalarDecay {
    a_log: Tensor,
    dt_bias: Tensor,
    proj: crate::nn::Projection,
}

impl ScalarDecay {
    pub fn new(dim: usize, heads: usize, vb: &VarBuilder) -> Result<Self> {
        // softplus^-1(0.001) and softplus^-1(0.1): below them it is nearly exponential.
        let dt = Init::Uniform { lo: -6.907, up: -2.252 };
        Ok(Self {
            a_log: vb.get_with_hints(heads, "a_log", Init::Uniform { lo: 0.0, up: 16f64.ln() })?,
            dt_bias: vb.get_with_hints(heads, "dt_bias", dt)?,
            proj: crate::nn::Projection::new(dim, heads, false, vb.pp("dt_proj"))?,
        })
    }

    /// Of inputs `[B, N, dim]`: `log α` and `Δ`, both `[B, H, N]` in the type that sums are kept in.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let step = crate::nn::widened(&self.proj.forward(x)?)?;
        let step = softplus(&step.broadcast_add(&self.dt_bias.to_dtype(step.dtype())?)?)?;
        let rate = self.a_log.to_dtype(step.dtype())?.exp()?.neg()?;
        let turned = |x: Tensor| x.transpose(1, 2)?.contiguous();
        Ok((turned(step.broadcast_mul(&rate)?)?, turned(step)?))
    }
}

/// A gate per head and token: `σ(projection)`.
#[derive(Debug)]
pub struct Gate(crate::nn::Projection);

impl Gate {
    pub fn new(dim: usize, heads: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self(crate::nn::Projection::new(dim, heads, false, vb)?))
    }

    /// `[B, N, dim]` to `[B, H, N]` in the type that sums are kept in.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        sigmoid(&crate::nn::widened(&self.0.forward(x)?)?)?.transpose(1, 2)?.contiguous()
    }
}
