//! The moderation webhook: a service of the operator's that is asked whether a text may pass.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use phalanx_cluster::{hex::hex, web};
use ring::hmac;
use serde::{Deserialize, Serialize};
use tokio::{sync::Semaphore, task::spawn_blocking, time::timeout};

use super::Direction;
use crate::metrics as names;

/// As metrics and the audit log name it where a request is refused or an answer ends.
pub const BY: &str = "moderation";
/// What it may say, or not say.
pub const VERDICTS: [&str; 3] = ["allowed", "refused", "failed"];
/// Questions at the same time; others wait, within their time.
const MOST_QUESTIONS: usize = 64;
/// Longest answer that is read, in bytes.
const LONGEST_ANSWER: u64 = 64 << 10;
/// Longest reason that is told, in characters.
const LONGEST_REASON: usize = 200;
/// A shorter secret can be guessed.
const SHORTEST_SECRET: usize = 16;

/// What happens when it does not answer in time, or not as it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The text passes.
    Allow,
    /// The request fails.
    #[default]
    Refuse,
}

/// What is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModerationConfig {
    /// Where it is.
    pub url: String,
    /// Longest wait for an answer.
    pub limit: Duration,
    /// What happens without one.
    pub on_error: OnError,
    /// With what questions are signed; `None`: with nothing.
    pub secret_file: Option<PathBuf>,
}

/// What it is asked.
#[derive(Debug, Clone, Serialize)]
pub struct Question {
    /// Name of the request, as in the audit log.
    pub request_id: String,
    /// Name of the key that it came with.
    pub key: Option<String>,
    /// The endpoint.
    pub route: String,
    /// Which way the text goes.
    pub direction: Direction,
    /// Which of the answers, or of the prompts.
    pub index: usize,
    /// What it is asked about.
    pub text: String,
    /// The end of what it allowed before of the same answer: so that nothing hides where parts meet.
    pub before: String,
    /// Whether it is all, or the last part.
    pub is_last: bool,
}

#[derive(Deserialize)]
struct Answer {
    allow: bool,
    reason: Option<String>,
}

/// Why a text does not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Objection {
    /// It said so, perhaps with a reason.
    Refused(String),
    /// Nobody knows.
    Unknown,
}

/// Asks it.
pub struct Moderation {
    url: String,
    limit: Duration,
    on_error: OnError,
    secret: Option<hmac::Key>,
    agent: ureq::Agent,
    places: Semaphore,
}

impl Moderation {
    /// As configured.
    ///
    /// # Errors
    /// If the secret can't be read or can be guessed.
    pub fn start(config: &ModerationConfig) -> anyhow::Result<Arc<Self>> {
        let secret = config.secret_file.as_ref().map(|path| -> anyhow::Result<hmac::Key> {
            let text = std::fs::read(path)
                .with_context(|| format!("--moderation-secret-file {} can't be read", path.display()))?;
            let secret = text.trim_ascii();
            if secret.len() < SHORTEST_SECRET {
                let found = secret.len();
                bail!("--moderation-secret-file {}: {found} bytes can be guessed, want 16", path.display());
            }
            Ok(hmac::Key::new(hmac::HMAC_SHA256, secret))
        });
        let agent = web::agent()
            .timeout_global(Some(config.limit))
            .max_redirects(0)
            .max_idle_connections_per_host(MOST_QUESTIONS)
            .build();
        Ok(Arc::new(Self {
            url: config.url.clone(),
            limit: config.limit,
            on_error: config.on_error,
            secret: secret.transpose()?,
            agent: agent.new_agent(),
            places: Semaphore::new(MOST_QUESTIONS),
        }))
    }

