//! `test-time-regression`: four mixers, none of them trained, on a stream whose law changes.
//!
//! The paper's setting: q, k and v are the data. A stream of length 1024 consists of segments of length S; each segment has
//! its own key distribution and its own linear map from keys to values, and there is some noise. Every position predicts its
//! value from its key and the pairs before it. The paper reports that within each segment LLA keeps improving; that MesaNet
//! (global ridge regression) is best in the first segment only and then degrades; that softmax attention does not profit
//! from more data; and that the ratio MSE(model)/MSE(LLA) grows with the dimension d.
//!
//! Our choices: a segment's keys are a centre plus independent normal noise, both with standard deviation 1 per
//! coordinate, scaled to norm √d (as QK normalisation does; the plain dot product then is a Gaussian kernel); its map has
//! normal entries of variance 1/d; the noise on values has standard deviation 0.1, against 1 of the values themselves. A
//! position does not see its own pair. Each mixer's parameters (bandwidth; ridge) are those with the smallest mean error on
//! streams of other seeds, for each S and d.
//!
//! What came out: LLA has the smallest mean error for every S and d, and its error falls within each segment. With long
//! segments (256, 512) MesaNet is best in the first one and makes a multiple of LLA's error in all later ones; with short
//! ones the ridge that suits the whole stream costs it the first segment too. Softmax attention soon stops improving. The
//! ratio of its error to LLA's grows with d at every S, from 1.1 to 1.2 at S = 64 and from 1.7 to 5.3 at S = 512; the ratios
//! of linear attention and MesaNet grow at first and then level off.
//!
//! What this does not show: MesaNet has no gates here, and none of the mixers is told when a segment ends. Segments follow
//! each other in time and do not return, so that a model that forgets has an advantage which keys alone do not give: in a
//! trial outside this program (one seed), recursive least squares with the best constant forgetting factor came out below
//! LLA for d = 8 and 16, and above it for d = 64.

use super::estimators::{Pairs, row_errors};
use super::mixers::{Mixer, NAMES};
use super::{Common, random, smallest};
use crate::report::{
    Axis, Cell, Figure, Mark, Panel, Report, Scale, Series, Summary, Table, colours, progress,
};
use crate::{Error, Result, tasks};
use clap::Args;
use rayon::prelude::*;
use serde_json::json;

/// As the command line calls it.
pub const NAME: &str = "test-time-regression";

/// Standard deviation of the noise on values of standard deviation 1.
const NOISE: f64 = 0.1;

/// What the experiment can be told.
#[derive(Debug, Clone, Args)]
pub struct Options {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// The sizes of a run.
struct Sizes {
    length: usize,
    segments: Vec<usize>,
    dims: Vec<usize>,
    /// Streams that parameters are chosen on.
    tuning: u64,
}

/// One mixer at one segment length and dimension.
struct Outcome {
    chosen: Mixer,
    /// Of every seed, at every position, per coordinate of the value.
    errors: Vec<Vec<f64>>,
}

impl Outcome {
    fn mean(&self) -> Summary {
        Summary::of(&self.seed_means())
    }

    fn seed_means(&self) -> Vec<f64> {
        self.errors.iter().map(|errors| Summary::of(errors).mean).collect()
    }

    /// Means over windows of positions: `(middle, over seeds)`.
    fn windows(&self, width: usize) -> Vec<(f64, Summary)> {
        let window = |start: usize| {
            let of_seed = |errors: &Vec<f64>| Summary::of(&errors[start..start + width]).mean;
            let samples: Vec<f64> = self.errors.iter().map(of_seed).collect();
            ((start + width / 2) as f64, Summary::of(&samples))
        };
        (0..self.errors[0].len() / width).map(|i| window(i * width)).collect()
    }
}

/// One segment length and dimension.
struct Setting {
    segment: usize,
    dim: usize,
    /// In the order of [`NAMES`].
    outcomes: Vec<Outcome>,
}

impl Setting {
    /// The ratio of a mixer's error to LLA's, seed by seed.
    fn ratio(&self, place: usize) -> Summary {
        let [model, lla] = [place, NAMES.len() - 1].map(|p| self.outcomes[p].seed_means());
        Summary::of(&model.iter().zip(lla).map(|(m, l)| m / l).collect::<Vec<_>>())
    }
}

impl Options {
    /// Runs the experiment.
    pub fn run(&self) -> Result<Report> {
        let sizes = if self.common.quick {
            Sizes { length: 512, segments: vec![64, 128], dims: vec![4, 8, 16], tuning: 1 }
        } else {
            let segments = vec![64, 128, 256, 512];
            Sizes { length: 1024, segments, dims: vec![8, 16, 32, 64], tuning: 2 }
        };
        let seeds = self.common.seeds(if self.common.quick { 3 } else { 5 });
        let each: Vec<(usize, usize)> =
            sizes.segments.iter().flat_map(|&s| sizes.dims.iter().map(move |&d| (s, d))).collect();
        let bar = progress::bar("settings", each.len());
        let settings: Vec<Setting> = each
            .par_iter()
            .map(|&(segment, dim)| {
                let setting = self.run_setting(segment, dim, &sizes, &seeds);
                bar.inc(1);
                setting
            })
            .collect::<Result<_>>()?;
        bar.finish_and_clear();
        Ok(self.report(&settings, &sizes, &seeds))
    }

