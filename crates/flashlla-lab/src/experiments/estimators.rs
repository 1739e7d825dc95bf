//! The three ways to predict a value from a key that the experiments compare: local constant (softmax attention), local
//! linear (LLA), and global linear (ridge regression with an intercept).
//!
//! The first two are one call of the attention engine each. A Gaussian kernel of bandwidth `h` is attention with
//! `scale = 1/h²` and the key bias `−|k_j|²/(2h²)`: the logit `q·k_j/h² − |k_j|²/(2h²)` differs from `−|q − k_j|²/(2h²)`
//! by `|q|²/(2h²)`, which is the same for all keys. Softmax attention is LLA with a probe of 0, so both are computed by the
//! same code from the same weights.

use crate::{Error, Result};
use faer::linalg::solvers::Solve;
use faer::{Mat, Side};
use flashlla::{Attention, Cpu, Engine, Mask, Problem, Ridge, Solver, Tensor, View};

/// Rows of keys and of the values that belong to them.
#[derive(Debug, Clone, PartialEq)]
pub struct Pairs {
    /// Key dimension D.
    pub dim: usize,
    /// Value dimension DV.
    pub value_dim: usize,
    /// `[n, D]`, row by row.
    pub keys: Vec<f64>,
    /// `[n, DV]`, row by row.
    pub values: Vec<f64>,
}

/// How much each pair counts for each query.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// Factor on `q·k`.
    pub scale: f64,
    /// Added to the logits, per key.
    pub bias: Option<Vec<f64>>,
    /// Which pairs a query sees.
    pub mask: Mask,
}

impl Weights {
    /// `exp(−|q − k_j|²/(2h²))`.
    pub fn gaussian(pairs: &Pairs, bandwidth: f64, mask: Mask) -> Self {
        let scale = bandwidth.powi(-2);
        let bias = pairs.keys.chunks_exact(pairs.dim).map(|k| -0.5 * scale * squared_norm(k)).collect();
        Self { scale, bias: Some(bias), mask }
    }
}

/// `|x|²`
pub fn squared_norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum()
}

/// The squared distance of every row of `a` to that of `b`.
pub fn row_errors(a: &[f64], b: &[f64], width: usize) -> Vec<f64> {
    let distance = |(a, b): (&[f64], &[f64])| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
    a.chunks_exact(width).zip(b.chunks_exact(width)).map(distance).collect()
}

impl Pairs {
    /// How many.
    pub fn len(&self) -> usize {
        self.keys.len() / self.dim
    }

    /// Softmax attention's outputs `[m, DV]` at `queries [m, D]`.
    pub fn local_constant(&self, queries: &[f64], weights: &Weights) -> Result<Vec<f64>> {
        let zeros = vec![0.0; queries.len()];
        let attention = self.describe(queries, weights, &[1.0])?;
        let shape = [1, 1, queries.len() / self.dim, self.dim];
        let problem = self.problem(&attention, queries, weights)?;
        let problem = problem.with_probe(view(&zeros, shape)?).map_err(Error::failed)?;
        Ok(forward(&problem)?.into_vec())
    }

    /// LLA's outputs `[m, DV]` at `queries [m, D]`, one after another for every ridge.
    pub fn local_linear(&self, queries: &[f64], weights: &Weights, ridges: &[f64]) -> Result<Vec<Vec<f64>>> {
        let attention = self.describe(queries, weights, ridges)?;
        let out = forward(&self.problem(&attention, queries, weights)?)?;
        let rows = queries.len() / self.dim * self.value_dim;
        Ok(out.data().chunks_exact(rows).map(<[f64]>::to_vec).collect())
    }

    /// Every ridge is a query head of its own; all of them read the same queries, keys and values.
    fn describe(&self, queries: &[f64], weights: &Weights, ridges: &[f64]) -> Result<Attention> {
        Attention::builder()
            .heads(ridges.len())
            .kv_heads(1)
            .queries(queries.len() / self.dim)
            .keys(self.len())
            .head_dim(self.dim)
            .value_dim(self.value_dim)
            .mask(weights.mask.clone())
            .scale(weights.scale)
            .ridge(Ridge::per_head(ridges))
            .solver(Solver::Auto { tolerance: Some(1e-8), max_iters: None })
            .build()
            .map_err(Error::failed)
    }

