//! Mistral: `[TOOL_CALLS]` and a JSON list of calls, or, since 2025, `[TOOL_CALLS]f[ARGS]{…}` per call.

use super::{
    Format, Ids, Names, Parser, Spelling,
    call_list::CallList,
    found::Found,
    named_call::NamedCall,
    sections::{Body, Opening, Sections, Step},
};

const MARK: &str = "[TOOL_CALLS]";
const ARGUMENTS: &str = "[ARGS]";
const CALL_ID: &str = "[CALL_ID]";

/// The format.
pub struct Mistral;

impl Format for Mistral {
    fn names(&self) -> &'static [&'static str] {
        &["mistral"]
    }

    fn marks(&self) -> &'static [&'static str] {
        &[MARK, ARGUMENTS, CALL_ID]
    }

    fn is_that_of(&self, template: &str) -> bool {
        template.contains(MARK)
    }

    fn families(&self) -> &'static [&'static str] {
        &["mistral", "mistral3", "mixtral"]
    }

    fn ids(&self) -> Ids {
        // Its templates refuse others.
        Ids::NineLetters
    }

    fn parser(&self, names: &Names) -> Box<dyn Parser> {
        let names = names.clone();
        let opening = Opening { marks: &[MARK], first: None };
        Box::new(Sections::new(opening, move || MistralCalls::Begin(names.clone())))
    }

    fn spelling(&self, template: &str) -> Spelling {
        if template.contains(ARGUMENTS) {
            return Spelling { before: MARK, middle: ARGUMENTS, between: Some(""), ..Spelling::default() };
        }
        Spelling {
            open: "[TOOL_CALLS][",
            before: "{\"name\": \"",
            middle: "\", \"arguments\": ",
            after: "}",
            between: Some(", "),
            close: "]",
            ..Spelling::default()
        }
    }
}

enum MistralCalls {
    Begin(Names),
    List(CallList),
    Named(NamedCall),
}

impl Body for MistralCalls {
    fn push(&mut self, c: char, found: &mut Found) -> Step {
        match self {
            Self::Begin(_) if c.is_whitespace() => return Step::More,
            Self::Begin(names) if c == '[' => *self = Self::List(CallList::new(names)),
            // A name for the call may stand before its arguments.
            Self::Begin(names) => *self = Self::Named(NamedCall::new(names, &[ARGUMENTS], Some(CALL_ID))),
            Self::List(_) | Self::Named(_) => {}
        }
        match self {
            Self::Begin(_) => Step::More,
            Self::List(list) => list.push(c, found),
            // A call is a section.
            Self::Named(call) => match call.push(c, found) {
                Step::CallDone => Step::Done,
                step => step,
            },
        }
    }
}
