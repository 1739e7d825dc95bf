//! Every golden case through the program, forward and backward, in every type.
//!
//! The cases come from `crates/flashlla/tests/golden` and, when it is there, from the folder `shared/golden` beside the
//! project.

mod common;
use common::{Bench, Contents, Tensor};
use half::{bf16, f16};
use std::path::{Path, PathBuf};

const RESULTS: [&str; 9] = ["out", "lse", "key_mean", "probe", "dq", "dk", "dv", "dridge", "dscale"];

fn cases() -> Vec<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [here.join("../flashlla/tests/golden"), here.join("../../../shared/golden")];
    let mut cases: Vec<PathBuf> = (folders.iter())
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flatten()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    cases.sort_by(|a, b| a.file_name().cmp(&b.file_name()));
    cases.dedup_by(|a, b| a.file_name() == b.file_name());
    assert!(!cases.is_empty(), "no golden cases in {folders:?}");
    cases
}

/// λ ≤ 0.1, or logits so large that their rounding in f32 shows.
fn is_hard(case: &Contents) -> bool {
    let (q, k) = (case.get("q"), case.get("k"));
    let d = q.shape[3];
    let longest = |t: &Tensor| {
        t.data.chunks(d).map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt()).fold(0.0, f64::max)
    };
    let scale: f64 = case.metadata["scale"].parse().unwrap();
    case.get("ridge").data.iter().any(|&ridge| ridge <= 0.1) || scale * longest(q) * longest(k) > 100.0
}

/// Runs the case in one type and holds what comes out against `truth(case)`.
fn hold(dtype: &str, truth: impl Fn(&Bench, Contents) -> Contents, limits: impl Fn(&Contents) -> (f64, f64)) {
    let mut worst = (0.0f64, String::new());
    for path in cases() {
        let case = Contents::read(&path);
        let bench = Bench::new();
        let got = bench.attend(&case, &["--backward", "--dtype", dtype]);
        let (for_out, for_gradients) = limits(&case);
        let truth = truth(&bench, case);
        for name in RESULTS {
            let error = got.get(name).error(truth.get(name));
            let limit = if name.starts_with('d') { for_gradients } else { for_out };
            let place = format!("{name} of {} in {dtype}", path.file_name().unwrap().display());
            // A gradient that is nothing but rounding (duplicate keys) is held to the size of the others.
            let negligible = got.get(name).error(&truth.get(name).map(|_| 0.0)).max(norm(truth.get(name)))
                <= limit * norm(truth.get("dv"));
            assert!(error <= limit || negligible, "{place}: error {error:e} above {limit:e}");
            if error > worst.0 && !negligible {
                worst = (error, place);
            }
        }
    }
    println!("worst: {:e}, {}", worst.0, worst.1);
}

fn norm(t: &Tensor) -> f64 {
    t.data.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn narrow_limits(case: &Contents) -> (f64, f64) {
    if is_hard(case) { (1e-3, 1e-3) } else { (3e-5, 1e-4) }
}

#[test]
fn f64_meets_the_golden_results() {
    hold("f64", |_, case| case, |_| (1e-9, 1e-9));
}

#[test]
fn f32_meets_the_golden_results() {
    hold("f32", |_, case| case, narrow_limits);
}

/// The results in f64 on inputs rounded as `--dtype` rounds them.
fn on_rounded(bench: &Bench, case: Contents, round: fn(f64) -> f64) -> Contents {
    let inputs = ["q", "k", "v", "grad_out"];
    let rounded = case.map(|name, tensor| if inputs.contains(&name) { tensor.map(round) } else { tensor });
    bench.attend(&rounded, &["--backward", "--dtype", "f64"])
}

#[test]
fn bf16_meets_f64_on_the_rounded_inputs() {
    hold("bf16", |b, case| on_rounded(b, case, |x| bf16::from_f64(x).to_f64()), narrow_limits);
}

#[test]
fn f16_meets_f64_on_the_rounded_inputs() {
    hold("f16", |b, case| on_rounded(b, case, |x| f16::from_f64(x).to_f64()), narrow_limits);
}
