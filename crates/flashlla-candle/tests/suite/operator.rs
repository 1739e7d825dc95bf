//! The operator on Candle's tensors against the library's reference, and its gradients.

use crate::gradients::{product, slope};
use crate::mixers::{error, random};
use candle_core::{DType, Device, Tensor, Var};
use flashlla::{Attention, Engine, Mask, Reference, Ridge, View};
use flashlla_candle::{AttentionOptions, local_linear_attention};

/// `q [2, 4, N, 6]`, `k [2, 2, M, 6]`, `v [2, 2, M, 5]`.
fn inputs(n: usize, m: usize, seed: u64) -> [Tensor; 3] {
    [random(&[2, 4, n, 6], seed), random(&[2, 2, m, 6], seed + 1), random(&[2, 2, m, 5], seed + 2)]
}

fn numbers(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn tensor(values: &[f64], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

/// Outputs and gradients of q, k, v, ridge and scale for `grad_out` as the reference has them.
fn expected([q, k, v]: &[Tensor; 3], ridge: Ridge, scale: f64, mask: Mask, grad_out: &Tensor) -> Vec<Tensor> {
    let (qn, kn, vn, gn) = (numbers(q), numbers(k), numbers(v), numbers(grad_out));
    fn view<'a>(values: &'a [f64], t: &Tensor) -> View<'a, f64> {
        View::bhnd(values, t.dims4().unwrap().into()).unwrap()
    }
    let (qv, kv, vv) = (view(&qn, q), view(&kn, k), view(&vn, v));
    let attention =
        Attention::builder_for(&qv, &kv, &vv).ridge(ridge).scale(scale).mask(mask).build().unwrap();
    let problem = attention.problem(qv, kv, vv).unwrap();
    let forward = Reference::default().forward(&problem).unwrap();
    let g = Reference::default().backward(&problem, &forward.state, view(&gn, grad_out)).unwrap();
    let dridge = g.other.dridge;
    [forward.out, g.dq, g.dk, g.dv, dridge]
        .iter()
        .map(|t| tensor(t.data(), t.shape()))
        .chain([tensor(&[g.other.dscale], &[])])
        .collect()
}

fn causal(n: usize, m: usize) -> Mask {
    Mask::causal().q_offset(m as i64 - n as i64)
}

fn options(mask: Mask) -> AttentionOptions {
    AttentionOptions { mask, ..AttentionOptions::default() }
}

#[test]
fn agrees_with_the_reference() {
    for (n, m, mask) in [
        (9, 9, Mask::causal()),
        (4, 11, causal(4, 11)),
        (9, 9, Mask::full()),
        (9, 9, Mask::causal().window(3)),
        (1, 1, Mask::causal()),
    ] {
        let ([q, k, v], weights) = (inputs(n, m, 1), random(&[2, 4, n, 5], 9));
        let ridges = random(&[4], 10).sqr().unwrap().affine(1.0, 0.3).unwrap();
        let expected = expected(
            &[q.clone(), k.clone(), v.clone()],
            Ridge::per_head(numbers(&ridges)),
            0.7,
            mask.clone(),
            &weights,
        );
        let vars =
            [q, k, v, ridges, Tensor::new(0.7, &Device::Cpu).unwrap()].map(|t| Var::from_tensor(&t).unwrap());
        let [q, k, v, ridge, scale] = &vars;
        let out = local_linear_attention(q, k, v, ridge, scale.as_tensor(), &options(mask)).unwrap();
        assert!(error(&out, &expected[0]) < 1e-11);
        let gradients = (&out * &weights).unwrap().sum_all().unwrap().backward().unwrap();
        for (i, (var, expected)) in vars.iter().zip(&expected[1..]).enumerate() {
            let gradient = gradients.get(var).unwrap();
            // With one key there is nothing to learn: gradients of 0.
            if numbers(expected).iter().all(|&x| x == 0.0) {
                assert!(numbers(gradient).iter().all(|&x| x.abs() < 1e-12), "input {i}: not 0");
                continue;
            }
            let error = error(gradient, expected);
            assert!(error < 1e-9, "gradient of input {i}: error {error}");
        }
    }
}

