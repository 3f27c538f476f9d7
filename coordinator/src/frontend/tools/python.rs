//! Python's literals, character by character, as JSON.

use super::found::Found;

/// Deeper nesting is no arguments of anything.
const DEEPEST: usize = 128;
/// Longest number or word.
const LONGEST_WORD: usize = 64;

/// What a character means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// More must follow.
    More,
    /// It is the last one.
    Done,
    /// The literal ended before it.
    Past,
    /// It can't stand here.
    Wrong,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Open {
    List,
    Tuple,
    Dict,
}

#[derive(Debug)]
enum At {
    Value,
    /// After an opening bracket or a comma: a value (or key), or the end.
    Item {
        is_first: bool,
    },
    Colon,
    DictValue,
    AfterItem,
    Text {
        quote: char,
        is_key: bool,
    },
    /// After a backslash.
    Escape {
        quote: char,
        is_key: bool,
    },
    /// Hexadecimal digits of an escape.
    Code {
        quote: char,
        is_key: bool,
        digits: String,
        n_wanted: usize,
    },
    Word(String),
}

/// Reads one.
#[derive(Debug)]
pub struct Literal {
    open: Vec<Open>,
    at: At,
}

/// A character of a JSON string.
fn tell(c: char, found: &mut Found) {
    let quoted = serde_json::Value::from(c.to_string()).to_string();
    found.arguments(quoted.trim_start_matches('"').strip_suffix('"').unwrap_or_default());
}

impl Literal {
    /// Before it.
    pub fn new() -> Self {
        Self { open: Vec::new(), at: At::Value }
    }

    /// Takes the next character.
    pub fn push(&mut self, c: char, found: &mut Found) -> Scan {
        match std::mem::replace(&mut self.at, At::AfterItem) {
            at @ (At::Value | At::Item { .. } | At::Colon | At::DictValue) if c.is_whitespace() => self.stay(at),
            At::Value | At::DictValue => self.value(c, found),
            At::Item { is_first } => self.item(c, is_first, found),
            At::Colon if c == ':' => {
                found.arguments(": ");
                self.stay(At::DictValue)
            }
            At::Colon => Scan::Wrong,
            At::AfterItem => self.after_item(c, found),
            At::Text { quote, is_key } => match c {
                c if c == quote => {
                    found.arguments("\"");
                    if is_key { self.stay(At::Colon) } else { self.after_value() }
                }
                '\\' => self.stay(At::Escape { quote, is_key }),
                '\n' | '\r' => Scan::Wrong,
                c => {
                    tell(c, found);
                    self.stay(At::Text { quote, is_key })
                }
            },
            At::Escape { quote, is_key } => self.escape(c, quote, is_key, found),
            At::Code { quote, is_key, mut digits, n_wanted } => {
                digits.push(c);
                if !c.is_ascii_hexdigit() {
                    return Scan::Wrong;
                }
                if digits.len() < n_wanted {
                    return self.stay(At::Code { quote, is_key, digits, n_wanted });
                }
                let code = u32::from_str_radix(&digits, 16).unwrap_or_default();
                // A half of a surrogate pair is no character.
                tell(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), found);
                self.stay(At::Text { quote, is_key })
            }
            At::Word(mut word) => {
                if c.is_alphanumeric() || "_+-.".contains(c) {
                    word.push(c);
                    return if word.len() <= LONGEST_WORD { self.stay(At::Word(word)) } else { Scan::Wrong };
                }
                let Some(json) = json_of(&word) else { return Scan::Wrong };
                found.arguments(&json);
                if self.open.is_empty() { Scan::Past } else { self.after_item(c, found) }
            }
        }
    }

    fn stay(&mut self, at: At) -> Scan {
        self.at = at;
        Scan::More
    }

    fn after_value(&mut self) -> Scan {
        if self.open.is_empty() { Scan::Done } else { self.stay(At::AfterItem) }
    }

    fn value(&mut self, c: char, found: &mut Found) -> Scan {
        let (open, bracket) = match c {
            '"' | '\'' => {
                found.arguments("\"");
                return self.stay(At::Text { quote: c, is_key: false });
            }
            '[' => (Open::List, "["),
            '(' => (Open::Tuple, "["),
            '{' => (Open::Dict, "{"),
            c if c.is_ascii_alphanumeric() || c == '-' => return self.stay(At::Word(c.to_string())),
            _ => return Scan::Wrong,
        };
        if self.open.len() == DEEPEST {
            return Scan::Wrong;
        }
        self.open.push(open);
        found.arguments(bracket);
        self.stay(At::Item { is_first: true })
    }

    fn item(&mut self, c: char, is_first: bool, found: &mut Found) -> Scan {
        if let Some(step) = self.closes(c, found) {
            return step;
        }
        if !is_first {
            found.arguments(", ");
        }
        match (self.open.last(), c) {
            (Some(Open::Dict), '"' | '\'') => {
                found.arguments("\"");
                self.stay(At::Text { quote: c, is_key: true })
            }
            (Some(Open::Dict), _) => Scan::Wrong,
            _ => self.value(c, found),
        }
    }

    fn after_item(&mut self, c: char, found: &mut Found) -> Scan {
        match c {
            ',' => self.stay(At::Item { is_first: false }),
            c if c.is_whitespace() => self.stay(At::AfterItem),
            c => self.closes(c, found).unwrap_or(Scan::Wrong),
        }
    }

    /// Closes the innermost bracket, if the character does that.
    fn closes(&mut self, c: char, found: &mut Found) -> Option<Scan> {
        let bracket = match (self.open.last()?, c) {
            (Open::List, ']') | (Open::Tuple, ')') => "]",
            (Open::Dict, '}') => "}",
            _ => return None,
        };
        self.open.pop();
        found.arguments(bracket);
        Some(self.after_value())
    }

    fn escape(&mut self, c: char, quote: char, is_key: bool, found: &mut Found) -> Scan {
        let code = |n_wanted| At::Code { quote, is_key, digits: String::new(), n_wanted };
        let meant = match c {
            'x' => return self.stay(code(2)),
            'u' => return self.stay(code(4)),
            'U' => return self.stay(code(8)),
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'b' => '\u{8}',
            'f' => '\u{c}',
            '\\' | '\'' | '"' | '/' => c,
            c => {
                // As in Python, a backslash that escapes nothing is one.
                tell('\\', found);
                c
            }
        };
        tell(meant, found);
        self.stay(At::Text { quote, is_key })
    }
}

