//! Limits in which the operator is something known.

use crate::common::*;
use flashlla::{Attention, Mask, Ridge, Tensor};
use proptest::prelude::*;
use rand::{SeedableRng, rngs::StdRng};

/// The softmax weights of every query over its visible keys, from their definition.
fn weights(attention: &Attention, data: &Data, b: usize, h: usize, i: usize) -> Vec<(usize, f64)> {
    let kv = h / attention.group();
    let logits: Vec<(usize, f64)> = (0..attention.keys())
        .filter(|&j| crate::masks::sees(attention.mask(), i, j))
        .map(|j| {
            let dot: f64 = (0..attention.head_dim())
                .map(|d| data.q.view().at(b, h, i, d) * data.k.view().at(b, kv, j, d))
                .sum();
            let bias = data.bias.as_ref().map_or(0.0, |bias| {
                let [bs, hs, ..] = bias.view().shape();
                let head = if hs == attention.heads() {
                    h
                } else if hs == attention.kv_heads() {
                    kv
                } else {
                    0
                };
                bias.view().at(if bs == 1 { 0 } else { b }, head, j, 0)
            });
            (j, attention.scale() * dot + bias)
        })
        .collect();
    let largest = logits.iter().map(|x| x.1).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|x| (x.1 - largest).exp()).sum();
    logits.into_iter().map(|(j, s)| (j, (s - largest).exp() / total)).collect()
}

/// `Σ p_j rows_j` for every query: softmax attention's output, or the key mean.
fn softmax_mean(attention: &Attention, data: &Data, rows: &Tensor<f64>) -> Vec<f64> {
    let mut out = vec![];
    for b in 0..attention.batch() {
        for h in 0..attention.heads() {
            for i in 0..attention.queries() {
                let weights = weights(attention, data, b, h, i);
                let rows = rows.view();
                out.extend((0..rows.shape()[3]).map(|e| {
                    weights.iter().map(|&(j, p)| p * rows.at(b, h / attention.group(), j, e)).sum::<f64>()
                }));
            }
        }
    }
    out
}

