//! [`LocalLinearAttention`]: the operator between projections.

use crate::error::value;
use crate::heads::Heads;
use crate::mixers::{Mixer, MixerConfig, MixerKind};
use crate::nn::{Projection, split_heads};
use crate::operator::{self, AttentionOptions, Scale, local_linear_attention, rescaled, wide};
use candle_core::{Result, Tensor};
use candle_nn::{Init, Module, VarBuilder};
use flashlla::{MAX_DECODE_QUERIES, Mask, Precision, Solver};

/// Causal Local Linear Attention with projections, grouped-query heads, rotary positions, and a learned ridge and
/// bandwidth per head.
///
/// What the Python package's `flashlla.nn.LocalLinearAttention` is for PyTorch, with the same parameter names (`q_proj`,
/// `k_proj`, `v_proj`, `out_proj`, `q_norm`, `k_norm`, `log_ridge`, `log_scale`): λ is `exp(log_ridge)` per query head,
/// the factor on `q·k` `head_dim^-0.5 · exp(log_scale)` per key head. [`MixerConfig`] has the sizes and switches.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use flashlla_candle::{LocalLinearAttention, MixerConfig, MixerKind};
/// let config = MixerConfig {
///     kv_heads: Some(2), rope: true, qk_norm: true, ..MixerConfig::new(MixerKind::LocalLinear, 32, 4)
/// };
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let layer = LocalLinearAttention::new(&config, vb)?;
/// let x = Tensor::randn(0f32, 1.0, (2, 10, 32), &Device::Cpu)?;
/// let whole = layer.forward(&x)?;
///
/// // Token by token, from a cache.
/// let mut cache = layer.cache(10);
/// let tokens = (0..10).map(|i| layer.forward_cached(&x.narrow(1, i, 1)?, &mut cache));
/// let stepwise = Tensor::cat(&tokens.collect::<candle_core::Result<Vec<_>>>()?, 1)?;
/// assert!((whole - stepwise)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-4);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct LocalLinearAttention {
    heads: Heads,
    /// λ unless it is learned.
    ridge: f64,
    solver: Solver,
    precision: Precision,
    log_ridge: Option<Tensor>,
    log_scale: Option<Tensor>,
    /// Gives the probe of Parallax attention.
    probe_proj: Option<Projection>,
}

/// Keys and values of past tokens, ready for their mixer: rotated, normalised, scaled.
#[derive(Debug, Clone)]
pub struct KvCache {
    held: candle_nn::kv_cache::KvCache,
    max_len: usize,
}

impl KvCache {
    pub(crate) fn new(max_len: usize) -> Self {
        Self { held: candle_nn::kv_cache::KvCache::new(2, max_len), max_len }
    }

    /// Adds the keys `[B, H, t, D]` and values of new tokens; returns those of all.
    pub(crate) fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let all = self.len() + k.dim(2)?;
        if all > self.max_len {
            let allowed = format!("at most {} (the cache's max_len)", self.max_len);
            return Err(value("x", format!("{all} tokens in all"), allowed));
        }
        self.held.append(&k.detach().contiguous()?, &v.detach().contiguous()?)
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.held.k_cache().current_seq_len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The most tokens it can have.
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.held.reset();
    }
}

impl LocalLinearAttention {
    /// A layer of `config`'s sizes. The kind must be [`MixerKind::LocalLinear`], or [`MixerKind::Parallax`] for a probe
    /// `x = probe_proj(input)`, 0 before training, in place of the solved one.
    pub fn new(config: &MixerConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        if !matches!(config.kind, MixerKind::LocalLinear | MixerKind::Parallax) {
            return Err(value("mixer", config.kind, "lla or parallax for this layer"));
        }
        let parallax = config.kind == MixerKind::Parallax;
        let heads = Heads::new(config, true, &vb)?;
        // In f32 whatever the rest is in: they are few, and bf16 would round λ to 2 digits.
        let few = vb.to_dtype(wide(vb.dtype())?);
        let log_ridge = if config.learn_ridge && !parallax {
            Some(few.get_with_hints(heads.heads, "log_ridge", Init::Const(config.ridge.ln()))?)
        } else {
            None
        };
        let log_scale = if config.learn_scale {
            Some(few.get_with_hints(heads.kv_heads, "log_scale", Init::Const(0.0))?)
        } else {
            None
        };
        let probe_proj = if parallax {
            // It starts as softmax attention: a random probe of some length would drown the values in corrections.
            let (inner, zero) = (heads.heads * heads.width, Init::Const(0.0));
            Some(Projection::starting(zero, config.dim, inner, config.bias, vb.pp("probe_proj"))?)
        } else {
            None
        };
        Ok(Self {
            heads,
            ridge: config.ridge,
            solver: Solver::Auto { tolerance: config.tolerance, max_iters: config.max_iters },
            precision: if config.high_precision { Precision::High } else { Precision::Standard },
            log_ridge,
            log_scale,
            probe_proj,
        })
    }

