//! `rates`: how fast the errors of the three estimators fall with the number of pairs.
//!
//! The paper's Propositions 2.1 and 2.2 say how the mean squared error over the whole domain behaves with `n` pairs in `d`
//! dimensions, the bandwidth being the best one for each `n`. A global linear model keeps the part of the function that is not
//! linear as an error, whatever `n`. A local constant estimator (softmax attention) has a bias of the order of its
//! bandwidth near the boundary, where its window is lopsided: its error falls as `n^(−3/(d+3))`. A local linear one (LLA)
//! has the interior's bias everywhere: `n^(−4/(d+4))`.
//!
//! Our choices: keys uniform on `[−1, 1]^d`; the function `2 |x|²/√d`, curved everywhere and steepest at the boundary;
//! normal noise of standard deviation 0.5; the error is that against the function itself, averaged over a
//! low-discrepancy set of queries, shifted at random for each data set. The bandwidth is chosen for each `n` on data sets
//! of its own; LLA's ridge is `10⁻³` of the squared bandwidth, small against the window's own spread. Small `n` get several
//! data sets per seed. Slopes are fitted by least squares in logarithms, for every seed, so that they have error bars.
//!
//! What came out: no improvement for the global model; −0.77 and −0.84 for softmax and LLA in one dimension (theory −0.75
//! and −0.80), −0.63 and −0.73 in two (−0.60 and −0.67), −0.55 and −0.64 in three (−0.50 and −0.57). They are steeper than the
//! theory by more than their standard errors (0.004 to 0.02), the more so the higher the dimension, because the bandwidths
//! of the smaller `n` are not small against the domain. LLA is below softmax at every `n`, and the gap widens with `n`.

use super::estimators::{Pairs, Weights, row_errors};
use super::{Common, random, smallest};
use crate::Result;
use crate::report::stats::log_log_slope;
use crate::report::{
    Axis, Cell, Figure, Mark, Panel, Report, Scale, Series, Summary, Table, colours, progress,
};
use clap::Args;
use flashlla::Mask;
use rand::RngExt;
use rayon::prelude::*;
use serde_json::json;
use std::collections::{BTreeMap, btree_map::Entry};

/// As the command line calls it.
pub const NAME: &str = "rates";

/// The estimators, in the order of the tables.
const ESTIMATORS: [&str; 3] = ["global linear", "softmax", "LLA"];
/// Standard deviation of the noise.
const NOISE: f64 = 0.5;
/// Bandwidths are powers of this.
const STEP: f64 = 1.189_207_115_002_721; // 2^(1/4)

/// What the experiment can be told.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Dimensions to run
    #[arg(long, value_name = "D", value_delimiter = ',', default_values_t = [1, 2, 3],
          value_parser = clap::value_parser!(u8).range(1..=8))]
    pub dims: Vec<u8>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// The sizes of a run.
struct Sizes {
    lengths: Vec<usize>,
    queries: usize,
    /// Pairs per seed and length, in data sets of that length.
    budget: usize,
    /// Seeds whose data choose the bandwidths.
    tuning: u64,
}

/// One data set and where it is asked.
struct Trial {
    pairs: Pairs,
    queries: Vec<f64>,
    truth: Vec<f64>,
}

/// One estimator in one dimension.
struct Curve {
    /// Per length: the bandwidth (0 for the global model), and the error of every seed.
    points: Vec<(f64, Vec<f64>)>,
    slope: Summary,
    theory: f64,
}

impl Options {
    /// Runs the experiment.
    pub fn run(&self) -> Result<Report> {
        let sizes = if self.common.quick {
            Sizes { lengths: (7..=11).map(|e| 1 << e).collect(), queries: 256, budget: 2048, tuning: 4 }
        } else {
            Sizes { lengths: (8..=14).map(|e| 1 << e).collect(), queries: 512, budget: 16384, tuning: 4 }
        };
        let seeds = self.common.seeds(if self.common.quick { 8 } else { 12 });
        let bar = progress::bar("lengths", self.dims.len() * sizes.lengths.len());
        let curves: Vec<[Curve; 3]> = self
            .dims
            .iter()
            .map(|&d| run_dimension(usize::from(d), &sizes, &seeds, self.common.seed, &bar))
            .collect::<Result<_>>()?;
        bar.finish_and_clear();
        Ok(self.report(&curves, &sizes, &seeds))
    }

