//! Decisions of the scheduler, as functions of numbers.
//!
//! First come, first served, among equal priorities. A sequence gets blocks for all its known tokens when it is admitted
//! and one more whenever its output crosses a block's end; if there is none then, the last in turn gives its blocks up and
//! is computed again later. The first in turn can therefore always go on, and among equals nothing waits for ever.

use std::time::Duration;

/// Steps that may be on the way at once: one computes, the next is there when it ends.
pub const MAX_IN_FLIGHT: usize = 2;

/// Positions that a request's choice fills at most. The last token is never an input, so it has none.
pub fn worst_case_positions(prompt_len: usize, max_tokens: usize) -> usize {
    prompt_len + max_tokens.saturating_sub(1)
}

/// Most output tokens: what was asked for, within the model's context.
pub fn max_output(prompt_len: usize, max_tokens: u32, max_model_len: usize) -> usize {
    (max_tokens as usize).min(max_model_len.saturating_sub(prompt_len))
}

/// Tokens that a sequence can generate alone in a cache of so many positions: the last one's row is never computed.
pub fn most_output(prompt_len: usize, n_positions: usize) -> usize {
    (n_positions + 1).saturating_sub(prompt_len)
}

/// Blocks to leave for the sequences that run when another is admitted: without some, the newcomer would be the first to
/// be preempted, again and again. None if nothing runs: then the oldest gets all there is.
pub fn spare_blocks(n_blocks: usize, n_running: usize) -> usize {
    if n_running == 0 { 0 } else { (n_blocks / 100).max(1) }
}

/// How long a step may take that others' next tokens come with, as far as it is known how long rows take: who reads along
/// should not see an answer stop.
const STEP_TARGET: Duration = Duration::from_millis(80);
/// Rows that a step may have in any case: with fewer, prompts would cost more steps than rows.
const LEAST_ROWS: usize = 64;
/// A step of fewer rows says nothing of how long a row takes: reading the weights takes most of its time.
const TELLING_ROWS: usize = 32;

/// How long rows of large steps take.
#[derive(Debug, Clone, Copy, Default)]
pub struct RowTime {
    micros: Option<f64>,
}

impl RowTime {
    /// A step of so many rows took this long.
    pub fn record(&mut self, n_rows: usize, took: Duration) {
        if n_rows >= TELLING_ROWS && !took.is_zero() {
            let new = took.as_secs_f64() * 1e6 / n_rows as f64;
            self.micros = Some(self.micros.map_or(new, |old| old * 0.75 + new * 0.25));
        }
    }

    /// Most rows of a step that somebody's next token comes with: a long prompt must not stop those who are being answered.
    pub fn rows_beside_tokens(&self, max_step_rows: usize) -> usize {
        let fits = self.micros.map_or(f64::INFINITY, |micros| STEP_TARGET.as_secs_f64() * 1e6 / micros);
        max_step_rows.min((fits as usize).max(LEAST_ROWS))
    }
}

/// Rows to hold back for positions that were lost with a group, of so many that are left when everybody who lacks one row
/// has it. Clients are in the middle of reading those answers, so they get most; whoever is new gets the rest, so that
/// nobody's first token waits until all is computed again.
pub fn replay_rows(n_rows: usize) -> usize {
    n_rows - n_rows / 4
}

/// Rows of a step in which so many, of answers that stand still, are what [`replay_rows`] holds back: others may have a quarter, but
/// must not make it longer than that.
pub fn rows_around_replays(n_rows: usize) -> usize {
    n_rows + n_rows / 3
}

/// Missing positions come first if they are one per sequence: clients wait for those tokens.
pub fn is_decode(n_missing: usize) -> bool {
    n_missing == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_token_needs_no_position() {
        assert_eq!(worst_case_positions(5, 1), 5);
        assert_eq!(worst_case_positions(5, 4), 8);
        assert_eq!(worst_case_positions(5, 0), 5);
    }

    #[test]
    fn output_ends_with_the_context() {
        assert_eq!(max_output(10, 5, 100), 5);
        assert_eq!(max_output(98, 5, 100), 2);
        assert_eq!(max_output(100, 5, 100), 0);
    }

    #[test]
    fn long_prompts_are_cut_by_time_where_others_wait_for_tokens() {
        let mut time = RowTime::default();
        assert_eq!(time.rows_beside_tokens(2048), 2048, "nothing is known");
        time.record(1, Duration::from_secs(9));
        assert_eq!(time.rows_beside_tokens(2048), 2048, "a small step says nothing");
        time.record(2048, Duration::from_millis(2048));
        assert_eq!(time.rows_beside_tokens(2048), 80);
        assert_eq!(time.rows_beside_tokens(70), 70);
        (0..50).for_each(|_| time.record(64, Duration::from_secs(10)));
        assert_eq!(time.rows_beside_tokens(2048), LEAST_ROWS);
        (0..99).for_each(|_| time.record(64, Duration::from_micros(64)));
        assert_eq!(time.rows_beside_tokens(2048), 2048);
    }

    #[test]
    fn replay_gets_most_rows() {
        assert_eq!([2048, 5, 3, 1, 0].map(replay_rows), [1536, 4, 3, 1, 0]);
        for n_rows in 0..100 {
            assert!(replay_rows(rows_around_replays(n_rows)) >= n_rows);
        }
    }

    #[test]
    fn a_lone_sequence_may_have_everything() {
        assert_eq!(spare_blocks(1000, 0), 0);
        assert_eq!(spare_blocks(1000, 3), 10);
        assert_eq!(spare_blocks(8, 1), 1);
    }
}
