//! [`Attention`]: the validated description of one call, and [`Problem`]: a description with its data.

use crate::{Element, Error, Mask, Precision, Result, Ridge, Solver, Tensor, View};

/// The largest head dimension.
pub const MAX_HEAD_DIM: usize = 256;

/// The validated description of one call: sizes, mask, scale, ridge, solver and precision.
///
/// A description holds no queries, keys or values; [`Attention::problem`] joins it with them. Everything that can be wrong
/// is found here or there, before an engine touches any output.
///
/// ```
/// use flashlla::{Attention, Mask, Ridge};
/// let attention = Attention::builder()
///     .batch(2)
///     .heads(8)
///     .kv_heads(2)
///     .queries(128)
///     .keys(128)
///     .head_dim(64)
///     .mask(Mask::causal())
///     .ridge(Ridge::scalar(1.0))
///     .build()?;
/// assert_eq!(attention.scale(), 0.125);
/// # Ok::<(), flashlla::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    queries: usize,
    keys: usize,
    head_dim: usize,
    value_dim: usize,
    mask: Mask,
    scale: f64,
    ridge: Ridge,
    solver: Solver,
    precision: Precision,
}

/// Collects the parts of an [`Attention`]; see there.
#[derive(Debug, Clone, Default)]
pub struct AttentionBuilder {
    batch: Option<usize>,
    heads: Option<usize>,
    kv_heads: Option<usize>,
    queries: usize,
    keys: Option<usize>,
    head_dim: usize,
    value_dim: Option<usize>,
    mask: Mask,
    scale: Option<f64>,
    ridge: Ridge,
    solver: Solver,
    precision: Precision,
}

impl AttentionBuilder {
    /// Batch size (default 1).
    pub fn batch(mut self, batch: usize) -> Self {
        self.batch = Some(batch);
        self
    }

    /// Query heads HQ (default 1): a multiple of the KV heads.
    pub fn heads(mut self, heads: usize) -> Self {
        self.heads = Some(heads);
        self
    }

    /// Key and value heads H (default: as many as query heads). Query head `h` reads KV head `h / (HQ / H)`.
    pub fn kv_heads(mut self, kv_heads: usize) -> Self {
        self.kv_heads = Some(kv_heads);
        self
    }

    /// Queries N per sequence.
    pub fn queries(mut self, queries: usize) -> Self {
        self.queries = queries;
        self
    }

    /// Keys M per sequence (default: as many as queries).
    pub fn keys(mut self, keys: usize) -> Self {
        self.keys = Some(keys);
        self
    }

    /// Dimension D of queries and keys, 1 to 256.
    pub fn head_dim(mut self, head_dim: usize) -> Self {
        self.head_dim = head_dim;
        self
    }

    /// Dimension DV of values, 1 to 256 (default: D).
    pub fn value_dim(mut self, value_dim: usize) -> Self {
        self.value_dim = Some(value_dim);
        self
    }

    /// Which keys a query sees (default: all).
    pub fn mask(mut self, mask: Mask) -> Self {
        self.mask = mask;
        self
    }

    /// Factor on `q·k` in the logits, the inverse bandwidth (default `D^-0.5`); any finite number.
    pub fn scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// The ridge penalty λ > 0 (default 10).
    pub fn ridge(mut self, ridge: impl Into<Ridge>) -> Self {
        self.ridge = ridge.into();
        self
    }

    /// How the systems are solved (default [`Solver::Auto`]).
    pub fn solver(mut self, solver: Solver) -> Self {
        self.solver = solver;
        self
    }

