//! Nothing to compute, and queries that see nothing.

use crate::common::*;
use flashlla::{Attention, AttentionBuilder, Mask, Ridge};

fn everything_is_blank(attention: &Attention, data: &Data, what: &str) {
    for engine in AnyEngine::all() {
        if engine.is_uncentred() && data.probe.is_some() {
            continue;
        }
        for dtype in Dtype::ALL {
            let got = run_as(dtype, engine, attention, data);
            let rows = attention.batch() * attention.heads() * attention.queries();
            assert_eq!(got.out.shape(), attention.out_shape(), "{what}");
            assert_eq!(
                (got.dk.shape(), got.dv.shape()),
                (&attention.key_shape()[..], &attention.value_shape()[..])
            );
            assert_eq!(got.lse.data().len(), rows);
            assert_eq!((got.solve.iterations.len(), got.solve.residual.len()), (rows, rows), "{what}");
            for (name, tensor) in got.named() {
                if name == "probe" && data.probe.is_some() {
                    continue; // A given probe is handed back.
                }
                let expected = if name == "lse" { f64::NEG_INFINITY } else { 0.0 };
                assert!(
                    tensor.data().iter().all(|&x| x == expected),
                    "{what}: {name} of {engine:?} in {dtype:?} is {:?}",
                    tensor.data()
                );
            }
        }
    }
}

#[test]
fn sizes_of_zero_give_empty_or_blank_results() {
    let base =
        || Attention::builder().batch(2).heads(4).kv_heads(2).queries(5).keys(7).head_dim(3).value_dim(2);
    let blank: [(&str, AttentionBuilder); 8] = [
        ("no batch", base().batch(0)),
        ("no queries", base().queries(0)),
        ("no keys", base().keys(0)),
        ("no queries and no keys", base().queries(0).keys(0)),
        ("nothing at all", base().batch(0).queries(0).keys(0)),
        ("no queries, causal", base().queries(0).mask(Mask::causal().q_offset(7))),
        ("no keys, every mask", base().keys(0).mask(Mask::causal().window(2).leave_one_out())),
        ("no keys, packed", base().queries(0).keys(0).mask(Mask::full().cu_seqlens([0, 0, 0]))),
    ];
    for (what, builder) in blank {
        let attention = builder.build().unwrap();
        let data = Data::random(&attention, 1, Grid::Half);
        everything_is_blank(&attention, &data, what);
        let bias = data.clone().with_bias([1, 2, attention.keys(), 1], 2, Grid::Half);
        everything_is_blank(&attention, &bias, what);
        everything_is_blank(&attention, &data.with_probe(3, Grid::Half), what);
    }
}

#[test]
fn per_query_ridges_of_no_queries_are_empty() {
    let attention = Attention::builder()
        .queries(0)
        .keys(3)
        .head_dim(2)
        .ridge(Ridge::per_query([], [1, 1, 0]))
        .build()
        .unwrap();
    let got = run::<f32>(AnyEngine::cpu(), &attention, &Data::random(&attention, 1, Grid::Half));
    assert_eq!(got.dridge.shape(), [1, 1, 0]);
}

#[test]
fn queries_that_see_no_key_give_zeros_among_others_that_do() {
    let n = 140;
    /// Whether the query at a place sees no key.
    type Blind = Box<dyn Fn(usize) -> bool>;
    let blind: [(&str, Mask, Blind); 5] = [
        ("before the first key", Mask::causal().q_offset(-65), Box::new(|i| i < 65)),
        ("beyond the window", Mask::causal().q_offset(130).window(8), Box::new(|i| i > 16)),
        ("alone, without its own", Mask::causal().leave_one_out(), Box::new(|i| i == 0)),
        ("a window of its own only", Mask::causal().window(1).leave_one_out(), Box::new(|_| true)),
        (
            "sequences of one, without their own",
            Mask::full().cu_seqlens([0, 1, 2, 60, 60, 61, 140]).leave_one_out(),
            Box::new(|i| i < 2 || i == 60),
        ),
    ];
    for (what, mask, sees_nothing) in blind {
        let attention = Attention::builder()
            .heads(2)
            .kv_heads(1)
            .queries(n)
            .head_dim(5)
            .value_dim(6)
            .mask(mask)
            .build()
            .unwrap();
        let data = Data::random(&attention, 8, Grid::Half).with_bias([1, 1, n, 1], 9, Grid::Half);
        let want = run::<f64>(AnyEngine::reference(), &attention, &data);
        for (engine, dtype) in AnyEngine::with_types(Grid::Half) {
            let got = run_as(dtype, engine, &attention, &data);
            let tolerance = Tolerance::of(dtype, &attention);
            assert_results(
                &format!("{what}: {engine:?} {dtype:?}"),
                &attention,
                &data,
                &got,
                &want,
                tolerance,
            );
            for row in 0..2 * n {
                let blind = sees_nothing(row % n);
                assert_eq!(got.lse.data()[row] == f64::NEG_INFINITY, blind, "{what}: lse of row {row}");
                for name in ["out", "key_mean", "probe", "dq"] {
                    let tensor = got.get(name);
                    let x = tensor.shape()[3];
                    let zeros = tensor.data()[row * x..][..x].iter().all(|&x| x == 0.0);
                    // A query that sees one key has a gradient of 0 too, up to rounding.
                    assert!(zeros || !blind, "{what}: {name} of row {row}");
                    assert!(!zeros || blind || name == "dq", "{what}: {name} of row {row} is 0");
                }
            }
        }
    }
}