    fn run_setting(&self, segment: usize, dim: usize, sizes: &Sizes, seeds: &[u64]) -> Result<Setting> {
        // Purposes of random streams: even ones for the streams that are scored, odd ones for those that choose.
        let purpose = |tuning: u64| ((segment * 1024 + dim) as u64) << 1 | tuning;
        let draw = |seed: u64, tuning| stream(seed, purpose(tuning), sizes.length, segment, dim);
        let tuning: Vec<Pairs> =
            (0..sizes.tuning).map(|i| draw(self.common.seed.wrapping_add(i), 1)).collect();
        let scoring: Vec<Pairs> = seeds.iter().map(|&seed| draw(seed, 0)).collect();
        let errors = |mixer: &Mixer, pairs: &Pairs| -> Result<Vec<f64>> {
            let errors = row_errors(&mixer.predict(pairs)?, &pairs.values, dim);
            Ok(errors.iter().map(|e| e / dim as f64).collect())
        };
        let run_mixer = |place: usize| {
            let candidates = Mixer::candidates(place, dim, self.common.quick);
            let total = |mixer: &Mixer| -> Result<f64> {
                let sums: Vec<f64> = tuning
                    .iter()
                    .map(|pairs| Ok(errors(mixer, pairs)?.iter().sum()))
                    .collect::<Result<_>>()?;
                Ok(sums.iter().sum())
            };
            let totals: Vec<f64> = candidates.par_iter().map(total).collect::<Result<_>>()?;
            let chosen = smallest(totals).map(|i| candidates[i]).ok_or_else(|| {
                Error::failed(format!("{NAME}: {} has no finite error for any parameter", NAMES[place]))
            })?;
            let errors = scoring.par_iter().map(|pairs| errors(&chosen, pairs)).collect::<Result<_>>()?;
            Ok(Outcome { chosen, errors })
        };
        let outcomes = (0..NAMES.len()).map(run_mixer).collect::<Result<_>>()?;
        Ok(Setting { segment, dim, outcomes })
    }

