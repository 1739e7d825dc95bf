//! Everything that a run's result depends on.

use super::OptimizerKind;
use crate::tasks::{Interface, TaskSpec};
use flashlla_candle::{MixerConfig, MixerKind, ModelConfig, Positions};
use serde::{Deserialize, Serialize};
use std::hash::Hasher;

/// One run: a task, a model, how it is trained, and the seed of its weights and data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RunSpec {
    /// What is learned.
    pub task: TaskSpec,
    /// What learns.
    pub model: ModelSpec,
    /// How.
    pub training: TrainingSpec,
    /// Of the first weights and of the training data.
    pub seed: u64,
}

/// A decoder-only model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ModelSpec {
    /// What mixes the tokens of every layer.
    pub mixer: MixerKind,
    /// Width.
    pub dim: usize,
    /// Layers.
    pub layers: usize,
    /// Heads of every mixer; `dim` must be a multiple of it.
    pub heads: usize,
    /// Width of the multilayer perceptron after every mixer, in units of `dim`; 0 for none.
    pub mlp: f64,
    /// Whether softmax, LLA and Parallax rotate queries and keys by their positions.
    pub rope: bool,
    /// Whether learned vectors tell every token its position.
    pub positions: bool,
    /// Whether softmax, LLA and Parallax normalise queries and keys.
    pub qk_norm: bool,
    /// Whether every mixer has a short convolution before it.
    pub short_conv: bool,
    /// Whether GLA, Gated DeltaNet, MesaNet and Mamba-2 have their data-dependent decay.
    pub decay: bool,
    /// The ridge that LLA and MesaNet start from.
    pub ridge: f64,
}

/// The arithmetic inside a model; weights are kept in 32 bits whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    F32,
    /// 16 bits with the range of 32.
    Bf16,
}

/// How a model is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct TrainingSpec {
    /// Steps.
    pub steps: u64,
    /// Sequences of a step.
    pub batch: usize,
    /// What turns gradients into steps.
    pub optimizer: OptimizerKind,
    /// The largest learning rate.
    pub learning_rate: f64,
    /// Steps until it is reached.
    pub warmup: u64,
    /// What is left of it in the end, falling by a cosine.
    pub final_rate: f64,
    /// Decoupled weight decay of all matrices.
    pub weight_decay: f64,
    /// The largest norm of all gradients together.
    pub clip: f64,
    /// The arithmetic.
    pub precision: Precision,
    /// Steps between evaluations; the end has one in any case.
    pub evaluate_every: u64,
    /// Batches of an evaluation.
    pub evaluate_batches: u64,
    /// Steps between lines of the log.
    pub log_every: u64,
}

impl RunSpec {
    /// A name that no other run has: what one sees first, and a digest of all the rest.
    pub fn name(&self) -> String {
        let mut digest = fnv::FnvHasher::default();
        digest.write(serde_json::to_string(self).unwrap_or_default().as_bytes());
        let (axis, at) = self.task.axis();
        format!(
            "{}-{}-d{}-{axis}{at}-s{}-{:08x}",
            self.task.name(),
            self.model.mixer,
            self.model.dim,
            self.seed,
            digest.finish() as u32
        )
    }

    /// What is wrong with it and where: `(section, option, what is wrong)`.
    pub fn check(&self) -> Result<(), (&'static str, &'static str, String)> {
        self.task.check().map_err(|(option, what)| (self.task.name(), option, what))?;
        self.model.check().map_err(|(option, what)| ("model", option, what))?;
        self.training.check().map_err(|(option, what)| ("training", option, what))
    }

    /// The model, for sequences of at most `length` tokens.
    pub fn model_config(&self, interface: Interface, length: usize) -> ModelConfig {
        let model = &self.model;
        let mixer = MixerConfig {
            rope: model.rope,
            qk_norm: model.qk_norm,
            short_conv: model.short_conv,
            decay: model.decay,
            ridge: model.ridge,
            max_len: length,
            ..MixerConfig::new(model.mixer, model.dim, model.heads)
        };
        let (vocab, input_dim, output_dim) = match interface {
            Interface::Tokens { vocabulary } => (Some(vocabulary), 0, vocabulary),
            Interface::Vectors { input, output } => (None, input, output),
        };
        ModelConfig {
            vocab,
            input_dim,
            output_dim,
            dim: model.dim,
            layers: model.layers,
            positions: if model.positions { Positions::Learned { max_len: length } } else { Positions::None },
            mlp: (model.mlp > 0.0).then_some(model.mlp),
            mixer,
            ..ModelConfig::default()
        }
    }
}

/// What is wrong, unless `fine`.
fn unless(fine: bool, option: &'static str, what: String) -> Result<(), (&'static str, String)> {
    if fine { Ok(()) } else { Err((option, what)) }
}

/// What a positive finite number must be.
fn positive(option: &'static str, x: f64) -> Result<(), (&'static str, String)> {
    unless(x > 0.0 && x.is_finite(), option, format!("must be finite and above 0, not {x}"))
}

impl ModelSpec {
    fn check(&self) -> Result<(), (&'static str, String)> {
        let Self { dim, layers, heads, mlp, .. } = *self;
        unless((1..=16384).contains(&dim), "dim", format!("must be from 1 to 16384, not {dim}"))?;
        unless((1..=256).contains(&layers), "layers", format!("must be from 1 to 256, not {layers}"))?;
        let divides = heads > 0 && dim % heads == 0;
        unless(divides, "heads", format!("must divide dim ({dim}), not {heads}"))?;
        let head = dim / heads;
        unless(head <= 256, "heads", format!("must leave heads of at most 256, not {heads} (of {head})"))?;
        let even = !self.rope || head.is_multiple_of(2);
        unless(even, "rope", format!("needs heads of an even dimension, not {head}"))?;
        unless((0.0..=64.0).contains(&mlp), "mlp", format!("must be from 0 (none) to 64, not {mlp}"))?;
        positive("ridge", self.ridge)
    }
}

impl TrainingSpec {
    fn check(&self) -> Result<(), (&'static str, String)> {
        let counts = [
            ("steps", self.steps),
            ("batch", self.batch as u64),
            ("evaluate-every", self.evaluate_every),
            ("evaluate-batches", self.evaluate_batches),
            ("log-every", self.log_every),
        ];
        for (option, count) in counts {
            unless(count > 0, option, "must be at least 1, not 0".into())?;
        }
        positive("learning-rate", self.learning_rate)?;
        positive("clip", self.clip)?;
        let (decay, last) = (self.weight_decay, self.final_rate);
        unless((0.0..=10.0).contains(&decay), "weight-decay", format!("must be from 0 to 10, not {decay}"))?;
        unless((0.0..=1.0).contains(&last), "final-rate", format!("must be from 0 to 1, not {last}"))
    }
}
