//! Softmax attention with a learned scale per key head, as Local Linear Attention has it.

use super::{Mixer, MixerConfig};
use crate::heads::Heads;
use crate::layer::KvCache;
use crate::nn::{causal_bias, repeated, widened};
use crate::operator::wide;
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder, ops};

/// `out_i = Σ_{j ≤ i} softmax_j(scale q_i·k_j) v_j` (Vaswani et al., 2017), `scale = head_dim^-0.5 · exp(log_scale)` per key head.
#[derive(Debug)]
pub struct Softmax {
    heads: Heads,
    log_scale: Option<Tensor>,
}

impl Softmax {
    pub fn new(config: &MixerConfig, vb: VarBuilder) -> Result<Self> {
        let heads = Heads::new(config, true, &vb)?;
        let few = vb.to_dtype(wide(vb.dtype())?);
        let log_scale = if config.learn_scale {
            Some(few.get_with_hints(heads.kv_heads, "log_scale", Init::Const(0.0))?)
        } else {
            None
        };
        Ok(Self { heads, log_scale })
    }

    /// Of queries that are the last of the tokens that there are keys of.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (heads, kv_heads) = (self.heads.heads, self.heads.kv_heads);
        let (k, v) = (repeated(k, heads)?, repeated(v, heads)?);
        let logits = widened(&(q.contiguous()?.matmul(&k.t()?)? * (self.heads.width as f64).powf(-0.5))?)?;
        let logits = match &self.log_scale {
            Some(log) => {
                let scale = log.exp()?.reshape((kv_heads, 1))?.broadcast_as((kv_heads, heads / kv_heads))?;
                logits.broadcast_mul(&scale.reshape((heads, 1, 1))?.to_dtype(logits.dtype())?)?
            }
            None => logits,
        };
        let hidden = causal_bias(q.dim(2)?, k.dim(2)?, logits.dtype(), q.device())?;
        ops::softmax(&logits.broadcast_add(&hidden)?, 3)?.to_dtype(v.dtype())?.matmul(&v)
    }
}

impl Mixer for Softmax {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [q, k, v] = self.heads.project(x, 0)?;
        self.heads.merge(&self.attend(&q, &k, &v)?, x)
    }

    fn cache(&self, max_len: usize) -> Option<KvCache> {
        (!self.heads.has_convs()).then(|| KvCache::new(max_len))
    }

    fn forward_cached(&self, x: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let x = x.detach();
        let [q, k, v] = self.heads.project(&x, cache.len())?;
        let (k, v) = cache.append(&k, &v)?;
        Ok(self.heads.merge(&self.attend(&q.detach(), &k, &v)?, &x)?.detach())
    }
}
