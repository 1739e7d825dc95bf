//! Runs put side by side: which options differ, which learning rate was best, means over seeds.

use crate::report::{Cell as TableCell, Summary};
use crate::train::{Finished, Row, RunFolder, RunSpec, Status};
use crate::{Error, Result};
use flashlla_candle::MixerKind;
use serde_json::Value;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A run that has ended.
#[derive(Debug, Clone)]
pub struct Ran {
    /// What it was.
    pub spec: RunSpec,
    /// What came out.
    pub finished: Finished,
    /// Its log.
    pub rows: Vec<Row>,
}

impl Ran {
    /// Reads a run's folder; `None` when it has not ended or is not there.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let folder = RunFolder::at(path);
        Ok(match (folder.spec()?, folder.finished()?) {
            (Some(spec), Some(finished)) => Some(Self { spec, finished, rows: folder.rows()? }),
            _ => None,
        })
    }

    /// Its score, unless it has none because it diverged.
    pub fn score(&self) -> Option<f64> {
        let finished = self.finished.status == Status::Finished;
        self.finished.metrics.get(self.spec.task.score().name).copied().filter(|_| finished)
    }
}

/// The options whose best value counts, and which are no axis of a table.
const TUNED: [&str; 1] = ["training.learning-rate"];
/// Options that differ between the rows of a table by their nature.
const APART: [&str; 2] = ["seed", "model.mixer"];

/// The value of an option, in the order of numbers where it is one.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting(pub Value);

impl Setting {
    /// As a number.
    pub fn number(&self) -> Option<f64> {
        self.0.as_f64()
    }

    /// In a table.
    pub fn cell(&self) -> TableCell {
        match (self.0.as_u64(), self.number()) {
            (Some(count), _) => TableCell::Count(count),
            (None, Some(number)) => number.into(),
            _ => self.text().into(),
        }
    }

    /// In words.
    pub fn text(&self) -> String {
        match &self.0 {
            Value::String(text) => text.clone(),
            Value::Null => "default".into(),
            other => other.to_string(),
        }
    }
}
impl Eq for Setting {}
impl PartialOrd for Setting {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Setting {
    fn cmp(&self, other: &Self) -> Ordering {
        match (self.number(), other.number()) {
            (Some(a), Some(b)) => a.total_cmp(&b),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => self.text().cmp(&other.text()),
        }
    }
}

/// The seeds of one mixer in one setting, at the best of the learning rates tried.
#[derive(Debug, Clone)]
pub struct Cell {
    /// Runs that have a score.
    pub runs: Vec<Ran>,
    /// Runs that diverged, at this learning rate.
    pub diverged: usize,
    /// The learning rate.
    pub learning_rate: f64,
}

impl Cell {
    /// Over seeds; `None` if all diverged.
    pub fn summary(&self) -> Option<Summary> {
        let scores: Vec<f64> = self.runs.iter().filter_map(Ran::score).collect();
        (!scores.is_empty()).then(|| Summary::of(&scores))
    }

    /// The score by the number of steps, over seeds.
    pub fn curve(&self) -> Vec<(u64, Summary)> {
        let mut at = BTreeMap::<u64, Vec<f64>>::new();
        for row in self.runs.iter().flat_map(|run| &run.rows) {
            at.entry(row.step).or_default().extend(row.score);
        }
        at.retain(|_, scores| !scores.is_empty());
        at.into_iter().map(|(step, scores)| (step, Summary::of(&scores))).collect()
    }
}

/// Runs of one task, side by side.
#[derive(Debug, Clone)]
pub struct Grid {
    /// The options that differ, by their full names (`model.dim`), in alphabetical order.
    pub varied: Vec<String>,
    /// The options that all share.
    pub shared: BTreeMap<String, Value>,
    /// The mixers, in their usual order.
    pub mixers: Vec<MixerKind>,
    /// By the values of the varied options, and the mixer.
    pub cells: BTreeMap<Vec<Setting>, BTreeMap<MixerKind, Cell>>,
}

/// An options' tree as a flat map.
fn flatten(prefix: &str, value: &Value, into: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&path, value, into);
            }
        }
        leaf => drop(into.insert(prefix.into(), leaf.clone())),
    }
}

fn options(spec: &RunSpec) -> Result<BTreeMap<String, Value>> {
    let mut flat = BTreeMap::new();
    let tree = serde_json::to_value(spec).map_err(Error::failed)?;
    flatten("", &tree, &mut flat);
    Ok(flat.into_iter().map(|(key, value)| (key.trim_start_matches("task.").to_owned(), value)).collect())
}

