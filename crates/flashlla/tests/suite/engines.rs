//! Engines against the dense reference: random descriptions, sizes around the edges of tiles, solvers, precision.

use crate::common::*;
use flashlla::{Attention, Mask, Precision, Ridge, Solver};
use proptest::prelude::*;

/// Every storage type that holds the case's numbers, against the reference in `f64`.
fn agrees(engine: AnyEngine, case: &Case) {
    let (attention, data) = (case.attention(), case.data());
    let want = run::<f64>(AnyEngine::reference(), &attention, &data);
    for &dtype in case.grid.dtypes() {
        let got = run_as(dtype, engine, &attention, &data);
        let tolerance = Tolerance::of(dtype, &attention);
        assert_results(&format!("{engine:?} in {dtype:?}"), &attention, &data, &got, &want, tolerance);
    }
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn the_cpu_engine_agrees_with_the_reference(case in case(8_000_000)) {
        agrees(AnyEngine::cpu(), &case);
    }
}

proptest! {
    #![proptest_config(cases(60))]

    /// The paper's form loses digits to its denominator, so it is held to fewer; the tolerance grows with `1/λ`.
    #[test]
    fn the_papers_form_agrees_with_the_covariance_form(mut case in case(2_000_000)) {
        case.probe = false;
        case.ridge = case.ridge.max(0.5);
        let (attention, data) = (case.attention(), case.data());
        let want = run::<f64>(AnyEngine::reference(), &attention, &data);
        let got = run::<f64>(AnyEngine::uncentred(), &attention, &data);
        let tolerance = Tolerance { out: 1e-8, gradient: 1e-7 };
        assert_results("uncentred", &attention, &data, &got, &want, tolerance);
    }
}

#[test]
fn every_size_around_a_tile_agrees_with_the_reference() {
    for (place, tokens) in TILE_EDGES.into_iter().enumerate() {
        // Masks and dimensions go round, so that each meets many sizes; not multiples of each other's periods.
        let masks = [
            Mask::causal(),
            Mask::full(),
            Mask::causal().window(1 + tokens / 3),
            Mask::causal().leave_one_out(),
            Mask::full().window(1 + tokens / 2),
        ];
        for (turn, mask) in masks.into_iter().enumerate() {
            let case = Case {
                batch: 1,
                kv_heads: 1,
                group: 1 + (place + turn) % 2,
                queries: tokens,
                keys: tokens,
                head_dim: [1, 2, 3, 5, 8, 9, 4][(place + turn) % 7],
                value_dim: [7, 1, 16, 17, 3, 33][(place + 2 * turn) % 6],
                mask,
                scale: 1.0,
                ridge: 1.0,
                ridge_kind: RidgeKind::Scalar,
                bias: (turn % 2 == 1).then_some(Bias { batched: false, heads: 2 }),
                probe: false,
                grid: [Grid::F32, Grid::Half][turn % 2],
                seed: (place * 10 + turn) as u64,
            };
            agrees(AnyEngine::cpu(), &case);
        }
    }
}

#[test]
fn every_head_dim_agrees_with_the_reference() {
    for dim in 1..=256usize {
        let case = Case {
            batch: 1,
            kv_heads: 1,
            group: 1,
            queries: 2,
            keys: 9,
            head_dim: dim,
            value_dim: 1 + (dim * 83) % 256,
            mask: Mask::causal().q_offset(7),
            scale: 1.0,
            ridge: 0.5,
            ridge_kind: RidgeKind::Scalar,
            bias: None,
            probe: dim % 3 == 0,
            grid: Grid::F32,
            seed: dim as u64,
        };
        agrees(AnyEngine::cpu(), &case);
    }
}

