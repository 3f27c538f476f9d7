//! A gateway between a client and leaders that the tests play over real sockets.

mod transfers;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{extract::State, response::IntoResponse, routing::any};
use futures::StreamExt;
use http::{HeaderMap, StatusCode};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::*;
use crate::leadership::{CoordinatorRecord, Leader, Session, View};

/// Longest that anything may take; reached by failing tests only.
const PATIENCE: Duration = Duration::from_secs(60);

type Piece = Result<Bytes, std::io::Error>;

fn piece(text: &str) -> Piece {
    Ok(Bytes::copy_from_slice(text.as_bytes()))
}

fn broken() -> Piece {
    Err(std::io::Error::other("killed"))
}

/// What a leader is asked, and how it answers.
struct Asked {
    path: String,
    headers: HeaderMap,
    body: Bytes,
    reply: mpsc::UnboundedSender<Result<Response, ()>>,
}

impl Asked {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|v| v.to_str().unwrap())
    }

    fn with(self, response: Response) {
        self.reply.send(Ok(response)).unwrap();
    }

    /// Streams what is sent from now on.
    fn with_stream(self) -> mpsc::UnboundedSender<Piece> {
        let (sender, pieces) = mpsc::unbounded_channel();
        let body = Body::from_stream(UnboundedReceiverStream::new(pieces));
        self.with(([("content-type", "text/event-stream")], body).into_response());
        sender
    }
}

/// A leader that does what the test says.
struct FakeLeader {
    asked: mpsc::UnboundedReceiver<Asked>,
    router: Router,
    record: CoordinatorRecord,
}

impl FakeLeader {
    async fn start(name: &str) -> Self {
        let (sender, asked) = mpsc::unbounded_channel::<Asked>();
        let answer = |State(sender): State<mpsc::UnboundedSender<Asked>>, request: Request<Body>| async move {
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, usize::MAX).await.unwrap();
            let (reply, mut replies) = mpsc::unbounded_channel();
            sender.send(Asked { path: parts.uri.path().to_owned(), headers: parts.headers, body, reply }).unwrap();
            match replies.recv().await {
                Some(Ok(response)) => response,
                _ => std::future::pending().await,
            }
        };
        let router = Router::new().fallback(any(answer)).with_state(sender);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http_address = listener.local_addr().unwrap().to_string();
        tokio::spawn(axum::serve(listener, router.clone()).into_future());
        let record = CoordinatorRecord { coordinator_id: name.to_owned(), http_address, ..Default::default() };
        Self { asked, router, record }
    }

    async fn asked(&mut self) -> Asked {
        timeout(PATIENCE, self.asked.recv()).await.expect("somebody asks").unwrap()
    }

    fn leads(&self, term: u64) -> View {
        View { leader: Some(Leader { record: self.record.clone(), term }), ..View::default() }
    }
}

/// A standby, and what it believes.
struct Standby {
    gateway: Gateway,
    view: watch::Sender<View>,
}

fn standby(view: View) -> Standby {
    let (view, receiver) = watch::channel(view);
    let own = Router::new().fallback(|| async { (StatusCode::OK, "own") });
    let limits = Limits { max_body_bytes: 1000, ..Limits::default() };
    Standby {
        gateway: Gateway::new(
            LeadershipView::new(receiver),
            own,
            true,
            &limits,
            super::dial::Connector::new(None).unwrap(),
        ),
        view,
    }
}

impl Standby {
    fn send(&self, request: Request<Body>) -> tokio::task::JoinHandle<Response> {
        let gateway = self.gateway.clone();
        tokio::spawn(async move {
            match gateway.oneshot(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            }
        })
    }
}

fn generation(body: &str) -> Request<Body> {
    let request = Request::post("/v1/completions").header("content-type", "application/json");
    request.header("authorization", "mine").body(Body::from(body.to_owned())).unwrap()
}

async fn text(response: Response) -> String {
    let body = timeout(PATIENCE, to_bytes(response.into_body(), usize::MAX)).await.expect("the body ends");
    String::from_utf8(body.unwrap().to_vec()).unwrap()
}

/// Reads a stream until it has said so much.
async fn read_until(body: &mut axum::body::BodyDataStream, end: &str) -> String {
    let mut said = String::new();
    while !said.ends_with(end) {
        let piece = timeout(PATIENCE, body.next()).await.expect("the stream goes on").unwrap().unwrap();
        said.push_str(std::str::from_utf8(&piece).unwrap());
    }
    said
}

