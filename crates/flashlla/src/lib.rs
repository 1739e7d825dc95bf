//! Local Linear Attention (LLA): attention that fits, at every query, a local *linear* model of the values where softmax
//! attention fits a local *constant* (Zuo et al., "Local Linear Attention", ICLR 2026).
//!
//! # The operator
//!
//! For a query `q` with visible keys `k_j` and values `v_j`, logits `s_j = scale q·k_j + b_j` and a ridge `λ > 0`:
//!
//! ```text
//! (b, W) = argmin  Σ_j p_j |v_j − b − W (k_j − q)|² + λ |W|²_F ,    p = softmax(s) ,    out = b
//! ```
//!
//! The paper solves this uncentred (with `z_j = k_j − q`) and divides by a denominator that comes close to 0. Eliminating the
//! unpenalised intercept `b` first gives the same output without a denominator; that is the form computed here:
//!
//! ```text
//! k̄ = Σ p_j k_j                            the mean key
//! C = Σ p_j (k_j − k̄)(k_j − k̄)ᵀ            the local covariance of the keys
//! x = (C + λI)⁻¹ (k̄ − q)                   the probe
//! out = Σ p_j (1 − (k_j − k̄)·x) v_j        = v̄ − Cov_p(v, k) x
//! ```
//!
//! `C` is never formed unless a direct solve is cheaper: conjugate gradients need only `C d`, which is two products with the
//! keys. As `λ → ∞` the operator becomes softmax attention; where the values are an affine function of the keys, `λ → 0`
//! recovers it exactly. The gradients are those of the formulas above, with a second solve in the same matrix; see
//! [`reference`](mod@reference), which is written to be read beside them.
//!
//! # Use
//!
//! Describe the call ([`Attention`]), join it with its data ([`Attention::problem`]), and hand it to an [`Engine`]:
//!
//! ```
//! use flashlla::{Attention, Cpu, Engine, Mask, View};
//!
//! // One sequence of 6 tokens, 2 query heads that share one KV head, 4 dims, laid out [B, N, H, D].
//! let q: Vec<f32> = (0..6 * 2 * 4).map(|i| (i as f32 * 0.7).sin()).collect();
//! let k: Vec<f32> = (0..6 * 4).map(|i| (i as f32 * 0.3).cos()).collect();
//! let v: Vec<f32> = (0..6 * 4).map(|i| (i as f32 * 0.2).sin()).collect();
//! let (q, k, v) = (View::bnhd(&q, [1, 6, 2, 4])?, View::bnhd(&k, [1, 6, 1, 4])?, View::bnhd(&v, [1, 6, 1, 4])?);
//!
//! let attention = Attention::builder_for(&q, &k, &v).mask(Mask::causal()).ridge(1.0).build()?;
//! let problem = attention.problem(q, k, v)?;
//! let forward = Cpu::new().forward(&problem)?;
//! assert_eq!(forward.out.shape(), [1, 2, 6, 4]);
//!
//! // The gradients of sum(out): grad_out is all ones.
//! let ones = vec![1.0f32; 6 * 2 * 4];
//! let gradients = Cpu::new().backward(&problem, &forward.state, View::bhnd(&ones, [1, 2, 6, 4])?)?;
//! assert_eq!(gradients.dk.shape(), [1, 1, 6, 4]);
//! # Ok::<(), flashlla::Error>(())
//! ```
//!
//! To generate token by token, keep keys and values in a [`KvCache`], or describe your own with a [`CacheView`], and hand an
//! [`Attention::decoding`] to [`Engine::decode`]: one example is at [`KvCache`].
//!
//! [`Cpu`] runs anywhere. With the feature `cuda` there is an engine for NVIDIA GPUs, `Cuda`, with the same interface; it
//! computes in fp16 and `f32` and refuses `f64`.
//!
//! # What holds everywhere
//!
//! - Tensors have the axes `[batch, head, token, dim]` and any strides ([`View`]); storage is `f64`, `f32`, [`bf16`] or
//!   [`struct@f16`], sums are kept in `f64` for `f64` and in `f32` for the others (see [`Precision`] for
//!   where the CPU engine takes `f64`).
//! - Everything wrong with a call is an [`Error`] before any output is touched.
//! - A query that sees no key gives zeros, `lse = −∞` and zero gradients.
//! - A query, key or value that is not finite makes the outputs of the queries that see it NaN, and no others, in bounded
//!   time.
//! - Memory beyond inputs and outputs is `O(N·D)`; results do not depend on the number of threads.

pub mod attention;
pub mod cache;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod decoding;
mod element;
mod engine;
mod error;
mod mask;
pub mod reference;
mod ridge;
mod solver;
mod tensor;
mod view;

pub use attention::{Attention, AttentionBuilder, MAX_HEAD_DIM, Problem};
pub use cache::{CacheShape, CacheView, KvCache};
pub use cpu::Cpu;
#[cfg(feature = "cuda")]
pub use cuda::Cuda;
pub use decoding::{Decoding, MAX_DECODE_QUERIES};
pub use element::{Element, Real};
pub use engine::{Diagnostics, Engine, Forward, Gradients, OtherGradients, State};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use mask::{Mask, Visible};
pub use reference::Reference;
pub use ridge::Ridge;
pub use solver::{Precision, Solver};
pub use tensor::Tensor;
pub use view::{Shape, Strides, View, ViewMut};