    /// In which arithmetic (default [`Precision::Standard`]).
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// Checks everything and makes the description.
    pub fn build(self) -> Result<Attention> {
        let batch = self.batch.unwrap_or(1);
        let heads = self.heads.unwrap_or(self.kv_heads.unwrap_or(1));
        let kv_heads = self.kv_heads.unwrap_or(heads);
        if heads == 0 {
            return Err(Error::value("heads", 0, "at least 1"));
        }
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let allowed = format!("a divisor of the number of query heads ({heads})");
            return Err(Error::value("kv_heads", kv_heads, allowed));
        }
        let value_dim = self.value_dim.unwrap_or(self.head_dim);
        for (argument, size) in [("head_dim", self.head_dim), ("value_dim", value_dim)] {
            if !(1..=MAX_HEAD_DIM).contains(&size) {
                return Err(Error::value(argument, size, format!("from 1 to {MAX_HEAD_DIM}")));
            }
        }
        let keys = self.keys.unwrap_or(self.queries);
        // A tensor has at most isize::MAX bytes; the widest row is 256 f64.
        for (argument, tokens) in [("queries", self.queries), ("keys", keys)] {
            let elements = batch.checked_mul(heads).and_then(|n| n.checked_mul(tokens));
            if elements.is_none_or(|n| n > isize::MAX as usize / (8 * MAX_HEAD_DIM)) {
                return Err(Error::value(
                    argument,
                    tokens,
                    format!("small enough for batch {batch} and {heads} heads"),
                ));
            }
        }
        let scale = self.scale.unwrap_or((self.head_dim as f64).powf(-0.5));
        if !scale.is_finite() {
            return Err(Error::value("scale", scale, "finite"));
        }
        self.mask.validate(self.queries, keys)?;
        self.ridge.validate([batch, heads, self.queries])?;
        self.solver.validate()?;
        Ok(Attention {
            batch,
            heads,
            kv_heads,
            queries: self.queries,
            keys,
            head_dim: self.head_dim,
            value_dim,
            mask: self.mask,
            scale,
            ridge: self.ridge,
            solver: self.solver,
            precision: self.precision,
        })
    }
}

impl Attention {
    /// Starts a description.
    pub fn builder() -> AttentionBuilder {
        AttentionBuilder::default()
    }

    /// Starts a description with the sizes of `q [B, HQ, N, D]`, `k [B, H, M, D]` and `v [B, H, M, DV]`; what does not
    /// agree among them is found by [`Attention::problem`].
    pub fn builder_for<T: Element>(q: &View<T>, k: &View<T>, v: &View<T>) -> AttentionBuilder {
        let ([batch, heads, queries, head_dim], [_, kv_heads, keys, _]) = (q.shape(), k.shape());
        Self::builder()
            .batch(batch)
            .heads(heads)
            .kv_heads(kv_heads)
            .queries(queries)
            .keys(keys)
            .head_dim(head_dim)
            .value_dim(v.shape()[3])
    }

    /// Batch size B.
    pub fn batch(&self) -> usize {
        self.batch
    }
    /// Query heads HQ.
    pub fn heads(&self) -> usize {
        self.heads
    }
    /// Key and value heads H.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }
    /// Query heads that share a KV head, HQ / H.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
    /// Queries N.
    pub fn queries(&self) -> usize {
        self.queries
    }
    /// Keys M.
    pub fn keys(&self) -> usize {
        self.keys
    }
    /// Dimension D of queries and keys.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }
    /// Dimension DV of values.
    pub fn value_dim(&self) -> usize {
        self.value_dim
    }
    /// Which keys a query sees.
    pub fn mask(&self) -> &Mask {
        &self.mask
    }
    /// Factor on `q·k`.
    pub fn scale(&self) -> f64 {
        self.scale
    }
    /// The ridge penalty.
    pub fn ridge(&self) -> &Ridge {
        &self.ridge
    }
    /// How the systems are solved.
    pub fn solver(&self) -> Solver {
        self.solver
    }
    /// In which arithmetic.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The shape `[B, HQ, N, D]` of queries, key means and probes.
    pub fn query_shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.queries, self.head_dim]
    }
    /// The shape `[B, H, M, D]` of keys.
    pub fn key_shape(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, self.head_dim]
    }
    /// The shape `[B, H, M, DV]` of values.
    pub fn value_shape(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, self.value_dim]
    }
    /// The shape `[B, HQ, N, DV]` of outputs.
    pub fn out_shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.queries, self.value_dim]
    }

    /// The batch and head under which a bias of that shape holds what query head `head` adds.
    #[inline]
    pub(crate) fn bias_place(&self, bias: [usize; 4], batch: usize, head: usize) -> (usize, usize) {
        let [b, h, ..] = bias;
        let head = if h == self.heads {
            head
        } else if h == self.kv_heads {
            head / self.group()
        } else {
            0
        };
        (if b == 1 { 0 } else { batch }, head)
    }

    /// Joins the description with `q [B, HQ, N, D]`, `k [B, H, M, D]` and `v [B, H, M, DV]`.
    pub fn problem<'a, T: Element>(
        &'a self,
        q: View<'a, T>,
        k: View<'a, T>,
        v: View<'a, T>,
    ) -> Result<Problem<'a, T>> {
        expect_shape("q", q.shape(), self.query_shape(), "batch, query heads, queries, head_dim")?;
        expect_shape("k", k.shape(), self.key_shape(), "batch, KV heads, keys, head_dim")?;
        expect_shape("v", v.shape(), self.value_shape(), "batch, KV heads, keys, value_dim")?;
        Ok(Problem { attention: self, q, k, v, bias: None, probe: None })
    }
}

