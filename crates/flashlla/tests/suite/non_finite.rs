//! NaN, infinities and extreme numbers: they reach the queries that see them and nothing else, in bounded time.

use crate::common::*;
use flashlla::{Attention, Mask, Solver, Tensor};
use proptest::prelude::*;
use std::time::Duration;

/// Runs on a thread of its own and fails when that takes too long.
fn within<R: Send + 'static>(limit: Duration, work: impl FnOnce() -> R + Send + 'static) -> R {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || send.send(work()));
    receive.recv_timeout(limit).expect("done in time, without a panic")
}

/// Which rows along the last axis hold something that is not finite.
fn bad_rows(tensor: &Tensor<f64>) -> Vec<bool> {
    let width = if tensor.shape().len() == 4 { tensor.shape()[3] } else { 1 };
    tensor.data().chunks(width).map(|row| row.iter().any(|x| !x.is_finite())).collect()
}

fn blank(tensor: &mut Tensor<f64>, rows: &[bool]) {
    let width = if tensor.shape().len() == 4 { tensor.shape()[3] } else { 1 };
    for (row, _) in tensor.data_mut().chunks_mut(width).zip(rows).filter(|(_, bad)| **bad) {
        row.fill(0.0);
    }
}

/// Holds poisoned results against the dense ones: the same rows not finite, the others equal.
fn assert_poisoned(
    what: &str,
    attention: &Attention,
    data: &Data,
    mut got: Results,
    mut want: Results,
    tolerance: Tolerance,
) {
    let affected = bad_rows(&want.out);
    for name in ["out", "dq", "dk", "dv", "dridge", "dscale", "dbias", "dprobe"] {
        if !want.named().iter().any(|(n, _)| *n == name) {
            continue;
        }
        let (got_rows, want_rows) = (bad_rows(got.get(name)), bad_rows(want.get(name)));
        let different: Vec<usize> = (0..got_rows.len()).filter(|&i| got_rows[i] != want_rows[i]).collect();
        assert!(
            different.is_empty(),
            "{what}: {name} of shape {:?} is finite where it should not be, or not where it should, in rows {different:?}; \
             not finite: got {:?}, want {:?}\n{attention:?}",
            got.get(name).shape(),
            (0..got_rows.len()).filter(|&i| got_rows[i]).collect::<Vec<_>>(),
            (0..got_rows.len()).filter(|&i| want_rows[i]).collect::<Vec<_>>(),
        );
    }
    for results in [&mut got, &mut want] {
        // What a forward says of an affected query beside its output may be anything.
        for tensor in [&mut results.out, &mut results.lse, &mut results.key_mean, &mut results.probe] {
            blank(tensor, &affected);
        }
        for tensor in
            [&mut results.dq, &mut results.dk, &mut results.dv, &mut results.dridge, &mut results.dscale]
                .into_iter()
                .chain(results.dbias.as_mut())
                .chain(results.dprobe.as_mut())
        {
            let rows = bad_rows(tensor);
            blank(tensor, &rows);
        }
    }
    assert_results(what, attention, data, &got, &want, tolerance);
}

/// The queries that see a key, of every batch and head, in row-major order.
fn queries_that_see(attention: &Attention, batch: usize, kv_head: usize, key: usize) -> Vec<bool> {
    let (h, n) = (attention.heads(), attention.queries());
    (0..attention.batch() * h * n)
        .map(|row| {
            let (b, head, i) = (row / (h * n), row / n % h, row % n);
            b == batch && head / attention.group() == kv_head && crate::masks::sees(attention.mask(), i, key)
        })
        .collect()
}

const POISONS: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];

