//! Tables: drawn on a terminal, written as CSV.

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, ContentArrangement};
use serde::{Deserialize, Serialize};

/// One entry of a [`Table`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Cell {
    /// Words.
    Text(String),
    /// A count.
    Count(u64),
    /// A number: four significant digits on the terminal, all of them in CSV.
    Number(f64),
    /// A mean and its spread: one column on the terminal, two in CSV.
    Spread(f64, f64),
}

impl Cell {
    /// As people read it.
    pub fn shown(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Count(count) => count.to_string(),
            Self::Number(number) => significant(*number),
            Self::Spread(mean, spread) => format!("{} ± {}", significant(*mean), brief(*spread)),
        }
    }

    /// As it is sorted, where it is a number.
    pub fn number(&self) -> Option<f64> {
        match *self {
            Self::Text(_) => None,
            Self::Count(count) => Some(count as f64),
            Self::Number(number) | Self::Spread(number, _) => Some(number),
        }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}
impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}
impl From<usize> for Cell {
    fn from(count: usize) -> Self {
        Self::Count(count as u64)
    }
}
impl From<f64> for Cell {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

/// Columns with names, rows of [`Cell`]s.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// The stem of the CSV file's name.
    pub name: String,
    /// A line above the table.
    pub title: String,
    /// The columns' names. Those of [`Cell::Spread`] columns get a second CSV column `.._spread`.
    pub columns: Vec<String>,
    /// The rows, each as long as `columns`.
    pub rows: Vec<Vec<Cell>>,
}

impl Table {
    /// An empty table.
    pub fn new(name: &str, title: &str, columns: &[&str]) -> Self {
        let columns = columns.iter().map(|c| c.to_string()).collect();
        Self { name: name.into(), title: title.into(), columns, rows: vec![] }
    }

    /// Adds a row.
    pub fn push(&mut self, row: impl IntoIterator<Item = Cell>) {
        self.rows.push(row.into_iter().collect());
    }

    /// As lines for a terminal.
    pub fn to_terminal(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
        table.set_header(&self.columns);
        for row in &self.rows {
            table.add_row(row.iter().map(Cell::shown));
        }
        for (i, column) in table.column_iter_mut().enumerate() {
            if !matches!(self.rows.first().map(|row| &row[i]), Some(Cell::Text(_))) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        format!("{}\n{table}", self.title)
    }

    /// As CSV.
    pub fn to_csv(&self) -> Result<Vec<u8>, csv::Error> {
        let mut writer = csv::Writer::from_writer(vec![]);
        let spread = |i: usize| self.rows.iter().any(|row| matches!(row[i], Cell::Spread(..)));
        for (i, column) in self.columns.iter().enumerate() {
            writer.write_field(snake(column))?;
            if spread(i) {
                writer.write_field(format!("{}_spread", snake(column)))?;
            }
        }
        writer.write_record(None::<&[u8]>)?;
        for row in &self.rows {
            for (i, cell) in row.iter().enumerate() {
                match cell {
                    Cell::Text(text) => writer.write_field(text)?,
                    Cell::Count(count) => writer.write_field(count.to_string())?,
                    Cell::Number(number) => writer.write_field(number.to_string())?,
                    Cell::Spread(mean, spread) => {
                        writer.write_field(mean.to_string())?;
                        writer.write_field(spread.to_string())?;
                    }
                }
                // Words in a column of means, such as "diverged", or nothing where nothing was run.
                if spread(i) && !matches!(cell, Cell::Spread(..)) {
                    writer.write_field("")?;
                }
            }
            writer.write_record(None::<&[u8]>)?;
        }
        writer.into_inner().map_err(|error| error.into_error().into())
    }
}

/// A column's name as programs like it.
fn snake(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).collect()
}

/// Four significant digits, short for very large and very small numbers.
pub fn significant(x: f64) -> String {
    digits(x, 4)
}

/// Two significant digits.
fn brief(x: f64) -> String {
    digits(x, 2)
}

fn digits(x: f64, digits: i32) -> String {
    if x == 0.0 || !x.is_finite() {
        return x.to_string();
    }
    let magnitude = x.abs().log10().floor() as i32;
    if (-4..5).contains(&magnitude) {
        format!("{x:.*}", (digits - 1 - magnitude).max(0) as usize)
    } else {
        format!("{x:.*e}", (digits - 1) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_one_column_on_a_terminal_and_two_in_csv() {
        let mut table = Table::new("t", "Title", &["head", "LLA error"]);
        table.push(["a, b".into(), Cell::Spread(0.38612, 0.0123)]);
        let shown = table.to_terminal();
        assert!(shown.starts_with("Title\n") && shown.contains("0.3861 ± 0.012"), "{shown}");
        let csv = String::from_utf8(table.to_csv().unwrap()).unwrap();
        assert_eq!(csv, "head,lla_error,lla_error_spread\n\"a, b\",0.38612,0.0123\n");
    }

    #[test]
    fn a_row_that_has_words_where_others_have_means_is_as_long_in_csv() {
        let mut table = Table::new("t", "Title", &["width", "LLA", "softmax"]);
        table.push(["64".into(), Cell::Spread(0.5, 0.25), "diverged".into()]);
        table.push(["128".into(), "".into(), Cell::Spread(0.75, 0.0)]);
        let csv = String::from_utf8(table.to_csv().unwrap()).unwrap();
        assert_eq!(csv, "width,lla,lla_spread,softmax,softmax_spread\n64,0.5,0.25,diverged,\n128,,,0.75,0\n");
    }

    #[test]
    fn numbers_keep_four_digits_at_any_size() {
        let shown = [123456.0, 12.3456, 0.000012345, 0.0].map(significant);
        assert_eq!(shown, ["1.235e5", "12.35", "1.234e-5", "0"]);
    }
}
