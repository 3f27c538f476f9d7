//! Addresses of machines, IPv4 and IPv6.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::Kind;
use crate::guard::rules::{Candidate, Pattern};

pub(super) const KIND: Kind = Kind { name: "ip", mark: "[IP]", patterns };

fn patterns() -> Vec<Pattern> {
    vec![
        Pattern::checked(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}", is_v4),
        Pattern::checked(r"[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,8}(?:(?:\.[0-9]{1,3}){3})?", is_v6),
    ]
}

fn goes_on(after: &str) -> bool {
    let mut after = after.chars();
    match (after.next(), after.next()) {
        (Some('.'), Some(next)) => next.is_ascii_digit(),
        (Some(first), _) => first.is_alphanumeric(),
        (None, _) => false,
    }
}

fn is_v4(found: &Candidate<'_>) -> bool {
    found.text.parse::<Ipv4Addr>().is_ok() && !goes_on(found.after) && found.before != Some('.')
}

/// What might as well be a path of names in a program (`a::b`) is none.
fn is_v6(found: &Candidate<'_>) -> bool {
    let is_plain = found.text.bytes().filter(u8::is_ascii_hexdigit).count() < 5
        || !found.text.bytes().any(|byte| byte.is_ascii_digit());
    let is_cut = goes_on(found.after)
        || found.after.starts_with(':')
        || found.before.is_some_and(|c| c == ':' || c.is_alphanumeric());
    !is_plain && !is_cut && found.text.parse::<Ipv6Addr>().is_ok()
}
