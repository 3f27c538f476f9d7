use phalanx_cluster::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::fake::{CONTEXT, Server, folder, reply};
use crate::request::{Finish, Output, RequestError, RequestEvent};

const PATH: &str = "/v1/chat/completions";

fn ask(more: Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_whole_answer_has_openai_s_shape() {
    let server = Server::saying(" fine, thanks");
    let answer = server.post(PATH, &ask(json!({"temperature": 0, "n": 2}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer = answer.json();
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "tiny");
    assert_eq!(answer["system_fingerprint"], "0.1.0-abababababab");
    assert!(answer["created"].as_u64().unwrap() > 1_600_000_000);
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    for (index, choice) in answer["choices"].as_array().unwrap().iter().enumerate() {
        let message = json!({"role": "assistant", "content": " fine, thanks", "refusal": null});
        assert_eq!(choice["message"], message);
        assert_eq!(choice["index"], index);
        assert_eq!(choice["finish_reason"], "stop");
        assert_eq!(choice["logprobs"], Value::Null);
        assert_eq!(choice["stop_reason"], Value::Null);
    }
    let request = server.last_request();
    assert_eq!(server.tokenizer.decode(&request.prompt, false), "<turn>user: hi\n<turn>assistant: ");
    assert_eq!(request.max_tokens as usize, CONTEXT - request.prompt.len(), "the rest of the context");
    assert_eq!(request.sampling.temperature, 0.0);
    let usage = &answer["usage"];
    assert_eq!(usage["prompt_tokens"], request.prompt.len());
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 2);
    let total = usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], total);
}

#[tokio::test]
async fn logprobs_carry_bytes_and_alternatives() {
    let server = Server::saying("é");
    let answer = server.post(PATH, &ask(json!({"logprobs": true, "top_logprobs": 2}))).await.json();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(server.last_request().sampling.logprobs, Some(2));
    let bytes: Vec<u64> =
        content.iter().flat_map(|t| t["bytes"].as_array().unwrap()).map(|b| b.as_u64().unwrap()).collect();
    assert_eq!(bytes, [0xc3, 0xa9], "the bytes of all tokens are the text");
    assert_eq!(content[0]["logprob"], -1.25);
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert!(content[0]["token"].is_string());
    let without = server.post(PATH, &ask(json!({"logprobs": true}))).await.json();
    assert_eq!(without["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[tokio::test]
async fn a_stream_has_role_content_finish_and_usage() {
    let server = Server::saying(" one two");
    let body = ask(json!({"stream": true, "stream_options": {"include_usage": true}, "n": 2}));
    let answer = server.post(PATH, &body).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    assert!(answer.headers.contains_key("x-request-id"));
    let mut events = answer.events();
    let last = events.pop().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["prompt_tokens"], server.last_request().prompt.len());
    for event in &events {
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["id"], last["id"]);
        assert!(event.as_object().unwrap().contains_key("usage") && event["usage"].is_null());
    }
    for index in 0..2 {
        let choices: Vec<&Value> = events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index).collect();
        assert_eq!(choices[0]["delta"], json!({"role": "assistant", "content": ""}));
        let (finish, middle) = choices[1..].split_last().unwrap();
        assert_eq!(finish["delta"], json!({}));
        assert_eq!(finish["finish_reason"], "stop");
        let text: String = middle.iter().map(|c| c["delta"]["content"].as_str().unwrap()).collect();
        assert_eq!(text, " one two");
        assert!(middle.iter().all(|c| c["finish_reason"].is_null() && c["delta"]["role"].is_null()));
    }
    let plain = server.post(PATH, &ask(json!({"stream": true, "stream_options": null}))).await.events();
    assert!(plain.iter().all(|event| event.as_object().unwrap().get("usage").is_none()));
}

#[tokio::test]
async fn streamed_logprobs_equal_whole_ones() {
    let server = Server::saying(" naïve");
    let whole = server.post(PATH, &ask(json!({"logprobs": true, "top_logprobs": 1}))).await.json();
    let body = ask(json!({"logprobs": true, "top_logprobs": 1, "stream": true}));
    let events = server.post(PATH, &body).await.events();
    let parts = events.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array());
    let streamed: Vec<Value> = parts.flatten().cloned().collect();
    assert_eq!(Value::from(streamed), whole["choices"][0]["logprobs"]["content"]);
}

