//! The folder of a run: what it is, how far it is, and what came out.

use super::checkpoint::replace;
use super::{Log, Row, RunSpec};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// All steps were made.
    Finished,
    /// The loss or a gradient was no longer a finite number.
    Diverged,
}

/// What came out of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Finished {
    /// How it ended.
    pub status: Status,
    /// Steps made.
    pub steps: u64,
    /// Results of the last evaluation by name, among them the task's score.
    pub metrics: BTreeMap<String, f64>,
    /// Numbers that were learned.
    pub parameters: usize,
    /// Seconds of training, stops not counted.
    pub seconds: f64,
    /// Where it was trained.
    pub device: String,
}

/// The folder of one run.
#[derive(Debug, Clone)]
pub struct RunFolder {
    path: PathBuf,
}

const SPEC: &str = "run.json";
const RESULT: &str = "result.json";

impl RunFolder {
    /// A folder by its path, which need not be there.
    pub fn at(path: &Path) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn log(&self) -> PathBuf {
        self.path.join("log.csv")
    }

    pub(super) fn checkpoint(&self) -> PathBuf {
        self.path.join("checkpoint.safetensors")
    }

    pub(super) fn weights(&self) -> PathBuf {
        self.path.join("model.safetensors")
    }

    /// Makes the folder if it is not there, for this run and no other, and keeps other processes out of it until the lock
    /// that is returned goes; `None` while another process is at it.
    pub fn claim(&self, spec: &RunSpec) -> Result<Option<File>> {
        let failed = |error: std::io::Error| Error::failed(format!("{}: {error}", self.path.display()));
        fs::create_dir_all(&self.path).map_err(failed)?;
        let lock = File::create(self.path.join("lock")).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        match self.spec()? {
            Some(other) if other != *spec => Err(Error::failed(format!(
                "{}: holds another run; name another folder with --out",
                self.path.display()
            ))),
            Some(_) => Ok(Some(lock)),
            None => {
                self.write(SPEC, spec)?;
                Ok(Some(lock))
            }
        }
    }

    /// What is run here; `None` where nothing is.
    pub fn spec(&self) -> Result<Option<RunSpec>> {
        self.read(SPEC)
    }

    /// What came out; `None` before the end.
    pub fn finished(&self) -> Result<Option<Finished>> {
        self.read(RESULT)
    }

    /// The log so far.
    pub fn rows(&self) -> Result<Vec<Row>> {
        Log::read(&self.log())
    }

    /// Writes down what came out; what is needed to go on is removed.
    pub(super) fn finish(&self, result: &Finished) -> Result<()> {
        self.write(RESULT, result)?;
        // Left behind by a kill in this very place it does no harm: a finished run is not looked at again.
        let _ = fs::remove_file(self.checkpoint());
        Ok(())
    }

    fn write(&self, name: &str, value: &impl Serialize) -> Result<()> {
        let path = self.path.join(name);
        let mut text = serde_json::to_vec_pretty(value).map_err(Error::failed)?;
        text.push(b'\n');
        replace(&path, |partial| {
            fs::write(partial, text).map_err(|error| Error::failed(format!("{}: {error}", path.display())))
        })
    }

    fn read<T: for<'a> Deserialize<'a>>(&self, name: &str) -> Result<Option<T>> {
        let path = self.path.join(name);
        let failed = |error: &dyn std::fmt::Display| Error::failed(format!("{}: {error}", path.display()));
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| failed(&error)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(&error)),
        }
    }
}
