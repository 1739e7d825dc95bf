//! [`MixerKind`] and [`MixerConfig`]: which mixer, and how large.

use crate::error::value;
use candle_core::Result;
use serde::{Deserialize, Serialize};

/// The mixers of this crate. As text (`Display`, `FromStr`, serde): `softmax`, `lla`, `parallax`, `linear`, `gla`, `deltanet`,
/// `gated-deltanet`, `mesanet`, `mamba2`, `hyena`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum MixerKind {
    /// Softmax attention with a learned scale per head.
    #[serde(rename = "softmax")]
    Softmax,
    /// Local Linear Attention.
    #[serde(rename = "lla")]
    LocalLinear,
    /// Local Linear Attention's output formula with a learned probe in place of the solved one.
    #[serde(rename = "parallax")]
    Parallax,
    /// Linear attention with normalisation (Katharopoulos et al., 2020).
    #[serde(rename = "linear")]
    Linear,
    /// Gated linear attention (Yang et al., 2024).
    #[serde(rename = "gla")]
    GatedLinear,
    /// DeltaNet (Schlag et al., 2021; Yang et al., 2024).
    #[serde(rename = "deltanet")]
    DeltaNet,
    /// Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2025).
    #[serde(rename = "gated-deltanet")]
    GatedDeltaNet,
    /// MesaNet (von Oswald et al., 2025).
    #[serde(rename = "mesanet")]
    Mesa,
    /// Mamba-2 (Dao and Gu, 2024).
    #[serde(rename = "mamba2")]
    Mamba2,
    /// Hyena of order 2 (Poli et al., 2023).
    #[serde(rename = "hyena")]
    Hyena,
}

impl MixerKind {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Softmax,
        Self::LocalLinear,
        Self::Parallax,
        Self::Linear,
        Self::GatedLinear,
        Self::DeltaNet,
        Self::GatedDeltaNet,
        Self::Mesa,
        Self::Mamba2,
        Self::Hyena,
    ];

    /// The name as text.
    pub fn name(self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::LocalLinear => "lla",
            Self::Parallax => "parallax",
            Self::Linear => "linear",
            Self::GatedLinear => "gla",
            Self::DeltaNet => "deltanet",
            Self::GatedDeltaNet => "gated-deltanet",
            Self::Mesa => "mesanet",
            Self::Mamba2 => "mamba2",
            Self::Hyena => "hyena",
        }
    }

    /// Whether query heads can share key and value heads.
    pub fn groups_heads(self) -> bool {
        matches!(self, Self::Softmax | Self::LocalLinear | Self::Parallax)
    }
}

impl std::fmt::Display for MixerKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for MixerKind {
    type Err = candle_core::Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| value("mixer", name, format!("one of {}", Self::ALL.map(Self::name).join(", "))))
    }
}

