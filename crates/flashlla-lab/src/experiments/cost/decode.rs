//! A step of generation: the operators alone, on the CPU.

use super::measure::{Cost, measure};
use super::{Shape, normal};
use crate::{Error, Result};
use flashlla::{Attention, CacheView, Cpu, Engine, Tensor, View};

/// What is compared, in the order of [`steps`].
pub const NAMES: [&str; 4] = ["softmax", "linear", "MesaNet", "LLA"];

/// The regulariser of MesaNet, and the residual its solves stop at.
const RIDGE: f32 = 1.0;
const TOLERANCE: f32 = 1e-4;

/// The cost of the next token after `tokens` others, for each of [`NAMES`]: the attentions read their cache, the other two
/// update their state and read it.
pub fn steps(shape: Shape) -> Result<[Cost; 4]> {
    let Shape { batch, heads, tokens, dim } = shape;
    let size = [batch, heads, tokens, dim];
    let one = [batch, heads, 1, dim];
    let (q, k, v) = (
        Tensor::new(normal::<f32>(1, batch * heads * dim), &one),
        normal::<f32>(2, size.iter().product()),
        normal::<f32>(3, size.iter().product()),
    );
    let view = |data| View::bhnd(data, size).map_err(Error::failed);
    let lengths = vec![tokens; batch];
    let cache = CacheView::contiguous(view(&k)?, view(&v)?, &lengths).map_err(Error::failed)?;
    let attention =
        Attention::builder_for_cache(&q.view(), &cache).ridge(1.0).build().map_err(Error::failed)?;
    let zero = Tensor::<f32>::zeros(&one);
    let decoding = || attention.decoding(q.view(), &cache).map_err(Error::failed);
    let lla = measure(|| Cpu::new().decode(&decoding()?).map_err(Error::failed))?;
    let softmax = measure(|| {
        let decoding = decoding()?.with_probe(zero.view()).map_err(Error::failed)?;
        Cpu::new().decode(&decoding).map_err(Error::failed)
    })?;

    // The states after as many tokens: their size does not depend on it, but how far the solves must go does.
    let mut states: Vec<State> = (0..batch * heads).map(|_| State::new(dim)).collect();
    for (state, (k, v)) in
        states.iter_mut().zip(k.chunks_exact(tokens * dim).zip(v.chunks_exact(tokens * dim)))
    {
        k.chunks_exact(dim).zip(v.chunks_exact(dim)).for_each(|(k, v)| state.add(k, v));
    }
    let each = |step: Step| {
        let mut states = states.clone();
        measure(|| {
            let rows = q.data().chunks_exact(dim).zip(k.chunks_exact(dim).zip(v.chunks_exact(dim)));
            Ok(states
                .iter_mut()
                .zip(rows)
                .map(|(state, (q, (k, v)))| step(state, q, k, v))
                .collect::<Vec<_>>())
        })
    };
    let linear = each(State::linear)?;
    let mesa = each(State::mesa)?;
    Ok([softmax, linear, mesa, lla])
}

/// What a head does with the next query, key and value.
type Step = fn(&mut State, &[f32], &[f32], &[f32]) -> Vec<f32>;

/// The state of one head.
#[derive(Debug, Clone)]
struct State {
    dim: usize,
    /// `Σ k kᵀ`, `Σ k vᵀ` and `Σ k`.
    keys: Vec<f32>,
    pairs: Vec<f32>,
    normaliser: Vec<f32>,
}

impl State {
    fn new(dim: usize) -> Self {
        Self { dim, keys: vec![0.0; dim * dim], pairs: vec![0.0; dim * dim], normaliser: vec![0.0; dim] }
    }

    fn add(&mut self, k: &[f32], v: &[f32]) {
        self.add_pair(k, v);
        outer(&mut self.keys, k, k);
    }

    fn add_pair(&mut self, k: &[f32], v: &[f32]) {
        outer(&mut self.pairs, k, v);
        self.normaliser.iter_mut().zip(k).for_each(|(n, k)| *n += k);
    }