proptest! {
    #![proptest_config(cases(60))]

    #[test]
    fn one_bad_number_reaches_only_those_that_see_it(
        mut case in case(1_500_000),
        which in 0usize..4,
        place in 0.0f64..1.0,
        poison in prop::sample::select(&POISONS[..]),
        solver in prop::sample::select(&[
            Solver::Auto { tolerance: None, max_iters: None }, Solver::Direct, Solver::Cg { tolerance: 1e-6, max_iters: 1 << 40 },
        ][..]),
    ) {
        case.grid = Grid::Half;
        let solver = if case.ridge < 0.3 { Solver::default() } else { solver };
        let attention = case.builder().solver(solver).build().unwrap();
        let mut data = case.data();
        let tensor = [&mut data.q, &mut data.k, &mut data.v, &mut data.grad_out].into_iter().nth(which).unwrap();
        let at = (place * tensor.data().len() as f64) as usize;
        tensor.data_mut()[at] = poison;
        let token = at / tensor.shape()[3];
        let expected = match which {
            0 => (0..attention.batch() * attention.heads() * attention.queries())
                .map(|row| row == token && attention.mask().visible(row % attention.queries(), attention.keys()).count() > 0)
                .collect(),
            3 => vec![false; attention.batch() * attention.heads() * attention.queries()],
            _ => {
                let (head, key) = (token / attention.keys(), token % attention.keys());
                queries_that_see(&attention, head / attention.kv_heads(), head % attention.kv_heads(), key)
            }
        };
        let clean = case.data();
        // An infinite grad_out is scaled, not compared: only NaN spreads in the same way through any order of sums.
        prop_assume!(which != 3 || poison.is_nan());
        let want = run::<f64>(AnyEngine::reference(), &attention, &data);
        for (engine, dtype) in AnyEngine::with_types(Grid::Half) {
                let (a, d) = (attention.clone(), data.clone());
                let got = within(Duration::from_secs(60), move || run_as(dtype, engine, &a, &d));
                prop_assert_eq!(&bad_rows(&got.out), &expected, "out of {:?} in {:?}", engine, dtype);
                // Solved to 1e-6 only, if by conjugate gradients in f64 too.
                let loose = matches!(solver, Solver::Cg { .. }) && dtype == Dtype::F64;
                let tolerance = if loose { Tolerance::of(Dtype::F32, &attention) } else { Tolerance::of(dtype, &attention) };
                let what = format!("{poison} in tensor {which}, token {token}: {engine:?} {dtype:?}");
                assert_poisoned(&what, &attention, &clean, got, want.clone(), tolerance);
        }
    }
}

#[test]
fn a_bad_key_in_every_place_of_a_tile() {
    for key in [0, 1, 5, 6, 46, 47, 48, 63, 64, 95, 96, 127, 128, 129, 160] {
        for mask in [Mask::causal(), Mask::causal().window(33), Mask::full().cu_seqlens([0, 6, 48, 100, 161])]
        {
            let attention = Attention::builder()
                .queries(161)
                .head_dim(5)
                .value_dim(3)
                .mask(mask)
                .ridge(1.0)
                .build()
                .unwrap();
            let clean = Data::random(&attention, key as u64, Grid::Half);
            for which in ["k", "v"] {
                let mut data = clean.clone();
                let (tensor, width) = if which == "k" { (&mut data.k, 5) } else { (&mut data.v, 3) };
                tensor.data_mut()[key * width..][..width].fill(f64::NAN);
                let want = run::<f64>(AnyEngine::reference(), &attention, &data);
                for dtype in [Dtype::F64, Dtype::F32, Dtype::F16] {
                    let got = run_as(dtype, AnyEngine::cpu(), &attention, &data);
                    let tolerance = Tolerance::of(dtype, &attention);
                    assert_poisoned(
                        &format!("{which} {key} {dtype:?}"),
                        &attention,
                        &clean,
                        got,
                        want.clone(),
                        tolerance,
                    );
                }
            }
        }
    }
}

#[test]
fn solves_that_cannot_converge_end() {
    let attention = |solver| {
        Attention::builder()
            .queries(97)
            .head_dim(40)
            .mask(Mask::causal())
            .ridge(1e-4)
            .solver(solver)
            .build()
            .unwrap()
    };
    for solver in [
        Solver::Cg { tolerance: 0.0, max_iters: 1 << 50 },
        Solver::Auto { tolerance: Some(0.0), max_iters: None },
        Solver::Auto { tolerance: Some(0.0), max_iters: Some(1 << 50) },
    ] {
        let attention = attention(solver);
        let mut data = Data::random(&attention, 3, Grid::Half);
        for poisoned in [false, true] {
            if poisoned {
                data.q.data_mut()[40 * 50] = f64::NAN;
                data.k.data_mut()[40 * 90] = f64::INFINITY;
            }
            for dtype in [Dtype::F64, Dtype::F32] {
                let (a, d) = (attention.clone(), data.clone());
                let got = within(Duration::from_secs(60), move || run_as(dtype, AnyEngine::cpu(), &a, &d));
                let bad = bad_rows(&got.out);
                let expected: Vec<bool> = (0..97).map(|i| poisoned && (i == 50 || i >= 90)).collect();
                assert_eq!(bad, expected, "{solver:?} {dtype:?}");
            }
        }
    }
}

