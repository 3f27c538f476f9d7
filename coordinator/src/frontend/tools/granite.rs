//! Granite: `<|tool_call|>` or `<tool_call>`, then a JSON list of calls.

use super::{
    Format, Names, Parser, Spelling,
    call_list::CallList,
    sections::{Opening, Sections},
};

const MARK: &str = "<|tool_call|>";

/// The format.
pub struct Granite;

impl Format for Granite {
    fn names(&self) -> &'static [&'static str] {
        &["granite"]
    }

    fn marks(&self) -> &'static [&'static str] {
        &[MARK, "<tool_call>"]
    }

    fn is_that_of(&self, template: &str) -> bool {
        template.contains(MARK)
    }

    fn families(&self) -> &'static [&'static str] {
        &["granite"]
    }

    fn parser(&self, names: &Names) -> Box<dyn Parser> {
        let names = names.clone();
        Box::new(Sections::new(Opening { marks: self.marks(), first: None }, move || CallList::new(&names)))
    }

    fn spelling(&self, template: &str) -> Spelling {
        Spelling {
            open: if template.contains(MARK) { "<|tool_call|>[" } else { "<tool_call>[" },
            before: "{\"name\": \"",
            middle: "\", \"arguments\": ",
            after: "}",
            between: Some(", "),
            close: "]",
            ..Spelling::default()
        }
    }
}
