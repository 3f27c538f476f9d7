//! Calls as Python: the whole answer is `[f(a=1, b="x"), g()]`. Their arguments are told as JSON.

use super::{
    ArgumentForm, Format, Names, Parser, Spelling,
    found::Found,
    python::{Literal, Scan},
    sections::{Body, Opening, Sections, Step},
};

const BEGIN: &str = "<|python_start|>";
const LONGEST_NAME: usize = 256;

/// The format.
pub struct Pythonic;

impl Format for Pythonic {
    fn names(&self) -> &'static [&'static str] {
        &["pythonic", "llama4_pythonic"]
    }

    fn marks(&self) -> &'static [&'static str] {
        &[BEGIN]
    }

    fn is_that_of(&self, template: &str) -> bool {
        template.contains("[func_name1(params_name1=")
    }

    fn families(&self) -> &'static [&'static str] {
        &["llama4"]
    }

    fn parser(&self, names: &Names) -> Box<dyn Parser> {
        let names = names.clone();
        let opening = Opening { marks: &[BEGIN], first: Some('[') };
        Box::new(Sections::new(opening, move || Calls { names: names.clone(), at: At::Begin, is_first: true }))
    }

    fn spelling(&self, _: &str) -> Spelling {
        Spelling {
            open: "[",
            middle: "(",
            after: ")",
            between: Some(", "),
            close: "]",
            first: Some('['),
            arguments: ArgumentForm::Keywords,
            ..Spelling::default()
        }
    }
}

struct Calls {
    names: Names,
    at: At,
    /// Whether the call has no argument yet.
    is_first: bool,
}

enum At {
    /// Before `[`.
    Begin,
    Name(String),
    /// After `(`: an argument, or the end.
    Key(String),
    Value(Literal),
    /// After an argument.
    AfterValue,
    AfterCall,
}

fn is_of_name(c: char) -> bool {
    c.is_alphanumeric() || "_.:/-".contains(c)
}

impl Calls {
    fn after_value(&mut self, c: char, found: &mut Found) -> Step {
        match c {
            ',' => self.at = At::Key(String::new()),
            ')' => return self.end(found),
            c if c.is_whitespace() => {}
            _ => return Step::Wrong,
        }
        Step::More
    }

    fn end(&mut self, found: &mut Found) -> Step {
        found.arguments("}");
        self.at = At::AfterCall;
        Step::CallDone
    }
}

impl Body for Calls {
    fn push(&mut self, c: char, found: &mut Found) -> Step {
        match &mut self.at {
            At::Begin if c == '[' => self.at = At::Name(String::new()),
            At::Begin if c.is_whitespace() => {}
            At::Begin => return Step::Wrong,
            At::Name(name) => match c {
                c if c.is_whitespace() && name.is_empty() => {}
                c if is_of_name(c) && name.len() < LONGEST_NAME => name.push(c),
                '(' if self.names.contains(name) => {
                    found.call(name);
                    found.arguments("{");
                    self.is_first = true;
                    self.at = At::Key(String::new());
                }
                _ => return Step::Wrong,
            },
            At::Key(key) => match c {
                ')' if key.is_empty() => return self.end(found),
                c if c.is_whitespace() => {}
                c if is_of_name(c) && key.len() < LONGEST_NAME => key.push(c),
                '=' if !key.is_empty() => {
                    if !std::mem::replace(&mut self.is_first, false) {
                        found.arguments(", ");
                    }
                    found.arguments(&format!("{}: ", serde_json::Value::from(key.as_str())));
                    self.at = At::Value(Literal::new());
                }
                _ => return Step::Wrong,
            },
            At::Value(literal) => match literal.push(c, found) {
                Scan::More => {}
                Scan::Done => self.at = At::AfterValue,
                Scan::Past => return self.after_value(c, found),
                Scan::Wrong => return Step::Wrong,
            },
            At::AfterValue => return self.after_value(c, found),
            At::AfterCall => match c {
                ',' => self.at = At::Name(String::new()),
                ']' => return Step::Done,
                c if c.is_whitespace() => {}
                _ => return Step::Wrong,
            },
        }
        Step::More
    }
}
