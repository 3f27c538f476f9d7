use phalanx_cluster::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::fake::{CONTEXT, Server, folder, reply};
use crate::request::{Finish, Output, RequestError, RequestEvent};

const GENERATE: &str = "/generate";
const STREAM: &str = "/generate_stream";

fn ask(parameters: Value) -> Value {
    json!({"inputs": "hi", "parameters": parameters})
}

fn ending_with(finish: Finish) -> Server {
    let tokenizer = Tokenizer::from_folder(folder()).unwrap();
    Server::with(move |request| Ok(reply(&tokenizer, request, " fine", &finish)))
}

#[tokio::test]
async fn an_answer_has_its_details() {
    let server = Server::saying(" one two");
    let plain = server.post(GENERATE, &ask(json!({"max_new_tokens": 9}))).await;
    assert_eq!(plain.status, 200, "{}", plain.body);
    assert_eq!(plain.json(), json!({"generated_text": " one two"}));
    let request = server.last_request();
    assert_eq!((request.sampling.temperature, request.max_tokens, request.sampling.logprobs), (0.0, 9, None));
    let parameters = json!({"details": true, "decoder_input_details": true, "top_n_tokens": 2, "max_new_tokens": 9,
                            "return_full_text": true});
    let answer = server.post(GENERATE, &ask(parameters)).await.json();
    assert_eq!(answer["generated_text"], "hi one two");
    let details = &answer["details"];
    assert_eq!((&details["finish_reason"], &details["seed"]), (&json!("eos_token"), &Value::Null));
    let tokens = details["tokens"].as_array().unwrap();
    assert_eq!(details["generated_tokens"], tokens.len());
    let text: String = tokens.iter().map(|t| t["text"].as_str().unwrap()).collect();
    assert_eq!(text, " one two");
    assert!(tokens.iter().all(|t| t["logprob"] == -1.25 && t["special"] == false && t["id"].is_u64()));
    assert!(details["top_tokens"].as_array().unwrap().iter().all(|top| top.as_array().unwrap().len() == 2));
    let prefill = details["prefill"].as_array().unwrap();
    assert_eq!(prefill.len(), server.last_request().prompt.len());
    assert_eq!(prefill[0]["logprob"], Value::Null);
    let either = server.post("/", &ask(json!({"max_new_tokens": 9}))).await.json();
    assert_eq!(either, json!([{"generated_text": " one two"}]));
}

#[tokio::test]
async fn events_join_to_the_whole_answer() {
    let tokenizer = Tokenizer::from_folder(folder()).unwrap();
    for text in [" one two", " naïve é"] {
        let tokenizer = tokenizer.clone();
        let finish = Finish::StopString("é".to_owned());
        let server = Server::with(move |request| Ok(reply(&tokenizer, request, text, &finish)));
        let whole = server.post(GENERATE, &ask(json!({"details": true}))).await.json();
        let events = server.post(STREAM, &ask(json!({"details": true, "top_n_tokens": 1}))).await.named_events();
        let (last, before) = events.split_last().unwrap();
        assert_eq!(last.1["generated_text"], whole["generated_text"]);
        let joined: String = events.iter().map(|(_, e)| e["token"]["text"].as_str().unwrap()).collect();
        assert_eq!(joined, text);
        assert!(before.iter().all(|(_, e)| e["generated_text"].is_null() && e["details"].is_null()));
        let ids: Vec<&Value> = events.iter().map(|(_, e)| &e["token"]["id"]).collect();
        let want: Vec<&Value> = whole["details"]["tokens"].as_array().unwrap().iter().map(|t| &t["id"]).collect();
        assert_eq!(ids, want);
        assert!(events.iter().enumerate().all(|(i, (_, e))| e["index"] == i + 1));
        let details = &last.1["details"];
        assert_eq!(
            (&details["finish_reason"], &details["generated_tokens"]),
            (&json!("stop_sequence"), &json!(ids.len()))
        );
        assert_eq!(details["input_length"], server.last_request().prompt.len());
        assert!(events.iter().all(|(_, e)| e["top_tokens"].as_array().unwrap().len() == 1));
        let either = server.post("/", &json!({"inputs": "hi", "stream": true})).await.named_events();
        assert_eq!(either.last().unwrap().1["generated_text"], whole["generated_text"]);
        assert!(either.last().unwrap().1["details"].is_null(), "not asked for");
    }
}

#[tokio::test]
async fn finish_reasons_have_their_names() {
    for (finish, name) in [
        (Finish::Length, "length"),
        (Finish::EndOfSequence, "eos_token"),
        (Finish::StopString("x".to_owned()), "stop_sequence"),
    ] {
        let answer = ending_with(finish).post(GENERATE, &ask(json!({"details": true}))).await.json();
        assert_eq!(answer["details"]["finish_reason"], name);
    }
}

