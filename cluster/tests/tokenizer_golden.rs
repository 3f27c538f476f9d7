//! Tokenizers, streams and chat templates of real models against Hugging Face transformers, string by string.
//!
//! The models are fetched once into the cache folder (98, 491 and 253 MB).

use std::io::Read as _;
use std::path::{Path, PathBuf};

use phalanx_cluster::chat_template::ChatTemplate;
use phalanx_cluster::checkpoint;
use phalanx_cluster::source;
use phalanx_cluster::tokenizer::{GgufTokenizer, Tokenizer};
use serde_json::{Map, Value};

fn golden_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

fn golden(name: &str) -> Value {
    let path = golden_folder().join("tokenizer").join(name);
    let file = std::fs::File::open(&path).unwrap();
    let mut text = String::new();
    flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn ids(list: &Value) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

fn compare(gguf: &GgufTokenizer, golden: &Value) {
    let tokenizer = Tokenizer::from_gguf(gguf).unwrap();
    let about = &golden["tokenizer"];
    assert_eq!(tokenizer.vocab_size() as u64, about["vocab_size"].as_u64().unwrap());
    assert_eq!(tokenizer.bos_id().map(u64::from), about["bos_id"].as_u64());
    assert_eq!(Value::from(tokenizer.add_bos()), about["add_bos"]);
    assert!(tokenizer.eos_ids().iter().any(|&id| u64::from(id) == about["eos_id"].as_u64().unwrap()));
    let n_special = (0..tokenizer.vocab_size() as u32).filter(|&id| tokenizer.is_special(id)).count();
    assert_eq!(n_special as u64, about["special_count"].as_u64().unwrap());
    assert!(ids(&about["special_ids"]).into_iter().all(|id| tokenizer.is_special(id)));

    let mut wrong = Vec::new();
    for case in golden["encode"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let want = ids(&case["ids"]);
        let got = tokenizer.encode(text, false).unwrap();
        if got != want {
            wrong.push(format!("encode {text:?}: want {want:?}, got {got:?}"));
        }
        for (skip_special, name) in [(false, "decoded"), (true, "decoded_skip_special")] {
            let decoded = tokenizer.decode(&want, skip_special);
            if case[name] != decoded {
                wrong.push(format!("{name} {text:?}: want {:?}, got {decoded:?}", case[name]));
            }
        }
    }
    for case in golden["streams"].as_array().unwrap() {
        let stream_ids = ids(&case["ids"]);
        let mut stream = tokenizer.stream(false);
        let pieces: Vec<Option<String>> = stream_ids.iter().map(|&id| stream.push(id)).collect();
        let text: String = pieces.iter().flatten().cloned().chain(stream.finish()).collect();
        if Value::from(pieces.clone()) != case["pieces"] || case["final"] != text {
            wrong.push(format!("stream {stream_ids:?}: want {}, got {pieces:?} {text:?}", case["pieces"]));
        }
    }
    let chats = golden["chat"].as_array().unwrap();
    let template = ChatTemplate::from_optional(gguf.chat_template.as_deref(), tokenizer.special_tokens());
    assert_eq!(template.is_err(), chats.is_empty());
    for case in chats {
        let add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
        let messages = case["messages"].as_array().unwrap();
        let rendered = template.as_ref().unwrap().render(messages, None, add_generation_prompt, &Map::new()).unwrap();
        if case["rendered"] != rendered || tokenizer.encode(&rendered, false).unwrap() != ids(&case["ids"]) {
            wrong.push(format!("chat {messages:?}: want {}, got {rendered:?}", case["rendered"]));
        }
    }
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.join("\n"));
}

/// What the model's file says of its tokenizer; the file is fetched at first use.
fn described(alias: &str) -> GgufTokenizer {
    let path = source::resolve_quietly(alias).unwrap_or_else(|error| panic!("fetch {alias}: {error}"));
    checkpoint::open(&path).unwrap().tokenizer().unwrap().expect("a GGUF file describes its tokenizer")
}

#[test]
fn smollm2_is_as_the_reference() {
    compare(&described("smollm2-135m-instruct"), &golden("smollm2-135m-instruct-q4_1.tokenizer.json.gz"));
}

#[test]
fn qwen2_is_as_the_reference() {
    let gguf = described("qwen2.5-coder-0.5b-instruct");
    compare(&gguf, &golden("qwen2.5-coder-0.5b-instruct-q4_k_m.tokenizer.json.gz"));
    // The larger model's file has the same vocabulary and template.
    compare(&gguf, &golden("qwen2.5-coder-1.5b-instruct-q4_k_m.tokenizer.json.gz"));
}

#[test]
fn gemma3_is_as_the_reference() {
    let gguf = described("gemma-3-270m");
    compare(&gguf, &golden("gemma-3-270m-q4_k_m.tokenizer.json.gz"));
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    assert_eq!(tokenizer.encode("a", true).unwrap()[0], 2);
    // A character that never is completed: one replacement, at the end.
    let mut stream = tokenizer.stream(true);
    let bytes: Vec<u32> = ["<0xF0>", "<0x9F>"].iter().map(|token| tokenizer.token_id(token).unwrap()).collect();
    assert!(bytes.iter().all(|&id| stream.push(id).is_none()));
    assert_eq!(stream.finish().as_deref(), Some("\u{FFFD}"));
    assert_eq!(stream.finish(), None);
}

/// However tokens follow each other, a stream's pieces are the decoded text.
#[test]
fn streams_add_up_to_the_text() {
    let tokenizer = Tokenizer::from_gguf(&described("smollm2-135m-instruct")).unwrap();
    let mut state = 7u32;
    for _ in 0..200 {
        let ids: Vec<u32> = (0..100)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Mostly the first few hundred: bytes that are no whole characters, and control tokens.
                if state & 0x700 == 0 { (state >> 12) % 50_000 } else { (state >> 12) % 300 }
            })
            .collect();
        for skip_special in [false, true] {
            let mut stream = tokenizer.stream(skip_special);
            let mut text: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
            text.extend(stream.finish());
            assert_eq!(text, tokenizer.decode(&ids, skip_special));
        }
    }
}

#[test]
fn model_folder_has_everything() {
    let folder = golden_folder().join("arch-tokenizer");
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos_id(), tokenizer.eos_ids()), (384, Some(0), &[1, 3][..]));
    assert!(!tokenizer.add_bos() && tokenizer.is_special(3) && !tokenizer.is_special(4));
    let template = ChatTemplate::from_folder(&folder, tokenizer.special_tokens()).unwrap();
    let messages = [serde_json::json!({"role": "user", "content": "Grüße 😀"})];
    let prompt = template.render(&messages, None, true, &Map::new()).unwrap();
    assert_eq!(prompt, "<turn>user: Grüße 😀\n<turn>assistant: ");
    let ids = tokenizer.encode(&prompt, true).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == 3).count(), 2);
    assert_eq!(tokenizer.decode(&ids, false), prompt);
    assert_eq!(tokenizer.decode(&ids, true), "user: Grüße 😀\nassistant: ");
    let mut stream = tokenizer.stream(false);
    let pieces: String = ids.iter().filter_map(|&id| stream.push(id)).chain(None).collect();
    assert_eq!(pieces, prompt);
    assert_eq!((tokenizer.token_text(0).as_str(), tokenizer.token_bytes(384)), ("<bos>", &b""[..]));
}
