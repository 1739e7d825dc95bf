//! Gradients against central finite differences of the same engine's forward, in `f64`.

use crate::common::*;
use flashlla::{Attention, Engine, Ridge, Solver, Tensor};
use proptest::prelude::*;
use rand::{SeedableRng, rngs::StdRng};

/// The inputs that have a gradient.
#[derive(Debug, Clone)]
struct Point {
    data: Data,
    ridge: Vec<f64>,
    scale: f64,
}

const INPUTS: [(&str, &str); 7] = [
    ("q", "dq"),
    ("k", "dk"),
    ("v", "dv"),
    ("bias", "dbias"),
    ("probe", "dprobe"),
    ("ridge", "dridge"),
    ("scale", "dscale"),
];

impl Point {
    fn input(&mut self, name: &str) -> Option<&mut [f64]> {
        match name {
            "q" => Some(self.data.q.data_mut()),
            "k" => Some(self.data.k.data_mut()),
            "v" => Some(self.data.v.data_mut()),
            "bias" => self.data.bias.as_mut().map(|t| t.data_mut()),
            "probe" => self.data.probe.as_mut().map(|t| t.data_mut()),
            "ridge" => Some(&mut self.ridge),
            "scale" => Some(std::slice::from_mut(&mut self.scale)),
            _ => unreachable!(),
        }
    }

    fn attention(&self, case: &Case) -> Attention {
        let ridge = match case.ridge_kind {
            RidgeKind::Scalar => Ridge::scalar(self.ridge[0]),
            RidgeKind::PerHead => Ridge::per_head(self.ridge.clone()),
            RidgeKind::PerQuery | RidgeKind::Broadcast => {
                let attention = case.attention();
                let shape = attention.ridge().shape().try_into().unwrap();
                Ridge::per_query(self.ridge.clone(), shape)
            }
        };
        // Solved as far as it goes: a residual would show in the differences.
        case.builder().ridge(ridge).scale(self.scale).solver(Solver::Direct).build().unwrap()
    }

    fn loss(&self, engine: AnyEngine, case: &Case) -> f64 {
        let attention = self.attention(case);
        let data = &self.data;
        let mut problem = attention.problem(data.q.view(), data.k.view(), data.v.view()).unwrap();
        if let Some(bias) = &data.bias {
            problem = problem.with_bias(bias.view()).unwrap();
        }
        if let Some(probe) = &data.probe {
            problem = problem.with_probe(probe.view()).unwrap();
        }
        let out = engine.forward(&problem).unwrap().out;
        out.data().iter().zip(data.grad_out.data()).map(|(o, g)| o * g).sum()
    }

    /// The loss so many steps along a direction in one input.
    fn moved(&self, engine: AnyEngine, case: &Case, name: &str, direction: &[f64], steps: f64) -> f64 {
        let mut moved = self.clone();
        let step = steps * Self::step(direction);
        moved.input(name).unwrap().iter_mut().zip(direction).for_each(|(x, d)| *x += step * d);
        moved.loss(engine, case)
    }

    fn step(direction: &[f64]) -> f64 {
        1e-3 / direction.iter().map(|x| x * x).sum::<f64>().sqrt().max(1.0)
    }

    /// The loss's slope at 0 along a direction in one input: central differences of fourth order.
    fn slope(&self, engine: AnyEngine, case: &Case, name: &str, direction: &[f64]) -> f64 {
        let loss = |steps: f64| self.moved(engine, case, name, direction, steps);
        (8.0 * (loss(1.0) - loss(-1.0)) - (loss(2.0) - loss(-2.0))) / (12.0 * Self::step(direction))
    }

    /// How far a slope may be off by what a forward's rounding leaves: ten times what was seen of it in a few losses that
    /// hardly differ by anything else.
    fn noise(&self, engine: AnyEngine, case: &Case, name: &str, direction: &[f64], slope: f64) -> f64 {
        let step = Self::step(direction);
        let loss = |steps: f64| self.moved(engine, case, name, direction, steps) - slope * steps * step;
        let losses: Vec<f64> = (0..8).map(|i| loss(1e-7 * i as f64)).collect();
        let [low, high] = [f64::min, f64::max].map(|f| losses.iter().copied().reduce(f).unwrap());
        10.0 * (high - low) / step
    }
}

fn point(case: &Case) -> Point {
    let attention = case.attention();
    Point { data: case.data(), ridge: attention.ridge().values().to_vec(), scale: attention.scale() }
}

/// How long a direction in an input is: a ridge stays positive, and a step in the scale moves logits, of which it is a factor with
/// products of some sqrt(head_dim), by no more than one in a query does. (A longer one showed in the sixth digit at 256.)
fn extent(case: &Case, name: &str) -> f64 {
    match name {
        "ridge" => 0.3 * case.ridge,
        "scale" => 1.0 / (case.head_dim as f64).sqrt(),
        _ => 1.0,
    }
}

