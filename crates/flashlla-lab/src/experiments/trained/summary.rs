//! What trained runs show: tables, figures and sentences.

use super::look::look;
use super::runs::{Grid, Ran, Setting};
use crate::Result;
use crate::report::{Axis, Cell, Figure, Mark, Panel, Report, Scale, Series, Table};
use crate::tasks::{Score, TaskSpec};
use flashlla_candle::MixerKind;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// At most this many panels in a figure of curves.
const PANELS: usize = 6;

/// The report of runs of one task, at least one.
pub fn report(name: &'static str, runs: Vec<Ran>) -> Result<Option<Report>> {
    let Some(task) = runs.first().map(|run| run.spec.task.clone()) else { return Ok(None) };
    let listed = list(&runs, task.score());
    let grid = Grid::new(runs)?;
    let view = View { x: x_axis(&task, &grid), score: task.score(), grid: &grid };
    Ok(Some(Report {
        name,
        settings: json!({"task": task.name(), "shared": grid.shared, "varied": grid.varied}),
        tables: vec![view.scores()],
        data: vec![listed, view.curve_table()],
        figures: [Some(view.score_figure()), view.curve_figure()].into_iter().flatten().collect(),
        results: view.results(),
        findings: view.findings(),
    }))
}

/// Which of the varied options is the horizontal axis.
fn x_axis(task: &TaskSpec, grid: &Grid) -> Option<usize> {
    let own = format!("{}.{}", task.name(), task.axis().0);
    // The paper draws recall against the width.
    let wanted = match task {
        TaskSpec::Mqar(_) => ["model.dim".to_owned(), own],
        _ => [own, "model.dim".to_owned()],
    };
    let is_number = |i: usize| grid.cells.keys().all(|setting| setting[i].number().is_some());
    let place = |key: &String| grid.varied.iter().position(|varied| varied == key).filter(|i| is_number(*i));
    wanted.iter().find_map(place).or_else(|| (0..grid.varied.len()).find(|i| is_number(*i)))
}

/// The last part of an option's name.
fn short(key: &str) -> &str {
    key.rsplit_once('.').map_or(key, |(_, last)| last)
}

/// Every run by itself.
fn list(runs: &[Ran], score: Score) -> Table {
    let columns = [
        "run",
        "mixer",
        "seed",
        "learning rate",
        "optimizer",
        "status",
        "steps",
        score.name,
        "loss",
        "parameters",
        "seconds",
        "device",
    ];
    let mut table = Table::new("runs", "Every run", &columns);
    let number = |x: Option<f64>| x.map_or(Cell::from(""), Cell::from);
    for run in runs {
        let (spec, end) = (&run.spec, &run.finished);
        table.push([
            spec.name().into(),
            spec.model.mixer.name().into(),
            (spec.seed as usize).into(),
            spec.training.learning_rate.into(),
            word(&spec.training.optimizer).into(),
            word(&end.status).into(),
            (end.steps as usize).into(),
            number(run.score()),
            number(end.metrics.get("loss").copied()),
            end.parameters.into(),
            end.seconds.into(),
            end.device.clone().into(),
        ]);
    }
    table
}

/// A value as configurations write it.
fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

struct View<'a> {
    grid: &'a Grid,
    score: Score,
    x: Option<usize>,
}