/// The norm of `Σ p_j |rows_j|` over all queries: an average of both signs may be far smaller than what it averages,
/// and roundings are of the latter's size. Errors count from a fifth of it on.
fn floor(attention: &Attention, data: &Data, rows: &Tensor<f64>) -> f64 {
    let sizes = Tensor::new(rows.data().iter().map(|x| x.abs()).collect(), rows.shape());
    0.2 * softmax_mean(attention, data, &sizes).iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn engine_types() -> impl Iterator<Item = (AnyEngine, Dtype)> {
    let uncentred = (AnyEngine::uncentred(), Dtype::F64);
    AnyEngine::with_types(Grid::Half).into_iter().chain([uncentred])
}

proptest! {
    #![proptest_config(cases(25))]

    #[test]
    fn a_ridge_without_end_makes_softmax_attention(mut case in case(2_000_000)) {
        (case.probe, case.grid) = (false, Grid::Half);
        let (attention, data) = (case.builder().ridge(1e11).build().unwrap(), case.data());
        let want = softmax_mean(&attention, &data, &data.v);
        let mean = softmax_mean(&attention, &data, &data.k);
        let floors = (floor(&attention, &data, &data.v), floor(&attention, &data, &data.k));
        for (engine, dtype) in engine_types() {
            let got = run_as(dtype, engine, &attention, &data);
            let tolerance = if dtype == Dtype::F64 { 1e-8 } else { 3e-6 };
            assert_near(&format!("out of {engine:?} in {dtype:?}"), got.out.data(), &want, floors.0, tolerance);
            assert_near(&format!("key mean of {engine:?} in {dtype:?}"), got.key_mean.data(), &mean, floors.1, tolerance);
        }
    }

    #[test]
    fn identical_keys_leave_the_weighted_mean(mut case in case(2_000_000), ridge in 0.1f64..20.0) {
        (case.probe, case.grid) = (false, Grid::Half);
        let attention = case.builder().ridge(ridge).build().unwrap();
        let mut data = case.data();
        let d = attention.head_dim();
        for head in data.k.data_mut().chunks_mut(attention.keys() * d) {
            let first = head[..d].to_vec();
            head.chunks_mut(d).for_each(|row| row.copy_from_slice(&first));
        }
        let longest = |rows: &Tensor<f64>| {
            rows.data().chunks(d).map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt()).fold(0.0, f64::max)
        };
        let (key, query) = (longest(&data.k), longest(&data.q));
        let reach = key * (key + query);
        let want = softmax_mean(&attention, &data, &data.v);
        let floor = floor(&attention, &data, &data.v);
        for (engine, dtype) in engine_types() {
            let got = run_as(dtype, engine, &attention, &data);
            // What is left of k_j − k̄ is rounding of k; the probe (k̄ − q)/λ magnifies it.
            let tolerance = dtype.epsilon() * 20.0 * (1.0 + reach / ridge);
            assert_near(&format!("{engine:?} in {dtype:?}"), got.out.data(), &want, floor, tolerance);
        }
    }

    #[test]
    fn a_vanishing_scale_makes_ridge_regression(
        mut case in case(1_000_000), scale in prop::sample::select(&[0.0, 1e-30, 1e-13][..]), ridge in 0.2f64..20.0,
    ) {
        (case.probe, case.bias, case.grid) = (false, None, Grid::Half);
        let attention = case.builder().scale(scale).ridge(ridge).build().unwrap();
        let data = case.data();
        let mut want = vec![];
        for b in 0..attention.batch() {
            for h in 0..attention.heads() {
                for i in 0..attention.queries() {
                    want.extend(ridge_regression(&attention, &data, b, h, i));
                }
            }
        }
        let floor = floor(&attention, &data, &data.v);
        for (engine, dtype) in engine_types() {
            let got = run_as(dtype, engine, &attention, &data);
            let tolerance = if dtype == Dtype::F64 { 1e-8 } else { 3e-5 };
            assert_near(&format!("{engine:?} in {dtype:?}"), got.out.data(), &want, floor, tolerance);
        }
    }

    #[test]
    fn affine_values_are_reproduced_exactly(seed: u64, d in 1usize..7, dv in 1usize..9, extra in 5usize..120) {
        let keys = 3 * d + extra;
        let attention = Attention::builder().queries(9).keys(keys).head_dim(d).value_dim(dv);
        let data = {
            let attention = attention.clone().build().unwrap();
            Data::random(&attention, seed, Grid::F32)
        };
        let rng = &mut StdRng::seed_from_u64(!seed);
        let (intercept, slope) = (normal(rng, &[dv], Grid::F32), normal(rng, &[dv, d], Grid::F32));
        let affine = |x: &[f64]| -> Vec<f64> {
            (0..dv)
                .map(|e| intercept.data()[e] + (0..d).map(|f| slope.data()[e * d + f] * x[f]).sum::<f64>())
                .collect()
        };
        let v = Tensor::new(data.k.data().chunks(d).flat_map(affine).collect(), &[1, 1, keys, dv]);
        let want: Vec<f64> = data.q.data().chunks(d).flat_map(affine).collect();
        let data = Data { v, ..data };
        for engine in AnyEngine::exact() {
            let attention = attention.clone().scale(0.3).ridge(1e-9).build().unwrap();
            let got = run::<f64>(engine, &attention, &data);
            assert_close(&format!("{engine:?}"), got.out.data(), &want, 1e-5);
            // Softmax attention does not know the slope.
            let softmax = softmax_mean(&attention, &data, &data.v);
            prop_assert!(relative_error(&softmax, &want, 0.0) > 1e-2);
            // In f32 a ridge of 1e-4 is what the digits allow.
            let attention = attention_with_ridge(&attention, 1e-4);
            let got = run::<f32>(engine, &attention, &data);
            assert_close(&format!("{engine:?} in f32"), got.out.data(), &want, 2e-2);
        }
    }

    /// One visible key has nothing to fit: its value comes out, and no gradient but that of the value.
    #[test]
    fn the_first_causal_query_gives_the_first_value(mut case in case(1_000_000)) {
        (case.probe, case.bias, case.grid) = (false, None, Grid::Half);
        case.mask = Mask::causal();
        let (attention, data) = (case.attention(), case.data());
        let (d, dv, n) = (attention.head_dim(), attention.value_dim(), attention.queries());
        for (engine, dtype) in engine_types() {
            let got = run_as(dtype, engine, &attention, &data);
            for b in 0..attention.batch() {
                for h in 0..attention.heads() {
                    let row = (b * attention.heads() + h) * n;
                    let first = ((b * attention.kv_heads()) + h / attention.group()) * attention.keys() * dv;
                    let want = &data.v.data()[first..first + dv];
                    // 1/λ ≤ 40 magnifies what rounding leaves of k_0 − k̄.
                    let tolerance = dtype.epsilon() * 400.0 * d as f64;
                    assert_close("out", &got.out.data()[row * dv..][..dv], want, tolerance);
                    let dq = &got.dq.data()[row * d..][..d];
                    let size = dv as f64 * d as f64;
                    let bound = dtype.epsilon() * 400.0 * size;
                    prop_assert!(dq.iter().all(|x| x.abs() <= bound), "dq {dq:?} beyond {bound:e} ({engine:?} {dtype:?})");
                }
            }
        }
    }
}

fn attention_with_ridge(a: &Attention, ridge: f64) -> Attention {
    Attention::builder()
        .queries(a.queries())
        .keys(a.keys())
        .head_dim(a.head_dim())
        .value_dim(a.value_dim())
        .scale(a.scale())
        .ridge(Ridge::scalar(ridge))
        .build()
        .unwrap()
}

/// Minimises `Σ (1/n) |v_j − b − W k_j|² + λ |W|²` by its normal equations in `(b, W)` and predicts at the query.
fn ridge_regression(attention: &Attention, data: &Data, b: usize, h: usize, i: usize) -> Vec<f64> {
    use faer::linalg::solvers::Solve;
    let (d, dv, kv) = (attention.head_dim(), attention.value_dim(), h / attention.group());
    let seen: Vec<usize> =
        (0..attention.keys()).filter(|&j| crate::masks::sees(attention.mask(), i, j)).collect();
    if seen.is_empty() {
        return vec![0.0; dv];
    }
    let regressor = |j: usize, e: usize| if e == d { 1.0 } else { data.k.view().at(b, kv, j, e) };
    let n = seen.len() as f64;
    let matrix = faer::Mat::from_fn(d + 1, d + 1, |r, c| {
        let penalty = if r == c && r < d { attention.ridge().at(b, h, i) } else { 0.0 };
        seen.iter().map(|&j| regressor(j, r) * regressor(j, c)).sum::<f64>() / n + penalty
    });
    let rhs = faer::Mat::from_fn(d + 1, dv, |r, e| {
        seen.iter().map(|&j| regressor(j, r) * data.v.view().at(b, kv, j, e)).sum::<f64>() / n
    });
    let fit = matrix.partial_piv_lu().solve(&rhs);
    (0..dv)
        .map(|e| fit[(d, e)] + (0..d).map(|r| data.q.view().at(b, h, i, r) * fit[(r, e)]).sum::<f64>())
        .collect()
}
