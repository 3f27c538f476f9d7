use serde_json::{Value, json};

use super::fake::{Server, folder, reply};
use crate::request::{Finish, RequestEvent};

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn a_whole_answer_has_openai_s_shape() {
    let server = Server::saying(" and then");
    let answer = server.post(PATH, &json!({"model": "tiny", "prompt": "once"})).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer = answer.json();
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["system_fingerprint"], "0.1.0-abababababab");
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["index"]), (&json!(" and then"), &json!(0)));
    assert_eq!((&choice["logprobs"], &choice["finish_reason"]), (&Value::Null, &json!("stop")));
    let request = server.last_request();
    assert_eq!(request.max_tokens, 16, "OpenAI's default");
    assert_eq!((request.sampling.temperature, request.sampling.top_p), (1.0, 1.0));
    assert_eq!(server.tokenizer.decode(&request.prompt, false), "once");
}

#[tokio::test]
async fn unseeded_requests_differ() {
    let server = Server::saying("x");
    server.post(PATH, &json!({"prompt": ["a", "b"]})).await;
    let seen = server.fake.seen.lock().unwrap();
    assert_ne!(seen[0].sampling.seed, seen[1].sampling.seed);
    assert_ne!(seen[0].id, seen[1].id);
}

#[tokio::test]
async fn several_prompts_are_several_requests() {
    let server = Server::saying("!");
    for prompt in [json!(["a", "b", "c"]), json!([[5], [6, 7], [8]])] {
        let body = json!({"prompt": prompt, "n": 2, "echo": true, "seed": 4, "best_of": 2});
        let answer = server.post(PATH, &body).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let answer = answer.json();
        let choices = answer["choices"].as_array().unwrap();
        let indices: Vec<u64> = choices.iter().map(|c| c["index"].as_u64().unwrap()).collect();
        assert_eq!(indices, [0, 1, 2, 3, 4, 5]);
        assert_eq!(choices[0]["text"], choices[1]["text"]);
        assert_ne!(choices[1]["text"], choices[2]["text"], "the next prompt");
        assert_eq!(answer["usage"]["completion_tokens"], 6);
        let seen = std::mem::take(&mut *server.fake.seen.lock().unwrap());
        assert_eq!(seen.len(), 3);
        assert!(seen.iter().all(|r| r.sampling.seed == 4 && r.n == 2));
        let n_prompt: usize = seen.iter().map(|r| r.prompt.len()).sum();
        assert_eq!(answer["usage"]["prompt_tokens"], n_prompt);
    }
    let one = server.post(PATH, &json!({"prompt": [5, 6, 7]})).await;
    assert_eq!(one.json()["choices"].as_array().unwrap().len(), 1);
    assert_eq!(server.last_request().prompt, [5, 6, 7]);
}

#[tokio::test]
async fn echo_with_logprobs_scores_the_prompt_too() {
    let server = Server::saying(" déjà");
    let body = json!({"prompt": "où est", "echo": true, "logprobs": 2, "max_tokens": 64 - 20});
    let answer = server.post(PATH, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let choice = &answer.json()["choices"][0];
    assert_eq!(choice["text"], "où est déjà");
    assert_eq!(server.last_request().sampling.prompt_logprobs, Some(2));
    let n_prompt = server.last_request().prompt.len();
    let n_output = server.tokenizer.encode(" déjà", false).unwrap().len();
    let logprobs = &choice["logprobs"];
    for column in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[column].as_array().unwrap().len(), n_prompt + n_output, "{column}");
    }
    assert_eq!(logprobs["token_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert!(logprobs["token_logprobs"].as_array().unwrap()[1..].iter().all(|p| *p == json!(-1.25)));
    let top = logprobs["top_logprobs"][1].as_object().unwrap();
    assert!((2..=3).contains(&top.len()), "two alternatives and the token itself: {top:?}");
    // Every whole-character token stands where its offset says.
    let text: Vec<char> = "où est déjà".chars().collect();
    let tokens = logprobs["tokens"].as_array().unwrap();
    let offsets = logprobs["text_offset"].as_array().unwrap();
    let mut n_checked = 0;
    for (token, offset) in tokens.iter().zip(offsets) {
        let (token, offset) = (token.as_str().unwrap(), offset.as_u64().unwrap() as usize);
        if !token.starts_with("bytes:") {
            let there: String = text[offset..].iter().take(token.chars().count()).collect();
            assert_eq!(there, token);
            n_checked += 1;
        }
    }
    assert!(n_checked >= 6);
}

#[tokio::test]
async fn a_prompt_can_be_scored_without_output() {
    let server = Server::saying("ignored");
    let body = json!({"prompt": "a prompt", "echo": true, "logprobs": 0, "max_tokens": 0});
    let answer = server.post(PATH, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(server.last_request().max_tokens, 0);
    let answer = answer.json();
    assert_eq!(answer["choices"][0]["text"], "a prompt");
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    assert_eq!(answer["choices"][0]["logprobs"]["top_logprobs"][1].as_object().unwrap().len(), 1);
    let echo = server.post(PATH, &json!({"prompt": "a prompt", "echo": true, "max_tokens": 0})).await.json();
    assert_eq!((&echo["choices"][0]["text"], &echo["choices"][0]["logprobs"]), (&json!("a prompt"), &Value::Null));
    let bare = server.post(PATH, &json!({"prompt": "a prompt", "max_tokens": 0})).await;
    assert_eq!(bare.status, 400);
}

#[tokio::test]
async fn a_stream_equals_the_whole() {
    let server = Server::saying(" à la carte");
    let mut body = json!({
        "prompt": ["menu", "très"], "n": 2, "echo": true, "logprobs": 1, "max_tokens": 40, "return_token_ids": true,
    });
    let whole = server.post(PATH, &body).await.json();
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let mut events = server.post(PATH, &body).await.events();
    let last = events.pop().unwrap();
    assert_eq!(last["usage"], whole["usage"]);
    assert_eq!(last["choices"], json!([]));
    for expected in whole["choices"].as_array().unwrap() {
        let parts: Vec<&Value> =
            events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == expected["index"]).collect();
        let text: String = parts.iter().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(json!(text), expected["text"]);
        for column in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let joined: Vec<&Value> = parts.iter().flat_map(|c| c["logprobs"][column].as_array().unwrap()).collect();
            assert_eq!(json!(joined), expected["logprobs"][column], "{column}");
        }
        let ids: Vec<&Value> = parts.iter().flat_map(|c| c["token_ids"].as_array().unwrap()).collect();
        assert_eq!(json!(ids), expected["token_ids"]);
        assert_eq!(parts[0]["prompt_token_ids"], expected["prompt_token_ids"]);
        assert!(parts[1..].iter().all(|c| c["prompt_token_ids"].is_null()));
        assert_eq!(parts.last().unwrap()["finish_reason"], "stop");
        assert!(parts[..parts.len() - 1].iter().all(|c| c["finish_reason"].is_null()));
    }
}

