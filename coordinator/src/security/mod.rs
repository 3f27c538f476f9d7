//! Who may ask for what, and how much of it.
//!
//! [`Security`] is shared by the doors of all APIs: it knows [keys], counts what each has used ([`limits`]), and says no.
//! Without a key configured everybody may ask. Every coordinator checks keys; the one that answers a request counts it.

pub mod admission;
pub mod audit;
pub mod cli;
pub mod jwt;
pub mod key_file;
pub mod keys;
pub mod limits;
pub mod tls;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::Context;
use http::HeaderMap;
use jiff::Timestamp;
use phalanx_cluster::{tls::CLUSTER_CERTIFICATES, watched::Watched};

use self::{
    audit::{AuditConfig, AuditLog},
    jwt::{JwtConfig, Tokens},
    key_file::KeyFile,
    keys::{Denied, KeyHash, KeyRecord, KeyRing, Principal, Role},
    limits::{Counted, KeyLimits, Limiter, Refused, Standing},
};
use crate::{
    guard::{
        self, Guard, GuardConfig,
        moderation::{Moderation, ModerationConfig},
    },
    metrics::{self as names, count_reload},
};

/// What a file of keys is called in logs and metrics.
const KEYS: &str = "API keys";
/// A shorter key can be guessed.
const SHORTEST_SAFE_KEY: usize = 16;

/// Keys of the command line. Its `Debug` does not show them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct FixedKeys(Vec<String>);

impl std::fmt::Debug for FixedKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

impl FixedKeys {
    /// These; `None` if one of them is empty or stands twice.
    pub fn new(keys: Vec<String>) -> Option<Self> {
        let is_distinct = keys.iter().enumerate().all(|(i, key)| !keys[..i].contains(key));
        let is_plain = keys.iter().all(|k| !k.is_empty() && k.bytes().all(|b| b.is_ascii_graphic()));
        (is_distinct && is_plain).then_some(Self(keys))
    }

    /// As they were given.
    pub fn keys(&self) -> &[String] {
        &self.0
    }

    fn records(&self) -> Vec<KeyRecord> {
        let record = |(index, key): (usize, &String)| KeyRecord {
            name: format!("api-key-{}", index + 1),
            hash: KeyHash::of(key),
            role: Role::User,
            limits: KeyLimits::default(),
            expires: None,
        };
        self.0.iter().enumerate().map(record).collect()
    }
}

/// What is configured.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SecurityConfig {
    /// Keys that may do everything but administrate, without limits.
    pub api_keys: FixedKeys,
    /// A file of keys, which may change.
    pub key_file: Option<PathBuf>,
    /// Whose tokens are as good as keys; `None`: nobody's.
    pub jwt: Option<JwtConfig>,
    /// Where every request is recorded; `None`: nowhere.
    pub audit: Option<AuditConfig>,
    /// What must not be said; `None`: nothing is looked for.
    pub guard: Option<GuardConfig>,
    /// Who is asked whether texts may pass; `None`: nobody.
    pub moderation: Option<ModerationConfig>,
}

impl SecurityConfig {
    /// Whether nobody is let in without showing something.
    pub fn is_closed(&self) -> bool {
        !self.api_keys.0.is_empty() || self.key_file.is_some() || self.jwt.is_some()
    }
}

/// The doors' common knowledge.
pub struct Security {
    /// `None`: everybody may ask.
    keys: Option<KeyRing>,
    limiter: Mutex<Limiter>,
    tokens: Option<Tokens>,
    audit: Option<AuditLog>,
    guard: Option<Arc<Guard>>,
    moderation: Option<Arc<Moderation>>,
}

impl Default for Security {
    fn default() -> Self {
        let limiter = Mutex::new(Limiter::new(Instant::now()));
        Self { keys: None, limiter, tokens: None, audit: None, guard: None, moderation: None }
    }
}

impl Security {
    /// As configured; files are watched from now on.
    ///
    /// # Errors
    /// If a file can't be read.
    pub fn start(config: &SecurityConfig) -> anyhow::Result<Arc<Self>> {
        for key in config.api_keys.0.iter().filter(|key| key.len() < SHORTEST_SAFE_KEY) {
            tracing::warn!(
                bytes = key.len(),
                "an --api-key is so short that it can be guessed: `coordinator key add` makes good ones"
            );
        }
        let audit = config.audit.as_ref().map(AuditLog::start).transpose()?;
        let guard = config.guard.as_ref().map(Guard::start).transpose()?;
        let moderation = config.moderation.as_ref().map(Moderation::start).transpose()?;
        let tokens = config.jwt.clone().map(Tokens::start).transpose()?;
        let fixed = config.api_keys.records();
        let Some(path) = &config.key_file else {
            let keys = config.is_closed().then(|| KeyRing::new(fixed));
            return Ok(Arc::new(Self { keys, tokens, audit, guard, moderation, ..Self::default() }));
        };
        let watched = Watched::open(KEYS, vec![path.clone()]).context("--api-keys")?.counted(count_reload);
        let records = in_force(&fixed, &watched.contents()[0]);
        let records = records.map_err(|e| anyhow::anyhow!("--api-keys {}: {e}", path.display()))?;
        tracing::info!(file = %path.display(), n_keys = records.len(), "API keys are needed");
        let keys = Some(KeyRing::new(records));
        let security = Arc::new(Self { keys, tokens, audit, guard, moderation, ..Self::default() });
        let shared = Arc::clone(&security);
        let take = move |contents: &[Vec<u8>]| {
            shared.replace_keys(in_force(&fixed, contents.first().map_or(&[][..], Vec::as_slice))?);
            Ok(())
        };
        watched.watch(take).context("no thread watches --api-keys")?;
        Ok(security)
    }

