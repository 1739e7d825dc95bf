//! Causal sequence mixers of one interface: Local Linear Attention and what it is compared with.
//!
//! | name | formula | source |
//! |---|---|---|
//! | `softmax` | `Σ softmax(scale q·k_j) v_j` | Vaswani et al., 2017 |
//! | `lla` | see [`flashlla`] | Zuo et al., ICLR 2026 |
//! | `parallax` | `Σ p_j (1 − (k_j − k̄)·x) v_j`, `x` projected from the input | the same formula, its probe learned |
//! | `linear` | `Σ φ(q)·φ(k_j) v_j / Σ φ(q)·φ(k_j)`, `φ = elu + 1` | Katharopoulos et al., 2020 |
//! | `gla` | `S_t = Diag(α_t) S_{t−1} + k_t v_tᵀ` | Yang et al., 2024 |
//! | `deltanet` | `S_t = (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ` | Schlag et al., 2021; Yang et al., 2024 |
//! | `gated-deltanet` | the same with `α_t S_{t−1}` | Yang, Kautz and Hatamizadeh, 2025 |
//! | `mesanet` | `G_t (H_t + Λ)⁻¹ q_t` | von Oswald et al., 2025 |
//! | `mamba2` | `S_t = exp(Δ_t A) S_{t−1} + Δ_t B_t x_tᵀ` | Dao and Gu, 2024 |
//! | `hyena` | `x2 ⊙ (h2 * (x1 ⊙ (h1 * v)))` | Poli et al., 2023 |
//!
//! All are written with differentiable Candle operations (LLA and Parallax with [`crate::local_linear_attention`]) in
//! forms that are parallel over tokens; each is tested against its recurrence, token by token in `f64`.

mod config;
mod decay;
mod delta;
mod gla;
mod hyena;
mod linear;
mod mamba2;
mod mesa;
mod softmax;

pub use config::{MixerConfig, MixerKind};

use crate::{KvCache, LocalLinearAttention};
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// A causal sequence mixer.
pub trait Mixer: Send + Sync + std::fmt::Debug {
    /// `[B, N, dim]` to `[B, N, dim]`; token `i` of the output depends on tokens `0..=i` of the input.
    fn forward(&self, x: &Tensor) -> Result<Tensor>;

    /// An empty cache to generate with, for up to `max_len` tokens, if the mixer has one.
    fn cache(&self, max_len: usize) -> Option<KvCache> {
        let _ = max_len;
        None
    }

    /// The next tokens `[B, N, dim]` of sequences whose past is in the cache, which they are added to; without gradients.
    /// For mixers with a [`Mixer::cache`].
    fn forward_cached(&self, x: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let _ = (x, cache);
        candle_core::bail!("mixer: {self:?} has no cache")
    }
}

/// Makes a mixer, its parameters from `vb`.
pub fn mixer(config: &MixerConfig, vb: VarBuilder) -> Result<Box<dyn Mixer>> {
    config.validate()?;
    match config.kind {
        MixerKind::LocalLinear | MixerKind::Parallax => Ok(Box::new(LocalLinearAttention::new(config, vb)?)),
        MixerKind::Softmax => Ok(Box::new(softmax::Softmax::new(config, vb)?)),
        MixerKind::Linear => Ok(Box::new(linear::Linear::new(config, vb)?)),
        MixerKind::GatedLinear => Ok(Box::new(gla::GatedLinear::new(config, vb)?)),
        MixerKind::DeltaNet | MixerKind::GatedDeltaNet => Ok(Box::new(delta::Delta::new(config, vb)?)),
        MixerKind::Mesa => Ok(Box::new(mesa::Mesa::new(config, vb)?)),
        MixerKind::Mamba2 => Ok(Box::new(mamba2::Mamba2::new(config, vb)?)),
        MixerKind::Hyena => Ok(Box::new(hyena::Hyena::new(config, vb)?)),
    }
}
