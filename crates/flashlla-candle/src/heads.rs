//! [`Heads`]: what nearly all mixers have around them, projections into heads and out of them.

use crate::mixers::MixerConfig;
use crate::nn::{self, Projection, RmsNorm, Rotary, ShortConv, merge_heads, split_heads};
use candle_core::{Result, Tensor};
use candle_nn::{Module, VarBuilder};

/// Queries, keys and values projected from the input, and the output projected from the heads.
#[derive(Debug, Clone)]
pub struct Heads {
    pub dim: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub width: usize,
    rotary: Option<Rotary>,
    q_proj: Projection,
    k_proj: Projection,
    v_proj: Projection,
    out_proj: Projection,
    /// Of queries, keys and values.
    convs: Option<[ShortConv; 3]>,
    norms: Option<[RmsNorm; 2]>,
}

/// What PyTorch's `RMSNorm` adds in `float32` unless told.
const EPS: f64 = f32::EPSILON as f64;

impl Heads {
    /// With the positions (`rope`) and normalisation (`qk_norm`) of attention if `attention`; without, those are left out.
    pub fn new(config: &MixerConfig, attention: bool, vb: &VarBuilder) -> Result<Self> {
        let (width, heads, kv_heads) = (config.width()?, config.heads, config.kv_heads());
        let (inner, kv_inner) = (heads * width, kv_heads * width);
        let project = |dim, name: &str| Projection::new(config.dim, dim, config.bias, vb.pp(name));
        let conv = |dim, name: &str| ShortConv::new(dim, vb.pp(name));
        let norm = |name: &str| RmsNorm::new(width, EPS, vb.pp(name));
        Ok(Self {
            dim: config.dim,
            heads,
            kv_heads,
            width,
            rotary: (attention && config.rope).then(|| Rotary::new(config.rope_base)),
            q_proj: project(inner, "q_proj")?,
            k_proj: project(kv_inner, "k_proj")?,
            v_proj: project(kv_inner, "v_proj")?,
            out_proj: Projection::new(inner, config.dim, config.bias, vb.pp("out_proj"))?,
            convs: if config.short_conv {
                Some([conv(inner, "q_conv")?, conv(kv_inner, "k_conv")?, conv(kv_inner, "v_conv")?])
            } else {
                None
            },
            norms: if attention && config.qk_norm { Some([norm("q_norm")?, norm("k_norm")?]) } else { None },
        })
    }

    /// Whether outputs depend on more of the past than a cache of keys and values holds.
    pub fn has_convs(&self) -> bool {
        self.convs.is_some()
    }

    /// The parameters whose type and device the layer has.
    pub fn like(&self) -> &Tensor {
        self.q_proj.weight()
    }

    /// `[B, N, dim]`, of tokens from position `first` on, to queries `[B, HQ, N, D]`, keys and values `[B, H, N, D]`.
    pub fn project(&self, x: &Tensor, first: usize) -> Result<[Tensor; 3]> {
        nn::expect_input(x, self.dim)?;
        let part = |proj: &Projection, conv: usize, heads| {
            let mut part = proj.forward(x)?;
            if let Some(convs) = &self.convs {
                part = convs[conv].forward(&part)?;
            }
            split_heads(&part, heads)
        };
        let mut q = part(&self.q_proj, 0, self.heads)?;
        let mut k = part(&self.k_proj, 1, self.kv_heads)?;
        let v = part(&self.v_proj, 2, self.kv_heads)?;
        if let Some([q_norm, k_norm]) = &self.norms {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        if let Some(rotary) = &self.rotary {
            (q, k) = (rotary.turn(&q, first)?, rotary.turn(&k, first)?);
        }
        Ok([q, k, v])
    }

    /// The same of whole sequences, in the type that sums are kept in and contiguous.
    pub fn project_wide(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let [q, k, v] = self.project(x, 0)?;
        let wide = |x: Tensor| nn::widened(&x)?.contiguous();
        Ok([wide(q)?, wide(k)?, wide(v)?])
    }

    /// `[B, HQ, N, D]` to `[B, N, dim]`, of `x`'s type.
    pub fn merge(&self, out: &Tensor, x: &Tensor) -> Result<Tensor> {
        self.out_proj.forward(&merge_heads(out)?.to_dtype(x.dtype())?)
    }
}
