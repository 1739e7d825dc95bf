//! Mixers as their publications define them, token by token, in `f64` and plain loops.

use candle_core::Tensor;
use candle_nn::VarMap;
use std::collections::HashMap;

pub type Vector = Vec<f64>;
/// Rows.
pub type Matrix = Vec<Vector>;

/// The parameters of a mixer.
pub struct Parameters(HashMap<String, (Vec<usize>, Vector)>);

impl Parameters {
    pub fn of(parameters: &VarMap) -> Self {
        let parameters = parameters.data().lock().unwrap();
        let plain = |t: &Tensor| (t.dims().to_vec(), t.flatten_all().unwrap().to_vec1::<f64>().unwrap());
        Self(parameters.iter().map(|(name, var)| (name.clone(), plain(var.as_tensor()))).collect())
    }

    pub fn get(&self, name: &str) -> &[f64] {
        &self.0.get(name).unwrap_or_else(|| panic!("no parameter {name}")).1
    }

    /// `x W` of one token, plus a bias if there is one.
    pub fn project(&self, name: &str, x: &[f64]) -> Vector {
        let weight = self.get(&format!("{name}.weight"));
        let bias = self.0.get(&format!("{name}.bias"));
        let row = |i: usize| dot(&weight[i * x.len()..][..x.len()], x) + bias.map_or(0.0, |b| b.1[i]);
        (0..weight.len() / x.len()).map(row).collect()
    }

    /// `x W` of all tokens, then a short convolution with SiLU where there is one.
    pub fn tokens(&self, name: &str, conv: &str, x: &Matrix) -> Matrix {
        let projected: Matrix = x.iter().map(|x| self.project(name, x)).collect();
        match self.0.get(&format!("{conv}.weight")) {
            Some((shape, weight)) => convolved(weight, shape[0], &projected),
            None => projected,
        }
    }

    /// A short convolution with SiLU where there is one, else SiLU alone.
    pub fn convolved_or_silu(&self, conv: &str, x: Matrix) -> Matrix {
        match self.0.get(&format!("{conv}.weight")) {
            Some((shape, weight)) => convolved(weight, shape[0], &x),
            None => x.iter().map(|row| row.iter().map(|&x| silu(x)).collect()).collect(),
        }
    }

    /// RMS normalisation of a head.
    pub fn norm(&self, name: &str, x: &[f64]) -> Vector {
        let eps = if name == "out_norm" { 1e-6 } else { f64::from(f32::EPSILON) };
        let size = (dot(x, x) / x.len() as f64 + eps).sqrt();
        x.iter().zip(self.get(&format!("{name}.weight"))).map(|(x, gain)| x / size * gain).collect()
    }
}

fn convolved(weight: &[f64], taps: usize, x: &Matrix) -> Matrix {
    let width = x[0].len();
    let at = |i: usize, c: usize| {
        let terms =
            (0..taps).filter(|&t| i + t + 1 >= taps).map(|t| weight[t * width + c] * x[i + t + 1 - taps][c]);
        silu(terms.sum())
    };
    (0..x.len()).map(|i| (0..width).map(|c| at(i, c)).collect()).collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

pub fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

pub fn unit(x: &[f64]) -> Vector {
    let size = (dot(x, x) + 1e-6).sqrt();
    x.iter().map(|x| x / size).collect()
}

pub fn zeros(rows: usize, columns: usize) -> Matrix {
    vec![vec![0.0; columns]; rows]
}

/// `m += factor a bᵀ`.
pub fn add_outer(m: &mut Matrix, factor: f64, a: &[f64], b: &[f64]) {
    for (row, a) in m.iter_mut().zip(a) {
        row.iter_mut().zip(b).for_each(|(m, b)| *m += factor * a * b);
    }
}

/// `mᵀ x`.
pub fn transposed_times(m: &Matrix, x: &[f64]) -> Vector {
    (0..m[0].len()).map(|j| m.iter().zip(x).map(|(row, x)| row[j] * x).sum()).collect()
}

pub fn scale(m: &mut Matrix, factor: f64) {
    m.iter_mut().flatten().for_each(|m| *m *= factor);
}

/// The solution of `a x = b`, by elimination with pivots.
pub fn solve(mut a: Matrix, mut b: Vector) -> Vector {
    let n = b.len();
    for i in 0..n {
        let pivot = (i..n).max_by(|&r, &s| a[r][i].abs().total_cmp(&a[s][i].abs())).unwrap();
        a.swap(i, pivot);
        b.swap(i, pivot);
        let pivot = a[i].clone();
        for r in i + 1..n {
            let factor = a[r][i] / pivot[i];
            a[r].iter_mut().zip(&pivot).for_each(|(x, p)| *x -= factor * p);
            b[r] -= factor * b[i];
        }
    }
    for i in (0..n).rev() {
        b[i] = (b[i] - dot(&a[i][i + 1..], &b[i + 1..])) / a[i][i];
    }
    b
}

/// The part of a token's vector that is a head's.
pub fn head(x: &[f64], head: usize, width: usize) -> &[f64] {
    &x[head * width..][..width]
}
