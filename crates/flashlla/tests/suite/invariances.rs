//! Changes of a problem that change its results in a known way, or not at all.

use crate::common::*;
use flashlla::{Attention, Mask, Ridge, Tensor};
use proptest::prelude::*;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

/// `[B, H, N, X]` restricted to some batches, heads and tokens.
fn part(
    tensor: &Tensor<f64>,
    batches: std::ops::Range<usize>,
    heads: std::ops::Range<usize>,
    tokens: std::ops::Range<usize>,
) -> Tensor<f64> {
    let view = tensor.view();
    let shape = [batches.len(), heads.len(), tokens.len(), view.shape()[3]];
    let mut data = vec![];
    for b in batches {
        for h in heads.clone() {
            for n in tokens.clone() {
                data.extend((0..shape[3]).map(|d| view.at(b, h, n, d)));
            }
        }
    }
    Tensor::new(data, &shape)
}

/// A tensor with `[B, H, N]` given a fourth axis.
fn four(tensor: &Tensor<f64>) -> Tensor<f64> {
    let [b, h, n] = tensor.shape().try_into().unwrap();
    Tensor::new(tensor.data().to_vec(), &[b, h, n, 1])
}

fn minus(a: &Tensor<f64>, b: &Tensor<f64>) -> Vec<f64> {
    a.data().iter().zip(b.data()).map(|(a, b)| a - b).collect()
}

/// A ridge of per-query values, so that parts of it can be taken.
fn spread(attention: &Attention) -> Tensor<f64> {
    let (b, h, n) = (attention.batch(), attention.heads(), attention.queries());
    let ridge = attention.ridge();
    let data = (0..b * h * n).map(|i| ridge.at(i / (h * n), i / n % h, i % n)).collect();
    Tensor::new(data, &[b, h, n, 1])
}

fn per_query(ridge: Tensor<f64>) -> Ridge {
    let [b, h, n, _] = ridge.shape().try_into().unwrap();
    Ridge::per_query(ridge.into_vec(), [b, h, n])
}

