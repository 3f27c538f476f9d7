//! Membership in an etcd cluster (v3 API; 3.4 and later).
//!
//! All keys lie under the URL's prefix. A watch that loses its connection opens another one where it stopped; if etcd has
//! compacted that far, it lists everything and says so.

use std::{collections::VecDeque, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Error, EventType, GetOptions, Identity, KeyValue,
    PutOptions, TlsOptions, Txn, TxnOp, TxnOpResponse, WatchOptions, WatchStream,
};
use futures::stream;

use super::{
    Expected, LeaseId, Listing, MembershipStore, OpenOptions, Record, Revision, StoreError, Swap, TlsFiles, Watch,
    WatchEvent,
};

/// Longest that one call may take.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Pause before a broken watch is opened again.
const REOPEN_PAUSE: Duration = Duration::from_millis(250);
const DEFAULT_PREFIX: &str = "phalanx";

/// The parts of a URL behind `etcd://`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Location {
    endpoints: Vec<String>,
    prefix: String,
    credentials: Option<(String, String)>,
}

impl Location {
    fn parse(rest: &str) -> Result<Self, String> {
        let (credentials, rest) = match rest.rsplit_once('@') {
            None => (None, rest),
            Some((login, rest)) => {
                let (user, password) = login.split_once(':').ok_or("want USER:PASSWORD before the @")?;
                (Some((user.to_owned(), password.to_owned())), rest)
            }
        };
        let (hosts, prefix) = rest.split_once('/').unwrap_or((rest, DEFAULT_PREFIX));
        let prefix = prefix.trim_matches('/');
        let prefix = if prefix.is_empty() { DEFAULT_PREFIX } else { prefix };
        let endpoints = hosts.split(',').map(|endpoint| {
            let port = endpoint.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port);
            match port.and_then(|p| p.parse::<u16>().ok()) {
                Some(_) => Ok(endpoint.to_owned()),
                None => Err(format!("{endpoint:?} is no HOST:PORT")),
            }
        });
        Ok(Self { endpoints: endpoints.collect::<Result<_, _>>()?, prefix: format!("{prefix}/"), credentials })
    }
}

pub(super) fn check(rest: &str) -> Result<(), String> {
    Location::parse(rest).map(drop)
}

pub(super) async fn open(rest: &str, options: &OpenOptions) -> Result<Arc<dyn MembershipStore>, StoreError> {
    let location = Location::parse(rest)
        .map_err(|reason| StoreError::BadUrl { url: super::redacted(&format!("etcd://{rest}")), reason })?;
    Ok(Arc::new(EtcdStore::connect(location, options).await?))
}

/// A store in etcd.
pub struct EtcdStore {
    link: Link,
}

/// A connection and what errors should call it.
#[derive(Clone)]
struct Link {
    client: Client,
    prefix: String,
    at: String,
}

impl EtcdStore {
    async fn connect(location: Location, options: &OpenOptions) -> Result<Self, StoreError> {
        let at = format!("etcd://{}", location.endpoints.join(","));
        let mut connect = ConnectOptions::new()
            .with_connect_timeout(CALL_LIMIT)
            .with_keep_alive(Duration::from_secs(5), Duration::from_secs(3))
            .with_keep_alive_while_idle(true)
            .with_auto_token_refresh(true)
            .with_require_leader(true);
        if let Some((user, password)) = location.credentials.or_else(|| options.credentials.clone()) {
            connect = connect.with_user(user, password);
        }
        let mut endpoints = location.endpoints;
        if let Some(files) = &options.tls {
            connect = connect.with_tls(tls(files)?);
            endpoints = endpoints.into_iter().map(|endpoint| format!("https://{endpoint}")).collect();
        }
        let client = tokio::time::timeout(CALL_LIMIT, Client::connect(endpoints, Some(connect)))
            .await
            .map_err(|_| unanswered(&at))?
            .map_err(|e| classify(&at, &e))?;
        let store = Self { link: Link { client, prefix: location.prefix, at } };
        // Connections are made lazily: a wrong address should be known now.
        store.get("").await?;
        Ok(store)
    }
}

fn tls(files: &TlsFiles) -> Result<TlsOptions, StoreError> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|e| StoreError::File { path: path.to_owned(), reason: e.to_string() })
    };
    let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read(&files.ca)?));
    if let Some((certificate, key)) = &files.identity {
        tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    Ok(tls)
}

fn unanswered(at: &str) -> StoreError {
    StoreError::Unavailable { at: at.to_owned(), reason: format!("no answer within {CALL_LIMIT:?}") }
}

