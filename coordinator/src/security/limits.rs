//! What a key has used, and what of its limits is left. Time is an argument.
//!
//! Requests and tokens are counted in seconds: what was used in a second counts for the whole minute after it. So no sixty
//! seconds have more than the limit, wherever they begin.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// Seconds that count: a minute, and the second that has begun.
const SLOTS: usize = 61;
/// Names that are kept before idle ones are looked for.
const FEWEST_PRUNED: usize = 1024;

/// Bounds of one key; `None` is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyLimits {
    /// Requests in any minute.
    pub requests_per_minute: Option<u64>,
    /// Tokens in any minute: of prompts, and of outputs as far as they may become.
    pub tokens_per_minute: Option<u64>,
    /// Requests that run at the same time.
    pub concurrency: Option<u32>,
    /// Tokens of a prompt.
    pub max_prompt_tokens: Option<u32>,
    /// Tokens of a choice.
    pub max_output_tokens: Option<u32>,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// Requests in a minute.
    Requests,
    /// Tokens in a minute.
    Tokens,
    /// Requests at the same time.
    Concurrency,
}

impl Counted {
    /// As metrics and errors spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::Concurrency => "concurrency",
        }
    }
}

/// Why a request is not let in now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It will be if it is sent again then.
    #[error("{}", later(*.counted, *.limit, *.used, *.wanted))]
    Later {
        /// Which limit.
        counted: Counted,
        /// How much there may be.
        limit: u64,
        /// How much there is.
        used: u64,
        /// How much the request would add.
        wanted: u64,
        /// When it is worth to try again.
        retry_after: Duration,
    },
    /// It never will.
    #[error(
        "the request may take {wanted} tokens, and this key {limit} in a minute: shorten the prompt or ask for fewer \
         tokens"
    )]
    Never {
        /// Tokens in a minute.
        limit: u64,
        /// Tokens of prompt and output.
        wanted: u64,
    },
}

fn later(counted: Counted, limit: u64, used: u64, wanted: u64) -> String {
    match counted {
        Counted::Requests => format!("this key may send {limit} requests in a minute, and has sent {used}"),
        Counted::Tokens => {
            format!(
                "this key may take {limit} tokens in a minute, has taken or reserved {used}, and wants {wanted} more"
            )
        }
        Counted::Concurrency => format!("this key may have {limit} requests running, and has {used}"),
    }
}

/// Tokens that a request may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Of its prompts.
    pub prompt: u64,
    /// Of all choices.
    pub output: u64,
    /// Choices.
    pub choices: u64,
    /// Whether the client has named no length: then it reserves no more than is left.
    pub is_open_ended: bool,
}

/// What a request holds until its end.
#[derive(Debug, PartialEq, Eq)]
pub struct Reservation {
    name: String,
    tokens: u64,
    second: u64,
}

/// One limit, as clients are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// How much there may be in a minute.
    pub limit: u64,
    /// How much is left of it.
    pub remaining: u64,
    /// Until all of it is left.
    pub reset: Duration,
}

/// Where a key stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// Of requests, if they are limited.
    pub requests: Option<Quota>,
    /// Of tokens, if they are limited.
    pub tokens: Option<Quota>,
}

/// Amounts of the last minute, second by second.
#[derive(Debug, Clone)]
struct Window {
    /// Of second s at s modulo the length.
    slots: [u64; SLOTS],
    newest: u64,
}

impl Default for Window {
    fn default() -> Self {
        Self { slots: [0; SLOTS], newest: 0 }
    }
}

impl Window {
    fn slot(second: u64) -> usize {
        usize::try_from(second % SLOTS as u64).unwrap_or(0)
    }

    fn advance(&mut self, second: u64) {
        for passed in self.newest.saturating_add(1)..=second.min(self.newest.saturating_add(SLOTS as u64)) {
            self.slots[Self::slot(passed)] = 0;
        }
        self.newest = self.newest.max(second);
    }

    fn used(&self) -> u64 {
        self.slots.iter().fold(0, |sum, slot| sum.saturating_add(*slot))
    }

    fn add(&mut self, amount: u64) {
        let slot = &mut self.slots[Self::slot(self.newest)];
        *slot = slot.saturating_add(amount);
    }

    /// Takes back of what was added in a second, if that still counts.
    fn take_back(&mut self, second: u64, amount: u64) {
        if second.saturating_add(SLOTS as u64) > self.newest {
            let slot = &mut self.slots[Self::slot(second)];
            *slot = slot.saturating_sub(amount);
        }
    }

    /// From the oldest on: the second from which an amount no longer counts, and the amount.
    fn expiries(&self) -> impl Iterator<Item = (u64, u64)> {
        let oldest = (self.newest + 1).saturating_sub(SLOTS as u64);
        let amounts = (oldest..=self.newest).map(|s| (s + SLOTS as u64, self.slots[Self::slot(s)]));
        amounts.filter(|(_, amount)| *amount > 0)
    }

    /// The second in which so much has been freed.
    fn freed(&self, amount: u64) -> Option<u64> {
        let mut sum = 0u64;
        self.expiries().find_map(|(second, freed)| {
            sum = sum.saturating_add(freed);
            (sum >= amount).then_some(second)
        })
    }
}

