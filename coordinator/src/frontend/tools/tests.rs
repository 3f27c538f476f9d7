//! What models write, in every format, and what is found in it, however it is cut.

use proptest::prelude::*;

use super::{
    FORMATS, Format, Names,
    reader::{Piece, Reading, Told},
    scraps::scraps,
    thoughts::{Start, THOUGHTS, Thoughts},
    toolbox::Tool,
};

fn format(name: &str) -> &'static dyn Format {
    *FORMATS.iter().find(|format| format.names().contains(&name)).unwrap()
}

fn reading(name: &str) -> Reading {
    let names: Names = ["get_weather", "search", "f"].into_iter().collect();
    Reading { request: "r1".to_owned(), format: Some(format(name)), names, ..Reading::plain() }
}

fn thinking(name: &str, start: Start) -> Reading {
    let form: &'static Thoughts = THOUGHTS.iter().find(|form| form.names.contains(&name)).unwrap();
    Reading { thoughts: Some((form, start)), ..Reading::plain() }
}

/// Reads a text in these pieces.
fn told<'a>(reading: &Reading, pieces: impl IntoIterator<Item = &'a str>) -> (Told, Vec<Piece>) {
    let mut reader = reading.reader(0);
    let mut all = Vec::new();
    for piece in pieces {
        all.extend(reader.push(piece, 1));
    }
    all.extend(reader.finish());
    let mut told = Told::default();
    told.add(all.clone());
    (told, all)
}

/// What a text says: content, thought, and calls with their arguments.
fn said(reading: &Reading, text: &str) -> (String, String, Vec<(String, String)>) {
    let (told, _) = told(reading, [text]);
    let calls = told.calls.into_iter().map(|call| (call.name, call.arguments)).collect();
    (told.content, told.thought, calls)
}

type Case = (&'static str, &'static str, &'static str, &'static [(&'static str, &'static str)]);

const PARIS: &str = r#"{"city": "Paris"}"#;

