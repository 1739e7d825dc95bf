//! Hyena.

use super::{Mixer, MixerConfig};
use crate::error::value;
use crate::nn::{Projection, ShortConv, expect_input, widened};
use candle_core::{Device, Result, Tensor};
use candle_nn::{Init, Module, VarBuilder};

/// Hyena of order 2 (Poli et al., "Hyena Hierarchy", 2023, definition 3.1): `y = x₂ ⊙ (h₂ * (x₁ ⊙ (h₁ * v)))` with
/// projections `v`, `x₁`, `x₂` of the input and causal convolutions as long as the sequence. The filters `h` are
/// implicit: a small network with sines of the position, times a window that decays at a rate of the channel's own, plus
/// a weight on the token itself. As published, projections pass a short convolution if `short_conv` is set.
#[derive(Debug)]
pub struct Hyena {
    dim: usize,
    max_len: usize,
    in_proj: Projection,
    conv: Option<ShortConv>,
    filter: [Projection; 3],
    /// `[2, dim]`.
    skip: Tensor,
    out_proj: Projection,
}

/// Sines and cosines of the position that a filter's network is given, beside the position itself.
const BANDS: usize = 4;
/// Its width.
const HIDDEN: usize = 64;
/// The factor in its sines.
const FREQUENCY: f64 = 10.0;

impl Hyena {
    pub fn new(config: &MixerConfig, vb: VarBuilder) -> Result<Self> {
        let dim = config.dim;
        let layer = |from, to, name: &str| Projection::new(from, to, true, vb.pp(name));
        Ok(Self {
            dim,
            max_len: config.max_len,
            in_proj: Projection::new(dim, 3 * dim, config.bias, vb.pp("in_proj"))?,
            conv: ShortConv::maybe(config.short_conv, 3 * dim, vb.pp("conv"))?,
            filter: [
                layer(1 + 2 * BANDS, HIDDEN, "filter.0")?,
                layer(HIDDEN, HIDDEN, "filter.1")?,
                layer(HIDDEN, 2 * dim, "filter.2")?,
            ],
            skip: vb.get_with_hints((2, dim), "skip", Init::Randn { mean: 0.0, stdev: 1.0 })?,
            out_proj: Projection::new(dim, dim, config.bias, vb.pp("out_proj"))?,
        })
    }

    /// The first `n` values of both filters, each `[dim, n]`.
    fn filters(&self, n: usize, like: &Tensor) -> Result<[Tensor; 2]> {
        let tensor = |values: Vec<f64>, shape: (usize, usize)| {
            Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(like.dtype())?.to_device(like.device())
        };
        let time = |i: usize| i as f64 / self.max_len as f64;
        let features = (0..n).flat_map(|i| {
            let angle = move |band: usize| 2.0 * std::f64::consts::PI * (band + 1) as f64 * time(i);
            std::iter::once(time(i)).chain((0..BANDS).flat_map(move |b| [angle(b).sin(), angle(b).cos()]))
        });
        let mut x = tensor(features.collect(), (n, 1 + 2 * BANDS))?;
        for layer in &self.filter[..2] {
            x = (layer.forward(&x)? * FREQUENCY)?.sin()?;
        }
        let values = self.filter[2].forward(&x)?.t()?; // [2 dim, n]
        // Windows that have fallen to a hundredth at 0.3 to 1.5 times the longest sequence.
        let rate = |channel: usize| {
            let at = (channel % self.dim) as f64 / (self.dim - 1).max(1) as f64;
            100f64.ln() * (1.0 / 0.3 + (1.0 / 1.5 - 1.0 / 0.3) * at)
        };
        let window = (0..2 * self.dim).flat_map(|c| (0..n).map(move |i| (-rate(c) * time(i)).exp()));
        // So that a sum over the longest sequence has the size of one term.
        let values =
            ((values * tensor(window.collect(), (2 * self.dim, n))?)? * (self.max_len as f64).powf(-0.5))?;
        Ok([values.narrow(0, 0, self.dim)?, values.narrow(0, self.dim, self.dim)?])
    }
}

impl Mixer for Hyena {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        expect_input(x, self.dim)?;
        let n = x.dim(1)?;
        if n > self.max_len {
            return Err(value("x", format!("{n} tokens"), format!("at most max_len ({})", self.max_len)));
        }
        let projected = self.in_proj.forward(x)?;
        let projected = match &self.conv {
            Some(conv) => conv.forward(&projected)?,
            None => projected,
        };
        let projected = widened(&projected)?.transpose(1, 2)?; // [B, 3 dim, N]
        let part = |i: usize| projected.narrow(1, i * self.dim, self.dim)?.contiguous();
        let mut z = part(0)?;
        for (i, filter) in self.filters(n, &z)?.iter().enumerate() {
            let skip = self.skip.narrow(0, i, 1)?.reshape((self.dim, 1))?.to_dtype(z.dtype())?;
            z = ((convolved(filter, &z)? + z.broadcast_mul(&skip)?)? * part(i + 1)?)?;
        }
        self.out_proj.forward(&z.transpose(1, 2)?.contiguous()?.to_dtype(x.dtype())?)
    }
}

/// Tokens of a block of the convolution.
const BLOCK: usize = 64;

/// `y_i = Σ_{j ≤ i} h_{i−j} u_j` in every channel: `h [C, N]`, `u [B, C, N]`.
///
/// As products with the blocks of the Toeplitz matrix, of which there are as many different ones as blocks in the sequence.
pub(super) fn convolved(h: &Tensor, u: &Tensor) -> Result<Tensor> {
    let (b, channels, n) = u.dims3()?;
    let block = n.next_power_of_two().min(BLOCK);
    let blocks = n.div_ceil(block);
    let full = blocks * block;
    // Element (lag, row, column) is h[lag · block + row − column]; before the beginning there are zeros.
    let padded = h.pad_with_zeros(1, block, full - n)?;
    let index = |at: usize| {
        let (lag, row, column) = (at / (block * block), at / block % block, at % block);
        (block + lag * block + row - column) as u32
    };
    let places = Tensor::from_vec((0..full * block).map(index).collect(), full * block, h.device())?;
    let toeplitz =
        padded.contiguous()?.index_select(&places, 1)?.reshape((channels, blocks, block, block))?;
    // [channel, token of a block, block, batch]
    let inputs = u.pad_with_zeros(2, 0, full - n)?.reshape((b, channels, blocks, block))?;
    let inputs = inputs.permute((1, 3, 2, 0))?.contiguous()?;
    let mut sum: Option<Tensor> = None;
    for lag in 0..blocks {
        let of_lag = toeplitz.narrow(1, lag, 1)?.squeeze(1)?.contiguous()?;
        let seen = inputs.narrow(2, 0, blocks - lag)?.contiguous()?.flatten_from(2)?;
        let part = of_lag.matmul(&seen)?.pad_with_zeros(2, lag * b, 0)?;
        sum = Some(match sum {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    let Some(sum) = sum else { return u.zeros_like() };
    sum.reshape((channels, block, blocks, b))?
        .permute((3, 0, 2, 1))?
        .contiguous()?
        .reshape((b, channels, full))?
        .narrow(2, 0, n)
}
