//! Options of the guard and of the moderation webhook.

use std::time::Duration;

use super::{ConfigError, Flags, within, wrong};
use crate::guard::{GuardConfig, moderation::ModerationConfig};

/// What must not be said. Takes its options from `flags`.
pub(super) fn resolve(flags: &mut Flags) -> Result<Option<GuardConfig>, ConfigError> {
    let asked = flags.guard.take().unwrap_or_default();
    match (asked.is_empty(), flags.guard_action.take()) {
        (true, Some(_)) => Err(wrong("guard-action", "", "needs --guard too")),
        (true, None) => Ok(None),
        (false, action) => match GuardConfig::parse(asked, action) {
            Ok(config) => Ok(Some(config)),
            Err((item, reason)) => Err(wrong("guard", item, reason)),
        },
    }
}

/// Who is asked. Takes its options from `flags`.
pub(super) fn moderation(flags: &mut Flags) -> Result<Option<ModerationConfig>, ConfigError> {
    let (limit, on_error) = (flags.moderation_timeout.take(), flags.moderation_on_error.take());
    let secret_file = flags.moderation_secret_file.take();
    let Some(url) = flags.moderation_webhook.take() else {
        let details = [
            ("moderation-timeout", limit.is_some()),
            ("moderation-on-error", on_error.is_some()),
            ("moderation-secret-file", secret_file.is_some()),
        ];
        return match details.into_iter().find(|(_, is_given)| *is_given) {
            Some((option, _)) => Err(wrong(option, "", "needs --moderation-webhook too")),
            None => Ok(None),
        };
    };
    if !["http://", "https://"].iter().any(|scheme| url.starts_with(scheme)) || url.parse::<http::Uri>().is_err() {
        return Err(wrong("moderation-webhook", url, "want an address such as https://host/path"));
    }
    let limit = within("moderation-timeout", limit.unwrap_or(5), 1, 300)?;
    let limit = Duration::from_secs(u64::from(limit));
    Ok(Some(ModerationConfig { url, limit, on_error: on_error.unwrap_or_default(), secret_file }))
}

/// Flags that resolve to these.
pub(super) fn to_flags(guard: Option<&GuardConfig>, moderation: Option<&ModerationConfig>) -> Flags {
    Flags {
        guard: guard.map(|guard| guard.asked.clone()),
        guard_action: guard.and_then(|guard| guard.action),
        moderation_webhook: moderation.map(|asked| asked.url.clone()),
        moderation_timeout: moderation.map(|asked| u32::try_from(asked.limit.as_secs()).unwrap_or(u32::MAX)),
        moderation_on_error: moderation.map(|asked| asked.on_error),
        moderation_secret_file: moderation.and_then(|asked| asked.secret_file.clone()),
        ..Flags::default()
    }
}
