//! The program beside `attend`: help, completions, info, bench.

mod common;
use common::program;
use std::process::Output;

fn run(args: &[&str]) -> (Output, String, String) {
    let output = program().args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    (output, stdout, stderr)
}

#[test]
fn help_goes_to_the_standard_output_with_examples() {
    let (output, text, stderr) = run(&["--help"]);
    assert!(output.status.success() && stderr.is_empty());
    for command in ["attend", "experiment", "bench", "info", "completions"] {
        assert!(text.contains(command), "{text}");
    }
    for command in ["attend", "bench"] {
        let (output, text, _) = run(&[command, "--help"]);
        assert!(output.status.success());
        assert!(text.contains(&format!("flashlla {command} ")) && text.contains("Examples:"), "{text}");
        assert!(!text.contains('\u{1b}'));
    }
    let (output, text, _) = run(&["--version"]);
    assert!(output.status.success());
    assert_eq!(text, concat!("flashlla ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn nothing_asked_for_is_wrong_usage_and_shows_the_help() {
    let (output, stdout, stderr) = run(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stdout.is_empty() && stderr.contains("Usage: flashlla"));
}

#[test]
fn wrong_usage_is_one_line_and_code_2() {
    for args in [
        &["atend"][..],
        &["bench", "--shape", "1,2,3"],
        &["completions", "tcsh"],
        &["info", "x"],
        &["attend"],
    ] {
        let (output, stdout, stderr) = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(
            stdout.is_empty() && stderr.starts_with("error: ") && stderr.lines().count() == 1,
            "{stderr}"
        );
        assert!(stderr.contains("--help"), "{stderr}");
    }
}

#[test]
fn completions_know_the_commands() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let (output, text, _) = run(&["completions", shell]);
        assert!(output.status.success());
        assert!(text.contains("attend") && text.contains("cu-seqlens"), "{shell}");
    }
}

#[test]
fn info_names_version_features_and_threads() {
    let (output, text, _) = run(&["info"]);
    assert!(output.status.success());
    for word in [env!("CARGO_PKG_VERSION"), "simd", "features", "threads"] {
        assert!(text.contains(word), "{text}");
    }
    let (_, text, _) = run(&["info", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
    assert!(json["threads"].as_u64().unwrap() >= 1 && json["features"].is_array());
}

#[test]
fn bench_prints_a_line_of_json_per_shape_and_pass() {
    let (output, text, stderr) =
        run(&["bench", "--shape", "1,2,32,8", "--shape", "2,1,17,16", "--repeats", "2", "--threads", "1"]);
    assert!(output.status.success(), "{stderr}");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ops: Vec<_> = lines.iter().map(|line| line["op"].as_str().unwrap()).collect();
    assert_eq!(ops, ["forward", "backward", "forward", "backward"]);
    for line in &lines {
        let number = |key: &str| line[key].as_f64().unwrap_or_else(|| panic!("{key} in {line}"));
        for key in ["seconds", "flop", "matmul_flop_per_second", "efficiency"] {
            assert!(number(key) > 0.0, "{key} in {line}");
        }
        assert!(
            (number("flop_per_second") - number("flop") / number("seconds")).abs()
                < 1e-6 * number("flop_per_second")
        );
        assert_eq!(number("threads"), 1.0);
        assert!(line["iterations_median"].is_u64() && line["iterations_max"].is_u64());
    }
    assert_eq!(lines[2]["head_dim"], 16);
}

#[test]
fn bench_refuses_shapes_that_are_not_four_positive_numbers() {
    for bad in ["", "1,2,3", "1,2,3,4,5", "1,2,3,x", "0,1,1,1", "1,1,1,257", "1,1,-1,4"] {
        let (output, stdout, stderr) = run(&["bench", "--shape", bad]);
        assert_eq!(output.status.code(), Some(2), "{bad}");
        assert!(stdout.is_empty() && stderr.contains("--shape") && stderr.lines().count() == 1, "{stderr}");
    }
}

#[test]
fn bench_of_decoding_prints_a_line_of_json_per_cache() {
    let small =
        ["bench", "--op", "decode", "--context", "40", "--context", "100", "--kv-heads", "2", "--dim", "8"];
    for more in
        [&["--group", "2", "--queries", "3"][..], &["--page-size", "16", "--batch", "2", "--dtype", "bf16"]]
    {
        let (output, text, stderr) = run(&[&small[..], more, &["--repeats", "2", "--threads", "1"]].concat());
        assert!(output.status.success(), "{stderr}");
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.iter().map(|line| line["context"].as_u64().unwrap()).collect::<Vec<_>>(), [40, 100]);
        for line in &lines {
            let number = |key: &str| line[key].as_f64().unwrap_or_else(|| panic!("{key} in {line}"));
            let size = if line["dtype"] == "bf16" { 2.0 } else { 4.0 };
            assert_eq!(number("bytes"), 2.0 * number("batch") * 2.0 * number("context") * 8.0 * size);
            assert!((number("bytes_per_second") * number("seconds") / number("bytes") - 1.0).abs() < 1e-6);
            let share = number("bytes_per_second") / number("yardstick_bytes_per_second");
            assert!(share > 0.0 && (number("share") / share - 1.0).abs() < 1e-6);
        }
    }
}

#[test]
fn options_of_decoding_are_for_decoding() {
    for (args, named) in [
        (&["bench", "--context", "100"][..], "--context"),
        (&["bench", "--op", "forward", "--page-size", "16"], "--page-size"),
        (&["bench", "--op", "decode", "--shape", "1,1,8,8"], "--shape"),
        (&["bench", "--op", "decode", "--page-size", "24"], "--page-size"),
        (&["bench", "--op", "decode", "--queries", "17"], "--queries"),
    ] {
        let (output, stdout, stderr) = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stdout.is_empty() && stderr.contains(named) && stderr.lines().count() == 1, "{stderr}");
    }
}
