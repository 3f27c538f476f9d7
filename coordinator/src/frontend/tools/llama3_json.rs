//! Llama 3: the whole answer is `{"name": "f", "parameters": {…}}`, perhaps after `<|python_tag|>`; several are parted by `;`.

use super::{
    Format, Names, Parser, Spelling,
    call_object::CallObject,
    found::Found,
    json::Scan,
    sections::{Body, Opening, Sections, Step},
};

const TAG: &str = "<|python_tag|>";

/// The format.
pub struct Llama3Json;

impl Format for Llama3Json {
    fn names(&self) -> &'static [&'static str] {
        &["llama3_json", "llama4_json"]
    }

    fn marks(&self) -> &'static [&'static str] {
        &[TAG]
    }

    fn is_that_of(&self, template: &str) -> bool {
        template.contains(TAG) || template.contains("\"parameters\": dictionary of argument name")
    }

    fn families(&self) -> &'static [&'static str] {
        &["llama"]
    }

    fn parser(&self, names: &Names) -> Box<dyn Parser> {
        let names = names.clone();
        let opening = Opening { marks: &[TAG], first: Some('{') };
        let body = move || LlamaCalls { call: Some(CallObject::new(&names)), names: names.clone() };
        Box::new(Sections::new(opening, body))
    }

    fn spelling(&self, _: &str) -> Spelling {
        Spelling {
            before: "{\"name\": \"",
            middle: "\", \"parameters\": ",
            after: "}",
            between: Some("; "),
            first: Some('{'),
            ..Spelling::default()
        }
    }
}

struct LlamaCalls {
    names: Names,
    /// None between two calls.
    call: Option<CallObject>,
}

impl Body for LlamaCalls {
    fn push(&mut self, c: char, found: &mut Found) -> Step {
        if self.call.is_none() {
            match c {
                ';' | ',' => return Step::More,
                '{' => self.call = Some(CallObject::new(&self.names)),
                c if c.is_whitespace() => return Step::More,
                _ => return Step::Past,
            }
        }
        let Some(call) = &mut self.call else { return Step::More };
        match call.push(c, found) {
            Scan::More => Step::More,
            Scan::Wrong => Step::Wrong,
            Scan::Done => {
                self.call = None;
                Step::CallDone
            }
        }
    }
}
