//! The paper's uncentred form: `z_j = k_j − q`, and a quotient whose denominator comes close to 0.
//!
//! Its gradients are those of the formulas as they stand, one step back at a time, so that they are a derivation of their
//! own rather than the covariance form in disguise.

use super::{Output, Row, RowGradients, add_scaled, dot, solve};

struct Fit {
    max: f64,
    /// `w_j = exp(s_j − max s)`
    w: Vec<f64>,
    /// `ω = Σ w_j`
    omega: f64,
    /// `z_j = k_j − q`
    z: Vec<Vec<f64>>,
    /// `μ = Σ w_j z_j`
    mu: Vec<f64>,
    /// `Σ = Σ w_j z_j z_jᵀ + λ ω I`
    sigma: faer::Mat<f64>,
    /// `ρ = Σ⁻¹ μ`
    rho: Vec<f64>,
    /// `a_j = 1 − z_j·ρ`
    a: Vec<f64>,
    /// `Δ = ω − μ·ρ`, moved away from 0 by `delta_eps`
    delta: f64,
}

fn fit(row: &Row, delta_eps: f64) -> Fit {
    let dim = row.q.len();
    let max = row.logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let w: Vec<f64> = row.logits.iter().map(|s| (s - max).exp()).collect();
    let omega: f64 = w.iter().sum();
    let z: Vec<Vec<f64>> =
        row.k.iter().map(|k_j| k_j.iter().zip(&row.q).map(|(k, q)| k - q).collect()).collect();
    let mut mu = vec![0.0; dim];
    let mut sigma = faer::Mat::zeros(dim, dim);
    for (w_j, z_j) in w.iter().zip(&z) {
        add_scaled(&mut mu, *w_j, z_j);
        for col in 0..dim {
            add_scaled(sigma.col_as_slice_mut(col), w_j * z_j[col], z_j);
        }
    }
    for i in 0..dim {
        sigma[(i, i)] += row.ridge * omega;
    }
    let rho = solve(&sigma, &mu);
    let a = z.iter().map(|z_j| 1.0 - dot(z_j, &rho)).collect();
    let delta = omega - dot(&mu, &rho);
    let delta = delta + delta_eps * delta.signum();
    Fit { max, w, omega, z, mu, sigma, rho, a, delta }
}

/// `out = Σ w_j a_j v_j / Δ`
pub(super) fn forward(row: &Row, delta_eps: f64) -> Output {
    let Fit { max, w, omega, mu, rho, a, delta, .. } = fit(row, delta_eps);
    let mut out = vec![0.0; row.v[0].len()];
    for (j, v_j) in row.v.iter().enumerate() {
        add_scaled(&mut out, w[j] * a[j] / delta, v_j);
    }
    // In the covariance form's terms: k̄ = q + μ/ω, and x = ρ / (1 − (k̄ − q)·ρ).
    let key_mean: Vec<f64> = row.q.iter().zip(&mu).map(|(q, mu)| q + mu / omega).collect();
    let share = 1.0 - dot(&mu, &rho) / omega;
    Output { out, lse: max + omega.ln(), key_mean, probe: rho.iter().map(|r| r / share).collect() }
}

/// The gradients of `g·out`, backwards through the formulas above. `d_name` is the gradient at `name`.
pub(super) fn backward(row: &Row, g: &[f64], delta_eps: f64) -> RowGradients {
    let Fit { w, omega, z, mu, sigma, rho, a, delta, .. } = fit(row, delta_eps);
    let (dim, n) = (rho.len(), w.len());
    let gamma: Vec<f64> = row.v.iter().map(|v_j| dot(g, v_j)).collect();
    let loss: f64 = (0..n).map(|j| w[j] * a[j] * gamma[j] / delta).sum();

    // out = Σ w_j a_j v_j / Δ
    let mut d_w: Vec<f64> = (0..n).map(|j| a[j] * gamma[j] / delta).collect();
    let d_a: Vec<f64> = (0..n).map(|j| w[j] * gamma[j] / delta).collect();
    let d_delta = -loss / delta;
    let dv = (0..n).map(|j| g.iter().map(|g| w[j] * a[j] / delta * g).collect()).collect();

    // a_j = 1 − z_j·ρ
    let mut d_rho = vec![0.0; dim];
    let mut d_z = vec![vec![0.0; dim]; n];
    for j in 0..n {
        add_scaled(&mut d_rho, -d_a[j], &z[j]);
        add_scaled(&mut d_z[j], -d_a[j], &rho);
    }

    // Δ = ω − μ·ρ
    let mut d_omega = d_delta;
    let mut d_mu: Vec<f64> = rho.iter().map(|r| -d_delta * r).collect();
    add_scaled(&mut d_rho, -d_delta, &mu);

    // ρ = Σ⁻¹ μ: d_μ += u, d_Σ = −u ρᵀ with u = Σ⁻¹ d_ρ
    let u = solve(&sigma, &d_rho);
    add_scaled(&mut d_mu, 1.0, &u);

    // Σ = Σ w_j z_j z_jᵀ + λ ω I
    for j in 0..n {
        let (uz, rz) = (dot(&u, &z[j]), dot(&rho, &z[j]));
        d_w[j] -= uz * rz;
        add_scaled(&mut d_z[j], -w[j] * rz, &u);
        add_scaled(&mut d_z[j], -w[j] * uz, &rho);
    }
    let trace = -dot(&u, &rho);
    let dridge = omega * trace;
    d_omega += row.ridge * trace;

    // μ = Σ w_j z_j and ω = Σ w_j
    for j in 0..n {
        d_w[j] += dot(&d_mu, &z[j]) + d_omega;
        add_scaled(&mut d_z[j], w[j], &d_mu);
    }

    // w_j = exp(s_j − max), s_j = scale q·k_j + b_j, z_j = k_j − q
    let mut dq = vec![0.0; dim];
    let mut dk = d_z;
    let mut dscale = 0.0;
    let dlogits: Vec<f64> = (0..n).map(|j| w[j] * d_w[j]).collect();
    for j in 0..n {
        add_scaled(&mut dq, -1.0, &dk[j]);
        add_scaled(&mut dq, row.scale * dlogits[j], &row.k[j]);
        add_scaled(&mut dk[j], row.scale * dlogits[j], &row.q);
        dscale += dlogits[j] * dot(&row.q, &row.k[j]);
    }
    RowGradients { dq, dk, dv, dlogits, dridge, dscale, dprobe: vec![0.0; dim] }
}
