//! What every HTTP request passes: first whether its sender may ask at all, then, where it is answered, how much.
//!
//! [`before`] puts it around all routers, so that no endpoint can forget it. It answers at every coordinator; [`count`] only at
//! the one that leads, so that a request that was passed on is counted once.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::{ConnectInfo, Request, State},
    middleware::{self, Next},
    response::Response,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method};

use super::{
    error::ApiError,
    family::refuse,
    forward::FORWARDED,
    observe::{REQUEST_ID, Record},
};
use crate::security::{
    Security,
    audit::{Account, AuditLog, CLIENT, Line, Origin, VIA},
    keys::{Denied, Principal, Role},
    limits::{Quota, Standing},
};

/// Paths that anybody may ask: they say whether the process lives and serves, and nothing else.
pub const PROBES: &[&str] = &["/health", "/ready", "/livez", "/readyz", "/startupz"];
/// Set on answers that have a line in the audit log already. Clients don't see it.
static RECORDED: HeaderName = HeaderName::from_static("x-phalanx-recorded");
/// Beginnings of paths that show or change how the cluster is run.
const ADMIN: &[&str] = &["/admin", "/debug"];

/// Whether a path is for those who administrate.
fn is_admin(path: &str) -> bool {
    ADMIN.iter().any(|begin| path.strip_prefix(begin).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

/// Put into a request that this process itself sends, for work that it does for somebody. Nothing that comes from elsewhere
/// can have it.
#[derive(Clone)]
pub struct OnBehalf {
    /// For whom; `None` where everybody may ask, and for whoever has started the process.
    pub principal: Option<Arc<Principal>>,
    /// Whether clients that wait come first.
    pub is_background: bool,
}

/// Who asks; `None` where everybody may.
fn who(security: &Security, request: &Request) -> Result<Option<Arc<Principal>>, Denied> {
    match request.extensions().get::<OnBehalf>() {
        Some(on_behalf) => Ok(on_behalf.principal.clone()),
        None => security.authenticate(request.headers()),
    }
}

/// Puts the door before a router: no path of it can be reached past that.
pub fn before(router: Router, security: Arc<Security>) -> Router {
    router.layer(middleware::from_fn_with_state(security, admit))
}

/// Who has no key gets nothing but the probes. What no endpoint has recorded is recorded here.
async fn admit(State(security): State<Arc<Security>>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    if PROBES.contains(&path.as_str()) {
        return next.run(request).await;
    }
    let began = Instant::now();
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|peer| peer.0);
    let is_passed_on = introduce(request.headers_mut(), peer);
    let origin = |request: &Request| {
        security.audit()?;
        Some(Origin::new(request.headers(), String::new(), request.method().as_str(), &path))
    };
    let origin = origin(&request);
    let mut key = None;
    let let_in = match who(&security, &request) {
        Ok(principal) => {
            let may_not = principal.as_ref().is_some_and(|p| p.role != Role::Admin) && is_admin(&path);
            key = principal.map(|principal| principal.name.clone());
            if may_not { Err(ApiError::forbidden(&path)) } else { Ok(()) }
        }
        Err(denied) => Err(denied.into()),
    };
    // Before anything is done that could not be recorded.
    let let_in = let_in.and_then(|()| security.audit().map_or(Ok(()), AuditLog::check).map_err(ApiError::from));
    let mut response = match let_in {
        Ok(()) => next.run(request).await,
        Err(error) => refuse(&path, &error),
    };
    let is_recorded = response.headers_mut().remove(&RECORDED).is_some();
    if let (Some(audit), Some(mut origin), false) = (security.audit(), origin, is_recorded) {
        origin.request_id = named(&mut response);
        let status = response.status();
        match audit.ticket().await {
            Ok(ticket) => ticket.write(&Line::short(origin, key, status.as_str(), began.elapsed())),
            Err(error) => response = refuse(&path, &error.into()),
        }
    } else if is_recorded && is_passed_on {
        // Whoever has passed it on need not.
        response.headers_mut().insert(&RECORDED, HeaderValue::from_static("1"));
    }
    response
}

/// Says in the head of a request whom it is from, for whoever answers it. If another coordinator has passed it on, its word
/// stays, and so does its address. Returns whether one says that it has.
pub fn introduce(headers: &mut HeaderMap, peer: Option<SocketAddr>) -> bool {
    let is_passed_on = headers.contains_key(FORWARDED);
    let (name, stale) = if is_passed_on { (VIA, None) } else { (CLIENT, Some(VIA)) };
    for name in stale.into_iter().chain([name]) {
        headers.remove(name);
    }
    if let Some(peer) = peer.and_then(|peer| HeaderValue::try_from(peer.to_string()).ok()) {
        headers.insert(name, peer);
    }
    is_passed_on
}

/// The name that an answer has, or gets now.
fn named(response: &mut Response) -> String {
    let given = response.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).map(str::to_owned);
    given.unwrap_or_else(|| {
        let made = uuid::Uuid::new_v4().simple().to_string();
        if let Ok(id) = HeaderValue::try_from(&made) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        made
    })
}

