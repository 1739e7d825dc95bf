//! Four ways to mix a sequence, each as a causal predictor: position `i` predicts its value from its key and the pairs
//! before it.
//!
//! None of them is trained; each has one or two parameters, which [`Mixer::candidates`] lists.

use super::estimators::{Pairs, Weights, squared_norm};
use crate::Result;
use faer::Mat;
use flashlla::Mask;

/// A mixer with its parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mixer {
    /// Softmax attention: the local constant estimator.
    Softmax {
        /// Factor on `q·k`.
        scale: f64,
    },
    /// Linear attention with the features `elu(s x) + 1` and normalised weights (Katharopoulos et al., 2020).
    Linear {
        /// `s`
        scale: f64,
    },
    /// MesaNet without gates: ridge regression through the origin on all pairs so far, `argmin_W Σ |v_j − W k_j|² + λ |W|²`,
    /// kept exactly by recursive least squares (von Oswald et al., 2025).
    Mesa {
        /// `λ`
        ridge: f64,
    },
    /// Local Linear Attention.
    Lla {
        /// Factor on `q·k`.
        scale: f64,
        /// `λ`
        ridge: f64,
    },
}

/// The mixers' names, in the order of the tables.
pub const NAMES: [&str; 4] = ["softmax", "linear", "MesaNet", "LLA"];

impl Mixer {
    /// All parameters to choose among, for the mixer of this place in [`NAMES`] and keys of norm `√dim`.
    pub fn candidates(place: usize, dim: usize, quick: bool) -> Vec<Self> {
        // With such keys, q·k/√dim is what trained attention calls its logit.
        let unit = (dim as f64).powf(-0.5);
        let step = if quick { 2.0 } else { 2f64.sqrt() };
        let scales = (0..).map(|i| 0.5 * unit * step.powi(i)).take_while(|s| *s < 33.0 * unit);
        match place {
            0 => scales.map(|scale| Self::Softmax { scale }).collect(),
            1 => [0.25, 0.5, 1.0, 2.0, 4.0].map(|scale| Self::Linear { scale }).to_vec(),
            2 => (-6..=6).map(|e| Self::Mesa { ridge: 10f64.powf(f64::from(e) / 2.0) }).collect(),
            _ => {
                let ridges = [1e-3, 1e-2, 1e-1, 1.0];
                let scales = (0..6).map(|i| 0.5 * unit * 2f64.powi(i));
                scales.flat_map(|scale| ridges.map(|ridge| Self::Lla { scale, ridge })).collect()
            }
        }
    }

    /// Every position's prediction `[n, DV]`; the first is 0.
    pub fn predict(&self, pairs: &Pairs) -> Result<Vec<f64>> {
        let weights = |scale| Weights { scale, bias: None, mask: Mask::causal().leave_one_out() };
        match *self {
            Self::Softmax { scale } => pairs.local_constant(&pairs.keys, &weights(scale)),
            Self::Lla { scale, ridge } => {
                let mut out = pairs.local_linear(&pairs.keys, &weights(scale), &[ridge])?;
                Ok(out.swap_remove(0))
            }
            Self::Linear { scale } => Ok(linear_attention(pairs, scale)),
            Self::Mesa { ridge } => Ok(recursive_least_squares(pairs, ridge)),
        }
    }

    /// Its parameters in words.
    pub fn describe(&self) -> String {
        match self {
            Self::Softmax { scale } | Self::Linear { scale } => format!("scale {scale:.3}"),
            Self::Mesa { ridge } => format!("ridge {ridge:.3}"),
            Self::Lla { scale, ridge } => format!("scale {scale:.3}, ridge {ridge}"),
        }
    }
}

/// `out_i = Σ_{j<i} φ(k_i)·φ(k_j) v_j / Σ_{j<i} φ(k_i)·φ(k_j)`, by its running sums.
fn linear_attention(pairs: &Pairs, scale: f64) -> Vec<f64> {
    let (d, dv) = (pairs.dim, pairs.value_dim);
    let (mut state, mut normaliser) = (vec![0.0; d * dv], vec![0.0; d]);
    let mut out = vec![];
    for (i, (k, v)) in pairs.keys.chunks_exact(d).zip(pairs.values.chunks_exact(dv)).enumerate() {
        let feature = |x: &f64| if x * scale > 0.0 { x * scale + 1.0 } else { (x * scale).exp() };
        let features: Vec<f64> = k.iter().map(feature).collect();
        let mut row = vec![0.0; dv];
        let mut total = 0.0;
        for (a, &f) in features.iter().enumerate() {
            total += f * normaliser[a];
            row.iter_mut().zip(&state[a * dv..]).for_each(|(o, s)| *o += f * s);
        }
        out.extend(row.iter().map(|o| if i == 0 { 0.0 } else { o / total }));
        for (a, &f) in features.iter().enumerate() {
            normaliser[a] += f;
            state[a * dv..][..dv].iter_mut().zip(v).for_each(|(s, v)| *s += f * v);
        }
    }
    out
}