/// Whether trying again can help: everything but a refusal may be a network or a leader that comes back.
fn classify(at: &str, error: &Error) -> StoreError {
    use tonic_code::{PERMISSION_DENIED, REFUSALS, UNAUTHENTICATED};
    let (at, reason) = (at.to_owned(), error.to_string());
    match error {
        Error::GRpcStatus(status)
            if REFUSALS.contains(&(status.code() as i32))
                || [PERMISSION_DENIED, UNAUTHENTICATED].contains(&(status.code() as i32)) =>
        {
            StoreError::Refused { at, reason }
        }
        Error::InvalidArgs(_) | Error::InvalidUri(_) => StoreError::Refused { at, reason },
        _ => StoreError::Unavailable { at, reason },
    }
}

/// gRPC status codes (grpc.io, "Status codes and their use in gRPC").
mod tonic_code {
    pub const NOT_FOUND: i32 = 5;
    pub const PERMISSION_DENIED: i32 = 7;
    pub const UNAUTHENTICATED: i32 = 16;
    /// `INVALID_ARGUMENT`, `FAILED_PRECONDITION`, `UNIMPLEMENTED`.
    pub const REFUSALS: [i32; 3] = [3, 9, 12];
}

fn not_found(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.code() as i32 == tonic_code::NOT_FOUND)
}

fn unsigned(revision: i64) -> Revision {
    Revision::try_from(revision).unwrap_or(0)
}

fn signed(revision: Revision) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

impl Link {
    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn strip(&self, key: &[u8]) -> String {
        let key = String::from_utf8_lossy(key);
        key.strip_prefix(&self.prefix).unwrap_or(&key).to_owned()
    }

    fn record(&self, kv: &KeyValue) -> Record {
        Record {
            key: self.strip(kv.key()),
            value: kv.value().to_owned(),
            mod_revision: unsigned(kv.mod_revision()),
            lease: (kv.lease() != 0).then_some(LeaseId(kv.lease())),
        }
    }

    async fn within<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<Result<T, Error>, StoreError> {
        tokio::time::timeout(CALL_LIMIT, call).await.map_err(|_| unanswered(&self.at))
    }

    async fn call<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, StoreError> {
        self.within(call).await?.map_err(|e| classify(&self.at, &e))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let options = GetOptions::new().with_prefix();
        let answer = self.call(self.client.kv_client().get(self.key(prefix), Some(options))).await?;
        let records = answer.kvs().iter().map(|kv| self.record(kv)).collect();
        Ok(Listing { records, revision: answer.header().map_or(0, |h| unsigned(h.revision())) })
    }

    async fn open_watch(&self, prefix: &str, after: Revision) -> Result<WatchStream, StoreError> {
        let options = WatchOptions::new().with_prefix().with_start_revision(signed(after).saturating_add(1));
        self.call(self.client.watch_client().watch(self.key(prefix), Some(options))).await
    }
}

#[async_trait]
impl MembershipStore for EtcdStore {
    async fn put(&self, key: &str, value: Vec<u8>, lease: Option<LeaseId>) -> Result<Revision, StoreError> {
        let options = lease.map(|l| PutOptions::new().with_lease(l.0));
        let answer = self.link.within(self.link.client.kv_client().put(self.link.key(key), value, options)).await?;
        match (answer, lease) {
            (Ok(answer), _) => Ok(answer.header().map_or(0, |h| unsigned(h.revision()))),
            (Err(e), Some(lease)) if not_found(&e) => Err(StoreError::LeaseEnded(lease)),
            (Err(e), _) => Err(classify(&self.link.at, &e)),
        }
    }

    async fn get(&self, key: &str) -> Result<Option<Record>, StoreError> {
        let answer = self.link.call(self.link.client.kv_client().get(self.link.key(key), None)).await?;
        Ok(answer.kvs().first().map(|kv| self.link.record(kv)))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.link.list(prefix).await
    }

