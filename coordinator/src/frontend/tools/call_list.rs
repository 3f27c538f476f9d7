//! Calls in a JSON list: `[{"name": "f", "arguments": {…}}, …]`.

use super::{
    Names,
    call_object::CallObject,
    found::Found,
    json::Scan,
    sections::{Body, Step},
};

enum At {
    Begin,
    /// After `[`: a call, or the end.
    First,
    Call(Box<CallObject>),
    AfterCall,
    /// After a comma.
    Next,
}

/// Reads one.
pub struct CallList {
    names: Names,
    at: At,
}

impl CallList {
    /// Before its `[`.
    pub fn new(names: &Names) -> Self {
        Self { names: names.clone(), at: At::Begin }
    }
}

impl Body for CallList {
    fn push(&mut self, c: char, found: &mut Found) -> Step {
        self.at = match &mut self.at {
            At::Call(call) => match call.push(c, found) {
                Scan::More => return Step::More,
                Scan::Wrong => return Step::Wrong,
                Scan::Done => {
                    self.at = At::AfterCall;
                    return Step::CallDone;
                }
            },
            _ if c.is_whitespace() => return Step::More,
            At::Begin if c == '[' => At::First,
            At::First if c == ']' => return Step::Wrong,
            At::AfterCall if c == ']' => return Step::Done,
            At::AfterCall if c == ',' => At::Next,
            At::First | At::Next => {
                let mut call = CallObject::new(&self.names);
                if call.push(c, found) == Scan::Wrong {
                    return Step::Wrong;
                }
                At::Call(Box::new(call))
            }
            At::Begin | At::AfterCall => return Step::Wrong,
        };
        Step::More
    }
}
