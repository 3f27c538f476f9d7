//! How far the ranks are with loading, for people: bars on a terminal, lines in a log.

use std::io::IsTerminal;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// A log line each time a rank has loaded another such part, in percent.
const LOG_EVERY: u64 = 25;

/// Progress of all ranks of one formation.
pub struct LoadProgress {
    ranks: Vec<Rank>,
    bars: Option<MultiProgress>,
}

struct Rank {
    bar: Option<ProgressBar>,
    logged: u64,
}

impl LoadProgress {
    /// For so many ranks.
    pub fn new(world_size: usize) -> Self {
        let bars = std::io::stderr().is_terminal().then(MultiProgress::new);
        Self { ranks: (0..world_size).map(|_| Rank { bar: None, logged: 0 }).collect(), bars }
    }

    /// A rank has loaded `done` of `total` bytes.
    pub fn update(&mut self, rank: usize, done: u64, total: u64) {
        let (Some(state), true) = (self.ranks.get_mut(rank), total > 0) else { return };
        let done = done.min(total);
        match &self.bars {
            Some(bars) => {
                let bar = state.bar.get_or_insert_with(|| {
                    let template = "loading rank {msg} {bar:30} {decimal_bytes}/{decimal_total_bytes}";
                    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
                    bars.add(ProgressBar::new(total).with_style(style).with_message(rank.to_string()))
                });
                bar.set_position(done);
                if done == total {
                    bar.finish_and_clear();
                }
            }
            None => {
                let percent = u64::try_from(u128::from(done) * 100 / u128::from(total)).unwrap_or(100);
                if percent / LOG_EVERY > state.logged {
                    state.logged = percent / LOG_EVERY;
                    tracing::info!(rank, percent, total_bytes = total, "loading");
                }
            }
        }
    }
}

impl Drop for LoadProgress {
    fn drop(&mut self) {
        for rank in &self.ranks {
            if let Some(bar) = &rank.bar {
                bar.finish_and_clear();
            }
        }
    }
}
