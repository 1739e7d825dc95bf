//! [`Decoding`]: a description joined with new queries and the cache that they look at.

use crate::attention::{check_bias, expect_shape};
use crate::{
    Attention, AttentionBuilder, CacheView, Diagnostics, Element, Engine, Error, Mask, Result, Ridge, State,
    Tensor, View, ViewMut, Visible,
};

/// The most new queries per sequence of a [`Decoding`].
pub const MAX_DECODE_QUERIES: usize = 16;

/// New queries, the cache that already holds their keys and values, and optionally a bias on the logits and a given probe.
///
/// The last of a sequence's `t` queries stands at the end of the cache: under [`Mask::causal`], query `i` sees the first
/// `length − t + i + 1` tokens, or the last `window` of them. Sequences of length 0 are allowed; their outputs are 0.
#[derive(Debug, Clone)]
pub struct Decoding<'a, T: Element> {
    attention: &'a Attention,
    q: View<'a, T>,
    cache: &'a CacheView<'a, T>,
    bias: Option<View<'a, T::Acc>>,
    probe: Option<View<'a, T::Acc>>,
}

impl Attention {
    /// Starts the description of a decoding: the sizes of `q [B, HQ, t, D]` and of a cache, and a causal mask.
    pub fn builder_for_cache<T: Element>(q: &View<T>, cache: &CacheView<T>) -> AttentionBuilder {
        let [batch, heads, queries, head_dim] = q.shape();
        Self::builder()
            .batch(batch)
            .heads(heads)
            .kv_heads(cache.kv_heads())
            .queries(queries)
            .keys(cache.max_len())
            .head_dim(head_dim)
            .value_dim(cache.value_dim())
            .mask(Mask::causal())
    }

    /// Joins the description with `q [B, HQ, t, D]`, 1 to 16 queries per sequence, and a cache of B sequences. The
    /// description's number of keys is the most that a sequence of the cache can have ([`CacheView::max_len`]), so that one
    /// description serves while the cache grows.
    pub fn decoding<'a, T: Element>(
        &'a self,
        q: View<'a, T>,
        cache: &'a CacheView<'a, T>,
    ) -> Result<Decoding<'a, T>> {
        expect_shape("q", q.shape(), self.query_shape(), "batch, query heads, queries, head_dim")?;
        let given = [cache.sequences(), cache.kv_heads(), cache.max_len(), cache.head_dim()];
        expect_shape("cache", given, self.key_shape(), "batch, KV heads, most tokens, head_dim")?;
        if cache.value_dim() != self.value_dim() {
            let allowed = format!("the description's {}", self.value_dim());
            return Err(Error::value("cache", format!("value_dim {}", cache.value_dim()), allowed));
        }
        self.check_decoding(cache.lengths())?;
        Ok(Decoding { attention: self, q, cache, bias: None, probe: None })
    }

    /// Whether this describes a decoding from sequences of these lengths.
    pub(crate) fn check_decoding(&self, lengths: &[usize]) -> Result<()> {
        let queries = self.queries();
        if !(1..=MAX_DECODE_QUERIES).contains(&queries) {
            let allowed = format!("from 1 to {MAX_DECODE_QUERIES} per sequence (more: a forward)");
            return Err(Error::value("queries", queries, allowed));
        }
        if self.mask().sequences().is_some() {
            return Err(Error::value(
                "cu_seqlens",
                "a mask with it",
                "left out: a cache has its own lengths",
            ));
        }
        if self.mask().offset() != 0 {
            let allowed = "0: the cache's lengths say where queries stand";
            return Err(Error::value("q_offset", self.mask().offset(), allowed));
        }
        let short = |&(_, &length): &(usize, &usize)| length > 0 && length < queries;
        if let Some((sequence, length)) = lengths.iter().enumerate().find(short) {
            return Err(Error::value(
                "lengths",
                format!("{length} (sequence {sequence})"),
                format!("0, or at least the {queries} queries, whose keys the cache must hold already"),
            ));
        }
        Ok(())
    }
}

impl<'a, T: Element> Decoding<'a, T> {
    /// Adds a bias per token of the cache to the logits, `[B or 1, HQ or H or 1, M, 1]` with `M` the description's number of
    /// keys; see [`crate::Problem::with_bias`].
    pub fn with_bias(mut self, bias: View<'a, T::Acc>) -> Result<Self> {
        check_bias(self.attention, bias.shape())?;
        self.bias = Some(bias);
        Ok(self)
    }

    /// Gives the probe `x [B, HQ, t, D]` instead of solving for it; see [`crate::Problem::with_probe`].
    pub fn with_probe(mut self, probe: View<'a, T::Acc>) -> Result<Self> {
        let meaning = "batch, query heads, queries, head_dim";
        expect_shape("probe", probe.shape(), self.attention.query_shape(), meaning)?;
        self.probe = Some(probe);
        Ok(self)
    }

