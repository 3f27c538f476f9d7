//! Numbers of payment cards.

use super::{Kind, digits};
use crate::guard::rules::{Candidate, Pattern};

pub(super) const KIND: Kind = Kind { name: "card", mark: "[CARD]", patterns };

fn patterns() -> Vec<Pattern> {
    vec![Pattern::checked(r"[2-6](?:[ -]?[0-9]){12,18}", is_card)]
}

fn is_card(found: &Candidate<'_>) -> bool {
    let is_cut = found.after.starts_with(|c: char| c.is_alphanumeric()) || found.before == Some('.');
    !is_cut && has_check_digit(found.text)
}

/// Luhn's sum (ISO/IEC 7812-1): every second digit from the right counts double, with its digits added.
fn has_check_digit(text: &str) -> bool {
    let weigh = |(place, digit): (usize, u32)| match (place % 2, digit * 2) {
        (0, _) => digit,
        (_, double) => double / 10 + double % 10,
    };
    digits(text).rev().enumerate().map(weigh).sum::<u32>() % 10 == 0
}
