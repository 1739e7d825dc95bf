//! The log of a run: CSV, a line at a time, which a run that goes on cuts back to where it goes on from.

use super::checkpoint::replace;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

/// A line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Steps made.
    pub step: u64,
    /// Mean loss of the steps since the line before.
    pub loss: f64,
    /// The last of these steps' learning rate.
    pub learning_rate: f64,
    /// Mean norm of their gradients, before clipping.
    pub gradient_norm: f64,
    /// What the evaluation after this step found, if there was one.
    pub score: Option<f64>,
    /// Seconds of training so far, stops not counted. The one column that differs from run to run.
    pub seconds: f64,
}

/// A log that is being written.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    writer: csv::Writer<File>,
}

impl Log {
    /// Keeps the lines up to `step` of what is there, and goes on from there.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let failed = |error: &dyn std::fmt::Display| Error::failed(format!("{}: {error}", path.display()));
        let kept: Vec<Row> = Self::read(path)?.into_iter().take_while(|row| row.step <= step).collect();
        replace(path, |partial| {
            let mut writer = csv::Writer::from_path(partial).map_err(|error| failed(&error))?;
            if kept.is_empty() {
                writer
                    .write_record(["step", "loss", "learning_rate", "gradient_norm", "score", "seconds"])
                    .map_err(|error| failed(&error))?;
            }
            for row in &kept {
                writer.serialize(row).map_err(|error| failed(&error))?;
            }
            writer.flush().map_err(|error| failed(&error))
        })?;
        let file = OpenOptions::new().append(true).open(path).map_err(|error| failed(&error))?;
        let writer = csv::WriterBuilder::new().has_headers(false).from_writer(file);
        Ok(Self { path: path.into(), writer })
    }

    /// Adds a line; it is in the file when this returns.
    pub fn add(&mut self, row: &Row) -> Result<()> {
        let failed =
            |error: &dyn std::fmt::Display| Error::failed(format!("{}: {error}", self.path.display()));
        self.writer.serialize(row).map_err(|error| failed(&error))?;
        self.writer.flush().map_err(|error| failed(&error))
    }

    /// Makes sure that its lines outlive the machine's power.
    pub fn sync(&self) -> Result<()> {
        let synced = self.writer.get_ref().sync_data();
        synced.map_err(|error| Error::failed(format!("{}: {error}", self.path.display())))
    }

    /// The lines of a log, up to the first that is not whole; none when there is no file.
    pub fn read(path: &Path) -> Result<Vec<Row>> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => return Err(Error::failed(format!("{}: {error}", path.display()))),
        };
        // What stands after the last line's end is the beginning of a line that was never finished.
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        let rows = csv::Reader::from_reader(whole.as_bytes()).into_deserialize();
        Ok(rows.map_while(Result::ok).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: u64) -> Row {
        let loss = 1.0 / step as f64;
        Row {
            step,
            loss,
            learning_rate: 1e-3,
            gradient_norm: 2.5,
            score: (step == 2).then_some(0.5),
            seconds: 0.1,
        }
    }

    #[test]
    fn a_log_goes_on_where_the_run_does() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("log.csv");
        let mut log = Log::open(&path, 0).unwrap();
        (1..=4).for_each(|step| log.add(&row(step)).unwrap());
        drop(log);
        // Killed in the middle of a line, with a checkpoint after two steps.
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() - 3]).unwrap();
        assert_eq!(Log::read(&path).unwrap(), [row(1), row(2), row(3)]);
        let mut log = Log::open(&path, 2).unwrap();
        (3..=4).for_each(|step| log.add(&row(step)).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        assert!(Log::read(&place.path().join("none")).unwrap().is_empty());
    }
}