#[tokio::test]
async fn an_error_in_mid_stream_is_an_event() {
    let server = Server::with(|_| {
        let part = Output { text: "so far".to_owned(), token_ids: vec![5], ..Output::default() };
        Ok(vec![
            RequestEvent::Output(part),
            RequestEvent::Failed(RequestError::Unavailable("two shards left".to_owned())),
        ])
    });
    let answer = server.post(PATH, &ask(json!({"stream": true}))).await;
    assert_eq!(answer.status, 200);
    let data: Vec<&str> = answer.body.split_terminator("\n\n").collect();
    assert!(data[1].contains("so far"));
    let error: Value = serde_json::from_str(data.last().unwrap().strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["type"], "service_unavailable_error");
    assert!(error["error"]["message"].as_str().unwrap().contains("two shards left"));
    assert!(!answer.body.contains("[DONE]"), "a client must not take it for complete");
    let whole = server.post(PATH, &ask(json!({}))).await;
    assert_eq!(whole.status, 503);
}

#[tokio::test]
async fn chats_end_as_asked() {
    let server = Server::saying("x");
    let prompt = || server.tokenizer.decode(&server.last_request().prompt, false);
    let messages = json!([{"role": "developer", "content": "d"}, {"role": "assistant", "content": "I am"}]);
    server.post(PATH, &ask(json!({"messages": messages, "add_generation_prompt": false}))).await;
    assert_eq!(prompt(), "<turn>system: d\n<turn>assistant: I am\n");
    let answer = server.post(PATH, &ask(json!({"messages": messages, "continue_final_message": true}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(prompt(), "<turn>system: d\n<turn>assistant: I am");
    let both = json!({"messages": messages, "continue_final_message": true, "add_generation_prompt": true});
    assert_eq!(server.post(PATH, &ask(both)).await.status, 400);
}

#[tokio::test]
async fn what_stopped_is_told() {
    let tokenizer = Tokenizer::from_folder(folder()).unwrap();
    let cases = [
        (Finish::StopString("END".to_owned()), "stop", json!("END")),
        (Finish::StopToken(7), "stop", json!(7)),
        (Finish::Length, "length", Value::Null),
    ];
    for (finish, reason, detail) in cases {
        let tokenizer = tokenizer.clone();
        let server = Server::with(move |request| Ok(reply(&tokenizer, request, "x", &finish)));
        let answer = server.post(PATH, &ask(json!({"stop": "END"}))).await.json();
        assert_eq!(answer["choices"][0]["finish_reason"], reason);
        assert_eq!(answer["choices"][0]["stop_reason"], detail);
    }
}

#[tokio::test]
async fn parameters_reach_the_scheduler() {
    let server = Server::saying("x");
    let body = ask(json!({
        "model": "org/tiny", "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"7": -100, "8": 2.5}, "seed": -1, "n": 3,
        "max_completion_tokens": 9, "min_tokens": 2, "stop": ["a", "b"], "stop_token_ids": [5], "ignore_eos": true,
        "include_stop_str_in_output": true, "skip_special_tokens": false,
    }));
    let answer = server.post(PATH, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let request = server.last_request();
    let sampling = &request.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (0.5, 0.9, 40, 0.1));
    assert_eq!((sampling.repetition_penalty, sampling.presence_penalty), (1.1, 0.5));
    assert_eq!((sampling.frequency_penalty, sampling.seed, sampling.min_tokens), (-0.5, u64::MAX, 2));
    let bias: Vec<_> = sampling.logit_bias.iter().map(|b| (b.token_id, b.bias)).collect();
    assert_eq!(bias, [(7, -100.0), (8, 2.5)]);
    assert_eq!((request.n, request.max_tokens), (3, 9));
    assert_eq!(request.stop.strings, ["a", "b"]);
    assert_eq!(request.stop.token_ids, [5]);
    assert!(request.stop.ignore_eos && request.stop.include_in_output && !request.stop.skip_special_tokens);
    assert_eq!(answer.json()["model"], "tiny");
}

#[tokio::test]
async fn fields_that_ask_for_nothing_are_taken() {
    let server = Server::saying("x");
    let neutral = ask(json!({
        "user": "u", "metadata": {"a": "b"}, "store": false, "service_tier": "auto", "parallel_tool_calls": true,
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "stream_options": null,
        "logit_bias": null, "stop": null, "temperature": null, "functions": null, "no_such_field": null,
        "modalities": ["text"], "chat_template_kwargs": {"enable_thinking": false}, "safety_identifier": "s",
        "top_logprobs": 0, "best_of": 1, "priority": 0, "max_tokens": 3, "max_completion_tokens": 3, "top_k": -1,
    }));
    let answer = server.post(PATH, &neutral).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(server.last_request().sampling.top_k, 0);
}

#[tokio::test]
async fn prompt_scores_and_token_ids_are_added_if_asked_for() {
    let server = Server::saying(" ok");
    let answer = server.post(PATH, &ask(json!({"prompt_logprobs": 1, "return_token_ids": true}))).await.json();
    let prompt = server.last_request().prompt;
    assert_eq!(answer["prompt_token_ids"], json!(prompt));
    assert_eq!(answer["choices"][0]["token_ids"], json!(server.tokenizer.encode(" ok", false).unwrap()));
    let scores = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!(scores.len(), prompt.len());
    assert!(scores[0].is_null());
    let second = &scores[1][prompt[1].to_string()];
    assert_eq!((second["logprob"].as_f64(), second["rank"].as_u64()), (Some(-1.25), Some(3)));
}

#[tokio::test]
async fn chunks_count_as_they_come() {
    let server = Server::saying(" one two three");
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let events = server.post(PATH, &ask(json!({"stream": true, "stream_options": options}))).await.events();
    let counts: Vec<u64> = events.iter().map(|e| e["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted() && counts.len() > 3, "{counts:?}");
    assert_eq!(counts.iter().max(), counts.last());
    let n_prompt = server.last_request().prompt.len();
    assert!(events.iter().all(|e| e["usage"]["prompt_tokens"] == n_prompt));
    let alone = json!({"stream": true, "stream_options": {"continuous_usage_stats": true}});
    let refused = server.post(PATH, &ask(alone)).await;
    assert_eq!(refused.json()["error"]["param"], "stream_options.continuous_usage_stats");
}

#[tokio::test]
async fn requests_bring_their_template_and_their_name() {
    let server = Server::saying("x");
    let more = json!({"chat_template": "{{ messages[0].content }}!{{ reasoning_effort }}", "reasoning_effort": "low",
                      "request_id": "job-7"});
    let answer = server.post(PATH, &ask(more)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.json()["id"], "chatcmpl-job-7");
    assert_eq!(server.tokenizer.decode(&server.last_request().prompt, false), "hi!low");
    let documents = json!({"chat_template": "{{ documents[0].text }}", "documents": [{"text": "facts"}]});
    server.post(PATH, &ask(documents)).await;
    assert_eq!(server.tokenizer.decode(&server.last_request().prompt, false), "facts");
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": false});
    assert_eq!(server.post("/apply-template", &body).await.json(), json!({"prompt": "<turn>user: hi\n"}));
}

#[tokio::test]
async fn an_echo_is_the_last_message() {
    let server = Server::saying(" here");
    let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am"}]);
    let more = json!({"messages": messages, "continue_final_message": true, "echo": true});
    let whole = server.post(PATH, &ask(more.clone())).await.json();
    assert_eq!(whole["choices"][0]["message"]["content"], "I am here");
    let mut body = ask(more);
    body["stream"] = json!(true);
    let events = server.post(PATH, &body).await.events();
    let joined: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(joined, "I am here");
    let plain = server.post(PATH, &ask(json!({"echo": true}))).await.json();
    assert_eq!(plain["choices"][0]["message"]["content"], " here", "a user's message is not the answer's beginning");
}

#[tokio::test]
async fn tokens_can_be_named_by_their_ids() {
    let server = Server::saying(" one");
    let more =
        json!({"logprobs": true, "top_logprobs": 1, "return_tokens_as_token_ids": true, "return_token_ids": true});
    let choice = server.post(PATH, &ask(more)).await.json()["choices"][0].clone();
    let entry = &choice["logprobs"]["content"][0];
    assert_eq!(entry["token"], format!("token_id:{}", choice["token_ids"][0]));
    assert_eq!(entry["top_logprobs"][0]["token"], "token_id:10");
}
