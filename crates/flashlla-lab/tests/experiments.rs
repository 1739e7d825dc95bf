//! Every experiment, small, through the command line: the files it promises, the JSON document, and what it is there to show.

use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;

fn flashlla(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flashlla"));
    command.arg("experiment").args(args);
    command
}

/// Runs an experiment into `out` and returns its document, having checked what all documents and folders have in common.
fn run(name: &str, out: &Path, more: &[&str]) -> Value {
    let mut args = vec![name, "--quick", "--json", "--out", out.to_str().unwrap()];
    args.extend(more);
    let output = flashlla(&args).output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    assert_eq!(errors, "", "nothing but results when no terminal listens");
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["experiment"], name);
    assert!(document["seconds"].as_f64().unwrap() > 0.0);
    for part in ["version", "settings", "results", "findings", "files", "out"] {
        assert!(!document[part].is_null(), "{part}");
    }

    let mut promised: Vec<&str> =
        document["files"].as_array().unwrap().iter().map(|f| f.as_str().unwrap()).collect();
    let entries = fs::read_dir(out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut written: Vec<String> = entries.collect();
    promised.sort_unstable();
    written.sort_unstable();
    assert_eq!(promised, written);
    for file in written {
        let bytes = fs::read(out.join(&file)).unwrap();
        match file.rsplit_once('.').unwrap().1 {
            "png" => {
                assert_eq!(bytes[..8], *b"\x89PNG\r\n\x1a\n");
                // A drawing of many colours compresses to more than an empty page.
                assert!(bytes.len() > 10_000, "{file}: {} bytes", bytes.len());
            }
            "svg" => {
                let text = String::from_utf8(bytes).unwrap();
                assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"), "{file}");
                assert!(text.contains("LLA") && !text.contains("NaN"), "{file}");
            }
            "csv" => {
                let text = String::from_utf8(bytes).unwrap();
                let columns = text.lines().next().unwrap().split(',').count();
                assert!(columns > 3 && text.lines().count() > 3 && !text.contains("NaN"), "{file}");
            }
            _ => {
                let stored: Value = serde_json::from_slice(&bytes).unwrap();
                assert_eq!(stored["results"], document["results"]);
            }
        }
    }
    document
}

#[test]
fn held_out_recall_finds_lla_lowest_in_every_shipped_head() {
    let place = tempfile::tempdir().unwrap();
    let document = run("held-out-recall", &place.path().join("out"), &["--seeds", "3"]);
    let heads = document["results"]["heads"].as_array().unwrap();
    assert_eq!(heads.len(), 8);
    for head in heads {
        let mean = |name: &str| head["predictors"][name]["unexplained"]["mean"].as_f64().unwrap();
        let (softmax, ridge, lla) = (mean("softmax"), mean("ridge"), mean("lla"));
        assert!(lla < softmax && lla < ridge, "{head}");
        assert!((0.1..1.0).contains(&lla) && softmax < 1.1 && ridge < 1.1, "{head}");
        assert_eq!(head["predictors"]["lla"]["unexplained"]["count"], 6);
    }
}

#[test]
fn rates_fall_in_the_order_of_the_theory() {
    let place = tempfile::tempdir().unwrap();
    let document = run("rates", &place.path().join("out"), &["--dims", "1"]);
    let curves = document["results"]["curves"].as_array().unwrap();
    let slope = |i: usize| curves[i]["slope"]["mean"].as_f64().unwrap();
    let last = |i: usize| curves[i]["mse"].as_array().unwrap().last().unwrap()["mean"].as_f64().unwrap();
    // Global linear hardly improves; softmax does at about −3/4, LLA at about −4/5.
    assert!(slope(0).abs() < 0.1, "{}", slope(0));
    assert!((slope(1) + 0.75).abs() < 0.2, "{}", slope(1));
    assert!((slope(2) + 0.8).abs() < 0.2, "{}", slope(2));
    assert!(last(2) < last(1) && last(1) < last(0));
}

#[test]
fn on_a_changing_stream_lla_is_best_and_mesanet_degrades() {
    let place = tempfile::tempdir().unwrap();
    let document = run("test-time-regression", &place.path().join("out"), &[]);
    let settings = document["results"]["settings"].as_array().unwrap();
    assert_eq!(settings.len(), 6);
    for setting in settings {
        let mean = |name: &str| setting["mixers"][name]["mse"]["mean"].as_f64().unwrap();
        for other in ["softmax", "linear", "mesanet"] {
            assert!(mean("lla") < mean(other), "{other}: {setting}");
        }
        // MesaNet does best where there has been one map only.
        let segments = setting["mixers"]["mesanet"]["by_segment"].as_array().unwrap();
        let segments: Vec<f64> = segments.iter().map(|s| s.as_f64().unwrap()).collect();
        assert!(segments[1..].iter().all(|later| *later > segments[0]), "{segments:?}");
    }
}

#[test]
fn the_same_seeds_give_the_same_numbers_on_any_number_of_threads() {
    let place = tempfile::tempdir().unwrap();
    for (name, more) in [("held-out-recall", "--max-tokens=64"), ("rates", "--dims=2")] {
        let results = ["1", "3"].map(|threads| {
            let out = place.path().join(format!("{name}{threads}"));
            run(name, &out, &["--seeds", "2", "--threads", threads, more]);
            fs::read(out.join("result.json")).unwrap()
        });
        assert!(results[0] == results[1], "{name}");
        let out = place.path().join("other");
        let other = run(name, &out, &["--seeds", "2", "--seed", "5", more]);
        let first: Value = serde_json::from_slice(&results[0]).unwrap();
        assert_ne!(first["results"], other["results"], "{name}");
    }
}

#[test]
fn what_cannot_be_done_is_said_in_one_line_and_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let here = |name: &str| place.path().join(name).to_str().unwrap().to_owned();
    fs::write(here("text"), "not tensors").unwrap();
    fs::create_dir(here("taken")).unwrap();
    fs::write(here("taken/thesis.tex"), "x").unwrap();
    for (args, code, expected) in [
        (vec!["held-out-recall", "--input", &here("text"), "--out", &here("a")], 1, "text"),
        (vec!["held-out-recall", "--input", &here("none"), "--out", &here("a")], 1, "none"),
        (vec!["rates", "--out", &here("taken")], 1, "name another folder"),
        (vec!["rates", "--out", &here("text")], 1, "--out"),
        (vec!["rates", "--seeds", "0"], 2, "--seeds"),
        (vec!["rates", "--dims", "9"], 2, "--dims"),
        (vec!["held-out-recall", "--threads", "0"], 2, "--threads"),
    ] {
        let output = flashlla(&args).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
        assert!(errors.starts_with("error: ") && errors.contains(expected), "{args:?}: {errors}");
        assert!(code == 2 || errors.lines().count() == 1, "{errors}");
        assert!(output.stdout.is_empty());
    }
    let mut left: Vec<_> = fs::read_dir(place.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort_unstable();
    assert_eq!(left, ["taken", "text"]);
}