pub(crate) fn expect_shape(
    argument: &'static str,
    given: [usize; 4],
    expected: [usize; 4],
    meaning: &str,
) -> Result<()> {
    if given == expected { Ok(()) } else { Err(Error::shape(argument, &given, &expected, meaning)) }
}

pub(crate) fn check_bias(a: &Attention, shape: [usize; 4]) -> Result<()> {
    let [b, h, m, one] = shape;
    if (b == 1 || b == a.batch) && (h == 1 || h == a.heads || h == a.kv_heads) && m == a.keys && one == 1 {
        return Ok(());
    }
    Err(Error::Shape {
        argument: "bias",
        given: shape.to_vec(),
        expected: format!(
            "[{} or 1, {} or {} or 1, {}, 1] (batch, query heads or KV heads, keys, 1)",
            a.batch, a.heads, a.kv_heads, a.keys
        ),
    })
}

/// A description joined with its queries, keys and values, and optionally a bias on the logits and a given probe.
#[derive(Debug, Clone)]
pub struct Problem<'a, T: Element> {
    attention: &'a Attention,
    q: View<'a, T>,
    k: View<'a, T>,
    v: View<'a, T>,
    bias: Option<View<'a, T::Acc>>,
    probe: Option<View<'a, T::Acc>>,
}

impl<'a, T: Element> Problem<'a, T> {
    /// Adds a bias per key to the logits: `scale q·k_j + b_j`. Its shape is `[B or 1, HQ or H or 1, M, 1]`; one that is
    /// shared by heads or batches has a gradient summed over them. A bias of minus infinity hides its key.
    pub fn with_bias(mut self, bias: View<'a, T::Acc>) -> Result<Self> {
        check_bias(self.attention, bias.shape())?;
        self.bias = Some(bias);
        Ok(self)
    }

    /// Gives the probe `x [B, HQ, N, D]` instead of solving for it: Parallax attention,
    /// `out = Σ p_j (1 − (k_j − k̄)·x) v_j`. The ridge then has no effect and a zero gradient.
    pub fn with_probe(mut self, probe: View<'a, T::Acc>) -> Result<Self> {
        expect_shape(
            "probe",
            probe.shape(),
            self.attention.query_shape(),
            "batch, query heads, queries, head_dim",
        )?;
        self.probe = Some(probe);
        Ok(self)
    }

    /// The description.
    pub fn attention(&self) -> &'a Attention {
        self.attention
    }
    /// The queries `[B, HQ, N, D]`.
    pub fn q(&self) -> View<'a, T> {
        self.q
    }
    /// The keys `[B, H, M, D]`.
    pub fn k(&self) -> View<'a, T> {
        self.k
    }
    /// The values `[B, H, M, DV]`.
    pub fn v(&self) -> View<'a, T> {
        self.v
    }
    /// The bias, if there is one: `[B or 1, HQ or H or 1, M, 1]`.
    pub fn bias(&self) -> Option<View<'a, T::Acc>> {
        self.bias
    }
    /// The given probe, if there is one: `[B, HQ, N, D]`.
    pub fn probe(&self) -> Option<View<'a, T::Acc>> {
        self.probe
    }

    pub(crate) fn check_grad_out<G: Element>(&self, grad_out: &View<G>) -> Result<()> {
        expect_shape(
            "grad_out",
            grad_out.shape(),
            self.attention.out_shape(),
            "batch, query heads, queries, value_dim",
        )
    }

    pub(crate) fn check_state(&self, state: &crate::State<T::Acc>) -> Result<()> {
        let a = self.attention;
        let rows = [a.batch, a.heads, a.queries];
        let check = |argument, tensor: &Tensor<T::Acc>, shape: &[usize], meaning| {
            if tensor.shape() == shape {
                Ok(())
            } else {
                Err(Error::shape(argument, tensor.shape(), shape, meaning))
            }
        };
        check("lse", &state.lse, &rows, "batch, query heads, queries")?;
        check("key_mean", &state.key_mean, &a.query_shape(), "batch, query heads, queries, head_dim")?;
        check("probe", &state.probe, &a.query_shape(), "batch, query heads, queries, head_dim")
    }
}
