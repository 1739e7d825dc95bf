//! Local Linear Attention for [Candle](https://docs.rs/candle-core): a differentiable operator, a layer with a KV cache,
//! and small decoder-only models with it or with the mixers it is compared with.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use flashlla_candle::{AttentionOptions, local_linear_attention};
//!
//! let device = Device::Cpu;
//! let q = Var::randn(0f32, 1.0, (2, 4, 10, 16), &device)?; // [batch, query heads, tokens, dim]
//! let k = Var::randn(0f32, 1.0, (2, 2, 10, 16), &device)?; // two query heads share a key and value head
//! let v = Var::randn(0f32, 1.0, (2, 2, 10, 16), &device)?;
//! let ridge = Var::ones(4, candle_core::DType::F32, &device)?; // one λ per query head, learned
//!
//! let out = local_linear_attention(&q, &k, &v, &ridge, 0.25, &AttentionOptions::causal())?;
//! assert_eq!(out.dims(), [2, 4, 10, 16]);
//! let gradients = out.sqr()?.mean_all()?.backward()?;
//! assert_eq!(gradients.get(&ridge).unwrap().dims(), [4]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! The operator itself, its equations and its engines are the crate [`flashlla`]. With the feature `cuda`, tensors may
//! lie on an NVIDIA GPU.

mod error;
mod heads;
mod init;
mod layer;
pub mod mixers;
mod model;
mod nn;
mod operator;

pub use init::seeded;
pub use layer::{KvCache, LocalLinearAttention};
pub use mixers::{Mixer, MixerConfig, MixerKind, mixer};
pub use model::{Cache, Model, ModelConfig, Positions, read_config};
pub use operator::{AttentionOptions, Scale, local_linear_attention};
