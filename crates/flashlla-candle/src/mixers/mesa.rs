//! MesaNet.

use super::decay::{Gate, ScalarDecay, decay_matrix};
use super::{Mixer, MixerConfig};
use crate::heads::Heads;
use crate::nn::{RmsNorm, softplus, unit};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Tensor};
use candle_nn::{Init, Module, VarBuilder};

/// The exact solution of a ridge regression of the values on the keys seen so far, `out_t = G_t (H_t + Λ)⁻¹ q_t` with
/// `G_t = γ_t G_{t−1} + β_t v_t k_tᵀ` and `H_t = γ_t H_{t−1} + β_t k_t k_tᵀ` (von Oswald et al., "MesaNet", 2025),
/// queries and keys of length 1, `β_t = σ(x_t W)`, decays `γ` as Mamba-2's, `Λ` diagonal and learned per head and
/// channel, at least a quarter of what it starts from (`ridge`). Outputs are normalised per head.
///
/// The systems are solved by conjugate gradients on the masked form, all tokens at once, at most 30 steps as published.
#[derive(Debug)]
pub struct Mesa {
    heads: Heads,
    activation: bool,
    beta: Gate,
    decay: Option<ScalarDecay>,
    /// `[H, D]`: Λ is softplus of it, and what it is at least.
    lambda: Tensor,
    least: f64,
    norm: RmsNorm,
    steps: Steps,
}

/// When conjugate gradients stop.
#[derive(Debug, Clone, Copy)]
pub(super) struct Steps {
    pub most: usize,
    /// Relative residual of the worst row.
    pub tolerance: f64,
}

impl Mesa {
    pub fn new(config: &MixerConfig, vb: VarBuilder) -> Result<Self> {
        let heads = Heads::new(config, false, &vb)?;
        let least = config.ridge / 4.0;
        let start = ((config.ridge - least).exp_m1()).ln().max(-20.0); // softplus^-1
        let start = if start.is_finite() { start } else { config.ridge - least };
        let decay = if config.decay { Some(ScalarDecay::new(config.dim, heads.heads, &vb)?) } else { None };
        Ok(Self {
            activation: config.activation,
            beta: Gate::new(config.dim, heads.heads, vb.pp("beta_proj"))?,
            decay,
            lambda: vb.get_with_hints((heads.heads, heads.width), "lambda", Init::Const(start))?,
            least,
            norm: RmsNorm::new(heads.width, 1e-6, vb.pp("out_norm"))?,
            steps: Steps {
                most: config.max_iters.unwrap_or(30),
                tolerance: config.tolerance.unwrap_or(1e-4),
            },
            heads,
        })
    }
}

impl Mixer for Mesa {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [q, k, v] = self.heads.project_wide(x)?;
        // A short convolution has its activation already.
        let active = |x: Tensor| if self.activation && !self.heads.has_convs() { x.silu() } else { Ok(x) };
        let (q, k) = (unit(&active(q)?)?, unit(&active(k)?)?);
        let beta = self.beta.forward(x)?;
        let log_decay = match &self.decay {
            Some(decay) => decay.forward(x)?.0,
            None => beta.zeros_like()?,
        };
        let lambda = (softplus(&self.lambda.to_dtype(q.dtype())?)? + self.least)?;
        let out = mesa(&q, &k, &v, &beta, &log_decay, &lambda, self.steps)?;
        self.heads.merge(&self.norm.forward(&out)?, x)
    }
}

/// The formula above for `q, k, v [B, H, N, D]`, `β, log γ [B, H, N]`, `Λ [H, D]`.
pub(super) fn mesa(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    beta: &Tensor,
    log_decay: &Tensor,
    lambda: &Tensor,
    steps: Steps,
) -> Result<Tensor> {
    // What the past weighs: [B, H, N, N].
    let weights = decay_matrix(log_decay)?.broadcast_mul(&beta.unsqueeze(2)?)?;
    let systems = Systems { k: k.clone(), weights, lambda: lambda.unsqueeze(1)? };
    let solution = systems.solve(q, steps)?;
    (solution.matmul(&k.t()?)? * &systems.weights)?.matmul(v)
}

/// `H_t + Λ` of every token.
struct Systems {
    k: Tensor,
    weights: Tensor,
    /// `[H, 1, D]`.
    lambda: Tensor,
}

impl Systems {
    /// Every row of `x [B, H, N, D]` times its matrix.
    fn times(&self, x: &Tensor) -> Result<Tensor> {
        let past = (x.matmul(&self.k.t()?)? * &self.weights)?.matmul(&self.k)?;
        past + x.broadcast_mul(&self.lambda)?
    }

    fn detached(&self) -> Self {
        let Self { k, weights, lambda } = self;
        Self { k: k.detach(), weights: weights.detach(), lambda: lambda.detach() }
    }

    /// The solutions for right sides `[B, H, N, D]`, differentiable without remembering any step: the solution `x` found
    /// outside of the graph has the residual `b − A x = 0` in it, and the gradient at the residual is `A⁻¹` times that at
    /// the solution.
    fn solve(&self, right: &Tensor, steps: Steps) -> Result<Tensor> {
        let systems = self.detached();
        let solution = systems.conjugate_gradients(&right.detach(), steps)?;
        let residual = (right - self.times(&solution)?)?;
        solution + residual.apply_op1(SolveGradient { systems, steps })?
    }

    fn conjugate_gradients(&self, right: &Tensor, Steps { most, tolerance }: Steps) -> Result<Tensor> {
        let dot = |a: &Tensor, b: &Tensor| (a * b)?.sum_keepdim(D::Minus1);
        // Rows that are 0, or as good as solved, divide by this rather than 0.
        let tiny = if right.dtype() == DType::F64 { 1e-300 } else { 1e-30 };
        let mut x = right.zeros_like()?;
        let (mut r, mut p) = (right.clone(), right.clone());
        let mut norm = dot(&r, &r)?;
        let first = (&norm + tiny)?;
        for _ in 0..most {
            let a_p = self.times(&p)?;
            let alpha = norm.div(&(dot(&p, &a_p)? + tiny)?)?;
            x = (x + p.broadcast_mul(&alpha)?)?;
            r = (r - a_p.broadcast_mul(&alpha)?)?;
            let next = dot(&r, &r)?;
            let worst = next.div(&first)?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            if worst <= tolerance * tolerance {
                break;
            }
            p = (&r + p.broadcast_mul(&next.div(&(norm + tiny)?)?)?)?;
            norm = next;
        }
        Ok(x)
    }
}

/// Zeros whose gradient is multiplied by `A⁻¹` on its way back.
struct SolveGradient {
    systems: Systems,
    steps: Steps,
}

impl CustomOp1 for SolveGradient {
    fn name(&self) -> &'static str {
        "mesa-solve"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((storage.device().zeros_impl(layout.shape(), storage.dtype())?, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        Ok((storage.device().zeros_impl(layout.shape(), storage.dtype())?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        self.systems.conjugate_gradients(&gradient.detach(), self.steps).map(Some)
    }
}
