//! Files pass through a standby whose limit is a fraction of them.

use axum::body::BodyDataStream;

use super::*;

/// More than the standby would keep: see [`standby`].
const PIECE: usize = 4000;

fn upload(pieces: mpsc::UnboundedReceiver<Piece>) -> Request<Body> {
    let body = Body::from_stream(UnboundedReceiverStream::new(pieces));
    Request::post("/v1/files").header("content-type", "multipart/form-data; boundary=b").body(body).unwrap()
}

fn content() -> Request<Body> {
    Request::get("/v1/files/file-1/content").body(Body::empty()).unwrap()
}

/// A leader whose uploads come as they are read.
async fn taker() -> (CoordinatorRecord, mpsc::UnboundedReceiver<(HeaderMap, BodyDataStream, mpsc::Sender<Response>)>) {
    let (sender, taken) = mpsc::unbounded_channel();
    let take = move |request: Request<Body>| {
        let sender = sender.clone();
        async move {
            let (parts, body) = request.into_parts();
            let (reply, mut replies) = mpsc::channel(1);
            sender.send((parts.headers, body.into_data_stream(), reply)).unwrap();
            match replies.recv().await {
                Some(response) => response,
                None => std::future::pending().await,
            }
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let http_address = listener.local_addr().unwrap().to_string();
    tokio::spawn(axum::serve(listener, Router::new().fallback(any(take))).into_future());
    (CoordinatorRecord { coordinator_id: "taker".to_owned(), http_address, ..Default::default() }, taken)
}

fn led_by(record: &CoordinatorRecord, term: u64) -> View {
    View { leader: Some(Leader { record: record.clone(), term }), ..View::default() }
}

async fn read_bytes(body: &mut BodyDataStream, n: usize) -> Vec<u8> {
    let mut read = Vec::new();
    while read.len() < n {
        read.extend_from_slice(&timeout(PATIENCE, body.next()).await.expect("more comes").unwrap().unwrap());
    }
    read
}

#[tokio::test]
async fn what_is_sent_passes_piece_by_piece() {
    let (record, mut taken) = taker().await;
    let standby = standby(led_by(&record, 1));
    let (client, pieces) = mpsc::unbounded_channel();
    let answer = standby.send(upload(pieces));
    client.send(piece(&"1".repeat(PIECE))).unwrap();
    let (headers, mut body, reply) = timeout(PATIENCE, taken.recv()).await.expect("it is passed on").unwrap();
    assert!(headers.contains_key(FORWARDED));
    assert_eq!(headers["content-type"], "multipart/form-data; boundary=b");
    // The second is not even made before the first is there.
    for n in ["1", "2", "3"] {
        assert_eq!(read_bytes(&mut body, PIECE).await, n.repeat(PIECE).as_bytes());
        client.send(piece(&(n.parse::<u8>().unwrap() + 1).to_string().repeat(PIECE))).unwrap();
    }
    drop(client);
    assert_eq!(read_bytes(&mut body, PIECE).await, "4".repeat(PIECE).as_bytes());
    assert!(timeout(PATIENCE, body.next()).await.unwrap().is_none());
    reply.send((StatusCode::IM_A_TEAPOT, "kept").into_response()).await.unwrap();
    let answer = answer.await.unwrap();
    assert_eq!(answer.status(), StatusCode::IM_A_TEAPOT);
    assert_eq!(text(answer).await, "kept");
    timeout(PATIENCE, standby.gateway.idle()).await.expect("nothing is under way");
}

#[tokio::test]
async fn what_is_not_begun_is_sent_to_the_next_leader() {
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = CoordinatorRecord { http_address: nobody.local_addr().unwrap().to_string(), ..Default::default() };
    drop(nobody);
    let standby = standby(led_by(&gone, 1));
    let (client, pieces) = mpsc::unbounded_channel();
    client.send(piece("all")).unwrap();
    drop(client);
    let answer = standby.send(upload(pieces));
    let mut second = FakeLeader::start("second").await;
    standby.view.send_replace(second.leads(2));
    let asked = second.asked().await;
    assert_eq!((asked.path.as_str(), asked.body.as_ref()), ("/v1/files", &b"all"[..]));
    asked.with("kept".into_response());
    assert_eq!(text(answer.await.unwrap()).await, "kept");
}

#[tokio::test]
async fn what_is_begun_is_not_sent_twice() {
    let (record, mut taken) = taker().await;
    let standby = standby(led_by(&record, 1));
    let (client, pieces) = mpsc::unbounded_channel();
    let answer = standby.send(upload(pieces));
    client.send(piece(&"1".repeat(PIECE))).unwrap();
    let (_, mut body, _reply) = timeout(PATIENCE, taken.recv()).await.expect("it is passed on").unwrap();
    read_bytes(&mut body, PIECE).await;
    let mut second = FakeLeader::start("second").await;
    standby.view.send_replace(second.leads(2));
    let answer = answer.await.unwrap();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    let said = text(answer).await;
    assert!(said.contains("send it again"), "{said}");
    assert!(second.asked.try_recv().is_err());
}

#[tokio::test]
async fn what_is_read_goes_on_with_the_next_leader() {
    let (mut first, mut second) = (FakeLeader::start("first").await, FakeLeader::start("second").await);
    let standby = standby(first.leads(1));
    let all = |n: usize| ([("content-length", (4 * n).to_string())], Body::from("abcd".repeat(n))).into_response();
    let answer = standby.send(content());
    let asked = first.asked().await;
    assert_eq!(asked.path, "/v1/files/file-1/content");
    let (sender, pieces) = mpsc::unbounded_channel();
    let length = [("content-length", (4 * PIECE).to_string())];
    asked.with((length, Body::from_stream(UnboundedReceiverStream::new(pieces))).into_response());
    sender.send(piece("abc")).unwrap();
    let answer = answer.await.unwrap();
    assert_eq!(answer.headers()["content-length"], (4 * PIECE).to_string());
    let mut body = answer.into_body().into_data_stream();
    assert_eq!(read_bytes(&mut body, 3).await, b"abc", "before there is more");
    sender.send(piece("dab")).unwrap();
    assert_eq!(read_bytes(&mut body, 3).await, b"dab");

    // Another one leads, and has no files yet; the first one says nothing more.
    standby.view.send_replace(second.leads(2));
    let goes_on = async {
        second.asked().await.with(StatusCode::SERVICE_UNAVAILABLE.into_response());
        second.asked().await.with(all(PIECE));
    };
    // Nothing is fetched for a client that does not read.
    let (rest, ()) = tokio::join!(read_bytes(&mut body, 4 * PIECE - 6), goes_on);
    assert_eq!(rest, &"abcd".repeat(PIECE).as_bytes()[6..]);
    assert!(timeout(PATIENCE, body.next()).await.unwrap().is_none(), "and then it ends");

    // A file that the next leader does not have ends early, and says so.
    for other in [StatusCode::NOT_FOUND.into_response(), all(1)] {
        let answer = standby.send(content());
        let (sender, pieces) = mpsc::unbounded_channel();
        let length = [("content-length", "9")];
        let stream = Body::from_stream(UnboundedReceiverStream::new(pieces));
        second.asked().await.with((length, stream).into_response());
        sender.send(piece("abc")).unwrap();
        let mut body = answer.await.unwrap().into_body().into_data_stream();
        assert_eq!(read_bytes(&mut body, 3).await, b"abc");
        sender.send(broken()).unwrap();
        let (next, ()) = tokio::join!(timeout(PATIENCE, body.next()), async { second.asked().await.with(other) });
        assert!(next.unwrap().expect("a reason").is_err());
    }
    timeout(PATIENCE, standby.gateway.idle()).await.expect("nothing is under way");
}

#[tokio::test]
async fn refusals_pass_as_they_are() {
    let mut leader = FakeLeader::start("leader").await;
    let standby = standby(leader.leads(1));
    let answer = standby.send(content());
    leader.asked().await.with((StatusCode::NOT_FOUND, "none").into_response());
    let answer = answer.await.unwrap();
    assert_eq!(answer.status(), StatusCode::NOT_FOUND);
    assert_eq!(text(answer).await, "none");
    // Others have the limits that they had.
    let long = Request::post("/v1/files/file-1/content").body(Body::from("x".repeat(PIECE))).unwrap();
    assert_eq!(standby.send(long).await.unwrap().status(), StatusCode::PAYLOAD_TOO_LARGE);
}