impl View<'_> {
    fn words(&self) -> &'static str {
        if self.score.higher_is_better { "highest" } else { "lowest" }
    }

    fn scores(&self) -> Table {
        let grid = self.grid;
        let mut columns: Vec<&str> = grid.varied.iter().map(|key| short(key)).collect();
        columns.extend(grid.mixers.iter().map(|kind| look(*kind).0));
        let title = format!("Final {} (mean ± standard error over seeds)", self.score.label);
        let mut table = Table::new("scores", &title, &columns);
        for (setting, row) in &grid.cells {
            let settings = setting.iter().map(Setting::cell);
            let scores = grid.mixers.iter().map(|kind| match row.get(kind) {
                None => "".into(),
                Some(cell) => match cell.summary() {
                    Some(summary) => Cell::Spread(summary.mean, summary.se),
                    None => "diverged".into(),
                },
            });
            table.push(settings.chain(scores));
        }
        table
    }

    fn curve_table(&self) -> Table {
        let varied = self.grid.varied.iter().map(|key| short(key));
        let columns: Vec<&str> = varied.chain(["mixer", "step", self.score.name]).collect();
        let mut table = Table::new("curves", "Evaluations while training", &columns);
        for (setting, row) in &self.grid.cells {
            for (kind, cell) in row {
                for (step, summary) in cell.curve() {
                    let settings = setting.iter().map(Setting::cell);
                    let rest =
                        [kind.name().into(), (step as usize).into(), Cell::Spread(summary.mean, summary.se)];
                    table.push(settings.chain(rest));
                }
            }
        }
        table
    }

    fn y_axis(&self) -> Axis {
        match self.score.name {
            "accuracy" => Axis::new(self.score.label, Scale::Linear).range(-0.03, 1.03),
            "mse" => Axis::new(self.score.label, Scale::Log),
            _ => Axis::new(self.score.label, Scale::Linear),
        }
    }

    /// What a panel is titled: the values of the options besides the axis.
    fn title(&self, setting: &[Setting], but: Option<usize>) -> String {
        let named = self.grid.varied.iter().zip(setting).enumerate().filter(|(i, _)| Some(*i) != but);
        named
            .map(|(_, (key, value))| format!("{} {}", short(key), value.text()))
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// The final scores: curves over the axis, or bars where there is none.
    fn score_figure(&self) -> Figure {
        type Rows<'a> = Vec<(&'a Vec<Setting>, &'a BTreeMap<MixerKind, super::runs::Cell>)>;
        let mut panels = BTreeMap::<Vec<Setting>, Rows>::new();
        for (setting, row) in &self.grid.cells {
            let mut rest = setting.clone();
            if let Some(x) = self.x {
                rest[x] = Setting(Value::Null);
            }
            panels.entry(rest).or_default().push((setting, row));
        }
        let panels = panels.into_iter().map(|(rest, rows)| {
            let at = |setting: &[Setting]| self.x.and_then(|x| setting[x].number());
            let series = self.grid.mixers.iter().enumerate().map(|(place, kind)| {
                let (name, colour, corners) = look(*kind);
                let points = rows.iter().filter_map(|(setting, row)| {
                    let summary = row.get(kind)?.summary()?;
                    Some((at(setting).unwrap_or(place as f64), summary.mean, summary.se))
                });
                let mark = if self.x.is_some() { Mark::Line(corners) } else { Mark::Dot(corners) };
                Series { name: name.into(), colour, mark, points: points.collect() }
            });
            let x = match self.x {
                Some(x) => {
                    let mut values: Vec<f64> = rows.iter().filter_map(|(setting, _)| at(setting)).collect();
                    values.dedup();
                    Axis::new(short(&self.grid.varied[x]), Scale::LogAt(values))
                }
                None => {
                    let names = self.grid.mixers.iter().map(|kind| look(*kind).0.to_owned());
                    Axis::new("", Scale::Categories(names.collect()))
                }
            };
            Panel { title: self.title(&rest, self.x), x, y: self.y_axis(), series: series.collect() }
        });
        let panels: Vec<Panel> = panels.collect();
        Figure {
            name: "scores".into(),
            title: format!("Final {}, mean and standard error over seeds", self.score.label),
            columns: 2,
            stretch: 1.2,
            panels,
        }
    }

    /// The scores along training.
    fn curve_figure(&self) -> Option<Figure> {
        let panels = self.grid.cells.iter().map(|(setting, row)| {
            let series = self.grid.mixers.iter().filter_map(|kind| {
                let (name, colour, corners) = look(*kind);
                let curve = row.get(kind)?.curve();
                let points = curve.iter().map(|(step, s)| (*step as f64, s.mean, s.se)).collect();
                Some(Series { name: name.into(), colour, mark: Mark::Line(corners), points })
            });
            let x = Axis::new("training steps", Scale::Linear);
            Panel { title: self.title(setting, None), x, y: self.y_axis(), series: series.collect() }
        });
        // A single evaluation is no curve.
        let long = |panel: &Panel| panel.series.iter().any(|series| series.points.len() > 1);
        let panels: Vec<Panel> = panels.filter(long).take(PANELS).collect();
        (!panels.is_empty()).then(|| Figure {
            name: "curves".into(),
            title: format!("{} of held-out data while training", capitalised(self.score.label)),
            columns: 2,
            stretch: 1.2,
            panels,
        })
    }

    fn results(&self) -> Value {
        let rows = self.grid.cells.iter().map(|(setting, row)| {
            let options: BTreeMap<&String, &Value> =
                self.grid.varied.iter().zip(setting).map(|(key, value)| (key, &value.0)).collect();
            let mixers: BTreeMap<&str, Value> = row
                .iter()
                .map(|(kind, cell)| {
                    let entry = json!({
                        "score": cell.summary(), "diverged": cell.diverged, "learning_rate": cell.learning_rate,
                    });
                    (kind.name(), entry)
                })
                .collect();
            json!({"options": options, "mixers": mixers})
        });
        json!({"score": self.score.name, "rows": rows.collect::<Vec<_>>()})
    }

    fn findings(&self) -> Vec<String> {
        let mean = |row: &BTreeMap<MixerKind, super::runs::Cell>, kind: MixerKind| {
            let sign = if self.score.higher_is_better { -1.0 } else { 1.0 };
            row.get(&kind).and_then(|cell| Some(sign * cell.summary()?.mean))
        };
        let lla = MixerKind::LocalLinear;
        let others: Vec<MixerKind> = self.grid.mixers.iter().copied().filter(|kind| *kind != lla).collect();
        let rows: Vec<_> = self.grid.cells.values().filter(|row| mean(row, lla).is_some()).collect();
        let mut findings = vec![];
        if !others.is_empty() && !rows.is_empty() {
            let better = |row: &&&BTreeMap<MixerKind, super::runs::Cell>, kind: MixerKind| {
                mean(row, kind).is_none_or(|other| mean(row, lla).is_some_and(|lla| lla < other))
            };
            let best = rows.iter().filter(|row| others.iter().all(|kind| better(row, *kind))).count();
            findings.push(format!(
                "LLA has the {} {} in {best} of {} settings.",
                self.words(),
                self.score.label,
                rows.len()
            ));
            let each = others.iter().map(|kind| {
                let wins = rows.iter().filter(|row| better(row, *kind)).count();
                format!("{} {wins}", look(*kind).0)
            });
            findings.push(format!(
                "Settings of {} in which LLA is better than: {}.",
                rows.len(),
                each.collect::<Vec<_>>().join(", ")
            ));
        }
        let diverged: usize =
            self.grid.cells.values().flat_map(BTreeMap::values).map(|cell| cell.diverged).sum();
        if diverged > 0 {
            findings.push(format!("{diverged} runs diverged; they count for nothing in the means."));
        }
        findings
    }
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}
