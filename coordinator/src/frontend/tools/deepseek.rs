//! DeepSeek: a section of calls, each between marks of its own. V3 writes `function`, the name, and the arguments in a fence of
//! Markdown; V3.1 writes the name and the arguments.

use super::{
    Format, Names, Parser, Spelling,
    found::Found,
    named_call::NamedCall,
    sections::{Body, Closing, Opening, Sections, Step},
};

const OPEN: &str = "<｜tool▁calls▁begin｜>";
const CLOSE: &str = "<｜tool▁calls▁end｜>";
const BEGIN: &str = "<｜tool▁call▁begin｜>";
const END: &str = "<｜tool▁call▁end｜>";
const PART: &str = "<｜tool▁sep｜>";

/// The format.
pub struct DeepSeek;

impl Format for DeepSeek {
    fn names(&self) -> &'static [&'static str] {
        &["deepseek_v3", "deepseek_v31"]
    }

    fn marks(&self) -> &'static [&'static str] {
        &[OPEN, CLOSE, BEGIN, END, PART]
    }

    fn is_that_of(&self, template: &str) -> bool {
        template.contains(OPEN) || template.contains(BEGIN)
    }

    fn families(&self) -> &'static [&'static str] {
        &["deepseek2", "deepseek_v3"]
    }

    fn parser(&self, names: &Names) -> Box<dyn Parser> {
        let names = names.clone();
        let opening = Opening { marks: &[OPEN], first: None };
        Box::new(Sections::new(opening, move || Calls {
            names: names.clone(),
            at: At::Between(Closing::new(&[BEGIN])),
        }))
    }

    fn spelling(&self, template: &str) -> Spelling {
        let is_fenced = template.contains("```json");
        Spelling {
            open: OPEN,
            before: if is_fenced { "<｜tool▁call▁begin｜>function<｜tool▁sep｜>" } else { BEGIN },
            middle: if is_fenced { "\n```json\n" } else { PART },
            after: if is_fenced { "\n```<｜tool▁call▁end｜>" } else { END },
            between: Some(if is_fenced { "\n" } else { "" }),
            close: CLOSE,
            ..Spelling::default()
        }
    }
}

struct Calls {
    names: Names,
    at: At,
}

enum At {
    /// Before a call, or the end.
    Between(Closing),
    /// What a call begins with: the word `function`, or its name.
    Word(String),
    Call(NamedCall, &'static [&'static str]),
    /// Behind the arguments.
    End(Closing),
}

impl Body for Calls {
    fn push(&mut self, c: char, found: &mut Found) -> Step {
        match &mut self.at {
            At::Between(marks) => match marks.push(c) {
                Ok(None) => {}
                Ok(Some(CLOSE)) => return Step::Done,
                Ok(Some(_)) => self.at = At::Word(String::new()),
                Err(()) => return Step::Wrong,
            },
            At::Word(word) => {
                word.push(c);
                if word.len() > 256 {
                    return Step::Wrong;
                }
                match word.strip_suffix(PART).map(str::trim) {
                    None => {}
                    Some("function") => {
                        let call = NamedCall::new(&self.names, &["```json", "```"], None);
                        self.at = At::Call(call, &["```<｜tool▁call▁end｜>", END]);
                    }
                    Some(name) => {
                        let mut call = NamedCall::new(&self.names, &[], None);
                        for c in name.chars() {
                            // The name is all that is read before the arguments begin.
                            if c == '{' || call.push(c, found) != Step::More {
                                return Step::Wrong;
                            }
                        }
                        self.at = At::Call(call, &[END]);
                    }
                }
            }
            At::Call(call, end) => match call.push(c, found) {
                Step::CallDone => {
                    self.at = At::End(Closing::new(end));
                    return Step::CallDone;
                }
                step => return step,
            },
            At::End(closing) => match closing.push(c) {
                Ok(None) => {}
                Ok(Some(_)) => self.at = At::Between(Closing::new(&[BEGIN, CLOSE])),
                // In V3 a fence may end in a line of its own.
                Err(()) => return Step::Wrong,
            },
        }
        Step::More
    }
}