    fn problem<'a>(
        &'a self,
        attention: &'a Attention,
        queries: &'a [f64],
        weights: &'a Weights,
    ) -> Result<Problem<'a, f64>> {
        let (n, d) = (self.len(), self.dim);
        let shape = [1, attention.heads(), queries.len() / d, d];
        let q = View::strided(queries, 0, shape, [0, 0, d as isize, 1]).map_err(Error::failed)?;
        let k = view(&self.keys, [1, 1, n, d])?;
        let v = view(&self.values, [1, 1, n, self.value_dim])?;
        let problem = attention.problem(q, k, v).map_err(Error::failed)?;
        Ok(match &weights.bias {
            Some(bias) => problem.with_bias(view(bias, [1, 1, n, 1])?).map_err(Error::failed)?,
            None => problem,
        })
    }

    /// Ridge regression with an intercept, `argmin_{b,W} 1/n Σ |v_j − b − W k_j|² + λ |W|²`, at `queries [m, D]`.
    ///
    /// This is LLA at `scale = 0`.
    pub fn global_linear(&self, queries: &[f64], ridge: f64) -> Result<Vec<f64>> {
        let fit = self.global_fit(ridge * self.len() as f64)?;
        let rows = queries.chunks_exact(self.dim);
        Ok(rows.flat_map(|q| fit.at(q, self.value_dim)).collect())
    }

    /// Every value as [`Pairs::global_linear`] predicts it from all other pairs.
    ///
    /// By the hat matrix `H` of the fit to all pairs: leaving pair `i` out moves its residual `e_i` to `e_i / (1 − H_ii)`,
    /// for a penalty that stays the same, `(n − 1) λ`.
    pub fn global_linear_leave_one_out(&self, ridge: f64) -> Result<Vec<f64>> {
        let n = self.len() as f64;
        let fit = self.global_fit(ridge * (n - 1.0))?;
        let mut out = Vec::with_capacity(self.values.len());
        for (key, value) in self.keys.chunks_exact(self.dim).zip(self.values.chunks_exact(self.value_dim)) {
            let centred = Mat::from_fn(self.dim, 1, |i, _| key[i] - fit.key_mean[i]);
            let solved = fit.factor.solve(&centred);
            let leverage = 1.0 / n + (0..self.dim).map(|i| centred[(i, 0)] * solved[(i, 0)]).sum::<f64>();
            let fitted = fit.at(key, self.value_dim);
            out.extend(fitted.iter().zip(value).map(|(f, v)| v - (v - f) / (1.0 - leverage)));
        }
        Ok(out)
    }

    /// With the penalty on the sum of squares, not on their mean.
    fn global_fit(&self, penalty: f64) -> Result<GlobalFit> {
        let (n, d, e) = (self.len(), self.dim, self.value_dim);
        let (key_mean, value_mean) = (column_means(&self.keys, d), column_means(&self.values, e));
        let keys = Mat::from_fn(n, d, |i, j| self.keys[i * d + j] - key_mean[j]);
        let values = Mat::from_fn(n, e, |i, j| self.values[i * e + j] - value_mean[j]);
        let mut gram = keys.transpose() * &keys;
        (0..d).for_each(|i| gram[(i, i)] += penalty);
        let factor = gram
            .llt(Side::Lower)
            .map_err(|_| Error::failed("ridge regression: the keys do not determine a fit"))?;
        let slope = factor.solve(keys.transpose() * &values);
        Ok(GlobalFit { key_mean, value_mean, slope, factor })
    }
}

struct GlobalFit {
    key_mean: Vec<f64>,
    value_mean: Vec<f64>,
    /// `[D, DV]`
    slope: Mat<f64>,
    /// Of `Σ (k_j − k̄)(k_j − k̄)ᵀ + penalty I`.
    factor: faer::linalg::solvers::Llt<f64>,
}

impl GlobalFit {
    fn at(&self, query: &[f64], value_dim: usize) -> Vec<f64> {
        let term = |e| {
            query.iter().zip(&self.key_mean).enumerate().map(move |(i, (q, m))| (q - m) * self.slope[(i, e)])
        };
        (0..value_dim).map(|e| self.value_mean[e] + term(e).sum::<f64>()).collect()
    }
}

/// The mean of every column of rows of a given width.
pub fn column_means(rows: &[f64], width: usize) -> Vec<f64> {
    let count = (rows.len() / width) as f64;
    (0..width).map(|j| rows[j..].iter().step_by(width).sum::<f64>() / count).collect()
}

fn view(data: &[f64], shape: [usize; 4]) -> Result<View<'_, f64>> {
    View::bhnd(data, shape).map_err(Error::failed)
}

