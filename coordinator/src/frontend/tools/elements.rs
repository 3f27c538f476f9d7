//! Calls whose arguments are elements, each with a key and a value that is no JSON if it is a text. They are told as JSON.

use serde_json::Value;

use super::{
    Names,
    found::Found,
    kinds::Kinds,
    sections::{Body, Closing, Step},
};

/// Longest name of a tool or of a parameter.
const LONGEST_NAME: usize = 256;
/// Most bytes of a value that is read as a whole.
const MOST_KEPT: usize = 1 << 20;

/// How they are marked.
#[derive(Debug)]
pub struct Elements {
    /// Stands before the name, behind what the section begins with.
    pub head: Option<&'static [&'static str]>,
    /// Ends the name. If it begins a mark, it belongs to that.
    pub name_end: char,
    /// What may follow the name or an argument: the beginning of an argument, and the end of the call.
    pub next: &'static [&'static str; 2],
    /// Ends a key.
    pub key_end: &'static str,
    /// Stands between that and the value.
    pub value: Option<&'static [&'static str]>,
    /// Ends a value.
    pub value_end: &'static str,
    /// Whether values stand in lines of their own: a line break at either end is not theirs.
    pub has_lines: bool,
    /// What ends the section, if the end of the call does not. Some models leave it out.
    pub close: Option<&'static [&'static str]>,
}

enum At {
    Head(Closing),
    Name(String),
    /// Before an argument, or the end.
    Next(Closing),
    Key(String),
    ToValue(Closing),
    /// In a value that can be nothing but a text.
    Text(TextValue),
    /// In another, of which all is needed to know what it is.
    Other(String),
    Close(Closing),
}

/// Reads one.
pub struct ElementCall {
    form: &'static Elements,
    names: Names,
    at: At,
    name: String,
    kinds: Kinds,
    has_begun: bool,
    n_arguments: usize,
}

impl ElementCall {
    /// At its beginning; `is_headed` says that what stands before the name has been read.
    pub fn new(form: &'static Elements, names: &Names, is_headed: bool) -> Self {
        let at = match form.head {
            Some(head) if !is_headed => At::Head(Closing::new(head)),
            _ => At::Name(String::new()),
        };
        let (names, name) = (names.clone(), String::new());
        Self { form, names, at, name, kinds: Kinds::ALL, has_begun: false, n_arguments: 0 }
    }

    /// The name is there: more must follow before it is a call.
    fn named(&mut self, c: char, found: &mut Found) -> Step {
        let At::Name(name) = &self.at else { return Step::Wrong };
        name.trim().clone_into(&mut self.name);
        if !self.names.contains(&self.name) {
            return Step::Wrong;
        }
        self.at = self.next();
        if self.form.next.iter().any(|mark| mark.starts_with(c)) { self.push(c, found) } else { Step::More }
    }

    fn next(&self) -> At {
        At::Next(Closing::new(self.form.next))
    }

    fn follow(&mut self, mark: &str, found: &mut Found) -> Step {
        if !std::mem::replace(&mut self.has_begun, true) {
            found.call(&self.name);
            found.arguments("{");
        }
        if mark == self.form.next[0] {
            self.at = At::Key(String::new());
            return Step::More;
        }
        found.arguments("}");
        match self.form.close {
            Some(marks) => {
                self.at = At::Close(Closing::new(marks));
                Step::CallDone
            }
            None => Step::Done,
        }
    }

    fn key(&mut self, key: &str, found: &mut Found) {
        let key = key.trim();
        self.kinds = self.names.kinds(&self.name, key);
        let comma = if self.n_arguments > 0 { ", " } else { "" };
        self.n_arguments += 1;
        found.arguments(&format!("{comma}{}: ", Value::from(key)));
        self.at = match self.form.value {
            Some(marks) => At::ToValue(Closing::new(marks)),
            None => self.begin_value(found),
        };
    }

    fn begin_value(&self, found: &mut Found) -> At {
        if self.kinds == Kinds::TEXT {
            found.arguments("\"");
            At::Text(TextValue { held: String::new(), is_first: true })
        } else {
            At::Other(String::new())
        }
    }
}