#[test]
fn windows_that_start_and_end_inside_tiles_agree_with_the_reference() {
    let long = |mask: Mask, queries: usize, keys: usize, seed: u64| Case {
        batch: 1,
        kv_heads: 1,
        group: 2,
        queries,
        keys,
        head_dim: 6,
        value_dim: 5,
        mask,
        scale: 1.0,
        ridge: 0.8,
        ridge_kind: RidgeKind::PerQuery,
        bias: None,
        probe: false,
        grid: Grid::Half,
        seed,
    };
    for window in [1, 2, 47, 48, 49, 63, 64, 65, 127, 128, 129, 200, 400] {
        agrees(AnyEngine::cpu(), &long(Mask::causal().window(window), 260, 260, window as u64));
        agrees(AnyEngine::cpu(), &long(Mask::full().window(window).leave_one_out(), 140, 260, window as u64));
    }
    for offset in [-260, -129, -128, -65, -1, 1, 63, 64, 100, 128, 129, 259, 300, 500] {
        agrees(AnyEngine::cpu(), &long(Mask::causal().q_offset(offset), 200, 260, 7));
        agrees(
            AnyEngine::cpu(),
            &long(Mask::causal().window(70).q_offset(offset).leave_one_out(), 200, 260, 8),
        );
    }
    // Sequences of every kind of length, some empty, more than one in a tile and some over several.
    let lengths = [0, 1, 2, 0, 0, 61, 64, 1, 65, 0, 128, 3, 127, 5, 0, 48, 8, 0];
    let mut cu = vec![0];
    cu.extend(lengths.iter().scan(0, |sum, length| {
        *sum += length;
        Some(*sum)
    }));
    let keys = cu[cu.len() - 1];
    for mask in [Mask::full(), Mask::causal(), Mask::causal().window(50), Mask::causal().leave_one_out()] {
        let mask = mask.cu_seqlens(cu.clone());
        agrees(AnyEngine::cpu(), &long(mask.clone(), keys, keys, 9));
        agrees(AnyEngine::cpu(), &long(mask.q_offset(37), 170, keys, 10));
    }
}

fn problem(queries: usize, head_dim: usize, ridge: f64, seed: u64) -> Case {
    Case {
        batch: 1,
        kv_heads: 2,
        group: 2,
        queries,
        keys: queries,
        head_dim,
        value_dim: head_dim + 3,
        mask: Mask::causal(),
        scale: 1.0,
        ridge,
        ridge_kind: RidgeKind::Scalar,
        bias: None,
        probe: false,
        grid: Grid::F32,
        seed,
    }
}

/// `|δ − A x| / |δ|` of every query, with everything but `x` computed densely.
fn true_residuals(attention: &Attention, data: &Data, got: &Results) -> Vec<f64> {
    let d = attention.head_dim();
    let mut residuals = vec![];
    for h in 0..attention.heads() {
        for i in 0..attention.queries() {
            let visible: Vec<usize> = attention.mask().visible(i, attention.keys()).iter().collect();
            let row = |t: &flashlla::Tensor<f64>, h: usize, i: usize| -> Vec<f64> {
                (0..d).map(|e| t.view().at(0, h, i, e)).collect()
            };
            let (q, x) = (row(&data.q, h, i), row(&got.probe, h, i));
            let keys: Vec<Vec<f64>> =
                visible.iter().map(|&j| row(&data.k, h / attention.group(), j)).collect();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let logits: Vec<f64> = keys.iter().map(|k| attention.scale() * dot(&q, k)).collect();
            let total: f64 = logits.iter().map(|s| s.exp()).sum();
            let p: Vec<f64> = logits.iter().map(|s| s.exp() / total).collect();
            let mean: Vec<f64> = (0..d).map(|e| p.iter().zip(&keys).map(|(p, k)| p * k[e]).sum()).collect();
            let alpha: Vec<f64> = keys.iter().map(|k| dot(k, &x) - dot(&mean, &x)).collect();
            let ridge = attention.ridge().at(0, h, i);
            let (mut residual, mut delta) = (0.0, 0.0);
            for e in 0..d {
                let ax: f64 = (0..p.len()).map(|j| p[j] * alpha[j] * (keys[j][e] - mean[e])).sum::<f64>()
                    + ridge * x[e];
                residual += (mean[e] - q[e] - ax).powi(2);
                delta += (mean[e] - q[e]).powi(2);
            }
            residuals.push((residual / delta).sqrt());
        }
    }
    residuals
}

