//! Ridge, bias and probe: the forms they can be given in, and what their gradients sum over.

use crate::common::*;
use flashlla::{Attention, Engine, Mask, Ridge, Tensor};
use proptest::prelude::*;

/// Sums `[B, H, N]` over the axes where `shape` is 1.
fn reduced(values: &[f64], full: [usize; 3], shape: [usize; 3]) -> Vec<f64> {
    let mut sums = vec![0.0; shape.iter().product()];
    for (i, value) in values.iter().enumerate() {
        let place = [i / (full[1] * full[2]), i / full[2] % full[1], i % full[2]];
        let [b, h, n] = std::array::from_fn(|a| if shape[a] == 1 { 0 } else { place[a] });
        sums[(b * shape[1] + h) * shape[2] + n] += value;
    }
    sums
}

proptest! {
    #![proptest_config(cases(25))]

    /// A ridge in few numbers is one in many that repeat, with a gradient summed over the repetitions.
    #[test]
    fn ridges_of_any_form_agree(mut case in case(1_000_000)) {
        case.probe = false;
        case.ridge_kind = RidgeKind::Scalar;
        let data = case.data();
        let (b, h, n) = (case.batch, case.kv_heads * case.group, case.queries);
        let draw = |shape: [usize; 3]| -> Vec<f64> {
            (0..shape.iter().product()).map(|i: usize| case.grid.round(case.ridge * (1.0 + 0.5 * (i as f64).sin()))).collect()
        };
        let forms = [
            ([1, 1, 1], Ridge::scalar(draw([1, 1, 1])[0])),
            ([1, h, 1], Ridge::per_head(draw([1, h, 1]))),
            ([b, h, n], Ridge::per_query(draw([b, h, n]), [b, h, n])),
            ([1, 1, n], Ridge::broadcast(draw([1, 1, n]), [1, 1, n])),
            ([b, 1, 1], Ridge::broadcast(draw([b, 1, 1]), [b, 1, 1])),
            ([b, 1, n], Ridge::broadcast(draw([b, 1, n]), [b, 1, n])),
            ([1, h, n], Ridge::broadcast(draw([1, h, n]), [1, h, n])),
        ];
        for (shape, ridge) in forms {
            let spread: Vec<f64> = (0..b * h * n).map(|i| ridge.at(i / (h * n), i / n % h, i % n)).collect();
            let own_shape = ridge.shape().to_vec();
            let attention = case.builder().ridge(ridge).build().unwrap();
            let full = case.builder().ridge(Ridge::per_query(spread, [b, h, n])).build().unwrap();
            for (engine, dtype) in AnyEngine::with_types(case.grid) {
                let got = run_as(dtype, engine, &attention, &data);
                let mut want = run_as(dtype, engine, &full, &data);
                prop_assert_eq!(got.dridge.shape(), &own_shape[..]);
                want.dridge = Tensor::new(reduced(want.dridge.data(), [b, h, n], shape), &own_shape);
                let tolerance = Tolerance::of(dtype, &attention);
                assert_results(&format!("ridge {shape:?}, {engine:?} {dtype:?}"), &attention, &data, &got, &want, tolerance);
            }
        }
    }

    /// A bias shared by heads or batches is one repeated for them, with a gradient summed over them.
    #[test]
    fn biases_of_any_form_agree(mut case in case(1_000_000)) {
        case.bias = None;
        let attention = case.attention();
        let (b, hq, h, m) = (case.batch, attention.heads(), case.kv_heads, case.keys);
        for shape in [[1, 1], [b, 1], [1, h], [b, h], [1, hq], [b, hq]] {
            let data = case.data().with_bias([shape[0], shape[1], m, 1], case.seed, case.grid);
            let bias = data.bias.clone().unwrap();
            let place = |i: usize| {
                let (batch, head, key) = (i / (hq * m), i / m % hq, i % m);
                let head = if shape[1] == hq { head } else if shape[1] == h { head / case.group } else { 0 };
                ((if shape[0] == 1 { 0 } else { batch }) * shape[1] + head) * m + key
            };
            let spread = (0..b * hq * m).map(|i| bias.data()[place(i)]).collect();
            let repeated = Data { bias: Some(Tensor::new(spread, &[b, hq, m, 1])), ..data.clone() };
            for (engine, dtype) in AnyEngine::with_types(case.grid) {
                let got = run_as(dtype, engine, &attention, &data);
                let mut want = run_as(dtype, engine, &attention, &repeated);
                let mut dbias = vec![0.0; bias.data().len()];
                want.dbias.unwrap().data().iter().enumerate().for_each(|(i, x)| dbias[place(i)] += x);
                want.dbias = Some(Tensor::new(dbias, &[shape[0], shape[1], m, 1]));
                let tolerance = Tolerance::of(dtype, &attention);
                assert_results(&format!("bias {shape:?}, {engine:?} {dtype:?}"), &attention, &data, &got, &want, tolerance);
            }
        }
    }

    /// A constant added to all of a query's biases moves its lse and nothing else.
    #[test]
    fn a_constant_bias_moves_only_the_lse(mut case in case(1_000_000), constant in prop::sample::select(&[-100.0, -3.5, 64.0][..])) {
        case.bias = Some(Bias { batched: false, heads: 2 });
        let (attention, data) = (case.attention(), case.data());
        // On a grid on which adding the constant is exact.
        let mut data = data;
        data.bias.as_mut().unwrap().data_mut().iter_mut().for_each(|x| *x = (*x * 16.0).round() / 16.0);
        let mut moved = data.clone();
        moved.bias.as_mut().unwrap().data_mut().iter_mut().for_each(|x| *x += constant);
        for (engine, dtype) in AnyEngine::with_types(case.grid) {
            let want = run_as(dtype, engine, &attention, &data);
            let mut got = run_as(dtype, engine, &attention, &moved);
            got.lse.data_mut().iter_mut().for_each(|x| *x -= constant);
            let tolerance = Tolerance::of(dtype, &attention).times(if dtype == Dtype::F64 { 1.0 } else { 3.0 });
            assert_results(&format!("{engine:?} {dtype:?}"), &attention, &data, &got, &want, tolerance);
        }
    }

    /// Keys hidden by a bias of minus infinity are as good as absent, whatever they hold.
    #[test]
    fn a_bias_of_minus_infinity_hides_keys(mut case in case(1_500_000), share in 0.05f64..0.95, poison: bool) {
        (case.bias, case.mask) = (None, Mask::full());
        let m = case.keys;
        let hidden: Vec<bool> = (0..m).map(|j| ((j as f64 * 0.618 + case.seed as f64 * 1e-19).fract()) < share).collect();
        let kept: Vec<usize> = (0..m).filter(|&j| !hidden[j]).collect();
        prop_assume!(!kept.is_empty() && kept.len() < m);
        let attention = case.attention();
        let mut data = case.data();
        let fewer = Case { keys: kept.len(), ..case.clone() }.attention();
        let keep = |t: &Tensor<f64>| -> Tensor<f64> {
            let [b, h, _, x] = t.shape().try_into().unwrap();
            let rows: Vec<&[f64]> = t.data().chunks(x).collect();
            let data = (0..b * h).flat_map(|head| kept.iter().flat_map(move |&j| [head * m + j])).flat_map(|row| rows[row]).copied().collect();
            Tensor::new(data, &[b, h, kept.len(), x])
        };
        let without = Data { k: keep(&data.k), v: keep(&data.v), ..data.clone() };
        data.bias = Some(Tensor::new(hidden.iter().map(|&h| if h { f64::NEG_INFINITY } else { 0.0 }).collect(), &[1, 1, m, 1]));
        if poison {
            for tensor in [&mut data.k, &mut data.v] {
                let x = tensor.shape()[3];
                for (row, values) in tensor.data_mut().chunks_mut(x).enumerate() {
                    if hidden[row % m] {
                        values.fill(f64::NAN);
                    }
                }
            }
        }
        for (engine, dtype) in AnyEngine::with_types(case.grid) {
            let want = run_as(dtype, engine, &fewer, &without);
            let mut got = run_as(dtype, engine, &attention, &data);
            let dbias = got.dbias.take().unwrap();
            for (j, &hidden) in hidden.iter().enumerate() {
                prop_assert!(!hidden || dbias.data()[j] == 0.0, "dbias of hidden key {j}: {}, {engine:?} {dtype:?}", dbias.data()[j]);
            }
            for (name, tensor) in [("dk", &got.dk), ("dv", &got.dv)] {
                let x = tensor.shape()[3];
                let zero = tensor.data().chunks(x).enumerate().all(|(row, g)| !hidden[row % m] || g.iter().all(|&g| g == 0.0));
                prop_assert!(zero, "{name} of a hidden key is not 0, {engine:?} {dtype:?}");
            }
            (got.dk, got.dv) = (keep(&got.dk), keep(&got.dv));
            let tolerance = Tolerance::of(dtype, &attention);
            assert_results(&format!("hidden, {engine:?} {dtype:?}"), &fewer, &without, &got, &want, tolerance);
        }
    }

    /// Given the probe that would have been solved for, the output is the same; the ridge no longer matters.
    #[test]
    fn a_given_probe_replaces_the_solve(mut case in case(1_000_000)) {
        (case.probe, case.grid) = (false, Grid::F32);
        let (attention, data) = (case.attention(), case.data());
        for (engine, dtype) in AnyEngine::with_types(case.grid) {
            let solved = run_as(dtype, engine, &attention, &data);
            let given = Data { probe: Some(solved.probe.clone()), ..data.clone() };
            let other_ridge = case.builder().ridge(case.ridge * 7.0).build().unwrap();
            for attention in [&attention, &other_ridge] {
                let got = run_as(dtype, engine, attention, &given);
                let tolerance = if dtype == Dtype::F64 { 1e-12 } else { 3e-5 };
                for (name, got, want) in [
                    ("out", &got.out, &solved.out),
                    ("lse", &got.lse, &solved.lse),
                    ("key_mean", &got.key_mean, &solved.key_mean),
                    ("probe", &got.probe, &solved.probe),
                    ("dv", &got.dv, &solved.dv),
                ] {
                    assert_close(&format!("{name}, {engine:?} {dtype:?}"), got.data(), want.data(), tolerance);
                }
                prop_assert!(got.dridge.data().iter().all(|&x| x == 0.0));
                prop_assert_eq!(got.dridge.shape(), attention.ridge().shape());
                prop_assert_eq!(got.solve.max_iterations(), 0);
            }
        }
    }
}

