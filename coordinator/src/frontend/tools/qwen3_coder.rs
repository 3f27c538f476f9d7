//! Qwen3-Coder: `<tool_call><function=f><parameter=key>value</parameter></function></tool_call>`, values in lines of their own.

use super::{
    ArgumentForm, ElementSpelling, Format, Names, Parser, Spelling,
    elements::{ElementCall, Elements},
    sections::{Opening, Sections},
};

const CALL: &str = "<tool_call>";
const FUNCTION: &str = "<function=";

static ELEMENTS: Elements = Elements {
    head: Some(&[FUNCTION]),
    name_end: '>',
    next: &["<parameter=", "</function>"],
    key_end: ">",
    value: None,
    value_end: "</parameter>",
    has_lines: true,
    close: Some(&["</tool_call>"]),
};

static SPELLING: ElementSpelling =
    ElementSpelling { before: "<parameter=", middle: ">\n", end: "</parameter>", after: "\n", has_lines: true };

/// The format.
pub struct Qwen3Coder;

impl Format for Qwen3Coder {
    fn names(&self) -> &'static [&'static str] {
        &["qwen3_coder", "qwen3_xml"]
    }

    fn marks(&self) -> &'static [&'static str] {
        &[CALL, "</tool_call>"]
    }

    fn is_that_of(&self, template: &str) -> bool {
        template.contains(FUNCTION)
    }

    fn families(&self) -> &'static [&'static str] {
        &["qwen3next", "qwen3_next"]
    }

    fn parser(&self, names: &Names) -> Box<dyn Parser> {
        let names = names.clone();
        // Some models leave the first mark out.
        let opening = Opening { marks: &[CALL, FUNCTION], first: None };
        Box::new(Sections::marked(opening, move |mark| ElementCall::new(&ELEMENTS, &names, mark == FUNCTION)))
    }

    fn spelling(&self, _: &str) -> Spelling {
        Spelling {
            before: "<tool_call>\n<function=",
            middle: ">\n",
            after: "</function>\n</tool_call>",
            between: Some("\n"),
            arguments: ArgumentForm::Elements(&SPELLING),
            ..Spelling::default()
        }
    }
}
