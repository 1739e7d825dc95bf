//! The yardstick: dense `f64`, one query at a time, formula by formula, never optimised.
//!
//! Two derivations of the same operator, forward and backward:
//!
//! - [`Form::Covariance`], in `covariance.rs`: what this crate computes everywhere. The fit's unpenalised intercept is
//!   eliminated first, so there is no denominator.
//! - [`Form::Uncentred`], in `uncentred.rs`: the definition as the paper states it, with `z_j = k_j − q` and a denominator
//!   that comes close to 0, hence its `delta_eps`.
//!
//! Both gather the visible keys of a query into plain vectors (`Row`), so masks need no formulas of their own.

mod covariance;
mod uncentred;

use crate::engine::{check_gradients, check_out};
use crate::{
    Attention, Diagnostics, Element, Engine, Error, OtherGradients, Problem, Real, Result, State, Tensor,
    View, ViewMut,
};
use faer::linalg::solvers::Solve;

/// Which derivation of the operator [`Reference`] evaluates.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Form {
    /// `out = v̄ − Cov_p(v, k) x`.
    #[default]
    Covariance,
    /// `out = Σ w_j (1 − z_j·ρ) v_j / (ω − μ·ρ)`, weights relative to the row's largest.
    Uncentred {
        /// Added to the denominator in the direction of its sign. The published code uses `1e-12`.
        delta_eps: f64,
    },
}

/// The dense `f64` engine. Every system is solved by Cholesky factorisation, whatever solver the description asks for.
///
/// It takes `O(M·D² + D³)` per query: for tests and small problems.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Reference {
    /// The derivation to evaluate.
    pub form: Form,
}

/// Everything one query sees, gathered.
struct Row {
    /// The visible keys' places.
    places: Vec<usize>,
    q: Vec<f64>,
    /// The visible keys and values, one after another.
    k: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
    /// `scale q·k_j + b_j`.
    logits: Vec<f64>,
    scale: f64,
    ridge: f64,
    /// A given probe.
    probe: Option<Vec<f64>>,
}

/// What one query gives.
struct Output {
    out: Vec<f64>,
    lse: f64,
    key_mean: Vec<f64>,
    probe: Vec<f64>,
}

/// What one query adds to the gradients.
struct RowGradients {
    dq: Vec<f64>,
    /// Of the visible keys, values and logits, in the row's order.
    dk: Vec<Vec<f64>>,
    dv: Vec<Vec<f64>>,
    dlogits: Vec<f64>,
    dridge: f64,
    dscale: f64,
    dprobe: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `acc += factor · x`
fn add_scaled(acc: &mut [f64], factor: f64, x: &[f64]) {
    acc.iter_mut().zip(x).for_each(|(a, x)| *a += factor * x);
}

/// Solves `A x = b` for a symmetric positive definite `A` (NaN when it is not).
fn solve(a: &faer::Mat<f64>, b: &[f64]) -> Vec<f64> {
    let rhs = faer::Mat::from_fn(b.len(), 1, |i, _| b[i]);
    match a.llt(faer::Side::Lower) {
        Ok(factor) => factor.solve(&rhs).col_as_slice(0).to_vec(),
        Err(_) => vec![f64::NAN; b.len()],
    }
}

impl Row {
    fn gather<T: Element>(problem: &Problem<T>, b: usize, h: usize, i: usize) -> Self {
        let a = problem.attention();
        let kv = h / a.group();
        let read = |view: &View<T>, h: usize, n: usize| -> Vec<f64> {
            (0..view.shape()[3]).map(|d| view.at(b, h, n, d).to_real()).collect()
        };
        let q = read(&problem.q(), h, i);
        let bias_at = |bias: View<T::Acc>, j| {
            let (b, h) = a.bias_place(bias.shape(), b, h);
            bias.at(b, h, j, 0).as_f64()
        };
        let (mut places, mut k, mut v, mut logits) = (vec![], vec![], vec![], vec![]);
        for j in a.mask().visible(i, a.keys()).iter() {
            let bias = problem.bias().map_or(0.0, |bias| bias_at(bias, j));
            if bias == f64::NEG_INFINITY {
                continue; // Hidden: its weight is 0 whatever the key.
            }
            let key = read(&problem.k(), kv, j);
            logits.push(a.scale() * dot(&q, &key) + bias);
            places.push(j);
            k.push(key);
            v.push(read(&problem.v(), kv, j));
        }
        let probe = problem.probe().map(|x| (0..a.head_dim()).map(|d| x.at(b, h, i, d).as_f64()).collect());
        Self { places, q, k, v, logits, scale: a.scale(), ridge: a.ridge().at(b, h, i), probe }
    }

    /// The log-sum-exp of the logits.
    fn lse(&self) -> f64 {
        let max = self.logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        max + self.logits.iter().map(|s| (s - max).exp()).sum::<f64>().ln()
    }
}

/// Every query's batch, head and place.
fn rows(a: &Attention) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
    let (batch, heads, queries) = (a.batch(), a.heads(), a.queries());
    (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..queries).map(move |i| (b, h, i))))
}

fn rounded<A: Real>(values: &[f64], shape: &[usize]) -> Tensor<A> {
    Tensor::new(values.iter().map(|&x| A::of_f64(x)).collect(), shape)
}

