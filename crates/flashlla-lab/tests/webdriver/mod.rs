//! As much of the WebDriver protocol as a test of one page needs, spoken to chromedriver.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A headless browser with one page, closed when dropped.
pub struct Browser {
    driver: Child,
    session: String,
    agent: ureq::Agent,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts Chromium through chromedriver; `None`, with a word on why, where there is no chromedriver, unless
    /// FLASHLLA_REQUIRE_BROWSER=1 makes that an error.
    pub fn start() -> Option<Self> {
        let required = std::env::var("FLASHLLA_REQUIRE_BROWSER").is_ok_and(|value| value == "1");
        let started =
            Command::new("chromedriver").arg("--port=0").stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let mut driver = match started {
            Ok(driver) => driver,
            Err(error) if required => panic!("chromedriver: {error}"),
            Err(error) => {
                println!(
                    "skipped: no chromedriver on this machine ({error}); install chromium and chromium-driver"
                );
                return None;
            }
        };
        // "ChromeDriver was started successfully on port 37405."
        let lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port = lines.map_while(Result::ok).find_map(|line| {
            let port = line.split_once("successfully on port ")?.1;
            port.trim_end_matches('.').parse::<u16>().ok()
        });
        let port = port.expect("chromedriver says its port");
        let profile = tempfile::tempdir().unwrap();
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        let mut browser = Self { driver, session: String::new(), agent: config.into(), _profile: profile };
        let root = format!("http://127.0.0.1:{port}/session");
        let arguments = [
            "--headless".to_owned(),
            "--no-sandbox".into(),
            "--disable-gpu".into(),
            "--no-first-run".into(),
            "--disable-background-networking".into(),
            "--disable-component-update".into(),
            "--disable-sync".into(),
            format!("--user-data-dir={}", browser._profile.path().display()),
        ];
        let wanted = json!({"browserName": "chrome", "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"}});
        let answer = browser.post(&root, json!({"capabilities": {"alwaysMatch": wanted}}));
        browser.session = format!("{root}/{}", answer["sessionId"].as_str().unwrap());
        Some(browser)
    }

    fn post(&self, url: &str, body: Value) -> Value {
        let mut answer = self.agent.post(url).send_json(body).unwrap();
        let mut answer: Value = answer.body_mut().read_json().unwrap();
        let value = answer["value"].take();
        assert!(value["error"].is_null(), "{url}: {value}");
        value
    }

    fn command(&self, name: &str, body: Value) -> Value {
        self.post(&format!("{}/{name}", self.session), body)
    }

    /// The size of the page as a phone of this many pixels has it.
    pub fn size(&mut self, width: u32, height: u32) {
        let parameters = json!({"width": width, "height": height, "deviceScaleFactor": 2, "mobile": true});
        let command = json!({"cmd": "Emulation.setDeviceMetricsOverride", "params": parameters});
        self.command("goog/cdp/execute", command);
    }

    /// Opens a file.
    pub fn open(&mut self, page: &Path) {
        self.command("url", json!({"url": format!("file://{}", page.display())}));
    }

    /// Runs a script and returns what it does.
    pub fn run(&mut self, script: &str) -> Value {
        self.run_with(script, json!([]))
    }

    /// The same with arguments.
    pub fn run_with(&mut self, script: &str, arguments: Value) -> Value {
        self.command("execute/sync", json!({"script": script, "args": arguments}))
    }

    /// Clicks on the first element that a selector finds, as a finger would: it must be in view and not covered.
    pub fn click(&mut self, selector: &str) {
        let found = self.command("element", json!({"using": "css selector", "value": selector}));
        let id = found.as_object().unwrap().values().next().unwrap().as_str().unwrap().to_owned();
        self.command(&format!("element/{id}/click"), json!({}));
    }

    /// What the browser has complained of: errors of scripts, refused requests.
    pub fn complaints(&mut self) -> Value {
        self.command("se/log", json!({"type": "browser"}))
    }

    /// Writes what is seen to a PNG file.
    pub fn screenshot(&mut self, path: &Path) {
        let shot = self.command(
            "goog/cdp/execute",
            json!({"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": true}}),
        );
        // The standard alphabet, four letters for three bytes.
        let letters = shot["data"].as_str().unwrap().bytes().filter_map(|letter| {
            Some(match letter {
                b'A'..=b'Z' => letter - b'A',
                b'a'..=b'z' => letter - b'a' + 26,
                b'0'..=b'9' => letter - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            })
        });
        let letters: Vec<u8> = letters.collect();
        let bytes = letters.chunks(4).flat_map(|part| {
            let word = part.iter().fold(0u32, |word, letter| word << 6 | u32::from(*letter))
                << (6 * (4 - part.len()));
            word.to_be_bytes()[1..part.len()].to_vec()
        });
        std::fs::write(path, bytes.collect::<Vec<u8>>()).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            let _ = self.agent.delete(&self.session).call();
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