/// Random directions in each input, of their extent.
fn check_directions(engine: AnyEngine, case: &Case) {
    let mut point = point(case);
    let results = run::<f64>(engine, &point.attention(case), &point.data);
    // Differences divide what a forward's rounding leaves by the step. Of the uncentred form that is thousands of times more
    // than of the others, where its denominator nearly cancels; its gradients are those of the same function.
    let differenced = if engine.is_uncentred() { AnyEngine::reference() } else { engine };
    for (turn, (name, gradient)) in INPUTS.into_iter().enumerate() {
        let Some(len) = point.input(name).map(|x| x.len()) else { continue };
        if name == "ridge" && case.probe {
            assert!(results.dridge.data().iter().all(|&x| x == 0.0), "a given probe has no ridge");
        }
        let rng = &mut StdRng::seed_from_u64(case.seed ^ turn as u64);
        let direction: Tensor<f64> = normal(rng, &[len], Grid::F64);
        let length = (len as f64).sqrt();
        let size = extent(case, name);
        let direction: Vec<f64> = direction.data().iter().map(|x| size * x / length).collect();
        let slope = point.slope(differenced, case, name, &direction);
        let gradient = results.get(gradient).data();
        let want: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
        // What one would expect of the product of two vectors of these lengths.
        let typical = gradient.iter().map(|x| x * x).sum::<f64>().sqrt() * size / length;
        let error = (slope - want).abs();
        let mut allowed = 1e-6 * (want.abs() + typical) + 1e-9;
        if error > allowed {
            let noise = point.noise(differenced, case, name, &direction, want);
            // Of a forward in double precision not much: a check that allows anything checks nothing.
            let size = |t: &Tensor<f64>| t.data().iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!(
                noise <= 1e-7 * (1.0 + size(&results.out) * size(&point.data.grad_out)),
                "{noise:e}\n{case:?}"
            );
            allowed += noise;
        }
        assert!(
            error <= allowed,
            "{name} of {engine:?}: differences give {slope:e}, gradient {want:e}\n{case:?}"
        );
    }
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn random_directions_for_random_descriptions(mut case in case(300_000)) {
        case.grid = Grid::F64;
        case.ridge = case.ridge.max(0.2);
        for engine in AnyEngine::all() {
            if !(engine.is_uncentred() && case.probe) {
                check_directions(engine, &case);
            }
        }
    }

    /// Every number of every input, for problems small enough.
    #[test]
    fn every_entry_for_small_descriptions(
        mut case in case(100_000), queries in 1usize..7, keys in 1usize..8, d in 1usize..4, dv in 1usize..4,
    ) {
        (case.queries, case.keys, case.head_dim, case.value_dim) = (queries, keys, d, dv);
        (case.batch, case.kv_heads, case.grid) = (1, 1, Grid::F64);
        case.ridge = case.ridge.max(0.2);
        if case.mask.sequences().is_some() {
            let (causal, mask) = (case.mask.is_causal(), flashlla::Mask::full());
            let mask = if causal { flashlla::Mask::causal() } else { mask };
            case.keys = case.keys.max(queries);
            case.mask = mask.cu_seqlens([0, 1.min(case.keys), case.keys / 2 + 1, case.keys]);
        }
        if case.ridge_kind != RidgeKind::Scalar {
            case.ridge_kind = RidgeKind::PerQuery;
        }
        for engine in AnyEngine::exact() {
            let mut point = point(&case);
            let results = run::<f64>(engine, &point.attention(&case), &point.data);
            for (name, gradient) in INPUTS {
                let Some(len) = point.input(name).map(|x| x.len()) else { continue };
                let slopes: Vec<f64> = (0..len).map(|i| {
                    let mut direction = vec![0.0; len];
                    direction[i] = extent(&case, name);
                    point.slope(engine, &case, name, &direction) / direction[i]
                }).collect();
                let want = results.get(gradient).data();
                let error = relative_error(&slopes, want, 0.1);
                prop_assert!(error < 1e-7, "{name} of {engine:?}: {error:e}\n{slopes:?}\n{want:?}");
            }
        }
    }
}

/// Where the uncentred form's denominator is far below its terms: differences of its own forward gave slopes that
/// were wrong in the sixth digit, while its gradients had nine.
#[test]
fn directions_where_the_denominator_nearly_cancels() {
    let case = Case {
        batch: 1,
        kv_heads: 1,
        group: 1,
        queries: 2,
        keys: 7,
        head_dim: 182,
        value_dim: 141,
        mask: flashlla::Mask::causal(),
        scale: 0.09757598090262831,
        ridge: 0.2,
        ridge_kind: RidgeKind::Broadcast,
        bias: Some(Bias { batched: false, heads: 1 }),
        probe: false,
        grid: Grid::F64,
        seed: 13906650073220583580,
    };
    for keys in [7, 3, 2] {
        for engine in AnyEngine::all() {
            check_directions(engine, &Case { keys, ..case.clone() });
        }
    }
}