fn solved_directly(queries: usize) -> Diagnostics {
    Diagnostics { iterations: vec![0; queries], residual: vec![0.0; queries], direct: queries, flop: 0 }
}

impl Engine for Reference {
    fn forward_into<T: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        out: ViewMut<O>,
    ) -> Result<State<T::Acc>> {
        check_out(problem, &out)?;
        self.check_form(problem)?;
        let a = problem.attention();
        let (mut lse, mut key_mean, mut probe) = (vec![], vec![], vec![]);
        for (b, h, i) in rows(a) {
            let row = Row::gather(problem, b, h, i);
            let output = if row.places.is_empty() {
                let (d, dv) = (a.head_dim(), a.value_dim());
                Output {
                    out: vec![0.0; dv],
                    lse: f64::NEG_INFINITY,
                    key_mean: vec![0.0; d],
                    probe: row.probe.clone().unwrap_or_else(|| vec![0.0; d]),
                }
            } else {
                match self.form {
                    Form::Covariance => covariance::forward(&row),
                    Form::Uncentred { delta_eps } => uncentred::forward(&row, delta_eps),
                }
            };
            // SAFETY: there is one thread.
            unsafe { out.write_row(b, h, i, &output.out) };
            lse.push(output.lse);
            key_mean.extend(output.key_mean);
            probe.extend(output.probe);
        }
        let queries = lse.len();
        Ok(State {
            lse: rounded(&lse, &[a.batch(), a.heads(), a.queries()]),
            key_mean: rounded(&key_mean, &a.query_shape()),
            probe: rounded(&probe, &a.query_shape()),
            diagnostics: solved_directly(queries),
        })
    }

    fn backward_into<T: Element, G: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        state: &State<T::Acc>,
        grad_out: View<G>,
        dq: ViewMut<O>,
        dk: ViewMut<O>,
        dv: ViewMut<O>,
    ) -> Result<OtherGradients<T::Acc>> {
        check_gradients(problem, state, &grad_out, [&dq, &dk, &dv])?;
        self.check_form(problem)?;
        let a = problem.attention();
        let (d, value_dim, keys) = (a.head_dim(), a.value_dim(), a.keys());
        let mut dk_sum = vec![0.0; a.batch() * a.kv_heads() * keys * d];
        let mut dv_sum = vec![0.0; a.batch() * a.kv_heads() * keys * value_dim];
        let mut dridge = vec![0.0; a.ridge().values().len()];
        let mut dbias = problem.bias().map(|bias| (vec![0.0; bias.shape().iter().product()], bias.shape()));
        let mut dprobe = vec![];
        let mut dscale = 0.0;
        for (b, h, i) in rows(a) {
            let row = Row::gather(problem, b, h, i);
            let g: Vec<f64> = (0..value_dim).map(|e| grad_out.at(b, h, i, e).to_real()).collect();
            if row.places.is_empty() {
                // SAFETY: there is one thread.
                unsafe { dq.write_row(b, h, i, &vec![0.0; d]) };
                dprobe.extend(vec![0.0; d]);
                continue;
            }
            let row_gradients = match self.form {
                Form::Covariance => covariance::backward(&row, &g),
                Form::Uncentred { delta_eps } => uncentred::backward(&row, &g, delta_eps),
            };
            // SAFETY: there is one thread.
            unsafe { dq.write_row(b, h, i, &row_gradients.dq) };
            dprobe.extend(row_gradients.dprobe);
            dscale += row_gradients.dscale;
            dridge[a.ridge().index(b, h, i)] += row_gradients.dridge;
            let head = b * a.kv_heads() + h / a.group();
            for (n, &j) in row.places.iter().enumerate() {
                let key = head * keys + j;
                add_scaled(&mut dk_sum[key * d..][..d], 1.0, &row_gradients.dk[n]);
                add_scaled(&mut dv_sum[key * value_dim..][..value_dim], 1.0, &row_gradients.dv[n]);
                if let Some((dbias, shape)) = &mut dbias {
                    let (bias_b, bias_h) = a.bias_place(*shape, b, h);
                    dbias[(bias_b * shape[1] + bias_h) * keys + j] += row_gradients.dlogits[n];
                }
            }
        }
        for head in 0..a.batch() * a.kv_heads() {
            for j in 0..keys {
                let (b, h, key) = (head / a.kv_heads(), head % a.kv_heads(), head * keys + j);
                // SAFETY: there is one thread.
                unsafe {
                    dk.write_row(b, h, j, &dk_sum[key * d..][..d]);
                    dv.write_row(b, h, j, &dv_sum[key * value_dim..][..value_dim]);
                }
            }
        }
        let queries = a.batch() * a.heads() * a.queries();
        Ok(OtherGradients {
            dridge: rounded(&dridge, a.ridge().shape()),
            dscale: Real::of_f64(dscale),
            dbias: dbias.map(|(dbias, shape)| rounded(&dbias, &shape)),
            dprobe: problem.probe().map(|_| rounded(&dprobe, &a.query_shape())),
            diagnostics: solved_directly(queries),
        })
    }
}

impl Reference {
    /// The paper's form has no place for a given probe.
    fn check_form<T: Element>(&self, problem: &Problem<T>) -> Result<()> {
        if self.form != Form::Covariance && problem.probe().is_some() {
            return Err(Error::value(
                "probe",
                "a given probe",
                "left out with the uncentred form, which solves for its own",
            ));
        }
        Ok(())
    }
}
