//! The TOML file of a sweep.
//!
//! Sections hold options; an option that is a list stands for each of its values, and a section may be a list of sections
//! (`[[mqar]]`): the sweep is every combination. What a file leaves out is as in the experiment of its task.

use crate::train::RunSpec;
use crate::{Error, Result};
use serde_path_to_error::Segment;
use std::path::Path;
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

/// Runs, in the order of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Sweep {
    /// All of the same task, no two the same.
    pub runs: Vec<RunSpec>,
}

/// The tasks' sections, each with the experiment that says what is left out.
const TASKS: [(&str, &str); 4] = [
    ("in-context-regression", include_str!("../experiments/trained/in_context_regression.toml")),
    ("mqar", include_str!("../experiments/trained/mqar.toml")),
    ("state-tracking", include_str!("../experiments/trained/state_tracking.toml")),
    ("language-model", include_str!("../experiments/trained/language_model.toml")),
];

/// Sections and lists besides the task's.
const COMMON: [&str; 4] = ["mixers", "seeds", "model", "training"];

/// More runs than this are a mistake.
const MOST: usize = 100_000;

/// A file, for error messages that name the line.
struct Source<'a> {
    name: &'a str,
    text: &'a str,
    document: Spanned<DeTable<'a>>,
}

impl Source<'_> {
    fn line(&self, at: usize) -> usize {
        self.text[..at.min(self.text.len())].matches('\n').count() + 1
    }

    /// The line of a key: of its section where it is not given itself.
    fn find(&self, section: &str, key: &str) -> Option<usize> {
        let (name, value) = self.document.get_ref().iter().find(|(name, _)| name.get_ref() == section)?;
        if key.is_empty() {
            return Some(self.line(name.span().start));
        }
        let in_table = |table: &DeTable| {
            table.iter().find(|(name, _)| name.get_ref() == key).map(|(name, _)| self.line(name.span().start))
        };
        match value.get_ref() {
            DeValue::Table(table) => in_table(table),
            DeValue::Array(tables) => tables.iter().find_map(|table| match table.get_ref() {
                DeValue::Table(table) => in_table(table),
                _ => None,
            }),
            _ => None,
        }
    }

    fn mistake(&self, section: &str, key: &str, what: impl std::fmt::Display) -> Error {
        let path = if key.is_empty() { section.to_owned() } else { format!("{section}.{key}") };
        match self.find(section, key) {
            Some(line) => Error::failed(format!("{}:{line}: {path}: {what}", self.name)),
            None => Error::failed(format!("{}: {path}, which it leaves as it is: {what}", self.name)),
        }
    }
}

impl Sweep {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let text =
            std::fs::read_to_string(path).map_err(|error| Error::failed(format!("{name}: {error}")))?;
        Self::parse(&name, &text)
    }

    /// Reads the text of the file of this name.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let wrong = |error: toml::de::Error| {
            let line = text[..error.span().map_or(0, |span| span.start)].matches('\n').count() + 1;
            // The parser's message may have several lines.
            let what = error.message().lines().collect::<Vec<_>>().join("; ");
            Error::failed(format!("{name}:{line}: {what}"))
        };
        let document = DeTable::parse(text).map_err(wrong)?;
        let source = Source { name, text, document };
        let mut given: Table = toml::from_str(text).map_err(wrong)?;

        let allowed = || TASKS.iter().map(|(task, _)| *task).chain(COMMON).collect::<Vec<_>>().join(", ");
        let is_known = |key: &str| COMMON.contains(&key) || TASKS.iter().any(|(task, _)| *task == key);
        if let Some(key) = given.keys().find(|key| !is_known(key)) {
            let what = format!("there is no such section; allowed are {}", allowed());
            return Err(source.mistake(key, "", what));
        }
        let mut tasks = TASKS.iter().filter(|(task, _)| given.contains_key(*task));
        let (task, defaults) = match (tasks.next(), tasks.next()) {
            (Some(task), None) => task,
            (None, _) => {
                let names = TASKS.map(|(task, _)| format!("[{task}]")).join(", ");
                return Err(Error::failed(format!("{name}: has no task; it needs one section of {names}")));
            }
            (_, Some((second, _))) => {
                return Err(source.mistake(second, "", "a second task; a sweep has one"));
            }
        };
        let defaults: Table = toml::from_str(defaults).map_err(wrong)?;
        let lists = |key: &str| -> Result<Vec<Value>> {
            match given.get(key).or(defaults.get(key)) {
                Some(Value::Array(values)) if !values.is_empty() => Ok(values.clone()),
                _ => Err(source.mistake(key, "", "must be a list of at least one")),
            }
        };
        let (mixers, seeds) = (lists("mixers")?, lists("seeds")?);
        let sections = [*task, "model", "training"]
            .map(|section| combinations(&source, section, given.remove(section), defaults.get(section)));
        let [tasks, models, trainings] = sections;
        let (tasks, models, trainings) = (tasks?, models?, trainings?);
        let count = [&mixers, &seeds].map(Vec::len).into_iter();
        let count = count
            .chain([&tasks, &models, &trainings].map(Vec::len))
            .try_fold(1usize, |a, b| a.checked_mul(b));
        if count.is_none_or(|count| count > MOST) {
            return Err(Error::failed(format!("{name}: asks for more than {MOST} runs")));
        }

        let mut runs: Vec<RunSpec> = vec![];
        for options in &tasks {
            for model in &models {
                for training in &trainings {
                    for mixer in &mixers {
                        for seed in &seeds {
                            let mut model = model.clone();
                            model.insert("mixer".into(), mixer.clone());
                            let mut run = Table::new();
                            run.insert(
                                "task".into(),
                                Value::Table(
                                    [(task.to_string(), options.clone().into())].into_iter().collect(),
                                ),
                            );
                            run.insert("model".into(), model.into());
                            run.insert("training".into(), training.clone().into());
                            run.insert("seed".into(), seed.clone());
                            let run = spec(&source, run)?;
                            if !runs.contains(&run) {
                                runs.push(run);
                            }
                        }
                    }
                }
            }
        }
        Ok(Self { runs })
    }

    /// The sweep of an experiment, by its task's name.
    pub fn of_experiment(task: &str, quick: Option<&str>) -> Result<Self> {
        let full = TASKS.iter().find(|(name, _)| *name == task).map_or("", |(_, text)| *text);
        Self::parse(task, quick.unwrap_or(full))
    }

    /// The text of an experiment's own file.
    pub fn text_of(task: &str) -> &'static str {
        TASKS.iter().find(|(name, _)| *name == task).map_or("", |(_, text)| *text)
    }
}