/// A format, what a model writes, and what that says: content and calls.
static CASES: &[Case] = &[
    ("hermes", "Just text, 1 < 2.", "Just text, 1 < 2.", &[]),
    (
        "hermes",
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>",
        "",
        &[("get_weather", PARIS)],
    ),
    (
        "hermes",
        "I look. \n<tool_call>{\"arguments\": {\"city\": \"Paris\"}, \"name\": \"get_weather\"}</tool_call>\n\
         <tool_call>\n{\"name\": \"f\"}\n</tool_call>\n",
        "I look.",
        &[("get_weather", PARIS), ("f", "{}")],
    ),
    // Without the closing mark, as some models have it.
    (
        "hermes",
        "<tool_call>{\"name\": \"f\", \"arguments\": {}}\n<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1 }} done",
        " done",
        &[("f", "{}"), ("f", "{\"a\": 1 }")],
    ),
    // No calls: unknown, no JSON, cut in the name, of another shape.
    (
        "hermes",
        "<tool_call>{\"name\": \"rm\", \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"rm\", \"arguments\": {}}</tool_call>",
        &[],
    ),
    ("hermes", "<tool_call>soon</tool_call>", "<tool_call>soon</tool_call>", &[]),
    ("hermes", "<tool_call>{\"name\": \"get_w", "<tool_call>{\"name\": \"get_w", &[]),
    ("hermes", "a <tool_call>[1]</tool_call> b", "a <tool_call>[1]</tool_call> b", &[]),
    ("hermes", "a <tool_c", "a <tool_c", &[]),
    // Cut in the arguments, as by max_tokens.
    ("hermes", "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": [1, \"é", "", &[("f", "{\"a\": [1, \"é")]),
    // What is no JSON any more is the call's no more.
    ("hermes", "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": oops}}", "oops}}", &[("f", "{\"a\": ")]),
    (
        "llama3_json",
        "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}",
        "",
        &[("get_weather", PARIS)],
    ),
    (
        "llama3_json",
        "<|python_tag|>{\"type\": \"function\", \"name\": \"f\", \"parameters\": {}}; {\"name\": \"f\", \"parameters\": {\"a\": 1}}",
        "",
        &[("f", "{}"), ("f", "{\"a\": 1}")],
    ),
    ("llama3_json", "{\"answer\": 42}", "{\"answer\": 42}", &[]),
    ("llama3_json", "It is {\"name\": \"f\", \"parameters\": {}}", "It is {\"name\": \"f\", \"parameters\": {}}", &[]),
    ("llama3_json", "<|python_tag|>search.call(query=\"x\")", "<|python_tag|>search.call(query=\"x\")", &[]),
    ("pythonic", "[get_weather(city=\"Paris\")]", "", &[("get_weather", PARIS)]),
    (
        "pythonic",
        "[get_weather(city='it\\'s', days=[1, 2.5], units={'a': None}, on=True), f()]",
        "",
        &[
            ("get_weather", "{\"city\": \"it's\", \"days\": [1, 2.5], \"units\": {\"a\": null}, \"on\": true}"),
            ("f", "{}"),
        ],
    ),
    ("pythonic", "[1] is a footnote", "[1] is a footnote", &[]),
    ("pythonic", "[unknown(a=1)]", "[unknown(a=1)]", &[]),
    (
        "mistral",
        "[TOOL_CALLS] [{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}]",
        "",
        &[("get_weather", PARIS)],
    ),
    (
        "mistral",
        "Hm.[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"f\", \"arguments\": {\"a\": 2}, \"id\": \"abc\"}]",
        "Hm.",
        &[("f", "{}"), ("f", "{\"a\": 2}")],
    ),
    (
        "mistral",
        "[TOOL_CALLS]get_weather[ARGS]{\"city\": \"Paris\"}[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{}",
        "",
        &[("get_weather", PARIS), ("f", "{}")],
    ),
    ("mistral", "[TOOL_CALLS]rm[ARGS]{\"a\": 1}", "[TOOL_CALLS]rm[ARGS]{\"a\": 1}", &[]),
    (
        "granite",
        "<|tool_call|>[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}]",
        "",
        &[("get_weather", PARIS)],
    ),
    (
        "granite",
        "<tool_call> [{\"arguments\": {\"a\": 1}, \"name\": \"f\"},\n{\"name\": \"f\", \"arguments\": {}}]",
        "",
        &[("f", "{\"a\": 1}"), ("f", "{}")],
    ),
    ("granite", "<|tool_call|>{\"name\": \"f\"}", "<|tool_call|>{\"name\": \"f\"}", &[]),
    (
        "deepseek_v3",
        "I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{\"city\": \"Paris\"}\n```\
         <｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "I look.",
        &[("get_weather", PARIS), ("f", "{}")],
    ),
    (
        "deepseek_v31",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"city\": \"Paris\"}<｜tool▁call▁end｜>\
         <｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        &[("get_weather", PARIS), ("f", "{}")],
    ),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>none", "<｜tool▁calls▁begin｜>none", &[]),
    (
        "qwen3_coder",
        "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        "I look.",
        &[("get_weather", PARIS)],
    ),
    // Without the first mark, and two in a row, as some models have it.
    (
        "qwen3_coder",
        "<function=f>\n<parameter=a>\n[1,  2]\n</parameter><parameter=b>\nTrue\n</parameter>\n</function>\n<function=f>\n\
         </function>\n</tool_call> done",
        " done",
        &[("f", "{\"a\": [1,  2], \"b\": true}"), ("f", "{}")],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=f>\n<parameter=a>\n\nx </parameter\n\n</parameter>\n</function>\n</tool_call>",
        "",
        &[("f", "{\"a\": \"\\nx </parameter\\n\"}")],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=rm>\n</function>\n</tool_call>",
        "<tool_call>\n<function=rm>\n</function>\n</tool_call>",
        &[],
    ),
    ("qwen3_coder", "<function=f> is how I call.", "<function=f> is how I call.", &[]),
    ("qwen3_coder", "<tool_call>soon", "<tool_call>soon", &[]),
    ("qwen3_coder", "<function=f><parameter=a>\nhalf of", "", &[("f", "{\"a\": ")]),
    (
        "glm45",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
        "",
        &[("get_weather", PARIS)],
    ),
    (
        "glm47",
        "Hm.<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>b</arg_key><arg_value>x < y\n</arg_value>\
         </tool_call><tool_call>f</tool_call>",
        "Hm.",
        &[("f", "{\"a\": 1, \"b\": \"x < y\\n\"}"), ("f", "{}")],
    ),
    ("glm45", "<tool_call>rm\n</tool_call>", "<tool_call>rm\n</tool_call>", &[]),
    ("glm45", "<tool_call>f\n<arg_key>a</arg_key> oops", "oops", &[("f", "{\"a\": ")]),
    (
        "kimi_k2",
        "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{\"city\": \"Paris\"}\
         <|tool_call_end|><|tool_call_begin|>functions.f:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "I look.",
        &[("get_weather", PARIS), ("f", "{}")],
    ),
    (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.rm:0<|tool_call_argument_begin|>{}",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.rm:0<|tool_call_argument_begin|>{}",
        &[],
    ),
    (
        "openai",
        "<|channel|>analysis<|message|>I need it.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather \
         <|constrain|>json<|message|>{\"city\": \"Paris\"}",
        "",
        &[("get_weather", PARIS)],
    ),
    (
        "openai",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>",
        "I look.",
        &[("f", "{}")],
    ),
    ("openai", "<|channel|>final<|message|>It is 1 < 2.", "It is 1 < 2.", &[]),
    ("openai", "no channel", "no channel", &[]),
    ("openai", "<|channel|>final", "<|channel|>final", &[]),
];

