//! What must not be said, neither to the model nor by it: personal data, secrets and phrases of an operator's lists are
//! redacted or end the text ([`Guard`]); a service of the operator's may be asked too ([`moderation`]).
//!
//! [`pii`] and [`denylist`] say what is looked for, [`rules`] makes an automaton of it, [`transducer`] walks through texts
//! that come in pieces. All of these are pure. What is found is counted, and is in no log.

pub mod denylist;
pub mod moderation;
pub mod pii;
pub mod rules;
pub mod transducer;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError, RwLock},
};

use anyhow::Context;
use phalanx_cluster::watched::Watched;
use serde::{Deserialize, Serialize};

use self::{
    pii::Kind,
    rules::{Pattern, Rules},
};
use crate::metrics::{self as names, count_reload};

/// What files of phrases are called in logs and metrics.
pub const LISTS: &str = "deny-lists";
/// What a phrase of a list is called in metrics and in the audit log.
pub const DENIED: &str = "denylist";
/// What stands in its place.
const DENIED_MARK: &str = "[REDACTED]";

/// What is done with what is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// A mark takes its place.
    Redact,
    /// A request is refused, an answer ends.
    Block,
}

/// What is configured.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GuardConfig {
    /// As it was asked for.
    pub asked: Vec<String>,
    /// Kinds of personal data.
    pub pii: Vec<&'static str>,
    /// Files of phrases.
    pub lists: Vec<PathBuf>,
    /// `None`: personal data are redacted, phrases of lists block.
    pub action: Option<Action>,
}

impl GuardConfig {
    /// From `pii`, `pii:KIND+KIND` and `denylist:FILE`.
    ///
    /// # Errors
    /// What is not one of these, and why.
    pub fn parse(asked: Vec<String>, action: Option<Action>) -> Result<Self, (String, String)> {
        let mut config = Self { action, ..Self::default() };
        for item in &asked {
            let kinds = match item.split_once(':') {
                None if item == "pii" => Ok(pii::KINDS.iter().collect()),
                Some(("pii", kinds)) => pii::named(kinds.split('+')),
                Some(("denylist", file)) if !file.is_empty() => {
                    config.lists.push(file.into());
                    continue;
                }
                _ => return Err((item.clone(), "want pii, pii:KIND+KIND or denylist:FILE".to_owned())),
            };
            let all = || pii::KINDS.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", ");
            let kinds: Vec<&Kind> =
                kinds.map_err(|name| (item.clone(), format!("knows no kind '{name}': want some of {}", all())))?;
            config.pii.extend(kinds.into_iter().map(|kind| kind.name));
        }
        config.asked = asked;
        Ok(config)
    }

    /// Rules of these lists, whose files hold this.
    fn rules(&self, files: &[Vec<u8>]) -> Result<Rules, String> {
        let mut denied: Vec<Pattern> = Vec::new();
        for (path, file) in self.lists.iter().zip(files) {
            denied.extend(denylist::parse(file).map_err(|reason| format!("{}: {reason}", path.display()))?);
        }
        let denied = (DENIED, DENIED_MARK, self.action.unwrap_or(Action::Block), denied);
        let kinds = pii::KINDS.iter().filter(|kind| self.pii.contains(&kind.name));
        let action = self.action.unwrap_or(Action::Redact);
        let personal = kinds.map(|kind| (kind.name, kind.mark, action, (kind.patterns)()));
        Rules::new([denied].into_iter().chain(personal))
    }
}

/// Rules that are in force, which may change.
pub struct Guard(RwLock<Arc<Rules>>);

impl Guard {
    /// As configured; files are watched from now on.
    ///
    /// # Errors
    /// If a list can't be read or used.
    pub fn start(config: &GuardConfig) -> anyhow::Result<Arc<Self>> {
        let watched = Watched::open(LISTS, config.lists.clone()).context("--guard denylist")?.counted(count_reload);
        let rules = config.rules(watched.contents()).map_err(|e| anyhow::anyhow!("--guard: {e}"))?;
        let guard = Arc::new(Self::new(rules));
        if !config.lists.is_empty() {
            let (shared, config) = (Arc::clone(&guard), config.clone());
            let take = move |contents: &[Vec<u8>]| {
                shared.replace(config.rules(contents)?);
                Ok(())
            };
            watched.watch(take).context("no thread watches --guard's deny-lists")?;
        }
        Ok(guard)
    }

    /// With these rules.
    pub fn new(rules: Rules) -> Self {
        Self(RwLock::new(Arc::new(rules)))
    }

    /// From now on these count; texts that have begun go on under those before.
    pub fn replace(&self, rules: Rules) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
    }

    /// Those that are in force.
    pub fn rules(&self) -> Arc<Rules> {
        // Replaced as a whole.
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Which way a text goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To the model.
    Input,
    /// From it.
    Output,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Input, Self::Output];

    /// As metrics name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Output => "output",
        }
    }
}

