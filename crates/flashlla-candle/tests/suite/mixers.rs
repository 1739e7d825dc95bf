//! Every mixer against its recurrence, and what they have in common.

use crate::plain::*;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use flashlla_candle::{Mixer, MixerConfig, MixerKind, mixer, seeded};
use std::f64::consts::PI;

pub const BATCH: usize = 2;

pub fn made(config: &MixerConfig, seed: u64) -> (Box<dyn Mixer>, VarMap) {
    let parameters = VarMap::new();
    let mixer = mixer(config, seeded(&parameters, seed, DType::F64, &Device::Cpu)).unwrap();
    // Nothing at its neutral start: norms, scales and biases too are drawn.
    let named: std::collections::BTreeMap<_, _> =
        parameters.data().lock().unwrap().clone().into_iter().collect();
    for (i, var) in named.values().enumerate() {
        let noise = random(var.dims(), seed + 1000 + i as u64);
        var.set(&(var.as_tensor() + (noise * 0.2).unwrap()).unwrap()).unwrap();
    }
    (mixer, parameters)
}

pub fn random(shape: &[usize], seed: u64) -> Tensor {
    use rand::{RngExt, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| rng.random_range(-1.7..1.7)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

pub fn config(kind: MixerKind) -> MixerConfig {
    MixerConfig { max_len: 96, state_dim: Some(5), ..MixerConfig::new(kind, 12, 3) }
}

/// The relative Frobenius error; NaN where there is any.
pub fn error(got: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(got.dims(), expected.dims());
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    norm(&(got - expected).unwrap()) / norm(expected)
}

/// Holds a mixer against `recurrence(parameters, tokens) -> outputs`, for lengths within a chunk and across several.
fn check(config: &MixerConfig, recurrence: impl Fn(&Parameters, &Matrix) -> Matrix) {
    for (n, seed) in [(1, 1), (7, 2), (70, 3), (150, 4)] {
        if n > config.max_len && config.kind == MixerKind::Hyena {
            continue;
        }
        let (mixer, parameters) = made(config, seed);
        let x = random(&[BATCH, n, config.dim], seed + 100);
        let plain = Parameters::of(&parameters);
        let outputs: Vec<f64> =
            x.to_vec3::<f64>().unwrap().iter().flat_map(|x| recurrence(&plain, x).concat()).collect();
        let expected = Tensor::from_vec(outputs, (BATCH, n, config.dim), &Device::Cpu).unwrap();
        let error = error(&mixer.forward(&x).unwrap(), &expected);
        assert!(error < 1e-9, "{}: error {error} at {n} tokens", config.kind);
    }
}

/// The output projection of heads, side by side, for every token.
fn projected(p: &Parameters, heads: Matrix) -> Matrix {
    heads.iter().map(|x| p.project("out_proj", x)).collect()
}

/// Queries, keys and values of all tokens.
fn qkv(p: &Parameters, x: &Matrix) -> [Matrix; 3] {
    ["q", "k", "v"].map(|name| p.tokens(&format!("{name}_proj"), &format!("{name}_conv"), x))
}

/// What a head at a place sees of queries, keys and values under grouped heads, normalised and rotated as configured.
fn attention_inputs(p: &Parameters, config: &MixerConfig, x: &Matrix, h: usize) -> [Matrix; 3] {
    let (width, group) = (config.width().unwrap(), config.heads / config.kv_heads());
    let [q, k, v] = qkv(p, x);
    let of =
        |rows: &Matrix, h: usize| -> Matrix { rows.iter().map(|row| head(row, h, width).to_vec()).collect() };
    let (mut q, mut k, v) = (of(&q, h), of(&k, h / group), of(&v, h / group));
    if config.qk_norm {
        q = q.iter().map(|x| p.norm("q_norm", x)).collect();
        k = k.iter().map(|x| p.norm("k_norm", x)).collect();
    }
    if config.rope {
        let rotate = |(position, x): (usize, &Vector)| -> Vector {
            let half = width / 2;
            let turn = |i: usize| position as f64 * config.rope_base.powf(-((i % half) as f64) / half as f64);
            let other = |i: usize| if i < half { -x[i + half] } else { x[i - half] };
            (0..width).map(|i| x[i] * turn(i).cos() + other(i) * turn(i).sin()).collect()
        };
        q = q.iter().enumerate().map(rotate).collect();
        k = k.iter().enumerate().map(rotate).collect();
    }
    [q, k, v]
}

/// Attention with weights `p_j` that `combine(i, weights, q, keys, values)` makes an output of.
fn attention(
    p: &Parameters,
    config: &MixerConfig,
    x: &Matrix,
    combine: impl Fn(usize, usize, &[f64], &[f64], &[Vector], &[Vector]) -> Vector,
) -> Matrix {
    let (width, group) = (config.width().unwrap(), config.heads / config.kv_heads());
    let mut out = zeros(x.len(), config.heads * width);
    for h in 0..config.heads {
        let [q, k, v] = attention_inputs(p, config, x, h);
        let scale = (width as f64).powf(-0.5) * p.get("log_scale")[h / group].exp();
        for i in 0..x.len() {
            let weights: Vector = (0..=i).map(|j| (scale * dot(&q[i], &k[j])).exp()).collect();
            let total: f64 = weights.iter().sum();
            let weights: Vector = weights.iter().map(|w| w / total).collect();
            let row = combine(i, h, &weights, &q[i], &k[..=i], &v[..=i]);
            out[i][h * width..][..width].copy_from_slice(&row);
        }
    }
    projected(p, out)
}

fn attention_configs(kind: MixerKind) -> [MixerConfig; 3] {
    let plain = config(kind);
    let grouped = MixerConfig { heads: 4, kv_heads: Some(2), head_dim: Some(6), ..config(kind) };
    let all = MixerConfig { rope: true, qk_norm: true, short_conv: true, bias: true, ..grouped.clone() };
    [plain, grouped, all]
}

fn mean(weights: &[f64], rows: &[Vector]) -> Vector {
    (0..rows[0].len()).map(|c| weights.iter().zip(rows).map(|(w, row)| w * row[c]).sum()).collect()
}

#[test]
fn softmax_is_its_sum() {
    for config in attention_configs(MixerKind::Softmax) {
        check(&config, |p, x| attention(p, &config, x, |_, _, weights, _, _, v| mean(weights, v)));
    }
}

/// `Σ p_j (1 − (k_j − k̄)·x) v_j`.
fn corrected(weights: &[f64], key_mean: &[f64], probe: &[f64], k: &[Vector], v: &[Vector]) -> Vector {
    let factor = |(w, k): (&f64, &Vector)| w * (1.0 - dot(k, probe) + dot(key_mean, probe));
    mean(&weights.iter().zip(k).map(factor).collect::<Vector>(), v)
}

#[test]
fn lla_is_its_regression() {
    for config in attention_configs(MixerKind::LocalLinear) {
        check(&config, |p, x| {
            attention(p, &config, x, |_, h, weights, q, k, v| {
                let key_mean = mean(weights, k);
                let mut c = zeros(q.len(), q.len());
                for (w, k) in weights.iter().zip(k) {
                    let centred: Vector = k.iter().zip(&key_mean).map(|(k, m)| k - m).collect();
                    add_outer(&mut c, *w, &centred, &centred);
                }
                (0..q.len()).for_each(|i| c[i][i] += p.get("log_ridge")[h].exp());
                let delta = key_mean.iter().zip(q).map(|(m, q)| m - q).collect();
                corrected(weights, &key_mean, &solve(c, delta), k, v)
            })
        });
    }
}

#[test]
fn parallax_takes_its_probe_from_the_input() {
    for config in attention_configs(MixerKind::Parallax) {
        check(&config, |p, x| {
            attention(p, &config, x, |i, h, weights, q, k, v| {
                let probe = p.project("probe_proj", &x[i]);
                corrected(weights, &mean(weights, k), head(&probe, h, q.len()), k, v)
            })
        });
    }
}

/// A recurrence per head: `step(head, token, q, k, v)` gives an output.
fn recurrent(
    p: &Parameters,
    config: &MixerConfig,
    x: &Matrix,
    mut step: impl FnMut(usize, usize, &[f64], &[f64], &[f64]) -> Vector,
) -> Matrix {
    let width = config.width().unwrap();
    let [q, k, v] = qkv(p, x);
    let mut out = zeros(x.len(), config.heads * width);
    for h in 0..config.heads {
        for t in 0..x.len() {
            let row = step(h, t, head(&q[t], h, width), head(&k[t], h, width), head(&v[t], h, width));
            out[t][h * width..][..width].copy_from_slice(&row);
        }
    }
    out
}

/// With and without short convolutions, and with everything remembered.
fn recurrent_configs(kind: MixerKind) -> [MixerConfig; 3] {
    let plain = config(kind);
    [plain.clone(), MixerConfig { short_conv: true, ..plain.clone() }, MixerConfig { decay: false, ..plain }]
}

#[test]
fn linear_attention_is_its_recurrence() {
    for config in recurrent_configs(MixerKind::Linear) {
        check(&config, |p, x| {
            let feature = |x: &[f64]| -> Vector {
                x.iter().map(|&x| if x > 0.0 { x + 1.0 } else { x.exp() }).collect()
            };
            let width = config.width().unwrap();
            let (mut state, mut total) = (zeros(width, width), vec![0.0; width]);
            projected(
                p,
                recurrent(p, &config, x, |_, t, q, k, v| {
                    if t == 0 {
                        (state, total) = (zeros(width, width), vec![0.0; width]);
                    }
                    let (q, k) = (feature(q), feature(k));
                    add_outer(&mut state, 1.0, &k, v);
                    total.iter_mut().zip(&k).for_each(|(t, k)| *t += k);
                    let norm = dot(&total, &q) + 1e-6;
                    transposed_times(&state, &q).iter().map(|o| o / norm).collect()
                }),
            )
        });
    }
}

/// `norm(out) ⊙ silu(gate)` of a head.
fn gated(p: &Parameters, out: &[f64], x: &[f64], h: usize) -> Vector {
    let gate = p.project("gate_proj", x);
    p.norm("out_norm", out).iter().zip(head(&gate, h, out.len())).map(|(o, &g)| o * silu(g)).collect()
}

#[test]
fn gated_linear_attention_is_its_recurrence() {
    for config in recurrent_configs(MixerKind::GatedLinear) {
        check(&config, |p, x| {
            let width = config.width().unwrap();
            let mut state = zeros(width, width);
            projected(
                p,
                recurrent(p, &config, x, |h, t, q, k, v| {
                    if t == 0 {
                        state = zeros(width, width);
                    }
                    if config.decay {
                        let logit = p.project("decay_up", &p.project("decay_down", &x[t]));
                        for (row, &z) in state.iter_mut().zip(head(&logit, h, width)) {
                            let alpha = sigmoid(z).powf(1.0 / 16.0).max((-5f64).exp());
                            row.iter_mut().for_each(|s| *s *= alpha);
                        }
                    }
                    add_outer(&mut state, 1.0, k, v);
                    let out: Vector =
                        transposed_times(&state, q).iter().map(|o| o * (width as f64).powf(-0.5)).collect();
                    gated(p, &out, &x[t], h)
                }),
            )
        });
    }
}

/// The decay and step of a head.
fn decay(p: &Parameters, config: &MixerConfig, x: &[f64], h: usize) -> (f64, f64) {
    let step = softplus(p.project("dt_proj", x)[h] + p.get("dt_bias")[h]);
    (if config.decay { (-p.get("a_log")[h].exp() * step).exp() } else { 1.0 }, step)
}

/// Queries and keys of the delta rule and of MesaNet.
fn normal(config: &MixerConfig, x: &[f64]) -> Vector {
    if config.activation && !config.short_conv {
        unit(&x.iter().map(|&x| silu(x)).collect::<Vector>())
    } else {
        unit(x)
    }
}

#[test]
fn the_delta_rule_is_its_recurrence() {
    for config in [MixerKind::DeltaNet, MixerKind::GatedDeltaNet].into_iter().flat_map(recurrent_configs) {
        let is_gated = config.kind == MixerKind::GatedDeltaNet;
        check(&config, |p, x| {
            let width = config.width().unwrap();
            let mut state = zeros(width, width);
            projected(
                p,
                recurrent(p, &config, x, |h, t, q, k, v| {
                    if t == 0 {
                        state = zeros(width, width);
                    }
                    let (q, k) = (normal(&config, q), normal(&config, k));
                    let beta = sigmoid(p.project("beta_proj", &x[t])[h]);
                    if is_gated && config.decay {
                        scale(&mut state, decay(p, &config, &x[t], h).0);
                    }
                    let held = transposed_times(&state, &k);
                    add_outer(&mut state, -beta, &k, &held);
                    add_outer(&mut state, beta, &k, v);
                    let out = transposed_times(&state, &q);
                    if is_gated { gated(p, &out, &x[t], h) } else { p.norm("out_norm", &out) }
                }),
            )
        });
    }
}

#[test]
fn mesanet_is_its_regression() {
    for config in recurrent_configs(MixerKind::Mesa) {
        let config = MixerConfig { tolerance: Some(1e-13), max_iters: Some(100), ridge: 0.5, ..config };
        check(&config, |p, x| {
            let width = config.width().unwrap();
            let (mut g, mut hh) = (zeros(width, width), zeros(width, width));
            projected(
                p,
                recurrent(p, &config, x, |h, t, q, k, v| {
                    if t == 0 {
                        (g, hh) = (zeros(width, width), zeros(width, width));
                    }
                    let (q, k) = (normal(&config, q), normal(&config, k));
                    let beta = sigmoid(p.project("beta_proj", &x[t])[h]);
                    if config.decay {
                        let gamma = decay(p, &config, &x[t], h).0;
                        scale(&mut g, gamma);
                        scale(&mut hh, gamma);
                    }
                    add_outer(&mut g, beta, &k, v);
                    add_outer(&mut hh, beta, &k, &k);
                    let mut system = hh.clone();
                    let lambda = &p.get("lambda")[h * width..][..width];
                    (0..width).for_each(|i| system[i][i] += softplus(lambda[i]) + config.ridge / 4.0);
                    p.norm("out_norm", &transposed_times(&g, &solve(system, q)))
                }),
            )
        });
    }
}

#[test]
fn mamba2_is_its_recurrence() {
    for config in recurrent_configs(MixerKind::Mamba2) {
        check(&config, |p, x| {
            let (state, heads) = (config.state_dim.unwrap(), config.heads);
            let width = 2 * config.width().unwrap();
            let inner = heads * width;
            // z passes no convolution.
            let z: Matrix = x.iter().map(|x| p.project("in_proj", x)[..inner].to_vec()).collect();
            let rest: Matrix = x.iter().map(|x| p.project("in_proj", x)[inner..].to_vec()).collect();
            let rest = p.convolved_or_silu("conv", rest);
            let mut states = vec![zeros(state, width); heads];
            let token = |t: usize| {
                let (b, c) = (&rest[t][inner..][..state], &rest[t][inner + state..]);
                let mut out = vec![];
                for (h, s) in states.iter_mut().enumerate() {
                    let (alpha, step) = decay(p, &config, &x[t], h);
                    let xh = head(&rest[t], h, width);
                    scale(s, alpha);
                    add_outer(s, step, b, xh);
                    let skip = p.get("skip")[h];
                    out.extend(transposed_times(s, c).iter().zip(xh).map(|(y, x)| y + skip * x));
                }
                let gated: Vector = out.iter().zip(&z[t]).map(|(y, &z)| y * silu(z)).collect();
                p.norm("out_norm", &gated)
            };
            projected(p, (0..x.len()).map(token).collect())
        });
    }
}

#[test]
fn hyena_is_its_convolutions() {
    for config in [config(MixerKind::Hyena), MixerConfig { short_conv: true, ..config(MixerKind::Hyena) }] {
        check(&config, |p, x| {
            let (dim, n, longest) = (config.dim, x.len(), config.max_len as f64);
            let parts = p.tokens("in_proj", "conv", x);
            let filter = |which: usize, c: usize, lag: usize| {
                let t = lag as f64 / longest;
                let mut hidden = vec![t];
                hidden.extend((1..=4).flat_map(|band| {
                    let angle = 2.0 * PI * f64::from(band) * t;
                    [angle.sin(), angle.cos()]
                }));
                for layer in ["filter.0", "filter.1"] {
                    hidden = p.project(layer, &hidden).iter().map(|x| (10.0 * x).sin()).collect();
                }
                let at = c as f64 / (dim - 1) as f64;
                let rate = 100f64.ln() * (1.0 / 0.3 * (1.0 - at) + 1.0 / 1.5 * at);
                p.project("filter.2", &hidden)[which * dim + c] * (-rate * t).exp() / longest.sqrt()
            };
            let mut z: Matrix = parts.iter().map(|x| x[..dim].to_vec()).collect();
            for which in 0..2 {
                let taps: Matrix =
                    (0..n).map(|lag| (0..dim).map(|c| filter(which, c, lag)).collect()).collect();
                let skip = &p.get("skip")[which * dim..][..dim];
                let at = |i: usize, c: usize| {
                    let past: f64 = (0..=i).map(|j| taps[i - j][c] * z[j][c]).sum();
                    (past + skip[c] * z[i][c]) * parts[i][(which + 1) * dim + c]
                };
                z = (0..n).map(|i| (0..dim).map(|c| at(i, c)).collect()).collect();
            }
            projected(p, z)
        });
    }
}

#[test]
fn no_mixer_sees_the_future() {
    for kind in MixerKind::ALL {
        let (n, config) = (80, config(kind));
        let (mixer, _) = made(&config, 5);
        let x = random(&[BATCH, n, config.dim], 6);
        let whole = mixer.forward(&x).unwrap();
        for seen in [1, 17, 65] {
            let other = random(&[BATCH, n - seen, config.dim], 7);
            let changed = Tensor::cat(&[x.narrow(1, 0, seen).unwrap(), other], 1).unwrap();
            let past = |out: &Tensor| out.narrow(1, 0, seen).unwrap();
            let changed = mixer.forward(&changed).unwrap();
            let error = error(&past(&changed), &past(&whole));
            assert!(error < 1e-9, "{kind}: outputs before token {seen} changed by {error}");
        }
    }
}

#[test]
fn names_are_what_they_were() {
    for kind in MixerKind::ALL {
        assert_eq!(kind.to_string().parse::<MixerKind>().unwrap(), kind);
        assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
    }
    let error = "transformer".parse::<MixerKind>().unwrap_err().to_string();
    assert!(error.contains("transformer") && error.contains("gated-deltanet"), "{error}");
}

#[test]
fn what_is_not_allowed_is_said() {
    let refused = |config: MixerConfig, parts: &[&str]| {
        let vb = seeded(&VarMap::new(), 0, DType::F32, &Device::Cpu);
        let error = mixer(&config, vb).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert!(!error.contains('\n'), "{error}");
    };
    let lla = config(MixerKind::LocalLinear);
    refused(MixerConfig { heads: 5, ..lla.clone() }, &["dim: 12", "multiple of heads (5)"]);
    refused(MixerConfig { heads: 0, ..lla.clone() }, &["heads: 0"]);
    refused(MixerConfig { kv_heads: Some(2), ..lla.clone() }, &["kv_heads: 2", "divisor"]);
    refused(MixerConfig { kv_heads: Some(1), ..config(MixerKind::Mesa) }, &["kv_heads: 1", "mesanet"]);
    refused(MixerConfig { rope: true, head_dim: Some(5), ..lla.clone() }, &["head_dim: 5", "even"]);
    refused(MixerConfig { head_dim: Some(300), ..lla.clone() }, &["head_dim: 300", "256"]);
    refused(MixerConfig { ridge: -1.0, ..lla.clone() }, &["ridge: -1", "greater than 0"]);
    refused(MixerConfig { tolerance: Some(2.0), ..lla.clone() }, &["tolerance: 2"]);
    refused(MixerConfig { max_iters: Some(0), ..lla }, &["max_iters: 0"]);
    let (mixer, _) = made(&config(MixerKind::Hyena), 1);
    let error = mixer.forward(&random(&[1, 97, 12], 1)).unwrap_err().to_string();
    assert!(error.contains("97 tokens") && error.contains("96"), "{error}");
    for kind in MixerKind::ALL {
        let error = made(&config(kind), 1).0.forward(&random(&[1, 4, 11], 1)).unwrap_err().to_string();
        assert!(error.starts_with("x: shape [1, 4, 11]"), "{kind}: {error}");
    }
}
