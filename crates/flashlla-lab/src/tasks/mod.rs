//! The tasks that models are trained on: generators of batches, and what is asked of a model's output.
//!
//! A batch depends on the seed, the split and its number alone, not on the batches drawn before it, so that a run that goes on
//! after a stop sees the data that it would have seen.

mod permutations;
mod piecewise;
mod recall;
mod regression;
mod text;

pub use permutations::Permutations;
pub use piecewise::stream;
pub use recall::Recall;
pub use regression::Regression;
pub use text::{DEFAULT_TEXT, Text};

use crate::Result;
use crate::experiments::random;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// What goes into a model, `batch` sequences of `length` tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum Inputs {
    /// Token numbers, `[batch, length]`.
    Tokens(Vec<u32>),
    /// Vectors, `[batch, length, dim]`.
    Vectors(Vec<f32>),
}

/// What a model should say at the positions that count.
#[derive(Debug, Clone, PartialEq)]
pub enum Targets {
    /// One token each.
    Tokens(Vec<u32>),
    /// One vector each.
    Vectors(Vec<f32>),
}

/// Sequences and the positions at which an answer is wanted.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Sequences.
    pub batch: usize,
    /// Tokens in each.
    pub length: usize,
    /// The sequences.
    pub inputs: Inputs,
    /// Positions, counted through the whole batch (`sequence * length + position`), ascending.
    pub at: Vec<u32>,
    /// The answers, in the order of `at`.
    pub targets: Targets,
}

/// What a model for a task must take and give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interface {
    /// Tokens of a vocabulary, and logits over the same.
    Tokens {
        /// The size of the vocabulary.
        vocabulary: usize,
    },
    /// Vectors in and out.
    Vectors {
        /// Dimension of those that go in.
        input: usize,
        /// Dimension of those that come out.
        output: usize,
    },
}

/// From which part of the data a batch comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// To learn from.
    Training,
    /// To be judged by: the same for every seed.
    Evaluation,
}

/// A task, ready to make batches.
pub trait Task: Send + Sync {
    /// What a model must take and give.
    fn interface(&self) -> Interface;
    /// `size` sequences.
    fn batch(&self, rng: &mut ChaCha8Rng, size: usize, split: Split) -> Batch;

    /// The batch of this number.
    fn batch_at(&self, seed: u64, split: Split, number: u64, size: usize) -> Batch {
        // Evaluation data must neither depend on the seed nor be any seed's training data.
        let mut rng = match split {
            Split::Training => random::stream(seed, number << 1),
            Split::Evaluation => random::stream(0x0eba_1f00, number << 1 | 1),
        };
        self.batch(&mut rng, size, split)
    }
}

/// A number by which trained models are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Score {
    /// As the results name it.
    pub name: &'static str,
    /// As figures and tables name it.
    pub label: &'static str,
    /// Whether more is better.
    pub higher_is_better: bool,
}

/// A task with its options, as a configuration states it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskSpec {
    /// Regression inside a sequence, on a stream whose law changes.
    InContextRegression(Regression),
    /// Multi-query associative recall.
    Mqar(Recall),
    /// Following objects through swaps.
    StateTracking(Permutations),
    /// Bytes of a text.
    LanguageModel(Text),
}

impl TaskSpec {
    /// Its name, as the command line and configurations write it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::InContextRegression(_) => "in-context-regression",
            Self::Mqar(_) => "mqar",
            Self::StateTracking(_) => "state-tracking",
            Self::LanguageModel(_) => "language-model",
        }
    }

    /// Reads what it needs.
    pub fn open(&self) -> Result<Box<dyn Task>> {
        Ok(match self {
            Self::InContextRegression(task) => Box::new(task.clone()),
            Self::Mqar(task) => Box::new(task.clone()),
            Self::StateTracking(task) => Box::new(task.clone()),
            Self::LanguageModel(text) => Box::new(text.open()?),
        })
    }

    /// What is wrong with the options, and which one: `(option, what is wrong)`.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        match self {
            Self::InContextRegression(task) => task.check(),
            Self::Mqar(task) => task.check(),
            Self::StateTracking(task) => task.check(),
            Self::LanguageModel(task) => task.check(),
        }
    }

    /// The number that models are compared by.
    pub fn score(&self) -> Score {
        match self {
            Self::InContextRegression(_) => {
                Score { name: "mse", label: "mean squared error", higher_is_better: false }
            }
            Self::LanguageModel(_) => Score { name: "bits", label: "bits per byte", higher_is_better: false },
            _ => Score { name: "accuracy", label: "accuracy", higher_is_better: true },
        }
    }

    /// The option along which results are drawn, and its value here.
    pub fn axis(&self) -> (&'static str, f64) {
        match self {
            Self::InContextRegression(task) => ("segment", task.segment as f64),
            Self::Mqar(task) => ("pairs", task.pairs as f64),
            Self::StateTracking(task) => ("swaps", task.swaps as f64),
            Self::LanguageModel(task) => ("context", task.context as f64),
        }
    }
}

/// `value` must lie within the range.
fn within(
    option: &'static str,
    value: usize,
    range: std::ops::RangeInclusive<usize>,
) -> Result<(), (&'static str, String)> {
    if range.contains(&value) {
        return Ok(());
    }
    Err((option, format!("must be from {} to {}, not {value}", range.start(), range.end())))
}