/// What was found in a request's texts.
#[derive(Debug, Default)]
pub struct Tally {
    matches: Mutex<BTreeMap<(Direction, &'static str), u64>>,
    blocked: OnceLock<&'static str>,
}

impl Tally {
    /// These kinds were found, one after the other.
    pub fn found(&self, direction: Direction, kinds: &[&'static str]) {
        // Numbers grow one by one.
        let mut matches = self.matches.lock().unwrap_or_else(PoisonError::into_inner);
        for kind in kinds {
            *matches.entry((direction, kind)).or_default() += 1;
            metrics::counter!(names::GUARD_MATCHES, "direction" => direction.name(), "kind" => *kind).increment(1);
        }
    }

    /// The request was refused, or an answer ended, because of this.
    pub fn blocked(&self, direction: Direction, by: &'static str) {
        let _ = self.blocked.set(by);
        metrics::counter!(names::GUARD_BLOCKED, "direction" => direction.name(), "by" => by).increment(1);
    }

    /// How often each kind was found.
    pub fn matches(&self, direction: Direction) -> BTreeMap<&'static str, u64> {
        let matches = self.matches.lock().unwrap_or_else(PoisonError::into_inner);
        matches.iter().filter(|((way, _), _)| *way == direction).map(|((_, kind), n)| (*kind, *n)).collect()
    }

    /// Because of what it was refused or ended, if it was.
    pub fn blocked_by(&self) -> Option<&'static str> {
        self.blocked.get().copied()
    }
}

/// Counters are there before anything is counted.
pub fn begin_to_count() {
    for direction in Direction::ALL {
        let direction = direction.name();
        for kind in pii::KINDS.iter().map(|kind| kind.name).chain([DENIED]) {
            drop(metrics::counter!(names::GUARD_MATCHES, "direction" => direction, "kind" => kind));
            drop(metrics::counter!(names::GUARD_BLOCKED, "direction" => direction, "by" => kind));
        }
        drop(metrics::counter!(names::GUARD_BLOCKED, "direction" => direction, "by" => moderation::BY));
        for verdict in moderation::VERDICTS {
            drop(metrics::counter!(names::MODERATIONS, "direction" => direction, "verdict" => verdict));
        }
        drop(metrics::histogram!(names::MODERATION_SECONDS, "direction" => direction));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn parsed(items: &[&str]) -> Result<GuardConfig, (String, String)> {
        GuardConfig::parse(items.iter().map(|item| (*item).to_owned()).collect(), None)
    }

    #[test]
    fn what_is_guarded_is_named() {
        assert_eq!(parsed(&["pii"]).unwrap().pii.len(), pii::KINDS.len());
        let config = parsed(&["pii:mail+card", "denylist:a.txt", "denylist:b.txt"]).unwrap();
        assert_eq!((config.pii, config.lists.len()), (vec!["mail", "card"], 2));
        for (item, want) in [("pii:soul", "no kind 'soul'"), ("denylist:", "denylist:FILE"), ("all", "want pii")] {
            assert!(parsed(&[item]).unwrap_err().1.contains(want), "{item}");
        }
    }

    #[test]
    fn lists_block_and_personal_data_are_redacted_unless_told_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("list");
        fs::write(&path, "bird\n").unwrap();
        let list = format!("denylist:{}", path.display());
        let mut config = parsed(&["pii", &list]).unwrap();
        let whole = |config: &GuardConfig, text: &str| {
            transducer::Transducer::whole(&Guard::start(config).unwrap().rules(), text)
        };
        let piece = whole(&config, "a@b.io bird x");
        assert_eq!((piece.text.as_str(), piece.blocked), ("[MAIL] ", Some(DENIED)));
        config.action = Some(Action::Redact);
        assert_eq!(whole(&config, "a@b.io bird x").text, "[MAIL] [REDACTED] x");
        config.action = Some(Action::Block);
        assert_eq!(whole(&config, "a@b.io bird x").blocked, Some("mail"));
        fs::write(&path, "/b(/\n").unwrap();
        let error = Guard::start(&config).err().unwrap().to_string();
        assert!(error.contains("line 1") && error.contains("list"), "{error}");
    }

    #[test]
    fn a_tally_knows_what_was_found() {
        let tally = Tally::default();
        tally.found(Direction::Output, &["mail", "card", "mail"]);
        assert_eq!(tally.matches(Direction::Output), BTreeMap::from([("card", 1), ("mail", 2)]));
        assert!(tally.matches(Direction::Input).is_empty() && tally.blocked_by().is_none());
    }
}
