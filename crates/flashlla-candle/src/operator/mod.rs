//! [`local_linear_attention`]: the operator on Candle's tensors.
//!
//! # Five inputs through an interface of three
//!
//! Candle's custom operators have at most three inputs and one output, and a gradient has its input's shape and type. The
//! operator has up to five inputs (q, k, v, ridge, probe), its backward computes all their gradients at once, and it
//! starts from what the forward saved. So:
//!
//! - The forward runs before the node of the graph is made. The node then owns what was saved (log-sum-exps, mean keys,
//!   probes) as plain data, never changed: any number of backwards, from any thread, read it.
//! - Inputs that do not fit are joined in pairs ([`joint::join`]) into one tensor of the graph, which stands for both:
//!   its gradient is both gradients one behind the other, and the joint's backward is two views of it. It has no values
//!   to be read, the node reads the inputs themselves. The engine writes both gradients right into it, so joining copies
//!   nothing.
//! - The scale is a number of the call, or a tensor. `scale q·k` with a ridge λ is the same problem as `q' = √scale q`,
//!   `k' = √scale k` with scale 1 and ridge `scale λ`, of which Candle's own operations know the gradients: a scale per
//!   head needs no support from the engines, and a scale on the GPU is not waited for.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod joint;
mod node;

use crate::error::{shape, value};
use candle_core::{DType, Result, Tensor};
use flashlla::{Mask, Precision, Solver};

pub(crate) use cpu::decode;

/// The factor on `q·k` in the logits, the inverse bandwidth.
#[derive(Debug, Clone)]
pub enum Scale {
    /// Any finite number.
    Number(f64),
    /// Learned: `[]` or `[H]`, one per key head, all greater than 0. Costs a copy of queries and keys, in `f32` for half
    /// precision.
    Tensor(Tensor),
}

impl From<f64> for Scale {
    fn from(scale: f64) -> Self {
        Self::Number(scale)
    }
}

impl From<&Tensor> for Scale {
    fn from(scale: &Tensor) -> Self {
        Self::Tensor(scale.clone())
    }
}

impl From<Tensor> for Scale {
    fn from(scale: Tensor) -> Self {
        Self::Tensor(scale)
    }
}

/// What a call of [`local_linear_attention`] may say beside its tensors.
#[derive(Debug, Clone, Default)]
pub struct AttentionOptions {
    /// Which keys a query sees (default: all).
    pub mask: Mask,
    /// How the systems are solved.
    pub solver: Solver,
    /// In which arithmetic.
    pub precision: Precision,
    /// The probe `x [B, HQ, N, D]` in place of the solved one, of q's type (Parallax attention); the ridge then has no effect
    /// and no gradient.
    pub probe: Option<Tensor>,
}

impl AttentionOptions {
    /// A query sees the keys up to its own position.
    pub fn causal() -> Self {
        Self { mask: Mask::causal(), ..Self::default() }
    }
}