#[tokio::test]
async fn a_stream_goes_on_with_the_next_leader() {
    let (mut first, mut second) = (FakeLeader::start("first").await, FakeLeader::start("second").await);
    let standby = standby(first.leads(1));
    let answer = standby.send(generation("{\"prompt\":\"x\"}"));

    let asked = first.asked().await;
    assert_eq!((asked.path.as_str(), asked.body.as_ref()), ("/v1/completions", &b"{\"prompt\":\"x\"}"[..]));
    assert_eq!((asked.header("authorization"), asked.header("last-event-id")), (Some("mine"), None));
    assert!(asked.headers.contains_key(FORWARDED));
    let key = asked.header("x-phalanx-resume-key").unwrap().to_owned();
    let pieces = asked.with_stream();
    pieces.send(piece("data: 1\nid: k:1\n\ndata: 2\nid: k:2\n\nda")).unwrap();
    let mut body = answer.await.unwrap().into_body().into_data_stream();
    assert_eq!(read_until(&mut body, "k:2\n\n").await, "data: 1\nid: k:1\n\ndata: 2\nid: k:2\n\n");

    // It dies in the middle of an event.
    pieces.send(broken()).unwrap();
    standby.view.send_replace(second.leads(2));
    let mut asked = tokio::select! {
        asked = second.asked() => asked,
        // Asked again before its successor was known.
        asked = first.asked() => { drop(asked); second.asked().await }
    };
    assert_eq!(asked.header("last-event-id"), Some("k:2"));
    assert_eq!(asked.header("x-phalanx-resume-key"), Some(key.as_str()));
    assert_eq!(asked.body.as_ref(), b"{\"prompt\":\"x\"}");
    asked.path.clear();
    let pieces = asked.with_stream();
    pieces.send(piece("data: 3\nid: k:3\n\ndata: [DONE]\nid: k:3;d\n\n")).unwrap();
    assert_eq!(read_until(&mut body, "k:3;d\n\n").await, "data: 3\nid: k:3\n\ndata: [DONE]\nid: k:3;d\n\n");
    assert!(timeout(PATIENCE, body.next()).await.unwrap().is_none(), "and then it ends");
    timeout(PATIENCE, standby.gateway.idle()).await.expect("nothing is under way");
}

#[tokio::test]
async fn a_silent_leader_is_left_when_another_leads() {
    let (mut first, mut second) = (FakeLeader::start("first").await, FakeLeader::start("second").await);
    let standby = standby(first.leads(1));
    let answer = standby.send(generation("{}"));
    let pieces = first.asked().await.with_stream();
    pieces.send(piece("data: 1\nid: k:1\n\n")).unwrap();
    let mut body = answer.await.unwrap().into_body().into_data_stream();
    read_until(&mut body, "k:1\n\n").await;
    // Nobody leads: whoever led serves on.
    standby.view.send_replace(View::default());
    pieces.send(piece("data: 2\nid: k:2\n\n")).unwrap();
    read_until(&mut body, "k:2\n\n").await;
    standby.view.send_replace(second.leads(3));
    let asked = second.asked().await;
    assert_eq!(asked.header("last-event-id"), Some("k:2"));
    asked.with_stream().send(piece("data: [DONE]\n\n")).unwrap();
    assert_eq!(read_until(&mut body, "[DONE]\n\n").await, "data: [DONE]\n\n");
}

#[tokio::test]
async fn a_stream_goes_on_here_when_this_process_leads() {
    let (mut first, mut own) = (FakeLeader::start("first").await, FakeLeader::start("own").await);
    let standby = standby(first.leads(1));
    let answer = standby.send(generation("{}"));
    let pieces = first.asked().await.with_stream();
    pieces.send(piece("data: 1\nid: k:1\n\n")).unwrap();
    let mut body = answer.await.unwrap().into_body().into_data_stream();
    read_until(&mut body, "k:1\n\n").await;
    let session = Session { number: 1, term: 2 };
    standby.view.send_replace(View { session: Some(session), ..own.leads(2) });
    standby.gateway.set(Some(Local { session: 1, endpoints: own.router.clone() }));
    let pieces = own.asked().await.with_stream();
    pieces.send(piece("data: 2\nid: k:2\n\n")).unwrap();
    read_until(&mut body, "k:2\n\n").await;
    // It steps down: its last words are not the answer's.
    let mut third = FakeLeader::start("third").await;
    standby.view.send_replace(third.leads(3));
    pieces.send(piece("data: {\"error\":{}}\n\n")).unwrap();
    let asked = third.asked().await;
    assert_eq!(asked.header("last-event-id"), Some("k:2"));
    asked.with_stream().send(piece("data: [DONE]\n\n")).unwrap();
    assert_eq!(read_until(&mut body, "[DONE]\n\n").await, "data: [DONE]\n\n");
}

