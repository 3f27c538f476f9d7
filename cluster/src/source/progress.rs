//! How far a download is, for people.

use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// Told about downloads as they go.
pub trait Progress: Sync {
    /// A download begins. `total_bytes` if the source says so.
    fn start(&self, what: &str, total_bytes: Option<u64>);
    /// So much of it is here, from its beginning. May go back, when a server does not resume.
    fn at(&self, done_bytes: u64);
    /// It is complete, or was given up.
    fn finish(&self);
}

/// Says nothing.
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _: &str, _: Option<u64>) {}
    fn at(&self, _: u64) {}
    fn finish(&self) {}
}

/// A bar on standard error if that is a terminal, else lines in the log.
pub fn progress_for_stderr() -> Box<dyn Progress> {
    if std::io::stderr().is_terminal() { Box::new(TerminalBar::default()) } else { Box::new(LogLines::default()) }
}

/// A bar with bytes, rate and remaining time, on standard error.
#[derive(Default)]
pub struct TerminalBar {
    bar: Mutex<Option<ProgressBar>>,
}

impl Progress for TerminalBar {
    fn start(&self, what: &str, total_bytes: Option<u64>) {
        let (bar, template) = match total_bytes {
            Some(total) => (
                ProgressBar::new(total),
                "{msg} {bar:30} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} ETA {eta}",
            ),
            None => (ProgressBar::no_length(), "{msg} {spinner} {decimal_bytes} {decimal_bytes_per_sec}"),
        };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style);
        bar.set_message(what.to_owned());
        if let Ok(mut slot) = self.bar.lock() {
            *slot = Some(bar);
        }
    }

    fn at(&self, done_bytes: u64) {
        if let Ok(slot) = self.bar.lock()
            && let Some(bar) = slot.as_ref()
        {
            bar.set_position(done_bytes);
        }
    }

    fn finish(&self) {
        if let Ok(mut slot) = self.bar.lock()
            && let Some(bar) = slot.take()
        {
            bar.abandon();
        }
    }
}

/// A line in the log for each tenth, and every few seconds.
#[derive(Default)]
pub struct LogLines {
    state: Mutex<Option<Line>>,
}

struct Line {
    what: String,
    total_bytes: Option<u64>,
    began: Instant,
    /// Bytes that were there already.
    first_bytes: Option<u64>,
    last: Instant,
    last_tenth: u64,
}

/// No line sooner than this after another, unless a tenth is complete; always one after this.
const SILENCE: Duration = Duration::from_secs(5);

impl Progress for LogLines {
    fn start(&self, what: &str, total_bytes: Option<u64>) {
        let size = total_bytes.map_or_else(|| "of unknown size".to_owned(), |total| HumanBytes(total).to_string());
        tracing::info!("fetching {what}, {size}");
        let now = Instant::now();
        let line = Line { what: what.to_owned(), total_bytes, began: now, first_bytes: None, last: now, last_tenth: 0 };
        if let Ok(mut state) = self.state.lock() {
            *state = Some(line);
        }
    }

    fn at(&self, done_bytes: u64) {
        let Ok(mut state) = self.state.lock() else { return };
        let Some(line) = state.as_mut() else { return };
        let first_bytes = *line.first_bytes.get_or_insert(done_bytes);
        let tenth =
            line.total_bytes.filter(|&total| total > 0).map_or(0, |total| done_bytes.saturating_mul(10) / total);
        if tenth == line.last_tenth && line.last.elapsed() < SILENCE {
            return;
        }
        (line.last, line.last_tenth) = (Instant::now(), tenth);
        let seconds = line.began.elapsed().as_secs_f64().max(1e-3);
        let rate = done_bytes.saturating_sub(first_bytes) as f64 / seconds;
        let percent = line.total_bytes.filter(|&total| total > 0).map_or_else(String::new, |total| {
            let left = total.saturating_sub(done_bytes) as f64 / rate.max(1.0);
            format!(" ({} %, {left:.0} s left)", done_bytes.saturating_mul(100) / total)
        });
        tracing::info!("fetching {}: {}{percent}, {}/s", line.what, HumanBytes(done_bytes), HumanBytes(rate as u64));
    }

    fn finish(&self) {
        if let Ok(mut state) = self.state.lock() {
            *state = None;
        }
    }
}