proptest! {
    #![proptest_config(cases(25))]

    /// Keys and queries moved by `t`, with the logits kept by a bias `−scale t·k_j`. The fit does not know.
    #[test]
    fn moving_keys_and_queries_together_changes_nothing(mut case in case(1_500_000), far in 1.0f64..4.0) {
        (case.probe, case.bias, case.grid) = (false, Some(Bias { batched: true, heads: 1 }), Grid::Half);
        case.ridge = case.ridge.max(0.3);
        case.scale = case.scale.min(1.0);
        let attention = case.attention();
        let data = case.data();
        let d = attention.head_dim();
        // Quarters, so that the moved numbers are exact.
        let rng = &mut StdRng::seed_from_u64(case.seed ^ 77);
        let t: Vec<f64> = normal(rng, &[d], Grid::F64).data().iter().map(|x| (4.0 * far * x).round() / 4.0).collect();
        let mut data = data;
        for tensor in [&mut data.q, &mut data.k] {
            tensor.data_mut().iter_mut().for_each(|x| *x = (*x * 64.0).round() / 64.0);
        }
        let mut moved = data.clone();
        for tensor in [&mut moved.q, &mut moved.k] {
            tensor.data_mut().chunks_mut(d).for_each(|row| row.iter_mut().zip(&t).for_each(|(x, t)| *x += t));
        }
        let bias = moved.bias.as_mut().unwrap().data_mut();
        for (bias, key) in bias.iter_mut().zip(moved.k.data().chunks(d)) {
            *bias -= attention.scale() * key.iter().zip(&t).map(|(k, t)| k * t).sum::<f64>();
        }
        for (engine, dtype) in AnyEngine::with_types(Grid::F32) {
            let (want, got) = (run_as(dtype, engine, &attention, &data), run_as(dtype, engine, &attention, &moved));
            // Logits and keys are larger by the move; so is their rounding.
            let size = 1.0 + far * far * d as f64 * attention.scale();
            let tolerance = Tolerance::of(dtype, &attention).times(if dtype == Dtype::F64 { 1.0 } else { size });
            let mut got = got;
            let t_rows = |rows: usize| t.iter().copied().cycle().take(rows * d).collect::<Vec<_>>();
            let seen = want.lse.data().iter().flat_map(|lse| vec![f64::from(u8::from(lse.is_finite())); d]);
            let t_means: Vec<f64> = t_rows(want.lse.data().len()).into_iter().zip(seen).map(|(t, s)| t * s).collect();
            let shape = want.key_mean.shape().to_vec();
            got.key_mean = Tensor::new(minus(&got.key_mean, &Tensor::new(t_means, &shape)), &shape);
            // The whole change of a key also moves its bias.
            let dbias = got.dbias.clone().unwrap();
            for (dk, db) in got.dk.data_mut().chunks_mut(d).zip(dbias.data()) {
                dk.iter_mut().zip(&t).for_each(|(x, t)| *x -= attention.scale() * t * db);
            }
            // These change for good.
            (got.lse, got.dscale) = (want.lse.clone(), want.dscale.clone());
            assert_results(&format!("moved, {engine:?} {dtype:?}"), &attention, &data, &got, &want, tolerance);
        }
    }

    #[test]
    fn the_order_of_keys_does_not_matter(mut case in case(1_500_000)) {
        case.mask = Mask::full();
        let (attention, data) = (case.attention(), case.data());
        let keys = attention.keys();
        let mut order: Vec<usize> = (0..keys).collect();
        order.shuffle(&mut StdRng::seed_from_u64(case.seed));
        let permute = |tensor: &Tensor<f64>| -> Tensor<f64> {
            let width = tensor.shape()[3];
            let rows: Vec<&[f64]> = tensor.data().chunks(width).collect();
            let data = (0..rows.len()).flat_map(|row| rows[row / keys * keys + order[row % keys]]).copied().collect();
            Tensor::new(data, tensor.shape())
        };
        let mut shuffled = data.clone();
        (shuffled.k, shuffled.v) = (permute(&data.k), permute(&data.v));
        shuffled.bias = data.bias.as_ref().map(permute);
        for (engine, dtype) in AnyEngine::with_types(case.grid) {
            let mut want = run_as(dtype, engine, &attention, &data);
            let got = run_as(dtype, engine, &attention, &shuffled);
            (want.dk, want.dv) = (permute(&want.dk), permute(&want.dv));
            want.dbias = want.dbias.as_ref().map(permute);
            let tolerance = Tolerance::of(dtype, &attention);
            assert_results(&format!("shuffled, {engine:?} {dtype:?}"), &attention, &shuffled, &got, &want, tolerance);
        }
    }

    /// Each batch and KV head by itself.
    #[test]
    fn batches_and_heads_do_not_know_each_other(mut case in case(1_000_000)) {
        case.bias = None;
        let (attention, data) = (case.attention(), case.data());
        let ridge = spread(&attention);
        for (engine, dtype) in AnyEngine::with_types(case.grid) {
            let whole = attention_like(&case, per_query(ridge.clone()));
            let all = run_as(dtype, engine, &whole, &data);
            for b in 0..case.batch {
                for h in 0..case.kv_heads {
                    let heads = h * case.group..(h + 1) * case.group;
                    let alone = Case { batch: 1, kv_heads: 1, ..case.clone() };
                    let queries = |t: &Tensor<f64>| part(t, b..b + 1, heads.clone(), 0..case.queries);
                    let keys = |t: &Tensor<f64>| part(t, b..b + 1, h..h + 1, 0..case.keys);
                    let attention = attention_like(&alone, per_query(queries(&ridge)));
                    let data = Data {
                        q: queries(&data.q),
                        k: keys(&data.k),
                        v: keys(&data.v),
                        grad_out: queries(&data.grad_out),
                        bias: None,
                        probe: data.probe.as_ref().map(queries),
                    };
                    let got = run_as(dtype, engine, &attention, &data);
                    let want = Results {
                        out: queries(&all.out),
                        lse: Tensor::new(queries(&four(&all.lse)).into_vec(), got.lse.shape()),
                        key_mean: queries(&all.key_mean),
                        probe: queries(&all.probe),
                        dq: queries(&all.dq),
                        dk: keys(&all.dk),
                        dv: keys(&all.dv),
                        dridge: Tensor::new(queries(&four(&all.dridge)).into_vec(), got.dridge.shape()),
                        dscale: got.dscale.clone(),
                        dprobe: all.dprobe.as_ref().map(queries),
                        ..got.clone()
                    };
                    let tolerance = Tolerance::of(dtype, &attention);
                    assert_results(&format!("batch {b}, head {h}, {engine:?} {dtype:?}"), &attention, &data, &got, &want, tolerance);
                }
            }
        }
    }

    /// Grouped heads are keys and values repeated for every query head.
    #[test]
    fn grouped_heads_are_repeated_heads(mut case in case(1_000_000), group in 2usize..5) {
        case.bias = None;
        case.group = group;
        let (attention, data) = (case.attention(), case.data());
        let repeat = |tensor: &Tensor<f64>| -> Tensor<f64> {
            let [b, h, m, x] = tensor.shape().try_into().unwrap();
            let data = tensor.data().chunks(m * x).flat_map(|head| head.repeat(group)).collect();
            Tensor::new(data, &[b, h * group, m, x])
        };
        let repeated = Data { k: repeat(&data.k), v: repeat(&data.v), ..data.clone() };
        let ungrouped = Case { kv_heads: case.kv_heads * group, group: 1, ..case.clone() };
        let ungrouped = attention_like(&ungrouped, attention.ridge().clone());
        let fold = |tensor: &Tensor<f64>| -> Tensor<f64> {
            let [b, h, m, x] = tensor.shape().try_into().unwrap();
            let data = tensor.data().chunks(group * m * x).flat_map(|heads| {
                (0..m * x).map(|i| (0..group).map(|g| heads[g * m * x + i]).sum::<f64>()).collect::<Vec<_>>()
            });
            Tensor::new(data.collect(), &[b, h / group, m, x])
        };
        for (engine, dtype) in AnyEngine::with_types(case.grid) {
            let got = run_as(dtype, engine, &attention, &data);
            let mut want = run_as(dtype, engine, &ungrouped, &repeated);
            (want.dk, want.dv) = (fold(&want.dk), fold(&want.dv));
            let tolerance = Tolerance::of(dtype, &attention);
            assert_results(&format!("grouped, {engine:?} {dtype:?}"), &attention, &data, &got, &want, tolerance);
        }
    }

    /// Packed sequences are calls of their own, each with its queries' positions.
    #[test]
    fn packed_sequences_are_separate_calls(mut case in case(1_500_000), lengths in prop::collection::vec(0usize..70, 1..9)) {
        (case.batch, case.kv_heads, case.bias, case.probe) = (1, 1, None, false);
        case.head_dim = case.head_dim.min(20);
        let mut cu = vec![0];
        for length in lengths {
            cu.push(cu[cu.len() - 1] + length);
        }
        let keys = cu[cu.len() - 1];
        prop_assume!(keys > 0);
        let offset = case.seed as usize % keys;
        (case.keys, case.queries) = (keys, 1 + (case.seed >> 32) as usize % (keys - offset));
        let mut plain = if case.mask.is_causal() { Mask::causal() } else { Mask::full() };
        if let Some(window) = case.mask.window_len() {
            plain = plain.window(window);
        }
        if case.mask.is_leave_one_out() {
            plain = plain.leave_one_out();
        }
        case.mask = plain.clone().cu_seqlens(cu.clone()).q_offset(offset as i64);
        let (attention, data) = (case.attention(), case.data());
        let ridge = spread(&attention);
        let whole = attention_like(&case, per_query(ridge.clone()));
        for (engine, dtype) in AnyEngine::with_types(case.grid) {
            let all = run_as(dtype, engine, &whole, &data);
            for sequence in cu.windows(2) {
                let (start, end) = (sequence[0], sequence[1]);
                let queries = start.clamp(offset, offset + case.queries)..end.clamp(offset, offset + case.queries);
                let queries = queries.start - offset..queries.end - offset;
                let rows = |t: &Tensor<f64>| part(t, 0..1, 0..case.group, queries.clone());
                let columns = |t: &Tensor<f64>| part(t, 0..1, 0..1, start..end);
                if queries.is_empty() {
                    let unseen = [columns(&all.dk), columns(&all.dv)];
                    prop_assert!(unseen.iter().all(|t| t.data().iter().all(|&x| x == 0.0)), "gradients of unseen keys");
                    continue;
                }
                let position = (offset + queries.start - start) as i64;
                let alone = Case {
                    queries: queries.len(),
                    keys: end - start,
                    mask: plain.clone().q_offset(position),
                    ..case.clone()
                };
                let attention = attention_like(&alone, per_query(rows(&ridge)));
                let data = Data {
                    q: rows(&data.q),
                    k: columns(&data.k),
                    v: columns(&data.v),
                    grad_out: rows(&data.grad_out),
                    bias: None,
                    probe: None,
                };
                let got = run_as(dtype, engine, &attention, &data);
                let want = Results {
                    out: rows(&all.out),
                    lse: Tensor::new(rows(&four(&all.lse)).into_vec(), got.lse.shape()),
                    key_mean: rows(&all.key_mean),
                    probe: rows(&all.probe),
                    dq: rows(&all.dq),
                    dk: columns(&all.dk),
                    dv: columns(&all.dv),
                    dridge: Tensor::new(rows(&four(&all.dridge)).into_vec(), got.dridge.shape()),
                    ..got.clone()
                };
                let tolerance = Tolerance::of(dtype, &attention);
                assert_results(&format!("sequence {start}..{end}, {engine:?} {dtype:?}"), &attention, &data, &got, &want, tolerance);
            }
        }
    }

    /// The queries in two calls: outputs one after another, gradients of the keys added.
    #[test]
    fn queries_can_be_split(mut case in case(1_500_000), at in 0.0f64..1.0) {
        case.queries = case.queries.max(2);
        if case.mask.sequences().is_some() && case.keys < case.queries {
            case.keys = case.queries;
            case.mask = Mask::causal();
        }
        if case.mask.sequences().is_some_and(|_| case.mask.offset() + case.queries as i64 > case.keys as i64) {
            case.mask = Mask::causal();
        }
        let split = 1 + (at * (case.queries - 1) as f64) as usize;
        let split = split.min(case.queries - 1);
        let (attention, data) = (case.attention(), case.data());
        let ridge = spread(&attention);
        let whole = attention_like(&case, per_query(ridge.clone()));
        let heads = attention.heads();
        for (engine, dtype) in AnyEngine::with_types(case.grid) {
            let all = run_as(dtype, engine, &whole, &data);
            let mut sums: Option<[Vec<f64>; 4]> = None;
            for queries in [0..split, split..case.queries] {
                let rows = |t: &Tensor<f64>| part(t, 0..case.batch, 0..heads, queries.clone());
                let mask = case.mask.clone().q_offset(case.mask.offset() + queries.start as i64);
                let part = Case { queries: queries.len(), mask, ..case.clone() };
                let attention = attention_like(&part, per_query(rows(&ridge)));
                let data = Data {
                    q: rows(&data.q),
                    grad_out: rows(&data.grad_out),
                    probe: data.probe.as_ref().map(rows),
                    ..data.clone()
                };
                let got = run_as(dtype, engine, &attention, &data);
                let want = Results {
                    out: rows(&all.out),
                    lse: Tensor::new(rows(&four(&all.lse)).into_vec(), got.lse.shape()),
                    key_mean: rows(&all.key_mean),
                    probe: rows(&all.probe),
                    dq: rows(&all.dq),
                    dridge: Tensor::new(rows(&four(&all.dridge)).into_vec(), got.dridge.shape()),
                    dprobe: all.dprobe.as_ref().map(rows),
                    ..got.clone()
                };
                let tolerance = Tolerance::of(dtype, &attention);
                assert_results(&format!("queries {queries:?}, {engine:?} {dtype:?}"), &attention, &data, &got, &want, tolerance);
                let dbias = got.dbias.map_or(vec![], |t| t.into_vec());
                let parts = [got.dk.into_vec(), got.dv.into_vec(), dbias, got.dscale.into_vec()];
                sums = Some(match sums {
                    None => parts,
                    Some(sums) => {
                        let mut both = sums.into_iter().zip(parts);
                        std::array::from_fn(|_| {
                            let (a, b) = both.next().unwrap();
                            a.into_iter().zip(b).map(|(a, b)| a + b).collect()
                        })
                    }
                });
            }
            let [dk, dv, dbias, dscale] = sums.unwrap();
            let mut got = all.clone();
            (got.dk, got.dv) = (Tensor::new(dk, all.dk.shape()), Tensor::new(dv, all.dv.shape()));
            got.dscale = Tensor::new(dscale, &[]);
            got.dbias = all.dbias.as_ref().map(|t| Tensor::new(dbias, t.shape()));
            let tolerance = Tolerance::of(dtype, &attention);
            assert_results(&format!("sums, {engine:?} {dtype:?}"), &attention, &data, &got, &all, tolerance);
        }
    }
}

