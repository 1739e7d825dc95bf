//! Doing the runs of a sweep: those that are finished are skipped, those that were stopped go on.

use super::Sweep;
use crate::options::thread_pool;
use crate::report::progress;
use crate::train::{Pace, RunFolder, RunSpec, train};
use crate::{Error, Result};
use std::path::Path;
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// One part of several: of run number `i`, counted from 0, this part does those with `i % of == part - 1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// From 1.
    pub part: usize,
    /// How many there are.
    pub of: usize,
}

impl Shard {
    /// All of it.
    pub const ALL: Self = Self { part: 1, of: 1 };
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers =
            text.split_once('/').and_then(|(part, of)| Some((part.parse().ok()?, of.parse().ok()?)));
        match numbers {
            Some((part, of)) if (1..=of).contains(&part) => Ok(Self { part, of }),
            _ => Err("must be I/N with I from 1 to N, such as 1/4".into()),
        }
    }
}

/// Does the runs of a part of a sweep in folders under `runs`, so many at a time on so many threads in all; those that another
/// process is at are left to it.
pub fn run(
    sweep: &Sweep,
    shard: Shard,
    runs: &Path,
    (jobs, threads): (usize, usize),
    pace: &Pace,
) -> Result<()> {
    let mine: Vec<&RunSpec> = sweep.runs.iter().skip(shard.part - 1).step_by(shard.of).collect();
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(vec![]));
    let work = |bars: &indicatif::MultiProgress| {
        while let Some(spec) = mine.get(next.fetch_add(1, Ordering::Relaxed)) {
            let name = spec.name();
            let folder = RunFolder::at(&runs.join(&name));
            let done = folder.claim(spec).and_then(|lock| match lock {
                // The lock holds as long as the file is open: until the run has ended.
                Some(_lock) => {
                    train(spec, &folder, &Pace { label: name.clone(), bars: bars.clone(), ..pace.clone() })
                        .map(drop)
                }
                None => Ok(()),
            });
            if let Err(error) = done {
                let mut failures = failures.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                failures.push(format!("{name}: {error}"));
            }
        }
    };
    // Small models are trained faster side by side, a thread each, than one after another on all threads.
    let jobs = jobs.min(mine.len()).max(1);
    let each = u16::try_from((threads / jobs).max(1)).unwrap_or(u16::MAX);
    let pools = (0..jobs).map(|_| thread_pool(Some(each))).collect::<Result<Vec<_>>>()?;
    let bars = progress::several();
    let work = || work(&bars);
    std::thread::scope(|scope| pools.iter().for_each(|pool| drop(scope.spawn(|| pool.install(work)))));
    let failures = failures.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    match &failures[..] {
        [] => Ok(()),
        [only] => Err(Error::failed(only)),
        [first, ..] => Err(Error::failed(format!(
            "{} of {} runs failed; the first: {first}",
            failures.len(),
            mine.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_is_a_part_of_a_whole() {
        assert_eq!("2/3".parse(), Ok(Shard { part: 2, of: 3 }));
        for bad in ["0/3", "4/3", "1", "1/0", "a/b", "1/2/3", ""] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }
}