    /// Linear attention with the features `elu + 1`.
    fn linear(&mut self, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let feature =
            |x: &[f32]| x.iter().map(|&x| if x > 0.0 { x + 1.0 } else { x.exp() }).collect::<Vec<_>>();
        let (q, k) = (feature(q), feature(k));
        self.add_pair(&k, v);
        let total = dot(&q, &self.normaliser);
        let mut out = transposed(&self.pairs, &q);
        out.iter_mut().for_each(|o| *o /= total);
        out
    }

    /// MesaNet without gates: `Σ v kᵀ (Σ k kᵀ + λ)⁻¹ q`, by conjugate gradients.
    fn mesa(&mut self, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        self.add(k, v);
        let mut x = vec![0.0; self.dim];
        let (mut residual, mut direction) = (q.to_vec(), q.to_vec());
        let mut square = dot(q, q);
        let enough = TOLERANCE * TOLERANCE * square;
        for _ in 0..self.dim {
            let mut image = transposed(&self.keys, &direction);
            image.iter_mut().zip(&direction).for_each(|(i, d)| *i += RIDGE * d);
            let length = square / dot(&direction, &image);
            x.iter_mut().zip(&direction).for_each(|(x, d)| *x += length * d);
            residual.iter_mut().zip(&image).for_each(|(r, i)| *r -= length * i);
            let next = dot(&residual, &residual);
            if next <= enough {
                break;
            }
            direction.iter_mut().zip(&residual).for_each(|(d, r)| *d = r + next / square * *d);
            square = next;
        }
        transposed(&self.pairs, &x)
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `matrix += a bᵀ`
fn outer(matrix: &mut [f32], a: &[f32], b: &[f32]) {
    for (row, a) in matrix.chunks_exact_mut(b.len()).zip(a) {
        row.iter_mut().zip(b).for_each(|(m, b)| *m += a * b);
    }
}

/// `matrixᵀ x`
fn transposed(matrix: &[f32], x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; matrix.len() / x.len()];
    for (row, x) in matrix.chunks_exact(out.len()).zip(x) {
        out.iter_mut().zip(row).for_each(|(o, m)| *o += m * x);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use faer::Mat;
    use faer::linalg::solvers::Solve;

    #[test]
    fn states_say_what_their_definitions_do() {
        let (n, d) = (20, 6);
        let (k, v, q) = (normal::<f32>(1, n * d), normal::<f32>(2, n * d), normal::<f32>(3, d));
        let rows = || k.chunks_exact(d).zip(v.chunks_exact(d));
        let (mut mesa, mut linear) = (State::new(d), State::new(d));
        let mut out = (vec![], vec![]);
        for (k, v) in rows() {
            out = (mesa.mesa(&q, k, v), linear.linear(&q, k, v));
        }
        let keys = Mat::<f64>::from_fn(n, d, |i, j| k[i * d + j].into());
        let values = Mat::<f64>::from_fn(n, d, |i, j| v[i * d + j].into());
        let query = Mat::<f64>::from_fn(d, 1, |i, _| q[i].into());
        let mut gram = keys.transpose() * &keys;
        (0..d).for_each(|i| gram[(i, i)] += f64::from(RIDGE));
        let expected = values.transpose() * &keys * gram.llt(faer::Side::Lower).unwrap().solve(&query);
        for (i, out) in out.0.iter().enumerate() {
            assert!((f64::from(*out) - expected[(i, 0)]).abs() < 1e-3, "{out} {}", expected[(i, 0)]);
        }
        let phi = |x: f32| if x > 0.0 { x + 1.0 } else { x.exp() };
        let weight = |k: &[f32]| k.iter().zip(&q).map(|(k, q)| phi(*k) * phi(*q)).sum::<f32>();
        let total: f32 = rows().map(|(k, _)| weight(k)).sum();
        for (i, out) in out.1.iter().enumerate() {
            let expected = rows().map(|(k, v)| weight(k) * v[i]).sum::<f32>() / total;
            assert!((out - expected).abs() < 1e-4, "{out} {expected}");
        }
    }
}