#[test]
fn formats_are_read() {
    for (name, text, content, calls) in CASES {
        let (got, _, found) = said(&reading(name), text);
        let calls: Vec<_> = calls.iter().map(|(name, json)| ((*name).to_owned(), (*json).to_owned())).collect();
        assert_eq!(found, calls, "{name}: {text}");
        assert_eq!(got, *content, "{name}: {text}");
    }
}

#[test]
fn formats_are_read_alike_at_every_split() {
    for (name, text, ..) in CASES {
        let reading = reading(name);
        let whole = told(&reading, [*text]);
        let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
        for at in &borders {
            let (begin, end) = text.split_at(*at);
            assert_eq!(told(&reading, [begin, end]).0, whole.0, "{name}: {begin} | {end}");
        }
        let letters: Vec<&str> = text.split_inclusive(|_: char| true).collect();
        assert_eq!(told(&reading, letters).0, whole.0, "{name}: {text}, letter by letter");
    }
}

#[test]
fn texts_in_elements_come_as_they_are_written() {
    let schema = serde_json::json!({"type": "object", "properties": {
        "code": {"type": "string"}, "unit": {"anyOf": [{"enum": ["c", "f"]}, {"type": "null"}]}, "n": {"type": "integer"},
    }});
    let tool = Tool::new(&[String::new(), String::new()], "run".to_owned(), None, Some(schema), false).unwrap();
    let reading = |format: &str| Reading { names: Names::of_tools([&tool].into_iter()), ..reading(format) };
    let arguments = "{\"code\": \"1 < \\\"2\\\"\\n</par\\ttrue\", \"unit\": null, \"n\": 3}";
    for (format, text, from) in [
        (
            "qwen3_coder",
            "<tool_call>\n<function=run>\n<parameter=code>\n1 < \"2\"\n</par\ttrue\n</parameter>\n<parameter=unit>\nnull\n\
             </parameter>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>",
            "\n1 < ",
        ),
        (
            "glm45",
            "<tool_call>run\n<arg_key>code</arg_key>\n<arg_value>1 < \"2\"\n</par\ttrue</arg_value>\n<arg_key>unit</arg_key>\n\
             <arg_value>null</arg_value><arg_key>n</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
            "1 < ",
        ),
    ] {
        let reading = reading(format);
        let whole = told(&reading, [text]).0;
        assert_eq!((whole.calls[0].arguments.as_str(), whole.content.as_str()), (arguments, ""), "{format}");
        for (at, _) in text.char_indices() {
            assert_eq!(told(&reading, [&text[..at], &text[at..]]).0, whole, "{format} at {at}");
        }
        let end = text.find(from).unwrap() + from.len();
        let (begun, _) = told(&reading, [&text[..end]]);
        assert_eq!(begun.calls[0].arguments, "{\"code\": \"1 < ", "{format}");
    }
}

