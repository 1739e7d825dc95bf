//! `cost`: what Local Linear Attention costs, against softmax attention, linear attention and MesaNet on the same shapes, and how
//! its error and time depend on the number of conjugate-gradient steps.
//!
//! Layers are timed whole, projections included, as Candle runs them: softmax attention there is products of whole matrices,
//! N × N of them in memory. The operator is timed alone too, against softmax attention by the same engine (a probe of 0). Inputs
//! are normally distributed. A step of generation is timed on the CPU; there linear attention and MesaNet update a state and the
//! attentions read a cache.

mod decode;
mod iterations;
mod layers;
mod measure;

use super::Common;
use super::trained::{candle_device, look};
use crate::Result;
use crate::options::Device;
use crate::report::{
    Axis, Cell, Figure, Mark, Panel, Report, Scale, Series, Summary, Table, colours, progress,
};
use clap::Args;
use flashlla_candle::MixerKind;
use iterations::{Keys, Point};
use layers::Passes;
use measure::Cost;
use plotters::style::RGBColor;
use serde_json::{Value, json};

/// As the command line calls it.
pub const NAME: &str = "cost";

/// What the experiment can be told.
#[derive(Debug, Clone, Args)]
pub struct Options {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    pub device: Device,
    /// Lengths of the sequences, with commas [default: 256,512,1024,2048,4096 on cpu, 1024 to 16384 on cuda]
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(2..=1_048_576))]
    pub tokens: Vec<u32>,
}

/// The size of a call.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    batch: usize,
    heads: usize,
    tokens: usize,
    dim: usize,
}

/// Normally distributed numbers.
fn normal<T>(seed: u64, count: usize) -> Vec<T>
where
    rand_distr::StandardNormal: rand_distr::Distribution<T>,
{
    use rand_distr::Distribution;
    let rng = super::random::stream(seed, 7);
    rand_distr::StandardNormal.sample_iter(rng).take(count).collect()
}

/// One line of measurements.
struct Line {
    what: &'static str,
    of: &'static str,
    tokens: usize,
    cost: Cost,
}

/// What was measured, in the order of tables.
const LAYER: [&str; 2] = ["layer, forward", "layer, forward and backward"];
const OPERATOR: [&str; 2] = ["operator, forward", "operator, forward and backward"];
const DECODE: &str = "operator, one token";

impl Options {
    /// Runs the experiment.
    pub fn run(&self) -> Result<Report> {
        let quick = self.common.quick;
        let tokens: Vec<usize> = match (&self.tokens[..], self.device) {
            ([], Device::Cpu) if quick => vec![128, 256, 512, 1024],
            ([], Device::Cpu) => vec![256, 512, 1024, 2048, 4096],
            ([], Device::Cuda) if quick => vec![1024, 4096],
            ([], Device::Cuda) => vec![1024, 2048, 4096, 8192, 16384],
            (given, _) => given.iter().map(|&n| n as usize).collect(),
        };
        let heads = if self.device == Device::Cuda { 16 } else { 2 };
        let shape = |tokens| Shape { batch: 1, heads, tokens, dim: 64 };
        let candle = candle_device(self.device)?;
        let seeds = self.common.seeds(if quick { 2 } else { 3 });
        let ridges = [10.0, 1.0, 0.1];

        let bar =
            progress::bar("measurements", tokens.len() * 7 + ridges.len() * Keys::ALL.len() * seeds.len());
        let mut lines = vec![];
        for &n in &tokens {
            for kind in layers::LAYERS {
                add(&mut lines, LAYER, look(kind).0, n, layers::layer(kind, shape(n), &candle)?);
                bar.inc(1);
            }
            for (softmax, of) in [(true, look(MixerKind::Softmax).0), (false, look(MixerKind::LocalLinear).0)]
            {
                add(&mut lines, OPERATOR, of, n, layers::operator(shape(n), softmax, self.device)?);
                bar.inc(1);
            }
            if self.device == Device::Cpu {
                let steps = decode::NAMES.iter().zip(decode::steps(shape(n))?);
                lines.extend(steps.map(|(of, cost)| Line { what: DECODE, of, tokens: n, cost }));
            }
            bar.inc(1);
        }
        let length = if quick { 256 } else { 1024 };
        let mut curves = vec![];
        for keys in Keys::ALL {
            for ridge in ridges {
                let mut of_seeds = vec![];
                for &seed in &seeds {
                    of_seeds.push(iterations::curve(length, 64, ridge, keys, seed, self.device)?);
                    bar.inc(1);
                }
                curves.push(Curve { keys, ridge, seeds: of_seeds });
            }
        }
        bar.finish_and_clear();
        Ok(self.report(&lines, &curves, shape(length), &seeds))
    }

