//! Small pieces that layers share. All are differentiable, which some of `candle_nn`'s fused ones are not.

use crate::error::value;
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Init, Module, VarBuilder};
use std::sync::{Arc, Mutex};

/// A projection, its weights `[out_dim, in_dim]` cast to the type of what it is applied to: parameters may be `f32` where
/// activations are `bf16`, and their gradients are then `f32` too.
#[derive(Debug, Clone)]
pub struct Projection {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Projection {
    /// Weights of deviation `in_dim^-0.5`, bias 0.
    pub fn new(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: (in_dim.max(1) as f64).powf(-0.5) };
        Self::starting(init, in_dim, out_dim, bias, vb)
    }

    /// With weights that start otherwise.
    pub fn starting(init: Init, in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((out_dim, in_dim), "weight", init)?;
        let bias = if bias { Some(vb.get_with_hints(out_dim, "bias", Init::Const(0.0))?) } else { None };
        Ok(Self { weight, bias })
    }

    /// The weights `[out_dim, in_dim]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// With given weights and no bias.
    pub fn tied(weight: Tensor) -> Self {
        Self { weight, bias: None }
    }
}

impl Module for Projection {
    /// `[.., in_dim]` to `[.., out_dim]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (out_dim, in_dim) = self.weight.dims2()?;
        let rows = x.elem_count() / in_dim.max(1);
        let weight = self.weight.to_dtype(x.dtype())?;
        let out = x.reshape((rows, in_dim))?.matmul(&weight.t()?)?;
        let out = match &self.bias {
            Some(bias) => out.broadcast_add(&bias.to_dtype(x.dtype())?)?,
            None => out,
        };
        let mut shape = x.dims().to_vec();
        shape[x.rank() - 1] = out_dim;
        out.reshape(shape)
    }
}

/// RMS normalisation over the last axis, with a gain, computed in `f32` (`f64` for `f64`).
#[derive(Debug, Clone)]
pub struct RmsNorm {
    gain: Tensor,
    eps: f64,
}

impl RmsNorm {
    pub fn new(width: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self { gain: vb.get_with_hints(width, "weight", Init::Const(1.0))?, eps })
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let wide = widened(x)?;
        let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
        let normal = wide.broadcast_div(&(mean + self.eps)?.sqrt()?)?;
        normal.to_dtype(x.dtype())?.broadcast_mul(&self.gain.to_dtype(x.dtype())?)
    }
}

/// In the type that sums are kept in: `f32`, or `f64` for `f64`.
pub fn widened(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(crate::operator::wide(x.dtype())?)
}

/// Rows of length 1 (over the last axis).
pub fn unit(x: &Tensor) -> Result<Tensor> {
    let norm = (x.sqr()?.sum_keepdim(D::Minus1)? + 1e-6)?.sqrt()?;
    x.broadcast_div(&norm)
}

/// `log(1 + exp(x))` without overflow.
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

/// `1 / (1 + exp(-x))`.
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    // By tanh: no overflow, and known to autodiff in every type.
    ((x * 0.5)?.tanh()? * 0.5)? + 0.5
}

/// `[B, N, heads · width]` as `[B, heads, N, width]`, a view.
pub fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, dim) = x.dims3()?;
    x.reshape((b, n, heads, dim / heads))?.transpose(1, 2)
}

/// The opposite.
pub fn merge_heads(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)?.contiguous()?.flatten_from(2)
}

/// KV heads repeated for the query heads that share them: `[B, H, N, D]` as `[B, HQ, N, D]`.
pub fn repeated(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, kv_heads, n, d) = x.dims4()?;
    if heads == kv_heads {
        return x.contiguous();
    }
    let group = heads / kv_heads;
    x.unsqueeze(2)?.broadcast_as((b, kv_heads, group, n, d))?.contiguous()?.reshape((b, heads, n, d))
}

/// Cosines and sines of the rotary position embedding (Su et al., 2021), `[N, D/2]`.
type Turns = (Tensor, Tensor);

/// Rotary position embedding: halves of dims are paired.
#[derive(Debug, Clone)]
pub struct Rotary {
    base: f64,
    /// Those made last, and for what. They are made on the host and sent to the device; in
    /// training they are the same at every step.
    last: Arc<Mutex<Option<(TurnsOf, Turns)>>>,
}

/// What they depend on besides the base: position of the first token, tokens, dims, type.
type TurnsOf = (usize, usize, usize, DType);

