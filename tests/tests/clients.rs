//! Stock clients: openai, langchain-openai, anthropic, ollama, huggingface_hub and grpcio from the package index, in a virtual environment of
//! their own. They ask the same and hear the same, whole and streamed, whichever API they speak.

use std::{path::Path, process::Command};

use phalanx_tests::{
    model_cache::{SMOLLM2, model},
    process::{Cluster, repository},
    python::{environment, run},
};
use serde_json::Value;

fn script(python: &Path, name: &str, arguments: &[&str]) -> Value {
    let output = run(Command::new(python).arg(repository().join("tests/clients").join(name)).args(arguments));
    serde_json::from_str(&output).unwrap_or_else(|e| panic!("{name}: {e}: {output}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn stock_clients_are_served() {
    let python = environment("client-venv", "clients/requirements.txt").join("python");
    // Files and batches are kept beside the store.
    let template = repository().join("tests/clients/tools.jinja").display().to_string();
    let args = ["--kv-cache-memory", "128MiB", "--max-model-len", "2048", "--chat-template", &template];
    let cluster = Cluster::start(&model(SMOLLM2), &args);

    let openai = script(&python, "openai_client.py", &[&cluster.http]);
    println!("{openai}");
    assert_eq!(openai["whole"], openai["streamed"], "streamed and whole answers agree");
    assert!(openai["whole"].as_str().is_some_and(|t| !t.is_empty()));
    assert!(openai["streamed_chunks"].as_u64() > Some(1), "the answer came in pieces");
    assert_eq!(openai["whole_usage"], openai["streamed_usage"]);
    assert_eq!(openai["roles"], serde_json::json!(["assistant"]));
    assert!(matches!(openai["finish"].as_str(), Some("stop" | "length")));
    assert_eq!(openai["choices"], serde_json::json!([0, 1]));
    assert!(openai["legacy"].as_str().is_some_and(|t| t.starts_with("The capital of France is Paris")));
    assert_eq!(openai["legacy_first_logprob"], Value::Null);
    assert_eq!(openai["legacy_logprobs"], 10);
    assert!(openai["stopped"].as_str().is_some_and(|t| t.contains(" 8") && !t.contains(" 9")));
    assert_eq!(openai["stopped_reason"], "stop");
    assert_eq!(openai["wrong_model"], "model_not_found");
    assert_eq!(openai["bad_parameter"], "temperature");
    assert_eq!(openai["response"], openai["response_streamed"]);
    assert_eq!(openai["response"], openai["whole"], "the same prompt through another API");
    assert_eq!(openai["response_numbers"], true);
    assert_eq!(openai["response_status"][1], false, "nothing is stored");
    assert!(matches!(openai["response_last"].as_str(), Some("response.completed" | "response.incomplete")));
    assert_eq!(openai["response_usage"][0], openai["response_usage"][1]);
    let counts: Vec<_> = openai["counts"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
    assert!(counts.is_sorted() && counts.last() == openai["whole_usage"].as_u64().as_ref(), "{counts:?}");
    assert!(openai["allowed"].as_array().unwrap().iter().all(|id| *id == 5 || *id == 6), "{}", openai["allowed"]);

    assert_eq!(openai["batch"], serde_json::json!(["completed", 3, 2, 1]));
    assert_eq!((&openai["batch_same"], &openai["batch_listed"]), (&openai["whole"], &Value::Bool(true)));
    assert_eq!(openai["batch_names"], serde_json::json!(["same", "short"]));
    assert_eq!(openai["batch_errors"], serde_json::json!([["bad", 400]]));
    assert_eq!(openai["batch_metadata"], serde_json::json!({"job": "test"}));
    assert_eq!((&openai["batch_cancelled"], &openai["files_listed"]), (&"batch_over".into(), &Value::Bool(true)));
    assert_eq!(openai["file_deleted"], serde_json::json!([true, "not_found"]));
    assert_eq!((&openai["parsed"], &openai["parsed_alike"]), (&"Weather".into(), &true.into()));
    let (call, weather) = (&openai["call"], &openai["call"][1]);
    assert_eq!((&call[0], &call[2]), (&"get_weather".into(), &"tool_calls".into()));
    assert!(weather["city"].is_string() && (weather["unit"] == "C" || weather["unit"] == "F"), "{weather}");
    assert_eq!(openai["call_content"], Value::Null);
    assert_eq!((&openai["call_streamed"], &openai["call_streamed_reason"]), (&openai["call_arguments"], &call[2]));
    assert!(openai["call_pieces"].as_u64() > Some(3), "arguments came in pieces");
    assert!(openai["after_call"].as_str().is_some_and(|t| !t.is_empty()));
    assert_eq!(openai["response_call"][0], "function_call");
    let arguments = &openai["response_call"][1];
    assert_eq!(openai["response_call_streamed"], serde_json::json!([arguments, arguments]));

    let anthropic = script(&python, "anthropic_client.py", &[&cluster.http, openai["model"].as_str().unwrap()]);
    println!("{anthropic}");
    assert_eq!(anthropic["whole"], openai["whole"], "the same prompt through another API");
    assert_eq!(anthropic["whole"], anthropic["streamed"]);
    assert_eq!(anthropic["whole"], anthropic["final"]);
    assert!(anthropic["pieces"].as_u64() > Some(1), "the answer came in pieces");
    let kinds = ["content_block_delta", "content_block_start", "content_block_stop", "message_delta", "message_start"];
    let raw: Vec<_> = anthropic["raw"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(kinds.iter().chain(&["message_stop"]).all(|kind| raw.contains(kind)), "{raw:?}");
    assert_eq!(anthropic["stop_reason"], anthropic["final_stop_reason"]);
    assert_eq!(anthropic["output_tokens"][0], anthropic["output_tokens"][1]);
    assert_eq!(anthropic["input_tokens"], anthropic["counted"]);
    assert_eq!(anthropic["stopped"], serde_json::json!(["stop_sequence", " "]));
    assert_eq!(anthropic["wrong_model"], "not_found_error");
    assert!(anthropic["bad_parameter"].as_str().is_some_and(|m| m.contains("temperature")));

    assert_eq!((&anthropic["call"][0], &anthropic["call"][3]), (&"tool_use".into(), &"tool_use".into()));
    assert_eq!(anthropic["call"][2], *weather, "the same call through another API");
    assert_eq!(anthropic["call_streamed"], serde_json::json!([weather, "tool_use"]));
    assert!(anthropic["call_pieces"].as_u64() > Some(3), "arguments came in pieces");
    assert!(anthropic["after_call"].is_string());

    let ollama = script(&python, "ollama_client.py", &[&cluster.http]);
    println!("{ollama}");
    assert_eq!(ollama["whole"], openai["whole"], "the same prompt through another API");
    assert_eq!(ollama["whole"], ollama["streamed"]);
    let done = ollama["done"].as_array().unwrap();
    assert!(done.len() > 2 && done.iter().enumerate().all(|(i, d)| *d == (i + 1 == done.len())), "{done:?}");
    assert_eq!(ollama["eval_count"][0], ollama["eval_count"][1]);
    assert!(ollama["durations"][0].as_u64() > Some(0));
    assert_eq!(ollama["durations"][0], ollama["durations"][1], "the parts are the whole");
    assert_eq!(ollama["text"], ollama["text_streamed"]);
    assert!(ollama["text"].as_str().is_some_and(|t| t.starts_with(" Paris")));
    assert_eq!(ollama["context_length"], serde_json::json!([2048]));
    assert_eq!(ollama["running"], ollama["model"]);
    assert_eq!(ollama["wrong_model"], 404);
    assert!(ollama["bad_parameter"].as_str().is_some_and(|m| m.contains("options.temperature")));

    assert!(ollama["formed"]["sunny"].is_boolean(), "{}", ollama["formed"]);
    assert_eq!(ollama["called"], ollama["called_streamed"]);
    assert_ne!(ollama["after_call"], serde_json::json!(["", []]));
    assert_eq!(ollama["capabilities"], serde_json::json!(["completion", "tools"]));

    let hugging_face = script(&python, "hugging_face_client.py", &[&cluster.http]);
    println!("{hugging_face}");
    for name in ["whole", "tokens", "streamed", "final", "texts"] {
        assert_eq!(hugging_face[name], hugging_face["plain"], "{name}");
    }
    assert!(hugging_face["plain"].as_str().is_some_and(|t| t.starts_with(" Paris")));
    assert_eq!((&hugging_face["finish"], &hugging_face["prefill"]), (&"length".into(), &5.into()));
    assert_eq!(hugging_face["generated_tokens"], serde_json::json!([8, 8]));
    assert!(hugging_face["stopped"].as_str().is_some_and(|t| t.ends_with(" 9")), "as there, with the stop string");
    assert_eq!(hugging_face["stopped_reason"], "stop_sequence");
    assert_eq!(hugging_face["drawn_alike"], true);
    assert_ne!(hugging_face["bad_parameter"], "no error");
    assert!([" left", " right"].contains(&hugging_face["matched"].as_str().unwrap()), "{}", hugging_face["matched"]);
    assert!(hugging_face["formed"]["sunny"].is_boolean(), "{}", hugging_face["formed"]);

    let checked = script(&python, "schema_client.py", &[&cluster.http]);
    println!("{checked}");
    assert_eq!(checked["wrong"], serde_json::json!([]));
    assert!(checked["complete"].as_u64() >= Some(10), "{checked}");

    let langchain = script(&python, "langchain_client.py", &[&cluster.http]);
    println!("{langchain}");
    assert_eq!(langchain["whole"], openai["whole"], "the same prompt through another client");
    assert_eq!(langchain["whole"], langchain["streamed"]);
    assert_eq!(langchain["usage"], langchain["streamed_usage"]);
    assert_eq!(langchain["batch"][0], langchain["whole"]);
    assert!(langchain["completion"].as_str().is_some_and(|t| t.starts_with(" Paris")));
    assert!(langchain["person"]["name"].is_string() && langchain["person"]["age"].as_u64() <= Some(120));
    assert_eq!(langchain["calls"], serde_json::json!([["note", ["age", "name"]]]));

    let address = cluster.grpc.trim_start_matches("http://");
    let grpc = script(&python, "grpc_client.py", &[address]);
    println!("{grpc}");
    let services: Vec<_> = grpc["services"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(services.contains(&"phalanx.v1.Inference") && services.contains(&"grpc.health.v1.Health"));
    assert!(grpc["text"].as_str().is_some_and(|t| t.starts_with(" Paris")));
    assert_eq!(grpc["tokens"], grpc["usage"]);
    assert_eq!(grpc["deadline"], "DEADLINE_EXCEEDED");
    assert_eq!(grpc["invalid"], "INVALID_ARGUMENT");
    assert_eq!(grpc["health"], 1);
    assert!(cluster.interrupt().success());
}
