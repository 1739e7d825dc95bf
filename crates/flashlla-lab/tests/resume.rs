//! Runs that are killed and started again end as if they had never stopped.

use flashlla_lab::sweep::Sweep;
use flashlla_lab::train::{Row, RunFolder};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Small enough for a test, with a log, evaluations and both kinds of optimiser.
const SWEEP: &str = "\
mixers = ['lla']
seeds = [3]
[mqar]
vocabulary = 16
pairs = 2
length = 12
[model]
dim = 8
layers = 1
heads = 1
[training]
steps = 60
batch = 4
optimizer = ['adamw', 'muon']
learning-rate = 1e-2
warmup = 5
evaluate-every = 25
evaluate-batches = 2
log-every = 7
";

fn sweep(file: &Path, out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flashlla"));
    command.args(["sweep", file.to_str().unwrap(), "--out", out.to_str().unwrap(), "--threads", "1"]);
    // Every step is saved: a kill may come anywhere.
    command.args(["--checkpoint-every", "0"]).stdout(Stdio::null());
    command
}

/// What must be the same: everything but the seconds.
fn outcome(out: &Path) -> Vec<(String, Vec<Row>, String, Vec<u8>)> {
    let text = fs::read_to_string(out.parent().unwrap().join("sweep.toml")).unwrap();
    let runs = Sweep::parse("sweep.toml", &text).unwrap().runs;
    assert_eq!(runs.len(), 2);
    runs.iter()
        .map(|spec| {
            let folder = RunFolder::at(&out.join("runs").join(spec.name()));
            let mut rows = folder.rows().unwrap();
            rows.iter_mut().for_each(|row| row.seconds = 0.0);
            let steps: Vec<u64> = rows.iter().map(|row| row.step).collect();
            assert_eq!(steps, [7, 14, 21, 25, 28, 35, 42, 49, 50, 56, 60], "no line twice, none missing");
            let finished = folder.finished().unwrap().unwrap();
            let weights = fs::read(folder.path().join("model.safetensors")).unwrap();
            assert!(!folder.path().join("checkpoint.safetensors").exists());
            (spec.name(), rows, format!("{:?} {:?}", finished.status, finished.metrics), weights)
        })
        .collect()
}

#[test]
fn killing_a_sweep_at_random_points_loses_nothing() {
    // More kills by hand: FLASHLLA_KILLS=20.
    let kills: u32 = std::env::var("FLASHLLA_KILLS").map_or(5, |kills| kills.parse().unwrap());
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("sweep.toml");
    fs::write(&file, SWEEP).unwrap();

    let whole = place.path().join("whole");
    let start = Instant::now();
    assert!(sweep(&file, &whole).status().unwrap().success());
    let usual = start.elapsed();
    let expected = outcome(&whole);

    let mut rng = StdRng::seed_from_u64(1);
    let (mut killed, mut round) = (0, 0);
    while killed < kills {
        assert!(round < 4 * kills, "only {killed} of {kills} kills came before the end");
        let out = place.path().join(format!("round{round}"));
        // The same runs are killed several times over.
        for _ in 0..5.min(kills - killed) {
            let mut child = sweep(&file, &out).spawn().unwrap();
            std::thread::sleep(usual.mul_f64(rng.random_range(0.02..0.6)).max(Duration::from_millis(1)));
            if child.try_wait().unwrap().is_some() {
                break;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            killed += 1;
        }
        assert!(sweep(&file, &out).status().unwrap().success());
        assert!(outcome(&out) == expected, "after {killed} kills");
        round += 1;
    }
    println!("{killed} kills in {round} rounds");
}

#[test]
fn finished_runs_are_left_alone_and_shards_make_a_whole() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("sweep.toml");
    fs::write(&file, SWEEP).unwrap();
    let out = place.path().join("out");
    for (part, both) in [("1/2", false), ("2/2", true)] {
        assert!(sweep(&file, &out).args(["--shard", part]).status().unwrap().success());
        assert_eq!(out.join("result.json").exists(), both, "a report when all runs are there");
    }
    let expected = outcome(&out);
    let files = |out: &Path| -> Vec<_> {
        let runs = fs::read_dir(out.join("runs")).unwrap().map(|run| run.unwrap().path().join("result.json"));
        runs.map(|file| fs::metadata(file).unwrap().modified().unwrap()).collect()
    };
    let before = files(&out);
    let start = Instant::now();
    assert!(sweep(&file, &out).status().unwrap().success());
    assert!(start.elapsed() < Duration::from_secs(30));
    assert_eq!(files(&out), before, "nothing is done twice");
    assert!(outcome(&out) == expected);

    // Side by side the same comes out.
    let side = place.path().join("side");
    assert!(sweep(&file, &side).args(["--jobs", "2"]).status().unwrap().success());
    assert!(outcome(&side) == expected);
}
