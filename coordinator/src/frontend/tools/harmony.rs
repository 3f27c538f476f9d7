//! GPT-OSS: messages in channels. `analysis` is thought, `final` and `commentary` are for the reader, and a message to
//! `functions.f` calls `f`.

use super::{
    Format, Names, Parser, Spelling,
    budget::ThoughtMarks,
    found::Found,
    sections::{Opening, Prose, Read},
};

const START: &str = "<|start|>";
const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";
const CONSTRAIN: &str = "<|constrain|>";
const MARKS: &[&str] = &[START, CHANNEL, MESSAGE, CONSTRAIN, "<|end|>", "<|call|>", "<|return|>"];
/// What ends a message.
const ENDS: &[&str] = &[START, CHANNEL, "<|end|>", "<|call|>", "<|return|>"];
/// Longest head of a message.
const LONGEST_HEAD: usize = 512;

/// The format.
pub struct Harmony;

impl Format for Harmony {
    fn names(&self) -> &'static [&'static str] {
        &["openai", "gpt_oss", "harmony"]
    }

    fn marks(&self) -> &'static [&'static str] {
        MARKS
    }

    fn is_that_of(&self, template: &str) -> bool {
        template.contains(CHANNEL)
    }

    fn families(&self) -> &'static [&'static str] {
        &["gpt-oss", "gpt_oss"]
    }

    fn thought_marks(&self) -> Option<ThoughtMarks> {
        Some(ThoughtMarks {
            open: &["<|channel|>analysis<|message|>"],
            close: ENDS,
            end: "<|end|>",
            // It would go on in the next message.
            end_again: Some("<|end|><|start|>assistant<|channel|>final<|message|>"),
        })
    }

    fn parser(&self, names: &Names) -> Box<dyn Parser> {
        Box::new(Messages { names: names.clone(), at: At::Text(Kind::Content, prose()) })
    }

    fn spelling(&self, _: &str) -> Spelling {
        Spelling {
            before: "<|channel|>commentary to=functions.",
            middle: " <|constrain|>json<|message|>",
            // Each call ends the answer.
            between: None,
            thoughts: Some(("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")),
            text: "<|channel|>final<|message|>",
            ..Spelling::default()
        }
    }
}

/// What the text of a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Content,
    Thought,
    Arguments,
}

enum At {
    Text(Kind, Prose),
    /// Before the text of a message: who speaks, to whom, in which channel. With the marks.
    Head(String),
    /// After the end of a message.
    Between(String),
}

struct Messages {
    names: Names,
    at: At,
}

fn prose() -> Prose {
    Prose::new(Opening { marks: ENDS, first: None })
}

impl Messages {
    /// What follows the head of a message.
    fn begin(&self, head: &str, found: &mut Found) -> Kind {
        let channel = head.split_once(CHANNEL).map_or("", |(_, channel)| channel.trim_start());
        let recipient = head.split_once("to=").map(|(_, to)| {
            let end = to.find(|c: char| c.is_whitespace() || c == '<').unwrap_or(to.len());
            &to[..end]
        });
        match recipient {
            Some(to) => match to.strip_prefix("functions.").filter(|name| self.names.contains(name)) {
                Some(name) => {
                    found.call(name);
                    Kind::Arguments
                }
                // Something that was not offered.
                None if channel.starts_with("analysis") => Kind::Thought,
                None => {
                    found.content(head);
                    found.content(MESSAGE);
                    Kind::Content
                }
            },
            None if channel.starts_with("analysis") => Kind::Thought,
            None => Kind::Content,
        }
    }
}

impl Parser for Messages {
    fn push(&mut self, c: char, found: &mut Found) {
        match &mut self.at {
            At::Text(kind, text) => {
                let mut read = Found::default();
                let step = text.push(c, &mut read);
                tell(*kind, read, found);
                if let Read::Mark(mark) = step {
                    let mark = mark.trim_start();
                    self.at = match mark {
                        START | CHANNEL => At::Head(mark.to_owned()),
                        _ => At::Between(String::new()),
                    };
                }
            }
            At::Between(held) => {
                held.push(c);
                let begun = held.trim_start();
                if begun.is_empty() {
                    return;
                }
                if begun == START || begun == CHANNEL {
                    self.at = At::Head(begun.to_owned());
                } else if !START.starts_with(begun) && !CHANNEL.starts_with(begun) {
                    // No message: text of nobody's.
                    let held = std::mem::take(held);
                    self.at = At::Text(Kind::Content, prose());
                    held.chars().for_each(|c| self.push(c, found));
                }
            }
            At::Head(head) => {
                head.push(c);
                if let Some(whole) = head.strip_suffix(MESSAGE) {
                    let whole = whole.to_owned();
                    self.at = At::Text(self.begin(&whole, found), prose());
                } else if head.len() > LONGEST_HEAD {
                    found.content(head);
                    self.at = At::Text(Kind::Content, prose());
                }
            }
        }
    }

    fn finish(&mut self, found: &mut Found) {
        match &mut self.at {
            At::Text(kind, text) => {
                let mut read = Found::default();
                text.finish(&mut read);
                tell(*kind, read, found);
            }
            At::Head(held) | At::Between(held) if held.trim().is_empty() => {}
            At::Head(held) | At::Between(held) => found.content(held),
        }
    }

    fn is_thinking(&self) -> bool {
        match &self.at {
            At::Text(kind, _) => *kind == Kind::Thought,
            At::Head(head) => head.contains("<|channel|>analysis"),
            At::Between(_) => false,
        }
    }
}

/// Tells text as what it is.
fn tell(kind: Kind, mut read: Found, found: &mut Found) {
    for part in read.take() {
        let super::found::Part::Content(text) = part else { continue };
        match kind {
            Kind::Content => found.content(&text),
            Kind::Thought => found.thought(&text),
            Kind::Arguments => found.arguments(&text),
        }
    }
}
