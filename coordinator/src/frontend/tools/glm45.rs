//! GLM-4.5 and later: `<tool_call>f<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`, in lines up to GLM-4.6.

use super::{
    ArgumentForm, ElementSpelling, Format, Names, Parser, Spelling,
    elements::{ElementCall, Elements},
    sections::{Opening, Sections},
};

const CALL: &str = "<tool_call>";

static ELEMENTS: Elements = Elements {
    head: None,
    name_end: '<',
    next: &["<arg_key>", "</tool_call>"],
    key_end: "</arg_key>",
    value: Some(&["<arg_value>"]),
    value_end: "</arg_value>",
    has_lines: false,
    close: None,
};

static IN_LINES: ElementSpelling = ElementSpelling {
    before: "<arg_key>",
    middle: "</arg_key>\n<arg_value>",
    end: "</arg_value>",
    after: "\n",
    has_lines: false,
};

static IN_ONE_LINE: ElementSpelling = ElementSpelling {
    before: "<arg_key>",
    middle: "</arg_key><arg_value>",
    end: "</arg_value>",
    after: "",
    has_lines: false,
};

/// The format.
pub struct Glm45;

impl Format for Glm45 {
    fn names(&self) -> &'static [&'static str] {
        &["glm45", "glm47", "glm4_moe"]
    }

    fn marks(&self) -> &'static [&'static str] {
        &[CALL, "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
    }

    fn is_that_of(&self, template: &str) -> bool {
        template.contains("<arg_key>")
    }

    fn families(&self) -> &'static [&'static str] {
        &["glm4_moe", "glm4moe"]
    }

    fn parser(&self, names: &Names) -> Box<dyn Parser> {
        let names = names.clone();
        let opening = Opening { marks: &[CALL], first: None };
        Box::new(Sections::new(opening, move || ElementCall::new(&ELEMENTS, &names, false)))
    }

    fn spelling(&self, template: &str) -> Spelling {
        let is_one_line = template.contains("</arg_key><arg_value>");
        Spelling {
            before: CALL,
            middle: if is_one_line { "" } else { "\n" },
            after: "</tool_call>",
            between: Some(if is_one_line { "" } else { "\n" }),
            arguments: ArgumentForm::Elements(if is_one_line { &IN_ONE_LINE } else { &IN_LINES }),
            ..Spelling::default()
        }
    }
}