    fn report(&self, settings: &[Setting], sizes: &Sizes, seeds: &[u64]) -> Report {
        let mut table = Table::new(
            "errors",
            "Mean squared error per coordinate over all positions (mean ± standard error over seeds), and its ratio to LLA's",
            &["S", "d", "softmax", "linear", "MesaNet", "LLA", "softmax/LLA", "linear/LLA", "MesaNet/LLA"],
        );
        let mut chosen = Table::new("chosen", "", &["S", "d", "mixer", "parameters"]);
        let mut positions = Table::new("positions", "", &["S", "d", "mixer", "position", "mse"]);
        let mut results = vec![];
        let mut lowest = 0;
        let lla = NAMES.len() - 1;
        for setting in settings {
            let mut row: Vec<Cell> = vec![setting.segment.into(), setting.dim.into()];
            let means: Vec<Summary> = setting.outcomes.iter().map(Outcome::mean).collect();
            row.extend(means.iter().map(|m| Cell::Spread(m.mean, m.se)));
            row.extend((0..lla).map(|place| setting.ratio(place)).map(|r| Cell::Spread(r.mean, r.se)));
            table.push(row);
            lowest += usize::from(smallest(means.iter().map(|m| m.mean)) == Some(lla));
            let mut mixers = serde_json::Map::new();
            for (place, (name, outcome)) in NAMES.iter().zip(&setting.outcomes).enumerate() {
                let (s, d) = (setting.segment, setting.dim);
                chosen.push([s.into(), d.into(), (*name).into(), outcome.chosen.describe().into()]);
                for position in 0..sizes.length {
                    let samples: Vec<f64> = outcome.errors.iter().map(|errors| errors[position]).collect();
                    let summary = Summary::of(&samples);
                    let spread = Cell::Spread(summary.mean, summary.se);
                    positions.push([s.into(), d.into(), (*name).into(), position.into(), spread]);
                }
                let by_segment: Vec<f64> = outcome.windows(s).iter().map(|w| w.1.mean).collect();
                let entry = json!({
                    "mse": outcome.mean(), "ratio_to_lla": setting.ratio(place),
                    "by_segment": by_segment, "parameters": outcome.chosen.describe(),
                });
                mixers.insert(name.to_lowercase(), entry);
            }
            results.push(json!({"segment": setting.segment, "dim": setting.dim, "mixers": mixers}));
        }
        let finding = format!("LLA has the smallest error in {lowest} of {} settings.", settings.len());
        Report {
            name: NAME,
            settings: json!({
                "length": sizes.length, "segments": sizes.segments, "dims": sizes.dims, "seeds": seeds,
                "noise": NOISE, "quick": self.common.quick,
            }),
            tables: vec![table],
            data: vec![chosen, positions],
            figures: vec![position_figure(settings, sizes), ratio_figure(settings, sizes)],
            results: json!({"settings": results, "lla_lowest": lowest}),
            findings: vec![finding],
        }
    }
}

/// The stream of this seed and purpose.
fn stream(seed: u64, purpose: u64, length: usize, segment: usize, dim: usize) -> Pairs {
    tasks::stream(&mut random::stream(seed, purpose), length, segment, dim, NOISE)
}

/// Names, colours and corners of markers, in the order of [`NAMES`].
const LOOK: [(&str, plotters::style::RGBColor, usize); 4] = [
    ("softmax attention", colours::BLUE, 3),
    ("linear attention", colours::PURPLE, 5),
    ("MesaNet", colours::GREEN, 4),
    ("LLA", colours::VERMILLION, 24),
];

/// The error along the stream, one panel for each S, for one dimension.
fn position_figure(settings: &[Setting], sizes: &Sizes) -> Figure {
    let dim = sizes.dims[sizes.dims.len() / 2];
    let panels = settings.iter().filter(|setting| setting.dim == dim).map(|setting| {
        let series = LOOK.iter().zip(&setting.outcomes).map(|(&(name, colour, _), outcome)| Series {
            name: name.into(),
            colour,
            mark: Mark::Thin,
            points: outcome.windows(8).iter().map(|(at, summary)| (*at, summary.mean, 0.0)).collect(),
        });
        Panel {
            title: format!("segments of S = {}", setting.segment),
            x: Axis::new("position in the stream (tokens)", Scale::Linear).range(0.0, sizes.length as f64),
            y: Axis::new("mean squared error", Scale::Log),
            series: series.collect(),
        }
    });
    Figure {
        name: "error_by_position".into(),
        title: format!("Error along a stream that changes every S tokens, d = {dim}, means of 8 positions"),
        columns: 2,
        stretch: 1.2,
        panels: panels.collect(),
    }
}

/// The ratios to LLA's error against the dimension, one panel for each S.
fn ratio_figure(settings: &[Setting], sizes: &Sizes) -> Figure {
    let dims: Vec<f64> = sizes.dims.iter().map(|&d| d as f64).collect();
    let highest =
        settings.iter().flat_map(|s| (0..3).map(|p| s.ratio(p).mean + s.ratio(p).se)).fold(1.0, f64::max);
    let panels = sizes.segments.iter().map(|&segment| {
        let rows: Vec<&Setting> = settings.iter().filter(|setting| setting.segment == segment).collect();
        let mut series: Vec<Series> = (0..NAMES.len() - 1)
            .map(|place| Series {
                name: LOOK[place].0.into(),
                colour: LOOK[place].1,
                mark: Mark::Line(LOOK[place].2),
                points: rows
                    .iter()
                    .map(|row| {
                        let ratio = row.ratio(place);
                        (row.dim as f64, ratio.mean, ratio.se)
                    })
                    .collect(),
            })
            .collect();
        series.push(Series {
            name: "LLA (1 by definition)".into(),
            colour: colours::VERMILLION,
            mark: Mark::Dashed,
            points: [dims[0], dims[dims.len() - 1]].map(|d| (d, 1.0, 0.0)).to_vec(),
        });
        Panel {
            title: format!("segments of S = {segment}"),
            x: Axis::new("dimension d of keys and values", Scale::LogAt(dims.clone())),
            y: Axis::new("MSE(model) / MSE(LLA)", Scale::Log).range(0.85, highest * 1.15),
            series,
        }
    });
    Figure {
        name: "ratio_by_dimension".into(),
        title: "How many times LLA's error the other mixers make".into(),
        columns: 2,
        stretch: 1.0,
        panels: panels.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_that_choose_are_not_those_that_score() {
        assert_ne!(stream(0, 0, 32, 32, 4), stream(0, 1, 32, 32, 4));
        assert_ne!(stream(0, 0, 32, 32, 4), stream(1, 0, 32, 32, 4));
        assert_eq!(stream(0, 0, 32, 32, 4), stream(0, 0, 32, 32, 4));
    }
}