impl Grid {
    /// Of at least one run, all of one task.
    pub fn new(runs: Vec<Ran>) -> Result<Self> {
        let flat: Vec<BTreeMap<String, Value>> =
            runs.iter().map(|run| options(&run.spec)).collect::<Result<_>>()?;
        let keys: BTreeSet<&String> = flat.iter().flat_map(BTreeMap::keys).collect();
        let first = flat.first();
        let (shared, varied): (Vec<&String>, Vec<&String>) = keys
            .into_iter()
            .filter(|key| !APART.contains(&key.as_str()))
            .partition(|key| flat.iter().all(|options| options.get(*key) == first.and_then(|f| f.get(*key))));
        let rows: Vec<String> =
            varied.iter().filter(|key| !TUNED.contains(&key.as_str())).map(|key| (*key).clone()).collect();

        let mut tried = BTreeMap::<(Vec<Setting>, MixerKind, Vec<Setting>), Vec<Ran>>::new();
        for (run, options) in runs.into_iter().zip(&flat) {
            let values = |keys: &[String]| -> Vec<Setting> {
                keys.iter().map(|key| Setting(options.get(key).cloned().unwrap_or_default())).collect()
            };
            let key = (values(&rows), run.spec.model.mixer, values(&TUNED.map(str::to_owned)));
            tried.entry(key).or_default().push(run);
        }
        let mut cells = BTreeMap::<Vec<Setting>, BTreeMap<MixerKind, Cell>>::new();
        for ((setting, mixer, _), runs) in tried {
            let Some(first) = runs.first() else { continue };
            let (learning_rate, score) = (first.spec.training.learning_rate, first.spec.task.score());
            let all = runs.len();
            let runs: Vec<Ran> = runs.into_iter().filter(|run| run.score().is_some()).collect();
            let cell = Cell { diverged: all - runs.len(), runs, learning_rate };
            // Fewer that diverge first, then the better mean.
            let rank = |cell: &Cell| {
                let mean = cell
                    .summary()
                    .map_or(f64::INFINITY, |s| if score.higher_is_better { -s.mean } else { s.mean });
                (cell.diverged, mean)
            };
            let row = cells.entry(setting).or_default();
            if row.get(&mixer).is_none_or(|best| rank(&cell) < rank(best)) {
                row.insert(mixer, cell);
            }
        }
        let there: BTreeSet<MixerKind> = cells.values().flat_map(BTreeMap::keys).copied().collect();
        // LLA last, so that it is drawn on top.
        let order = MixerKind::ALL.into_iter().filter(|kind| *kind != MixerKind::LocalLinear);
        let order = order.chain([MixerKind::LocalLinear]);
        Ok(Self {
            shared: first.map_or_else(BTreeMap::new, |f| {
                shared.into_iter().map(|key| (key.clone(), f.get(key).cloned().unwrap_or_default())).collect()
            }),
            mixers: order.filter(|kind| there.contains(kind)).collect(),
            varied: rows,
            cells,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::Sweep;

    fn ran(spec: RunSpec, score: Option<f64>) -> Ran {
        let status = if score.is_some() { Status::Finished } else { Status::Diverged };
        let metrics = score.map(|score| ("accuracy".to_owned(), score)).into_iter().collect();
        let finished =
            Finished { status, steps: 1, metrics, parameters: 1, seconds: 1.0, device: "cpu".into() };
        Ran { spec, finished, rows: vec![] }
    }

    #[test]
    fn the_better_learning_rate_counts_and_seeds_are_averaged() {
        let text = "mixers = ['lla', 'softmax']\nseeds = [0, 1]\n[mqar]\nvocabulary = 64\npairs = 2\nlength = 32\n[model]\ndim = [8, 32]\nheads = 1\n[training]\nlearning-rate = [1e-3, 1e-2]\n";
        let runs = Sweep::parse("t", text).unwrap().runs;
        let score = |spec: &RunSpec| match (spec.model.mixer, spec.training.learning_rate > 5e-3, spec.seed) {
            // The higher rate is better on average but one of its seeds diverges.
            (MixerKind::LocalLinear, true, 0) => None,
            (MixerKind::LocalLinear, true, _) => Some(1.0),
            (MixerKind::LocalLinear, false, seed) => Some(0.5 + 0.1 * seed as f64),
            (_, true, _) => Some(0.75),
            _ => Some(0.25),
        };
        let grid = Grid::new(
            runs.into_iter()
                .map(|spec| {
                    let score = score(&spec);
                    ran(spec, score)
                })
                .collect(),
        )
        .unwrap();
        assert_eq!(grid.varied, ["model.dim"]);
        assert_eq!(grid.mixers, [MixerKind::Softmax, MixerKind::LocalLinear]);
        assert_eq!(grid.shared["mqar.pairs"], 2);
        let rows: Vec<f64> = grid.cells.keys().map(|setting| setting[0].number().unwrap()).collect();
        assert_eq!(rows, [8.0, 32.0], "in the order of numbers");
        for row in grid.cells.values() {
            let lla = &row[&MixerKind::LocalLinear];
            assert_eq!((lla.learning_rate, lla.diverged), (1e-3, 0));
            let summary = lla.summary().unwrap();
            assert!((summary.mean - 0.55).abs() < 1e-12 && summary.count == 2);
            assert_eq!(row[&MixerKind::Softmax].learning_rate, 1e-2);
        }
    }
}
