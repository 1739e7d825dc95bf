//! Comparisons by relative Frobenius error, in which NaN never passes.

use super::{Data, Dtype, Results};
use flashlla::{Attention, Tensor};

/// The largest relative errors allowed.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    /// Of out, lse and key_mean.
    pub out: f64,
    /// Of the probe and of every gradient.
    pub gradient: f64,
}

impl Tolerance {
    /// What the library promises: see the table in the crate's documentation.
    pub fn promised(dtype: Dtype, small_ridge_or_large_logits: bool) -> Self {
        match (dtype, small_ridge_or_large_logits) {
            (Dtype::F64, _) => Self { out: 1e-9, gradient: 1e-9 },
            (_, false) => Self { out: 3e-5, gradient: 1e-4 },
            (_, true) => Self { out: 3e-5, gradient: 1e-3 },
        }
    }

    /// What is promised for any description. With fewer keys than dimensions and a small λ the probe is as large as
    /// `|k̄ − q| / λ`, of which single precision resolves `ε |x| |k|`: more than the golden cases with small λ show.
    pub fn of(dtype: Dtype, attention: &Attention) -> Self {
        let ridge = smallest_ridge(attention);
        let hard = ridge <= 0.1;
        // `|x| |k|` is about D / λ on normal data. From 512 on a forward is done again in double precision, a backward is not; below,
        // ε times it and a few roundings may be what is left of four numbers.
        let far = attention.head_dim() as f64 / ridge > 256.0;
        let promised = Self::promised(dtype, hard);
        match dtype {
            Dtype::F64 => promised,
            _ if hard => Self { out: 1e-3, ..promised },
            _ if far => Self { out: 1e-4, gradient: Self::promised(dtype, true).gradient },
            _ => promised,
        }
    }

    pub fn times(self, factor: f64) -> Self {
        Self { out: self.out * factor, gradient: self.gradient * factor }
    }

    fn for_name(&self, name: &str) -> f64 {
        if matches!(name, "out" | "lse" | "key_mean") { self.out } else { self.gradient }
    }
}

fn smallest_ridge(attention: &Attention) -> f64 {
    attention.ridge().values().iter().copied().fold(f64::INFINITY, f64::min)
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// `|got − want| / max(|want|, floor)`; infinite when anything is NaN or infinite on one side only.
pub fn relative_error(got: &[f64], want: &[f64], floor: f64) -> f64 {
    assert_eq!(got.len(), want.len());
    let (mut difference, mut size) = (0.0, 0.0);
    for (&g, &w) in got.iter().zip(want) {
        if g == w && w.is_infinite() {
            continue; // lse of a query that sees no key
        }
        difference += (g - w) * (g - w);
        size += w * w;
    }
    let (difference, size) = (f64::sqrt(difference), f64::sqrt(size).max(floor));
    match difference / size {
        _ if difference == 0.0 => 0.0,
        error if error.is_nan() => f64::INFINITY,
        error => error,
    }
}

#[track_caller]
pub fn assert_close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_near(what, got, want, 0.0, tolerance);
}

/// Errors count from a floor on, as in [`relative_error`].
#[track_caller]
pub fn assert_near(what: &str, got: &[f64], want: &[f64], floor: f64, tolerance: f64) {
    let error = relative_error(got, want, floor);
    assert!(
        error <= tolerance,
        "{what}: relative error {error:.3e} > {tolerance:.1e}\ngot  {got:?}\nwant {want:?}"
    );
}