#[test]
fn calls_have_the_names_that_the_model_gave_them() {
    let call = |id: &str| format!("<|tool_call_begin|>{id}<|tool_call_argument_begin|>{{}}<|tool_call_end|>");
    let text = format!("<|tool_calls_section_begin|>{}{}{}", call("functions.f:3"), call("functions.f:3"), call("f:4"));
    let ids: Vec<String> = told(&reading("kimi_k2"), [text.as_str()]).0.calls.into_iter().map(|call| call.id).collect();
    assert_eq!((ids[0].as_str(), ids[2].as_str()), ("functions.f:3", "f:4"));
    assert!(ids[1].starts_with("call_"), "no two calls have one name: {ids:?}");
}

#[test]
fn calls_come_as_they_are_written() {
    let text = "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"one two\"}}</tool_call>";
    let mut reader = reading("hermes").reader(0);
    let told: Vec<_> = text.split_inclusive(' ').map(|piece| reader.push(piece, 1)).collect();
    assert!(told[..3].iter().all(Vec::is_empty), "the name alone is no call: {told:?}");
    assert!(matches!(told[3].as_slice(), [Piece::Call { index: 0, .. }, Piece::Arguments { .. }]), "{:?}", told[3]);
    assert_eq!(told[4], [Piece::Arguments { index: 0, text: "\"one ".to_owned() }]);
    assert_eq!(told[5], [Piece::Arguments { index: 0, text: "two\"}".to_owned() }]);
}

#[test]
fn names_of_calls_depend_on_the_request_alone() {
    let text = "<tool_call>{\"name\": \"f\"}</tool_call><tool_call>{\"name\": \"f\"}</tool_call>";
    let reading_of = |request: &str| Reading { request: request.to_owned(), ..reading("hermes") };
    let ids = |reading: &Reading, choice: usize| {
        let mut reader = reading.reader(choice);
        let mut told = Told::default();
        told.add(reader.push(text, 1));
        told.calls.into_iter().map(|call| call.id).collect::<Vec<_>>()
    };
    let first = ids(&reading_of("r1"), 0);
    assert_eq!(first, ids(&reading_of("r1"), 0));
    let mut all = [first, ids(&reading_of("r1"), 1), ids(&reading_of("r2"), 0)].concat();
    assert!(all.iter().all(|id| id.len() == 29 && id.starts_with("call_")), "{all:?}");
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 6, "no two calls have one name");
    let mistral = told(&reading("mistral"), ["[TOOL_CALLS]f[ARGS]{}"]).0.calls;
    assert!(mistral[0].id.len() == 9 && mistral[0].id.chars().all(|c| c.is_ascii_alphanumeric()));
}

