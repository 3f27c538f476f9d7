//! GBNF, the notation of llama.cpp's grammars, written anew as Lark.
//!
//! Both have the same shape: alternatives, groups, repetitions. What differs is how rules begin, how characters are spelt,
//! and that a rule may go on over lines. So this goes through the text once, piece by piece, and leaves what it means, and
//! how deep it is nested, to the compiler.

use std::{collections::BTreeMap, fmt::Write as _, iter::Peekable, str::Chars};

use super::{Grammar, GrammarError};

/// What separates a rule's name from its body; Lark has nothing like it.
const IS: &str = "::=";
/// The rule that a text as a whole is.
const ROOT: &str = "root";

impl Grammar {
    /// A grammar in Lark's notation or in GBNF, whichever it is.
    ///
    /// # Errors
    /// If it is GBNF and wrong.
    pub fn of_notation(text: String) -> Result<Self, GrammarError> {
        if text.contains(IS) { lark(&text).map(Self::Lark) } else { Ok(Self::Lark(text)) }
    }
}

/// A part of a rule.
#[derive(Debug, PartialEq)]
enum Piece {
    /// A reference, or the name of the rule that begins.
    Name(String),
    /// What follows the name of a rule that begins.
    Is,
    /// The same in Lark.
    Same(String),
}

fn lark(text: &str) -> Result<String, GrammarError> {
    let pieces = pieces(text)?;
    // A name is its rule's beginning if `::=` follows.
    let begins = |idx: usize| pieces.get(idx + 1) == Some(&Piece::Is);
    let mut names = BTreeMap::new();
    for (idx, piece) in pieces.iter().enumerate() {
        if let (Piece::Name(name), true) = (piece, begins(idx)) {
            let new = if name == ROOT { "start".to_owned() } else { format!("r{}", names.len()) };
            if names.insert(name.as_str(), new).is_some() {
                return Err(wrong(&format!("rule '{name}' is there twice")));
            }
        }
    }
    if !names.contains_key(ROOT) {
        return Err(wrong("there is no rule 'root'"));
    }
    let mut lark = String::new();
    for (idx, piece) in pieces.iter().enumerate() {
        match piece {
            Piece::Name(name) => {
                let new = names.get(name.as_str()).ok_or_else(|| wrong(&format!("there is no rule '{name}'")))?;
                lark.push_str(if begins(idx) { "\n" } else { " " });
                lark.push_str(new);
            }
            Piece::Is if idx > 0 && matches!(pieces[idx - 1], Piece::Name(_)) => lark.push(':'),
            Piece::Is => return Err(wrong("'::=' without a rule's name before it")),
            Piece::Same(same) => {
                if !matches!(same.as_str(), "*" | "+" | "?") && !same.starts_with('{') {
                    lark.push(' ');
                }
                lark.push_str(same);
            }
        }
    }
    lark.push('\n');
    Ok(lark)
}

fn pieces(text: &str) -> Result<Vec<Piece>, GrammarError> {
    let mut chars = text.chars().peekable();
    let mut pieces = Vec::new();
    while let Some(next) = chars.next() {
        match next {
            ' ' | '\t' | '\r' | '\n' => {}
            '#' => while chars.next_if(|c| *c != '\n').is_some() {},
            ':' if chars.next() == Some(':') && chars.next() == Some('=') => pieces.push(Piece::Is),
            '"' => pieces.push(Piece::Same(literal(&mut chars)?)),
            '[' => pieces.push(Piece::Same(class(&mut chars)?)),
            '.' => pieces.push(Piece::Same("/(?s:.)/".to_owned())),
            '(' | ')' | '|' | '*' | '+' | '?' => pieces.push(Piece::Same(next.to_string())),
            '{' => {
                let mut range = String::from('{');
                while let Some(c) = chars.next_if(|c| c.is_ascii_digit() || matches!(c, ',' | ' ')) {
                    range.push(c);
                }
                if chars.next() != Some('}') {
                    return Err(wrong("'{' begins a number of repetitions, such as {2}, {2,} or {2,5}"));
                }
                range.push('}');
                pieces.push(Piece::Same(range));
            }
            c if c.is_ascii_alphabetic() || c == '_' => {
                let mut name = String::from(c);
                while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')) {
                    name.push(c);
                }
                pieces.push(Piece::Name(name));
            }
            other => return Err(wrong(&format!("{other:?} is not expected here"))),
        }
    }
    Ok(pieces)
}

