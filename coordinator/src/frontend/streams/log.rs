//! Events of a run in little memory: what they hold lies end to end, and is cut into the same events where they are read.
//!
//! Answers are kept for minutes, and nearly every event brings one token: as the scheduler makes it, that is up to five
//! allocations for a few bytes each.

use phalanx_cluster::id::TokenId;
use phalanx_proto::v1::TokenScore;

use crate::{
    request::{Finish, Output, RequestError, RequestEvent, Usage},
    scores::{PackedScores, ScoreCursor},
};

/// Events with their prompt's index, in order.
#[derive(Default)]
pub struct EventLog {
    events: Vec<Event>,
    text: String,
    token_ids: Vec<TokenId>,
    scores: PackedScores,
    /// Of the outputs that have one.
    finishes: Vec<Finish>,
    /// Memory inside of them.
    finish_bytes: usize,
    errors: Vec<RequestError>,
}

/// How much of all there is belongs to an event.
struct Event {
    prompt_idx: u32,
    what: What,
}

enum What {
    PromptScored { n_scores: u32 },
    Output { index: u32, n_text: u32, n_tokens: u32, n_scores: u32, has_finish: bool },
    Finished(Usage),
    Failed,
}

/// A place between two events.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cursor {
    event: usize,
    text: usize,
    token: usize,
    score: ScoreCursor,
    finish: usize,
    error: usize,
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("an event is no longer than the context")
}

impl EventLog {
    /// Adds an event at the end.
    pub fn push(&mut self, prompt_idx: usize, event: RequestEvent) {
        let prompt_idx = count(prompt_idx);
        let what = match event {
            RequestEvent::PromptScored(scores) => {
                let n_scores = count(scores.len());
                self.scores.extend(scores);
                What::PromptScored { n_scores }
            }
            RequestEvent::Output(Output { index, text, token_ids, scores, finish }) => {
                let has_finish = finish.is_some();
                if let Some(Finish::StopString(text)) = &finish {
                    self.finish_bytes += text.capacity();
                }
                let (n_text, n_tokens, n_scores) = (count(text.len()), count(token_ids.len()), count(scores.len()));
                self.text.push_str(&text);
                self.token_ids.extend(token_ids);
                self.scores.extend(scores);
                self.finishes.extend(finish);
                What::Output { index, n_text, n_tokens, n_scores, has_finish }
            }
            RequestEvent::Finished(usage) => What::Finished(usage),
            RequestEvent::Failed(error) => {
                self.errors.push(error);
                What::Failed
            }
        };
        self.events.push(Event { prompt_idx, what });
    }

    /// The event at a place, if it is there yet, and moves the place behind it.
    pub fn next(&self, from: &mut Cursor) -> Option<(usize, RequestEvent)> {
        let Event { prompt_idx, what } = self.events.get(from.event)?;
        from.event += 1;
        let event = match *what {
            What::PromptScored { n_scores } => {
                RequestEvent::PromptScored(self.scores.take(n_scores as usize, &mut from.score))
            }
            What::Output { index, n_text, n_tokens, n_scores, has_finish } => {
                let text = self.text[advance(&mut from.text, n_text)].to_owned();
                let token_ids = self.token_ids[advance(&mut from.token, n_tokens)].to_vec();
                let scores = self.scores.take(n_scores as usize, &mut from.score);
                let finish = self.finishes[advance(&mut from.finish, has_finish.into())].first().cloned();
                RequestEvent::Output(Output { index, text, token_ids, scores, finish })
            }
            What::Finished(usage) => RequestEvent::Finished(usage),
            What::Failed => RequestEvent::Failed(self.errors[advance(&mut from.error, 1)][0].clone()),
        };
        Some((*prompt_idx as usize, event))
    }

    /// Tokens and their scores, event by event, with the indices of prompt and choice.
    pub fn tokens(&self) -> impl Iterator<Item = (usize, u32, &[TokenId], Vec<TokenScore>)> {
        let mut from = Cursor::default();
        self.events.iter().filter_map(move |Event { prompt_idx, what }| match *what {
            What::PromptScored { n_scores } => {
                self.scores.take(n_scores as usize, &mut from.score);
                None
            }
            What::Output { index, n_tokens, n_scores, .. } => {
                let token_ids = &self.token_ids[advance(&mut from.token, n_tokens)];
                Some((*prompt_idx as usize, index, token_ids, self.scores.take(n_scores as usize, &mut from.score)))
            }
            What::Finished(_) | What::Failed => None,
        })
    }

