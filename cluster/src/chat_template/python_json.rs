//! JSON as Python's `json.dumps` writes it, which models have learned to read.

use std::fmt::Write as _;

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

/// Arguments of `json.dumps`.
pub(super) struct Style {
    /// Spaces for each level, each item in its own line; `None`: all in one line.
    pub(super) indent: Option<usize>,
    /// Between items, and between key and value.
    pub(super) separators: Option<(String, String)>,
    pub(super) sort_keys: bool,
    /// Write other characters than ASCII as `\uXXXX`.
    pub(super) ensure_ascii: bool,
}

/// Deeper values are an error rather than a full stack.
const DEEPEST: usize = 128;
/// More indentation would only be a way to fill memory.
const WIDEST_INDENT: usize = 32;

struct Dump<'a, 'state, 'env> {
    state: &'a State<'state, 'env>,
    style: &'a Style,
    item_separator: &'a str,
    key_separator: &'a str,
    out: String,
    /// So much of `out` is paid for.
    charged: usize,
}

/// The JSON text of `value`; undefined values and none are `null`. Paid for in fuel, as it grows.
pub(super) fn dump(state: &State, value: &Value, style: &Style) -> Result<String, Error> {
    if style.indent.is_some_and(|indent| indent > WIDEST_INDENT) {
        return Err(invalid(format!("tojson: indent is at most {WIDEST_INDENT}")));
    }
    let (item_separator, key_separator) = match &style.separators {
        Some((item, key)) => (item.as_str(), key.as_str()),
        None if style.indent.is_some() => (",", ": "),
        None => (", ", ": "),
    };
    let mut dump = Dump { state, style, item_separator, key_separator, out: String::new(), charged: 0 };
    dump.value(value, 0)?;
    dump.charge()?;
    Ok(dump.out)
}

impl Dump<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(invalid(format!("tojson: nested deeper than {DEEPEST}")));
        }
        self.charge()?;
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => _ = write!(self.out, "{value}"),
            ValueKind::Number => self.out.push_str(&float(f64::try_from(value.clone())?)),
            ValueKind::String => {
                let text = value.as_str().unwrap_or_default();
                string(&mut self.out, text, self.style.ensure_ascii);
            }
            ValueKind::Seq | ValueKind::Iterable => {
                self.items('[', ']', value.try_iter()?.map(|item| (None, item)), depth)?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    items.push((Some(key_text(&key)?), value.get_item(&key)?));
                }
                if self.style.sort_keys {
                    items.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.items('{', '}', items.into_iter(), depth)?;
            }
            kind => return Err(invalid(format!("tojson: {kind} cannot be JSON"))),
        }
        Ok(())
    }

    fn items(
        &mut self,
        open: char,
        close: char,
        items: impl Iterator<Item = (Option<String>, Value)>,
        depth: usize,
    ) -> Result<(), Error> {
        self.out.push(open);
        let mut any = false;
        for (key, item) in items {
            if any {
                self.out.push_str(self.item_separator);
            }
            any = true;
            self.new_line(depth + 1);
            if let Some(key) = key {
                string(&mut self.out, &key, self.style.ensure_ascii);
                self.out.push_str(self.key_separator);
            }
            self.value(&item, depth + 1)?;
        }
        if any {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = self.style.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    /// One fuel for each 64 bytes, as for all that a template makes.
    fn charge(&mut self) -> Result<(), Error> {
        let units = (self.out.len() - self.charged) / 64;
        if units > 0 {
            self.charged += units * 64;
            self.state.consume_fuel(units as u64)?;
        }
        Ok(())
    }
}

fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String | ValueKind::Number => Ok(key.to_string()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        kind => Err(invalid(format!("tojson: {kind} cannot be a key"))),
    }
}

fn string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            control if control < ' ' => _ = write!(out, "\\u{:04x}", u32::from(control)),
            other if ensure_ascii && !other.is_ascii() => {
                for unit in other.encode_utf16(&mut [0; 2]) {
                    _ = write!(out, "\\u{unit:04x}");
                }
            }
            other => out.push(other),
        }
    }
    out.push('"');
}

/// A float as Python's `repr`: the shortest digits that mean it, with an exponent below 1e-4 and from 1e16 on.
fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let magnitude = value.abs();
    if value == 0.0 || (1e-4..1e16).contains(&magnitude) {
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

fn invalid(reason: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_pythons() {
        let cases = [(1.0, "1.0"), (0.1, "0.1"), (1e15, "1000000000000000.0"), (1e16, "1e+16"), (1.5e-7, "1.5e-07")];
        for (value, text) in cases {
            assert_eq!(float(value), text);
        }
        assert_eq!((float(-0.0), float(1e-4), float(-2e300)), ("-0.0".into(), "0.0001".into(), "-2e+300".into()));
    }

    #[test]
    fn strings_escape_what_json_must() {
        let mut out = String::new();
        string(&mut out, "é\"\\\n\u{1}😀", false);
        string(&mut out, "é😀", true);
        assert_eq!(out, "\"é\\\"\\\\\\n\\u0001😀\"\"\\u00e9\\ud83d\\ude00\"");
    }
}