/// Local Linear Attention of `q [B, HQ, N, D]` over `k [B, H, M, D]` and `v [B, H, M, DV]`: `[B, HQ, N, DV]`, of their
/// type.
///
/// Differentiable in q, k, v, ridge, scale and probe. Query head `h` reads key head `h / (HQ / H)`. Any strides are read
/// in place (on a GPU, those whose last axis is contiguous).
///
/// - `ridge`: λ > 0, `f32` (or `f64` with `f64` inputs): `[]`, `[HQ]`, or `[B, HQ, N]` with 1 where it is constant.
/// - `scale`: a number, or a tensor `[]` or `[H]`.
///
/// Inputs are `f32`, `bf16`, `f16`, and on the CPU `f64`; sums are kept in `f32` (`f64`).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use flashlla_candle::{AttentionOptions, local_linear_attention};
/// let x = Tensor::randn(0f64, 1.0, (1, 1, 8, 4), &Device::Cpu)?;
/// let ridge = Tensor::new(1e9f64, &Device::Cpu)?; // a large ridge is softmax attention
/// let out = local_linear_attention(&x, &x, &x, &ridge, 0.5, &AttentionOptions::default())?;
/// let softmax = candle_nn::ops::softmax(&(x.matmul(&x.t()?)? * 0.5)?, 3)?.matmul(&x)?;
/// assert!((out - softmax)?.abs()?.max_all()?.to_scalar::<f64>()? < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Shapes and types that do not fit, on the CPU also a ridge or scale that is not finite and greater than 0; each names
/// the argument.
pub fn local_linear_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    ridge: &Tensor,
    scale: impl Into<Scale>,
    options: &AttentionOptions,
) -> Result<Tensor> {
    for (name, x) in [("q", q), ("k", k), ("v", v)] {
        if x.rank() != 4 {
            return Err(shape(name, x.dims(), "four sizes", "batch, heads, tokens, dim"));
        }
    }
    let scale = scale.into();
    let probe = options.probe.as_ref().map(|probe| ("probe", probe));
    for (name, x) in [("k", k), ("v", v)].into_iter().chain(probe) {
        if x.dtype() != q.dtype() {
            return Err(value(name, x.dtype().as_str(), format!("q's type, {}", q.dtype().as_str())));
        }
    }
    let learned = if let Scale::Tensor(scale) = &scale { Some(("scale", scale)) } else { None };
    for (name, x) in [("k", k), ("v", v), ("ridge", ridge)].into_iter().chain(probe).chain(learned) {
        if x.device().location() != q.device().location() {
            let place = |x: &Tensor| format!("{:?}", x.device().location());
            return Err(value(name, place(x), format!("on q's device, {}", place(q))));
        }
    }
    let wide = wide(q.dtype())?;
    if ![DType::F32, wide].contains(&ridge.dtype()) {
        return Err(value("ridge", ridge.dtype().as_str(), wide.as_str()));
    }
    if ![0, 1, 3].contains(&ridge.rank()) {
        let meaning = "query heads; or [], or batch, query heads, queries";
        return Err(shape("ridge", ridge.dims(), [q.dim(1)?], meaning));
    }
    let ridge = ridge.to_dtype(wide)?;
    match scale {
        Scale::Number(scale) => node::attention(q, k, v, &ridge, scale, options),
        Scale::Tensor(scale) => {
            let (wide_q, k, ridge, probe) = rescaled(q, k, &ridge, &scale.to_dtype(wide)?, &options.probe)?;
            let options = AttentionOptions { probe, ..options.clone() };
            node::attention(&wide_q, &k, &v.to_dtype(wide)?, &ridge, 1.0, &options)?.to_dtype(q.dtype())
        }
    }
}

/// The type that ridges, scales and saved sums have beside inputs of that type.
pub(crate) fn wide(dtype: DType) -> Result<DType> {
    match dtype {
        DType::F64 => Ok(DType::F64),
        DType::F32 | DType::BF16 | DType::F16 => Ok(DType::F32),
        other => Err(value("q", other.as_str(), "f64, f32, bf16 or f16")),
    }
}

/// The call with a scale that is a tensor, as one with scale 1: q, k, ridge and probe, in the type that sums are kept in
/// (half precision would round queries and keys once more).
pub(crate) fn rescaled(
    q: &Tensor,
    k: &Tensor,
    ridge: &Tensor,
    scale: &Tensor,
    probe: &Option<Tensor>,
) -> Result<(Tensor, Tensor, Tensor, Option<Tensor>)> {
    let (heads, kv_heads) = (q.dim(1)?, k.dim(1)?);
    if scale.rank() > 1 || ![1, kv_heads].contains(&scale.elem_count()) {
        let meaning = "KV heads; or [], one for all";
        return Err(shape("scale", scale.dims(), [kv_heads], meaning));
    }
    if scale.device().is_cpu() {
        let values = scale.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        if let Some(wrong) = values.into_iter().find(|s| !(s.is_finite() && *s > 0.0)) {
            return Err(value("scale", wrong, "finite and greater than 0"));
        }
    }
    let own = scale.reshape((1, scale.elem_count(), 1, 1))?;
    // Of query heads: each KV head's, for every query head that reads it.
    let grouped = if own.elem_count() == 1 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        own.clone() // the last of these is refused later
    } else {
        own.broadcast_as((1, kv_heads, heads / kv_heads, 1))?.reshape((1, heads, 1, 1))?
    };
    let times = |x: &Tensor, factor: &Tensor| x.to_dtype(factor.dtype())?.broadcast_mul(&factor.sqrt()?);
    let ridge = match *ridge.dims() {
        [heads] => ridge.reshape((1, heads, 1))?,
        [] => ridge.reshape((1, 1, 1))?,
        _ => ridge.clone(),
    };
    let probe = match probe {
        Some(x) => Some(times(x, &grouped.recip()?)?),
        None => None,
    };
    Ok((times(q, &grouped)?, times(k, &own)?, ridge.broadcast_mul(&grouped.squeeze(3)?)?, probe))
}