    fn report(&self, lines: &[Line], curves: &[Curve], shape: Shape, seeds: &[u64]) -> Report {
        let (heads, dim) = (shape.heads, shape.dim);
        let mut iterations = Table::new(
            "iterations",
            &format!(
                "Conjugate-gradient steps, N = {}, D = {dim}: error of the output (mean ± standard error over seeds), time of the forward",
                shape.tokens
            ),
            &["keys", "ridge", "steps", "error", "ms"],
        );
        for curve in curves {
            for (i, &steps) in iterations::STEPS.iter().enumerate() {
                let (error, seconds) = (curve.error(i), curve.seconds(i));
                let error = Cell::Spread(error.mean, error.se);
                iterations.push([
                    curve.keys.name().into(),
                    curve.ridge.into(),
                    steps.into(),
                    error,
                    (seconds * 1e3).into(),
                ]);
            }
        }
        let figures = vec![
            cost_figure("time", lines, |cost| cost.seconds * 1e3, "milliseconds"),
            cost_figure("memory", lines, |cost| cost.bytes as f64 / 1048576.0, "MiB at most"),
            iteration_figure(curves, shape),
        ];
        Report {
            name: NAME,
            settings: json!({
                "device": self.device, "threads": rayon::current_num_threads(), "batch": 1, "heads": heads, "head_dim": dim,
                "dtype": "f32", "ridge": 1.0, "seeds": seeds, "quick": self.common.quick,
            }),
            tables: vec![cost_table(lines, heads, dim), iterations],
            data: vec![],
            figures: figures.into_iter().filter(|figure| !figure.panels.is_empty()).collect(),
            results: results(lines, curves),
            findings: findings(lines),
        }
    }
}

fn add(lines: &mut Vec<Line>, what: [&'static str; 2], of: &'static str, tokens: usize, passes: Passes) {
    lines.push(Line { what: what[0], of, tokens, cost: passes.forward });
    lines.push(Line { what: what[1], of, tokens, cost: passes.both });
}

/// Errors and times at each number of steps.
struct Curve {
    keys: Keys,
    ridge: f64,
    seeds: Vec<Vec<Point>>,
}

impl Curve {
    fn error(&self, i: usize) -> Summary {
        Summary::of(&self.seeds.iter().map(|points| points[i].error).collect::<Vec<_>>())
    }

    fn seconds(&self, i: usize) -> f64 {
        Summary::of(&self.seeds.iter().map(|points| points[i].cost.seconds).collect::<Vec<_>>()).mean
    }
}

/// What was measured, each once, in the order in which it was.
fn kinds(lines: &[Line]) -> Vec<&'static str> {
    [LAYER[0], LAYER[1], OPERATOR[0], OPERATOR[1], DECODE]
        .into_iter()
        .filter(|what| lines.iter().any(|line| line.what == *what))
        .collect()
}

fn find<'a>(lines: &'a [Line], what: &str, of: &str, tokens: usize) -> Option<&'a Line> {
    lines.iter().find(|line| line.what == what && line.of == of && line.tokens == tokens)
}

fn lengths(lines: &[Line]) -> Vec<usize> {
    let mut lengths: Vec<usize> = lines.iter().map(|line| line.tokens).collect();
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}

fn cost_table(lines: &[Line], heads: usize, dim: usize) -> Table {
    let title = format!("Time and the most memory at one time, {heads} heads, D = {dim}");
    let names = decode::NAMES;
    let mut columns = vec!["what".to_owned(), "N".into()];
    columns.extend(names.map(|name| format!("{name} ms")));
    columns.extend(names.map(|name| format!("{name} MiB")));
    let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
    let mut table = Table::new("cost", &title, &columns);
    for what in kinds(lines) {
        for n in lengths(lines) {
            let cell = |of: &str, value: fn(&Cost) -> f64| {
                find(lines, what, of, n).map_or(Cell::from(""), |line| value(&line.cost).into())
            };
            let mut row: Vec<Cell> = vec![what.into(), n.into()];
            row.extend(names.map(|of| cell(of, |cost| cost.seconds * 1e3)));
            row.extend(names.map(|of| cell(of, |cost| cost.bytes as f64 / 1048576.0)));
            table.push(row);
        }
    }
    table
}

