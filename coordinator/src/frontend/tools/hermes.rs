//! Hermes, Qwen and many others: `<tool_call>{"name": "f", "arguments": {…}}</tool_call>`, one section per call.

use super::{
    Format, Names, Parser, Spelling,
    call_object::CallObject,
    found::Found,
    json::Scan,
    sections::{Body, Closing, Opening, Sections, Step},
};

/// The format.
pub struct Hermes;

impl Format for Hermes {
    fn names(&self) -> &'static [&'static str] {
        &["hermes", "qwen", "qwen25", "qwen3"]
    }

    fn marks(&self) -> &'static [&'static str] {
        &["<tool_call>", "</tool_call>"]
    }

    fn is_that_of(&self, template: &str) -> bool {
        template.contains("<tool_call>")
    }

    fn families(&self) -> &'static [&'static str] {
        &["qwen2", "qwen3", "qwen2moe", "qwen3moe"]
    }

    fn parser(&self, names: &Names) -> Box<dyn Parser> {
        let names = names.clone();
        let opening = Opening { marks: &["<tool_call>"], first: None };
        Box::new(Sections::new(opening, move || HermesCall { call: CallObject::new(&names), closing: None }))
    }

    fn spelling(&self, _: &str) -> Spelling {
        Spelling {
            before: "<tool_call>\n{\"name\": \"",
            middle: "\", \"arguments\": ",
            after: "}\n</tool_call>",
            between: Some("\n"),
            ..Spelling::default()
        }
    }
}

struct HermesCall {
    call: CallObject,
    /// Once the call is complete.
    closing: Option<Closing>,
}

impl Body for HermesCall {
    fn push(&mut self, c: char, found: &mut Found) -> Step {
        if let Some(closing) = &mut self.closing {
            return match closing.push(c) {
                Ok(None) => Step::More,
                Ok(Some(_)) => Step::Done,
                // Some models leave the mark out.
                Err(()) => Step::Past,
            };
        }
        match self.call.push(c, found) {
            Scan::More => Step::More,
            Scan::Wrong => Step::Wrong,
            Scan::Done => {
                self.closing = Some(Closing::new(&["</tool_call>"]));
                Step::CallDone
            }
        }
    }
}