/// The case's description with another ridge, which need not be of the case's kind.
fn attention_like(case: &Case, ridge: Ridge) -> Attention {
    let scalar = Case { ridge_kind: RidgeKind::Scalar, ..case.clone() };
    scalar.builder().ridge(ridge).build().unwrap()
}

/// A window at least as long as the context does nothing, nor do packed sequences of one.
#[test]
fn parts_of_a_mask_that_hide_nothing_do_nothing() {
    let attention = |mask: Mask| {
        Attention::builder()
            .heads(2)
            .kv_heads(1)
            .queries(131)
            .head_dim(7)
            .value_dim(5)
            .mask(mask)
            .build()
            .unwrap()
    };
    for (plain, same) in [
        (Mask::causal(), Mask::causal().window(131)),
        (Mask::causal(), Mask::causal().window(usize::MAX)),
        (Mask::full(), Mask::full().window(131)),
        (Mask::causal(), Mask::causal().cu_seqlens([0, 131])),
        (Mask::full(), Mask::full().cu_seqlens([0, 0, 131, 131])),
        (Mask::full(), Mask::causal().q_offset(131)),
    ] {
        let (plain, same) = (attention(plain), attention(same));
        let data = Data::random(&plain, 3, Grid::Half);
        for (engine, dtype) in AnyEngine::with_types(Grid::Half) {
            let (want, got) = (run_as(dtype, engine, &plain, &data), run_as(dtype, engine, &same, &data));
            let tolerance = Tolerance::of(dtype, &plain);
            assert_results(
                &format!("{:?}, {engine:?} {dtype:?}", same.mask()),
                &plain,
                &data,
                &got,
                &want,
                tolerance,
            );
        }
    }
}