#[test]
fn a_scale_per_head_is_a_call_per_head() {
    let ([q, k, v], weights) = (inputs(7, 7, 3), random(&[2, 4, 7, 5], 9));
    let scales = [0.4, 1.3];
    let scale = Var::new(&scales, &Device::Cpu).unwrap();
    let ridge = Var::new(0.8f64, &Device::Cpu).unwrap();
    let [qv, kv] = [&q, &k].map(|t| Var::from_tensor(t).unwrap());
    let out =
        local_linear_attention(&qv, &kv, &v, &ridge, scale.as_tensor(), &AttentionOptions::causal()).unwrap();
    let gradients = (&out * &weights).unwrap().sum_all().unwrap().backward().unwrap();
    let mut dridge = 0.0;
    for (h, &of_head) in scales.iter().enumerate() {
        let of_queries = |t: &Tensor| t.narrow(1, 2 * h, 2).unwrap();
        let of_keys = |t: &Tensor| t.narrow(1, h, 1).unwrap();
        let parts = [of_queries(&q), of_keys(&k), of_keys(&v)];
        let expected = expected(&parts, Ridge::scalar(0.8), of_head, Mask::causal(), &of_queries(&weights));
        assert!(error(&of_queries(&out), &expected[0]) < 1e-11);
        assert!(error(&of_queries(gradients.get(&qv).unwrap()), &expected[1]) < 1e-9);
        assert!(error(&of_keys(gradients.get(&kv).unwrap()), &expected[2]) < 1e-9);
        let dscale = numbers(gradients.get(&scale).unwrap())[h];
        let wanted = numbers(&expected[5])[0];
        assert!((dscale - wanted).abs() < 1e-9 * wanted.abs(), "{dscale}, not {wanted}");
        dridge += numbers(&expected[4])[0];
    }
    let got = numbers(gradients.get(&ridge).unwrap())[0];
    assert!((got - dridge).abs() < 1e-9 * dridge.abs(), "{got}, not {dridge}");
}

#[test]
fn ridges_take_any_shape_that_fits() {
    let [q, k, v] = inputs(5, 5, 4);
    let full = random(&[2, 4, 5], 5).sqr().unwrap().affine(1.0, 0.2).unwrap();
    for shape in [vec![], vec![4], vec![1, 4, 1], vec![2, 1, 1], vec![2, 4, 5]] {
        let mut ridge = full.clone();
        match shape.len() {
            0 => ridge = Tensor::new(0.5, &Device::Cpu).unwrap(),
            1 => ridge = ridge.narrow(0, 0, 1).unwrap().narrow(2, 0, 1).unwrap().reshape(4).unwrap(),
            _ => {
                for (axis, &size) in shape.iter().enumerate() {
                    ridge = ridge.narrow(axis, 0, size).unwrap();
                }
            }
        }
        let ridge = Var::from_tensor(&ridge).unwrap();
        let weights = random(&[2, 4, 5, 5], 6);
        for scale in [None, Some(Var::new(&[0.5, 0.9], &Device::Cpu).unwrap())] {
            let loss = || {
                let out = match &scale {
                    None => local_linear_attention(&q, &k, &v, &ridge, 0.5, &AttentionOptions::causal()),
                    Some(s) => {
                        local_linear_attention(&q, &k, &v, &ridge, s.as_tensor(), &AttentionOptions::causal())
                    }
                };
                (out.unwrap() * &weights).unwrap().sum_all().unwrap()
            };
            let gradients = loss().backward().unwrap();
            assert_eq!(gradients.get(&ridge).unwrap().dims(), shape);
            let along = [(ridge.clone(), random(&shape, 7))];
            let (got, wanted) = (product(&gradients, &along), slope(|| numbers(&loss())[0], &along, 1e-3));
            assert!((got - wanted).abs() < 1e-7 * wanted.abs(), "{shape:?}: {got}, not {wanted}");
        }
    }
}

#[test]
fn a_given_probe_has_a_gradient() {
    let ([q, k, v], probe) = (inputs(6, 6, 8), random(&[2, 4, 6, 6], 9));
    let weights = random(&[2, 4, 6, 5], 10);
    let ridge = Tensor::new(1.0, &Device::Cpu).unwrap();
    for scale in [None, Some(Var::new(&[0.5, 0.9], &Device::Cpu).unwrap())] {
        let vars = [&q, &k, &v, &probe].map(|t| Var::from_tensor(t).unwrap());
        let loss = || {
            let [q, k, v, probe] = &vars;
            let options =
                AttentionOptions { probe: Some(probe.as_tensor().clone()), ..AttentionOptions::causal() };
            let out = match &scale {
                None => local_linear_attention(q, k, v, &ridge, 0.5, &options),
                Some(s) => local_linear_attention(q, k, v, &ridge, s.as_tensor(), &options),
            };
            (out.unwrap() * &weights).unwrap().sum_all().unwrap()
        };
        let gradients = loss().backward().unwrap();
        for (i, var) in vars.iter().chain(&scale).enumerate() {
            let along = [(var.clone(), random(var.dims(), 11))];
            let (got, wanted) = (product(&gradients, &along), slope(|| numbers(&loss())[0], &along, 1e-3));
            assert!((got - wanted).abs() < 1e-7 * wanted.abs().max(1e-3), "input {i}: {got}, not {wanted}");
        }
    }
}

