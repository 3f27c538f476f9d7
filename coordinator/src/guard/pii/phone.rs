//! Telephone numbers: with a country's code, as they are written in North America, or with a leading zero.

use super::{Kind, digits};
use crate::guard::rules::{Candidate, Pattern};

pub(super) const KIND: Kind = Kind { name: "phone", mark: "[PHONE]", patterns };

fn patterns() -> Vec<Pattern> {
    vec![
        Pattern::checked(r"(?:\+|00)[1-9](?:[ ./()-]{0,2}[0-9]){6,14}", is_international),
        Pattern::checked(r"\(?[2-9][0-9]{2}(?:\) ?|[ .-])[2-9][0-9]{2}[ .-][0-9]{4}", ends),
        Pattern::checked(r"0[1-9][0-9]{0,4}[ /-][0-9]{5,9}", ends),
        Pattern::checked(r"0[1-9](?:[ .-][0-9]{2}){4}", ends),
    ]
}

/// Not in the middle of a longer number.
fn ends(found: &Candidate<'_>) -> bool {
    let mut after = found.after.chars();
    match (after.next(), after.next()) {
        (Some(c), _) if c.is_alphanumeric() => false,
        (Some('.' | '-' | ','), Some(c)) => !c.is_ascii_digit(),
        _ => !found.before.is_some_and(|c| matches!(c, '.' | '-')),
    }
}

fn is_international(found: &Candidate<'_>) -> bool {
    let n_digits = digits(found.text.trim_start_matches("00")).count();
    (8..=15).contains(&n_digits) && ends(found)
}