#[test]
fn solvers_agree() {
    for (queries, head_dim, ridge) in [(70, 16, 1.0), (130, 24, 10.0), (97, 9, 0.2), (33, 40, 3.0)] {
        let case = problem(queries, head_dim, ridge, 3);
        let data = case.data();
        let want = run::<f64>(AnyEngine::reference(), &case.attention(), &data);
        for (dtype, tolerance) in [(Dtype::F64, 1e-13), (Dtype::F32, 5e-7)] {
            let solvers = [
                Solver::Cg { tolerance, max_iters: 500 },
                Solver::Direct,
                Solver::Auto { tolerance: Some(tolerance), max_iters: None },
                Solver::Auto { tolerance: Some(tolerance), max_iters: Some(1) },
                Solver::default(),
            ];
            for solver in solvers {
                let attention = case.builder().solver(solver).build().unwrap();
                let got = run_as(dtype, AnyEngine::cpu(), &attention, &data);
                let allowed = Tolerance::of(dtype, &attention);
                assert_results(&format!("{solver:?} {dtype:?}"), &attention, &data, &got, &want, allowed);
                for solve in [&got.solve, &got.second_solve] {
                    let rows = attention.heads() * attention.queries();
                    assert_eq!((solve.iterations.len(), solve.residual.len()), (rows, rows));
                    assert!(
                        solve.worst_residual() <= 2.0 * tolerance.max(1e-6) as f32,
                        "{solver:?} {dtype:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_residual_that_is_reported_is_true() {
    let case = problem(96, 24, 0.5, 11);
    let data = case.data();
    for tolerance in [1e-1, 1e-2, 1e-4] {
        let attention = case.builder().solver(Solver::Cg { tolerance, max_iters: 200 }).build().unwrap();
        let got = run::<f32>(AnyEngine::cpu(), &attention, &data);
        let residuals = true_residuals(&attention, &data, &got);
        let worst = residuals.iter().copied().fold(0.0, f64::max);
        assert!(worst <= 1.01 * tolerance + 1e-5, "asked for {tolerance}, got {worst}");
        for (i, (reported, found)) in got.solve.residual.iter().zip(&residuals).enumerate() {
            let close = (f64::from(*reported) - found).abs() <= 0.02 * found + 1e-5;
            assert!(close, "row {i}: reported {reported}, found {found}");
        }
    }
}

#[test]
fn conjugate_gradients_take_the_steps_asked_for() {
    let case = problem(64, 32, 0.05, 5);
    let data = case.data();
    let with = |tolerance, max_iters| {
        let attention = case.builder().solver(Solver::Cg { tolerance, max_iters }).build().unwrap();
        run::<f32>(AnyEngine::cpu(), &attention, &data).solve
    };
    let (short, loose, tight) = (with(1e-5, 2), with(1e-1, 300), with(1e-5, 300));
    if short.direct > 0 {
        return; // An engine that solves directly whatever it is asked has no steps to count.
    }
    assert_eq!(short.max_iterations(), 2);
    assert!(short.worst_residual() > 1e-5);
    assert!(loose.max_iterations() < tight.max_iterations(), "{loose:?} {tight:?}");
    assert!(tight.worst_residual() <= 1e-5);
}

#[test]
fn the_direct_solver_counts_its_queries() {
    let case = problem(50, 8, 1.0, 6);
    let attention = case.builder().solver(Solver::Direct).build().unwrap();
    let got = run::<f32>(AnyEngine::cpu(), &attention, &case.data());
    assert_eq!((got.solve.direct, got.solve.max_iterations()), (200, 0));
}

#[test]
fn high_precision_is_nearer_than_standard() {
    for ridge in [10.0, 0.3, 0.02] {
        let case = problem(150, 32, ridge, 21);
        let data = case.data();
        let want = run::<f64>(AnyEngine::reference(), &case.attention(), &data);
        let error = |precision| {
            let attention = case.builder().precision(precision).ridge(Ridge::scalar(ridge)).build().unwrap();
            let got = run::<f32>(AnyEngine::cpu(), &attention, &data);
            ["out", "dq", "dk", "dv"]
                .map(|name| relative_error(got.get(name).data(), want.get(name).data(), 0.0))
        };
        let (high, standard) = (error(Precision::High), error(Precision::Standard));
        for (turn, (high, standard)) in high.into_iter().zip(standard).enumerate() {
            // Results are rounded to f32; the gradients start from a state that was, too.
            let limit = if turn == 0 { 1e-7 } else { 1e-6 };
            assert!(high <= standard && high < limit, "λ = {ridge}: high {high:e}, standard {standard:e}");
        }
    }
}
