//! [`ModelConfig`]: how large a model is.

use crate::error::value;
use crate::mixers::MixerConfig;
use candle_core::Result;
use serde::{Deserialize, Serialize};

/// How a model knows where tokens stand, beside what its mixer does (`rope`, recurrences).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Positions {
    /// Not at all.
    None,
    /// A learned vector per position.
    Learned {
        /// Positions that there are.
        max_len: usize,
    },
}

/// The sizes of a [`crate::Model`]. As JSON it travels in the metadata of the model's file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Tokens of the vocabulary; `None` for continuous inputs.
    pub vocab: Option<usize>,
    /// Width of continuous inputs.
    pub input_dim: usize,
    /// Width of continuous outputs.
    pub output_dim: usize,
    /// Width of the model.
    pub dim: usize,
    /// Blocks.
    pub layers: usize,
    /// Hidden width of the MLPs as a multiple of `dim`; `None` for no MLPs.
    pub mlp: Option<f64>,
    /// The mixers; their `dim` is that of the model, whatever it says here.
    pub mixer: MixerConfig,
    /// What normalisations add to mean squares.
    pub norm_eps: f64,
    /// The output layer of a vocabulary is its embedding.
    pub tie_embeddings: bool,
    /// Positions.
    pub positions: Positions,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            vocab: None,
            input_dim: 64,
            output_dim: 64,
            dim: 64,
            layers: 2,
            mlp: Some(4.0),
            mixer: MixerConfig::default(),
            norm_eps: 1e-6,
            tie_embeddings: false,
            positions: Positions::None,
        }
    }
}

impl ModelConfig {
    /// A model of tokens with the default mixer.
    pub fn tokens(vocab: usize, dim: usize, layers: usize) -> Self {
        Self { vocab: Some(vocab), dim, layers, ..Self::default() }
    }

    /// A model of continuous inputs and outputs with the default mixer.
    pub fn continuous(input_dim: usize, output_dim: usize, dim: usize, layers: usize) -> Self {
        Self { input_dim, output_dim, dim, layers, ..Self::default() }
    }

    /// The same, the mixer's width filled in, if everything is allowed.
    pub(super) fn checked(&self) -> Result<Self> {
        let mut config = self.clone();
        config.mixer.dim = self.dim;
        for (name, size) in [("vocab", self.vocab.unwrap_or(1)), ("dim", self.dim), ("layers", self.layers)] {
            crate::nn::expect_size(name, size)?;
        }
        if self.vocab.is_none() {
            crate::nn::expect_size("input_dim", self.input_dim)?;
            crate::nn::expect_size("output_dim", self.output_dim)?;
            if self.tie_embeddings {
                return Err(value("tie_embeddings", true, "false without a vocabulary"));
            }
        }
        if let Some(ratio) = self.mlp.filter(|r| !(r.is_finite() && *r > 0.0)) {
            return Err(value("mlp", ratio, "finite and greater than 0, or none"));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps.is_finite()) {
            return Err(value("norm_eps", self.norm_eps, "finite and greater than 0"));
        }
        if let Positions::Learned { max_len } = self.positions {
            crate::nn::expect_size("positions", max_len)?;
        }
        config.mixer.validate()?;
        Ok(config)
    }
}