    /// λ of every query head: `[HQ]`, or `[]` if it is not learned.
    pub fn ridge(&self) -> Result<Tensor> {
        match &self.log_ridge {
            Some(log) => log.exp(),
            None => self.constant(self.ridge),
        }
    }

    /// The factor on `q·k` of every key head: `[H]`, or `[]` if it is not learned.
    pub fn scale(&self) -> Result<Tensor> {
        let start = (self.heads.width as f64).powf(-0.5);
        match &self.log_scale {
            Some(log) => log.exp()? * start,
            None => self.constant(start),
        }
    }

    fn constant(&self, value: f64) -> Result<Tensor> {
        let like = self.heads.like();
        Tensor::new(value, like.device())?.to_dtype(wide(like.dtype())?)
    }

    /// The options of a call, and the probe of Parallax attention.
    fn options(&self, x: &Tensor) -> Result<AttentionOptions> {
        let probe = match &self.probe_proj {
            Some(proj) => Some(split_heads(&proj.forward(x)?, self.heads.heads)?),
            None => None,
        };
        Ok(AttentionOptions { mask: Mask::causal(), solver: self.solver, precision: self.precision, probe })
    }

    /// `[B, N, dim]` to `[B, N, dim]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [q, k, v] = self.heads.project(x, 0)?;
        let (ridge, options) = (self.ridge()?, self.options(x)?);
        let scale = match &self.log_scale {
            Some(_) => Scale::Tensor(self.scale()?),
            None => Scale::Number((self.heads.width as f64).powf(-0.5)),
        };
        self.heads.merge(&local_linear_attention(&q, &k, &v, &ridge, scale, &options)?, x)
    }

    /// An empty cache for up to `max_len` tokens.
    pub fn cache(&self, max_len: usize) -> KvCache {
        KvCache::new(max_len)
    }

    /// The next tokens `[B, N, dim]` of sequences whose past is in the cache; they are added to it. Out of the graph: no
    /// gradients.
    ///
    /// # Errors
    /// Also when the cache has no room for them, and for a layer with short convolutions, whose past a cache does not
    /// hold.
    pub fn forward_cached(&self, x: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        if self.heads.has_convs() {
            return Err(value("short_conv", true, "false with a cache"));
        }
        let (past, x) = (cache.len(), x.detach());
        let ([q, k, v], options) = (self.heads.project(&x, past)?, self.options(&x)?);
        let tokens = q.dim(2)?;
        let wide = wide(q.dtype())?;
        let (ridge, scale) = (self.ridge()?.to_dtype(wide)?, self.scale()?.to_dtype(wide)?);
        let (q, k, ridge, probe) = rescaled(&q, &k, &ridge, &scale, &options.probe)?;
        let (k, v) = cache.append(&k, &v.to_dtype(wide)?)?;
        let options = AttentionOptions { probe: probe.map(|x| x.detach()), ..options };
        let (q, ridge) = (q.detach(), ridge.detach());
        let few = (1..=MAX_DECODE_QUERIES).contains(&tokens);
        let out = if few && q.device().is_cpu() && options.probe.is_none() {
            operator::decode(&q, &k, &v, &ridge, 1.0, &options)?
        } else {
            let mask = Mask::causal().q_offset(past as i64);
            local_linear_attention(&q, &k, &v, &ridge, 1.0, &AttentionOptions { mask, ..options })?
        };
        Ok(self.heads.merge(&out, &x)?.detach())
    }
}

impl Mixer for LocalLinearAttention {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward(x)
    }

    fn cache(&self, max_len: usize) -> Option<KvCache> {
        (!self.heads.has_convs()).then(|| self.cache(max_len))
    }

    fn forward_cached(&self, x: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        self.forward_cached(x, cache)
    }
}
