//! Mamba-2.

use super::decay::{ScalarDecay, decay_matrix};
use super::{Mixer, MixerConfig};
use crate::nn::{Projection, RmsNorm, ShortConv, expect_input, merge_heads, split_heads, widened};
use candle_core::{Result, Tensor};
use candle_nn::{Init, Module, VarBuilder};

/// State space duality with a scalar decay per head (Dao and Gu, "Transformers are SSMs", 2024): for heads of `x` twice
/// as wide as the model in all, `S_t = exp(−Δ_t exp(a_log)) S_{t−1} + Δ_t B_t x_tᵀ`, `y_t = C_tᵀ S_t + D x_t`, where all
/// heads share `B` and `C`; then RMS normalisation of `y ⊙ silu(z)`. Computed in its attention-like form, `O(N²)`.
#[derive(Debug)]
pub struct Mamba2 {
    dim: usize,
    heads: usize,
    /// Of z, x, B and C.
    sizes: [usize; 4],
    in_proj: Projection,
    conv: Option<ShortConv>,
    step: ScalarDecay,
    decay: bool,
    skip: Tensor,
    norm: RmsNorm,
    out_proj: Projection,
}

/// Width of the heads together, as a multiple of the model's.
const EXPAND: usize = 2;
/// Width of the state unless told.
const STATE: usize = 64;

impl Mamba2 {
    pub fn new(config: &MixerConfig, vb: VarBuilder) -> Result<Self> {
        let (dim, heads) = (config.dim, config.heads);
        let inner = EXPAND * heads * config.width()?;
        let state = config.state_dim.unwrap_or(STATE);
        let sizes = [inner, inner, state, state];
        Ok(Self {
            dim,
            heads,
            sizes,
            in_proj: Projection::new(dim, sizes.iter().sum(), config.bias, vb.pp("in_proj"))?,
            conv: ShortConv::maybe(config.short_conv, inner + 2 * state, vb.pp("conv"))?,
            step: ScalarDecay::new(dim, heads, &vb)?,
            decay: config.decay,
            skip: vb.get_with_hints(heads, "skip", Init::Const(1.0))?,
            norm: RmsNorm::new(inner, 1e-6, vb.pp("out_norm"))?,
            out_proj: Projection::new(inner, dim, config.bias, vb.pp("out_proj"))?,
        })
    }
}

impl Mixer for Mamba2 {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        expect_input(x, self.dim)?;
        let [inner, _, state, _] = self.sizes;
        let projected = self.in_proj.forward(x)?;
        let z = projected.narrow(2, 0, inner)?;
        let rest = projected.narrow(2, inner, inner + 2 * state)?;
        let rest = match &self.conv {
            Some(conv) => conv.forward(&rest)?,
            None => rest.silu()?,
        };
        let rest = widened(&rest)?;
        let (b, c) = (rest.narrow(2, inner, state)?, rest.narrow(2, inner + state, state)?);
        let heads = split_heads(&rest.narrow(2, 0, inner)?.contiguous()?, self.heads)?.contiguous()?;
        let (log_decay, step) = self.step.forward(x)?;
        let log_decay = if self.decay { log_decay } else { log_decay.zeros_like()? };
        let out = state_space(&heads, &b, &c, &step, &log_decay)?;
        let skip = self.skip.to_dtype(out.dtype())?.reshape((self.heads, 1, 1))?;
        let out = merge_heads(&(out + heads.broadcast_mul(&skip)?)?)?;
        let gated = (out * widened(&z.silu()?)?)?;
        self.out_proj.forward(&self.norm.forward(&gated)?.to_dtype(x.dtype())?)
    }
}

/// `Σ_{j ≤ i} (c_i·b_j) exp(Σ_{j < t ≤ i} log α_t) Δ_j x_j` of `x [B, H, N, P]`, `b, c [B, N, state]`, `Δ, log α [B, H, N]`.
pub(super) fn state_space(
    x: &Tensor,
    b: &Tensor,
    c: &Tensor,
    step: &Tensor,
    log_decay: &Tensor,
) -> Result<Tensor> {
    let shared = c.contiguous()?.matmul(&b.contiguous()?.t()?)?.unsqueeze(1)?;
    let weights = decay_matrix(log_decay)?.broadcast_mul(&shared)?;
    weights.matmul(&x.broadcast_mul(&step.unsqueeze(3)?)?)
}