    fn report(&self, curves: &[[Curve; 3]], sizes: &Sizes, seeds: &[u64]) -> Report {
        let mut slopes = Table::new(
            "slopes",
            "Exponents of the mean squared error in n (mean ± standard error over seeds)",
            &["d", "estimator", "slope", "theory", "MSE at smallest n", "MSE at largest n"],
        );
        let mut errors = Table::new("errors", "", &["d", "estimator", "n", "mse", "bandwidth"]);
        let (mut results, mut findings) = (vec![], vec![]);
        for (&d, curves) in self.dims.iter().zip(curves) {
            for (name, curve) in ESTIMATORS.iter().zip(curves) {
                let summaries: Vec<Summary> = curve.points.iter().map(|p| Summary::of(&p.1)).collect();
                let spread = |s: &Summary| Cell::Spread(s.mean, s.se);
                let ends = [&summaries[0], &summaries[summaries.len() - 1]].map(spread);
                let [first, last] = ends;
                let d = usize::from(d);
                slopes.push([
                    d.into(),
                    (*name).into(),
                    Cell::Spread(curve.slope.mean, curve.slope.se),
                    curve.theory.into(),
                    first,
                    last,
                ]);
                for ((&n, summary), (bandwidth, _)) in sizes.lengths.iter().zip(&summaries).zip(&curve.points)
                {
                    errors.push([d.into(), (*name).into(), n.into(), spread(summary), (*bandwidth).into()]);
                }
                results.push(json!({
                    "d": d, "estimator": name, "slope": curve.slope, "theory": curve.theory,
                    "n": sizes.lengths, "mse": summaries,
                    "bandwidth": curve.points.iter().map(|p| p.0).collect::<Vec<_>>(),
                }));
            }
            let [global, softmax, lla] = curves.each_ref().map(|c| c.slope.mean);
            findings.push(format!(
                "d = {d}: the error goes as n^{global:.2} for the global linear model, n^{softmax:.2} for softmax \
                 (theory {:.2}), n^{lla:.2} for LLA (theory {:.2}).",
                curves[1].theory, curves[2].theory
            ));
        }
        Report {
            name: NAME,
            settings: json!({
                "dims": self.dims, "seeds": seeds, "quick": self.common.quick, "noise": NOISE,
                "queries": sizes.queries, "lengths": sizes.lengths,
            }),
            tables: vec![slopes],
            data: vec![errors],
            figures: vec![self.figure(curves, &sizes.lengths)],
            results: json!({ "curves": results }),
            findings,
        }
    }

    fn figure(&self, curves: &[[Curve; 3]], lengths: &[usize]) -> Figure {
        let names = ["global linear", "softmax (local constant)", "LLA (local linear)"];
        let look = [(colours::GREEN, 4), (colours::BLUE, 3), (colours::VERMILLION, 24)];
        let n: Vec<f64> = lengths.iter().map(|&n| n as f64).collect();
        let panels = self.dims.iter().zip(curves).map(|(d, curves)| {
            let mut series = vec![];
            for (curve, (colour, _)) in curves.iter().zip(look).skip(1) {
                // Through the middle of the curve, with the theory's slope.
                let log = |x: &f64| x.ln();
                let mean = |p: &(f64, Vec<f64>)| Summary::of(&p.1).mean;
                let centre_y = curve.points.iter().map(|p| mean(p).ln()).sum::<f64>() / n.len() as f64;
                let centre_x = n.iter().map(log).sum::<f64>() / n.len() as f64;
                let at = |x: &f64| (*x, (centre_y + curve.theory * (x.ln() - centre_x)).exp(), 0.0);
                series.push(Series {
                    name: if colour == colours::BLUE { "slopes of the theory".into() } else { String::new() },
                    colour: colours::GREY,
                    mark: Mark::Dashed,
                    points: vec![at(&n[0]), at(&n[n.len() - 1])],
                });
            }
            for ((curve, (colour, corners)), name) in curves.iter().zip(look).zip(names) {
                let point = |(n, p): (&f64, &(f64, Vec<f64>))| {
                    let summary = Summary::of(&p.1);
                    (*n, summary.mean, summary.se)
                };
                series.push(Series {
                    name: name.into(),
                    colour,
                    mark: Mark::Line(corners),
                    points: n.iter().zip(&curve.points).map(point).collect(),
                });
            }
            let ticks = n.iter().copied().step_by(2).collect();
            Panel {
                title: format!("d = {d}"),
                x: Axis::new("number of pairs n", Scale::LogAt(ticks)),
                y: Axis::new("mean squared error", Scale::Log),
                series,
            }
        });
        Figure {
            name: NAME.into(),
            title: "Error against the length of the context, best bandwidth for each n".into(),
            columns: self.dims.len().min(3),
            stretch: 1.0,
            panels: panels.collect(),
        }
    }
}