fn cost_figure(name: &str, lines: &[Line], value: fn(&Cost) -> f64, unit: &str) -> Figure {
    let lengths: Vec<f64> = lengths(lines).iter().map(|&n| n as f64).collect();
    let panels = kinds(lines).into_iter().map(|what| {
        let series = layers::LAYERS.iter().filter_map(|kind| {
            let (name, colour, corners) = look(*kind);
            let of = lines.iter().filter(|line| line.what == what && line.of == name);
            let points: Vec<_> = of.map(|line| (line.tokens as f64, value(&line.cost), 0.0)).collect();
            let shown = points.iter().any(|point| point.1 > 0.0);
            shown.then(|| Series { name: name.into(), colour, mark: Mark::Line(corners), points })
        });
        Panel {
            title: what.into(),
            x: Axis::new("tokens N", Scale::LogAt(lengths.clone())),
            y: Axis::new(unit, Scale::Log),
            series: series.collect(),
        }
    });
    Figure {
        name: name.into(),
        title: format!("Cost in {unit}"),
        columns: 2,
        stretch: 1.0,
        panels: panels.filter(|panel| !panel.series.is_empty()).collect(),
    }
}

fn iteration_figure(curves: &[Curve], shape: Shape) -> Figure {
    let looks: [(RGBColor, usize); 3] = [(colours::BLUE, 3), (colours::GREEN, 4), (colours::VERMILLION, 24)];
    let steps: Vec<f64> = iterations::STEPS.iter().map(|&n| n as f64).collect();
    let panel = |keys: Keys, label: &str, value: &dyn Fn(&Curve, usize) -> (f64, f64)| {
        let of = curves.iter().filter(|curve| curve.keys == keys).zip(looks);
        let series = of.map(|(curve, (colour, corners))| {
            let points = steps.iter().enumerate().map(|(i, steps)| {
                let (y, spread) = value(curve, i);
                (*steps, y, spread)
            });
            let name = format!("λ = {}", curve.ridge);
            Series { name, colour, mark: Mark::Line(corners), points: points.collect() }
        });
        Panel {
            title: format!("{} keys", keys.name()),
            x: Axis::new("conjugate-gradient steps", Scale::LogAt(steps.clone())),
            y: Axis::new(label, Scale::Log),
            series: series.collect(),
        }
    };
    let error = |curve: &Curve, i: usize| (curve.error(i).mean, curve.error(i).se);
    let time = |curve: &Curve, i: usize| (curve.seconds(i) * 1e3, 0.0);
    Figure {
        name: "iterations".into(),
        title: format!("Conjugate-gradient steps: error and time, N = {}, D = {}", shape.tokens, shape.dim),
        columns: 2,
        stretch: 1.0,
        panels: Keys::ALL
            .iter()
            .map(|keys| panel(*keys, "relative error of the output", &error))
            .chain(Keys::ALL.iter().map(|keys| panel(*keys, "milliseconds, forward", &time)))
            .collect(),
    }
}

fn results(lines: &[Line], curves: &[Curve]) -> Value {
    let line = |line: &Line| json!({"what": line.what, "of": line.of, "tokens": line.tokens, "seconds": line.cost.seconds, "bytes": line.cost.bytes});
    let curve = |curve: &Curve| {
        let points = iterations::STEPS
            .iter()
            .enumerate()
            .map(|(i, steps)| json!({"steps": steps, "error": curve.error(i), "seconds": curve.seconds(i)}));
        json!({"keys": curve.keys.name(), "ridge": curve.ridge, "points": points.collect::<Vec<_>>()})
    };
    json!({
        "costs": lines.iter().map(line).collect::<Vec<_>>(),
        "iterations": curves.iter().map(curve).collect::<Vec<_>>(),
    })
}

/// How many times the others' time LLA takes on the longest sequence.
fn findings(lines: &[Line]) -> Vec<String> {
    let Some(&n) = lengths(lines).last() else { return vec![] };
    let seconds = |what: &str, of: &str| find(lines, what, of, n).map(|line| line.cost.seconds);
    let sentence = |what: &&str| {
        let lla = seconds(what, "LLA")?;
        let others = decode::NAMES[..3].iter();
        let others = others.filter_map(|of| Some(format!("{of}'s {:.2}", lla / seconds(what, of)?)));
        let others: Vec<String> = others.collect();
        (!others.is_empty())
            .then(|| format!("{what}, N = {n}: LLA's time in units of {}.", others.join(", ")))
    };
    kinds(lines).iter().filter_map(sentence).collect()
}