/// Every combination of a section's options, what is not given taken from the defaults.
fn combinations(
    source: &Source,
    section: &str,
    given: Option<Value>,
    defaults: Option<&Value>,
) -> Result<Vec<Table>> {
    let (given, by_default) = (tables(given), tables(defaults.cloned()));
    let (Some(given), Some(by_default)) = (given, by_default) else {
        return Err(source.mistake(section, "", "must be a section of options"));
    };
    // Defaults that are a list of sections go as a whole, or not at all, save for what all of them have.
    let defaults = match (&given[..], by_default) {
        ([], all) => {
            return all
                .into_iter()
                .map(|table| expand(source, section, table))
                .collect::<Result<Vec<_>>>()
                .map(|all| all.concat());
        }
        (_, all) => all.into_iter().next().unwrap_or_default(),
    };
    let with_defaults = |table: Table| {
        let mut all = defaults.clone();
        all.extend(table);
        expand(source, section, all)
    };
    Ok(given.into_iter().map(with_defaults).collect::<Result<Vec<_>>>()?.concat())
}

/// One table or several; `None` if it is something else.
fn tables(value: Option<Value>) -> Option<Vec<Table>> {
    match value {
        None => Some(vec![]),
        Some(Value::Table(table)) => Some(vec![table]),
        Some(Value::Array(values)) => values
            .into_iter()
            .map(|value| if let Value::Table(table) = value { Some(table) } else { None })
            .collect(),
        Some(_) => None,
    }
}

/// A table whose lists are multiplied out.
fn expand(source: &Source, section: &str, table: Table) -> Result<Vec<Table>> {
    let mut all = vec![Table::new()];
    for (key, value) in table {
        let values = match value {
            Value::Array(values) if values.is_empty() => {
                return Err(source.mistake(section, &key, "must not be an empty list"));
            }
            Value::Array(values) => values,
            value => vec![value],
        };
        if all.len().saturating_mul(values.len()) > MOST {
            return Err(source.mistake(section, &key, format!("asks for more than {MOST} runs")));
        }
        let with = |table: &Table, value: &Value| {
            let mut table = table.clone();
            table.insert(key.clone(), value.clone());
            table
        };
        all = all.iter().flat_map(|table| values.iter().map(move |value| with(table, value))).collect();
    }
    Ok(all)
}