    /// Whether a text may pass.
    ///
    /// # Errors
    /// If not.
    pub async fn ask(self: Arc<Self>, question: Question) -> Result<(), Objection> {
        let direction = question.direction.name();
        let began_at = Instant::now();
        let answered = timeout(self.limit, Arc::clone(&self).call(question)).await;
        let answered = answered.unwrap_or_else(|_| Err(format!("no answer within {} s", self.limit.as_secs())));
        metrics::histogram!(names::MODERATION_SECONDS, "direction" => direction).record(began_at.elapsed());
        let (verdict, outcome) = match answered {
            Ok(Answer { allow: true, .. }) => ("allowed", Ok(())),
            Ok(Answer { allow: false, reason }) => ("refused", Err(Objection::Refused(harmless(reason)))),
            Err(reason) => {
                tracing::warn!(reason, direction, "the moderation webhook has not answered as it should");
                let outcome = match self.on_error {
                    OnError::Allow => Ok(()),
                    OnError::Refuse => Err(Objection::Unknown),
                };
                ("failed", outcome)
            }
        };
        metrics::counter!(names::MODERATIONS, "direction" => direction, "verdict" => verdict).increment(1);
        outcome
    }

    async fn call(self: Arc<Self>, question: Question) -> Result<Answer, String> {
        let body = serde_json::to_vec(&question).map_err(|e| e.to_string())?;
        let _place = self.places.acquire().await.map_err(|e| e.to_string())?;
        let asked = Arc::clone(&self);
        spawn_blocking(move || asked.post(&body)).await.map_err(|e| e.to_string())?
    }

    fn post(&self, body: &[u8]) -> Result<Answer, String> {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = since.map_or(0, |since| since.as_secs()).to_string();
        let send = || {
            let mut request = self.agent.post(&self.url).header("content-type", "application/json");
            if let Some(secret) = &self.secret {
                let signature = sign(secret, &now, body);
                request = request
                    .header("x-phalanx-timestamp", &now)
                    .header("x-phalanx-signature", format!("sha256={signature}"));
            }
            request.send(body)
        };
        let answer = match send() {
            // It may have closed a connection that stood idle. To ask twice does no harm.
            Err(ureq::Error::Io(_) | ureq::Error::ConnectionFailed) => send(),
            other => other,
        };
        let mut answer = answer.map_err(|error| error.to_string())?;
        if answer.status() != 200 {
            return Err(format!("it said {}", answer.status()));
        }
        let text = answer.body_mut().with_config().limit(LONGEST_ANSWER).read_to_vec().map_err(|e| e.to_string())?;
        serde_json::from_slice(&text).map_err(|e| format!("want {{\"allow\": true or false}}: {e}"))
    }
}

/// HMAC with SHA-256 of the time, a dot and the body, in hexadecimal digits.
fn sign(secret: &hmac::Key, now: &str, body: &[u8]) -> String {
    let mut signing = hmac::Context::with_key(secret);
    signing.update(now.as_bytes());
    signing.update(b".");
    signing.update(body);
    hex(signing.sign().as_ref())
}

fn harmless(reason: Option<String>) -> String {
    reason.unwrap_or_default().chars().filter(|c| !c.is_control()).take(LONGEST_REASON).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_and_body_are_signed_together() {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, b"Jefe");
        let plain = hmac::sign(&secret, b"1.{}");
        let hex = hex(plain.as_ref());
        assert_eq!(sign(&secret, "1", b"{}"), hex);
        assert_eq!(hex.len(), 64);
    }

    #[test]
    fn reasons_forge_no_lines() {
        assert_eq!(harmless(Some("a\nb\u{7}".to_owned())), "ab");
        assert_eq!(harmless(Some("x".repeat(1000))).len(), LONGEST_REASON);
        assert_eq!(harmless(None), "");
    }

    #[test]
    fn secrets_that_can_be_guessed_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "short\n").unwrap();
        let config = ModerationConfig {
            url: "http://127.0.0.1:1/".to_owned(),
            limit: Duration::from_secs(1),
            on_error: OnError::Refuse,
            secret_file: Some(file.path().to_owned()),
        };
        assert!(Moderation::start(&config).err().unwrap().to_string().contains("can be guessed"));
        std::fs::write(file.path(), "0123456789abcdef\n").unwrap();
        assert!(Moderation::start(&config).is_ok());
    }
}
