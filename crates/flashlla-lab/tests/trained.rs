//! The trained experiments through the command line, smaller than `--quick`.

use flashlla_lab::train::{RunFolder, Status};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn flashlla(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_flashlla")).args(args).output().unwrap()
}

fn refused(args: &[&str], code: i32) -> String {
    let output = flashlla(args);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
    assert!(output.stdout.is_empty() && errors.lines().count() == 1, "{errors}");
    errors
}

#[test]
fn every_trained_experiment_runs_and_writes_what_it_promises() {
    let place = tempfile::tempdir().unwrap();
    for (name, mixers, score) in [
        ("in-context-regression", "lla,softmax", "mse"),
        ("mqar", "lla,linear", "accuracy"),
        ("state-tracking", "lla,softmax", "accuracy"),
        ("language-model", "lla,parallax", "bits"),
    ] {
        let out = place.path().join(name);
        let args = [
            "experiment",
            name,
            "--quick",
            "--steps",
            "2",
            "--seeds",
            "1",
            "--mixers",
            mixers,
            "--json",
            "--out",
        ];
        let output = flashlla(&[&args[..], &[out.to_str().unwrap()]].concat());
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty(), "nothing but results when no terminal listens");
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(document["experiment"], name);
        assert_eq!(document["results"]["score"], score);
        for row in document["results"]["rows"].as_array().unwrap() {
            for mixer in mixers.split(',') {
                let score = &row["mixers"][mixer]["score"];
                assert!(score["mean"].as_f64().unwrap().is_finite() && score["count"] == 1, "{name}: {row}");
            }
        }
        let mut promised: Vec<&str> =
            document["files"].as_array().unwrap().iter().map(|file| file.as_str().unwrap()).collect();
        promised.push("runs");
        promised.sort_unstable();
        let mut there: Vec<String> =
            fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        there.sort_unstable();
        assert_eq!(promised, there);
    }
}

#[test]
fn a_models_loss_falls() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("s.toml");
    let text = "mixers = ['lla', 'softmax']\nseeds = [0]\n[mqar]\nvocabulary = 8\npairs = 1\nlength = 6\n[model]\ndim = 16\nlayers = 1\nheads = 1\n[training]\nsteps = 60\nbatch = 16\nwarmup = 5\nlearning-rate = 1e-2\nlog-every = 1\nevaluate-batches = 1\n";
    fs::write(&file, text).unwrap();
    for (optimizer, precision) in [("adamw", "f32"), ("muon", "bf16")] {
        let text = format!("{text}optimizer = '{optimizer}'\nprecision = '{precision}'\n");
        fs::write(&file, text).unwrap();
        let out = place.path().join(optimizer);
        let output = flashlla(&["sweep", file.to_str().unwrap(), "--out", out.to_str().unwrap()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        for run in fs::read_dir(out.join("runs")).unwrap() {
            let rows = flashlla_lab::train::RunFolder::at(&run.unwrap().path()).rows().unwrap();
            let mean = |rows: &[flashlla_lab::train::Row]| {
                rows.iter().map(|row| row.loss).sum::<f64>() / rows.len() as f64
            };
            let (first, last) = (mean(&rows[..5]), mean(&rows[rows.len() - 5..]));
            assert!(last < 0.8 * first, "{optimizer}: from {first} to {last}");
        }
    }
}

#[test]
fn what_cannot_be_done_is_said_in_one_line() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_str().unwrap().to_owned();
    fs::write(place.path().join("wrong.toml"), "[mqar]\npairs = 4\nlenth = 32\n").unwrap();
    let message = refused(&["sweep", &path("wrong.toml"), "--out", &path("out")], 1);
    assert!(message.contains("wrong.toml:3: mqar.lenth: ") && message.contains("`length`"), "{message}");
    let message = refused(&["sweep", &path("none.toml"), "--out", &path("out")], 1);
    assert!(message.contains("none.toml"), "{message}");
    for (args, expected) in [
        (&["--shard", "5/4"][..], "--shard"),
        (&["--mixers", "lla,sofmax"], "one of softmax, lla"),
        (&["--steps", "0"], "--steps"),
        (&["--jobs", "0"], "--jobs"),
    ] {
        let message = refused(&[&["experiment", "mqar", "--out", &path("out")], args].concat(), 2);
        assert!(message.contains(expected), "{message}");
    }
    let message =
        refused(&["experiment", "language-model", "--text", &path("none.txt"), "--out", &path("text")], 1);
    assert!(message.contains("none.txt"), "{message}");
    assert!(!Path::new(&path("out")).exists());
    #[cfg(not(feature = "train-cuda"))]
    {
        let message = refused(&["experiment", "mqar", "--device", "cuda", "--out", &path("cuda")], 2);
        assert!(message.contains("--device cuda") && message.contains("train-cuda"), "{message}");
    }
}