/// One graph differentiated twice, a graph that has the operator in it twice with common inputs, and several threads.
#[test]
fn what_was_saved_serves_any_number_of_backwards() {
    let vars = inputs(7, 7, 12).map(|t| Var::from_tensor(&t).unwrap());
    let ridge = Var::new(0.7f64, &Device::Cpu).unwrap();
    let call = |q: &Tensor| {
        local_linear_attention(q, &vars[1], &vars[2], &ridge, 0.5, &AttentionOptions::causal()).unwrap()
    };
    let first = call(&vars[0]).sqr().unwrap().sum_all().unwrap();
    let second = call(&vars[0].affine(-0.5, 0.1).unwrap()).sum_all().unwrap();
    let of = |loss: &Tensor| -> Vec<Tensor> {
        let gradients = loss.backward().unwrap();
        vars.iter().chain([&ridge]).map(|var| gradients.get(var).unwrap().clone()).collect()
    };
    let (a, b) = (of(&first), of(&second));
    let both = of(&(&first + &second).unwrap());
    let again: Vec<Vec<Tensor>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| of(&first))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for i in 0..4 {
        assert!(error(&both[i], &(&a[i] + &b[i]).unwrap()) < 1e-12);
        for other in &again {
            assert_eq!(numbers(&other[i]), numbers(&a[i]));
        }
    }
}

#[test]
fn only_what_is_asked_for_is_needed() {
    let [q, k, v] = inputs(6, 6, 13);
    let ridge = Tensor::new(1.0, &Device::Cpu).unwrap();
    for which in 0..4 {
        let mut all = [q.clone(), k.clone(), v.clone(), ridge.clone()];
        let var = Var::from_tensor(&all[which]).unwrap();
        all[which] = var.as_tensor().clone();
        let [q, k, v, ridge] = &all;
        let loss = || {
            local_linear_attention(q, k, v, ridge, 0.5, &AttentionOptions::causal())
                .unwrap()
                .sqr()
                .unwrap()
                .sum_all()
                .unwrap()
        };
        let along = [(var.clone(), random(var.dims(), 14))];
        let got = product(&loss().backward().unwrap(), &along);
        let wanted = slope(|| numbers(&loss())[0], &along, 1e-3);
        assert!((got - wanted).abs() < 1e-7 * wanted.abs(), "input {which}: {got}, not {wanted}");
    }
}

#[test]
fn layouts_are_read_in_place() {
    let [q, k, v] = inputs(8, 8, 15);
    let ridge = Tensor::new(1.0, &Device::Cpu).unwrap();
    let call = |q: &Tensor, k: &Tensor, v: &Tensor| {
        local_linear_attention(q, k, v, &ridge, 0.5, &AttentionOptions::causal()).unwrap()
    };
    let plain = call(&q, &k, &v);
    // Tokens before heads; a part of a larger tensor; dims before tokens.
    let turned = q.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
    let part = Tensor::cat(&[&random(&[2, 2, 3, 6], 16), &k], 2).unwrap().narrow(2, 3, 8).unwrap();
    let columns = v.transpose(2, 3).unwrap().contiguous().unwrap().transpose(2, 3).unwrap();
    assert_eq!(numbers(&call(&turned, &part, &columns)), numbers(&plain));
}