#[derive(Debug, Default)]
struct Use {
    requests: Window,
    tokens: Window,
    running: u32,
}

impl Use {
    fn is_idle(&self) -> bool {
        self.running == 0 && self.requests.used() == 0 && self.tokens.used() == 0
    }
}

/// What all keys have used.
#[derive(Debug)]
pub struct Limiter {
    origin: Instant,
    uses: BTreeMap<String, Use>,
    prune_at: usize,
}

impl Limiter {
    /// Nobody has used anything.
    pub fn new(now: Instant) -> Self {
        Self { origin: now, uses: BTreeMap::new(), prune_at: FEWEST_PRUNED }
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.origin).as_secs()
    }

    /// From now until a second begins.
    fn until(&self, now: Instant, second: u64) -> Duration {
        Duration::from_secs(second).saturating_sub(now.saturating_duration_since(self.origin))
    }

    fn at(&mut self, now: Instant, name: &str) -> &mut Use {
        let second = self.second(now);
        if self.uses.len() >= self.prune_at && !self.uses.contains_key(name) {
            self.uses.retain(|_, key| {
                key.requests.advance(second);
                key.tokens.advance(second);
                !key.is_idle()
            });
            self.prune_at = FEWEST_PRUNED.max(self.uses.len().saturating_mul(2));
        }
        let key = self.uses.entry(name.to_owned()).or_default();
        key.requests.advance(second);
        key.tokens.advance(second);
        key
    }

    /// A request has come. One that is refused counts for nothing.
    ///
    /// # Errors
    /// If there were as many in the last minute as there may be.
    pub fn request(&mut self, now: Instant, name: &str, limits: &KeyLimits) -> Result<(), Refused> {
        let Some(limit) = limits.requests_per_minute else { return Ok(()) };
        let key = self.at(now, name);
        let used = key.requests.used();
        if used >= limit {
            let freed = key.requests.freed((used - limit).saturating_add(1));
            return Err(self.later(now, Counted::Requests, limit, used, 1, freed));
        }
        key.requests.add(1);
        Ok(())
    }

    fn later(&self, now: Instant, counted: Counted, limit: u64, used: u64, wanted: u64, freed: Option<u64>) -> Refused {
        // A limit of nothing is never freed: as long as anything counts.
        let second = freed.unwrap_or_else(|| self.second(now) + SLOTS as u64);
        Refused::Later { counted, limit, used, wanted, retry_after: self.until(now, second) }
    }

    /// A request wants to run.
    ///
    /// # Errors
    /// If as many run as may, or its tokens are more than what is left.
    pub fn admit(&mut self, now: Instant, name: &str, limits: &KeyLimits, need: Need) -> Result<Reservation, Refused> {
        let second = self.second(now);
        let key = self.at(now, name);
        if let Some(limit) = limits.concurrency.filter(|limit| key.running >= *limit) {
            let (limit, used) = (limit.into(), key.running.into());
            // Nobody knows when one of them ends.
            let retry_after = Duration::from_secs(1);
            return Err(Refused::Later { counted: Counted::Concurrency, limit, used, wanted: 1, retry_after });
        }
        let wanted = need.prompt.saturating_add(need.output);
        let least = if need.is_open_ended { need.prompt.saturating_add(need.choices).min(wanted) } else { wanted };
        let mut tokens = wanted;
        if let Some(limit) = limits.tokens_per_minute {
            if least > limit {
                return Err(Refused::Never { limit, wanted: least });
            }
            let used = key.tokens.used();
            let left = limit.saturating_sub(used);
            if least > left {
                let freed = key.tokens.freed((used.saturating_add(least)).saturating_sub(limit));
                return Err(self.later(now, Counted::Tokens, limit, used, least, freed));
            }
            tokens = wanted.min(left);
        }
        key.tokens.add(tokens);
        key.running += 1;
        Ok(Reservation { name: name.to_owned(), tokens, second })
    }

    /// A request has ended, and has taken so many tokens.
    pub fn finish(&mut self, now: Instant, reservation: &Reservation, used: u64) {
        let key = self.at(now, &reservation.name);
        key.running = key.running.saturating_sub(1);
        if used > reservation.tokens {
            key.tokens.add(used - reservation.tokens);
        } else {
            key.tokens.take_back(reservation.second, reservation.tokens - used);
        }
    }

    /// Where a key stands.
    pub fn standing(&mut self, now: Instant, name: &str, limits: &KeyLimits) -> Standing {
        if limits.requests_per_minute.is_none() && limits.tokens_per_minute.is_none() {
            return Standing::default();
        }
        let key = self.at(now, name);
        let (requests, tokens) = (key.requests.clone(), key.tokens.clone());
        let quota = |limit: u64, window: &Window| Quota {
            limit,
            remaining: limit.saturating_sub(window.used()),
            reset: window.expiries().last().map_or(Duration::ZERO, |(second, _)| self.until(now, second)),
        };
        Standing {
            requests: limits.requests_per_minute.map(|limit| quota(limit, &requests)),
            tokens: limits.tokens_per_minute.map(|limit| quota(limit, &tokens)),
        }
    }
}

#[cfg(test)]
#[path = "limits_tests.rs"]
mod tests;
