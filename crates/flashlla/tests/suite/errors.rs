//! Wrong descriptions and data: an error of one line that names the argument, what was given and what is allowed, and
//! outputs as they were.

use crate::common::*;
use flashlla::{
    Attention, AttentionBuilder, Engine, Error, Mask, Problem, Result, Ridge, Solver, State, Tensor, View,
    ViewMut,
};
use std::fmt::Debug;

#[track_caller]
fn refused<T: Debug>(what: &str, result: Result<T>, parts: &[&str]) {
    let message = result.expect_err(what).to_string();
    assert!(!message.contains('\n') && message.len() < 400, "{what}: {message}");
    for part in parts {
        assert!(message.contains(part), "{what}: no {part:?} in {message:?}");
    }
    let argument = parts[0];
    assert!(message.starts_with(argument), "{what}: the message begins with the argument: {message}");
}

fn base() -> AttentionBuilder {
    Attention::builder().batch(2).heads(6).kv_heads(3).queries(5).keys(7).head_dim(4).value_dim(3)
}

#[test]
fn wrong_descriptions_are_refused() {
    let cu = |list: &[usize]| Mask::full().cu_seqlens(list);
    let cases: Vec<(&str, AttentionBuilder, &[&str])> = vec![
        ("no heads", base().heads(0).kv_heads(0), &["heads", "0", "at least 1"]),
        ("no KV heads", base().kv_heads(0), &["kv_heads", "0", "divisor", "6"]),
        ("heads that do not divide", base().kv_heads(4), &["kv_heads", "4", "divisor", "6"]),
        ("more KV heads than heads", base().kv_heads(12), &["kv_heads", "12", "divisor", "6"]),
        ("head_dim 0", base().head_dim(0), &["head_dim", "0", "1 to 256"]),
        ("head_dim 257", base().head_dim(257), &["head_dim", "257", "1 to 256"]),
        ("value_dim 0", base().value_dim(0), &["value_dim", "0", "1 to 256"]),
        ("value_dim 257", base().value_dim(257), &["value_dim", "257", "1 to 256"]),
        ("no dimension at all", Attention::builder().queries(3), &["head_dim", "0", "1 to 256"]),
        ("ridge 0", base().ridge(0.0), &["ridge", "0", "greater than 0"]),
        ("ridge -0", base().ridge(-0.0), &["ridge", "0", "greater than 0"]),
        ("ridge below 0", base().ridge(-2.5), &["ridge", "-2.5", "greater than 0"]),
        ("ridge NaN", base().ridge(f64::NAN), &["ridge", "NaN", "finite"]),
        ("ridge infinite", base().ridge(f64::INFINITY), &["ridge", "inf", "finite"]),
        (
            "one bad ridge",
            base().ridge(Ridge::per_head([1., 1., 1., -3., 1., 1.])),
            &["ridge", "-3", "greater"],
        ),
        ("ridges for other heads", base().ridge(Ridge::per_head([1.0; 3])), &["ridge", "[3]", "[6]"]),
        ("ridges of no head", base().ridge(Ridge::per_head([])), &["ridge", "[0]", "[6]"]),
        (
            "ridges for other queries",
            base().ridge(Ridge::per_query([1.0; 72], [2, 6, 6])),
            &["ridge", "[2, 6, 6]", "[2, 6, 5]"],
        ),
        (
            "too few ridges",
            base().ridge(Ridge::per_query([1.0; 59], [2, 6, 5])),
            &["ridge", "59", "[2, 6, 5]"],
        ),
        (
            "a ridge shape that overflows",
            base().ridge(Ridge::per_query([1.0], [usize::MAX, usize::MAX, 2])),
            &["ridge", "[2, 6, 5]"],
        ),
        ("window 0", base().mask(Mask::causal().window(0)), &["window", "0", "at least 1"]),
        ("cu_seqlens empty", base().mask(cu(&[])), &["cu_seqlens", "[]", "running sums", "(7)"]),
        ("cu_seqlens of one", base().mask(cu(&[0])), &["cu_seqlens", "[0]", "running sums", "(7)"]),
        ("cu_seqlens from 1", base().mask(cu(&[1, 7])), &["cu_seqlens", "[1, 7]", "from 0", "(7)"]),
        ("cu_seqlens too short", base().mask(cu(&[0, 3, 6])), &["cu_seqlens", "[0, 3, 6]", "(7)"]),
        ("cu_seqlens too long", base().mask(cu(&[0, 3, 8])), &["cu_seqlens", "[0, 3, 8]", "(7)"]),
        (
            "cu_seqlens falling",
            base().mask(cu(&[0, 5, 3, 7])),
            &["cu_seqlens", "[0, 5, 3, 7]", "never decreasing"],
        ),
        ("cu_seqlens long", base().mask(cu(&[3; 1000])), &["cu_seqlens", "998 values", "(7)"]),
        ("queries after the sequences", base().mask(cu(&[0, 7]).q_offset(3)), &["q_offset", "3", "0..7"]),
        ("queries before the sequences", base().mask(cu(&[0, 7]).q_offset(-1)), &["q_offset", "-1", "0..7"]),
        ("positions that overflow", base().mask(Mask::causal().q_offset(i64::MAX)), &["q_offset", "64 bits"]),
        ("scale NaN", base().scale(f64::NAN), &["scale", "NaN", "finite"]),
        ("scale infinite", base().scale(f64::NEG_INFINITY), &["scale", "-inf", "finite"]),
        ("tolerance NaN", base().solver(cg(f64::NAN, 5)), &["tolerance", "NaN", "from 0 to below 1"]),
        ("tolerance below 0", base().solver(cg(-1e-3, 5)), &["tolerance", "-0.001", "from 0 to below 1"]),
        ("tolerance 1", base().solver(cg(1.0, 5)), &["tolerance", "1", "from 0 to below 1"]),
        ("max_iters 0", base().solver(cg(1e-3, 0)), &["max_iters", "0", "at least 1"]),
        (
            "tolerance of auto",
            base().solver(Solver::Auto { tolerance: Some(f64::INFINITY), max_iters: None }),
            &["tolerance", "inf", "from 0 to below 1"],
        ),
        (
            "max_iters of auto",
            base().solver(Solver::Auto { tolerance: None, max_iters: Some(0) }),
            &["max_iters", "0", "at least 1"],
        ),
        ("too many queries", base().queries(usize::MAX), &["queries", "18446744073709551615", "batch 2"]),
        ("too many keys", base().keys(usize::MAX / 5), &["keys", "3689348814741910323", "batch 2"]),
        ("too large a batch", base().batch(usize::MAX / 2), &["queries", "5", "batch 9223372036854775807"]),
        (
            "too many heads",
            base().heads(usize::MAX).kv_heads(1),
            &["queries", "5", "18446744073709551615 heads"],
        ),
    ];
    assert!(cases.len() >= 40);
    for (what, builder, parts) in cases {
        refused(what, builder.build(), parts);
    }
}