fn forward(problem: &Problem<f64>) -> Result<Tensor<f64>> {
    Ok(Cpu::default().forward(problem).map_err(Error::failed)?.out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiments::random;

    fn pairs(n: usize, dim: usize, value_dim: usize) -> Pairs {
        let mut rng = random::stream(5, 0);
        Pairs {
            dim,
            value_dim,
            keys: random::normals(&mut rng, n * dim),
            values: random::normals(&mut rng, n * value_dim),
        }
    }

    fn without(pairs: &Pairs, i: usize) -> Pairs {
        let mut rest = pairs.clone();
        rest.keys.drain(i * pairs.dim..(i + 1) * pairs.dim);
        rest.values.drain(i * pairs.value_dim..(i + 1) * pairs.value_dim);
        rest
    }

    fn assert_close(a: &[f64], b: &[f64], tolerance: f64) {
        assert_eq!(a.len(), b.len());
        let error: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        let norm = squared_norm(b).sqrt();
        assert!(error <= tolerance * norm, "relative error {}", error / norm);
    }

    #[test]
    fn gaussian_weights_are_those_of_the_distances() {
        let (pairs, queries, h) = (pairs(30, 3, 2), random::normals(&mut random::stream(9, 0), 4 * 3), 0.7);
        let out = pairs.local_constant(&queries, &Weights::gaussian(&pairs, h, Mask::full())).unwrap();
        for (q, out) in queries.chunks_exact(3).zip(out.chunks_exact(2)) {
            let (mut total, mut mean) = (0.0, [0.0; 2]);
            for (k, v) in pairs.keys.chunks_exact(3).zip(pairs.values.chunks_exact(2)) {
                let w = (-row_errors(q, k, 3)[0] / (2.0 * h * h)).exp();
                total += w;
                mean = [mean[0] + w * v[0], mean[1] + w * v[1]];
            }
            assert_close(out, &mean.map(|m| m / total), 1e-12);
        }
    }

    #[test]
    fn an_affine_function_is_recovered_by_lla_and_not_by_softmax() {
        let mut pairs = pairs(40, 3, 1);
        let truth = |k: &[f64]| 2.0 + k[0] - 3.0 * k[1] + 0.5 * k[2];
        pairs.values = pairs.keys.chunks_exact(3).map(truth).collect();
        let queries = random::normals(&mut random::stream(6, 0), 10 * 3);
        let expected: Vec<f64> = queries.chunks_exact(3).map(truth).collect();
        let weights = Weights::gaussian(&pairs, 1.0, Mask::full());
        let linear = pairs.local_linear(&queries, &weights, &[1e-9]).unwrap();
        assert_close(&linear[0], &expected, 1e-6);
        let constant = pairs.local_constant(&queries, &weights).unwrap();
        assert!(row_errors(&constant, &expected, 10)[0] > 1.0);
    }

    #[test]
    fn every_ridge_has_its_own_row_of_outputs() {
        let pairs = pairs(20, 2, 2);
        let weights = Weights::gaussian(&pairs, 0.8, Mask::full().leave_one_out());
        let both = pairs.local_linear(&pairs.keys, &weights, &[0.1, 1e9]).unwrap();
        let first = pairs.local_linear(&pairs.keys, &weights, &[0.1]).unwrap();
        assert_close(&both[0], &first[0], 1e-9);
        assert_close(&both[1], &pairs.local_constant(&pairs.keys, &weights).unwrap(), 1e-6);
    }

    #[test]
    fn leaving_one_out_by_the_hat_matrix_equals_refitting() {
        let pairs = pairs(25, 3, 2);
        let out = pairs.global_linear_leave_one_out(0.3).unwrap();
        for i in 0..pairs.len() {
            let refit = without(&pairs, i).global_linear(&pairs.keys[i * 3..(i + 1) * 3], 0.3).unwrap();
            assert_close(&out[i * 2..(i + 1) * 2], &refit, 1e-10);
        }
    }

    #[test]
    fn lla_without_a_kernel_is_ridge_regression() {
        let pairs = pairs(25, 3, 2);
        let flat = Weights { scale: 0.0, bias: None, mask: Mask::full().leave_one_out() };
        let lla = pairs.local_linear(&pairs.keys, &flat, &[0.3]).unwrap();
        assert_close(&lla[0], &pairs.global_linear_leave_one_out(0.3).unwrap(), 1e-7);
    }

    #[test]
    fn leaving_one_out_in_lla_equals_removing_the_pair() {
        let pairs = pairs(12, 2, 1);
        let weights = |p: &Pairs, mask| Weights::gaussian(p, 0.9, mask);
        let out =
            pairs.local_linear(&pairs.keys, &weights(&pairs, Mask::full().leave_one_out()), &[0.1]).unwrap();
        for i in 0..pairs.len() {
            let rest = without(&pairs, i);
            let refit = rest
                .local_linear(&pairs.keys[i * 2..(i + 1) * 2], &weights(&rest, Mask::full()), &[0.1])
                .unwrap();
            assert_close(&out[0][i..i + 1], &refit[0], 1e-7);
        }
    }
}