/// A run from its tables; what is wrong is said with the line.
fn spec(source: &Source, run: Table) -> Result<RunSpec> {
    let run: RunSpec = serde_path_to_error::deserialize(Value::Table(run)).map_err(|error| {
        let mut path = error.path().iter().filter_map(|segment| match segment {
            Segment::Map { key } => Some(key.as_str()),
            Segment::Enum { variant } => Some(variant.as_str()),
            _ => None,
        });
        let section = path.by_ref().find(|key| *key != "task").unwrap_or_default().to_owned();
        let key = path.next().unwrap_or_default().to_owned();
        let (section, key) = match (section.as_str(), key.as_str()) {
            ("seed", _) => ("seeds", ""),
            ("model", "mixer") => ("mixers", ""),
            other => other,
        };
        let what = error.inner().to_string();
        source.mistake(section, key, what.lines().next().unwrap_or_default())
    })?;
    run.check().map_err(|(section, key, what)| source.mistake(section, key, what))?;
    Ok(run)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        let message = Sweep::parse("my.toml", text).unwrap_err().to_string();
        assert_eq!(message.lines().count(), 1, "{message}");
        message
    }

    #[test]
    fn every_experiments_own_file_is_a_sweep() {
        for (task, text) in TASKS {
            let sweep = Sweep::parse(task, text).unwrap();
            assert!(sweep.runs.iter().all(|run| run.task.name() == task), "{task}");
            let names: std::collections::BTreeSet<_> = sweep.runs.iter().map(RunSpec::name).collect();
            assert_eq!(names.len(), sweep.runs.len(), "{task}: two runs of one name");
        }
    }

    #[test]
    fn lists_are_multiplied_and_the_rest_is_as_in_the_experiment() {
        let text = "mixers = ['lla', 'softmax']\nseeds = [3, 4, 5]\n[[mqar]]\npairs = [2, 4]\nlength = 32\n[[mqar]]\npairs = 8\nlength = 64\n[training]\nlearning-rate = [1e-3, 1e-2]\nsteps = 7\n[model]\ndim = 32\nheads = 1\n";
        let runs = Sweep::parse("my.toml", text).unwrap().runs;
        assert_eq!(runs.len(), 2 * 3 * 3 * 2);
        assert!(runs.iter().all(|run| run.training.steps == 7 && run.model.dim == 32));
        let defaults = Sweep::of_experiment("mqar", None).unwrap().runs;
        assert_eq!(runs[0].training.clip, defaults[0].training.clip);
        assert_eq!(Sweep::parse("my.toml", &text.replace("[3, 4, 5]", "[3, 3]")).unwrap().runs.len(), 12);
    }

    #[test]
    fn a_mistake_is_told_with_its_line_and_key() {
        for (text, expected) in [
            (
                "[mqar]\npairs = 4\n\n[training]\nsteps = 'many'\n",
                &["my.toml:5: training.steps: ", "many"][..],
            ),
            ("[mqar]\npears = 4\n", &["my.toml:2: mqar.pears: ", "unknown field `pears`", "`pairs`"]),
            (
                "[mqar]\n[training]\nbatch = 1\nsteps = [1, 0]\n",
                &["my.toml:4: training.steps: must be at least 1, not 0"],
            ),
            ("[mqar]\npairs = 4\nlength = 15\n", &["my.toml:3: mqar.length: ", "from 16", "not 15"]),
            ("mixers = [\n  'lla',\n  'sofmax']\n[mqar]\n", &["my.toml:1: mixers: ", "sofmax", "`softmax`"]),
            (
                "[mqar]\n[training]\noptimizer = 'adam'\n",
                &["my.toml:3: training.optimizer: ", "`adamw`", "`muon`"],
            ),
            ("[mqar]\npairs = -1\n", &["my.toml:2: mqar.pairs: ", "-1"]),
            ("[mqar]\npairs = []\n", &["my.toml:2: mqar.pairs: must not be an empty list"]),
            ("seeds = 3\n[mqar]\n", &["my.toml:1: seeds: must be a list"]),
            ("[mqar]\n[modle]\n", &["my.toml:2: modle: ", "allowed are", "model"]),
            ("[mqar]\n\n[state-tracking]\n", &["my.toml:3: state-tracking: a second task"]),
            ("[model]\n", &["my.toml: has no task", "[mqar]"]),
            ("[mqar]\npairs = = 4\n", &["my.toml:2: "]),
            ("[mqar]\npairs = 4\npairs = 5\n", &["my.toml:3: ", "duplicate"]),
            ("model = 3\n[mqar]\n", &["my.toml:1: model: must be a section"]),
            (
                "[mqar]\n[model]\ndim = 30\nheads = 4\n",
                &["my.toml:4: model.heads: must divide dim (30), not 4"],
            ),
        ] {
            let message = refused(text);
            assert!(expected.iter().all(|part| message.contains(part)), "{text:?}: {message}");
        }
    }
}