fn run_dimension(
    d: usize,
    sizes: &Sizes,
    seeds: &[u64],
    base: u64,
    bar: &indicatif::ProgressBar,
) -> Result<[Curve; 3]> {
    let mut points: [Vec<(f64, Vec<f64>)>; 3] = Default::default();
    // As the theory has it for the smallest length; from then on the search starts from the last length's best.
    let mut exponents = [0, 0];
    for (place, &n) in sizes.lengths.iter().enumerate() {
        // Purposes of random streams: the data that are scored, and those that bandwidths are chosen on.
        let sets = (sizes.budget / n).clamp(1, 16);
        let purpose = |tuning: u64| ((d * 64 + place) as u64) << 1 | tuning;
        let draw = |seed: u64, tuning: u64| -> Vec<Trial> {
            let mut rng = random::stream(seed, purpose(tuning));
            (0..sets).map(|_| Trial::draw(&mut rng, n, d, sizes.queries)).collect()
        };
        let tuning: Vec<Trial> =
            (0..sizes.tuning).into_par_iter().flat_map_iter(|i| draw(base.wrapping_add(i), 1)).collect();
        let scoring: Vec<Vec<Trial>> = seeds.par_iter().map(|&seed| draw(seed, 0)).collect();
        let score = |error: &(dyn Fn(&Trial) -> Result<f64> + Sync)| -> Result<Vec<f64>> {
            let of_seed = |trials: &Vec<Trial>| {
                let errors: Vec<f64> = trials.iter().map(error).collect::<Result<_>>()?;
                Ok(Summary::of(&errors).mean)
            };
            scoring.par_iter().map(of_seed).collect()
        };
        points[0].push((0.0, score(&Trial::global)?));
        for (kind, estimator) in [Trial::constant, Trial::linear].into_iter().enumerate() {
            if place == 0 {
                let order = if kind == 0 { 3.0 } else { 4.0 };
                exponents[kind] = ((n as f64).ln() / -(d as f64 + order) / STEP.ln()).round() as i32;
            }
            let mean = |exponent: i32| -> Result<f64> {
                let error = |trial: &Trial| estimator(trial, STEP.powi(exponent));
                let errors: Vec<f64> = tuning.par_iter().map(error).collect::<Result<_>>()?;
                Ok(Summary::of(&errors).mean)
            };
            exponents[kind] = descend(exponents[kind], mean)?;
            let bandwidth = STEP.powi(exponents[kind]);
            points[kind + 1].push((bandwidth, score(&|trial: &Trial| estimator(trial, bandwidth))?));
        }
        bar.inc(1);
    }
    let n: Vec<f64> = sizes.lengths.iter().map(|&n| n as f64).collect();
    let d = d as f64;
    let theory = [0.0, -3.0 / (d + 3.0), -4.0 / (d + 4.0)];
    let mut theory = theory.into_iter();
    Ok(points.map(|points| {
        let seed_slope =
            |seed: usize| log_log_slope(&n, &points.iter().map(|p| p.1[seed]).collect::<Vec<_>>());
        let slopes: Vec<f64> = (0..seeds.len()).map(seed_slope).collect();
        Curve { slope: Summary::of(&slopes), theory: theory.next().unwrap_or(0.0), points }
    }))
}

/// The exponent with the smallest error, walking downhill from `start` until both neighbours, and theirs, are higher.
fn descend(start: i32, error: impl Fn(i32) -> Result<f64>) -> Result<i32> {
    let mut known = BTreeMap::new();
    let mut best = start;
    loop {
        for exponent in best - 2..=best + 2 {
            if let Entry::Vacant(place) = known.entry(exponent) {
                place.insert(error(exponent)?);
            }
        }
        let (exponents, errors): (Vec<i32>, Vec<f64>) = known.iter().map(|(&k, &e)| (k, e)).unzip();
        match smallest(errors).map(|i| exponents[i]) {
            Some(next) if next != best => best = next,
            _ => return Ok(best),
        }
    }
}

