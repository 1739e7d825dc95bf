//! What every engine offers, and what comes out of it.

use crate::attention::expect_shape;
use crate::{Decoding, Element, Problem, Result, Tensor, View, ViewMut, decoding};

/// How the solve of every query went.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Diagnostics {
    /// Conjugate-gradient steps taken by each query, `[B, HQ, N]` in row-major order; 0 where it was not solved by them.
    pub iterations: Vec<u32>,
    /// Relative residual `|δ − A x| / |δ|` at the end of the solve, in the same order, as the solver's recurrence has it; 0
    /// where there was nothing to solve.
    pub residual: Vec<f32>,
    /// Queries solved directly (Cholesky).
    pub direct: usize,
    /// Floating-point operations (a multiply-add is 2) that the engine spent on matrix products; 0 where it does not count.
    pub flop: u64,
}

impl Diagnostics {
    /// The median of the iterations (0 without queries).
    pub fn median_iterations(&self) -> u32 {
        let mut sorted = self.iterations.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied().unwrap_or(0)
    }

    /// The most iterations that any query took.
    pub fn max_iterations(&self) -> u32 {
        self.iterations.iter().copied().max().unwrap_or(0)
    }

    /// The largest residual; NaN when any is.
    pub fn worst_residual(&self) -> f32 {
        self.residual.iter().fold(0.0, |worst, &r| if r.is_nan() || r > worst { r } else { worst })
    }
}

/// What a forward computes beside `out`, and a backward starts from.
#[derive(Debug, Clone, PartialEq)]
pub struct State<A> {
    /// Natural logarithm of `Σ_j exp(scale q·k_j + b_j)` over the visible keys, `[B, HQ, N]`; minus infinity without any.
    pub lse: Tensor<A>,
    /// The softmax-weighted mean key `k̄`, `[B, HQ, N, D]`.
    pub key_mean: Tensor<A>,
    /// The probe `x = (C + λI)⁻¹ (k̄ − q)`, `[B, HQ, N, D]` (or the given one).
    pub probe: Tensor<A>,
    /// How the solves went.
    pub diagnostics: Diagnostics,
}

/// The result of a forward.
#[derive(Debug, Clone, PartialEq)]
pub struct Forward<A> {
    /// The outputs `[B, HQ, N, DV]`.
    pub out: Tensor<A>,
    /// Everything else.
    pub state: State<A>,
}

/// The gradients of a loss with respect to every input.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients<A> {
    /// `[B, HQ, N, D]`.
    pub dq: Tensor<A>,
    /// `[B, H, M, D]`.
    pub dk: Tensor<A>,
    /// `[B, H, M, DV]`.
    pub dv: Tensor<A>,
    /// The rest.
    pub other: OtherGradients<A>,
}

/// The gradients beside those of q, k and v.
#[derive(Debug, Clone, PartialEq)]
pub struct OtherGradients<A> {
    /// In the shape that the ridge was given in ([`crate::Ridge::shape`]).
    pub dridge: Tensor<A>,
    /// Of the scale.
    pub dscale: A,
    /// In the bias's own shape, when there is a bias.
    pub dbias: Option<Tensor<A>>,
    /// `[B, HQ, N, D]`, when the probe was given.
    pub dprobe: Option<Tensor<A>>,
    /// How the second solves (`A y = c`) went.
    pub diagnostics: Diagnostics,
}

/// Computes [`Problem`]s. Every engine takes and gives the same types; tests hold each against the others.
///
/// On an error nothing has been written, except by a call that was [interrupted](crate::Error::Interrupted).
pub trait Engine {
    /// Computes the outputs into `out [B, HQ, N, DV]`, any storage type and strides, and returns the rest.
    fn forward_into<T: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        out: ViewMut<O>,
    ) -> Result<State<T::Acc>>;

    /// Computes the gradients of `Σ out · grad_out` with respect to q, k and v into views of any storage type and
    /// strides, and returns the others. `state` is what the forward of the same problem returned.
    fn backward_into<T: Element, G: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        state: &State<T::Acc>,
        grad_out: View<G>,
        dq: ViewMut<O>,
        dk: ViewMut<O>,
        dv: ViewMut<O>,
    ) -> Result<OtherGradients<T::Acc>>;

    /// Computes the outputs.
    fn forward<T: Element>(&self, problem: &Problem<T>) -> Result<Forward<T::Acc>> {
        let mut out = Tensor::zeros(&problem.attention().out_shape());
        let state = self.forward_into(problem, out.view_mut())?;
        Ok(Forward { out, state })
    }

    /// Decodes: the outputs of new queries that look at a cache, into `out [B, HQ, t, DV]`, any storage type and strides. The
    /// answer is that of a forward over each sequence's tokens, within rounding; engines with nothing better gather the tokens
    /// and run that forward.
    fn decode_into<T: Element, O: Element>(
        &self,
        decoding: &Decoding<T>,
        out: ViewMut<O>,
    ) -> Result<State<T::Acc>>
    where
        Self: Sized,
    {
        decoding::by_forward(self, decoding, out)
    }

    /// Decodes.
    fn decode<T: Element>(&self, decoding: &Decoding<T>) -> Result<Forward<T::Acc>>
    where
        Self: Sized,
    {
        let mut out = Tensor::zeros(&decoding.attention().out_shape());
        let state = self.decode_into(decoding, out.view_mut())?;
        Ok(Forward { out, state })
    }

    /// Computes the gradients of `Σ out · grad_out`, `grad_out [B, HQ, N, DV]`.
    fn backward<T: Element, G: Element>(
        &self,
        problem: &Problem<T>,
        state: &State<T::Acc>,
        grad_out: View<G>,
    ) -> Result<Gradients<T::Acc>> {
        let a = problem.attention();
        let mut dq = Tensor::zeros(&a.query_shape());
        let mut dk = Tensor::zeros(&a.key_shape());
        let mut dv = Tensor::zeros(&a.value_shape());
        let other =
            self.backward_into(problem, state, grad_out, dq.view_mut(), dk.view_mut(), dv.view_mut())?;
        Ok(Gradients { dq, dk, dv, other })
    }
}

/// The checks that every engine makes on the views it writes to.
pub(crate) fn check_out<T: Element, O: Element>(problem: &Problem<T>, out: &ViewMut<O>) -> Result<()> {
    expect_shape(
        "out",
        out.shape(),
        problem.attention().out_shape(),
        "batch, query heads, queries, value_dim",
    )
}

/// As [`check_out`], for a backward.
pub(crate) fn check_gradients<T: Element, G: Element, O: Element>(
    problem: &Problem<T>,
    state: &crate::State<T::Acc>,
    grad_out: &View<G>,
    [dq, dk, dv]: [&ViewMut<O>; 3],
) -> Result<()> {
    let a = problem.attention();
    problem.check_grad_out(grad_out)?;
    problem.check_state(state)?;
    expect_shape("dq", dq.shape(), a.query_shape(), "batch, query heads, queries, head_dim")?;
    expect_shape("dk", dk.shape(), a.key_shape(), "batch, KV heads, keys, head_dim")?;
    expect_shape("dv", dv.shape(), a.value_shape(), "batch, KV heads, keys, value_dim")
}
