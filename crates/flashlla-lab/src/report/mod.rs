//! What an experiment hands back, and how it is shown: tables on a terminal, one JSON document for programs, and a folder
//! with CSV, JSON, SVG and PNG files.

mod axis;
pub mod figure;
mod folder;
pub mod page;
pub mod progress;
pub mod stats;
mod table;

pub use axis::{Axis, Scale};
pub use figure::{Figure, Layer, Mark, Panel, PanelLayers, Series, colours};
pub use folder::Folder;
pub use stats::Summary;
pub use table::{Cell, Table, significant};

use crate::{Error, Result};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// Everything an experiment found.
#[derive(Debug, Clone)]
pub struct Report {
    /// The experiment, as the command line calls it.
    pub name: &'static str,
    /// What it was run with.
    pub settings: Value,
    /// For the terminal; each also becomes a CSV file.
    pub tables: Vec<Table>,
    /// CSV files only.
    pub data: Vec<Table>,
    /// Each becomes an SVG and a PNG file.
    pub figures: Vec<Figure>,
    /// The numbers for programs.
    pub results: Value,
    /// What came out, a sentence each.
    pub findings: Vec<String>,
}

impl Report {
    /// The JSON document: `experiment`, `version`, `settings`, `results`, `findings`, `files`. The same for the same
    /// settings, whatever the machine's number of threads.
    pub fn document(&self) -> Value {
        json!({
            "experiment": self.name,
            "version": env!("CARGO_PKG_VERSION"),
            "settings": self.settings,
            "results": self.results,
            "findings": self.findings,
            "files": self.files(),
        })
    }

    /// For a terminal.
    pub fn to_terminal(&self) -> String {
        let mut text = String::new();
        for table in &self.tables {
            let _ = writeln!(text, "{}\n", table.to_terminal());
        }
        for finding in &self.findings {
            let _ = writeln!(text, "{finding}");
        }
        text
    }

    fn files(&self) -> Vec<String> {
        let tables = self.tables.iter().chain(&self.data).map(|table| format!("{}.csv", table.name));
        let figures =
            self.figures.iter().flat_map(|f| [format!("{}.svg", f.name), format!("{}.png", f.name)]);
        tables.chain(figures).chain(["result.json".into()]).collect()
    }

    /// Writes all files.
    pub fn write(&self, folder: Folder) -> Result<()> {
        for table in self.tables.iter().chain(&self.data) {
            let csv =
                table.to_csv().map_err(|error| Error::failed(format!("{}.csv: {error}", table.name)))?;
            folder.add(&format!("{}.csv", table.name), &csv)?;
        }
        for figure in &self.figures {
            let svg = figure.to_svg()?;
            folder.add(&format!("{}.svg", figure.name), svg.as_bytes())?;
            folder.add(&format!("{}.png", figure.name), &Figure::to_png(&svg)?)?;
        }
        let mut document = self.document();
        // With what it takes to show it all again.
        document["tables"] = serde_json::to_value(&self.tables).map_err(Error::failed)?;
        document["figures"] = serde_json::to_value(&self.figures).map_err(Error::failed)?;
        let mut document = serde_json::to_vec_pretty(&document).map_err(Error::failed)?;
        document.push(b'\n');
        folder.add("result.json", &document)?;
        folder.finish()
    }
}