/// Which mixer, and how large. What a mixer does not have it ignores, unless its documentation says that it refuses it.
///
/// ```
/// use flashlla_candle::{MixerConfig, MixerKind};
/// let config = MixerConfig { rope: true, ..MixerConfig::new("lla".parse()?, 64, 4) };
/// assert_eq!((config.kind, config.width()?), (MixerKind::LocalLinear, 16));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MixerConfig {
    /// Which.
    pub kind: MixerKind,
    /// Width of inputs and outputs.
    pub dim: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads` (default: as many). Fewer only for softmax, LLA and Parallax.
    pub kv_heads: Option<usize>,
    /// Width of a head (default `dim / heads`).
    pub head_dim: Option<usize>,
    /// Whether the projections add a bias.
    pub bias: bool,
    /// Rotate queries and keys by their positions (softmax, LLA and Parallax).
    pub rope: bool,
    /// Base of the rotation's frequencies.
    pub rope_base: f64,
    /// RMS-normalise queries and keys in every head (softmax, LLA and Parallax).
    pub qk_norm: bool,
    /// A causal depthwise convolution over 4 tokens, then SiLU, on what goes into the mixer (queries, keys and values).
    pub short_conv: bool,
    /// The longest sequence (Hyena, whose filters know their positions relative to it).
    pub max_len: usize,
    /// The ridge λ that training starts from (LLA); the regulariser's start (MesaNet).
    pub ridge: f64,
    /// Learn the ridge per query head.
    pub learn_ridge: bool,
    /// Learn the factor on `q·k` per key head (softmax, LLA and Parallax).
    pub learn_scale: bool,
    /// The relative residual of LLA's solves (default: the engine's); of MesaNet's (default 1e-4).
    pub tolerance: Option<f64>,
    /// The most conjugate-gradient steps of LLA (default: the engine's choice) and MesaNet (default 30).
    pub max_iters: Option<usize>,
    /// LLA in higher precision than its inputs' (see `flashlla::Precision`).
    pub high_precision: bool,
    /// Decay that depends on the data, for those that have it (GLA, Gated DeltaNet, MesaNet, Mamba-2). Without, they forget
    /// nothing.
    pub decay: bool,
    /// SiLU on queries and keys of DeltaNet, Gated DeltaNet and MesaNet, as published.
    pub activation: bool,
    /// Width of the state per head (Mamba-2; default: that of a head).
    pub state_dim: Option<usize>,
}

impl Default for MixerConfig {
    /// LLA of width 64 with 4 heads.
    fn default() -> Self {
        Self {
            kind: MixerKind::LocalLinear,
            dim: 64,
            heads: 4,
            kv_heads: None,
            head_dim: None,
            bias: false,
            rope: false,
            rope_base: 10000.0,
            qk_norm: false,
            short_conv: false,
            max_len: 1024,
            ridge: 1.0,
            learn_ridge: true,
            learn_scale: true,
            tolerance: None,
            max_iters: None,
            high_precision: false,
            decay: true,
            activation: true,
            state_dim: None,
        }
    }
}

impl MixerConfig {
    /// The defaults at a size.
    pub fn new(kind: MixerKind, dim: usize, heads: usize) -> Self {
        Self { kind, dim, heads, ..Self::default() }
    }

    /// Width of a head.
    pub fn width(&self) -> Result<usize> {
        if self.heads == 0 {
            return Err(value("heads", 0, "at least 1"));
        }
        let width = match self.head_dim {
            Some(width) => width,
            None if self.dim.is_multiple_of(self.heads) => self.dim / self.heads,
            None => return Err(value("dim", self.dim, format!("a multiple of heads ({})", self.heads))),
        };
        if !(1..=flashlla::MAX_HEAD_DIM).contains(&width) {
            return Err(value("head_dim", width, format!("from 1 to {}", flashlla::MAX_HEAD_DIM)));
        }
        Ok(width)
    }

    /// Key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.heads)
    }

    /// Checks what can be checked without making the mixer.
    pub fn validate(&self) -> Result<()> {
        let width = self.width()?;
        if self.dim == 0 {
            return Err(value("dim", 0, "at least 1"));
        }
        let kv_heads = self.kv_heads();
        if kv_heads == 0 || !self.heads.is_multiple_of(kv_heads) {
            return Err(value("kv_heads", kv_heads, format!("a divisor of heads ({})", self.heads)));
        }
        if kv_heads != self.heads && !self.kind.groups_heads() {
            return Err(value("kv_heads", kv_heads, format!("heads ({}) for {}", self.heads, self.kind)));
        }
        if self.rope && width % 2 != 0 {
            return Err(value("head_dim", width, "even with rope"));
        }
        if !(self.rope_base > 0.0 && self.rope_base.is_finite()) {
            return Err(value("rope_base", self.rope_base, "finite and greater than 0"));
        }
        if !(self.ridge > 0.0 && self.ridge.is_finite()) {
            return Err(value("ridge", self.ridge, "finite and greater than 0"));
        }
        if let Some(t) = self.tolerance.filter(|t| !(*t >= 0.0 && *t < 1.0)) {
            return Err(value("tolerance", t, "a number from 0 to below 1"));
        }
        for (name, size) in [("max_iters", self.max_iters), ("state_dim", self.state_dim)] {
            if size == Some(0) {
                return Err(value(name, 0, "at least 1"));
            }
        }
        if self.max_len == 0 {
            return Err(value("max_len", 0, "at least 1"));
        }
        Ok(())
    }
}
