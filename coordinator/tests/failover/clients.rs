//! Who asks, and what must hold for each of them.
//!
//! A request can have several lives, one at each coordinator that takes it. In every life the client is told the very
//! tokens of a model that nothing ever happens to, in order, from the first on, and is told the end once.

use std::{collections::BTreeMap, time::Instant};

use phalanx_coordinator::request::{Request, RequestError, RequestEvent, ResumedChoice};

use crate::fake::oracle::{Choice, Luck, expected, request, tokens};

/// One request and what its client has seen.
pub struct Client {
    pub request: Request,
    wanted: Vec<Choice>,
    /// Of the present life.
    life: Life,
    /// What the journal has: the most that any life told.
    journal: BTreeMap<u32, Choice>,
    pub has_asked: bool,
    pub was_cancelled: bool,
    pub was_answered: bool,
    pub error: Option<RequestError>,
}

#[derive(Default)]
struct Life {
    choices: BTreeMap<u32, Choice>,
    scored: bool,
    is_over: bool,
}

impl Client {
    /// A random request.
    pub fn new(luck: &mut Luck, idx: usize, heads: &[Vec<u32>], now: Instant) -> Self {
        let mut request = request(luck, idx, heads, now);
        request.deadline = None;
        request.priority = luck.below(3) as i32 - 1;
        let wanted = (0..request.n).map(|index| expected(&request, index)).collect();
        Self {
            request,
            wanted,
            life: Life::default(),
            journal: BTreeMap::new(),
            has_asked: false,
            was_cancelled: false,
            was_answered: false,
            error: None,
        }
    }

    /// Beginnings that prompts have in common.
    pub fn heads(luck: &mut Luck) -> Vec<Vec<u32>> {
        (0..2).map(|_| tokens(luck, 10)).collect()
    }

    /// Whether it waits for an answer.
    pub fn is_open(&self) -> bool {
        self.has_asked && !self.was_answered && !self.was_cancelled && self.error.is_none()
    }

    /// Begins another life at a new coordinator. The journal may lag behind what was told.
    pub fn reborn(&mut self, luck: &mut Luck) -> Request {
        self.life = Life::default();
        let resume = (0..self.request.n).map(|index| {
            let Some(told) = self.journal.get(&index) else { return ResumedChoice::default() };
            let n = told.tokens.len() - luck.below(3).min(told.tokens.len());
            ResumedChoice { tokens: told.tokens[..n].to_vec(), scores: told.scores.iter().take(n).cloned().collect() }
        });
        Request { resume: resume.collect(), ..self.request.clone() }
    }

    /// Takes an event of its present life.
    pub fn take(&mut self, event: RequestEvent) {
        let id = &self.request.id;
        assert!(!self.life.is_over, "{id}: nothing comes after the end");
        assert!(!self.was_cancelled, "{id}: nothing comes after a cancellation");
        match event {
            RequestEvent::PromptScored(scores) => {
                assert!(self.life.choices.is_empty() && !self.life.scored, "{id}: prompt scores come first and once");
                assert_eq!(scores.len() + 1, self.request.prompt.len(), "{id}: prompt scores");
                self.life.scored = true;
            }
            RequestEvent::Output(output) => {
                let index = output.index;
                let choice = self.life.choices.entry(index).or_default();
                assert_eq!(choice.finish, None, "{id}[{index}]: nothing comes after a choice's end");
                choice.tokens.extend(output.token_ids);
                choice.text.push_str(&output.text);
                choice.scores.extend(output.scores);
                choice.finish = output.finish;
                let want = &self.wanted[index as usize];
                assert!(want.tokens.starts_with(&choice.tokens), "{id}[{index}]: {choice:?}, want {want:?}");
                assert!(want.text.starts_with(&choice.text), "{id}[{index}]: {choice:?}, want {want:?}");
                if choice.finish.is_some() {
                    assert_eq!(choice, want, "{id}[{index}] ends");
                }
                let journaled = self.journal.entry(index).or_default();
                if journaled.tokens.len() < choice.tokens.len() {
                    journaled.clone_from(choice);
                }
            }
            RequestEvent::Finished(usage) => {
                self.life.is_over = true;
                self.was_answered = true;
                assert_eq!(self.life.choices.len(), self.wanted.len(), "{id}: choices");
                for (index, choice) in &self.life.choices {
                    assert_eq!(*choice, self.wanted[*index as usize], "{id}[{index}]");
                }
                let n_output: usize = self.wanted.iter().map(|c| c.tokens.len()).sum();
                assert_eq!(usage.completion_tokens as usize, n_output, "{id}: usage");
                assert_eq!(self.life.scored, self.request.sampling.prompt_logprobs.is_some(), "{id}: prompt scores");
            }
            RequestEvent::Failed(error) => {
                self.life.is_over = true;
                self.error = Some(error);
            }
        }
    }
}