#[tokio::test]
async fn prompt_logprobs_are_per_choice() {
    let server = Server::saying("x");
    let body = json!({"prompt": ["ab cd", "ef"], "prompt_logprobs": 2, "echo": true, "logprobs": 5});
    let answer = server.post(PATH, &body).await.json();
    let seen = server.fake.seen.lock().unwrap();
    for (choice, request) in answer["choices"].as_array().unwrap().iter().zip(seen.iter()) {
        assert_eq!(request.sampling.prompt_logprobs, Some(5), "the more of both");
        let scores = choice["prompt_logprobs"].as_array().unwrap();
        assert_eq!(scores.len(), request.prompt.len());
        assert!((2..=3).contains(&scores[1].as_object().unwrap().len()));
    }
}

#[tokio::test]
async fn the_last_tokens_of_a_prompt_are_read() {
    let server = Server::saying("x");
    let ids: Vec<u32> = (5..15).collect();
    let body = |n: i64| json!({"prompt": ids, "truncate_prompt_tokens": n, "echo": true, "max_tokens": 60});
    let answer = server.post(PATH, &body(3)).await.json();
    assert_eq!(server.last_request().prompt, ids[7..]);
    let echoed = server.tokenizer.decode(&ids[7..], true);
    assert!(answer["choices"][0]["text"].as_str().unwrap().starts_with(&echoed), "{answer}");
    server.post(PATH, &body(-1)).await;
    assert_eq!(server.last_request().prompt, ids[6..], "what leaves room for the output");
    server.post(PATH, &body(50)).await;
    assert_eq!(server.last_request().prompt.len(), 10 - 6, "the prompt is shorter, but it must fit");
}

#[tokio::test]
async fn tokens_are_allowed_and_words_forbidden() {
    let server = Server::saying("x");
    let body = json!({"prompt": "a", "allowed_token_ids": [9, 5, 9], "bad_words": ["cat"]});
    assert_eq!(server.post(PATH, &body).await.status, 200);
    let sampling = server.last_request().sampling;
    assert_eq!(sampling.allowed_token_ids, [5, 9]);
    let runs: Vec<Vec<u32>> = sampling.bad_words.into_iter().map(|run| run.token_ids).collect();
    for text in ["cat", " cat"] {
        assert!(runs.contains(&server.tokenizer.encode(text, false).unwrap()), "{text}: {runs:?}");
    }
    let guided = json!({"prompt": "a", "bad_words": ["cat"], "guided_regex": "a+"});
    assert_eq!(server.post(PATH, &guided).await.json()["error"]["param"], "bad_words", "beside a grammar");
    let eos = server.tokenizer.eos_ids()[0];
    let none_left = json!({"prompt": "a", "allowed_token_ids": [eos], "min_tokens": 1});
    let refused = server.post(PATH, &none_left).await;
    assert_eq!(refused.json()["error"]["param"], "allowed_token_ids", "{}", refused.body);
}

#[tokio::test]
async fn the_best_of_several_choices_are_told() {
    let tokenizer = phalanx_cluster::tokenizer::Tokenizer::from_folder(folder()).unwrap();
    let server = Server::with(move |request| {
        let mut events = reply(&tokenizer, request, " one", &Finish::EndOfSequence);
        for event in &mut events {
            if let RequestEvent::Output(output) = event {
                // The later the choice, the more probable; its text says which it is.
                output.scores.iter_mut().for_each(|score| score.logprob = -9.0 + output.index as f32);
                output.text = output.index.to_string();
            }
        }
        Ok(events)
    });
    let answer = server.post(PATH, &json!({"prompt": "a", "best_of": 4, "n": 2})).await.json();
    assert_eq!((server.last_request().n, server.last_request().sampling.logprobs), (4, Some(0)));
    let choices = answer["choices"].as_array().unwrap();
    let begins: Vec<&str> = choices.iter().map(|c| &c["text"].as_str().unwrap()[..1]).collect();
    assert_eq!(begins, ["3", "2"]);
    assert!(choices.iter().enumerate().all(|(i, c)| c["index"] == i && c["logprobs"].is_null()));
    let n_all = server.last_request().n as u64;
    assert_eq!(answer["usage"]["completion_tokens"].as_u64().unwrap() % n_all, 0, "all that were made are counted");
    for wrong in [json!({"prompt": "a", "best_of": 2, "stream": true}), json!({"prompt": "a", "best_of": 1, "n": 2})] {
        assert_eq!(server.post(PATH, &wrong).await.json()["error"]["param"], "best_of");
    }
}