#[tokio::test]
async fn whole_answers_are_asked_for_again() {
    let (mut first, mut second) = (FakeLeader::start("first").await, FakeLeader::start("second").await);
    let standby = standby(first.leads(1));
    let answer = standby.send(generation("{}"));
    let (sender, pieces) = mpsc::unbounded_channel();
    let asked = first.asked().await;
    let key = asked.header("x-phalanx-resume-key").unwrap().to_owned();
    asked.with(Body::from_stream(UnboundedReceiverStream::new(pieces)).into_response());
    sender.send(piece("{\"half")).unwrap();
    sender.send(broken()).unwrap();
    let again = first.asked().await;
    assert_eq!(again.header("x-phalanx-resume-key"), Some(key.as_str()));
    // It no longer leads.
    again.with((StatusCode::SERVICE_UNAVAILABLE, [(NO_LEADER, "1")]).into_response());
    standby.view.send_replace(second.leads(2));
    let asked = tokio::select! {
        asked = second.asked() => asked,
        asked = first.asked() => { drop(asked); second.asked().await }
    };
    asked.with((StatusCode::IM_A_TEAPOT, [("x-request-id", "r")], "{}").into_response());
    let answer = answer.await.unwrap();
    assert_eq!((answer.status(), answer.headers()["x-request-id"].to_str().unwrap()), (StatusCode::IM_A_TEAPOT, "r"));
    assert_eq!(text(answer).await, "{}");
}

#[tokio::test]
async fn what_an_error_says_ends_a_stream_that_can_not_go_on() {
    let mut leader = FakeLeader::start("leader").await;
    let standby = standby(leader.leads(1));
    let answer = standby.send(generation("{}"));
    let pieces = leader.asked().await.with_stream();
    pieces.send(piece("data: 1\nid: k:1\n\n: ask again: it ends\n\n")).unwrap();
    let busy = leader.asked().await;
    busy.with(StatusCode::TOO_MANY_REQUESTS.into_response());
    leader.asked().await.with((StatusCode::UNPROCESSABLE_ENTITY, "{\"error\":1}").into_response());
    let body = text(answer.await.unwrap()).await;
    assert_eq!(body, "data: 1\nid: k:1\n\ndata: {\"error\":1}\n\n");
}

#[tokio::test]
async fn what_has_no_ids_is_not_told_twice() {
    let mut leader = FakeLeader::start("leader").await;
    let standby = standby(leader.leads(1));
    let answer = standby.send(generation("{}"));
    let pieces = leader.asked().await.with_stream();
    pieces.send(piece("data: 1\n\n")).unwrap();
    let mut body = answer.await.unwrap().into_body().into_data_stream();
    read_until(&mut body, "1\n\n").await;
    pieces.send(broken()).unwrap();
    let said = read_until(&mut body, "\n\n").await;
    assert!(said.contains("can't be resumed"), "{said}");
}