/// The size below which a result counts as zero up to rounding: a hundredth of what it would be if nothing in its sum
/// cancelled. It matters only for degenerate problems (a single visible key has no gradient but `dv`).
fn floor(name: &str, attention: &Attention, data: &Data, want: &Results) -> f64 {
    let rms = |t: &Tensor<f64>| {
        norm(&t.data().iter().copied().filter(|x| x.is_finite()).collect::<Vec<_>>())
            / (t.data().len().max(1) as f64).sqrt()
    };
    let (d, dv) = ((attention.head_dim() as f64).sqrt(), (attention.value_dim() as f64).sqrt());
    let rows = ((attention.batch() * attention.heads() * attention.queries()) as f64).sqrt();
    let (q, k, v) = (rms(&data.q) * d, rms(&data.k) * d, rms(&data.v) * dv);
    // |γ_j| = |g·v_j| and |y| = |A⁻¹ c|
    let gamma = rms(&data.grad_out) * v;
    let (probe, y) = (rms(&want.probe) * d, gamma * k / smallest_ridge(attention));
    let scale = attention.scale().abs();
    // a_j = 1 − (k_j − k̄)·x
    let a = 1.0 + rms(&data.k) * probe;
    0.01 * rows
        * match name {
            "out" => v * a,
            "lse" => 1.0 + scale * q * rms(&data.k),
            "key_mean" => k,
            "probe" => (q + k) / smallest_ridge(attention),
            "dq" => y + scale * gamma * k,
            "dk" => y + gamma * (scale * q + probe),
            "dv" => rms(&data.grad_out) * dv,
            "dridge" => probe * y / d,
            // One number for all rows, keys and dimensions: a hundredth would ask single precision for 17 units in the last place of its terms,
            // and sharp weights took 18.
            "dscale" => 3.0 * gamma * a * q * rms(&data.k),
            "dbias" => gamma * a,
            "dprobe" => gamma * k,
            _ => unreachable!("{name}"),
        }
}

fn error_of(
    name: &str,
    got: &Tensor<f64>,
    want: &Tensor<f64>,
    attention: &Attention,
    data: &Data,
    all: &Results,
) -> f64 {
    relative_error(got.data(), want.data(), floor(name, attention, data, all))
}

/// The relative error of every result, with the floors that [`disagreements`] has; infinite where shapes differ.
#[allow(dead_code)] // for the tests on a GPU, a program of their own
pub fn errors(attention: &Attention, data: &Data, got: &Results, want: &Results) -> Vec<(&'static str, f64)> {
    let pairs = got.named().into_iter().zip(want.named());
    pairs
        .map(|((name, got), (want_name, want_tensor))| {
            let fits = name == want_name && got.shape() == want_tensor.shape();
            let error =
                if fits { error_of(name, got, want_tensor, attention, data, want) } else { f64::INFINITY };
            (name, error)
        })
        .collect()
}

/// Where two sets of results differ by more than the tolerance, one line each.
pub fn disagreements(
    attention: &Attention,
    data: &Data,
    got: &Results,
    want: &Results,
    tolerance: Tolerance,
) -> Vec<String> {
    let mut lines = vec![];
    let (got_names, want_names) = (got.named(), want.named());
    if got_names.len() != want_names.len() {
        lines.push(format!("{} results instead of {}", got_names.len(), want_names.len()));
    }
    for ((name, got), (want_name, want_tensor)) in got_names.into_iter().zip(want_names) {
        assert_eq!(name, want_name);
        if got.shape() != want_tensor.shape() {
            lines.push(format!("{name}: shape {:?} instead of {:?}", got.shape(), want_tensor.shape()));
            continue;
        }
        let error = error_of(name, got, want_tensor, attention, data, want);
        let allowed = tolerance.for_name(name);
        if error > allowed {
            let worst = worst(got, want_tensor);
            lines.push(format!("{name}: relative error {error:.3e} > {allowed:.1e}; worst {worst}"));
        }
    }
    lines
}

fn worst(got: &Tensor<f64>, want: &Tensor<f64>) -> String {
    let difference = |i: usize| {
        let (g, w) = (got.data()[i], want.data()[i]);
        if g == w {
            0.0
        } else if (g - w).is_nan() {
            f64::INFINITY
        } else {
            (g - w).abs()
        }
    };
    let Some(worst) = (0..got.data().len()).max_by(|&i, &j| difference(i).total_cmp(&difference(j))) else {
        return "none".into();
    };
    let mut index = vec![0; got.shape().len()];
    let mut rest = worst;
    for (place, &size) in index.iter_mut().zip(got.shape()).rev() {
        *place = rest % size;
        rest /= size;
    }
    format!("at {index:?} of {:?}: {:e} instead of {:e}", got.shape(), got.data()[worst], want.data()[worst])
}

#[track_caller]
pub fn assert_results(
    what: &str,
    attention: &Attention,
    data: &Data,
    got: &Results,
    want: &Results,
    tolerance: Tolerance,
) {
    let lines = disagreements(attention, data, got, want, tolerance);
    assert!(lines.is_empty(), "{what}\n  {}\n  {attention:?}", lines.join("\n  "));
}