/// A number or a word as JSON.
fn json_of(word: &str) -> Option<String> {
    Some(match word {
        "True" | "true" => "true".to_owned(),
        "False" | "false" => "false".to_owned(),
        "None" | "null" => "null".to_owned(),
        word => {
            // As it is written, if it is a number in JSON too: `1.` is one in Python alone.
            let plain = word.replace('_', "");
            let is_json = serde_json::from_str::<serde_json::Number>(&plain).is_ok();
            if is_json { plain } else { serde_json::Number::from_f64(plain.parse().ok()?)?.to_string() }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::tools::found::Part;

    fn read(text: &str) -> Option<String> {
        let (mut literal, mut found) = (Literal::new(), Found::default());
        // Something that ends words.
        for c in text.chars().chain([')']) {
            match literal.push(c, &mut found) {
                Scan::More => {}
                Scan::Wrong => return None,
                Scan::Done | Scan::Past => match found.take().as_slice() {
                    [Part::Arguments(json)] => return Some(json.clone()),
                    other => panic!("{other:?}"),
                },
            }
        }
        None
    }

    #[test]
    fn literals_become_json() {
        for (python, json) in [
            ("1", "1"),
            ("-2.50", "-2.50"),
            ("1.", "1.0"),
            ("1_000", "1000"),
            ("True", "true"),
            ("None", "null"),
            ("'it\\'s'", "\"it's\""),
            ("\"a\\n\\x41\\u00e9\\q\"", "\"a\\nAé\\\\q\""),
            ("'say \"hi\"'", "\"say \\\"hi\\\"\""),
            ("[1, 'a', [], (True, None,)]", "[1, \"a\", [], [true, null]]"),
            ("{'a': {'b': 1}, \"c\": [2]}", "{\"a\": {\"b\": 1}, \"c\": [2]}"),
            ("{}", "{}"),
        ] {
            assert_eq!(read(python).as_deref(), Some(json), "{python}");
            let _: serde_json::Value = serde_json::from_str(json).unwrap();
        }
        for wrong in ["nothing", "[1 2]", "{1: 2}", "{'a' 1}", "'a\nb'", "inf", "--1", "'\\xzz'", "[)"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
