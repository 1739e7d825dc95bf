//! Gated linear attention.

use super::decay::masked_exp;
use super::{Mixer, MixerConfig};
use crate::heads::Heads;
use crate::nn::{Projection, RmsNorm, causal, split_heads, widened};
use candle_core::{Result, Tensor};
use candle_nn::{Module, VarBuilder};

/// `S_t = Diag(α_t) S_{t−1} + k_t v_tᵀ`, `out_t = D^-0.5 q_t S_t` (Yang et al., "Gated Linear Attention Transformers",
/// 2024, section 4.4): decays per channel `α_t = σ(x_t W₁ W₂ + b)^{1/16}` through a bottleneck of 16, outputs normalised
/// per head and gated by `silu(x W)`.
///
/// `α` is kept above `exp(-5)` (a gate's logit of about -80), so that the chunked form has the range for it.
#[derive(Debug)]
pub struct GatedLinear {
    heads: Heads,
    /// Through the bottleneck.
    decay: Option<[Projection; 2]>,
    norm: RmsNorm,
    gate: Projection,
}

/// The power of the gates is one over this.
const TEMPERATURE: f64 = 16.0;
/// Width of the gates' bottleneck.
const RANK: usize = 16;
/// The least logarithm of a decay.
const LEAST: f64 = -5.0;
/// Tokens of a chunk: its decays must fit into exp(± CHUNK / 2 · LEAST).
const CHUNK: usize = 16;

impl GatedLinear {
    pub fn new(config: &MixerConfig, vb: VarBuilder) -> Result<Self> {
        let heads = Heads::new(config, false, &vb)?;
        let inner = heads.heads * heads.width;
        let decay = if config.decay {
            let rank = RANK.min(config.dim);
            let first = Projection::new(config.dim, rank, false, vb.pp("decay_down"))?;
            Some([first, Projection::new(rank, inner, true, vb.pp("decay_up"))?])
        } else {
            None
        };
        let norm = RmsNorm::new(heads.width, 1e-6, vb.pp("out_norm"))?;
        Ok(Self { heads, decay, norm, gate: Projection::new(config.dim, inner, false, vb.pp("gate_proj"))? })
    }
}

impl Mixer for GatedLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [q, k, v] = self.heads.project_wide(x)?;
        let log_decay = match &self.decay {
            Some([down, up]) => {
                let logit = widened(&up.forward(&down.forward(x)?)?)?;
                // log σ(z) = -softplus(-z)
                let log = (crate::nn::softplus(&logit.neg()?)? * (-1.0 / TEMPERATURE))?;
                split_heads(&log.maximum(LEAST)?, self.heads.heads)?.contiguous()?
            }
            None => k.zeros_like()?,
        };
        let q = (q * (self.heads.width as f64).powf(-0.5))?;
        let out = self.norm.forward(&gated_linear(&q, &k, &v, &log_decay)?)?;
        let gate = split_heads(&self.gate.forward(x)?.silu()?, self.heads.heads)?;
        self.heads.merge(&(out * gate.to_dtype(v.dtype())?.contiguous()?)?, x)
    }
}

/// `out_i = Σ_{j ≤ i} Σ_d q_id k_jd exp(Σ_{j < t ≤ i} log α_td) v_j`, all `[B, H, N, D]`, `log α` from [`LEAST`] to 0.
///
/// In chunks: inside one, the decays are split at its middle into a factor of the query and one of the key; between
/// chunks, states `[D, DV]` are summed with weights that are powers of decays, at most 1, for all chunks at once.
pub(super) fn gated_linear(q: &Tensor, k: &Tensor, v: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
    let (b, h, n, d) = q.dims4()?;
    let dv = v.dim(3)?;
    let chunks = n.div_ceil(CHUNK);
    // Added tokens have keys of 0 and decay nothing.
    let chunked = |x: &Tensor| {
        let width = x.dim(3)?;
        x.pad_with_zeros(2, 0, chunks * CHUNK - n)?.reshape((b * h, chunks, CHUNK, width))
    };
    let (q, k, v, log_decay) = (chunked(q)?, chunked(k)?, chunked(v)?, chunked(log_decay)?);
    let (dtype, device) = (q.dtype(), q.device().clone());

    // Logarithms of the decays from the chunk's beginning up to each token.
    let total = log_decay.cumsum(2)?;
    let last = total.narrow(2, CHUNK - 1, 1)?;
    let middle = total.narrow(2, CHUNK / 2, 1)?;
    let from_middle = total.broadcast_sub(&middle)?;
    let inside = (&q * from_middle.exp()?)?.matmul(&(&k * from_middle.neg()?.exp()?)?.t()?)?;
    let inside = inside.broadcast_mul(&causal(CHUNK, CHUNK, false, dtype, &device)?)?.matmul(&v)?;

    // What each chunk adds to the state by its end: [B · H, chunk, D, DV].
    let to_end = last.broadcast_sub(&total)?.exp()?;
    let added = (&k * to_end)?.transpose(2, 3)?.contiguous()?.matmul(&v)?;
    // The state at each chunk's beginning: weights [B · H, D, chunk, earlier chunk].
    let by_chunk = last.squeeze(2)?.transpose(1, 2)?.contiguous()?;
    let ends = by_chunk.cumsum(2)?;
    let begins = (&ends - by_chunk)?;
    let between = begins.unsqueeze(3)?.broadcast_sub(&ends.unsqueeze(2)?)?;
    let weights = masked_exp(&between, &causal(chunks, chunks, true, dtype, &device)?)?;
    let by_channel = added.transpose(1, 2)?.contiguous()?; // [B · H, D, chunk, DV]
    let states = weights.matmul(&by_channel)?.transpose(1, 2)?.contiguous()?;
    let before = (&q * total.exp()?)?.matmul(&states)?;

    debug_assert_eq!(states.dims(), [b * h, chunks, d, dv]);
    (inside + before)?.reshape((b, h, chunks * CHUNK, dv))?.narrow(2, 0, n)
}
