//! JSON, character by character: is it still one, and where does it end?

/// Deeper nesting is no arguments of anything.
const DEEPEST: usize = 128;
/// Longest name or key that is read.
const LONGEST_WORD: usize = 256;

/// What a character means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// More must follow.
    More,
    /// It is the last one.
    Done,
    /// It can't stand here.
    Wrong,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Open {
    List,
    Object,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before the whole.
    Begin,
    Value,
    /// After `[`: a value, or the end.
    FirstItem,
    /// After `{`: a key, or the end.
    FirstKey,
    Key,
    Colon,
    AfterValue,
    Text {
        is_key: bool,
    },
    Escape {
        is_key: bool,
    },
    /// So many hexadecimal digits are to come.
    Unicode {
        is_key: bool,
        left: u8,
    },
    /// The rest of `true`, `false` or `null`.
    Word(&'static str),
    Number(Number),
}

/// Where in a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    Sign,
    Power,
}

impl Number {
    /// After another character; `None` if it is none of the number's.
    fn next(self, c: char) -> Option<Self> {
        Some(match (self, c) {
            (Self::Minus, '0') => Self::Zero,
            (Self::Minus, '1'..='9') | (Self::Digits, '0'..='9') => Self::Digits,
            (Self::Zero | Self::Digits, '.') => Self::Point,
            (Self::Point | Self::Fraction, '0'..='9') => Self::Fraction,
            (Self::Zero | Self::Digits | Self::Fraction, 'e' | 'E') => Self::Exponent,
            (Self::Exponent, '+' | '-') => Self::Sign,
            (Self::Exponent | Self::Sign | Self::Power, '0'..='9') => Self::Power,
            _ => return None,
        })
    }

    fn may_end(self) -> bool {
        matches!(self, Self::Zero | Self::Digits | Self::Fraction | Self::Power)
    }
}

fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

/// Reads a JSON object.
#[derive(Debug)]
pub struct ObjectScan {
    open: Vec<Open>,
    at: At,
}

impl ObjectScan {
    /// Before its `{`.
    pub fn new() -> Self {
        Self { open: Vec::new(), at: At::Begin }
    }

    /// Takes the next character.
    pub fn push(&mut self, c: char) -> Scan {
        let next = match self.at {
            At::Begin if c == '{' => self.opens(Open::Object),
            At::Value | At::FirstItem | At::FirstKey | At::Key | At::Colon | At::AfterValue if is_blank(c) => {
                Some(self.at)
            }
            At::FirstItem if c == ']' => return self.closes(Open::List),
            At::Value | At::FirstItem => self.value(c),
            At::FirstKey if c == '}' => return self.closes(Open::Object),
            At::FirstKey | At::Key if c == '"' => Some(At::Text { is_key: true }),
            At::Colon if c == ':' => Some(At::Value),
            At::AfterValue => return self.after_value(c),
            At::Text { is_key } => match c {
                '"' if is_key => Some(At::Colon),
                '"' => Some(At::AfterValue),
                '\\' => Some(At::Escape { is_key }),
                c if c < ' ' => None,
                _ => Some(self.at),
            },
            At::Escape { is_key } => match c {
                '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => Some(At::Text { is_key }),
                'u' => Some(At::Unicode { is_key, left: 4 }),
                _ => None,
            },
            At::Unicode { is_key, left } => match (c.is_ascii_hexdigit(), left) {
                (false, _) => None,
                (true, 1) => Some(At::Text { is_key }),
                (true, _) => Some(At::Unicode { is_key, left: left - 1 }),
            },
            At::Word(rest) => match rest.strip_prefix(c) {
                Some("") => Some(At::AfterValue),
                rest => rest.map(At::Word),
            },
            At::Number(number) => match number.next(c) {
                Some(number) => Some(At::Number(number)),
                None if number.may_end() => return self.after_value(c),
                None => None,
            },
            At::Begin | At::FirstKey | At::Key | At::Colon => None,
        };
        match next {
            Some(at) => {
                self.at = at;
                Scan::More
            }
            None => Scan::Wrong,
        }
    }

    fn opens(&mut self, open: Open) -> Option<At> {
        if self.open.len() == DEEPEST {
            return None;
        }
        self.open.push(open);
        Some(if open == Open::List { At::FirstItem } else { At::FirstKey })
    }

    fn value(&mut self, c: char) -> Option<At> {
        Some(match c {
            '{' => return self.opens(Open::Object),
            '[' => return self.opens(Open::List),
            '"' => At::Text { is_key: false },
            't' => At::Word("rue"),
            'f' => At::Word("alse"),
            'n' => At::Word("ull"),
            '-' => At::Number(Number::Minus),
            '0' => At::Number(Number::Zero),
            '1'..='9' => At::Number(Number::Digits),
            _ => return None,
        })
    }

