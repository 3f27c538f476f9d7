//! Calls of tools, and thoughts: what a request offers, how a model writes it, and how an answer tells it.
//!
//! A [`Format`] is a file and a line in [`FORMATS`]: how a family of models writes calls. [`toolbox`] reads what a request
//! offers, `grammar` binds the output to it where that was asked for, [`thoughts`] finds what was thought, and a
//! [`reader::Reader`] turns a choice's text into what every API tells in its own words.

pub mod ask;
pub mod budget;
mod call_list;
mod call_object;
mod deepseek;
mod element_grammar;
mod elements;
pub mod found;
mod glm45;
mod grammar;
mod granite;
mod harmony;
mod hermes;
mod json;
mod kimi_k2;
mod kinds;
mod llama3_json;
mod mistral;
mod named_call;
mod names;
mod parsers;
mod python;
mod pythonic;
mod qwen3_coder;
pub mod reader;
#[cfg(test)]
pub mod scraps;
mod sections;
#[cfg(test)]
mod tests;
pub mod thoughts;
pub mod toolbox;

use self::{budget::ThoughtMarks, found::Found};
pub use self::{
    names::Names,
    parsers::{Parsers, UnknownParser},
};

/// How a family of models writes calls.
pub trait Format: Sync {
    /// What it is called; the first is the usual name.
    fn names(&self) -> &'static [&'static str];

    /// What its calls are marked with. Of these, tokens that texts usually leave out stay in.
    fn marks(&self) -> &'static [&'static str];

    /// Whether a model with this chat template writes it.
    fn is_that_of(&self, template: &str) -> bool;

    /// Families whose models write it, if their template does not say.
    fn families(&self) -> &'static [&'static str];

    /// What its calls' names look like.
    fn ids(&self) -> Ids {
        Ids::Long
    }

    /// How it marks thoughts, if it does.
    fn thought_marks(&self) -> Option<ThoughtMarks> {
        None
    }

    /// Whether it marks thoughts too.
    fn finds_thoughts(&self) -> bool {
        self.thought_marks().is_some()
    }

    /// Reads a text in which these tools may be called.
    fn parser(&self, names: &Names) -> Box<dyn Parser>;

    /// How calls are written by a model with this template.
    fn spelling(&self, template: &str) -> Spelling;
}

/// All formats, in the order in which a chat template is asked whose it is.
pub static FORMATS: &[&dyn Format] = &[
    &harmony::Harmony,
    &deepseek::DeepSeek,
    &mistral::Mistral,
    &granite::Granite,
    &kimi_k2::KimiK2,
    &glm45::Glm45,
    &qwen3_coder::Qwen3Coder,
    &hermes::Hermes,
    &pythonic::Pythonic,
    &llama3_json::Llama3Json,
];

/// Reads a text, character by character: what is found does not depend on how the text is cut.
pub trait Parser: Send {
    /// Takes the next character.
    fn push(&mut self, c: char, found: &mut Found);

    /// No more text comes.
    fn finish(&mut self, found: &mut Found);

    /// Whether what comes is thought, as far as this parser knows.
    fn is_thinking(&self) -> bool {
        false
    }
}

/// What names of calls look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// `call_` and 24 digits.
    Long,
    /// Nine letters and digits.
    NineLetters,
}

/// How calls are written: `open` call `between` call … `close`, where a call is `before` name `middle` arguments `after`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Spelling {
    /// Before all calls.
    pub open: &'static str,
    /// Before a name.
    pub before: &'static str,
    /// Between name and middle there is a number behind this.
    pub number: Option<&'static str>,
    /// Between name and arguments.
    pub middle: &'static str,
    /// Behind arguments.
    pub after: &'static str,
    /// Between two calls; `None`: an answer has one at most.
    pub between: Option<&'static str>,
    /// Behind all calls.
    pub close: &'static str,
    /// The character that calls begin with and other answers don't, if there is no mark.
    pub first: Option<char>,
    /// How arguments are written.
    pub arguments: ArgumentForm,
    /// What thoughts stand between, if the format marks them.
    pub thoughts: Option<(&'static str, &'static str)>,
    /// Before text for the reader.
    pub text: &'static str,
}

/// How the arguments of a call are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ArgumentForm {
    /// As a JSON object.
    #[default]
    Object,
    /// As `key=value, …`.
    Keywords,
    /// As elements.
    Elements(&'static ElementSpelling),
}

/// How an argument is written: `before` key `middle` value `end` `after`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ElementSpelling {
    /// Before a key.
    pub before: &'static str,
    /// Between key and value.
    pub middle: &'static str,
    /// What ends a value.
    pub end: &'static str,
    /// Behind that.
    pub after: &'static str,
    /// Whether a line break before the end is not the value's.
    pub has_lines: bool,
}
