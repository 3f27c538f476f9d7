use phalanx_cluster::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::fake::{Server, folder, reply};
use crate::request::{Finish, Output, RequestError, RequestEvent};

const PATH: &str = "/v1/responses";

fn ask(more: Value) -> Value {
    let mut body = json!({"model": "tiny", "input": "hi"});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_response_has_openai_s_shape() {
    let server = Server::saying(" fine, thanks");
    let more = json!({"instructions": "Be brief.", "store": true, "metadata": {"job": "7"}, "max_output_tokens": 20,
                      "temperature": 0.5, "text": {"format": {"type": "text"}}, "reasoning": {"effort": "none"}});
    let answer = server.post(PATH, &ask(more)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer = answer.json();
    assert!(answer["id"].as_str().unwrap().starts_with("resp_"));
    assert_eq!(
        (&answer["object"], &answer["status"], &answer["store"]),
        (&json!("response"), &json!("completed"), &json!(false))
    );
    assert_eq!(answer["metadata"], json!({"job": "7"}));
    assert_eq!((&answer["instructions"], &answer["temperature"]), (&json!("Be brief."), &json!(0.5)));
    let message = &answer["output"][0];
    assert_eq!(
        (&message["type"], &message["role"], &message["status"]),
        (&json!("message"), &json!("assistant"), &json!("completed"))
    );
    let part = json!({"type": "output_text", "text": " fine, thanks", "annotations": [], "logprobs": []});
    assert_eq!(message["content"], json!([part]));
    let prompt = server.tokenizer.decode(&server.last_request().prompt, false);
    assert_eq!(prompt, "<turn>system: Be brief.\n<turn>user: hi\n<turn>assistant: ");
    let usage = &answer["usage"];
    assert_eq!(usage["input_tokens"], server.last_request().prompt.len());
    let total = usage["input_tokens"].as_u64().unwrap() + usage["output_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], total);
}

#[tokio::test]
async fn items_are_what_was_said() {
    let server = Server::saying("x");
    let input = json!([
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
         "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": "e"},
    ]);
    assert_eq!(server.post(PATH, &ask(json!({"input": input}))).await.status, 200);
    assert_eq!(
        server.tokenizer.decode(&server.last_request().prompt, false),
        "<turn>system: d\n<turn>user: a\nb\n<turn>assistant: c\n<turn>user: e\n<turn>assistant: "
    );
}

#[tokio::test]
async fn events_come_in_the_documented_order() {
    let server = Server::saying(" one two three");
    let more = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 1});
    let whole = server.post(PATH, &ask(more.clone())).await.json();
    let mut body = ask(more);
    body["stream"] = json!(true);
    let events = server.post(PATH, &body).await.named_events();
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    let (begin, rest) = names.split_at(4);
    assert_eq!(
        begin,
        ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    );
    let (deltas, end) = rest.split_at(rest.len() - 4);
    assert!(deltas.len() > 1 && deltas.iter().all(|name| *name == "response.output_text.delta"), "{names:?}");
    assert_eq!(
        end,
        ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"]
    );
    for (number, (name, object)) in events.iter().enumerate() {
        assert_eq!((&object["type"], &object["sequence_number"]), (&json!(name), &json!(number)));
    }
    let joined: String = events.iter().filter_map(|(_, object)| object["delta"].as_str()).collect();
    let text = &whole["output"][0]["content"][0]["text"];
    assert_eq!(*text, joined);
    assert_eq!(events[events.len() - 4].1["text"], *text);
    let last = &events.last().unwrap().1["response"];
    assert_eq!((&last["status"], &last["usage"]), (&json!("completed"), &whole["usage"]));
    let content = |response: &Value| response["output"][0]["content"].clone();
    assert_eq!(content(last), content(&whole));
    assert_eq!(content(last)[0]["logprobs"][0]["top_logprobs"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn an_answer_cut_short_is_incomplete() {
    let tokenizer = Tokenizer::from_folder(folder()).unwrap();
    let server = Server::with(move |request| Ok(reply(&tokenizer, request, " fine", &Finish::Length)));
    let whole = server.post(PATH, &ask(json!({}))).await.json();
    assert_eq!(
        (&whole["status"], &whole["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    let events = server.post(PATH, &ask(json!({"stream": true}))).await.named_events();
    assert_eq!(events.last().unwrap().0, "response.incomplete");
}

#[tokio::test]
async fn what_is_not_there_is_refused() {
    let server = Server::saying("x");
    for (more, param) in [
        (json!({"input": null}), "input"),
        (json!({"input": 5}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": [{"type": "file_search_call"}]}), "input[0].type"),
        (json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}), "input[0].content[0].type"),
        (json!({"input": [{"role": "wizard", "content": "x"}]}), "input[0].role"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"conversation": "c"}), "conversation"),
        (json!({"background": true}), "background"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"truncation": "auto"}), "truncation"),
        (json!({"include": ["file_search_call.results"]}), "include"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"text": {"verbosity": "low"}}), "text.verbosity"),
        (json!({"reasoning": {"effort": "high"}}), "reasoning.effort"),
        (json!({"reasoning": {"effort": "much"}}), "reasoning.effort"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"max_output_tokens": 1000}), "input"),
        (json!({"metadata": {"a": 1}}), "metadata"),
        (json!({"stream_options": {}}), "stream_options"),
        (json!({"odd": 1}), "odd"),
    ] {
        let answer = server.post(PATH, &ask(more.clone())).await;
        assert_eq!(answer.status, 400, "{more}: {}", answer.body);
        assert_eq!(answer.json()["error"]["param"], param, "{more}: {}", answer.body);
    }
    assert_eq!(server.n_seen(), 0);
}

#[tokio::test]
async fn a_stream_that_fails_says_so() {
    let server = Server::with(|_| {
        let part = Output { text: "so far".to_owned(), token_ids: vec![5], ..Output::default() };
        Ok(vec![RequestEvent::Output(part), RequestEvent::Failed(RequestError::Unavailable("gone".to_owned()))])
    });
    let events = server.post(PATH, &ask(json!({"stream": true}))).await.named_events();
    let (name, error) = events.last().unwrap();
    assert_eq!((name.as_str(), &error["code"]), ("error", &json!("unavailable")));
    assert_eq!(error["sequence_number"], events.len() - 1);
}