/// The rest of a literal, as one of Lark's.
fn literal(chars: &mut Peekable<Chars<'_>>) -> Result<String, GrammarError> {
    let mut text = String::new();
    loop {
        match chars.next() {
            Some('"') => break,
            Some('\\') => text.push(escaped(chars)?),
            Some(c) => text.push(c),
            None => return Err(wrong("a literal has no end")),
        }
    }
    Ok(quoted(&text))
}

/// A text as a literal of Lark's, which are JSON's.
pub fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// The rest of a class of characters, as a regular expression.
fn class(chars: &mut Peekable<Chars<'_>>) -> Result<String, GrammarError> {
    let mut regex = String::from("/[");
    if chars.next_if_eq(&'^').is_some() {
        regex.push('^');
    }
    let one = |c: char, regex: &mut String| {
        // Writing to a string does not fail.
        let _ = write!(regex, "\\x{{{:X}}}", u32::from(c));
    };
    let mut is_empty = true;
    loop {
        match chars.next() {
            Some(']') => break,
            // Between two characters; else it is one.
            Some('-') if !is_empty && chars.peek().is_some_and(|c| *c != ']') => regex.push('-'),
            Some('\\') => one(escaped(chars)?, &mut regex),
            Some(c) => one(c, &mut regex),
            None => return Err(wrong("a class of characters has no end")),
        }
        is_empty = false;
    }
    if is_empty {
        return Err(wrong("a class of characters is empty"));
    }
    regex.push_str("]/");
    Ok(regex)
}

fn escaped(chars: &mut Peekable<Chars<'_>>) -> Result<char, GrammarError> {
    match chars.next() {
        Some('n') => Ok('\n'),
        Some('r') => Ok('\r'),
        Some('t') => Ok('\t'),
        Some('x') => code_of(chars, 2),
        Some('u') => code_of(chars, 4),
        Some('U') => code_of(chars, 8),
        Some(c @ ('\\' | '"' | '[' | ']' | '-' | '^')) => Ok(c),
        other => Err(wrong(&format!("{other:?} after a backslash"))),
    }
}

fn code_of(chars: &mut Peekable<Chars<'_>>, n_digits: usize) -> Result<char, GrammarError> {
    let digits: String = (0..n_digits).filter_map(|_| chars.next_if(char::is_ascii_hexdigit)).collect();
    let code = if digits.len() == n_digits { u32::from_str_radix(&digits, 16).ok() } else { None };
    code.and_then(char::from_u32).ok_or_else(|| wrong(&format!("an escape wants {n_digits} digits of a character")))
}

fn wrong(reason: &str) -> GrammarError {
    GrammarError::Refused(format!("GBNF: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_go_on_over_lines_and_are_named_anew() {
        let gbnf = "# a comment\nroot ::= Item (\",\" ws Item)* # more\n  | \"none\"\nItem ::= [a-z0-9_]+ | \"\\\"\" [^\"\\n] \"\\\"\"{2,3}\nws ::= [ \\t]?\n";
        let want = "\nstart: r1 ( \",\" r2 r1 )* | \"none\"\nr1: /[\\x{61}-\\x{7A}\\x{30}-\\x{39}\\x{5F}]/+ | \"\\\"\" \
                    /[^\\x{22}\\x{A}]/ \"\\\"\"{2,3}\nr2: /[\\x{20}\\x{9}]/?\n";
        assert_eq!(lark(gbnf).unwrap(), want);
    }

    #[test]
    fn lark_stays_as_it_is() {
        let text = "start: \"a\" | /b+/\n".to_owned();
        assert_eq!(Grammar::of_notation(text.clone()), Ok(Grammar::Lark(text)));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (gbnf, want) in [
            ("item ::= \"a\"", "no rule 'root'"),
            ("root ::= item", "no rule 'item'"),
            ("root ::= \"a\nroot ::= \"b\"", "no end"),
            ("root ::= \"a\"\nroot ::= \"b\"", "twice"),
            ("::= \"a\" root ::=", "without a rule's name"),
            ("root ::= \"a", "no end"),
            ("root ::= [a-z", "no end"),
            ("root ::= []", "empty"),
            ("root ::= \"\\q\"", "backslash"),
            ("root ::= \"\\u12\"", "4 digits"),
            ("root ::= \"a\"{x}", "repetitions"),
            ("root ::= $", "'$'"),
        ] {
            let error = lark(gbnf).unwrap_err().to_string();
            assert!(error.contains(want), "{gbnf}: {error}");
        }
    }
}
