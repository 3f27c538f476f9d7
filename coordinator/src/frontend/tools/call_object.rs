//! Calls as JSON objects: `{"name": "f", "arguments": {…}}`.

use super::{
    Names,
    found::Found,
    json::{ObjectScan, Scan, WordScan},
};

/// Most characters of arguments that are kept because the name stands behind them.
const MOST_KEPT: usize = 1 << 16;

#[derive(Debug)]
enum At {
    /// Before `{`.
    Begin,
    /// After `{`: a key, or the end.
    FirstKey,
    Key,
    InKey(WordScan),
    Colon,
    Value,
    InWord(WordScan),
    InArguments(ObjectScan),
    AfterValue,
}

/// Reads one, in whichever order its fields stand. A call begins when its name and the beginning of its arguments are known.
#[derive(Debug)]
pub struct CallObject {
    names: Names,
    at: At,
    key: String,
    name: Option<String>,
    /// Arguments that came before the name.
    kept: String,
    has_arguments: bool,
    has_begun: bool,
}

impl CallObject {
    /// Before its `{`.
    pub fn new(names: &Names) -> Self {
        Self {
            names: names.clone(),
            at: At::Begin,
            key: String::new(),
            name: None,
            kept: String::new(),
            has_arguments: false,
            has_begun: false,
        }
    }

    /// Takes the next character.
    pub fn push(&mut self, c: char, found: &mut Found) -> Scan {
        let is_blank = matches!(c, ' ' | '\t' | '\n' | '\r');
        let next = match &mut self.at {
            At::InKey(word) => match word.push(c) {
                Ok(None) => return Scan::More,
                Ok(Some(key)) => {
                    self.key = key;
                    Some(At::Colon)
                }
                Err(()) => None,
            },
            At::InWord(word) => match word.push(c) {
                Ok(None) => return Scan::More,
                Ok(Some(word)) => self.word(word, found),
                Err(()) => None,
            },
            At::InArguments(scan) => match scan.push(c) {
                Scan::Wrong => None,
                step => {
                    if !self.arguments(c, found) {
                        return Scan::Wrong;
                    }
                    if step == Scan::More {
                        return Scan::More;
                    }
                    Some(At::AfterValue)
                }
            },
            _ if is_blank => return Scan::More,
            At::Begin if c == '{' => Some(At::FirstKey),
            At::FirstKey | At::Key if c == '"' => Some(At::InKey(WordScan::default())),
            At::Colon if c == ':' => Some(At::Value),
            At::Value => self.value(c, found),
            At::AfterValue if c == ',' => Some(At::Key),
            At::AfterValue if c == '}' => return self.end(found),
            At::Begin | At::FirstKey | At::Key | At::Colon | At::AfterValue => None,
        };
        match next {
            Some(at) => {
                self.at = at;
                Scan::More
            }
            None => Scan::Wrong,
        }
    }

    fn value(&mut self, c: char, found: &mut Found) -> Option<At> {
        match (self.key.as_str(), c) {
            ("name", '"') if self.name.is_none() => Some(At::InWord(WordScan::default())),
            ("type" | "id", '"') => Some(At::InWord(WordScan::default())),
            ("arguments" | "parameters", '{') if !self.has_arguments => {
                self.has_arguments = true;
                self.begin(found);
                let mut scan = ObjectScan::new();
                let is_fine = scan.push(c) == Scan::More && self.arguments(c, found);
                is_fine.then_some(At::InArguments(scan))
            }
            _ => None,
        }
    }

    fn word(&mut self, word: String, found: &mut Found) -> Option<At> {
        match self.key.as_str() {
            "name" if self.names.contains(&word) => {
                self.name = Some(word);
                if self.has_arguments {
                    self.begin(found);
                }
                Some(At::AfterValue)
            }
            "type" if word == "function" => Some(At::AfterValue),
            "id" => Some(At::AfterValue),
            _ => None,
        }
    }

    /// Begins the call, if its name is known.
    fn begin(&mut self, found: &mut Found) {
        if let Some(name) = self.name.as_ref().filter(|_| !self.has_begun) {
            self.has_begun = true;
            found.call(name);
            found.arguments(&std::mem::take(&mut self.kept));
        }
    }

    /// Tells or keeps a character of the arguments; false if there are too many to keep.
    fn arguments(&mut self, c: char, found: &mut Found) -> bool {
        if self.has_begun {
            found.arguments(c.encode_utf8(&mut [0; 4]));
            return true;
        }
        self.kept.push(c);
        self.kept.len() <= MOST_KEPT
    }

    fn end(&mut self, found: &mut Found) -> Scan {
        if self.name.is_none() {
            return Scan::Wrong;
        }
        if !self.has_begun {
            "{}".clone_into(&mut self.kept);
            self.begin(found);
        }
        Scan::Done
    }
}