#[tokio::test]
async fn nobody_passes_on_what_was_passed_on() {
    let leader = Arc::new(Mutex::new(FakeLeader::start("leader").await));
    let standby = standby(leader.lock().unwrap().leads(1));
    let mut request = generation("{}");
    request.headers_mut().insert(FORWARDED, HeaderValue::from_static("1"));
    let refusal = standby.send(request).await.unwrap();
    assert_eq!(refusal.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(refusal.headers().contains_key(NO_LEADER));
    assert!(leader.lock().unwrap().asked.try_recv().is_err());
}

#[tokio::test]
async fn a_leader_breaks_forwarded_answers_off_when_it_steps_down() {
    let mut own = FakeLeader::start("own").await;
    let session = Session { number: 4, term: 9 };
    let leading = standby(View { session: Some(session), ..own.leads(9) });
    leading.gateway.set(Some(Local { session: 4, endpoints: own.router.clone() }));
    let forwarded = || {
        let mut request = generation("{}");
        request.headers_mut().insert(FORWARDED, HeaderValue::from_static("1"));
        request
    };
    let (streamed, waiting) = (leading.send(forwarded()), leading.send(forwarded()));
    let pieces = own.asked().await.with_stream();
    let unanswered = own.asked().await;
    pieces.send(piece("data: 1\n\n")).unwrap();
    // Whichever of the two was asked first.
    leading.view.send_replace(View::default());
    pieces.send(piece("data: last words\n\n")).unwrap();
    for answer in [streamed.await.unwrap(), waiting.await.unwrap()] {
        if answer.status() == StatusCode::OK {
            let body = to_bytes(answer.into_body(), usize::MAX).await;
            assert!(body.is_err(), "{body:?}");
        } else {
            assert!(answer.headers().contains_key(NO_LEADER));
        }
    }
    drop(unanswered);
}

#[tokio::test]
async fn a_coordinator_speaks_for_itself() {
    let mut leader = FakeLeader::start("leader").await;
    let standby = standby(leader.leads(1));
    for path in OWN_PATHS {
        let answer = standby.send(Request::get(*path).body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(text(answer).await, "own");
    }
    let answer = standby.send(Request::get("/v1/models?x=1").body(Body::empty()).unwrap());
    let asked = leader.asked().await;
    assert_eq!(asked.path, "/v1/models");
    assert_eq!(asked.header("x-phalanx-resume-key"), None);
    asked.with("models".into_response());
    assert_eq!(text(answer.await.unwrap()).await, "models");
    // Limits hold here as well.
    let answer = standby.send(generation(&"x".repeat(1001))).await.unwrap();
    assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let unannounced = Body::from_stream(futures::stream::iter([piece(&"x".repeat(600)), piece(&"x".repeat(600))]));
    let answer = standby.send(Request::post("/v1/completions").body(unannounced).unwrap()).await.unwrap();
    assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn a_clients_own_key_is_kept() {
    let mut leader = FakeLeader::start("leader").await;
    let standby = standby(leader.leads(1));
    let mut request = generation("{}");
    request.headers_mut().insert(IDEMPOTENCY_KEY, HeaderValue::from_static("mine"));
    let answer = standby.send(request);
    let asked = leader.asked().await;
    assert_eq!((asked.header("idempotency-key"), asked.header("x-phalanx-resume-key")), (Some("mine"), None));
    asked.with("{}".into_response());
    assert_eq!(answer.await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn lines_go_on_with_the_next_leader() {
    let (mut first, mut second) = (FakeLeader::start("first").await, FakeLeader::start("second").await);
    let standby = standby(first.leads(1));
    let request = Request::post("/api/chat").header("content-type", "application/json").body(Body::from("{}")).unwrap();
    let answer = standby.send(request);
    let asked = first.asked().await;
    assert!(asked.headers.contains_key("x-phalanx-resume-key"));
    let pieces = asked.with_stream();
    pieces.send(piece("id: 1\nretry: 250\ndata: {\"a\":1}\n\n: ping\n\nid: 2\ndata: {\"a\":2}\n\n")).unwrap();
    let answer = answer.await.unwrap();
    assert_eq!(answer.headers()["content-type"], "application/x-ndjson");
    let mut body = answer.into_body().into_data_stream();
    assert_eq!(read_until(&mut body, "2}\n").await, "{\"a\":1}\n{\"a\":2}\n");

    pieces.send(broken()).unwrap();
    standby.view.send_replace(second.leads(2));
    let asked = tokio::select! {
        asked = second.asked() => asked,
        // Asked again before its successor was known.
        asked = first.asked() => { drop(asked); second.asked().await }
    };
    assert_eq!(asked.header("last-event-id"), Some("2"));
    let pieces = asked.with_stream();
    pieces.send(piece("id: 3;1\ndata: {\"done\":true}\n\n")).unwrap();
    drop(pieces);
    assert_eq!(read_until(&mut body, "\n").await, "{\"done\":true}\n");
    assert!(timeout(PATIENCE, body.next()).await.unwrap().is_none(), "and then it ends");
}

#[tokio::test]
async fn refusals_have_the_form_of_their_api() {
    let standby = standby(FakeLeader::start("nobody").await.leads(1));
    for (path, member) in [("/v1/messages", "type"), ("/api/chat", "error"), ("/generate", "error_type")] {
        let long = Request::post(path).body(Body::from("x".repeat(2000))).unwrap();
        let answer = standby.send(long).await.unwrap();
        assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
        let error: serde_json::Value = serde_json::from_str(&text(answer).await).unwrap();
        assert!(error[member].is_string(), "{path}: {error}");
    }
}
