//! Options of keys, tokens, certificates for clients and the audit log.

use phalanx_cluster::byte_size::ByteSize;

use super::{ConfigError, Flags, guard, within, wrong};
use crate::security::{FixedKeys, SecurityConfig, audit::AuditConfig, jwt::JwtConfig, tls::SslFiles};

/// Who may ask, and what is recorded. Takes its options from `flags`.
pub(super) fn resolve(flags: &mut Flags) -> Result<SecurityConfig, ConfigError> {
    let api_keys = FixedKeys::new(flags.api_key.take().unwrap_or_default())
        .ok_or_else(|| wrong("api-key", "(secret)", "want distinct keys of visible ASCII characters"))?;
    let audit_bytes = flags.audit_max_bytes.unwrap_or(ByteSize(100 << 20));
    if audit_bytes.0 < 4096 {
        return Err(wrong("audit-max-bytes", audit_bytes, "want at least 4KiB"));
    }
    let audit_keep = within("audit-keep", flags.audit_keep.unwrap_or(10), 1, 10_000)?;
    let details = [
        ("audit-max-bytes", flags.audit_max_bytes.is_some()),
        ("audit-keep", flags.audit_keep.is_some()),
        ("audit-on-error", flags.audit_on_error.is_some()),
        ("audit-content", flags.audit_content.is_some()),
    ];
    if flags.audit_log.is_none()
        && let Some((option, _)) = details.into_iter().find(|(_, is_given)| *is_given)
    {
        return Err(wrong(option, "", "needs --audit-log too"));
    }
    let audit = flags.audit_log.take().map(|path| AuditConfig {
        path,
        max_bytes: audit_bytes.0,
        keep: audit_keep,
        on_error: flags.audit_on_error.unwrap_or_default(),
        content: flags.audit_content.unwrap_or(false),
    });
    let details = [
        ("jwt-audience", &flags.jwt_audience),
        ("jwt-issuer", &flags.jwt_issuer),
        ("jwt-role-claim", &flags.jwt_role_claim),
    ];
    if flags.jwks.is_none()
        && let Some((option, value)) = details.into_iter().find_map(|(option, value)| Some((option, value.as_ref()?)))
    {
        return Err(wrong(option, value, "needs --jwks too"));
    }
    let jwt = flags.jwks.take().map(|jwks| JwtConfig {
        jwks,
        audience: flags.jwt_audience.take(),
        issuer: flags.jwt_issuer.take(),
        role_claim: flags.jwt_role_claim.take().unwrap_or_else(|| "role".to_owned()),
    });
    let (guard, moderation) = (guard::resolve(flags)?, guard::moderation(flags)?);
    Ok(SecurityConfig { api_keys, key_file: flags.api_keys.take(), jwt, audit, guard, moderation })
}

/// What clients are shown. Takes its options from `flags`.
pub(super) fn certificates(flags: &mut Flags) -> Result<Option<SslFiles>, ConfigError> {
    Ok(match (flags.ssl_certfile.take(), flags.ssl_keyfile.take(), flags.ssl_ca_certs.take()) {
        (Some(certificate), Some(key), client_ca) => Some(SslFiles { certificate, key, client_ca }),
        (None, None, None) => None,
        (Some(file), None, _) => return Err(wrong("ssl-certfile", file.display(), "needs --ssl-keyfile too")),
        (None, Some(file), _) => return Err(wrong("ssl-keyfile", file.display(), "needs --ssl-certfile too")),
        (None, None, Some(file)) => {
            return Err(wrong("ssl-ca-certs", file.display(), "needs --ssl-certfile and --ssl-keyfile too"));
        }
    })
}

/// Flags that resolve to these.
pub(super) fn to_flags(config: &SecurityConfig, ssl: Option<&SslFiles>) -> Flags {
    Flags {
        api_key: Some(config.api_keys.keys().to_vec()).filter(|keys| !keys.is_empty()),
        api_keys: config.key_file.clone(),
        jwks: config.jwt.as_ref().map(|jwt| jwt.jwks.clone()),
        jwt_audience: config.jwt.as_ref().and_then(|jwt| jwt.audience.clone()),
        jwt_issuer: config.jwt.as_ref().and_then(|jwt| jwt.issuer.clone()),
        jwt_role_claim: config.jwt.as_ref().map(|jwt| jwt.role_claim.clone()),
        audit_log: config.audit.as_ref().map(|audit| audit.path.clone()),
        audit_max_bytes: config.audit.as_ref().map(|audit| ByteSize(audit.max_bytes)),
        audit_keep: config.audit.as_ref().map(|audit| audit.keep),
        audit_on_error: config.audit.as_ref().map(|audit| audit.on_error),
        audit_content: config.audit.as_ref().map(|audit| audit.content),
        ssl_certfile: ssl.map(|ssl| ssl.certificate.clone()),
        ssl_keyfile: ssl.map(|ssl| ssl.key.clone()),
        ssl_ca_certs: ssl.and_then(|ssl| ssl.client_ca.clone()),
        ..guard::to_flags(config.guard.as_ref(), config.moderation.as_ref())
    }
}
