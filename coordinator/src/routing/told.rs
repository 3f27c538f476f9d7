//! What a request's client was told, so that the request can go on elsewhere and nothing is told twice.
//!
//! A request's events depend on nothing but what was asked and its seed, one event for each token: another life of it begins
//! with the same ones, which are left out here.

use crate::request::{Request, RequestEvent, ResumedChoice};

/// What was told of a request.
#[derive(Debug, Default)]
pub struct Told {
    choices: Vec<Choice>,
    has_prompt_scores: bool,
    /// In this life: of each choice, and whether the prompt's scores came.
    repeated: Vec<usize>,
}

#[derive(Debug, Clone, Default)]
struct Choice {
    n_events: usize,
    output: ResumedChoice,
}

impl Told {
    /// Nothing yet.
    pub fn new(request: &Request) -> Self {
        let choices = vec![Choice::default(); request.n as usize];
        Self { choices, has_prompt_scores: false, repeated: vec![usize::MAX; request.n as usize] }
    }

    /// Takes an event in; gives it back if it is news.
    pub fn take(&mut self, event: RequestEvent) -> Option<RequestEvent> {
        match event {
            RequestEvent::PromptScored(scores) => {
                let is_news = !std::mem::replace(&mut self.has_prompt_scores, true);
                is_news.then_some(RequestEvent::PromptScored(scores))
            }
            RequestEvent::Output(output) => {
                let index = output.index as usize;
                let (Some(choice), Some(repeated)) = (self.choices.get_mut(index), self.repeated.get_mut(index)) else {
                    return Some(RequestEvent::Output(output));
                };
                if *repeated < choice.n_events {
                    *repeated += 1;
                    return None;
                }
                choice.n_events += 1;
                choice.output.tokens.extend(&output.token_ids);
                choice.output.scores.extend(output.scores.iter().cloned());
                *repeated = usize::MAX;
                Some(RequestEvent::Output(output))
            }
            last @ (RequestEvent::Finished(_) | RequestEvent::Failed(_)) => Some(last),
        }
    }

    /// From now on events come from another life of the request.
    pub fn begin_again(&mut self) {
        self.repeated.fill(0);
    }

    /// The request for another life, which tells all of this again.
    pub fn next_life(&self, request: &Request) -> Request {
        let mut earlier = request.resume.iter().cloned();
        let longer = |choice: &Choice| match earlier.next() {
            // Its earlier life had told more than what came of it so far.
            Some(earlier) if earlier.tokens.len() > choice.output.tokens.len() => earlier,
            _ => choice.output.clone(),
        };
        Request { resume: self.choices.iter().map(longer).collect(), ..request.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{Finish, Output, StopConditions, Usage};

    fn request(n: u32) -> Request {
        Request {
            id: "r".to_owned(),
            prompt: vec![1],
            n,
            sampling: Default::default(),
            max_tokens: 9,
            is_open_ended: false,
            stop: StopConditions::default(),
            deadline: None,
            priority: 0,
            cache_root: phalanx_cluster::seal::Seal::EMPTY,
            resume: Vec::new(),
        }
    }

    fn output(index: u32, token: u32, finish: Option<Finish>) -> RequestEvent {
        let (text, token_ids) = (token.to_string(), vec![token]);
        RequestEvent::Output(Output { index, text, token_ids, finish, ..Output::default() })
    }

    fn tokens(event: Option<RequestEvent>) -> Option<Vec<u32>> {
        match event? {
            RequestEvent::Output(output) => Some(output.token_ids),
            _ => Some(Vec::new()),
        }
    }

    #[test]
    fn another_life_tells_only_what_is_new() {
        let asked = request(2);
        let mut told = Told::new(&asked);
        assert!(told.take(RequestEvent::PromptScored(Vec::new())).is_some());
        for (choice, token) in [(0, 5), (1, 6), (0, 7)] {
            assert_eq!(tokens(told.take(output(choice, token, None))), Some(vec![token]));
        }
        for _ in 0..2 {
            let again = told.next_life(&asked);
            told.begin_again();
            let resumed: Vec<_> = again.resume.iter().map(|c| c.tokens.clone()).collect();
            assert_eq!(resumed, [vec![5, 7], vec![6]]);
            assert!(told.take(RequestEvent::PromptScored(Vec::new())).is_none());
            // Choice 1 comes first this time; it is the order within each choice that counts.
            assert_eq!(tokens(told.take(output(1, 6, None))), None);
            assert_eq!(tokens(told.take(output(0, 5, None))), None);
        }
        assert_eq!(tokens(told.take(output(0, 7, None))), None);
        assert_eq!(tokens(told.take(output(0, 8, Some(Finish::Length)))), Some(vec![8]));
        assert_eq!(tokens(told.take(output(1, 9, None))), Some(vec![9]));
        assert!(told.take(RequestEvent::Finished(Usage::default())).is_some());
    }

    #[test]
    fn what_an_earlier_coordinator_told_is_not_lost() {
        let earlier = ResumedChoice { tokens: vec![5, 6], scores: Vec::new() };
        let asked = Request { resume: vec![earlier], ..request(1) };
        let mut told = Told::new(&asked);
        assert_eq!(tokens(told.take(output(0, 5, None))), Some(vec![5]));
        assert_eq!(told.next_life(&asked).resume[0].tokens, [5, 6]);
        told.begin_again();
        assert_eq!(tokens(told.take(output(0, 5, None))), None);
        assert_eq!(tokens(told.take(output(0, 6, None))), Some(vec![6]));
    }
}