#[test]
fn thoughts_are_told_apart() {
    let open = thinking("qwen3", Start::Open);
    let none = Vec::new;
    assert_eq!(said(&open, "<think>\nhm\n</think>\n\nYes."), ("Yes.".to_owned(), "hm".to_owned(), none()));
    assert_eq!(said(&open, " Yes <think>."), (" Yes <think>.".to_owned(), String::new(), none()));
    assert_eq!(said(&open, "<think>hm <b> and"), (String::new(), "hm <b> and".to_owned(), none()));
    assert_eq!(said(&open, "<think>\n\n</think>\n\nYes."), ("Yes.".to_owned(), String::new(), none()));
    assert_eq!(said(&open, "<thi"), ("<thi".to_owned(), String::new(), none()));
    let inside = thinking("deepseek_r1", Start::Inside);
    assert_eq!(said(&inside, "hm</think>Yes."), ("Yes.".to_owned(), "hm".to_owned(), none()));
    assert_eq!(said(&inside, "<think>hm</think>Yes."), ("Yes.".to_owned(), "hm".to_owned(), none()));
    assert_eq!(said(&inside, "hm"), (String::new(), "hm".to_owned(), none()));
    let behind = thinking("qwen3", Start::Behind);
    assert_eq!(said(&behind, "<think>"), ("<think>".to_owned(), String::new(), none()));
    let granite = "Here's my thought process: hm\nHere is my response: Yes.";
    assert_eq!(said(&thinking("granite", Start::Open), granite), ("Yes.".to_owned(), "hm".to_owned(), none()));
    let harmony = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.";
    assert_eq!(said(&reading("openai"), harmony), ("Yes.".to_owned(), "hm".to_owned(), none()));
    let hidden = Reading { shows_thoughts: false, ..open };
    assert_eq!(said(&hidden, "<think>hm</think>Yes."), ("Yes.".to_owned(), String::new(), none()));
}

#[test]
fn prompts_say_where_answers_begin() {
    let start = |name: &str, prompt: &str, is_fresh: bool| {
        thinking(name, Start::Open).thoughts.unwrap().0.start(prompt, is_fresh)
    };
    assert_eq!(start("qwen3", "<|im_start|>assistant\n", true), Start::Open);
    assert_eq!(start("qwen3", "assistant\n<think>\n", true), Start::Inside);
    assert_eq!(start("qwen3", "assistant\n<think>\n\n</think>\n\n", true), Start::Behind);
    assert_eq!(start("deepseek_r1", "<｜Assistant｜>", true), Start::Inside);
    assert_eq!(start("deepseek_r1", "<｜Assistant｜></think>", true), Start::Behind);
    assert_eq!(start("qwen3", "assistant\nI am", false), Start::Behind);
}

#[test]
fn tokens_of_thoughts_are_counted_with_their_marks() {
    let mut reader = thinking("qwen3", Start::Open).reader(0);
    for piece in ["<think>", "hm", " so", "</think>", "\n\n", "Yes"] {
        reader.push(piece, 1);
    }
    reader.finish();
    assert_eq!(reader.n_thought_tokens(), 4);
}

#[test]
fn calls_follow_thoughts() {
    let reading = Reading { thoughts: thinking("qwen3", Start::Open).thoughts, ..reading("hermes") };
    let text =
        "<think>\nI could <tool_call>\n</think>\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
    let calls = vec![("f".to_owned(), "{}".to_owned())];
    assert_eq!(said(&reading, text), (String::new(), "I could <tool_call>".to_owned(), calls));
}

/// Pieces of what models write, put together at random.
fn output() -> impl Strategy<Value = String> {
    let scrap = prop::sample::select(scraps());
    prop::collection::vec(scrap, 0..14).prop_map(|scraps| scraps.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_text_is_read_alike_however_it_is_cut(
        text in output(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        which in 0..FORMATS.len(),
        thinks: bool,
    ) {
        let names: Names = ["f"].into_iter().collect();
        let thoughts = if thinks { thinking("qwen3", Start::Open).thoughts } else { None };
        let reading = Reading { format: Some(FORMATS[which]), names, thoughts, ..Reading::plain() };
        let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| borders[cut.index(borders.len())]).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]);
        let whole = told(&reading, [text.as_str()]).0;
        prop_assert_eq!(told(&reading, pieces).0, whole);
    }

    #[test]
    fn no_text_is_lost_where_there_is_no_call(text in output(), which in 0..FORMATS.len()) {
        let format = FORMATS[which];
        let reading = Reading { format: Some(format), ..Reading::plain() };
        let (told, _) = told(&reading, [text.as_str()]);
        prop_assert!(told.calls.is_empty(), "nothing was offered");
        // Heads of messages say where their text belongs.
        if !format.finds_thoughts() {
            prop_assert_eq!(told.content, text);
        }
    }
}