#[tokio::test]
async fn parameters_are_the_requests() {
    let server = Server::saying("x");
    let parameters = json!({"temperature": 0.5, "top_k": 7, "top_p": 0.25, "repetition_penalty": 1.5, "seed": 3,
        "frequency_penalty": 0.5, "stop": ["END"], "truncate": 1, "max_new_tokens": 2, "details": true});
    let body = json!({"inputs": "the cat sat", "parameters": parameters});
    let answer = server.post(GENERATE, &body).await.json();
    let request = server.last_request();
    let ids = server.tokenizer.encode("the cat sat", true).unwrap();
    assert_eq!(request.prompt, ids[ids.len() - 1..]);
    let sampling = request.sampling;
    assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.5, 7, 0.25));
    assert_eq!((sampling.repetition_penalty, sampling.frequency_penalty, sampling.seed), (1.5, 0.5, 3));
    assert!(request.stop.include_in_output, "as there, the text ends with what ended it");
    assert_eq!(answer["details"]["seed"], 3);
    server.post(GENERATE, &ask(json!({"do_sample": true, "details": true}))).await;
    assert_eq!(server.last_request().sampling.temperature, 1.0);
    assert!(server.last_request().sampling.seed > 0, "drawn");
}

#[tokio::test]
async fn the_best_of_several_is_told_first() {
    let server = Server::saying(" one two");
    let answer = server.post(GENERATE, &ask(json!({"best_of": 3, "do_sample": true, "details": true}))).await.json();
    assert_eq!(server.last_request().n, 3);
    assert_eq!(answer["details"]["best_of_sequences"].as_array().unwrap().len(), 2);
    assert_eq!(answer["details"]["best_of_sequences"][0]["generated_text"], " one two");
}

#[tokio::test]
async fn errors_have_their_shape() {
    let server = Server::saying("x");
    for (path, parameters, said) in [
        (GENERATE, json!({"temperature": 0}), "temperature"),
        (GENERATE, json!({"top_k": 0}), "top_k"),
        (GENERATE, json!({"top_p": 2}), "top_p"),
        (GENERATE, json!({"max_new_tokens": 0}), "max_new_tokens"),
        (GENERATE, json!({"max_new_tokens": 1000}), "max_new_tokens"),
        (GENERATE, json!({"best_of": 2}), "best_of"),
        (STREAM, json!({"best_of": 2, "do_sample": true}), "best_of"),
        (STREAM, json!({"details": true, "decoder_input_details": true}), "decoder_input_details"),
        (GENERATE, json!({"decoder_input_details": true}), "decoder_input_details"),
        (GENERATE, json!({"top_n_tokens": 21}), "top_n_tokens"),
        (GENERATE, json!({"truncate": 0}), "truncate"),
        (GENERATE, json!({"typical_p": 0.5}), "typical_p"),
        (GENERATE, json!({"watermark": true}), "watermark"),
        (GENERATE, json!({"grammar": {"type": "lark", "value": "a"}}), "grammar.type"),
        (GENERATE, json!({"adapter_id": "x"}), "adapter_id"),
        (GENERATE, json!({"odd": "x"}), "odd"),
        (GENERATE, json!("x"), "parameters"),
    ] {
        let answer = server.post(path, &ask(parameters.clone())).await;
        let error = answer.json();
        assert_eq!(
            (answer.status.as_u16(), &error["error_type"]),
            (422, &json!("validation")),
            "{parameters}: {error}"
        );
        assert!(error["error"].as_str().unwrap().contains(said), "{parameters}: {error}");
    }
    for (path, body) in [
        (GENERATE, json!({"inputs": 5})),
        (GENERATE, json!({"inputs": ""})),
        (GENERATE, json!({"inputs": "x", "stream": true})),
        (STREAM, json!({"inputs": "x", "stream": false})),
        ("/", json!({"parameters": {}})),
    ] {
        assert_eq!(server.post(path, &body).await.json()["error_type"], "validation", "{body}");
    }
    assert_eq!(server.n_seen(), 0);
    let failing = Server::with(|_| {
        let part = Output { text: "so far".to_owned(), token_ids: vec![5], ..Output::default() };
        Ok(vec![RequestEvent::Output(part), RequestEvent::Failed(RequestError::Internal("bug".to_owned()))])
    });
    let events = failing.post(STREAM, &ask(json!({}))).await.named_events();
    assert_eq!(events.last().unwrap().1["error_type"], "generation");
    let info = server.get("/info").await.json();
    assert_eq!((&info["model_id"], &info["max_total_tokens"]), (&json!("tiny"), &json!(CONTEXT)));
}