impl Body for ElementCall {
    fn push(&mut self, c: char, found: &mut Found) -> Step {
        let form = self.form;
        match &mut self.at {
            At::Head(closing) => match closing.push(c) {
                Ok(None) => {}
                Ok(Some(_)) => self.at = At::Name(String::new()),
                Err(()) => return Step::Wrong,
            },
            At::Name(_) if c == form.name_end => return self.named(c, found),
            At::Name(name) => {
                name.push(c);
                if name.len() > LONGEST_NAME {
                    return Step::Wrong;
                }
            }
            At::Next(closing) => match closing.push(c) {
                Ok(None) => {}
                Ok(Some(mark)) => return self.follow(mark, found),
                Err(()) => return Step::Wrong,
            },
            At::Key(key) => {
                key.push(c);
                if let Some(whole) = key.strip_suffix(form.key_end) {
                    let whole = whole.to_owned();
                    self.key(&whole, found);
                } else if key.len() > LONGEST_NAME {
                    return Step::Wrong;
                }
            }
            At::ToValue(closing) => match closing.push(c) {
                Ok(None) => {}
                Ok(Some(_)) => self.at = self.begin_value(found),
                Err(()) => return Step::Wrong,
            },
            At::Text(text) => {
                if text.push(c, form, found) {
                    found.arguments("\"");
                    self.at = self.next();
                }
            }
            At::Other(raw) => {
                raw.push(c);
                if let Some(whole) = raw.strip_suffix(form.value_end) {
                    found.arguments(&json_of(whole, self.kinds, form.has_lines));
                    self.at = self.next();
                } else if raw.len() > MOST_KEPT {
                    return Step::Wrong;
                }
            }
            At::Close(closing) => {
                return match closing.push(c) {
                    Ok(None) => Step::More,
                    Ok(Some(_)) => Step::Done,
                    Err(()) => Step::Past,
                };
            }
        }
        Step::More
    }
}

/// A text, told as it comes. What may be its end is held back.
struct TextValue {
    held: String,
    is_first: bool,
}

impl TextValue {
    /// Takes the next character; whether the text is over.
    fn push(&mut self, c: char, form: &Elements, found: &mut Found) -> bool {
        if std::mem::replace(&mut self.is_first, false) && form.has_lines && c == '\n' {
            return false;
        }
        self.held.push(c);
        while !self.held.is_empty() {
            let mark = match self.held.strip_prefix('\n') {
                Some(rest) if form.has_lines => rest,
                _ => self.held.as_str(),
            };
            if form.value_end == mark {
                return true;
            }
            if form.value_end.starts_with(mark) {
                return false;
            }
            let first = self.held.remove(0);
            found.arguments(&escaped(first.encode_utf8(&mut [0; 4])));
        }
        false
    }
}

/// A text as it stands in JSON, without quotes.
fn escaped(text: &str) -> String {
    let quoted = Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

/// What a value is: JSON, if it is some that fits; Python's names of constants; else a text.
fn json_of(raw: &str, kinds: Kinds, has_lines: bool) -> String {
    let trimmed = raw.trim();
    let python = match trimmed {
        "True" => "true",
        "False" => "false",
        "None" => "null",
        other => other,
    };
    for json in [trimmed, python] {
        // A text has no quotes here: what has some is one with quotes.
        if let Ok(value) = serde_json::from_str::<Value>(json)
            && (kinds.meets(Kinds::of_value(&value)) || !kinds.meets(Kinds::TEXT))
            && !(value.is_string() && kinds != Kinds::ALL)
        {
            return json.to_owned();
        }
    }
    let mut text = raw;
    if has_lines {
        text = text.strip_prefix('\n').unwrap_or(text);
        text = text.strip_suffix('\n').unwrap_or(text);
    }
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_what_schemas_say() {
        let kinds = |schema: Value| Kinds::of_schema(&schema, &serde_json::Map::new());
        for (schema, raw, json) in [
            (json!({"type": "integer"}), "\n5\n", "5"),
            (json!({"type": "boolean"}), "True", "true"),
            (json!({"type": ["string", "null"]}), "None", "null"),
            (json!({"type": ["string", "null"]}), "5", "\"5\""),
            (json!({"type": ["string", "integer"]}), "5", "5"),
            (json!({"type": "array"}), "\n[1, {\"a\":  2}]\n", "[1, {\"a\":  2}]"),
            (json!({"type": "object"}), "{oops", "\"{oops\""),
            (json!({"type": "integer"}), "[1]", "[1]"),
            (json!({}), "Paris", "\"Paris\""),
            (json!({}), "\n two\nlines \n", "\" two\\nlines \""),
            (json!({}), "true", "true"),
            (json!({}), "\"quoted\"", "\"quoted\""),
            (json!({"type": ["string", "null"]}), "\"quoted\"", "\"\\\"quoted\\\"\""),
        ] {
            assert_eq!(json_of(raw, kinds(schema.clone()), true), json, "{raw:?} {schema}");
        }
        assert_eq!(escaped("\"\n\u{1}é"), "\\\"\\n\\u0001é");
    }
}