/// Middleware around endpoints: who has a key is known to them, and has as many requests as the key gives; what is to be
/// recorded has a place in the audit log.
pub async fn count(State(security): State<Arc<Security>>, request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let Some(record) = request.extensions().get::<Arc<Record>>().cloned() else { return next.run(request).await };
    if PROBES.contains(&path.as_str()) {
        return next.run(request).await;
    }
    if let Some(audit) = security.audit() {
        let ticket = match audit.ticket().await {
            Ok(ticket) => ticket,
            Err(error) => return refuse(&path, &error.into()),
        };
        let id = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
        let origin = Origin::new(request.headers(), id, request.method().as_str(), record.endpoint());
        record.audit(Account::new(audit, ticket, origin));
    }
    let mut response = counted(&security, &record, &path, request, next).await;
    if record.account().is_some() {
        response.headers_mut().insert(&RECORDED, HeaderValue::from_static("1"));
    }
    response
}

async fn counted(security: &Security, record: &Record, path: &str, request: Request, next: Next) -> Response {
    // Once more: the request may have come from another coordinator, whose word is not enough.
    let principal = match who(security, &request) {
        Ok(Some(principal)) => principal,
        Ok(None) => return next.run(request).await,
        Err(denied) => return refuse(path, &denied.into()),
    };
    record.identify(Arc::clone(&principal));
    // What is only looked at costs nothing.
    let counted = match *request.method() {
        Method::POST => security.count_request(&principal),
        _ => Ok(()),
    };
    let mut response = match counted {
        Ok(()) => next.run(request).await,
        Err(refused) => refuse(path, &refused.into()),
    };
    tell(&security.standing(&principal), response.headers_mut());
    response
}

/// Says where the key stands, in OpenAI's headers.
fn tell(standing: &Standing, headers: &mut HeaderMap) {
    let mut one = |quota: Option<Quota>, names: [&'static str; 3]| {
        let Some(Quota { limit, remaining, reset }) = quota else { return };
        let values = [limit.into(), remaining.into(), reset_text(reset)];
        for (name, value) in names.into_iter().zip(values) {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    one(
        standing.requests,
        ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"],
    );
    one(standing.tokens, ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"]);
}

/// A time as OpenAI writes it: `1m0s`, `17.25s`, `120ms`.
fn reset_text(time: Duration) -> HeaderValue {
    let ms = time.as_millis();
    let (minutes, rest) = (ms / 60_000, ms % 60_000);
    let seconds = || {
        let text = format!("{}.{:03}", rest / 1000, rest % 1000);
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    let text = match minutes {
        0 if ms < 1000 => format!("{ms}ms"),
        0 => format!("{}s", seconds()),
        _ => format!("{minutes}m{}s", seconds()),
    };
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("1m0s"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_openai_writes_them() {
        for (ms, text) in
            [(0, "0ms"), (120, "120ms"), (1000, "1s"), (17_250, "17.25s"), (60_000, "1m0s"), (61_007, "1m1.007s")]
        {
            assert_eq!(reset_text(Duration::from_millis(ms)), text);
        }
    }

    #[test]
    fn admin_paths_are_whole_words() {
        assert!(is_admin("/admin/status") && is_admin("/debug/cluster") && is_admin("/admin"));
        assert!(!is_admin("/administration") && !is_admin("/v1/admin") && !is_admin("/metrics"));
    }
}