    /// The description.
    pub fn attention(&self) -> &'a Attention {
        self.attention
    }
    /// The queries `[B, HQ, t, D]`.
    pub fn q(&self) -> View<'a, T> {
        self.q
    }
    /// The cache.
    pub fn cache(&self) -> &'a CacheView<'a, T> {
        self.cache
    }
    /// The bias, if there is one: `[B or 1, HQ or H or 1, M, 1]`.
    pub fn bias(&self) -> Option<View<'a, T::Acc>> {
        self.bias
    }
    /// The given probe, if there is one: `[B, HQ, t, D]`.
    pub fn probe(&self) -> Option<View<'a, T::Acc>> {
        self.probe
    }

    /// The tokens that query `i` of a sequence sees.
    pub fn visible(&self, sequence: usize, i: usize) -> Visible {
        let length = self.cache.lengths()[sequence];
        self.mask(length).visible(i, length)
    }

    /// The mask of a sequence's queries among its tokens.
    fn mask(&self, length: usize) -> Mask {
        self.attention.mask().clone().q_offset(length as i64 - self.attention.queries() as i64)
    }
}

/// Decoding as a forward of every sequence, on gathered copies of its keys and values: what engines do that have nothing
/// better, and what the better ones are held against.
pub(crate) fn by_forward<T: Element, O: Element>(
    engine: &impl Engine,
    decoding: &Decoding<T>,
    out: ViewMut<O>,
) -> Result<State<T::Acc>> {
    let (a, cache) = (decoding.attention, decoding.cache);
    check_out(decoding, &out)?;
    let [_, heads, queries, dim] = a.query_shape();
    let mut state = State {
        lse: Tensor::zeros(&[a.batch(), heads, queries]),
        key_mean: Tensor::zeros(&a.query_shape()),
        probe: Tensor::zeros(&a.query_shape()),
        diagnostics: Diagnostics::default(),
    };
    for (b, &length) in cache.lengths().iter().enumerate() {
        let one = a.of_sequence(b, length, decoding.mask(length))?;
        let gather = |pool: View<T>| {
            let [_, kv_heads, _, dim] = pool.shape();
            let mut rows = Vec::with_capacity(kv_heads * length * dim);
            for head in 0..kv_heads {
                for j in 0..length {
                    let (page, slot) = cache.paging().place(b, j);
                    pool.row(page, head, slot).for_each(|_, x| rows.push(x));
                }
            }
            Tensor::new(rows, &[1, kv_heads, length, dim])
        };
        let (k, v, q) = (gather(cache.k()), gather(cache.v()), of_batch(&decoding.q, b, queries));
        let bias =
            decoding.bias.map(|bias| of_batch(&bias, if bias.shape()[0] == 1 { 0 } else { b }, length));
        let probe = decoding.probe.map(|probe| of_batch(&probe, b, queries));
        let mut problem = one.problem(q.view(), k.view(), v.view())?;
        if let Some(bias) = &bias {
            problem = problem.with_bias(bias.view())?;
        }
        if let Some(probe) = &probe {
            problem = problem.with_probe(probe.view())?;
        }
        let forward = engine.forward(&problem)?;
        for (row, values) in forward.out.data().chunks_exact(a.value_dim()).enumerate() {
            // SAFETY: one thread writes.
            unsafe { out.write_row(b, row / queries, row % queries, values) };
        }
        let rows = heads * queries;
        state.lse.data_mut()[b * rows..][..rows].copy_from_slice(forward.state.lse.data());
        for (all, one) in
            [(&mut state.key_mean, &forward.state.key_mean), (&mut state.probe, &forward.state.probe)]
        {
            all.data_mut()[b * rows * dim..][..rows * dim].copy_from_slice(one.data());
        }
        let solved = forward.state.diagnostics;
        state.diagnostics.iterations.extend(solved.iterations);
        state.diagnostics.residual.extend(solved.residual);
        state.diagnostics.direct += solved.direct;
        state.diagnostics.flop += solved.flop;
    }
    Ok(state)
}

/// The first tokens of one batch, copied.
fn of_batch<E: Element>(view: &View<E>, b: usize, tokens: usize) -> Tensor<E> {
    let [_, heads, _, dim] = view.shape();
    let mut rows = Vec::with_capacity(heads * tokens * dim);
    for head in 0..heads {
        for n in 0..tokens {
            view.row(b, head, n).for_each(|_, x| rows.push(x));
        }
    }
    Tensor::new(rows, &[1, heads, tokens, dim])
}

impl Attention {
    /// The same for one sequence of a batch.
    fn of_sequence(&self, b: usize, keys: usize, mask: Mask) -> Result<Attention> {
        let of_batch = |h: usize, i: usize| self.ridge().at(b, h, i);
        let ridges: Vec<f64> =
            (0..self.heads()).flat_map(|h| (0..self.queries()).map(move |i| of_batch(h, i))).collect();
        Attention::builder()
            .heads(self.heads())
            .kv_heads(self.kv_heads())
            .queries(self.queries())
            .keys(keys)
            .head_dim(self.head_dim())
            .value_dim(self.value_dim())
            .mask(mask)
            .scale(self.scale())
            .ridge(Ridge::per_query(ridges, [1, self.heads(), self.queries()]))
            .solver(self.solver())
            .precision(self.precision())
            .build()
    }
}

pub(crate) fn check_out<T: Element, O: Element>(decoding: &Decoding<T>, out: &ViewMut<O>) -> Result<()> {
    let meaning = "batch, query heads, queries, value_dim";
    expect_shape("out", out.shape(), decoding.attention.out_shape(), meaning)
}
