//! Decisions of the scheduler, as functions of numbers.
//!
//! First come, first served, among equal priorities. A sequence gets blocks for all its known tokens when it is admitted and one more whenever its
//! output crosses a block's end; if there is none then, the youngest sequence gives its blocks up and is computed again
//! later. The oldest can therefore always go on, and nothing waits for ever.

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

/// Rows of a step that may compute positions again that were lost. If others get their next tokens in the same step, it
/// must not become as long as it can: every row of replay delays all of those.
pub fn replay_rows(max_step_rows: usize, has_decodes: bool) -> usize {
    if has_decodes { (max_step_rows * 3 / 4).max(1) } else { max_step_rows }
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
    fn a_lone_sequence_may_have_everything() {
        assert_eq!(spare_blocks(1000, 0), 0);
        assert_eq!(spare_blocks(1000, 3), 10);
        assert_eq!(spare_blocks(8, 1), 1);
    }
}
