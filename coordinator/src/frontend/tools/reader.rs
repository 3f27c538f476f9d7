//! From a choice's text to what an answer says of it.

use phalanx_cluster::hex::hex;
use sha2::{Digest, Sha256};

use super::{
    Format, Ids, Names, Parser,
    found::{Found, Part},
    thoughts::{Splitter, Start, Thoughts},
};
use crate::frontend::generation::Collection;

/// How the answers to a request are read.
#[derive(Clone)]
pub struct Reading {
    /// Unique name of the request, which its calls' names are made of.
    pub request: String,
    /// The format of calls, if there may be any, or if it marks thoughts.
    pub format: Option<&'static dyn Format>,
    /// Tools that may be called.
    pub names: Names,
    /// How thoughts are marked, and where the answer begins.
    pub thoughts: Option<(&'static Thoughts, Start)>,
    /// Whether thoughts are told.
    pub shows_thoughts: bool,
}

impl Reading {
    /// Takes text for what it is.
    pub fn plain() -> Self {
        Self { request: String::new(), format: None, names: Names::default(), thoughts: None, shows_thoughts: true }
    }

    /// Whether thoughts are told apart.
    pub fn finds_thoughts(&self) -> bool {
        self.thoughts.is_some() || self.format.is_some_and(Format::finds_thoughts)
    }

    /// Whether an answer may be anything but text for the reader.
    pub fn tells_apart(&self) -> bool {
        self.format.is_some() || self.thoughts.is_some()
    }

    /// Memory that it takes beside itself.
    pub fn kept_bytes(&self) -> usize {
        self.request.len() + self.names.bytes()
    }

    /// A choice that is complete, read as it came.
    pub fn told(&self, choice: usize, collected: &Collection) -> Told {
        let mut reader = self.reader(choice);
        let mut told = Told::default();
        let mut begin = 0;
        for (n_bytes, n_tokens) in &collected.pieces {
            let text = collected.text.get(begin..begin + n_bytes).unwrap_or_default();
            told.add(reader.push(text, *n_tokens));
            begin += n_bytes;
        }
        // Whoever changed the text since then has not changed its pieces.
        told.add(reader.push(collected.text.get(begin..).unwrap_or_default(), 0));
        told.add(reader.finish());
        told.n_thought_tokens = reader.n_thought_tokens();
        told
    }

    /// Reads a choice.
    pub fn reader(&self, choice: usize) -> Reader {
        Reader {
            call_ids: CallIds {
                request: self.request.clone(),
                choice,
                of_model: Vec::new(),
                form: self.format.map_or(Ids::Long, Format::ids),
            },
            splitter: self.thoughts.map(|(form, start)| Splitter::new(form, start)),
            parser: self.format.map(|format| format.parser(&self.names)),
            shows_thoughts: self.shows_thoughts,
            found: Found::default(),
            n_told: 0,
            n_thought_tokens: 0,
        }
    }
}

/// A piece of an answer as it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// For the reader.
    Content(String),
    /// What the model thought.
    Thought(String),
    /// A call begins.
    Call {
        /// Among the calls of its choice.
        index: usize,
        /// Its name, the same whenever the request is answered again.
        id: String,
        /// The tool's.
        name: String,
    },
    /// Arguments of a call go on.
    Arguments {
        /// Which call.
        index: usize,
        /// More of the JSON.
        text: String,
    },
}

/// Reads one choice, piece by piece. However the text is cut, the pieces joined are the same.
pub struct Reader {
    call_ids: CallIds,
    splitter: Option<Splitter>,
    parser: Option<Box<dyn Parser>>,
    shows_thoughts: bool,
    found: Found,
    /// Calls that have been told.
    n_told: usize,
    n_thought_tokens: u32,
}

impl Reader {
    /// Takes more text, which so many tokens have brought.
    pub fn push(&mut self, text: &str, n_tokens: usize) -> Vec<Piece> {
        let was_thinking = self.is_thinking();
        if self.splitter.is_none() && self.parser.is_none() {
            self.found.content(text);
        } else {
            for c in text.chars() {
                self.push_one(c);
            }
        }
        // Marks count with what they mark.
        if was_thinking || self.is_thinking() {
            self.n_thought_tokens = self.n_thought_tokens.saturating_add(u32::try_from(n_tokens).unwrap_or(u32::MAX));
        }
        self.pieces()
    }

