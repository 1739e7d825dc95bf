//! Gradients of every mixer against differences.

use crate::mixers::{config, made, random};
use candle_core::{Tensor, Var};
use flashlla_candle::{MixerConfig, MixerKind};
use std::collections::BTreeMap;

/// The slope of `f` along `direction` from `at`, by central differences of fourth order.
pub fn slope(f: impl Fn() -> f64, vars: &[(Var, Tensor)], step: f64) -> f64 {
    let start: Vec<Tensor> = vars.iter().map(|(var, _)| var.as_detached_tensor().copy().unwrap()).collect();
    let at = |h: f64| {
        for ((var, direction), start) in vars.iter().zip(&start) {
            var.set(&(start + (direction * h).unwrap()).unwrap()).unwrap();
        }
        f()
    };
    let slope = (8.0 * (at(step) - at(-step)) - (at(2.0 * step) - at(-2.0 * step))) / (12.0 * step);
    at(0.0);
    slope
}

/// `Σ gradient · direction` over all variables, each of which must have a gradient.
pub fn product(gradients: &candle_core::backprop::GradStore, vars: &[(Var, Tensor)]) -> f64 {
    let part = |(var, direction): &(Var, Tensor)| {
        let gradient = gradients.get(var).expect("every variable has a gradient");
        (gradient * direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    vars.iter().map(part).sum()
}

/// Every parameter and the input of a mixer, one after the other and all together.
fn check(config: &MixerConfig, n: usize) {
    let (mixer, parameters) = made(config, 11);
    let x = Var::from_tensor(&random(&[2, n, config.dim], 12)).unwrap();
    let weights = random(&[2, n, config.dim], 13);
    let loss = || (mixer.forward(&x).unwrap() * &weights).unwrap().sum_all().unwrap();
    let value = || loss().to_scalar::<f64>().unwrap();
    let gradients = loss().backward().unwrap();
    let mut named: Vec<(String, Var)> = vec![("x".into(), x.clone())];
    let parameters: BTreeMap<_, _> = parameters.data().lock().unwrap().clone().into_iter().collect();
    named.extend(parameters);
    for (i, (name, var)) in named.iter().enumerate() {
        let along = [(var.clone(), random(var.dims(), 20 + i as u64))];
        let (expected, got) = (slope(value, &along, 1e-5), product(&gradients, &along));
        let size = expected.abs().max(1e-2);
        assert!((got - expected).abs() < 1e-6 * size, "{}: {name}: {got}, not {expected}", config.kind);
    }
}

#[test]
fn of_every_mixer() {
    for kind in MixerKind::ALL {
        let short_conv =
            matches!(kind, MixerKind::Mamba2 | MixerKind::GatedDeltaNet | MixerKind::LocalLinear);
        check(&MixerConfig { short_conv, tolerance: Some(1e-13), max_iters: Some(100), ..config(kind) }, 9);
    }
}

#[test]
fn of_attention_with_everything() {
    for kind in [MixerKind::Softmax, MixerKind::LocalLinear, MixerKind::Parallax] {
        let config = MixerConfig {
            heads: 4,
            kv_heads: Some(2),
            head_dim: Some(6),
            rope: true,
            qk_norm: true,
            bias: true,
            tolerance: Some(1e-13),
            ..config(kind)
        };
        check(&config, 8);
    }
}

#[test]
fn across_chunks() {
    for kind in [MixerKind::GatedLinear, MixerKind::DeltaNet, MixerKind::GatedDeltaNet, MixerKind::Hyena] {
        check(&config(kind), 70);
    }
}
