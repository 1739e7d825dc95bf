//! Progress bars, on a terminal only.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// A bar on stderr for `steps` steps; nothing at all where stderr is not a terminal.
pub fn bar(what: &'static str, steps: usize) -> ProgressBar {
    styled(ProgressBar::new(steps as u64), "{msg:<28} {wide_bar} {pos}/{len} {eta}").with_message(what)
}

/// Bars one below another.
pub fn several() -> MultiProgress {
    MultiProgress::new()
}

/// A bar for a training run that begins at step `from`.
pub fn training(bars: &MultiProgress, what: &str, steps: u64, from: u64) -> ProgressBar {
    let bar = bars.add(ProgressBar::new(steps)).with_position(from).with_prefix(what.to_owned());
    // A run that goes on must not count the steps of the past as made in no time.
    bar.reset_eta();
    styled(bar, "{prefix} {wide_bar} {pos}/{len} {msg} {eta}")
}

/// Moves a bar of [`training`] on by a step of so many tokens.
pub fn trained(bar: &ProgressBar, loss: f64, tokens: usize) {
    bar.inc(1);
    bar.set_message(format!("loss {loss:.4}, {:.0} tokens/s", bar.per_sec() * tokens as f64));
}

fn styled(bar: ProgressBar, template: &str) -> ProgressBar {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}
