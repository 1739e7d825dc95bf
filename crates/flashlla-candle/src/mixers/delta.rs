//! DeltaNet and Gated DeltaNet.

use super::decay::{Gate, ScalarDecay, decay_matrix};
use super::{Mixer, MixerConfig, MixerKind};
use crate::heads::Heads;
use crate::nn::{Projection, RmsNorm, causal, split_heads, unit};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder};

/// `S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ`, `out_t = S_tᵀ q_t`, with queries and keys of length 1 and `β_t
/// = σ(x_t W)`.
///
/// DeltaNet (Schlag et al., 2021; Yang et al., "Parallelizing Linear Transformers with the Delta Rule", 2024) has `α =
/// 1`; Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2025) has a decay per head and token, parametrised as Mamba-2's, and
/// a gate `silu(x W)` on its outputs. Outputs are normalised per head.
#[derive(Debug)]
pub struct Delta {
    heads: Heads,
    activation: bool,
    beta: Gate,
    decay: Option<ScalarDecay>,
    norm: RmsNorm,
    gate: Option<Projection>,
}

/// The most tokens of a chunk.
const CHUNK: usize = 64;

impl Delta {
    pub fn new(config: &MixerConfig, vb: VarBuilder) -> Result<Self> {
        let heads = Heads::new(config, false, &vb)?;
        let gated = config.kind == MixerKind::GatedDeltaNet;
        let decay =
            if gated && config.decay { Some(ScalarDecay::new(config.dim, heads.heads, &vb)?) } else { None };
        let gate = if gated {
            Some(Projection::new(config.dim, heads.heads * heads.width, false, vb.pp("gate_proj"))?)
        } else {
            None
        };
        Ok(Self {
            activation: config.activation,
            beta: Gate::new(config.dim, heads.heads, vb.pp("beta_proj"))?,
            decay,
            norm: RmsNorm::new(heads.width, 1e-6, vb.pp("out_norm"))?,
            gate,
            heads,
        })
    }
}

impl Mixer for Delta {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [q, k, v] = self.heads.project_wide(x)?;
        // A short convolution has its activation already.
        let active = |x: Tensor| if self.activation && !self.heads.has_convs() { x.silu() } else { Ok(x) };
        let (q, k) = (unit(&active(q)?)?, unit(&active(k)?)?);
        let log_decay = match &self.decay {
            Some(decay) => Some(decay.forward(x)?.0),
            None => None,
        };
        let out = delta_rule(&q, &k, &v, &self.beta.forward(x)?, log_decay.as_ref())?;
        let mut out = self.norm.forward(&out)?;
        if let Some(gate) = &self.gate {
            let gate = split_heads(&gate.forward(x)?.silu()?, self.heads.heads)?;
            out = (out * gate.to_dtype(v.dtype())?.contiguous()?)?;
        }
        self.heads.merge(&out, x)
    }
}

/// The recurrence above for `q, k [B, H, N, D]`, `v [B, H, N, DV]`, `beta` and `log α [B, H, N]`.
///
/// In chunks: with `Γ_ij` the decay from token `j` to `i`, `A_ij = β_i Γ_ij k_i·k_j` below the diagonal and `T = (I +
/// A)⁻¹`, the values that a chunk writes are `U = T (β v) − T (β Γ k) S` for the state `S` at its beginning (Yang et al.,
/// 2024, section 3; 2025, section 3.3). All but the few products with `S` is done for all chunks at once.
pub(super) fn delta_rule(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    beta: &Tensor,
    log_decay: Option<&Tensor>,
) -> Result<Tensor> {
    let (b, h, n, d) = q.dims4()?;
    let dv = v.dim(3)?;
    let chunk = n.next_power_of_two().min(CHUNK);
    let chunks = n.div_ceil(chunk);
    let (dtype, device) = (q.dtype(), q.device().clone());
    // Added tokens write nothing and decay nothing.
    let padded = |x: &Tensor| x.pad_with_zeros(2, 0, chunks * chunk - n);
    let rows = |x: &Tensor| padded(x)?.reshape((b * h, chunks, chunk, x.dim(3)?));
    let (q, k, v) = (rows(q)?, rows(k)?, rows(v)?);
    let beta = padded(beta)?.reshape((b * h, chunks, chunk, 1))?;
    let log_decay = match log_decay {
        Some(log_decay) => padded(log_decay)?.reshape((b * h, chunks, chunk))?,
        None => beta.zeros_like()?.squeeze(3)?,
    };
    let total = log_decay.cumsum(2)?.unsqueeze(3)?;
    let last = total.narrow(2, chunk - 1, 1)?;
    let between = decay_matrix(&log_decay)?;

    let strict = causal(chunk, chunk, true, dtype, &device)?;
    let against = (k.matmul(&k.t()?)? * &between)?.broadcast_mul(&beta)?.broadcast_mul(&strict)?;
    let inverse = unit_lower_inverse(&against)?;
    let values = inverse.matmul(&v.broadcast_mul(&beta)?)?;
    let erased = inverse.matmul(&k.broadcast_mul(&(&beta * total.exp()?)?)?)?;
    let inside = (q.matmul(&k.t()?)? * &between)?;
    let from_state = q.broadcast_mul(&total.exp()?)?;
    let to_end = k.broadcast_mul(&last.broadcast_sub(&total)?.exp()?)?.transpose(2, 3)?.contiguous()?;
    let kept = last.exp()?.squeeze(2)?; // [B · H, chunk, 1]

    let mut state = Tensor::zeros((b * h, d, dv), dtype, &device)?;
    let mut outs = Vec::with_capacity(chunks);
    for c in 0..chunks {
        let of = |x: &Tensor| x.narrow(1, c, 1)?.squeeze(1)?.contiguous();
        let written = (of(&values)? - of(&erased)?.matmul(&state)?)?;
        outs.push((of(&from_state)?.matmul(&state)? + of(&inside)?.matmul(&written)?)?);
        if c + 1 < chunks {
            let kept = of(&kept)?.unsqueeze(2)?;
            state = (state.broadcast_mul(&kept)? + of(&to_end)?.matmul(&written)?)?;
        }
    }
    Tensor::cat(&outs, 1)?.reshape((b, h, chunks * chunk, dv))?.narrow(2, 0, n)
}

/// `(I + A)⁻¹` of strictly lower triangular `A [.., C, C]`, `C` a power of two.
///
/// Doubles the size of inverted diagonal blocks: `[[X₁, 0], [−X₂ A₂₁ X₁, X₂]]`. As stable as substitution, which the
/// shorter product `Π (I + (−A)^(2^i))` is not (with equal keys its factors grow like binomials and cancel).
fn unit_lower_inverse(a: &Tensor) -> Result<Tensor> {
    let size = a.dim(a.rank() - 1)?;
    let one = Tensor::eye(size, a.dtype(), a.device())?;
    let mut inverse = one.broadcast_as(a.shape())?.contiguous()?;
    let mut block = 1;
    while block < size {
        let corners = a.broadcast_mul(&corners(size, block, a.dtype(), a.device())?)?;
        inverse = (&inverse - inverse.matmul(&corners)?.matmul(&inverse)?)?;
        block *= 2;
    }
    Ok(inverse)
}

/// 1 where the row lies in the second and the column in the first half of one diagonal block of size `2 block`.
fn corners(size: usize, block: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let inside = |at: usize| {
        let (i, j) = (at / size / block, at % size / block);
        f32::from(i % 2 == 1 && j + 1 == i)
    };
    let values: Vec<f32> = (0..size * size).map(inside).collect();
    Tensor::from_vec(values, (size, size), &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}