/// `out_i = W_i k_i` with `W_i = argmin_W Σ_{j<i} |v_j − W k_j|² + λ |W|²`.
///
/// `P = (Σ k kᵀ + λI)⁻¹` and `W` take up one pair at a time: with the gain `g = P k / (1 + k·P k)`,
/// `W += (v − W k) gᵀ` and `P −= g (P k)ᵀ`.
fn recursive_least_squares(pairs: &Pairs, ridge: f64) -> Vec<f64> {
    let (d, dv) = (pairs.dim, pairs.value_dim);
    let mut inverse = Mat::<f64>::from_fn(d, d, |i, j| if i == j { 1.0 / ridge } else { 0.0 });
    // Column by column: the weights of one key dimension.
    let mut slope = Mat::<f64>::zeros(dv, d);
    let mut out = Vec::with_capacity(pairs.values.len());
    let mut spread = vec![0.0; d];
    for (k, v) in pairs.keys.chunks_exact(d).zip(pairs.values.chunks_exact(dv)) {
        let mut predicted = vec![0.0; dv];
        spread.fill(0.0);
        for (a, &k_a) in k.iter().enumerate() {
            predicted.iter_mut().zip(slope.col_as_slice(a)).for_each(|(o, w)| *o += k_a * w);
            spread.iter_mut().zip(inverse.col_as_slice(a)).for_each(|(s, p)| *s += k_a * p);
        }
        let norm = 1.0 + k.iter().zip(&spread).map(|(k, s)| k * s).sum::<f64>();
        for (a, &s_a) in spread.iter().enumerate() {
            let gain = s_a / norm;
            for (w, (v, o)) in slope.col_as_slice_mut(a).iter_mut().zip(v.iter().zip(&predicted)) {
                *w += (v - o) * gain;
            }
            inverse.col_as_slice_mut(a).iter_mut().zip(&spread).for_each(|(p, s)| *p -= gain * s);
        }
        out.extend(predicted);
    }
    out
}

/// Scales every row to the norm `√dim`.
pub fn normalise(rows: &mut [f64], dim: usize) {
    for row in rows.chunks_exact_mut(dim) {
        let factor = (dim as f64 / squared_norm(row)).sqrt();
        row.iter_mut().for_each(|x| *x *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiments::random;
    use faer::linalg::solvers::Solve;

    fn pairs() -> Pairs {
        let mut rng = random::stream(11, 0);
        let (keys, values) = (random::normals(&mut rng, 30 * 4), random::normals(&mut rng, 30 * 3));
        Pairs { dim: 4, value_dim: 3, keys, values }
    }

    fn before(pairs: &Pairs, i: usize) -> Pairs {
        let (keys, values) = (pairs.keys[..i * 4].to_vec(), pairs.values[..i * 3].to_vec());
        Pairs { keys, values, ..*pairs }
    }

    fn assert_rows(out: &[f64], row: impl Fn(&Pairs, &[f64]) -> Vec<f64>) {
        let pairs = pairs();
        assert_eq!(out.len(), 30 * 3);
        for i in 1..30 {
            let expected = row(&before(&pairs, i), &pairs.keys[i * 4..][..4]);
            for (out, expected) in out[i * 3..][..3].iter().zip(expected) {
                assert!((out - expected).abs() < 1e-8, "position {i}: {out} against {expected}");
            }
        }
        assert_eq!(out[..3], [0.0; 3]);
    }

    #[test]
    fn recursive_least_squares_are_ridge_solves() {
        let out = Mixer::Mesa { ridge: 0.3 }.predict(&pairs()).unwrap();
        assert_rows(&out, |past, key| {
            let k = Mat::from_fn(past.len(), 4, |i, j| past.keys[i * 4 + j]);
            let v = Mat::from_fn(past.len(), 3, |i, j| past.values[i * 3 + j]);
            let mut gram = k.transpose() * &k;
            (0..4).for_each(|i| gram[(i, i)] += 0.3);
            let slope = gram.llt(faer::Side::Lower).unwrap().solve(k.transpose() * &v);
            (0..3).map(|e| (0..4).map(|a| key[a] * slope[(a, e)]).sum()).collect()
        });
    }

    #[test]
    fn linear_attention_is_its_weighted_mean() {
        let out = Mixer::Linear { scale: 0.7 }.predict(&pairs()).unwrap();
        assert_rows(&out, |past, key| {
            let phi = |x: f64| if x > 0.0 { 0.7 * x + 1.0 } else { (0.7 * x).exp() };
            let weight = |k: &[f64]| k.iter().zip(key).map(|(a, b)| phi(*a) * phi(*b)).sum::<f64>();
            let total: f64 = past.keys.chunks_exact(4).map(weight).sum();
            let rows = || past.keys.chunks_exact(4).zip(past.values.chunks_exact(3));
            (0..3).map(|e| rows().map(|(k, v)| weight(k) * v[e]).sum::<f64>() / total).collect()
        });
    }

    #[test]
    fn attention_reads_the_pairs_before() {
        let whole = |past: &Pairs, key: &[f64]| {
            let weights = Weights { scale: 0.4, bias: None, mask: Mask::full() };
            (past.local_constant(key, &weights).unwrap(), past.local_linear(key, &weights, &[0.2]).unwrap())
        };
        let softmax = Mixer::Softmax { scale: 0.4 }.predict(&pairs()).unwrap();
        assert_rows(&softmax, |past, key| whole(past, key).0);
        let lla = Mixer::Lla { scale: 0.4, ridge: 0.2 }.predict(&pairs()).unwrap();
        assert_rows(&lla, |past, key| whole(past, key).1.swap_remove(0));
    }

    #[test]
    fn every_mixer_has_parameters_to_choose_among() {
        for place in 0..NAMES.len() {
            assert!(Mixer::candidates(place, 16, true).len() > 4);
        }
    }
}