    fn after_value(&mut self, c: char) -> Scan {
        self.at = match (c, self.open.last()) {
            (',', Some(Open::List)) => At::Value,
            (',', Some(Open::Object)) => At::Key,
            (']', _) => return self.closes(Open::List),
            ('}', _) => return self.closes(Open::Object),
            (c, _) if is_blank(c) => At::AfterValue,
            _ => return Scan::Wrong,
        };
        Scan::More
    }

    fn closes(&mut self, closed: Open) -> Scan {
        if self.open.pop() != Some(closed) {
            return Scan::Wrong;
        }
        self.at = At::AfterValue;
        if self.open.is_empty() { Scan::Done } else { Scan::More }
    }
}

/// Reads a short JSON string from behind its opening quote on.
#[derive(Debug, Default)]
pub struct WordScan {
    /// As it is written.
    written: String,
    is_escaped: bool,
}

impl WordScan {
    /// Takes the next character: the whole string when it is the closing quote; an error if it is none, or too long.
    pub fn push(&mut self, c: char) -> Result<Option<String>, ()> {
        match c {
            '"' if !self.is_escaped => {
                return serde_json::from_str(&format!("\"{}\"", self.written)).map(Some).map_err(|_| ());
            }
            _ if c < ' ' || self.written.len() >= LONGEST_WORD => return Err(()),
            _ => self.written.push(c),
        }
        self.is_escaped = c == '\\' && !self.is_escaped;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// How many characters of a text make an object, and whether the next one, if any, is wrong.
    fn scan(text: &str) -> Result<Option<usize>, usize> {
        let mut scan = ObjectScan::new();
        for (idx, c) in text.chars().enumerate() {
            match scan.push(c) {
                Scan::More => {}
                Scan::Done => return Ok(Some(idx + 1)),
                Scan::Wrong => return Err(idx),
            }
        }
        Ok(None)
    }

    #[test]
    fn objects_end_where_they_end() {
        for text in [
            "{}",
            "{ }",
            r#"{"a":1}"#,
            r#"{"a": [1, -0.5e+3, {"b": null}, [], "x\"]}é\u00e9"], "c": true, "d": false, "e": 0}"#,
        ] {
            let n = text.chars().count();
            assert_eq!(scan(text), Ok(Some(n)), "{text}");
            assert_eq!(scan(&format!("{text}}}")), Ok(Some(n)), "{text}: what follows is not looked at");
            assert_eq!(scan(&text[..text.len() - 1]), Ok(None), "{text}: cut");
        }
        for (text, wrong) in [
            ("[", 0),
            ("{,", 1),
            ("{1", 1),
            (r#"{"a" 1"#, 5),
            (r#"{"a":01"#, 6),
            (r#"{"a":1.}"#, 7),
            (r#"{"a":-}"#, 6),
            (r#"{"a":1,}"#, 7),
            (r#"{"a":[1}"#, 7),
            (r#"{"a":trve"#, 7),
            (r#"{"a":"\x"#, 7),
            ("{\"a\":\"\n", 6),
            (r#"{"a":1 2"#, 7),
        ] {
            assert_eq!(scan(text), Err(wrong), "{text}");
        }
        assert!(scan(&format!("{{\"a\":{}", "[".repeat(1000))).is_err());
    }

    #[test]
    fn words_are_unescaped() {
        let read = |text: &str| {
            let mut word = WordScan::default();
            text.chars().map(|c| word.push(c)).find(|step| step != &Ok(None)).unwrap_or(Ok(None))
        };
        assert_eq!(read("name\""), Ok(Some("name".to_owned())));
        assert_eq!(read(r#"a\"b\\" more"#), Ok(Some(r#"a"b\"#.to_owned())));
        assert_eq!(read(r#"\q""#), Err(()));
        assert_eq!(read("open"), Ok(None));
        assert_eq!(read(&"x".repeat(1000)), Err(()));
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e9f64..1e9).prop_map(Value::from),
            "[a-z\"\\\\\n{}é😀\\[\\]]{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec(("[a-z\"]{0,3}", inner), 0..4)
                    .prop_map(|entries| Value::Object(entries.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn every_object_is_read_to_its_end(entries in prop::collection::vec(("[a-z]{0,3}", values()), 0..4), pretty: bool) {
            let object = Value::Object(entries.into_iter().collect());
            let text = if pretty { serde_json::to_string_pretty(&object).unwrap() } else { object.to_string() };
            prop_assert_eq!(scan(&format!("{text} {text}")), Ok(Some(text.chars().count())));
        }

        #[test]
        fn what_is_taken_for_whole_is_json(text in "\\{[a-b0-2\":,\\[\\]{}. eE+-]{0,12}") {
            if let Ok(Some(n)) = scan(&text) {
                let whole: String = text.chars().take(n).collect();
                prop_assert!(serde_json::from_str::<Value>(&whole).is_ok(), "{}", whole);
            }
        }
    }
}