    /// With these keys and no others.
    pub fn with_keys(records: Vec<KeyRecord>) -> Arc<Self> {
        Arc::new(Self { keys: Some(KeyRing::new(records)), ..Self::default() })
    }

    /// The same, with every request recorded.
    #[must_use]
    pub fn with_audit(audit: AuditLog, records: Option<Vec<KeyRecord>>) -> Arc<Self> {
        Arc::new(Self { keys: records.map(KeyRing::new), audit: Some(audit), ..Self::default() })
    }

    /// With everything watched that these look for, and nothing else.
    pub fn with_watch(guard: Option<Arc<Guard>>, moderation: Option<Arc<Moderation>>) -> Arc<Self> {
        Arc::new(Self { guard, moderation, ..Self::default() })
    }

    /// What must not be said.
    pub fn guard(&self) -> Option<&Arc<Guard>> {
        self.guard.as_ref()
    }

    /// Who is asked whether texts may pass.
    pub fn moderation(&self) -> Option<&Arc<Moderation>> {
        self.moderation.as_ref()
    }

    /// Where every request is recorded.
    pub fn audit(&self) -> Option<&AuditLog> {
        self.audit.as_ref()
    }

    /// From now on these keys count, and no others.
    pub fn replace_keys(&self, records: Vec<KeyRecord>) {
        if let Some(keys) = &self.keys {
            keys.replace(records);
        }
    }

    /// Whether nobody is let in without showing something.
    pub fn is_closed(&self) -> bool {
        self.keys.is_some()
    }

    /// Who asks; `None` where everybody may.
    ///
    /// # Errors
    /// If nobody who may ask can be recognized.
    pub fn authenticate(&self, headers: &HeaderMap) -> Result<Option<Arc<Principal>>, Denied> {
        let Some(keys) = &self.keys else { return Ok(None) };
        let found = keys::shown(headers).ok_or(Denied::Missing).and_then(|shown| self.find(keys, shown));
        found.map(Some).inspect_err(|denied| {
            metrics::counter!(names::DENIED, "reason" => denied.reason()).increment(1);
        })
    }

    fn find(&self, keys: &KeyRing, shown: &str) -> Result<Arc<Principal>, Denied> {
        let now = Timestamp::now();
        match &self.tokens {
            Some(tokens) if Tokens::is_token(shown) => {
                tokens.check(shown, now.as_millisecond() as f64 / 1e3).map(Arc::new)
            }
            _ => keys.find(shown, now),
        }
    }

    /// Who has a name, with what he may do now: for work that goes on without him. Tokens are good for minutes, and what was begun
    /// with one is not over then. `None` where everybody may ask.
    ///
    /// # Errors
    /// If his key is not in force any more.
    pub fn named(&self, name: &str) -> Result<Option<Arc<Principal>>, Denied> {
        let Some(keys) = &self.keys else { return Ok(None) };
        if self.tokens.is_some() && name.starts_with(jwt::NAMED) {
            return Ok(Some(Arc::new(Principal::unrevokable(name.to_owned(), Role::User, KeyLimits::default()))));
        }
        keys.find_named(name, Timestamp::now()).map(Some)
    }

    /// Name of the key that a request shows, if it is one.
    pub fn name_of(&self, headers: &HeaderMap) -> Option<String> {
        let found = self.find(self.keys.as_ref()?, keys::shown(headers)?);
        found.ok().map(|principal| principal.name.clone())
    }

    fn limiter(&self) -> MutexGuard<'_, Limiter> {
        // Each change is whole before it can fail.
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request.
    ///
    /// # Errors
    /// If its key has sent enough of them.
    pub fn count_request(&self, principal: &Principal) -> Result<(), Refused> {
        let counted = self.limiter().request(Instant::now(), &principal.name, &principal.limits);
        counted.inspect_err(note)
    }

    /// Where a key stands.
    pub fn standing(&self, principal: &Principal) -> Standing {
        self.limiter().standing(Instant::now(), &principal.name, &principal.limits)
    }
}

/// Counters are there before anything is counted.
pub fn begin_to_count() {
    for denied in Denied::ALL {
        drop(metrics::counter!(names::DENIED, "reason" => denied.reason()));
    }
    for limit in [Counted::Requests, Counted::Tokens, Counted::Concurrency] {
        drop(metrics::counter!(names::RATE_LIMITED, "limit" => limit.name()));
    }
    for of in [KEYS, tls::CERTIFICATE, jwt::KEYS, CLUSTER_CERTIFICATES, guard::LISTS] {
        drop(metrics::counter!(names::RELOADS, "of" => of));
        drop(metrics::counter!(names::RELOAD_FAILURES, "of" => of));
    }
    metrics::gauge!(names::AUDIT_FAILING).increment(0.0);
    drop(metrics::counter!(names::AUDIT_LOST));
    guard::begin_to_count();
}

fn note(refused: &Refused) {
    let limit = match refused {
        Refused::Later { counted, .. } => counted.name(),
        Refused::Never { .. } => "tokens",
    };
    metrics::counter!(names::RATE_LIMITED, "limit" => limit).increment(1);
}

fn in_force(fixed: &[KeyRecord], text: &[u8]) -> Result<Vec<KeyRecord>, String> {
    let mut records = KeyFile::parse(text).map_err(|e| e.to_string())?.records();
    records.extend_from_slice(fixed);
    Ok(records)
}
