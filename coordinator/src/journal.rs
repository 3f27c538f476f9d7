//! What replay needs of every live request: its prompt, its parameters and the tokens emitted so far.
//!
//! Append-only: the state is what the entries say in order, so that the same entries could go to a standby or a disk.
//! In memory for now. A request's entries are forgotten when it ends.

use std::{collections::BTreeMap, sync::Arc};

use phalanx_cluster::id::TokenId;

use crate::{
    request::Request,
    sequence::{RequestKey, SequenceKey},
};

/// One thing that happened.
#[derive(Debug, Clone)]
pub enum Entry {
    /// A request was taken.
    Began(RequestKey, Arc<Request>),
    /// A choice got its next token.
    Emitted(SequenceKey, TokenId),
    /// A choice is complete.
    Completed(SequenceKey),
    /// A request needs no replay any more.
    Ended(RequestKey),
}

#[derive(Debug)]
struct Record {
    request: Arc<Request>,
    choices: Vec<Choice>,
}

#[derive(Debug, Clone, Default)]
struct Choice {
    emitted: Vec<TokenId>,
    is_complete: bool,
}

/// The record of all live requests.
#[derive(Debug, Default)]
pub struct Journal {
    records: BTreeMap<RequestKey, Record>,
}

impl Journal {
    /// Adds what happened. Entries of requests that ended, or never began, say nothing.
    pub fn append(&mut self, entry: Entry) {
        match entry {
            Entry::Began(key, request) => {
                let choices = vec![Choice::default(); request.n as usize];
                self.records.insert(key, Record { request, choices });
            }
            Entry::Emitted(key, token) => {
                if let Some(choice) = self.choice_mut(key) {
                    choice.emitted.push(token);
                }
            }
            Entry::Completed(key) => {
                if let Some(choice) = self.choice_mut(key) {
                    choice.is_complete = true;
                    choice.emitted = Vec::new();
                }
            }
            Entry::Ended(key) => {
                self.records.remove(&key);
            }
        }
    }

    fn choice_mut(&mut self, key: SequenceKey) -> Option<&mut Choice> {
        self.records.get_mut(&key.request)?.choices.get_mut(key.choice as usize)
    }

    /// All known tokens of a choice that is to go on: prompt, then output.
    pub fn tokens(&self, key: SequenceKey) -> Option<Vec<TokenId>> {
        let record = self.records.get(&key.request)?;
        let choice = record.choices.get(key.choice as usize).filter(|c| !c.is_complete)?;
        Some([record.request.prompt.as_slice(), &choice.emitted].concat())
    }

    /// Choices that are to go on, in order of arrival.
    pub fn unfinished(&self) -> impl Iterator<Item = SequenceKey> {
        self.records.iter().flat_map(|(key, record)| {
            let choices = (0..).zip(&record.choices).filter(|(_, c)| !c.is_complete);
            choices.map(|(choice, _)| SequenceKey { request: *key, choice })
        })
    }

    /// Live requests.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether nothing would be replayed.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::StopConditions;

    #[test]
    fn replay_needs_prompt_and_output_of_open_choices_only() {
        let request = Request {
            id: "a".to_owned(),
            prompt: vec![1, 2],
            n: 2,
            sampling: Default::default(),
            max_tokens: 5,
            is_open_ended: false,
            stop: StopConditions::default(),
            deadline: None,
            priority: 0,
            cache_root: phalanx_cluster::seal::Seal::EMPTY,
            resume: Vec::new(),
        };
        let (key, mut journal) = (RequestKey(7), Journal::default());
        let choice = |choice| SequenceKey { request: key, choice };
        journal.append(Entry::Began(key, Arc::new(request)));
        journal.append(Entry::Emitted(choice(1), 9));
        journal.append(Entry::Emitted(choice(0), 8));
        journal.append(Entry::Emitted(choice(1), 7));
        assert_eq!(journal.tokens(choice(1)), Some(vec![1, 2, 9, 7]));
        journal.append(Entry::Completed(choice(1)));
        assert_eq!(journal.tokens(choice(1)), None);
        assert_eq!(journal.unfinished().collect::<Vec<_>>(), [choice(0)]);
        journal.append(Entry::Ended(key));
        journal.append(Entry::Emitted(choice(0), 1));
        assert!(journal.is_empty());
    }
}
