//! How far a batch is, for people: a bar on a terminal, else lines.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use super::outcome::Outcome;

/// Between lines where there is no terminal.
const SILENCE: Duration = Duration::from_secs(10);

/// Counts, and shows.
pub struct Progress {
    tally: Tally,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

/// What is counted.
#[derive(Debug, Clone, PartialEq)]
pub struct Tally {
    /// Lines in all.
    pub n_lines: usize,
    /// Lines that are done.
    pub n_done: usize,
    /// Those of them that failed.
    pub n_failed: usize,
    /// Those of them that an earlier run had done.
    pub n_before: usize,
    /// Tokens of prompts, in this run.
    pub prompt_tokens: u64,
    /// Tokens of answers, in this run.
    pub output_tokens: u64,
    began: Instant,
}

impl Tally {
    /// Of a run that begins now.
    pub fn new(n_lines: usize, n_before: usize, n_failed: usize, now: Instant) -> Self {
        Self { n_lines, n_done: n_before, n_failed, n_before, prompt_tokens: 0, output_tokens: 0, began: now }
    }

    /// A line is done.
    pub fn count(&mut self, outcome: &Outcome) {
        let (prompt, output) = outcome.tokens();
        self.n_done += 1;
        self.n_failed += usize::from(!outcome.is_good());
        self.prompt_tokens += prompt;
        self.output_tokens += output;
    }

    /// Output tokens per second of this run.
    pub fn rate(&self, now: Instant) -> f64 {
        self.output_tokens as f64 / now.duration_since(self.began).as_secs_f64().max(1e-3)
    }

    /// How long the rest takes if it goes on like this; `None` before anything is done.
    pub fn left(&self, now: Instant) -> Option<Duration> {
        let n_new = self.n_done - self.n_before;
        let each = now.duration_since(self.began).as_secs_f64() / n_new as f64;
        let left = each * self.n_lines.saturating_sub(self.n_done) as f64;
        (n_new > 0).then(|| Duration::from_secs_f64(left))
    }

    /// In words.
    pub fn text(&self, now: Instant) -> String {
        let left = self.left(now).map_or_else(String::new, |left| format!(", {} left", hours(left)));
        let (done, all, failed) = (self.n_done, self.n_lines, self.n_failed);
        format!("{done} of {all} lines, {failed} failed, {:.1} tokens/s{left}", self.rate(now))
    }
}

/// A time in whole seconds, as `1:02:03`.
fn hours(time: Duration) -> String {
    let seconds = time.as_secs_f64().ceil() as u64;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

impl Progress {
    /// Shows on standard error.
    pub fn new(tally: Tally) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(tally.n_lines as u64);
            let template = "{bar:30} {pos}/{len} lines, {msg}";
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        let mut progress = Self { last_line: tally.began, tally, bar };
        progress.show();
        progress
    }

    /// A line is done.
    pub fn count(&mut self, outcome: &Outcome) {
        self.tally.count(outcome);
        self.show();
    }

    fn show(&mut self) {
        let now = Instant::now();
        match &self.bar {
            Some(bar) => {
                bar.set_position(self.tally.n_done as u64);
                let left = self.tally.left(now).map_or_else(|| "?".to_owned(), hours);
                let failed = self.tally.n_failed;
                bar.set_message(format!("{failed} failed, {:.1} tokens/s, ETA {left}", self.tally.rate(now)));
            }
            None if now.duration_since(self.last_line) >= SILENCE => {
                self.last_line = now;
                eprintln!("coordinator batch: {}", self.tally.text(now));
            }
            None => {}
        }
    }

    /// Leaves the last state on the screen; what was counted.
    pub fn finish(self) -> Tally {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
        self.tally
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rates_are_of_this_run() {
        let began = Instant::now();
        let mut tally = Tally::new(10, 4, 1, began);
        let now = began + Duration::from_secs(4);
        assert_eq!((tally.left(now), tally.rate(now)), (None, 0.0));
        let body = json!({"usage": {"prompt_tokens": 5, "completion_tokens": 10}});
        let good = Outcome::Answered { status: 200, request_id: String::new(), body };
        tally.count(&good);
        tally.count(&good);
        assert_eq!((tally.rate(now), tally.left(now)), (5.0, Some(Duration::from_secs(8))));
        assert_eq!(tally.text(now), "6 of 10 lines, 1 failed, 5.0 tokens/s, 0:08 left");
        assert_eq!(hours(Duration::from_secs(3723)), "1:02:03");
    }
}
