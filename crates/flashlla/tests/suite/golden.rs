//! Cases whose outputs and gradients were computed by another program: dense `float64` and automatic differentiation.
//!
//! The smaller ones are kept in `tests/golden`. All of them are in the folder `shared/golden` beside the project, where
//! that exists; set `FLASHLLA_REQUIRE_SHARED` to have its absence fail the test.

use crate::common::*;

/// The duplicates of a case's keys leave nothing of its probe's gradients but rounding, hence the floors of `f32`.
fn check(case: &Golden, what: &str, got: &Results, tolerance: Tolerance) -> Vec<String> {
    let want = Results {
        dbias: None,
        dprobe: None,
        solve: Default::default(),
        second_solve: Default::default(),
        ..case.results()
    };
    disagreements(&case.attention, &case.data, got, &want, tolerance)
        .into_iter()
        .map(|line| format!("{} {what}: {line}", case.name))
        .collect()
}

#[test]
fn golden_cases_in_f64() {
    let mut failures = vec![];
    for case in Golden::all() {
        for engine in AnyEngine::exact() {
            let got = run::<f64>(engine, &case.attention, &case.data);
            let tolerance = Tolerance::promised(Dtype::F64, case.hard);
            failures.extend(check(&case, &format!("{engine:?}"), &got, tolerance));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn golden_cases_in_f32() {
    let mut failures = vec![];
    for case in Golden::all() {
        for engine in AnyEngine::exact() {
            let got = run::<f32>(engine, &case.attention, &case.data);
            let tolerance = Tolerance::promised(Dtype::F32, case.hard);
            failures.extend(check(&case, &format!("{engine:?}"), &got, tolerance));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Inputs of 16 bits: held against the reference on the rounded inputs.
#[test]
fn golden_cases_in_half_precision() {
    let mut failures = vec![];
    for case in Golden::all() {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let mut data = case.data.clone();
            for tensor in [&mut data.q, &mut data.k, &mut data.v, &mut data.grad_out] {
                *tensor = match dtype {
                    Dtype::Bf16 => cast(&cast::<flashlla::bf16>(tensor)),
                    _ => cast(&cast::<flashlla::f16>(tensor)),
                };
            }
            let want = run::<f64>(AnyEngine::reference(), &case.attention, &data);
            let got = run_as(dtype, AnyEngine::cpu(), &case.attention, &data);
            let tolerance = Tolerance::promised(dtype, case.hard);
            let lines = disagreements(&case.attention, &data, &got, &want, tolerance);
            failures.extend(lines.into_iter().map(|line| format!("{} {dtype:?}: {line}", case.name)));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The paper's form gives the same within what its denominator leaves of the digits.
#[test]
fn golden_cases_in_the_papers_form() {
    for case in Golden::all() {
        if case.hard {
            continue;
        }
        let got = run::<f64>(AnyEngine::uncentred(), &case.attention, &case.data);
        let failures = check(&case, "uncentred", &got, Tolerance { out: 1e-9, gradient: 1e-8 });
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }
}