#[test]
fn a_printed_configuration_is_a_sweep() {
    for quick in [&[][..], &["--quick"]] {
        let output = flashlla(&[&["experiment", "state-tracking", "--print-config"], quick].concat());
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        flashlla_lab::sweep::Sweep::parse("printed", &text).unwrap();
    }
}

#[test]
fn the_cost_experiment_measures_all_it_names() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("cost");
    let args = ["experiment", "cost", "--quick", "--tokens", "16,32", "--seeds", "1", "--json", "--out"];
    let output = flashlla(&[&args[..], &[out.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let costs = document["results"]["costs"].as_array().unwrap();
    // For each length four layers and two operators with two passes each, and four steps of generation.
    assert_eq!(costs.len(), 2 * (8 + 4 + 4));
    assert!(costs.iter().all(|cost| cost["seconds"].as_f64().unwrap() > 0.0));
    for curve in document["results"]["iterations"].as_array().unwrap() {
        let errors: Vec<f64> = curve["points"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p["error"]["mean"].as_f64().unwrap())
            .collect();
        assert!(errors.iter().all(|e| e.is_finite()) && errors[8] < errors[0], "{errors:?}");
        if curve["ridge"] == 10.0 && curve["keys"] == "Gaussian" {
            assert!(errors[8] < 1e-4, "{errors:?}");
        }
    }
}

#[test]
fn a_run_that_diverges_ends_with_the_weights_that_it_had() {
    let place = tempfile::tempdir().unwrap();
    let run = |steps: u64, log_every: u64, optimizer: &str| {
        let text = format!(
            "mixers = ['softmax']\nseeds = [1]\n[mqar]\nvocabulary = 16\npairs = 2\nlength = 12\n[model]\ndim = 8\n\
             layers = 1\nheads = 1\n[training]\nsteps = {steps}\nbatch = 4\noptimizer = '{optimizer}'\nclip = 1e9\n\
             learning-rate = 30.0\nwarmup = 0\nfinal-rate = 1.0\nevaluate-every = {steps}\nlog-every = {log_every}\n"
        );
        let out = place.path().join(format!("{optimizer}-{steps}-{log_every}"));
        let file = out.with_extension("toml");
        fs::write(&file, &text).unwrap();
        flashlla(&["sweep", file.to_str().unwrap(), "--out", out.to_str().unwrap(), "--threads", "1"]);
        let spec = flashlla_lab::sweep::Sweep::parse("sweep.toml", &text).unwrap().runs.remove(0);
        let folder = RunFolder::at(&out.join("runs").join(spec.name()));
        let weights = fs::read(folder.path().join("model.safetensors")).unwrap();
        (folder.finished().unwrap().unwrap(), weights)
    };
    for optimizer in ["adamw", "muon"] {
        let (often, weights) = run(60, 1, optimizer);
        println!("{optimizer}: after {} steps", often.steps);
        assert!(often.status == Status::Diverged && (1..60).contains(&often.steps));
        // When numbers are read decides nothing.
        let (seldom, same) = run(60, 50, optimizer);
        assert!(seldom.status == Status::Diverged && seldom.steps == often.steps && same == weights);
        // Nor does the step that failed leave anything.
        let (before, same) = run(often.steps, 50, optimizer);
        assert!(before.status == Status::Finished && same == weights);
    }
}