impl Rotary {
    pub fn new(base: f64) -> Self {
        Self { base, last: Arc::default() }
    }

    /// `x`, `[B, H, N, D]`, with tokens at the positions from `first` on.
    pub fn turn(&self, x: &Tensor, first: usize) -> Result<Tensor> {
        let (cos, sin) = self.turns(x, first)?;
        let half = x.dim(3)? / 2;
        let (a, b) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
        Tensor::cat(&[first, second], 3)
    }

    fn turns(&self, x: &Tensor, first: usize) -> Result<Turns> {
        let (n, d) = (x.dim(2)?, x.dim(3)?);
        let of = (first, n, d, x.dtype());
        let mut last = self.last.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((made, turns)) = &*last
            && *made == of
            && turns.0.device().same_device(x.device())
        {
            return Ok(turns.clone());
        }
        let half = d / 2;
        let frequencies: Vec<f64> = (0..half).map(|i| self.base.powf(-(i as f64) / half as f64)).collect();
        let angles = |position: usize| frequencies.iter().map(move |f| position as f64 * f);
        let angles: Vec<f64> = (first..first + n).flat_map(angles).collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f64> = angles.iter().map(|&a| f(a)).collect();
            Tensor::from_vec(values, (n, half), &Device::Cpu)?.to_dtype(x.dtype())?.to_device(x.device())
        };
        let turns = (table(f64::cos)?, table(f64::sin)?);
        *last = Some((of, turns.clone()));
        Ok(turns)
    }
}

/// `[N, M]`: 1 where query `i` (of the last N) sees key `j` of M (`strict`: comes after it), else 0. Made on the device.
pub fn causal(n: usize, m: usize, strict: bool, dtype: DType, device: &Device) -> Result<Tensor> {
    let first = (m - n) as u32;
    let row = Tensor::arange(first, m as u32, device)?.unsqueeze(1)?;
    let column = Tensor::arange(0, m as u32, device)?.unsqueeze(0)?;
    let seen = if strict { row.broadcast_gt(&column)? } else { row.broadcast_ge(&column)? };
    seen.to_dtype(dtype)
}

/// `where causal 0 else -1e30`: what is added to logits, so that no difference of infinities arises.
pub fn causal_bias(n: usize, m: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let hidden = if matches!(dtype, DType::F16) { 6e4 } else { 1e30 };
    (causal(n, m, false, dtype, device)? - 1.0)? * hidden
}

/// A causal depthwise convolution over 4 tokens and SiLU.
#[derive(Debug, Clone)]
pub struct ShortConv {
    /// `[4, width]`; the last row weighs the token itself.
    weight: Tensor,
}

/// Tokens that a [`ShortConv`] looks at.
pub const SHORT_CONV: usize = 4;

impl ShortConv {
    pub fn new(width: usize, vb: VarBuilder) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: (SHORT_CONV as f64).powf(-0.5) };
        Ok(Self { weight: vb.get_with_hints((SHORT_CONV, width), "weight", init)? })
    }

    /// If wanted.
    pub fn maybe(wanted: bool, width: usize, vb: VarBuilder) -> Result<Option<Self>> {
        if wanted { Self::new(width, vb).map(Some) } else { Ok(None) }
    }
}

impl Module for ShortConv {
    /// `[B, N, width]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let n = x.dim(1)?;
        let weight = self.weight.to_dtype(x.dtype())?;
        let padded = x.pad_with_zeros(1, SHORT_CONV - 1, 0)?;
        let mut sum = padded.narrow(1, 0, n)?.broadcast_mul(&weight.narrow(0, 0, 1)?)?;
        for shift in 1..SHORT_CONV {
            sum = (sum + padded.narrow(1, shift, n)?.broadcast_mul(&weight.narrow(0, shift, 1)?)?)?;
        }
        sum.silu()
    }
}

/// Checks that a mixer's or layer's input is `[B, N, dim]`.
pub fn expect_input(x: &Tensor, dim: usize) -> Result<()> {
    match *x.dims() {
        [_, _, width] if width == dim => Ok(()),
        _ => Err(crate::error::shape(
            "x",
            x.dims(),
            ["batch", "tokens", &dim.to_string()],
            "batch, tokens, dim",
        )),
    }
}

/// A size that must be at least 1.
pub fn expect_size(name: &str, size: usize) -> Result<()> {
    if size == 0 { Err(value(name, 0, "at least 1")) } else { Ok(()) }
}
