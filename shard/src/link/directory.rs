//! Which coordinators there are and which leadership is the latest. Pure.

use std::{str::FromStr, time::Duration};

use tonic::transport::Uri;

/// What a shard knows of coordinators.
#[derive(Debug, Clone)]
pub struct Directory {
    /// From the command line.
    given: Vec<Uri>,
    /// From the last coordinator that this shard was attached to.
    learned: Vec<Uri>,
    /// Where a leader is said to be.
    hint: Option<Uri>,
    /// How all are dialled.
    scheme: &'static str,
    term: u64,
}

impl Directory {
    /// Of the coordinators of the command line, all of which are dialled as `scheme`.
    pub fn new(given: &[Uri], scheme: &'static str) -> Self {
        Self { given: given.to_vec(), learned: Vec::new(), hint: None, scheme, term: 0 }
    }

    /// All, the likeliest leader first.
    pub fn all(&self) -> Vec<Uri> {
        let mut all: Vec<Uri> = Vec::new();
        for uri in self.hint.iter().chain(&self.given).chain(&self.learned) {
            if !all.contains(uri) {
                all.push(uri.clone());
            }
        }
        all
    }

    /// The greatest term that is known; 0 for none.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// A coordinator names those that it knows, as `HOST:PORT`.
    pub fn learn(&mut self, addresses: &[String]) {
        if !addresses.is_empty() {
            self.learned = addresses.iter().filter_map(|text| self.uri_of(text)).collect();
        }
    }

    /// Somebody says that the leader is there. Returns whether that is news.
    pub fn hint(&mut self, address: &str) -> bool {
        let uri = self.uri_of(address);
        let is_news = uri.as_ref().is_some_and(|uri| !self.all().contains(uri));
        if uri.is_some() {
            self.hint = uri;
        }
        is_news
    }

    /// A coordinator leads under this term (0: it says none). Returns whether it may be followed: its leadership is not
    /// older than one that is known.
    pub fn may_follow(&mut self, term: u64) -> bool {
        if term < self.term {
            return false;
        }
        self.term = term;
        true
    }

    /// `HOST:PORT`, or a URL of it, as a URI; `None` for what is neither. Whatever others say, this shard dials as it was
    /// told to: nobody talks it out of TLS.
    pub fn uri_of(&self, address: &str) -> Option<Uri> {
        let authority = address.split_once("://").map_or(address, |(_, rest)| rest);
        let uri = Uri::from_str(&format!("{}://{authority}", self.scheme)).ok();
        uri.filter(|uri| uri.port_u16().is_some())
    }
}

/// Pauses between attempts: short at first, longer and longer, and not the same for all who wait.
#[derive(Debug, Clone)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    /// The first pause, about.
    pub const FIRST: Duration = Duration::from_millis(50);
    /// The longest.
    pub const LONGEST: Duration = Duration::from_secs(1);

    /// The next pause. `luck` is drawn from 0 to 1.
    pub fn pause(&mut self, luck: f64) -> Duration {
        let pause = self.next.mul_f64(0.5 + luck.clamp(0.0, 1.0) / 2.0);
        self.next = (self.next * 3 / 2).min(Self::LONGEST);
        pause
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: Self::FIRST }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(given: &[Uri]) -> Directory {
        Directory::new(given, "http")
    }

    fn uri(port: u16) -> Uri {
        directory(&[]).uri_of(&format!("host:{port}")).expect("a good address")
    }

    #[test]
    fn all_are_known_once_the_likeliest_first() {
        let mut directory = directory(&[uri(1), uri(2)]);
        assert_eq!(directory.all(), [uri(1), uri(2)]);
        directory.learn(&["host:3".into(), "host:1".into(), "no address".into()]);
        assert_eq!(directory.all(), [uri(1), uri(2), uri(3)]);
        assert!(!directory.hint("http://host:3"));
        assert_eq!(directory.all(), [uri(3), uri(1), uri(2)]);
        assert!(directory.hint("host:4"));
        assert!(!directory.hint("host:4") && !directory.hint(""));
        // A coordinator that names none takes nothing away.
        directory.learn(&[]);
        assert_eq!(directory.all(), [uri(4), uri(1), uri(2), uri(3)]);
    }

    #[test]
    fn an_older_leadership_is_not_followed() {
        let mut directory = directory(&[uri(1)]);
        assert!(directory.may_follow(0));
        assert!(directory.may_follow(7) && directory.may_follow(7));
        assert!(!directory.may_follow(6) && !directory.may_follow(0));
        assert_eq!(directory.term(), 7);
    }

    #[test]
    fn addresses_have_a_port_and_the_scheme_of_this_shard() {
        for scheme in ["http", "https"] {
            let directory = Directory::new(&[], scheme);
            let uri = directory.uri_of("10.0.0.1:50051").unwrap();
            assert_eq!(uri.to_string(), format!("{scheme}://10.0.0.1:50051/"));
            assert_eq!(directory.uri_of("http://10.0.0.1:50051"), Some(uri.clone()));
            assert_eq!(directory.uri_of("https://10.0.0.1:50051"), Some(uri));
            assert!(directory.uri_of("[::1]:50051").is_some());
            assert!(directory.uri_of("host").is_none() && directory.uri_of("").is_none());
        }
    }

    #[test]
    fn pauses_grow_to_a_second() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.pause(1.0), Duration::from_millis(50));
        assert_eq!(backoff.pause(0.0), Duration::from_micros(37_500));
        let last = (0..20).map(|_| backoff.pause(1.0)).last();
        assert_eq!(last, Some(Duration::from_secs(1)));
    }
}
