//! `flashlla report`: what it gathers, and its page in a real browser.

mod common;
mod webdriver;

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use webdriver::Browser;

const SWEEP: &str = "\
mixers = ['softmax', 'linear', 'lla']
seeds = [0, 1]
[state-tracking]
objects = 3
swaps = [2, 3]
[model]
dim = 8
layers = 1
heads = 1
mlp = 0
[training]
steps = 4
batch = 2
warmup = 1
evaluate-every = 2
evaluate-batches = 1
";

fn flashlla(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_flashlla")).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A page of a sweep that two folders share, and of an experiment that trains nothing.
fn report(place: &Path) -> PathBuf {
    let path = |name: &str| place.join(name).to_str().unwrap().to_owned();
    fs::write(place.join("sweep.toml"), SWEEP).unwrap();
    for part in ["1/2", "2/2"] {
        let out = path(&format!("results/part{}", &part[..1]));
        flashlla(&["sweep", &path("sweep.toml"), "--out", &out, "--shard", part]);
    }
    flashlla(&[
        "experiment",
        "rates",
        "--quick",
        "--dims",
        "1",
        "--seeds",
        "2",
        "--out",
        &path("results/rates"),
    ]);
    let shown = flashlla(&["report", &path("results"), "--out", &path("page"), "--title", "A <title>"]);
    assert_eq!(shown.trim(), path("page/index.html"));
    place.join("page/index.html")
}

#[test]
fn a_report_gathers_what_lies_in_several_folders() {
    let place = tempfile::tempdir().unwrap();
    let page = report(place.path());
    let folder = page.parent().unwrap();
    let scores = fs::read_to_string(folder.join("state-tracking-scores.csv")).unwrap();
    let lines: Vec<&str> = scores.lines().collect();
    assert_eq!(lines[0], "swaps,softmax,softmax_spread,linear,linear_spread,lla,lla_spread");
    assert_eq!(lines.len(), 3, "one line for each number of swaps: {scores}");
    let runs = fs::read_to_string(folder.join("state-tracking-runs.csv")).unwrap();
    assert_eq!(runs.lines().count(), 1 + 3 * 2 * 2);
    for name in ["state-tracking-scores.svg", "state-tracking-curves.png", "rates-slopes.csv"] {
        let listed: Value = serde_json::from_slice(&fs::read(folder.join("result.json")).unwrap()).unwrap();
        let there = listed["files"].as_array().unwrap().iter().any(|file| file == name);
        assert!(there == folder.join(name).exists(), "{name}");
    }
    let text = fs::read_to_string(&page).unwrap();
    assert!(
        text.contains("<h2>state-tracking</h2>")
            && text.contains("<h2>rates</h2>")
            && text.contains("A &lt;title&gt;")
    );

    // Made again over itself, and not over what is somebody else's.
    let out = |folder: &str| {
        let (from, to) = (place.path().join("results"), place.path().join(folder));
        let mut command = Command::new(env!("CARGO_BIN_EXE_flashlla"));
        command.args(["report", from.to_str().unwrap(), "--out", to.to_str().unwrap()]).output().unwrap()
    };
    assert!(out("page").status.success());
    assert!(!out("results").status.success());
    let empty = place.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let refused = Command::new(env!("CARGO_BIN_EXE_flashlla")).arg("report").arg(&empty).output().unwrap();
    let message = String::from_utf8(refused.stderr).unwrap();
    assert!(message.contains("holds no results") && message.lines().count() == 1, "{message}");
}

#[test]
fn the_page_works_in_a_browser_on_a_phone() {
    let Some(mut browser) = Browser::start() else { return };
    let place = tempfile::tempdir().unwrap();
    let page = report(place.path());
    browser.size(390, 844);
    browser.open(&page);

    // Nothing was fetched, nothing went wrong, nothing is wider than the screen.
    assert_eq!(browser.run("return performance.getEntriesByType('resource').map(e => e.name)"), json!([]));
    let widths = browser.run("return [document.documentElement.scrollWidth, window.innerWidth]");
    assert_eq!(widths[0], widths[1], "the page scrolls sideways");
    assert_eq!(browser.run("return document.title"), "A <title>");

    // A figure's letters are large enough to read: their size in the drawing by the drawing's size on the screen.
    let small = browser.run(
        "const svg = document.querySelector('figure svg');
         const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
         return Math.min(...[...svg.querySelectorAll('text')].map(t => Number(t.getAttribute('font-size')) * scale))",
    );
    assert!(small.as_f64().unwrap() >= 9.0, "letters of {small} pixels");

    // A button of the legend hides its curves in every panel of its figure, and shows them again.
    let shown =
        "const [name] = arguments; return [...document.querySelector('figure').querySelectorAll('.layer')]
        .filter(l => l.dataset.series === name).map(l => l.getBoundingClientRect().width > 0)";
    let all = browser.run_with(shown, json!(["LLA"]));
    assert!(
        !all.as_array().unwrap().is_empty() && all.as_array().unwrap().iter().all(|s| s == true),
        "{all}"
    );
    browser.click("figure .legend button[data-series='LLA']");
    let (lla, other) = (browser.run_with(shown, json!(["LLA"])), browser.run_with(shown, json!(["softmax"])));
    assert!(lla.as_array().unwrap().iter().all(|s| s == false), "{lla}");
    assert!(other.as_array().unwrap().iter().all(|s| s == true), "{other}");
    browser.click("figure .legend button[data-series='LLA']");
    assert_eq!(browser.run_with(shown, json!(["LLA"])), all);

    // A column's button sorts by its numbers, upwards and downwards, and says so.
    let column =
        "return [...document.querySelector('table').tBodies[0].rows].map(r => r.cells[0].textContent)";
    let button = "table th:first-child button";
    browser.click(button);
    assert_eq!(browser.run(column), json!(["2", "3"]));
    browser.click(button);
    assert_eq!(browser.run(column), json!(["3", "2"]));
    assert_eq!(
        browser.run("return document.querySelector('table th').getAttribute('aria-sort')"),
        "descending"
    );

    // Long tables unfold, and their numbers sort as numbers.
    browser.click("section details summary");
    let seconds = "const t = document.querySelector('details table');
        const c = [...t.querySelectorAll('th')].findIndex(h => h.textContent === 'seconds');
        t.querySelectorAll('th button')[c].click();
        return [...t.tBodies[0].rows].map(r => Number(r.cells[c].dataset.value))";
    let seconds = browser.run(seconds);
    let seconds: Vec<f64> = seconds.as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
    assert!(seconds.len() == 12 && seconds.is_sorted(), "{seconds:?}");
    assert_eq!(browser.complaints(), json!([]));
    if let Some(path) = std::env::var_os("FLASHLLA_SCREENSHOT") {
        browser.screenshot(Path::new(&path));
    }
}