    /// The choice is over.
    pub fn finish(&mut self) -> Vec<Piece> {
        if let Some(rest) = self.splitter.as_mut().and_then(|splitter| splitter.finish(&mut self.found)) {
            self.behind_thoughts(&rest);
        }
        if let Some(parser) = &mut self.parser {
            parser.finish(&mut self.found);
        }
        self.pieces()
    }

    /// Calls so far.
    pub fn n_calls(&self) -> usize {
        self.n_told
    }

    /// Tokens of thoughts so far, with their marks.
    pub fn n_thought_tokens(&self) -> u32 {
        self.n_thought_tokens
    }

    fn is_thinking(&self) -> bool {
        self.splitter.as_ref().is_some_and(Splitter::is_inside)
            || self.parser.as_ref().is_some_and(|parser| parser.is_thinking())
    }

    fn push_one(&mut self, c: char) {
        match &mut self.splitter {
            Some(splitter) => {
                if let Some(text) = splitter.push(c, &mut self.found) {
                    self.behind_thoughts(&text);
                }
            }
            None => self.behind_thoughts(c.encode_utf8(&mut [0; 4])),
        }
    }

    fn behind_thoughts(&mut self, text: &str) {
        match &mut self.parser {
            Some(parser) => text.chars().for_each(|c| parser.push(c, &mut self.found)),
            None => self.found.content(text),
        }
    }

    fn pieces(&mut self) -> Vec<Piece> {
        let parts = self.found.take();
        let mut pieces = Vec::with_capacity(parts.len());
        for part in parts {
            pieces.push(match part {
                Part::Content(text) => Piece::Content(text),
                Part::Thought(_) if !self.shows_thoughts => continue,
                Part::Thought(text) => Piece::Thought(text),
                Part::Call { name, id } => {
                    let index = self.n_told;
                    self.n_told += 1;
                    Piece::Call { index, id: self.call_ids.of(index, id), name }
                }
                Part::Arguments(text) => Piece::Arguments { index: self.n_told.saturating_sub(1), text },
            });
        }
        pieces
    }
}

/// Names of calls: what asks again for an answer, or another coordinator after a loss, finds the same.
struct CallIds {
    request: String,
    choice: usize,
    /// Those that the model has given.
    of_model: Vec<String>,
    form: Ids,
}

impl CallIds {
    /// The model's own, if it is a new one.
    fn of(&mut self, index: usize, own: Option<String>) -> String {
        if let Some(own) = own.filter(|own| !self.of_model.contains(own)) {
            self.of_model.push(own.clone());
            return own;
        }
        let digest = Sha256::digest(format!("{}\n{}\n{index}", self.request, self.choice));
        match self.form {
            Ids::Long => format!("call_{}", hex(&digest[..12])),
            Ids::NineLetters => {
                const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
                digest.iter().take(9).map(|byte| char::from(LETTERS[usize::from(byte % 32)])).collect()
            }
        }
    }
}

/// A choice that has been read to its end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// For the reader.
    pub content: String,
    /// What the model thought.
    pub thought: String,
    /// In order.
    pub calls: Vec<ToldCall>,
    /// Tokens of thoughts.
    pub n_thought_tokens: u32,
}

/// A call that has been read to its end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ToldCall {
    /// Its name.
    pub id: String,
    /// The tool's.
    pub name: String,
    /// JSON as the model wrote it; cut if the answer was.
    pub arguments: String,
}

impl Told {
    /// Adds pieces.
    pub fn add(&mut self, pieces: Vec<Piece>) {
        for piece in pieces {
            match piece {
                Piece::Content(text) => self.content.push_str(&text),
                Piece::Thought(text) => self.thought.push_str(&text),
                Piece::Call { id, name, .. } => self.calls.push(ToldCall { id, name, arguments: String::new() }),
                Piece::Arguments { text, .. } => {
                    if let Some(call) = self.calls.last_mut() {
                        call.arguments.push_str(&text);
                    }
                }
            }
        }
    }
}
