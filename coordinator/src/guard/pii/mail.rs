//! Addresses of mail.

use super::Kind;
use crate::guard::rules::{Candidate, Pattern};

pub(super) const KIND: Kind = Kind { name: "mail", mark: "[MAIL]", patterns };

/// Letters and digits of addresses: those of Latin, Greek and Cyrillic script. Scripts that are written without spaces are
/// left out: an address would begin with the words before it.
const LETTER: &str = r"0-9A-Za-z\u{C0}-\u{4FF}";

fn patterns() -> Vec<Pattern> {
    let part = format!("[{LETTER}][{LETTER}-]{{0,62}}");
    vec![Pattern::checked(format!(r"[{LETTER}._%+-]{{1,64}}@{part}(?:\.{part}){{1,6}}"), is_mail)]
}

fn is_mail(found: &Candidate<'_>) -> bool {
    let top = found.text.rsplit('.').next().unwrap_or_default();
    top.chars().count() >= 2
        && top.chars().all(char::is_alphabetic)
        && !found.after.starts_with(|c: char| c.is_alphanumeric() || c == '-')
}
