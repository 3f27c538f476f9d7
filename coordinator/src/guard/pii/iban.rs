//! International bank account numbers.

use super::Kind;
use crate::guard::rules::{Candidate, Pattern};

pub(super) const KIND: Kind = Kind { name: "iban", mark: "[IBAN]", patterns };

fn patterns() -> Vec<Pattern> {
    vec![Pattern::checked(r"(?i:[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30})", is_iban)]
}

fn is_iban(found: &Candidate<'_>) -> bool {
    !found.after.starts_with(|c: char| c.is_alphanumeric()) && has_check_digits(found.text)
}

/// ISO 7064's mod 97-10: with the first four characters last and letters as 10 to 35, the number leaves 1.
fn has_check_digits(text: &str) -> bool {
    let plain: Vec<u32> = text.chars().filter_map(|c| c.to_digit(36)).collect();
    let (head, account) = plain.split_at(4.min(plain.len()));
    let add = |rest: u32, digit: &u32| (rest * if *digit > 9 { 100 } else { 10 } + digit) % 97;
    account.iter().chain(head).fold(0, add) == 1
}
