//! Kimi-K2: a section of calls, each named `functions.f:0`, with the number of the call in the conversation. The model knows
//! its calls by these names.

use super::{
    Format, Names, Parser, Spelling,
    found::Found,
    json::{ObjectScan, Scan},
    sections::{Body, Closing, Opening, Sections, Step},
};

const OPEN: &str = "<|tool_calls_section_begin|>";
const CLOSE: &str = "<|tool_calls_section_end|>";
const BEGIN: &str = "<|tool_call_begin|>";
const END: &str = "<|tool_call_end|>";
const ARGUMENTS: &str = "<|tool_call_argument_begin|>";
/// Longest name of a call, with the mark behind it.
const LONGEST_NAME: usize = 256;

/// The format.
pub struct KimiK2;

impl Format for KimiK2 {
    fn names(&self) -> &'static [&'static str] {
        &["kimi_k2"]
    }

    fn marks(&self) -> &'static [&'static str] {
        &[OPEN, CLOSE, BEGIN, END, ARGUMENTS]
    }

    fn is_that_of(&self, template: &str) -> bool {
        template.contains(OPEN)
    }

    fn families(&self) -> &'static [&'static str] {
        &["kimi_k2"]
    }

    fn parser(&self, names: &Names) -> Box<dyn Parser> {
        let names = names.clone();
        let opening = Opening { marks: &[OPEN], first: None };
        let body = move || Calls { names: names.clone(), at: At::Between(Closing::new(&[BEGIN])) };
        Box::new(Sections::new(opening, body))
    }

    fn spelling(&self, _: &str) -> Spelling {
        Spelling {
            open: OPEN,
            before: "<|tool_call_begin|>functions.",
            number: Some(":"),
            middle: ARGUMENTS,
            after: END,
            between: Some(""),
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
    Name(String),
    /// Before the arguments of a call.
    Begin {
        name: String,
        id: String,
    },
    Arguments(ObjectScan),
    /// Behind them.
    End(Closing),
}

impl Calls {
    /// The tool that a call's name names.
    fn tool_of(&self, id: &str) -> Option<String> {
        let (function, number) = id.rsplit_once(':')?;
        let name = function.strip_prefix("functions.").unwrap_or(function);
        let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        (is_number && self.names.contains(name)).then(|| name.to_owned())
    }
}

impl Body for Calls {
    fn push(&mut self, c: char, found: &mut Found) -> Step {
        match &mut self.at {
            At::Between(closing) => match closing.push(c) {
                Ok(None) => {}
                Ok(Some(CLOSE)) => return Step::Done,
                Ok(Some(_)) => self.at = At::Name(String::new()),
                Err(()) => return Step::Wrong,
            },
            At::Name(name) => {
                name.push(c);
                if let Some(id) = name.strip_suffix(ARGUMENTS).map(|id| id.trim().to_owned()) {
                    match self.tool_of(&id) {
                        Some(name) => self.at = At::Begin { name, id },
                        None => return Step::Wrong,
                    }
                } else if name.len() > LONGEST_NAME {
                    return Step::Wrong;
                }
            }
            At::Begin { .. } if c.is_whitespace() => {}
            At::Begin { name, id } => {
                let mut scan = ObjectScan::new();
                if scan.push(c) == Scan::Wrong {
                    return Step::Wrong;
                }
                found.call_with_id(name, id);
                found.arguments(c.encode_utf8(&mut [0; 4]));
                self.at = At::Arguments(scan);
            }
            At::Arguments(scan) => {
                let step = scan.push(c);
                if step != Scan::Wrong {
                    found.arguments(c.encode_utf8(&mut [0; 4]));
                }
                match step {
                    Scan::More => {}
                    Scan::Wrong => return Step::Wrong,
                    Scan::Done => {
                        self.at = At::End(Closing::new(&[END]));
                        return Step::CallDone;
                    }
                }
            }
            At::End(closing) => match closing.push(c) {
                Ok(None) => {}
                Ok(Some(_)) => self.at = At::Between(Closing::new(&[BEGIN, CLOSE])),
                Err(()) => return Step::Wrong,
            },
        }
        Step::More
    }
}
