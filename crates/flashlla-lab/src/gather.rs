//! `flashlla report`: any number of folders of results as one page.

use crate::experiments::trained::{self, RUNS, Ran};
use crate::report::page::{Section, page};
use crate::report::{Figure, Folder, Table};
use crate::{Error, Result, stdout};
use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The options of `report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Folders of results, or folders of such folders
    #[arg(value_name = "FOLDER", required = true)]
    pub folders: Vec<PathBuf>,
    /// Folder for the page (index.html), CSV, SVG and PNG files
    #[arg(long, value_name = "DIR", default_value = "results/report")]
    pub out: PathBuf,
    /// The page's title
    #[arg(long, value_name = "TEXT", default_value = "Local Linear Attention: experiments")]
    pub title: String,
}

/// What an experiment wrote.
#[derive(Deserialize)]
struct Document {
    experiment: String,
    settings: Value,
    findings: Vec<String>,
    tables: Vec<Table>,
    figures: Vec<Figure>,
}

/// What was found in the folders.
#[derive(Default)]
struct Found {
    /// By task, and by name: a run that is in several folders counts once.
    runs: BTreeMap<&'static str, BTreeMap<String, Ran>>,
    /// Where they came from.
    sources: BTreeMap<&'static str, BTreeSet<PathBuf>>,
    documents: Vec<(PathBuf, Document)>,
}

impl Found {
    /// Takes up a folder; whether there was anything in it.
    fn take(&mut self, folder: &Path) -> Result<bool> {
        let failed = |what: &dyn std::fmt::Display| Error::failed(format!("{}: {what}", folder.display()));
        if folder.join(RUNS).is_dir() {
            for ran in trained::gather(&folder.join(RUNS))? {
                let task = ran.spec.task.name();
                self.sources.entry(task).or_default().insert(folder.into());
                self.runs.entry(task).or_default().insert(ran.spec.name(), ran);
            }
            return Ok(true);
        }
        let bytes = match std::fs::read(folder.join("result.json")) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(failed(&error)),
        };
        let document: Value = serde_json::from_slice(&bytes).map_err(|error| failed(&error))?;
        // An earlier report's list of files.
        if document["experiment"].is_null() && !document["files"].is_null() {
            return Ok(true);
        }
        let document = serde_json::from_value(document)
            .map_err(|error| failed(&format!("result.json is not of this version's making ({error})")))?;
        self.documents.push((folder.into(), document));
        Ok(true)
    }

    fn sections(self) -> Result<Vec<(String, Section)>> {
        let mut sections = vec![];
        for (task, runs) in self.runs {
            let runs: Vec<Ran> = runs.into_values().collect();
            let count = runs.len();
            let Some(report) = trained::report(task, runs)? else { continue };
            let folders = self.sources.get(task).into_iter().flatten().map(|path| path.display().to_string());
            let section = Section {
                title: task.into(),
                source: format!("{count} runs in {}", folders.collect::<Vec<_>>().join(", ")),
                findings: report.findings,
                tables: report.tables,
                folded: report.data.into_iter().filter(|table| table.name == "runs").collect(),
                figures: report.figures,
                settings: report.settings,
            };
            sections.push((task.to_owned(), section));
        }
        for (path, document) in self.documents {
            let same = sections.iter().filter(|(name, _)| name.starts_with(&document.experiment)).count();
            let name = if same == 0 {
                document.experiment.clone()
            } else {
                format!("{}-{}", document.experiment, same + 1)
            };
            let section = Section {
                title: document.experiment,
                source: path.display().to_string(),
                findings: document.findings,
                tables: document.tables,
                folded: vec![],
                figures: document.figures,
                settings: document.settings,
            };
            sections.push((name, section));
        }
        Ok(sections)
    }
}

/// Runs the command.
pub fn run(args: &ReportArgs) -> Result<()> {
    let mut found = Found::default();
    for folder in &args.folders {
        let failed = |error: std::io::Error| Error::failed(format!("{}: {error}", folder.display()));
        if found.take(folder)? {
            continue;
        }
        let mut inside: Vec<PathBuf> = std::fs::read_dir(folder)
            .map_err(failed)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()
            .map_err(failed)?;
        inside.sort_unstable();
        let mut any = false;
        for folder in inside.iter().filter(|path| path.is_dir()) {
            any |= found.take(folder)?;
        }
        if !any {
            let what = "holds no results; name folders that an experiment or a sweep has written to";
            return Err(Error::failed(format!("{}: {what}", folder.display())));
        }
    }
    let sections = found.sections()?;
    if sections.is_empty() {
        return Err(Error::failed("none of the runs in these folders has ended yet"));
    }
    write(args, &sections)?;
    stdout::line(args.out.join("index.html").display())
}

/// Writes the page and its parts.
fn write(args: &ReportArgs, sections: &[(String, Section)]) -> Result<()> {
    let folder = Folder::prepare(&args.out)?;
    let mut files = vec!["index.html".to_owned(), "result.json".into()];
    let mut add = |name: String, bytes: &[u8]| -> Result<()> {
        folder.add(&name, bytes)?;
        files.push(name);
        Ok(())
    };
    for (name, section) in sections {
        for table in section.tables.iter().chain(&section.folded) {
            let csv = table.to_csv().map_err(|error| Error::failed(format!("{}: {error}", table.name)))?;
            add(format!("{name}-{}.csv", table.name), &csv)?;
        }
        for figure in &section.figures {
            let svg = figure.to_svg()?;
            add(format!("{name}-{}.svg", figure.name), svg.as_bytes())?;
            add(format!("{name}-{}.png", figure.name), &Figure::to_png(&svg)?)?;
        }
    }
    let sections: Vec<Section> = sections.iter().map(|(_, section)| section.clone()).collect();
    folder.add("index.html", page(&args.title, &sections)?.as_bytes())?;
    let list = serde_json::to_vec_pretty(&json!({"files": files})).map_err(Error::failed)?;
    folder.add("result.json", &list)?;
    folder.finish()
}
