use std::net::SocketAddr;

use phalanx_proto::v1::{ChatMessage, ChatMessages, LogitBias, TokenIds, inference_client::InferenceClient};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus};

use super::*;
use crate::{
    frontend::{Limits, tests::fake::Server},
    request::{Output, Queued, RequestError, RequestEvent},
    scheduler::handle::Readiness,
    security::{
        keys::{KeyHash, KeyRecord, Role},
        limits::KeyLimits,
    },
};

/// The services on a real socket.
async fn serve(server: &Server) -> Channel {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let routes = grpc_routes(server.state.clone()).unwrap();
    let incoming = TcpListenerStream::new(listener);
    tokio::spawn(tonic::transport::Server::builder().add_routes(routes).serve_with_incoming(incoming));
    Endpoint::try_from(format!("http://{address}")).unwrap().connect().await.unwrap()
}

fn text(text: &str) -> GenerateRequest {
    GenerateRequest { prompt: Some(WirePrompt::Text(text.to_owned())), ..GenerateRequest::default() }
}

async fn collect(channel: &Channel, request: GenerateRequest) -> Result<Vec<GenerateResponse>, Status> {
    let mut stream = InferenceClient::new(channel.clone()).generate(request).await?.into_inner();
    let mut all = Vec::new();
    while let Some(message) = stream.message().await? {
        all.push(message);
    }
    Ok(all)
}

#[tokio::test]
async fn a_call_streams_scores_tokens_and_usage() {
    let server = Server::saying(" très bien");
    let channel = serve(&server).await;
    let request = GenerateRequest {
        logprobs: Some(1),
        prompt_logprobs: Some(2),
        n: Some(2),
        request_id: "job-1".to_owned(),
        seed: Some(u64::MAX),
        ..text("ça va")
    };
    let all = collect(&channel, request).await.unwrap();
    let request = server.last_request();
    assert_eq!((request.sampling.temperature, request.sampling.seed), (1.0, u64::MAX));
    assert_eq!(all[0].prompt_scores.len(), request.prompt.len() - 1);
    assert!(all[0].prompt_scores.iter().all(|s| s.top.len() == 2));
    for index in 0..2 {
        let parts = || all.iter().filter(|m| m.index == index && m.usage.is_none());
        assert_eq!(parts().map(|m| m.text.as_str()).collect::<String>(), " très bien");
        let ids: Vec<u32> = parts().flat_map(|m| m.token_ids.clone()).collect();
        assert_eq!(ids, server.tokenizer.encode(" très bien", false).unwrap());
        assert_eq!(parts().map(|m| m.scores.len()).sum::<usize>(), ids.len());
        assert_eq!(parts().next_back().unwrap().finish_reason(), FinishReason::Stop);
    }
    assert!(all.iter().all(|m| m.request_id == "job-1"));
    let usage = all.last().unwrap().usage.unwrap();
    assert_eq!(usage.prompt_tokens as usize, request.prompt.len());
    assert_eq!(usage.cached_tokens, 2);
}

