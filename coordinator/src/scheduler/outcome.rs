//! What a step's result means for requests.

use std::time::{Duration, Instant};

use phalanx_cluster::id::TokenId;
use phalanx_proto::v1::{Grammar, PromptScores, Sample, StepResult, TokenScore};

use super::{
    ending::Ending,
    event::{Action, Measure},
    machine::{Machine, PlannedChunk},
};
use crate::{
    journal::Entry,
    request::{Finish, Output, Request, RequestError, RequestEvent},
    sequence::{RequestKey, Sequence, SequenceKey},
    text::decode::StopSearch,
};

impl Machine {
    pub(super) fn on_stepped(&mut self, now: Instant, result: StepResult, out: &mut Vec<Action>) {
        let Some(group) = self.group.as_mut().filter(|g| g.epoch == result.epoch) else {
            out.push(Action::Measure(Measure::Fenced));
            return;
        };
        let awaited = group.in_flight.front().map(|s| s.step);
        if awaited != Some(result.step) {
            let warning = format!("epoch {}: result of step {}, awaited is {awaited:?}", result.epoch, result.step);
            out.push(Action::Warn(warning));
            return;
        }
        let Some(step) = group.in_flight.pop_front() else { return };
        let took = Duration::from_micros(result.compute_us);
        let n_rows = step.n_rows;
        self.row_time.record(n_rows, took);
        out.push(Action::Measure(Measure::Step { n_sequences: step.chunks.len(), n_rows, took }));

        for scores in result.prompt_scores {
            let owner = step.chunks.iter().find(|c| c.slot == scores.sequence).map(|c| c.key.request);
            if let Some(owner) = owner {
                self.take_scores(owner, scores, out);
            }
        }
        let mut samples = result.samples.into_iter();
        for chunk in &step.chunks {
            if chunk.sample {
                self.take_sample(now, chunk, samples.next(), out);
            } else {
                self.finish_score_only(chunk, out);
            }
        }
        if samples.next().is_some() {
            out.push(Action::Warn(format!("step {} brought more samples than it planned", step.step)));
        }
    }

    /// Keeps scores that continue those there are. After a replay positions come again: the first ones count.
    fn take_scores(&mut self, key: RequestKey, new: PromptScores, out: &mut Vec<Action>) {
        let Some(live) = self.requests.get_mut(&key) else { return };
        let Some(scores) = &mut live.scores else { return };
        let next = scores.len() + 1;
        if new.start as usize > next {
            out.push(Action::Warn(format!("prompt scores begin at {}, awaited is {next}", new.start)));
            return;
        }
        let n_wanted = live.request.prompt.len() - 1 - scores.len();
        scores.extend(new.scores.into_iter().skip(next - new.start as usize).take(n_wanted));
        self.absolve(key);
        self.tell_scores_if_complete(key, out);
    }

    /// Tells the prompt's scores as soon as all are there.
    pub(super) fn tell_scores_if_complete(&mut self, key: RequestKey, out: &mut Vec<Action>) {
        let Some(live) = self.requests.get_mut(&key) else { return };
        let n_scored = live.request.prompt.len() - 1;
        if let Some(scores) = live.scores.take_if(|s| s.len() == n_scored) {
            out.push(Action::Emit(key, RequestEvent::PromptScored(scores)));
            self.release_held(key);
        }
    }

    /// The end of a request that only wants its prompt scored: all its choices are empty.
    fn finish_score_only(&mut self, chunk: &PlannedChunk, out: &mut Vec<Action>) {
        let sequence = self.sequences.get(&chunk.key);
        let is_done = sequence.is_some_and(|s| s.is_score_only() && chunk.end == s.prompt_len);
        let Some(live) = self.requests.get(&chunk.key.request).filter(|_| is_done) else { return };
        if live.waits_for_scores() {
            self.fail_unscored(chunk.key.request, out);
            return;
        }
        let (key, usage) = (chunk.key.request, live.usage);
        for index in 0..live.request.n {
            let output = Output { index, finish: Some(Finish::Length), ..Output::default() };
            out.push(Action::Emit(key, RequestEvent::Output(output)));
            out.push(Action::Measure(Measure::Completed(Ending::Length)));
        }
        self.forget(key, Ending::Length, out);
        out.push(Action::Emit(key, RequestEvent::Finished(usage)));
    }

    fn fail_unscored(&mut self, key: RequestKey, out: &mut Vec<Action>) {
        self.fail(key, RequestError::Internal("the shards did not score the whole prompt".to_owned()), out);
    }