impl Trial {
    fn draw(rng: &mut rand::rngs::ChaCha8Rng, n: usize, d: usize, queries: usize) -> Self {
        let keys: Vec<f64> = (0..n * d).map(|_| rng.random_range(-1.0..1.0)).collect();
        let noise = random::normals(rng, n);
        let values = keys.chunks_exact(d).zip(noise).map(|(k, e)| function(k) + NOISE * e).collect();
        let shift: Vec<f64> = (0..d).map(|_| rng.random()).collect();
        let queries = spread(queries, &shift);
        let truth = queries.chunks_exact(d).map(function).collect();
        Self { pairs: Pairs { dim: d, value_dim: 1, keys, values }, queries, truth }
    }

    fn error(&self, out: &[f64]) -> f64 {
        Summary::of(&row_errors(out, &self.truth, 1)).mean
    }

    fn global(&self) -> Result<f64> {
        Ok(self.error(&self.pairs.global_linear(&self.queries, 1e-9)?))
    }

    fn constant(&self, bandwidth: f64) -> Result<f64> {
        let weights = Weights::gaussian(&self.pairs, bandwidth, Mask::full());
        Ok(self.error(&self.pairs.local_constant(&self.queries, &weights)?))
    }

    fn linear(&self, bandwidth: f64) -> Result<f64> {
        let weights = Weights::gaussian(&self.pairs, bandwidth, Mask::full());
        let out = self.pairs.local_linear(&self.queries, &weights, &[1e-3 * bandwidth * bandwidth])?;
        Ok(self.error(&out[0]))
    }
}

/// `2 |x|²/√d`
fn function(x: &[f64]) -> f64 {
    2.0 * super::estimators::squared_norm(x) / (x.len() as f64).sqrt()
}

/// `count` points spread evenly over `[−1, 1]^d`: the additive recurrence whose steps are powers of the root of
/// `x^(d+1) = x + 1` (the golden ratio in one dimension), from a given place in `[0, 1]^d`.
fn spread(count: usize, shift: &[f64]) -> Vec<f64> {
    let d = shift.len();
    let mut root: f64 = 1.5;
    (0..64).for_each(|_| root = (1.0 + root).powf(1.0 / (d as f64 + 1.0)));
    let coordinate = |i: usize, a: usize| (shift[a] + (i as f64) * root.powi(-(a as i32 + 1))).fract();
    (0..count).flat_map(|i| (0..d).map(move |a| (i, a))).map(|(i, a)| 2.0 * coordinate(i, a) - 1.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_spread_evenly() {
        for d in 1..=3 {
            let points = spread(512, &vec![0.3; d]);
            for a in 0..d {
                for quarter in 0..4 {
                    let low = -1.0 + f64::from(quarter) / 2.0;
                    let inside =
                        points.iter().skip(a).step_by(d).filter(|x| (low..low + 0.5).contains(*x)).count();
                    assert!((124..=132).contains(&inside), "d {d}, axis {a}, quarter {quarter}: {inside}");
                }
            }
        }
    }

    #[test]
    fn the_walk_ends_in_the_valley() {
        for start in [-30, 0, 7, 40] {
            assert_eq!(descend(start, |e| Ok(f64::from((e - 7).pow(2)))).unwrap(), 7);
        }
    }

    #[test]
    fn lla_has_no_boundary_bias_and_softmax_has() {
        // Without curvature, nothing but the boundary is left to get wrong: a linear function, hardly any noise.
        let mut rng = random::stream(1, 0);
        let mut trial = Trial::draw(&mut rng, 200, 1, 64);
        trial.pairs.values = trial.pairs.keys.iter().map(|k| 3.0 * k).collect();
        trial.truth = trial.queries.iter().map(|q| 3.0 * q).collect();
        assert!(trial.linear(0.3).unwrap() < 1e-4);
        assert!(trial.constant(0.3).unwrap() > 1e-2);
        assert!(trial.global().unwrap() < 1e-12);
    }
}