#[tokio::test]
async fn a_call_with_a_key_is_resumed() {
    let tokens = |n: u32, index: u32| {
        (0..n).map(move |at| {
            let finish = (at + 1 == n).then_some(Finish::Length);
            Output { index, text: format!("<{at}>"), token_ids: vec![at + 5], finish, ..Output::default() }
        })
    };
    let server = Server::with(move |_| {
        let mut events: Vec<_> = tokens(4, 1).chain(tokens(3, 0)).map(RequestEvent::Output).collect();
        events.push(RequestEvent::Finished(crate::request::Usage::default()));
        Ok(events)
    });
    let channel = serve(&server).await;
    let call = |name: &str, from: &[u32]| GenerateRequest {
        n: Some(2),
        resume_key: "k".to_owned(),
        resume_from: from.to_vec(),
        request_id: name.to_owned(),
        priority: -3,
        ..text("x")
    };
    let whole = collect(&channel, call("a", &[])).await.unwrap();
    assert_eq!(server.last_request().priority, -3);
    assert_eq!(whole.len(), 8);
    for cut in 0..whole.len() {
        let mut has = [0, 0];
        for message in whole[..cut].iter().filter(|m| m.usage.is_none()) {
            has[message.index as usize] = message.position;
        }
        let rest = collect(&channel, call("b", &has)).await.unwrap();
        let unnamed = |m: &GenerateResponse| GenerateResponse { request_id: String::new(), ..m.clone() };
        assert!(rest.iter().map(unnamed).eq(whole[cut..].iter().map(unnamed)), "{cut}: {rest:?}");
    }
    assert_eq!(server.n_seen(), 1);
    let code = async |request| collect(&channel, request).await.unwrap_err().code();
    assert_eq!(code(GenerateRequest { max_tokens: Some(3), ..call("c", &[]) }).await, Code::InvalidArgument);
    assert_eq!(code(call("c", &[0, 0, 1])).await, Code::InvalidArgument);
    assert_eq!(code(GenerateRequest { resume_key: String::new(), ..call("c", &[1]) }).await, Code::InvalidArgument);
    assert_eq!(code(GenerateRequest { resume_key: "a b".to_owned(), ..call("c", &[]) }).await, Code::InvalidArgument);
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_cut_off() {
    let endless = Server::limited(
        |_| {
            let output = Output { text: "x".repeat(1 << 16), token_ids: vec![5], ..Output::default() };
            Ok(vec![RequestEvent::Output(output); 1000])
        },
        Limits { write_timeout: Duration::from_millis(50), ..Limits::default() },
    );
    let stream = InferenceClient::new(serve(&endless).await).generate(text("x")).await.unwrap().into_inner();
    let cancelled = endless.fake.cancelled.notified();
    tokio::time::timeout(Duration::from_secs(30), cancelled).await.expect("its request is cancelled");
    drop(stream);
}

#[tokio::test]
async fn prompts_are_texts_ids_or_chats() {
    let server = Server::saying("x");
    let channel = serve(&server).await;
    let ids = WirePrompt::TokenIds(TokenIds { ids: vec![5, 6] });
    collect(&channel, GenerateRequest { prompt: Some(ids), model: "tiny".to_owned(), ..Default::default() })
        .await
        .unwrap();
    assert_eq!(server.last_request().prompt, [5, 6]);
    let messages = vec![ChatMessage { role: "user".to_owned(), content: "hi".to_owned() }];
    let chat = WirePrompt::Chat(ChatMessages { messages, ..ChatMessages::default() });
    collect(&channel, GenerateRequest { prompt: Some(chat), ..Default::default() }).await.unwrap();
    let prompt = server.tokenizer.decode(&server.last_request().prompt, false);
    assert_eq!(prompt, "<turn>user: hi\n<turn>assistant: ");
}

#[tokio::test]
async fn a_call_has_the_parameters_of_http() {
    let server = Server::saying("x");
    let channel = serve(&server).await;
    let request = GenerateRequest {
        include_stop_str_in_output: true,
        skip_special_tokens: Some(false),
        allowed_token_ids: vec![9, 5],
        stop: vec!["z".to_owned()],
        ..text("one two three")
    };
    collect(&channel, request).await.unwrap();
    let whole = server.last_request();
    assert!(whole.stop.include_in_output && !whole.stop.skip_special_tokens);
    assert_eq!(whole.sampling.allowed_token_ids, [5, 9]);
    collect(&channel, GenerateRequest { bad_words: vec!["of".to_owned()], ..text("one") }).await.unwrap();
    assert!(!server.last_request().sampling.bad_words.is_empty());

    collect(&channel, text("one two three")).await.unwrap();
    let framed = server.last_request();
    assert!(framed.sampling.allowed_token_ids.is_empty() && framed.stop.skip_special_tokens);
    collect(&channel, GenerateRequest { add_special_tokens: Some(false), ..text("one two three") }).await.unwrap();
    let bare = server.last_request().prompt;
    assert_eq!(bare, server.tokenizer.encode("one two three", false).unwrap());
    assert_eq!(framed.prompt, server.tokenizer.encode("one two three", true).unwrap());
    collect(&channel, GenerateRequest { truncate_prompt_tokens: Some(1), ..text("one two three") }).await.unwrap();
    assert_eq!(server.last_request().prompt, framed.prompt[framed.prompt.len() - 1..]);
}

#[tokio::test]
async fn chats_end_as_they_are_told_to() {
    let server = Server::saying("x");
    let channel = serve(&server).await;
    let message = |role: &str, content: &str| ChatMessage { role: role.to_owned(), content: content.to_owned() };
    let messages = vec![message("user", "hi"), message("assistant", "well")];
    let call = |chat: ChatMessages| GenerateRequest { prompt: Some(WirePrompt::Chat(chat)), ..Default::default() };
    let whole = ChatMessages { messages, ..ChatMessages::default() };
    for (chat, ending) in [
        (ChatMessages { add_generation_prompt: Some(false), ..whole.clone() }, "<turn>assistant: well\n"),
        (ChatMessages { continue_final_message: true, ..whole.clone() }, "<turn>assistant: well"),
    ] {
        collect(&channel, call(chat)).await.unwrap();
        let prompt = server.tokenizer.decode(&server.last_request().prompt, false);
        assert!(prompt.ends_with(ending), "{prompt:?}");
    }
    for (chat, named) in [
        (ChatMessages { reasoning_effort: Some("much".to_owned()), ..whole.clone() }, "reasoning_effort"),
        (
            ChatMessages { continue_final_message: true, add_generation_prompt: Some(true), ..whole.clone() },
            "continue_final_message",
        ),
    ] {
        let refused = collect(&channel, call(chat)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(named), "{refused}");
    }
}

#[tokio::test]
async fn wrong_calls_have_their_code() {
    let server = Server::saying("x");
    let channel = serve(&server).await;
    let chat = |role: &str| {
        let messages = vec![ChatMessage { role: role.to_owned(), content: "x".to_owned() }];
        Some(WirePrompt::Chat(ChatMessages { messages, ..ChatMessages::default() }))
    };
    for (request, code) in [
        (GenerateRequest::default(), Code::InvalidArgument),
        (GenerateRequest { temperature: Some(-1.0), ..text("x") }, Code::InvalidArgument),
        (GenerateRequest { temperature: Some(f32::NAN), ..text("x") }, Code::InvalidArgument),
        (GenerateRequest { top_p: Some(0.0), ..text("x") }, Code::InvalidArgument),
        (GenerateRequest { n: Some(0), ..text("x") }, Code::InvalidArgument),
        (GenerateRequest { max_tokens: Some(1000), ..text("x") }, Code::InvalidArgument),
        (GenerateRequest { logprobs: Some(21), ..text("x") }, Code::InvalidArgument),
        (GenerateRequest { stop: vec![String::new()], ..text("x") }, Code::InvalidArgument),
        (GenerateRequest { stop_token_ids: vec![u32::MAX], ..text("x") }, Code::InvalidArgument),
        (
            GenerateRequest { logit_bias: vec![LogitBias { token_id: 5, bias: 1e9 }], ..text("x") },
            Code::InvalidArgument,
        ),
        (GenerateRequest { resume_key: "a b".to_owned(), ..text("x") }, Code::InvalidArgument),
        (GenerateRequest { resume_from: vec![3], ..text("x") }, Code::InvalidArgument),
        (GenerateRequest { allowed_token_ids: vec![u32::MAX], ..text("x") }, Code::InvalidArgument),
        (GenerateRequest { bad_words: vec![" ".to_owned()], ..text("x") }, Code::InvalidArgument),
        (GenerateRequest { truncate_prompt_tokens: Some(-2), ..text("x") }, Code::InvalidArgument),
        (
            GenerateRequest {
                prompt: Some(WirePrompt::TokenIds(TokenIds { ids: vec![5] })),
                add_special_tokens: Some(true),
                ..Default::default()
            },
            Code::InvalidArgument,
        ),
        (text(""), Code::InvalidArgument),
        (GenerateRequest { prompt: chat("wizard"), ..Default::default() }, Code::InvalidArgument),
        (GenerateRequest { model: "other".to_owned(), ..text("x") }, Code::NotFound),
    ] {
        assert_eq!(collect(&channel, request.clone()).await.unwrap_err().code(), code, "{request:?}");
    }
    let busy = Server::with(|_| {
        Err(RequestError::Overloaded {
            waiting: 1,
            limit: 1,
            of: Queued::Requests,
            retry_after: Duration::from_secs(1),
        })
    });
    assert_eq!(collect(&serve(&busy).await, text("x")).await.unwrap_err().code(), Code::ResourceExhausted);
    let down = Server::with(|_| Ok(vec![RequestEvent::Failed(RequestError::Unavailable("gone".to_owned()))]));
    assert_eq!(collect(&serve(&down).await, text("x")).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn the_call_s_deadline_is_the_request_s() {
    let server = Server::with(|request| {
        let left = request.deadline.map(|at| at.saturating_duration_since(Instant::now()));
        assert!(left.is_some_and(|left| left > Duration::from_secs(3000) && left <= Duration::from_secs(3600)));
        Ok(vec![RequestEvent::Failed(RequestError::DeadlineExceeded)])
    });
    let channel = serve(&server).await;
    let mut request = tonic::Request::new(text("x"));
    request.set_timeout(Duration::from_secs(3600));
    let mut stream = InferenceClient::new(channel).generate(request).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap_err().code(), Code::DeadlineExceeded);
}

#[test]
fn timeouts_have_eight_digits_and_a_unit() {
    for (text, expected) in [
        ("1H", Some(Duration::from_secs(3600))),
        ("2M", Some(Duration::from_secs(120))),
        ("300m", Some(Duration::from_millis(300))),
        ("99999999n", Some(Duration::from_nanos(99_999_999))),
        ("5u", Some(Duration::from_micros(5))),
        ("5S", Some(Duration::from_secs(5))),
        ("999999999S", None),
        ("S", None),
        ("", None),
        ("-1S", None),
        ("1x", None),
        ("1é", None),
    ] {
        assert_eq!(parse_timeout(text), expected, "{text}");
    }
}

#[tokio::test]
async fn a_dropped_call_is_cancelled() {
    let server = Server::with(|_| Ok(vec![RequestEvent::Output(Output { token_ids: vec![5], ..Output::default() })]));
    let mut stream = InferenceClient::new(serve(&server).await).generate(text("x")).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().token_ids, [5]);
    assert_eq!(server.n_cancelled(), 0);
    drop(stream);
    let cancelled = server.fake.cancelled.notified();
    tokio::time::timeout(Duration::from_secs(10), cancelled).await.expect("the server hears of it");
}

/// The generated health client is generic over its transport; one call is all that is needed of it.
async fn check(channel: &Channel, service: &str) -> Result<i32, Status> {
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let request = HealthCheckRequest { service: service.to_owned() };
    client.check(request).await.map(|response| response.into_inner().status)
}

#[tokio::test]
async fn health_follows_readiness() {
    let server = Server::saying("x");
    let channel = serve(&server).await;
    let serving = i32::from(ServingStatus::Serving);
    assert_eq!(check(&channel, "").await.unwrap(), serving);
    assert_eq!(check(&channel, "phalanx.v1.Inference").await.unwrap(), serving);
    assert_eq!(check(&channel, "other").await.unwrap_err().code(), Code::NotFound);
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let mut watch = client.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let mut next = async || watch.message().await.unwrap().map(|r: HealthCheckResponse| r.status());
    assert_eq!(next().await, Some(ServingStatus::Serving));
    *server.fake.readiness.lock().unwrap() = Readiness::NotReady("forming".to_owned());
    assert_eq!(next().await, Some(ServingStatus::NotServing));
    assert_eq!(check(&channel, "").await.unwrap(), i32::from(ServingStatus::NotServing));
}

#[tokio::test]
async fn reflection_lists_all_services_in_both_versions() {
    let server = Server::saying("x");
    let channel = serve(&server).await;
    let expected = ["grpc.health.v1.Health", "phalanx.v1.Inference"];
    {
        use tonic_reflection::pb::v1::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let message_request = Some(MessageRequest::ListServices(String::new()));
        let request = ServerReflectionRequest { host: String::new(), message_request };
        let mut client = ServerReflectionClient::new(channel.clone());
        let mut stream = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        let response = stream.message().await.unwrap().unwrap();
        let Some(MessageResponse::ListServicesResponse(list)) = response.message_response else {
            panic!("{response:?}")
        };
        let names: Vec<&str> = list.service.iter().map(|s| s.name.as_str()).collect();
        assert!(expected.iter().all(|name| names.contains(name)), "{names:?}");
    }
    {
        use tonic_reflection::pb::v1alpha::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let symbol = "phalanx.v1.Inference".to_owned();
        let message_request = Some(MessageRequest::FileContainingSymbol(symbol));
        let request = ServerReflectionRequest { host: String::new(), message_request };
        let mut client = ServerReflectionClient::new(channel);
        let mut stream = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        let response = stream.message().await.unwrap().unwrap();
        assert!(matches!(response.message_response, Some(MessageResponse::FileDescriptorResponse(_))), "{response:?}");
    }
}

#[tokio::test]
async fn calls_need_a_key_where_there_are_some() {
    let record = |name: &str, requests_per_minute| KeyRecord {
        name: name.to_owned(),
        hash: KeyHash::of(name),
        role: Role::User,
        limits: KeyLimits { requests_per_minute, ..KeyLimits::default() },
        expires: None,
    };
    let (server, _) = Server::saying("x").with_keys(vec![record("one", Some(1)), record("two", None)]);
    let channel = serve(&server).await;
    let call = |key: Option<&str>| {
        let mut request = tonic::Request::new(text("a"));
        if let Some(key) = key {
            request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        }
        let mut client = InferenceClient::new(channel.clone());
        async move { client.generate(request).await.map(|_| ()).map_err(|status| status.code()) }
    };
    assert_eq!(call(None).await, Err(Code::Unauthenticated));
    assert_eq!(call(Some("three")).await, Err(Code::Unauthenticated));
    assert_eq!(call(Some("one")).await, Ok(()));
    assert_eq!(call(Some("one")).await, Err(Code::ResourceExhausted));
    assert_eq!(call(Some("two")).await, Ok(()));
}