    async fn delete(&self, key: &str) -> Result<bool, StoreError> {
        let answer = self.link.call(self.link.client.kv_client().delete(self.link.key(key), None)).await?;
        Ok(answer.deleted() > 0)
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Expected,
        value: Vec<u8>,
        lease: Option<LeaseId>,
    ) -> Result<Swap, StoreError> {
        let full = self.link.key(key);
        let compare = match expected {
            Expected::Absent => Compare::create_revision(full.clone(), CompareOp::Equal, 0),
            Expected::Unchanged(revision) => Compare::mod_revision(full.clone(), CompareOp::Equal, signed(revision)),
        };
        let options = lease.map(|l| PutOptions::new().with_lease(l.0));
        let txn = Txn::new()
            .when([compare])
            .and_then([TxnOp::put(full.clone(), value, options)])
            .or_else([TxnOp::get(full, None)]);
        let answer = match (self.link.within(self.link.client.kv_client().txn(txn)).await?, lease) {
            (Ok(answer), _) => answer,
            (Err(e), Some(lease)) if not_found(&e) => return Err(StoreError::LeaseEnded(lease)),
            (Err(e), _) => return Err(classify(&self.link.at, &e)),
        };
        if answer.succeeded() {
            return Ok(Swap::Done(answer.header().map_or(0, |h| unsigned(h.revision()))));
        }
        let found = answer.op_responses().into_iter().find_map(|op| match op {
            TxnOpResponse::Get(get) => get.kvs().first().map(|kv| self.link.record(kv)),
            _ => None,
        });
        Ok(Swap::Conflict(found))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let answer = self.link.call(self.link.client.lease_client().grant(signed(seconds.max(1)), None)).await?;
        Ok(LeaseId(answer.id()))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        match self.link.within(self.link.client.lease_client().keep_alive(lease.0)).await? {
            Ok(_) => Ok(()),
            // The client reads the first answer itself and calls a lease that is gone this.
            Err(Error::LeaseKeepAliveError(_)) => Err(StoreError::LeaseEnded(lease)),
            Err(e) => Err(classify(&self.link.at, &e)),
        }
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        match self.link.within(self.link.client.lease_client().revoke(lease.0)).await? {
            Ok(_) => Ok(()),
            Err(e) if not_found(&e) => Ok(()),
            Err(e) => Err(classify(&self.link.at, &e)),
        }
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        let watcher = Watcher {
            link: self.link.clone(),
            prefix: prefix.to_owned(),
            after,
            stream: Some(self.link.open_watch(prefix, after).await?),
            queue: VecDeque::new(),
        };
        Ok(Box::pin(stream::unfold(Some(watcher), |watcher| async {
            let mut watcher = watcher?;
            match watcher.next().await {
                Ok(event) => Some((Ok(event), Some(watcher))),
                Err(error) => Some((Err(error), None)),
            }
        })))
    }
}

/// A watch that outlives its connections.
struct Watcher {
    link: Link,
    prefix: String,
    /// Everything up to here has been seen.
    after: Revision,
    stream: Option<WatchStream>,
    queue: VecDeque<WatchEvent>,
}