#[test]
fn narrow_types_are_near_the_wide_one() {
    let [q, k, v] = inputs(16, 16, 17);
    for (dtype, allowed) in [(DType::F32, 1e-5), (DType::BF16, 6e-3), (DType::F16, 8e-4)] {
        let rounded = [&q, &k, &v].map(|t| t.to_dtype(dtype).unwrap());
        let exact = rounded.clone().map(|t| t.to_dtype(DType::F64).unwrap());
        let weights = random(&[2, 4, 16, 5], 18).to_dtype(dtype).unwrap().to_dtype(DType::F64).unwrap();
        let expected = expected(&exact, Ridge::scalar(1.0), 0.5, Mask::causal(), &weights);
        let vars = rounded.map(|t| Var::from_tensor(&t).unwrap());
        let ridge = Var::new(1f32, &Device::Cpu).unwrap();
        let out =
            local_linear_attention(&vars[0], &vars[1], &vars[2], &ridge, 0.5, &AttentionOptions::causal())
                .unwrap();
        assert_eq!(out.dtype(), dtype);
        let loss = (out.to_dtype(DType::F64).unwrap() * &weights).unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        assert!(error(&wide(&out), &expected[0]) < allowed);
        for (var, expected) in vars.iter().chain([&ridge]).zip(&expected[1..]) {
            let gradient = gradients.get(var).unwrap();
            assert_eq!(gradient.dtype(), var.dtype());
            assert!(error(&wide(gradient), expected) < allowed);
        }
    }
}

#[test]
fn nothing_is_computed_for_nothing() {
    let ridge = Tensor::new(1f32, &Device::Cpu).unwrap();
    for (batch, n, m) in [(0, 4, 4), (1, 0, 4), (1, 0, 0)] {
        let zeros = |n| Var::zeros((batch, 2, n, 4), DType::F32, &Device::Cpu).unwrap();
        let (q, k, v) = (zeros(n), zeros(m), zeros(m));
        let out = local_linear_attention(&q, &k, &v, &ridge, 0.5, &AttentionOptions::default()).unwrap();
        assert_eq!(out.dims(), [batch, 2, n, 4]);
        let gradients = out.sum_all().unwrap().backward().unwrap();
        assert!(numbers(gradients.get(&k).unwrap()).iter().all(|&x| x == 0.0));
    }
}

#[test]
fn what_is_not_allowed_is_said() {
    let [q, k, v] = inputs(4, 4, 19);
    let (one, causal) = (Tensor::new(1.0, &Device::Cpu).unwrap(), AttentionOptions::causal());
    let refused = |result: candle_core::Result<Tensor>, parts: &[&str]| {
        let error = result.unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert!(!error.contains('\n'), "{error}");
    };
    fn lla(
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        ridge: &Tensor,
        scale: impl Into<flashlla_candle::Scale>,
        options: &AttentionOptions,
    ) -> candle_core::Result<Tensor> {
        local_linear_attention(q, k, v, ridge, scale, options)
    }
    refused(lla(&q, &k.narrow(3, 0, 5).unwrap(), &v, &one, 0.5, &causal), &["k: shape [2, 2, 4, 5]"]);
    refused(lla(&q, &k, &v.narrow(2, 0, 3).unwrap(), &one, 0.5, &causal), &["v: shape [2, 2, 3, 5]"]);
    refused(
        lla(&q.squeeze(0).unwrap().narrow(0, 0, 1).unwrap().squeeze(0).unwrap(), &k, &v, &one, 0.5, &causal),
        &["q: shape"],
    );
    refused(lla(&q, &k.to_dtype(DType::F32).unwrap(), &v, &one, 0.5, &causal), &["k: f32", "f64"]);
    refused(lla(&q.to_dtype(DType::U32).unwrap(), &k, &v, &one, 0.5, &causal), &["k: f64", "u32"]);
    refused(lla(&q, &k, &v, &one.neg().unwrap(), 0.5, &causal), &["ridge: -1", "greater than 0"]);
    refused(lla(&q, &k, &v, &random(&[3], 1), 0.5, &causal), &["ridge: shape [3]"]);
    refused(lla(&q, &k, &v, &random(&[2, 4], 1), 0.5, &causal), &["ridge: shape [2, 4]"]);
    refused(lla(&q, &k, &v, &one, f64::NAN, &causal), &["scale: NaN", "finite"]);
    refused(lla(&q, &k, &v, &one, Tensor::new(&[0.5, -1.0], &Device::Cpu).unwrap(), &causal), &["scale: -1"]);
    refused(lla(&q, &k, &v, &one, random(&[4], 1), &causal), &["scale: shape [4]", "2"]);
    let probe = AttentionOptions { probe: Some(v.clone()), ..causal };
    refused(lla(&q, &k, &v, &one, 0.5, &probe), &["probe: shape [2, 2, 4, 5]"]);
}