/// A key or query near the end of `f32`'s range overflows the logits. Whoever sees it may get anything, the others not.
#[test]
fn huge_numbers_stay_with_those_that_see_them() {
    for huge in [1e30, -1e30, 3e38] {
        for which in ["q", "k"] {
            let attention = Attention::builder()
                .heads(2)
                .kv_heads(1)
                .queries(130)
                .head_dim(9)
                .mask(Mask::causal().window(40))
                .ridge(1.0)
                .build()
                .unwrap();
            let clean = Data::random(&attention, 5, Grid::Half);
            let want = run::<f64>(AnyEngine::reference(), &attention, &clean);
            let mut data = clean.clone();
            let token = 70;
            let tensor = if which == "q" { &mut data.q } else { &mut data.k };
            tensor.data_mut()[token * 9 + 4] = huge;
            for dtype in [Dtype::F64, Dtype::F32, Dtype::Bf16] {
                let (a, d) = (attention.clone(), data.clone());
                let mut got =
                    within(Duration::from_secs(60), move || run_as(dtype, AnyEngine::cpu(), &a, &d));
                let affected: Vec<bool> =
                    (0..260)
                        .map(|row| {
                            if which == "q" {
                                row == token
                            } else {
                                (token..token + 40).contains(&(row % 130))
                            }
                        })
                        .collect();
                // Keys that an affected query sees.
                let last = if which == "q" { token } else { (token + 39).min(129) };
                let touched: Vec<bool> =
                    (0..130).map(|j| (token.saturating_sub(39)..=last).contains(&j)).collect();
                let mut want = want.clone();
                for results in [&mut got, &mut want] {
                    for tensor in [
                        &mut results.out,
                        &mut results.lse,
                        &mut results.key_mean,
                        &mut results.probe,
                        &mut results.dq,
                    ] {
                        blank(tensor, &affected);
                    }
                    blank(&mut results.dk, &touched);
                    blank(&mut results.dv, &touched);
                    blank(&mut results.dridge, &[true]);
                    blank(&mut results.dscale, &[true]);
                }
                let tolerance = Tolerance::of(dtype, &attention);
                assert_results(
                    &format!("{which} {huge:e} {dtype:?}"),
                    &attention,
                    &clean,
                    &got,
                    &want,
                    tolerance,
                );
            }
        }
    }
}

/// The output is linear in the values: huge ones give huge outputs, accurately. Their gradients may overflow, but
/// what is finite is right.
#[test]
fn huge_values_give_huge_outputs() {
    let attention =
        Attention::builder().queries(70).head_dim(6).value_dim(5).mask(Mask::causal()).build().unwrap();
    let mut data = Data::random(&attention, 6, Grid::Half);
    data.v.data_mut().iter_mut().for_each(|x| *x = Grid::F32.round(*x * 1e30));
    let want = run::<f64>(AnyEngine::reference(), &attention, &data);
    for dtype in [Dtype::F64, Dtype::F32] {
        let got = run_as(dtype, AnyEngine::cpu(), &attention, &data);
        let tolerance = Tolerance::of(dtype, &attention);
        assert_close("out", got.out.data(), want.out.data(), tolerance.out);
        assert_close("dv", got.dv.data(), want.dv.data(), tolerance.gradient);
        for name in ["dq", "dk"] {
            let rows = bad_rows(got.get(name));
            let (mut got, mut want) = (got.get(name).clone(), want.get(name).clone());
            blank(&mut got, &rows);
            blank(&mut want, &rows);
            assert_close(name, got.data(), want.data(), tolerance.gradient);
            assert!(dtype == Dtype::F32 || !rows.contains(&true), "{name} in f64 is not finite");
        }
    }
}

