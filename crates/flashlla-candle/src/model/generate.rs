//! Token by token.

use super::Model;
use crate::error::value;
use crate::layer::KvCache;
use candle_core::{D, Result, Tensor};
use candle_nn::Module;

/// The caches of a model's layers.
#[derive(Debug, Clone)]
pub struct Cache {
    layers: Vec<KvCache>,
    len: usize,
    max_len: usize,
}

impl Cache {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The most tokens it can have.
    pub fn max_len(&self) -> usize {
        self.max_len
    }
}

impl Model {
    /// An empty cache for up to `max_len` tokens, if the model's mixers have one.
    pub fn cache(&self, max_len: usize) -> Option<Cache> {
        let layers = self.blocks.iter().map(|block| block.mixer.cache(max_len)).collect::<Option<_>>()?;
        Some(Cache { layers, len: 0, max_len })
    }

    /// The logits `[B, N, vocab]` of the next tokens `u32 [B, N]` of sequences whose past is in the cache, which they are
    /// added to. Without gradients. After an error the cache is of no use.
    pub fn forward_cached(&self, tokens: &Tensor, cache: &mut Cache) -> Result<Tensor> {
        let mut x = self.embedded_from(tokens, cache.len)?.detach();
        for (block, cache) in self.blocks.iter().zip(&mut cache.layers) {
            x = (&x + block.mixer.forward_cached(&block.mixer_norm.forward(&x)?, cache)?)?;
            x = block.after(x)?.detach();
        }
        cache.len += tokens.dim(1)?;
        Ok(self.head(&x)?.detach())
    }

    /// `tokens u32 [B, N]` and the `new` most likely tokens after them, one after the other: `[B, N + new]`.
    pub fn generate(&self, tokens: &Tensor, new: usize) -> Result<Tensor> {
        self.generate_with(tokens, new, |logits| logits.argmax(D::Minus1))
    }

    /// The same with the caller's choice: `pick` is given logits `[B, vocab]` and returns tokens `u32 [B]`.
    pub fn generate_with(
        &self,
        tokens: &Tensor,
        new: usize,
        mut pick: impl FnMut(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (_, n) = tokens.dims2()?;
        if n == 0 {
            return Err(value("tokens", "an empty prompt", "at least one token"));
        }
        let mut all = tokens.clone();
        let mut cache = self.cache(n + new);
        let mut unseen = tokens.clone();
        for _ in 0..new {
            let logits = match &mut cache {
                Some(cache) => self.forward_cached(&unseen, cache)?,
                None => self.forward_tokens(&all)?.detach(),
            };
            let last = logits.narrow(1, logits.dim(1)? - 1, 1)?.squeeze(1)?;
            unseen = pick(&last)?.unsqueeze(1)?;
            all = Tensor::cat(&[&all, &unseen], 1)?;
        }
        Ok(all)
    }
}
