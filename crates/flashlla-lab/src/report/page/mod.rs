//! One page with everything in it: tables to sort, figures whose curves can be switched off. It asks the network for nothing.

use super::{Figure, PanelLayers, Table};
use crate::{Error, Result};
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment};
use serde::Serialize;
use serde_json::Value;

/// Panels are narrower than in files, so that their letters are large enough on a phone.
const NARROW: f64 = 0.8;

/// What an experiment gives to the page.
#[derive(Debug, Clone)]
pub struct Section {
    /// Its heading.
    pub title: String,
    /// Where it comes from.
    pub source: String,
    /// A sentence each.
    pub findings: Vec<String>,
    /// Shown as they are.
    pub tables: Vec<Table>,
    /// Shown when they are opened.
    pub folded: Vec<Table>,
    /// Drawn panel by panel.
    pub figures: Vec<Figure>,
    /// Behind a fold.
    pub settings: Value,
}

#[derive(Serialize)]
struct Page<'a> {
    title: &'a str,
    sections: Vec<PageSection<'a>>,
    style: &'static str,
    script: &'static str,
    version: &'static str,
}

#[derive(Serialize)]
struct PageSection<'a> {
    id: String,
    title: &'a str,
    source: &'a str,
    findings: &'a [String],
    tables: Vec<PageTable<'a>>,
    figures: Vec<PageFigure<'a>>,
    settings: String,
}

#[derive(Serialize)]
struct PageTable<'a> {
    title: &'a str,
    folded: bool,
    columns: &'a [String],
    rows: Vec<Vec<PageCell>>,
}

#[derive(Serialize)]
struct PageCell {
    text: String,
    number: Option<f64>,
}

#[derive(Serialize)]
struct PageFigure<'a> {
    title: &'a str,
    legend: Vec<Entry>,
    panels: Vec<PagePanel<'a>>,
}

#[derive(Serialize, PartialEq)]
struct Entry {
    name: String,
    colour: String,
}

#[derive(Serialize)]
struct PagePanel<'a> {
    title: &'a str,
    width: u32,
    height: u32,
    axes: String,
    layers: Vec<PageLayer>,
}

#[derive(Serialize)]
struct PageLayer {
    name: String,
    svg: String,
}

impl<'a> PageTable<'a> {
    fn new(table: &'a Table, folded: bool) -> Self {
        let cell = |cell: &super::Cell| PageCell {
            text: cell.shown(),
            number: cell.number().filter(|number| number.is_finite()),
        };
        let rows = table.rows.iter().map(|row| row.iter().map(cell).collect()).collect();
        Self { title: &table.title, folded, columns: &table.columns, rows }
    }
}

impl<'a> PageFigure<'a> {
    fn new(figure: &'a Figure) -> Result<Self> {
        let (mut legend, mut panels) = (vec![], vec![]);
        for panel in &figure.panels {
            let PanelLayers { size: (width, height), axes, series } = panel.layers(NARROW)?;
            let mut layers = vec![];
            for layer in series {
                let entry = Entry { name: layer.name.clone(), colour: layer.colour };
                if !entry.name.is_empty() && !legend.contains(&entry) {
                    legend.push(entry);
                }
                layers.push(PageLayer { name: layer.name, svg: layer.svg });
            }
            panels.push(PagePanel { title: &panel.title, width, height, axes, layers });
        }
        Ok(Self { title: &figure.title, legend, panels })
    }
}

/// The page of these sections.
pub fn page(title: &str, sections: &[Section]) -> Result<String> {
    let failed = |error: minijinja::Error| Error::failed(format!("page: {error}"));
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_template("page", include_str!("page.html")).map_err(failed)?;
    let sections = sections.iter().enumerate().map(|(i, section)| {
        let shown = section.tables.iter().map(|table| PageTable::new(table, false));
        let folded = section.folded.iter().map(|table| PageTable::new(table, true));
        Ok(PageSection {
            id: format!("section-{i}"),
            title: &section.title,
            source: &section.source,
            findings: &section.findings,
            tables: shown.chain(folded).collect(),
            figures: section.figures.iter().map(PageFigure::new).collect::<Result<_>>()?,
            settings: serde_json::to_string_pretty(&section.settings).map_err(Error::failed)?,
        })
    });
    let context = Page {
        title,
        sections: sections.collect::<Result<_>>()?,
        style: include_str!("page.css"),
        script: include_str!("page.js"),
        version: env!("CARGO_PKG_VERSION"),
    };
    environment.get_template("page").and_then(|template| template.render(Serde(&context))).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Axis, Cell, Mark, Panel, Scale, Series, colours};

    #[test]
    fn what_sections_hold_is_on_the_page_and_cannot_break_out_of_it() {
        let mut table = Table::new("t", "Numbers", &["a<b", "x"]);
        table.push([Cell::from("</td><script>alert(1)</script>"), Cell::Spread(1.5, 0.25)]);
        let series = |name: &str, colour| Series {
            name: name.into(),
            colour,
            mark: Mark::Line(4),
            points: vec![(1.0, 2.0, 0.1), (2.0, 3.0, 0.0)],
        };
        let panel = Panel {
            title: "one".into(),
            x: Axis::new("x", Scale::Linear),
            y: Axis::new("y", Scale::Linear),
            series: vec![series("LLA", colours::VERMILLION), series("soft\"max", colours::BLUE)],
        };
        let figure = Figure {
            name: "f".into(),
            title: "A figure".into(),
            columns: 1,
            stretch: 1.0,
            panels: vec![panel; 2],
        };
        let section = Section {
            title: "Sec & tion".into(),
            source: "somewhere".into(),
            findings: vec!["It is so.".into()],
            tables: vec![table],
            folded: vec![],
            figures: vec![figure],
            settings: serde_json::json!({"seed": 3}),
        };
        let text = page("Title", &[section]).unwrap();
        assert!(
            text.contains("Sec &amp; tion") && text.contains("It is so.") && text.contains("1.500 ± 0.25")
        );
        assert!(!text.contains("<script>alert") && text.contains("data-value=\"1.5\""));
        // Two buttons, and a layer for each of two series in each of two panels.
        assert_eq!(text.matches("aria-pressed=\"true\"").count(), 2);
        assert_eq!(text.matches("<g class=\"layer\"").count(), 4);
        assert!(text.contains("data-series=\"soft&quot;max\""));
        // Nothing is fetched: the one address is the name of SVG.
        let addresses: Vec<&str> =
            text.split("http").skip(1).map(|rest| &rest[..20.min(rest.len())]).collect();
        assert!(
            addresses.iter().all(|a| a.starts_with("://www.w3.org/2000/s") || a.starts_with("-equiv")),
            "{addresses:?}"
        );
    }
}