/// Keys and queries whose squares underflow in `f32`: nearly equal weights and gradients in proportion.
#[test]
fn tiny_numbers_keep_their_digits() {
    for size in [1e-10, 1e-18, 1e-24] {
        let attention =
            Attention::builder().queries(70).head_dim(6).value_dim(5).mask(Mask::causal()).build().unwrap();
        let mut data = Data::random(&attention, 7, Grid::Half);
        for tensor in [&mut data.q, &mut data.k] {
            tensor.data_mut().iter_mut().for_each(|x| *x = Grid::F32.round(*x * size));
        }
        let want = run::<f64>(AnyEngine::reference(), &attention, &data);
        for dtype in [Dtype::F64, Dtype::F32] {
            let got = run_as(dtype, AnyEngine::cpu(), &attention, &data);
            let (mut got, mut want) = (got, want.clone());
            // Products of two tiny numbers: these do underflow.
            for results in [&mut got, &mut want] {
                blank(&mut results.dridge, &[true]);
                blank(&mut results.dscale, &[true]);
            }
            let tolerance = Tolerance::of(dtype, &attention);
            assert_results(&format!("{size:e} {dtype:?}"), &attention, &data, &got, &want, tolerance);
        }
    }
}

/// The largest and the smallest numbers of `f16` are what they are in `f32`.
#[test]
fn extremes_of_f16_are_read_exactly() {
    let attention = Attention::builder()
        .queries(67)
        .head_dim(8)
        .value_dim(9)
        .scale(1e-4)
        .mask(Mask::causal())
        .build()
        .unwrap();
    let extremes = [
        65504.0,
        -65504.0,
        6.103515625e-5,
        5.960464477539063e-8,
        -5.960464477539063e-8,
        6.097555160522461e-5,
        0.0,
        -0.0,
    ];
    let mut data = Data::random(&attention, 8, Grid::Half);
    for (turn, x) in extremes.into_iter().enumerate() {
        data.v.data_mut()[turn * 37 + 5] = x;
        data.grad_out.data_mut()[turn * 41 + 3] = x;
        // One large number at a time in keys and queries, which are squared.
        data.k.data_mut()[turn * 43 + 1] = x.clamp(-300.0, 300.0);
        data.q.data_mut()[turn * 29 + 2] = x.clamp(-300.0, 300.0);
    }
    let want = run::<f64>(AnyEngine::reference(), &attention, &data);
    let tolerance = Tolerance::of(Dtype::F32, &attention);
    for dtype in [Dtype::F16, Dtype::F32] {
        let got = run_as(dtype, AnyEngine::cpu(), &attention, &data);
        assert_results(&format!("{dtype:?}"), &attention, &data, &got, &want, tolerance);
    }
    // Nothing but subnormal numbers: flushing them to zero would show.
    data.v.data_mut().iter_mut().for_each(|x| *x = 5.960464477539063e-8 * (*x * 8.0).round());
    let want = run::<f64>(AnyEngine::reference(), &attention, &data);
    let got = run_as(Dtype::F16, AnyEngine::cpu(), &attention, &data);
    assert_close("out", got.out.data(), want.out.data(), tolerance.out);
}

/// Logits of thousands leave one key all the weight.
#[test]
fn enormous_logits_pick_one_key() {
    let attention =
        Attention::builder().queries(97).head_dim(12).scale(1000.0).mask(Mask::causal()).build().unwrap();
    let data = Data::random(&attention, 9, Grid::Half);
    let want = run::<f64>(AnyEngine::reference(), &attention, &data);
    for dtype in Dtype::ALL {
        let got = run_as(dtype, AnyEngine::cpu(), &attention, &data);
        // Logits of up to 3e4 are known to 2e-3 in f32.
        let tolerance = if dtype == Dtype::F64 { 1e-9 } else { 1e-2 };
        assert_close(&format!("out {dtype:?}"), got.out.data(), want.out.data(), tolerance);
        assert_close(&format!("lse {dtype:?}"), got.lse.data(), want.lse.data(), tolerance.min(1e-6));
        assert!(got.named().iter().all(|(_, t)| t.data().iter().all(|x| x.is_finite())), "{dtype:?}");
    }
}