/// A probe of zeros is softmax attention, a bias of minus infinity on every key leaves nothing to see.
#[test]
fn every_key_hidden_is_no_key_seen() {
    let attention =
        Attention::builder().heads(2).kv_heads(1).queries(70).head_dim(5).value_dim(4).build().unwrap();
    let mut data = Data::random(&attention, 1, Grid::Half);
    data.bias = Some(Tensor::new(vec![f64::NEG_INFINITY; 70], &[1, 1, 70, 1]));
    for (engine, dtype) in AnyEngine::with_types(Grid::Half) {
        let got = run_as(dtype, engine, &attention, &data);
        for (name, tensor) in got.named() {
            let expected = if name == "lse" { f64::NEG_INFINITY } else { 0.0 };
            assert!(tensor.data().iter().all(|&x| x == expected), "{name}, {engine:?} {dtype:?}");
        }
    }
}

/// Only some heads' rows are hidden by a bias per query head; a causal prefix is hidden for the others' sight.
#[test]
fn hidden_prefixes_leave_early_queries_blind() {
    let m = 150;
    let attention = Attention::builder()
        .heads(2)
        .kv_heads(1)
        .queries(m)
        .head_dim(6)
        .value_dim(4)
        .mask(Mask::causal())
        .build()
        .unwrap();
    let mut data = Data::random(&attention, 2, Grid::Half);
    let blind = 97;
    let bias = (0..2 * m).map(|i| if i < blind { f64::NEG_INFINITY } else { 0.25 }).collect();
    data.bias = Some(Tensor::new(bias, &[1, 2, m, 1]));
    let want = run::<f64>(AnyEngine::reference(), &attention, &data);
    for (engine, dtype) in AnyEngine::with_types(Grid::Half) {
        let got = run_as(dtype, engine, &attention, &data);
        assert_results(
            &format!("{engine:?} {dtype:?}"),
            &attention,
            &data,
            &got,
            &want,
            Tolerance::of(dtype, &attention),
        );
        for i in 0..m {
            assert_eq!(got.lse.data()[i] == f64::NEG_INFINITY, i < blind, "query {i}");
            assert_eq!(got.out.data()[i * 4..][..4].iter().all(|&x| x == 0.0), i < blind, "query {i}");
            // The first to see a key sees one only: its gradient is 0 up to rounding.
            if i != blind {
                assert_eq!(got.dq.data()[i * 6..][..6].iter().all(|&x| x == 0.0), i < blind, "query {i}");
            }
        }
    }
}

/// The reported solver state of a given probe asks for no work.
#[test]
fn a_given_probe_is_handed_back() {
    let attention = Attention::builder().queries(20).head_dim(3).build().unwrap();
    let data = Data::random(&attention, 4, Grid::F32).with_probe(4, Grid::F32);
    let probe = data.probe.clone().unwrap();
    for engine in AnyEngine::exact() {
        let problem = attention.problem(data.q.view(), data.k.view(), data.v.view()).unwrap();
        let problem = problem.with_probe(probe.view()).unwrap();
        let state = engine.forward(&problem).unwrap().state;
        assert_eq!(state.probe, probe, "{engine:?}");
    }
}