    /// A sequence's next token. Dropped if the sequence has ended meanwhile.
    fn take_sample(&mut self, now: Instant, chunk: &PlannedChunk, sample: Option<Sample>, out: &mut Vec<Action>) {
        let key = chunk.key;
        let Some(live) = self.requests.get(&key.request) else { return };
        let waits_for_scores = live.waits_for_scores();
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        let vocab = self.limits.vocab;
        if sample.as_ref().is_some_and(|s| s.failed && s.sequence == chunk.slot) {
            let error = failure(sample.unwrap_or_default(), sequence.sampling.grammar.as_ref());
            self.fail(key.request, error, out);
            return;
        }
        let is_good = |s: &Sample| s.sequence == chunk.slot && (s.token_id as usize) < vocab;
        let Some(Sample { token_id, score, .. }) = sample.filter(is_good) else {
            let reason = format!("the shards gave no token for slot {}", chunk.slot);
            self.fail(key.request, RequestError::Internal(reason), out);
            return;
        };
        if waits_for_scores {
            self.fail_unscored(key.request, out);
            return;
        }
        sequence.n_pending -= 1;
        if let (Some(seat), Some(group)) = (&mut sequence.seat, &mut self.group) {
            seat.tokens.push(token_id);
            if self.limits.prefix_caching {
                group.blocks.publish(&mut seat.table, &seat.tokens, seat.computed, group.next_step - 1);
            }
        }
        if let Some(since) = sequence.stalled_since.take() {
            let stall = now.saturating_duration_since(since);
            if let Some(longest) = self.group.as_mut().and_then(|g| g.recovering.as_mut()) {
                *longest = (*longest).max(stall);
            }
            out.push(Action::Measure(Measure::Stalled(stall)));
        }
        let since_last = sequence.last_token_at.replace(now).map(|at| now.saturating_duration_since(at));
        self.measure_token(now, key.request, since_last, out);
        self.absolve(key.request);
        self.tell_token(key, token_id, score, out);
    }

    /// Journals a choice's next token and tells its client. Says whether the choice is complete with it.
    pub(super) fn tell_token(
        &mut self,
        key: SequenceKey,
        token: TokenId,
        score: Option<TokenScore>,
        out: &mut Vec<Action>,
    ) -> bool {
        let Some(live) = self.requests.get_mut(&key.request) else { return true };
        let Some(sequence) = self.sequences.get_mut(&key) else { return true };
        live.usage.completion_tokens += 1;
        sequence.n_output += 1;
        self.journal.append(Entry::Emitted(key, token));
        let output = extend_output(sequence, &live.request, &self.eos, token, score);
        let ending = output.finish.as_ref().map(Ending::from);
        out.push(Action::Emit(key.request, RequestEvent::Output(output)));
        if let Some(ending) = ending {
            self.complete(key, ending, out);
        }
        ending.is_some()
    }

    fn measure_token(&mut self, now: Instant, key: RequestKey, since_last: Option<Duration>, out: &mut Vec<Action>) {
        out.push(Action::Measure(Measure::Token));
        let since_arrival = self.since_arrival(key, now);
        let Some(live) = self.requests.get_mut(&key) else { return };
        live.times.token(now);
        if live.usage.completion_tokens == 0 {
            out.extend(since_arrival.map(|d| Action::Measure(Measure::FirstToken(d))));
        }
        out.extend(since_last.map(|d| Action::Measure(Measure::InterToken(d))));
    }

    /// A choice is complete; the request is too with its last one.
    fn complete(&mut self, key: SequenceKey, ending: Ending, out: &mut Vec<Action>) {
        let n_output = self.sequences.get(&key).map_or(0, |s| s.n_output);
        self.remove_sequence(key);
        self.journal.append(Entry::Completed(key));
        if key.choice == 0 {
            self.release_held(key.request);
        }
        let Some(live) = self.requests.get_mut(&key.request) else { return };
        live.n_open -= 1;
        live.longest = live.longest.max(n_output);
        out.push(Action::Measure(Measure::Completed(ending)));
        if live.n_open == 0 {
            let usage = live.usage;
            self.forget(key.request, ending, out);
            out.push(Action::Emit(key.request, RequestEvent::Finished(usage)));
        }
    }
}

/// Why no token could be chosen.
fn failure(sample: Sample, grammar: Option<&Grammar>) -> RequestError {
    match (sample.grammar_error, grammar) {
        (reason, Some(grammar)) if !reason.is_empty() && !sample.no_grammars => {
            RequestError::Grammar { field: grammar.field.clone(), reason }
        }
        (reason, _) if !reason.is_empty() => RequestError::Internal(reason),
        _ => RequestError::Internal("the model's scores of the next token are no numbers".to_owned()),
    }
}

/// What a new token adds to a choice's output, and whether it ends it. `n_output` counts the token already.
fn extend_output(
    sequence: &mut Sequence,
    request: &Request,
    eos: &[TokenId],
    token: TokenId,
    score: Option<TokenScore>,
) -> Output {
    let stop = &request.stop;
    // A grammar allows these tokens where the output is complete, and with `ignore_eos` only where it can't go on.
    let is_bound = request.sampling.grammar.as_ref().is_some_and(|grammar| grammar.text.is_some());
    let ending = if (!stop.ignore_eos || is_bound) && eos.contains(&token) {
        Some(Finish::EndOfSequence)
    } else if stop.token_ids.contains(&token) {
        Some(Finish::StopToken(token))
    } else {
        None
    };
    let has_min = sequence.n_output >= request.sampling.min_tokens as usize;
    let search = if has_min { StopSearch::On } else { StopSearch::Off };
    let is_shown = ending.is_none() || stop.include_in_output;
    let (mut text, mut matched) = if is_shown { sequence.text.push(token, search) } else { Default::default() };
    let is_last = sequence.n_output >= sequence.max_tokens;
    if matched.is_none() && (ending.is_some() || is_last) {
        let (rest, in_rest) = sequence.text.finish();
        text.push_str(&rest);
        matched = in_rest;
    }
    let by_string = matched.and_then(|m| stop.strings.get(m.stop_idx)).map(|s| Finish::StopString(s.clone()));
    let finish = ending.or(by_string).or(is_last.then_some(Finish::Length));
    Output { index: sequence.key.choice, text, token_ids: vec![token], scores: score.into_iter().collect(), finish }
}
