//! The covariance form (the crate's documentation derives it), written to be read beside the equations.

use super::{Output, Row, RowGradients, add_scaled, dot, solve};

/// The quantities that forward and backward share.
struct Fit {
    lse: f64,
    /// `p_j`, which sum to 1.
    p: Vec<f64>,
    /// `k̄ = Σ p_j k_j`
    key_mean: Vec<f64>,
    /// `k_j − k̄`
    centred: Vec<Vec<f64>>,
    /// `A = C + λI`, `C = Σ p_j (k_j − k̄)(k_j − k̄)ᵀ`
    matrix: faer::Mat<f64>,
    /// `x = A⁻¹ (k̄ − q)`
    x: Vec<f64>,
    /// `a_j = 1 − (k_j − k̄)·x`
    a: Vec<f64>,
}

fn fit(row: &Row) -> Fit {
    let dim = row.q.len();
    let lse = row.lse();
    let p: Vec<f64> = row.logits.iter().map(|s| (s - lse).exp()).collect();

    let mut key_mean = vec![0.0; dim];
    for (p_j, k_j) in p.iter().zip(&row.k) {
        add_scaled(&mut key_mean, *p_j, k_j);
    }
    let centred: Vec<Vec<f64>> =
        row.k.iter().map(|k_j| k_j.iter().zip(&key_mean).map(|(k, m)| k - m).collect()).collect();

    let mut matrix = faer::Mat::zeros(dim, dim);
    for (p_j, c_j) in p.iter().zip(&centred) {
        for col in 0..dim {
            add_scaled(matrix.col_as_slice_mut(col), p_j * c_j[col], c_j);
        }
    }
    for i in 0..dim {
        matrix[(i, i)] += row.ridge;
    }

    let x = row.probe.clone().unwrap_or_else(|| {
        let delta: Vec<f64> = key_mean.iter().zip(&row.q).map(|(m, q)| m - q).collect();
        solve(&matrix, &delta)
    });
    let a = centred.iter().map(|c_j| 1.0 - dot(c_j, &x)).collect();
    Fit { lse, p, key_mean, centred, matrix, x, a }
}

/// `out = Σ p_j a_j v_j`
pub(super) fn forward(row: &Row) -> Output {
    let fit = fit(row);
    let mut out = vec![0.0; row.v[0].len()];
    for (j, v_j) in row.v.iter().enumerate() {
        add_scaled(&mut out, fit.p[j] * fit.a[j], v_j);
    }
    Output { out, lse: fit.lse, key_mean: fit.key_mean, probe: fit.x }
}

/// The gradients of `g·out`.
pub(super) fn backward(row: &Row, g: &[f64]) -> RowGradients {
    let Fit { p, centred, matrix, x, a, .. } = fit(row);
    let dim = x.len();

    // γ_j = g·v_j and its mean γ̄ = g·v̄
    let gamma: Vec<f64> = row.v.iter().map(|v_j| dot(g, v_j)).collect();
    let gamma_mean = dot(&p, &gamma);

    // c = Σ p_j (γ_j − γ̄)(k_j − k̄),  y = A⁻¹ c. A given probe does not depend on the keys: y = 0.
    let mut c = vec![0.0; dim];
    for j in 0..p.len() {
        add_scaled(&mut c, p[j] * (gamma[j] - gamma_mean), &centred[j]);
    }
    let given = row.probe.is_some();
    let y = if given { vec![0.0; dim] } else { solve(&matrix, &c) };

    // e_j = γ_j − γ̄ − (k_j − k̄)·y,  m = Σ p_j e_j a_j ( = −λ x·y when x and y are solved for)
    let e: Vec<f64> = (0..p.len()).map(|j| gamma[j] - gamma_mean - dot(&centred[j], &y)).collect();
    let m: f64 = (0..p.len()).map(|j| p[j] * e[j] * a[j]).sum();

    // ds_j = p_j (e_j a_j − m)
    let ds: Vec<f64> = (0..p.len()).map(|j| p[j] * (e[j] * a[j] - m)).collect();

    // dq = y + scale Σ ds_j k_j,  dscale = Σ ds_j (q·k_j)
    let mut dq = y.clone();
    let mut dscale = 0.0;
    for (ds_j, k_j) in ds.iter().zip(&row.k) {
        add_scaled(&mut dq, row.scale * ds_j, k_j);
        dscale += ds_j * dot(&row.q, k_j);
    }

    // dk_j = scale ds_j q − p_j e_j x − p_j a_j y,  dv_j = p_j a_j g
    let (mut dk, mut dv) = (vec![], vec![]);
    for j in 0..p.len() {
        let mut dk_j = vec![0.0; dim];
        add_scaled(&mut dk_j, row.scale * ds[j], &row.q);
        add_scaled(&mut dk_j, -p[j] * e[j], &x);
        add_scaled(&mut dk_j, -p[j] * a[j], &y);
        dk.push(dk_j);
        dv.push(g.iter().map(|g| p[j] * a[j] * g).collect());
    }

    // dλ = x·y; and of a given probe, −c. dk above misses nothing: with y = 0 its terms are those of the fixed x.
    let dridge = if given { 0.0 } else { dot(&x, &y) };
    let dprobe = c.iter().map(|c| -c).collect();
    RowGradients { dq, dk, dv, dlogits: ds, dridge, dscale, dprobe }
}
