//! What is personal, or a secret: a file per kind and a line in [`KINDS`].

mod card;
mod iban;
mod ip;
mod key;
mod mail;
mod phone;

use super::rules::Pattern;

/// A kind of personal data.
#[derive(Debug)]
pub struct Kind {
    /// As it is named on the command line, in metrics and in the audit log.
    pub name: &'static str,
    /// What stands in its place.
    pub mark: &'static str,
    /// How it looks.
    pub patterns: fn() -> Vec<Pattern>,
}

/// All kinds.
pub static KINDS: &[Kind] = &[mail::KIND, phone::KIND, card::KIND, iban::KIND, ip::KIND, key::KIND];

/// Digits of a text, in order.
fn digits(text: &str) -> impl DoubleEndedIterator<Item = u32> + '_ {
    text.chars().filter_map(|c| c.to_digit(10))
}

/// The kinds whose names these are; the name that none has, if there is one.
pub fn named<'a>(names: impl Iterator<Item = &'a str>) -> Result<Vec<&'static Kind>, &'a str> {
    names.map(|name| KINDS.iter().find(|kind| kind.name == name).ok_or(name)).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::guard::{Action, rules::Rules, transducer::Transducer};

    fn redacted(text: &str) -> String {
        let rules = Rules::new(KINDS.iter().map(|kind| (kind.name, kind.mark, Action::Redact, (kind.patterns)())));
        Transducer::whole(&Arc::new(rules.unwrap()), text).text
    }

    #[test]
    fn personal_data_is_found() {
        for (text, want) in [
            ("write to ann.lee+x@mail.example.org.", "write to [MAIL]."),
            ("<ünal@beispiel.de>, b@c.io", "<[MAIL]>, [MAIL]"),
            ("call +49 (0)30 1234567 or +1-202-555-0143!", "call [PHONE] or [PHONE]!"),
            ("(202) 555-0143; 202.555.0143; 030 12345678; 0044 20 7946 0958", "[PHONE]; [PHONE]; [PHONE]; [PHONE]"),
            ("06 12 34 56 78", "[PHONE]"),
            ("pay 4111 1111 1111 1111 now", "pay [CARD] now"),
            ("5500-0055-5555-5559,378282246310005", "[CARD],[CARD]"),
            ("4111 1111 1111 1111 2024", "[CARD] 2024"),
            ("to DE89 3704 0044 0532 0130 00 and", "to [IBAN] and"),
            ("gb82west12345698765432", "[IBAN]"),
            ("from 192.168.10.254:8080.", "from [IP]:8080."),
            ("at 2001:db8::ff00:42:8329, fe80::1.", "at [IP], [IP]."),
            ("::ffff:10.0.0.1", "[IP]"),
            ("key sk-proj-AbCd1234efGH5678ijkl.", "key [KEY]"),
            ("ghp_0123456789abcdefghijABCDEFGHIJ012345 x", "[KEY] x"),
            ("AKIAIOSFODNN7EXAMPLE", "[KEY]"),
            (
                "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
                "Bearer [KEY]",
            ),
            ("a\n-----BEGIN RSA PRIVATE KEY-----\nMIIE\nab+/==\n-----END RSA PRIVATE KEY-----\nb", "a\n[KEY]\nb"),
        ] {
            assert_eq!(redacted(text), want);
        }
    }

    #[test]
    fn other_text_is_left_as_it_is() {
        for text in [
            "Hello, world. 3.14159265358979 and 1,234,567.89",
            "2024-01-02 10:20:30, 12/31/1999, 1.2.3, v1.2.3.4.5",
            "a@b, @name, x @ y.com, user@host",
            "4111 1111 1111 1112",
            "GB82 WEST 1234 5698 7654 33",
            "std::fmt::Debug, a::b, 12:34:56",
            "sk-short, risk-averse-and-very-long-words-are-no-keys",
            "256.1.1.1",
            "0 5 10 15 20 25 30",
            "1234567890123",
            "-----BEGIN CERTIFICATE-----",
            "the 0.5 of 000",
        ] {
            assert_eq!(redacted(text), text);
        }
    }

    #[test]
    fn kinds_are_named() {
        assert_eq!(named(["card", "ip"].into_iter()).unwrap().len(), 2);
        assert_eq!(named(["card", "soul"].into_iter()).unwrap_err(), "soul");
    }
}