    /// Memory that they take. Looks at none of them.
    pub fn bytes(&self) -> usize {
        self.events.capacity() * size_of::<Event>()
            + self.text.capacity()
            + self.token_ids.capacity() * size_of::<TokenId>()
            + self.scores.bytes()
            + self.finishes.capacity() * size_of::<Finish>()
            + self.finish_bytes
            + self.errors.capacity() * size_of::<RequestError>()
    }

    /// Gives back memory that was meant for more. Places stay as they are.
    pub fn shrink(&mut self) {
        self.events.shrink_to_fit();
        self.text.shrink_to_fit();
        self.token_ids.shrink_to_fit();
        self.scores.shrink();
        self.finishes.shrink_to_fit();
        self.errors.shrink_to_fit();
    }
}

/// The next so many, which are behind the place then.
fn advance(place: &mut usize, n: u32) -> std::ops::Range<usize> {
    let begin = *place;
    *place += n as usize;
    begin..*place
}

#[cfg(test)]
mod tests {
    use phalanx_proto::v1::TopToken;
    use proptest::prelude::*;

    use super::*;

    fn scores(most: usize) -> impl Strategy<Value = Vec<TokenScore>> {
        let top = (any::<u32>(), -9.0..0.0_f32).prop_map(|(token_id, logprob)| TopToken { token_id, logprob });
        let score = (any::<u32>(), -9.0..0.0_f32, any::<u32>(), prop::collection::vec(top, 0..4));
        let score = score.prop_map(|(token_id, logprob, rank, top)| TokenScore { token_id, logprob, rank, top });
        prop::collection::vec(score, 0..=most)
    }

    fn event() -> impl Strategy<Value = RequestEvent> {
        let finish = prop_oneof![
            4 => Just(None),
            1 => Just(Some(Finish::Length)),
            1 => any::<u32>().prop_map(|id| Some(Finish::StopToken(id))),
            1 => "[aé]{0,4}".prop_map(|text| Some(Finish::StopString(text))),
        ];
        let output = (0..3_u32, "[aé漢]{0,5}", prop::collection::vec(any::<u32>(), 0..3), scores(2), finish);
        let output = output.prop_map(|(index, text, token_ids, scores, finish)| {
            RequestEvent::Output(Output { index, text, token_ids, scores, finish })
        });
        let usage =
            any::<u32>().prop_map(|n| RequestEvent::Finished(Usage { completion_tokens: n, ..Usage::default() }));
        let failed = "[a-z]{3}".prop_map(|text| RequestEvent::Failed(RequestError::Internal(text)));
        prop_oneof![8 => output, 1 => scores(4).prop_map(RequestEvent::PromptScored), 1 => usage, 1 => failed]
    }

    proptest! {
        #[test]
        fn events_come_out_as_they_went_in(
            events in prop::collection::vec((0..3_usize, event()), 0..30), middle: prop::sample::Index,
        ) {
            let mut log = EventLog::default();
            let mut from = Cursor::default();
            // Who reads while it grows and shrinks reads what who comes later does.
            let middle = middle.index(events.len() + 1);
            let mut read = Vec::new();
            for (prompt_idx, event) in &events[..middle] {
                log.push(*prompt_idx, event.clone());
                read.extend(log.next(&mut from));
            }
            prop_assert_eq!(log.next(&mut from), None);
            for (prompt_idx, event) in &events[middle..] {
                log.push(*prompt_idx, event.clone());
            }
            let before = log.bytes();
            log.shrink();
            prop_assert!(log.bytes() <= before);
            read.extend(std::iter::from_fn(|| log.next(&mut from)));
            prop_assert_eq!(&read, &events);
            let mut from = Cursor::default();
            prop_assert_eq!(&std::iter::from_fn(|| log.next(&mut from)).collect::<Vec<_>>(), &events);

            let tokens = events.into_iter().filter_map(|(prompt_idx, event)| match event {
                RequestEvent::Output(output) => Some((prompt_idx, output.index, output.token_ids, output.scores)),
                _ => None,
            });
            let told = log.tokens().map(|(prompt_idx, index, ids, scores)| (prompt_idx, index, ids.to_vec(), scores));
            prop_assert_eq!(told.collect::<Vec<_>>(), tokens.collect::<Vec<_>>());
        }
    }
}