fn cg(tolerance: f64, max_iters: usize) -> Solver {
    Solver::Cg { tolerance, max_iters }
}

#[test]
fn what_is_allowed_to_the_limit_is_accepted() {
    for (what, builder) in [
        ("largest dimensions", base().head_dim(256).value_dim(256)),
        ("smallest dimensions", base().head_dim(1).value_dim(1)),
        ("a scale of 0", base().scale(0.0)),
        ("a negative scale", base().scale(-1.0)),
        ("a ridge that is hardly there", base().ridge(f64::MIN_POSITIVE)),
        ("tolerance 0", base().solver(cg(0.0, 1))),
        ("a window beyond everything", base().mask(Mask::causal().window(usize::MAX))),
        ("an offset before everything", base().mask(Mask::causal().q_offset(i64::MIN))),
        ("empty sequences", base().mask(Mask::full().cu_seqlens([0, 0, 7, 7, 7]).q_offset(2))),
        ("no batch", base().batch(0)),
    ] {
        assert!(builder.build().is_ok(), "{what}");
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let attention = base().build().unwrap();
    let zeros = |shape: [usize; 4]| Tensor::<f32>::zeros(&shape);
    let (q, k, v) = (zeros([2, 6, 5, 4]), zeros([2, 3, 7, 4]), zeros([2, 3, 7, 3]));
    for shape in [[1, 6, 5, 4], [2, 3, 5, 4], [2, 6, 4, 4], [2, 6, 5, 5], [2, 5, 6, 4], [0, 6, 5, 4]] {
        let wrong = zeros(shape);
        let given = format!("{shape:?}");
        refused(
            "q",
            attention.problem(wrong.view(), k.view(), v.view()),
            &["q", &given, "[2, 6, 5, 4]", "query heads"],
        );
    }
    for shape in [[2, 6, 7, 4], [2, 3, 5, 4], [2, 3, 7, 3], [1, 3, 7, 4]] {
        let wrong = zeros(shape);
        let given = format!("{shape:?}");
        refused(
            "k",
            attention.problem(q.view(), wrong.view(), v.view()),
            &["k", &given, "[2, 3, 7, 4]", "KV heads"],
        );
    }
    for shape in [[2, 6, 7, 3], [2, 3, 8, 3], [2, 3, 7, 4]] {
        let wrong = zeros(shape);
        let given = format!("{shape:?}");
        refused(
            "v",
            attention.problem(q.view(), k.view(), wrong.view()),
            &["v", &given, "[2, 3, 7, 3]", "value_dim"],
        );
    }
    let problem = || attention.problem(q.view(), k.view(), v.view()).unwrap();
    for shape in [[3, 1, 7, 1], [2, 2, 7, 1], [1, 1, 6, 1], [1, 1, 7, 2], [1, 1, 1, 7], [0, 1, 7, 1]] {
        let wrong = zeros(shape);
        refused(
            "bias",
            problem().with_bias(wrong.view()),
            &["bias", &format!("{shape:?}"), "[2 or 1, 6 or 3 or 1, 7, 1]"],
        );
    }
    for shape in [[2, 3, 5, 4], [2, 6, 5, 3], [1, 6, 5, 4]] {
        let wrong = zeros(shape);
        refused(
            "probe",
            problem().with_probe(wrong.view()),
            &["probe", &format!("{shape:?}"), "[2, 6, 5, 4]"],
        );
    }
}

/// Sizes taken from the tensors themselves do not hide that they disagree.
#[test]
fn a_description_made_for_tensors_finds_disagreeing_ones() {
    let (q, k, v) = (
        Tensor::<f32>::zeros(&[2, 4, 5, 8]),
        Tensor::<f32>::zeros(&[2, 2, 9, 8]),
        Tensor::<f32>::zeros(&[2, 2, 9, 6]),
    );
    let attempt = |q: &Tensor<f32>, k: &Tensor<f32>, v: &Tensor<f32>| -> Result<()> {
        let attention = Attention::builder_for(&q.view(), &k.view(), &v.view()).build()?;
        attention.problem(q.view(), k.view(), v.view())?;
        Ok(())
    };
    assert!(attempt(&q, &k, &v).is_ok());
    refused("batch of k", attempt(&q, &Tensor::zeros(&[3, 2, 9, 8]), &v), &["k", "[3, 2, 9, 8]"]);
    refused("dim of k", attempt(&q, &Tensor::zeros(&[2, 2, 9, 7]), &v), &["k", "[2, 2, 9, 7]"]);
    refused("heads of v", attempt(&q, &k, &Tensor::zeros(&[2, 1, 9, 6])), &["v", "[2, 1, 9, 6]"]);
    refused("keys of v", attempt(&q, &k, &Tensor::zeros(&[2, 2, 8, 6])), &["v", "[2, 2, 8, 6]"]);
    refused("heads of k", attempt(&q, &Tensor::zeros(&[2, 3, 9, 8]), &v), &["kv_heads", "3"]);
    refused("dim 0", attempt(&Tensor::zeros(&[2, 4, 5, 0]), &k, &v), &["head_dim", "0"]);
}

const MARK: f32 = -12345.0;

fn with_problem(test: impl Fn(AnyEngine, &Attention, &Problem<f32>, &State<f32>)) {
    let attention = base().mask(Mask::causal()).build().unwrap();
    let data = Data::random(&attention, 1, Grid::F32);
    let (q, k, v) = (cast::<f32>(&data.q), cast::<f32>(&data.k), cast::<f32>(&data.v));
    let problem = attention.problem(q.view(), k.view(), v.view()).unwrap();
    for engine in AnyEngine::all() {
        let state = engine.forward(&problem).unwrap().state;
        test(engine, &attention, &problem, &state);
    }
}

#[test]
fn a_forward_that_is_refused_leaves_its_output_alone() {
    with_problem(|engine, _, problem, _| {
        for shape in [[2, 6, 5, 4], [2, 3, 5, 3], [1, 6, 5, 3], [2, 6, 7, 3], [2, 5, 6, 3]] {
            let mut out = vec![MARK; shape.iter().product()];
            let view = ViewMut::bhnd(&mut out, shape).unwrap();
            let given = format!("{shape:?}");
            refused("out", engine.forward_into(problem, view), &["out", &given, "[2, 6, 5, 3]", "value_dim"]);
            assert!(out.iter().all(|&x| x == MARK));
        }
    });
}

#[test]
fn a_backward_that_is_refused_leaves_its_outputs_alone() {
    with_problem(|engine, attention, problem, state| {
        let attempt =
            |what: &str, state: &State<f32>, g: [usize; 4], shapes: [[usize; 4]; 3], parts: &[&str]| {
                let [mut dq, mut dk, mut dv] = shapes.map(|shape| vec![MARK; shape.iter().product()]);
                let grad_out = Tensor::<f32>::zeros(&g);
                let result = engine.backward_into(
                    problem,
                    state,
                    grad_out.view(),
                    ViewMut::bhnd(&mut dq, shapes[0]).unwrap(),
                    ViewMut::bhnd(&mut dk, shapes[1]).unwrap(),
                    ViewMut::bhnd(&mut dv, shapes[2]).unwrap(),
                );
                refused(what, result, parts);
                assert!(
                    [dq, dk, dv].iter().flatten().all(|&x| x == MARK),
                    "{what}: outputs written by {engine:?}"
                );
            };
        let (right, out) = (
            [attention.query_shape(), attention.key_shape(), attention.value_shape()],
            attention.out_shape(),
        );
        attempt("grad_out", state, [2, 6, 5, 4], right, &["grad_out", "[2, 6, 5, 4]", "[2, 6, 5, 3]"]);
        attempt("grad_out", state, [2, 3, 5, 3], right, &["grad_out", "[2, 3, 5, 3]", "[2, 6, 5, 3]"]);
        let wrong = |place: usize, shape: [usize; 4]| {
            std::array::from_fn(|i| if i == place { shape } else { right[i] })
        };
        attempt("dq", state, out, wrong(0, [2, 6, 5, 3]), &["dq", "[2, 6, 5, 3]", "[2, 6, 5, 4]"]);
        attempt("dk", state, out, wrong(1, [2, 6, 7, 4]), &["dk", "[2, 6, 7, 4]", "[2, 3, 7, 4]"]);
        attempt("dv", state, out, wrong(2, [2, 3, 7, 4]), &["dv", "[2, 3, 7, 4]", "[2, 3, 7, 3]"]);
        // A state of another problem.
        let spoiled = |spoil: &dyn Fn(&mut State<f32>)| {
            let mut state = state.clone();
            spoil(&mut state);
            state
        };
        let lse = spoiled(&|s| s.lse = Tensor::zeros(&[2, 6, 4]));
        attempt("lse", &lse, out, right, &["lse", "[2, 6, 4]", "[2, 6, 5]"]);
        let mean = spoiled(&|s| s.key_mean = Tensor::zeros(&[2, 6, 5, 3]));
        attempt("key_mean", &mean, out, right, &["key_mean", "[2, 6, 5, 3]", "[2, 6, 5, 4]"]);
        let probe = spoiled(&|s| s.probe = Tensor::zeros(&[12, 5, 4]));
        attempt("probe", &probe, out, right, &["probe", "[12, 5, 4]", "[2, 6, 5, 4]"]);
    });
}

#[test]
fn the_papers_form_takes_no_probe() {
    let attention = base().build().unwrap();
    let data = Data::random(&attention, 1, Grid::F64).with_probe(2, Grid::F64);
    let problem = attention.problem(data.q.view(), data.k.view(), data.v.view()).unwrap();
    let probe = data.probe.unwrap();
    let problem = problem.with_probe(probe.view()).unwrap();
    refused("probe", AnyEngine::uncentred().forward(&problem), &["probe", "given", "left out"]);
}

#[test]
fn buffers_that_do_not_fit_are_refused() {
    let data = vec![0f64; 100];
    let short = |view: Result<View<f64>>, parts: &[&str]| refused("view", view, &[&["view"], parts].concat());
    short(View::bhnd(&data, [1, 2, 10, 6]), &["[1, 2, 10, 6]", "0..=119", "100"]);
    short(View::bnhd(&data, [3, 10, 2, 2]), &["0..=119", "100"]);
    short(View::bnd(&data, [1, 101, 1]), &["0..=100", "100"]);
    short(View::strided(&data, 95, [1, 1, 2, 3], [0, 0, 3, 1]), &["offset 95", "95..=100", "100"]);
    short(View::strided(&data, 2, [1, 1, 2, 2], [0, 0, -3, 1]), &["-1..=3", "100"]);
    short(View::strided(&data, 0, [usize::MAX; 4], [isize::MIN; 4]), &["100"]);
    short(View::bhnd(&data, [usize::MAX, usize::MAX, 2, 2]), &["100"]);
    let mut data = vec![0f64; 100];
    let mut overlaps = |shape, strides: [isize; 4]| {
        let view = ViewMut::strided(&mut data, 0, shape, strides);
        assert!(matches!(view, Err(Error::Overlap { .. })), "{shape:?} {strides:?}");
        refused("view", view, &["view", &format!("{shape:?}"), &format!("{strides:?}"), "overlaps"]);
    };
    overlaps([1, 2, 3, 4], [0, 0, 4, 1]);
    overlaps([2, 1, 3, 4], [4, 0, 4, 1]);
    overlaps([1, 1, 5, 4], [0, 0, 3, 1]);
    overlaps([1, 1, 5, 4], [0, 0, 1, 1]);
    let mut data = vec![MARK; 10];
    assert!(ViewMut::bhnd(&mut data, [1, 1, 3, 4]).is_err());
    assert!(data.iter().all(|&x| x == MARK));
}
