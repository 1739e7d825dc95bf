//! The folder an experiment writes to: there as a whole or not at all.

use crate::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A folder of results in the making. Files gather in a hidden folder beside the wanted one, which takes its place at the
/// end; a run that fails or is stopped leaves the wanted one as it was.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    gathering: TempDir,
    /// A folder in it that is not a result and stays.
    beside: Option<&'static str>,
}

/// The file that lists the files of a folder of ours, which a later run may replace.
const MARK: &str = "result.json";

/// The files that an earlier run wrote into a folder, none when none did.
fn earlier_files(path: &Path) -> Vec<String> {
    let document = fs::read(path.join(MARK)).ok();
    let document: Option<serde_json::Value> = document.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let files = document.and_then(|mut document| serde_json::from_value(document["files"].take()).ok());
    files.unwrap_or_default()
}

impl Folder {
    /// Checks, before any work is done, that results can be written to `path`: a folder that is not there yet, is empty,
    /// or holds an earlier run's results.
    pub fn prepare(path: &Path) -> Result<Self> {
        Self::prepare_beside(path, None)
    }

    /// The same for results that lie beside a folder of this name, which is made if it is not there, and stays.
    pub fn prepare_beside(path: &Path, beside: Option<&'static str>) -> Result<Self> {
        let refuse = |what: String| Error::failed(format!("--out: {} {what}", path.display()));
        if path.file_name().is_none() {
            return Err(refuse("cannot be used; it must be the name of a folder to make".into()));
        }
        match fs::read_dir(path) {
            Ok(mut entries) => {
                let mut ours = earlier_files(path);
                ours.extend(beside.map(str::to_owned));
                let foreign = |entry: std::io::Result<fs::DirEntry>| {
                    entry.map_or(true, |e| !ours.iter().any(|name| **name == *e.file_name()))
                };
                if entries.any(foreign) {
                    return Err(refuse(
                        "holds files that are not an experiment's results; name another folder".into(),
                    ));
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) if path.exists() => {
                return Err(refuse(format!("cannot be used as a folder ({error}); name another")));
            }
            Err(error) => return Err(refuse(format!("cannot be used: {error}"))),
        }
        let parent = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let unwritable = |error| refuse(format!("cannot be written: {error}"));
        fs::create_dir_all(parent).map_err(unwritable)?;
        let gathering =
            tempfile::Builder::new().prefix(".flashlla-").tempdir_in(parent).map_err(unwritable)?;
        if let Some(beside) = beside {
            fs::create_dir_all(path.join(beside)).map_err(unwritable)?;
        }
        Ok(Self { path: path.into(), gathering, beside })
    }

    /// Adds a file.
    pub fn add(&self, name: &str, bytes: &[u8]) -> Result<()> {
        fs::write(self.gathering.path().join(name), bytes).map_err(|error| self.failed(name, error))
    }

    /// Puts the folder in its place, instead of an earlier run's.
    pub fn finish(self) -> Result<()> {
        if self.beside.is_some() {
            return self.finish_beside();
        }
        #[cfg(unix)]
        {
            // Temporary folders are private; results need not be.
            use std::os::unix::fs::PermissionsExt;
            let open = fs::Permissions::from_mode(0o755);
            fs::set_permissions(self.gathering.path(), open).map_err(|e| self.failed("", e))?;
        }
        if self.path.exists() {
            fs::remove_dir_all(&self.path).map_err(|error| self.failed("", error))?;
        }
        fs::rename(self.gathering.path(), &self.path).map_err(|error| self.failed("", error))?;
        // It has moved: nothing is left to remove.
        let _ = self.gathering.keep();
        Ok(())
    }

    /// Puts the files in their places one by one, the list of them last.
    fn finish_beside(self) -> Result<()> {
        let gathered = fs::read_dir(self.gathering.path()).map_err(|error| self.failed("", error))?;
        let names = gathered.map(|entry| entry.map(|entry| entry.file_name()));
        let mut names: Vec<_> = names.collect::<Result<_, _>>().map_err(|error| self.failed("", error))?;
        names.sort_by_key(|name| name == MARK);
        for name in names {
            let (from, to) = (self.gathering.path().join(&name), self.path.join(&name));
            fs::rename(from, to).map_err(|error| self.failed("", error))?;
        }
        Ok(())
    }

    fn failed(&self, name: &str, error: std::io::Error) -> Error {
        Error::failed(format!("--out: {} cannot be written: {error}", self.path.join(name).display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(path: &Path) -> Vec<String> {
        let entry = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        fs::read_dir(path).unwrap().map(entry).collect()
    }

    #[test]
    fn results_appear_at_the_end_and_replace_earlier_ones() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("a/b");
        for run in 0..2 {
            let folder = Folder::prepare(&out).unwrap();
            let document = format!(r#"{{"run": {run}, "files": ["result.json"]}}"#);
            folder.add(MARK, document.as_bytes()).unwrap();
            assert_eq!(out.exists(), run > 0);
            folder.finish().unwrap();
            assert_eq!(fs::read_to_string(out.join(MARK)).unwrap(), document);
        }
        assert_eq!(names(out.parent().unwrap()), ["b"]);
    }

    #[test]
    fn an_abandoned_run_leaves_no_trace() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::prepare(&place.path().join("out")).unwrap();
        folder.add("x.csv", b"1").unwrap();
        drop(folder);
        assert!(names(place.path()).is_empty());
    }

    #[test]
    fn other_peoples_files_are_left_alone() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("thesis.tex"), "x").unwrap();
        let error = Folder::prepare(place.path()).unwrap_err().to_string();
        assert!(error.contains("--out") && error.contains("name another folder"), "{error}");
        let error = Folder::prepare(&place.path().join("thesis.tex")).unwrap_err().to_string();
        assert!(error.contains("thesis.tex") && !error.contains('\n'), "{error}");
        assert_eq!(names(place.path()), ["thesis.tex"]);
        // Nor are those that somebody put beside our results.
        fs::write(place.path().join(MARK), r#"{"files": ["result.json"]}"#).unwrap();
        assert!(Folder::prepare(place.path()).is_err());
    }
}