impl Watcher {
    async fn next(&mut self) -> Result<WatchEvent, StoreError> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Ok(event);
            }
            match self.advance().await {
                Ok(()) => {}
                Err(error @ StoreError::Unavailable { .. }) => {
                    tracing::warn!(%error, prefix = self.prefix, "watch broke, opening it again");
                    self.stream = None;
                    tokio::time::sleep(REOPEN_PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn advance(&mut self) -> Result<(), StoreError> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => self.stream.insert(self.link.open_watch(&self.prefix, self.after).await?),
        };
        let broken = |reason: &str| StoreError::Unavailable { at: self.link.at.clone(), reason: reason.to_owned() };
        let answer = stream.message().await.map_err(|e| classify(&self.link.at, &e))?;
        let answer = answer.ok_or_else(|| broken("the watch was closed"))?;
        if answer.compact_revision() != 0 {
            self.stream = None;
            let listing = self.link.list(&self.prefix).await?;
            self.after = listing.revision;
            self.queue.push_back(WatchEvent::Resync(listing));
            return Ok(());
        }
        if answer.canceled() {
            return Err(broken(answer.cancel_reason()));
        }
        for event in answer.events() {
            let Some(kv) = event.kv() else { continue };
            let revision = unsigned(kv.mod_revision());
            self.after = self.after.max(revision);
            self.queue.push_back(match event.event_type() {
                EventType::Put => WatchEvent::Put(self.link.record(kv)),
                EventType::Delete => WatchEvent::Deleted { key: self.link.strip(kv.key()), revision },
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use etcd_client::Permission;

    use super::{
        super::contract::{self, EtcdServer},
        *,
    };

    fn location(rest: &str) -> Location {
        Location::parse(rest).unwrap()
    }

    #[test]
    fn urls_have_endpoints_prefix_and_login() {
        let plain = location("a:1,b:2");
        assert_eq!((plain.endpoints, plain.prefix.as_str()), (vec!["a:1".to_owned(), "b:2".to_owned()], "phalanx/"));
        let full = location("u:p@a:1/x/y/");
        assert_eq!(full.prefix, "x/y/");
        assert_eq!(full.credentials, Some(("u".to_owned(), "p".to_owned())));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn keeps_the_contract() {
        let server = EtcdServer::start();
        let store = EtcdStore::connect(location(&server.endpoint), &OpenOptions::default()).await.unwrap();
        contract::check(&store).await;
        let compact = async |revision| {
            Client::connect([&server.endpoint], None).await.unwrap().compact(signed(revision), None).await.unwrap();
        };
        contract::check_resync(&store, compact).await;

        let shared: Arc<dyn MembershipStore> =
            Arc::new(EtcdStore::connect(location(&server.endpoint), &OpenOptions::default()).await.unwrap());
        contract::check_election(&shared).await;

        // Two clusters in one etcd don't see each other.
        let other = location(&format!("{}/other", server.endpoint));
        let other = EtcdStore::connect(other, &OpenOptions::default()).await.unwrap();
        store.put("shared", b"1".to_vec(), None).await.unwrap();
        assert_eq!(other.list("").await.unwrap().records, Vec::new());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn speaks_tls_and_shows_who_it_is() {
        let (server, files) = EtcdServer::start_with_tls();
        let open = async |tls: Option<TlsFiles>| {
            EtcdStore::connect(location(&server.endpoint), &OpenOptions { tls, ..OpenOptions::default() }).await
        };
        let store = open(Some(files.clone())).await.unwrap();
        store.put("k", b"1".to_vec(), None).await.unwrap();
        assert_eq!(store.get("k").await.unwrap().unwrap().value, b"1");
        // Without a certificate, or in plain text, there is nothing to be had.
        assert!(open(Some(TlsFiles { identity: None, ..files.clone() })).await.is_err());
        assert!(open(None).await.is_err());
        let absent = TlsFiles { ca: "/nonexistent/ca.pem".into(), identity: None };
        assert!(matches!(open(Some(absent)).await, Err(StoreError::File { .. })));
    }

    /// A user who may read and write keys under one prefix, and nothing else. Everybody must log in from now on.
    async fn admit(server: &EtcdServer, user: &str, password: &str, prefix: &str) {
        let client = Client::connect([&server.endpoint], None).await.unwrap();
        let mut auth = client.auth_client();
        auth.user_add("root", "r", None).await.unwrap();
        auth.role_add("root").await.unwrap();
        auth.user_grant_role("root", "root").await.unwrap();
        auth.user_add(user, password, None).await.unwrap();
        auth.role_add("ours").await.unwrap();
        auth.role_grant_permission("ours", Permission::read_write(prefix).with_prefix()).await.unwrap();
        auth.user_grant_role(user, "ours").await.unwrap();
        auth.auth_enable().await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn logs_in_where_users_are_known() {
        let mut server = EtcdServer::start();
        admit(&server, "us", "secret", "phalanx/").await;
        let open = async |login: &str, options: OpenOptions| {
            EtcdStore::connect(location(&format!("{login}{}", server.endpoint)), &options).await
        };
        let apart = ("us".to_owned(), "secret".to_owned());
        let apart = OpenOptions { credentials: Some(apart), ..OpenOptions::default() };
        open("", apart).await.unwrap();
        let store: Arc<dyn MembershipStore> = Arc::new(open("us:secret@", OpenOptions::default()).await.unwrap());
        // The rights on the prefix are all that is needed.
        contract::check(&*store).await;
        contract::check_election(&store).await;

        for wrong in ["", "us:guess@", "them:secret@"] {
            let refused = open(wrong, OpenOptions::default()).await.err().unwrap();
            assert!(matches!(refused, StoreError::Refused { .. }), "{wrong}: {refused}");
        }
        let elsewhere = location(&format!("us:secret@{}/other", server.endpoint));
        let refused = EtcdStore::connect(elsewhere, &OpenOptions::default()).await.err().unwrap();
        assert!(matches!(&refused, StoreError::Refused { reason, .. } if reason.contains("denied")), "{refused}");

        // A server that starts again has forgotten who is logged in.
        server.restart();
        contract::retry(async || store.put("k", b"2".to_vec(), None).await).await;
        assert_eq!(store.get("k").await.unwrap().unwrap().value, b"2");
        let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
        store.keep_alive(lease).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_endpoint_of_several_is_enough() {
        let server = EtcdServer::start();
        // Port 1 (tcpmux) is closed on any machine that runs tests.
        let several = location(&format!("127.0.0.1:1,{}", server.endpoint));
        let store = contract::retry(async || EtcdStore::connect(several.clone(), &OpenOptions::default()).await).await;
        contract::retry(async || store.put("k", b"1".to_vec(), None).await).await;
        assert_eq!(contract::retry(async || store.get("k").await).await.unwrap().value, b"1");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_watch_goes_on_after_a_restart() {
        let mut server = EtcdServer::start();
        let store = EtcdStore::connect(location(&server.endpoint), &OpenOptions::default()).await.unwrap();
        let revision = store.put("k", b"1".to_vec(), None).await.unwrap();
        let mut watch = store.watch("k", revision).await.unwrap();
        server.restart();
        contract::retry(async || store.put("k", b"2".to_vec(), None).await).await;
        let event = contract::next(&mut watch).await;
        assert!(matches!(&event, WatchEvent::Put(r) if r.value == b"2"), "{event:?}");
    }

    #[tokio::test]
    async fn an_absent_server_is_unavailable() {
        // Port 1 (tcpmux) is closed on any machine that runs tests.
        let error = EtcdStore::connect(location("127.0.0.1:1"), &OpenOptions::default()).await.err().unwrap();
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
    }
}
