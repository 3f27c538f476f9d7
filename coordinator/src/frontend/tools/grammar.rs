//! Grammars of answers that call tools, in the words of the model's own format: the parser that reads what a model writes by
//! itself reads this too.

use phalanx_cluster::{
    grammar::{Grammar, GrammarError, WhiteSpace, quoted},
    tokenizer::Tokenizer,
};
use serde_json::{Map, Value, json};

use super::{
    ArgumentForm, Format, Spelling,
    thoughts::{Start, Thoughts},
    toolbox::{Choice, Tool, Toolbox},
};

/// Any text that is not empty. Control tokens are no text.
const TEXT: &str = "/(?s:.+)/";
/// Any text, as the beginning of something that ends with a mark.
const ANYTHING: &str = "/(?s:.*)/";
/// What may stand between thoughts and what follows.
const BLANKS: &str = "/[ \\n]{1,4}/";

/// The number of a call.
const NUMBER: &str = "/[0-9]{1,4}/";

/// Keywords of schemas whose properties can stand as arguments of a Python call.
const PLAIN_KEYWORDS: &[&str] = &[
    "$defs",
    "$schema",
    "additionalProperties",
    "definitions",
    "description",
    "properties",
    "required",
    "title",
    "type",
];

/// What an answer to a request may be.
pub struct Bounds<'a> {
    /// How calls are written; `None`: there are none.
    pub format: Option<(&'a dyn Format, &'a str)>,
    /// What may be called.
    pub toolbox: &'a Toolbox,
    /// What may come before.
    pub thoughts: Option<(&'static Thoughts, Start)>,
    /// The text of the schema that an answer without calls follows; `None`: it is any text.
    pub answer: Option<&'a str>,
    /// The model's.
    pub tokenizer: &'a Tokenizer,
}

impl Bounds<'_> {
    /// As a grammar.
    ///
    /// # Errors
    /// If a schema can't be used.
    pub fn grammar(&self) -> Result<Grammar, GrammarError> {
        let mut rules = Vec::new();
        let spelling = self.format.map(|(format, template)| format.spelling(template));
        let thinks = self.thinks(spelling.as_ref(), &mut rules);
        let answer = match &spelling {
            Some(spelling) => self.calls_or_text(spelling, &mut rules)?,
            None => self.text(&mut rules),
        };
        Ok(Grammar::Lark(format!("start: {thinks} ({answer})\n{}\n", rules.join("\n"))))
    }

    /// The token of a mark that is a control token, which no text has.
    pub(super) fn control(&self, mark: &str) -> Option<u32> {
        self.tokenizer.token_id(mark).filter(|id| self.tokenizer.is_special(*id))
    }

    fn marks(&self) -> &'static [&'static str] {
        self.format.map_or(&[], |(format, _)| format.marks())
    }

    /// A text in the grammar's notation: literals, and control tokens.
    pub(super) fn spelt(&self, text: &str) -> String {
        let mut atoms = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let marks = self.marks().iter().filter_map(|mark| Some((rest.find(mark)?, *mark, self.control(mark)?)));
            match marks.min_by_key(|(at, ..)| *at) {
                Some((at, mark, token)) => {
                    if at > 0 {
                        atoms.push(quoted(&rest[..at]));
                    }
                    atoms.push(format!("<[{token}]>"));
                    rest = &rest[at + mark.len()..];
                }
                None => {
                    atoms.push(quoted(rest));
                    rest = "";
                }
            }
        }
        atoms.join(" ")
    }

    /// A rule for a text up to and with a mark.
    pub(super) fn until(&self, rule: &str, mark: &str, rules: &mut Vec<String>) {
        rules.push(match self.control(mark) {
            Some(token) => format!("{rule}: {TEXT}? <[{token}]>"),
            None => format!("{rule}[lazy]: {ANYTHING} {}", quoted(mark)),
        });
    }

    /// What may, or must, be thought first.
    fn thinks(&self, spelling: Option<&Spelling>, rules: &mut Vec<String>) -> String {
        if let Some((open, close)) = spelling.and_then(|spelling| spelling.thoughts) {
            let mark = self.marks().iter().find(|mark| close.starts_with(**mark)).copied().unwrap_or(close);
            self.until("thought", mark, rules);
            return format!("({} thought {})?", self.spelt(open), self.spelt(&close[mark.len()..]));
        }
        let Some((form, start)) = self.thoughts else { return String::new() };
        let mut ends = Vec::new();
        if start != Start::Behind {
            for (index, mark) in form.close.iter().enumerate() {
                let rule = format!("thought_{index}");
                self.until(&rule, mark, rules);
                ends.push(rule);
            }
        }
        let thought = format!("({}) {BLANKS}?", ends.join(" | "));
        match start {
            Start::Behind => String::new(),
            Start::Inside => thought,
            Start::Open => {
                let opens: Vec<_> = form
                    .open
                    .iter()
                    .map(|mark| self.control(mark).map_or_else(|| quoted(mark), |token| format!("<[{token}]>")))
                    .collect();
                format!("(({}) {thought})?", opens.join(" | "))
            }
        }
    }

    /// An answer that is none but text.
    fn text(&self, rules: &mut Vec<String>) -> String {
        match self.answer {
            Some(schema) => {
                rules.push(format!("answer: %json {schema}"));
                "answer".to_owned()
            }
            None => format!("{TEXT}?"),
        }
    }

    fn calls_or_text(&self, spelling: &Spelling, rules: &mut Vec<String>) -> Result<String, GrammarError> {
        let tools: Vec<&Tool> = self.toolbox.callable().collect();
        for (index, tool) in tools.iter().enumerate() {
            self.arguments(index, tool, spelling, rules)?;
        }
        let call = |rule: &str, before: &str, rules: &mut Vec<String>| {
            let one = |(index, tool): (usize, &&Tool)| {
                let (name, middle, after) = (&tool.name, spelling.middle, self.spelt(spelling.after));
                let head = match spelling.number {
                    None => self.spelt(&format!("{before}{name}{middle}")),
                    Some(colon) => {
                        format!("{} {NUMBER} {}", self.spelt(&format!("{before}{name}{colon}")), self.spelt(middle))
                    }
                };
                format!("{head} arguments_{index} {after}")
            };
            let all: Vec<_> = tools.iter().enumerate().map(one).collect();
            rules.push(format!("{rule}: {}", all.join(" | ")));
        };
        call("call", spelling.before, rules);
        let more = match (spelling.between, self.toolbox.most_calls()) {
            (Some(between), most) if most > 1 => format!("({} call){{0,{}}}", self.spelt(between), most - 1),
            _ => String::new(),
        };
        let behind = format!("{more} {}", self.spelt(spelling.close));
        rules.push(format!("calls: {} call {behind}", self.spelt(spelling.open)));
        if self.toolbox.choice != Choice::Auto {
            return Ok("calls".to_owned());
        }
        if self.answer.is_some() {
            return Ok(format!("{} {} | calls", self.spelt(spelling.text), self.text(rules)));
        }
        if !spelling.text.is_empty() {
            return Ok(format!("{} {TEXT}? | calls", self.spelt(spelling.text)));
        }
        let begin = if spelling.open.is_empty() { spelling.before } else { spelling.open };
        if let Some(first) = spelling.first {
            // What begins otherwise is text.
            return Ok(format!("/[^\\s\\x{{{:X}}}](?s:.*)/? | calls", u32::from(first)));
        }
        let mark = self.marks().iter().find(|mark| begin.starts_with(**mark)).copied().unwrap_or(begin);
        self.until("text_before", mark, rules);
        let rest = &begin[mark.len()..];
        if spelling.open.is_empty() {
            call("first_call", rest, rules);
            Ok(format!("{TEXT}? | text_before first_call {behind}"))
        } else {
            Ok(format!("{TEXT}? | text_before {} call {behind}", self.spelt(rest)))
        }
    }

    fn arguments(
        &self,
        index: usize,
        tool: &Tool,
        spelling: &Spelling,
        rules: &mut Vec<String>,
    ) -> Result<(), GrammarError> {
        // These have no form that any object has: they follow the schema in any case.
        let form = spelling.arguments;
        let is_bound = tool.is_strict || self.toolbox.choice != Choice::Auto || form != ArgumentForm::Object;
        let schema = schema_of(tool, is_bound);
        match form {
            ArgumentForm::Object => rules.push(format!("arguments_{index}: {}", json_of(Value::Object(schema))?)),
            ArgumentForm::Keywords => keywords(index, &schema, rules)?,
            ArgumentForm::Elements(spelling) => self.elements(index, &schema, spelling, rules)?,
        }
        Ok(())
    }
}

/// What a tool's arguments must be: any object, unless they are bound.
fn schema_of(tool: &Tool, is_bound: bool) -> Map<String, Value> {
    let mut schema = match &tool.parameters {
        Some(schema) if is_bound => schema.clone(),
        None if is_bound => Map::from_iter([("properties".to_owned(), json!({}))]),
        _ => return Map::from_iter([("type".to_owned(), "object".into())]),
    };
    schema.entry("type").or_insert_with(|| "object".into());
    let is_plain = schema.keys().all(|keyword| PLAIN_KEYWORDS.contains(&keyword.as_str()));
    if is_plain && schema.contains_key("properties") {
        // Valid with more properties too, but the function has no others.
        schema.entry("additionalProperties").or_insert(Value::Bool(false));
    }
    schema
}

pub(super) fn json_of(schema: Value) -> Result<String, GrammarError> {
    Ok(format!("%json {}", Grammar::of_schema(schema, &WhiteSpace::Some)?.text()))
}

/// A parameter of a tool.
pub(super) struct Parameter {
    /// Its key.
    pub(super) name: String,
    /// What it may be, with the definitions that this refers to.
    pub(super) schema: Value,
    pub(super) is_required: bool,
}

/// Parameters, in the order of the schema, if there is no more to say of them together.
pub(super) fn parameters(schema: &Map<String, Value>) -> Result<Vec<Parameter>, GrammarError> {
    if let Some(odd) = schema.keys().find(|keyword| !PLAIN_KEYWORDS.contains(&keyword.as_str())) {
        let reason = format!("has the keyword '{odd}', which arguments of this model's calls can't follow");
        return Err(GrammarError::Refused(reason));
    }
    let required = schema.get("required").and_then(Value::as_array);
    let is_required = |name: &str| required.into_iter().flatten().any(|required| required == name);
    let shared = schema.iter().filter(|(name, _)| matches!(name.as_str(), "$defs" | "definitions"));
    let one = |(name, property): (&String, &Value)| {
        let mut schema = property.clone();
        if let Value::Object(own) = &mut schema {
            own.extend(shared.clone().map(|(name, value)| (name.clone(), value.clone())));
        }
        Parameter { name: name.clone(), schema, is_required: is_required(name) }
    };
    Ok(schema.get("properties").and_then(Value::as_object).into_iter().flatten().map(one).collect())
}

/// A parameter whose name can't stand in a call.
pub(super) fn unwritable(name: &str) -> GrammarError {
    GrammarError::Refused(format!("has the property '{name}', which can't be an argument of this model's calls"))
}

/// Arguments as `key=value, …`, in the order of the schema. Those that need not be there may be left out.
fn keywords(index: usize, schema: &Map<String, Value>, rules: &mut Vec<String>) -> Result<(), GrammarError> {
    let parameters = parameters(schema)?;
    let rule = |kind: &str, position: usize| match position {
        0 if kind == "first" => format!("arguments_{index}"),
        _ => format!("{kind}_{index}_{position}"),
    };
    for (position, Parameter { name, schema, is_required }) in parameters.iter().enumerate() {
        if !name.chars().all(|c| c.is_ascii_alphanumeric() || "_.:/-".contains(c)) || name.is_empty() {
            return Err(unwritable(name));
        }
        rules.push(format!("value_{index}_{position}: {}", json_of(schema.clone())?));
        let next = rule("next", position + 1);
        for (kind, before) in [("first", ""), ("next", ", ")] {
            let head = quoted(&format!("{before}{name}="));
            let without = if *is_required { String::new() } else { format!(" | {}", rule(kind, position + 1)) };
            rules.push(format!("{}: {head} value_{index}_{position} {next}{without}", rule(kind, position)));
        }
    }
    for kind in ["first", "next"] {
        rules.push(format!("{}: \"\"", rule(kind, parameters.len())));
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use phalanx_cluster::grammar::{Compiler, Limits, STACK_BYTES};

    use super::*;
    use crate::frontend::{
        tests::fake::folder,
        tools::{ElementSpelling, FORMATS, reader::Reading, thoughts::THOUGHTS},
    };

    fn toolbox(choice: Choice) -> Toolbox {
        let schema = json!({
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "now": {"type": "boolean"}},
            "required": ["city", "now"],
        });
        let tool = |name: &str, schema: Option<Value>| {
            Tool::new(&[String::new(), String::new()], name.to_owned(), None, schema, true).unwrap()
        };
        let tools = vec![tool("weather", Some(schema)), tool("weather_now", None)];
        let mut toolbox = Toolbox::new("tools", tools).unwrap();
        toolbox.choice = choice;
        toolbox
    }

    /// Whether each of these texts is whole under a grammar.
    pub fn allows(bounds: &Bounds<'_>, texts: &[&str]) -> Vec<bool> {
        let grammar = bounds.grammar().unwrap();
        let tokenizer = bounds.tokenizer;
        std::thread::scope(|scope| {
            let work = || {
                let compiler = Compiler::new(tokenizer, Limits::default()).unwrap();
                let automaton = compiler.compile(&grammar).unwrap_or_else(|e| panic!("{e}: {}", grammar.text()));
                let allows = |text: &&str| {
                    let mut automaton = automaton.copy();
                    let ids = tokenizer.encode(text, false).unwrap();
                    assert_eq!(tokenizer.decode(&ids, false), **text, "the vocabulary has all of it");
                    ids.iter().all(|id| automaton.advance(*id).is_ok())
                        && automaton.mask().is_ok_and(|mask| tokenizer.eos_ids().iter().any(|eos| mask.allows(*eos)))
                };
                texts.iter().map(allows).collect()
            };
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work).unwrap();
            thread.join().unwrap()
        })
    }

    /// Arguments as elements: texts without quotes. What is no text in JSON where one has to be is here a text where none may be.
    fn elements(form: &ElementSpelling, json: &str) -> String {
        let json = json.replace("\"city\": 5, \"now\": true", "\"city\": \"5\", \"now\": \"maybe\"");
        let value: Map<String, Value> = serde_json::from_str(&json).unwrap();
        let one = |(key, value): (&String, &Value)| {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let line = if form.has_lines { "\n" } else { "" };
            format!("{}{key}{}{text}{line}{}{}", form.before, form.middle, form.end, form.after)
        };
        value.iter().map(one).collect()
    }

    /// Calls of `weather` with these arguments.
    fn call(spelling: &Spelling, all: &[(&str, &str, &str)]) -> String {
        let one = |(name, json, keywords): &(&str, &str, &str)| {
            let arguments = match spelling.arguments {
                ArgumentForm::Object => (*json).to_owned(),
                ArgumentForm::Keywords => (*keywords).to_owned(),
                ArgumentForm::Elements(form) => elements(form, json),
            };
            let number = spelling.number.map_or(String::new(), |colon| format!("{colon}7"));
            format!("{}{name}{number}{}{arguments}{}", spelling.before, spelling.middle, spelling.after)
        };
        let calls: Vec<_> = all.iter().map(one).collect();
        format!("{}{}{}", spelling.open, calls.join(spelling.between.unwrap_or_default()), spelling.close)
    }

    const GOOD: (&str, &str, &str) =
        ("weather", r#"{"city": "Paris", "days": 2, "now": true}"#, r#"city="Paris", days=2, now=true"#);
    const SHORT: (&str, &str, &str) = ("weather", r#"{"city":"Paris","now":false}"#, r#"city="Paris", now=false"#);
    const NONE: (&str, &str, &str) = ("weather_now", "{}", "");
    const BAD: (&str, &str, &str) = ("weather", r#"{"city": 5, "now": true}"#, "city=5, now=true");
    const LACKING: (&str, &str, &str) = ("weather", r#"{"city": "Paris"}"#, r#"city="Paris""#);
    const UNKNOWN: (&str, &str, &str) = ("rm", "{}", "");

    #[test]
    fn required_calls_are_calls_and_are_read() {
        let tokenizer = Tokenizer::from_folder(folder()).unwrap();
        for format in FORMATS {
            for template in ["", "[ARGS]", "```json", "<|tool_call|>", "</arg_key><arg_value>"] {
                let spelling = format.spelling(template);
                let toolbox = toolbox(Choice::Required);
                let bounds = Bounds {
                    format: Some((*format, template)),
                    toolbox: &toolbox,
                    thoughts: None,
                    answer: None,
                    tokenizer: &tokenizer,
                };
                let whole: Vec<String> =
                    [GOOD, SHORT, NONE, BAD, LACKING, UNKNOWN].iter().map(|one| call(&spelling, &[*one])).collect();
                let mut texts: Vec<&str> = whole.iter().map(String::as_str).collect();
                let two = call(&spelling, &[GOOD, NONE]);
                texts.extend(["no call", &two]);
                let may_be_two = spelling.between.is_some();
                assert_eq!(
                    allows(&bounds, &texts),
                    [true, true, true, false, false, false, false, may_be_two],
                    "{} {template}",
                    format.names()[0]
                );
                // What the grammar allows is what the parser reads.
                let reading = Reading { format: Some(*format), names: toolbox.names(), ..Reading::plain() };
                let mut reader = reading.reader(0);
                let mut told = crate::frontend::tools::reader::Told::default();
                told.add(reader.push(&two, 1));
                told.add(reader.finish());
                if may_be_two {
                    assert_eq!((told.content.as_str(), told.calls.len()), ("", 2), "{two}");
                    let arguments: Value = serde_json::from_str(&told.calls[0].arguments).unwrap();
                    assert_eq!(arguments, serde_json::from_str::<Value>(GOOD.1).unwrap());
                }
            }
        }
    }

    #[test]
    fn strict_tools_leave_text_free() {
        let tokenizer = Tokenizer::from_folder(folder()).unwrap();
        for format in FORMATS {
            let spelling = format.spelling("");
            let toolbox = toolbox(Choice::Auto);
            let bounds = Bounds {
                format: Some((*format, "")),
                toolbox: &toolbox,
                thoughts: None,
                answer: None,
                tokenizer: &tokenizer,
            };
            let (good, bad) = (call(&spelling, &[GOOD]), call(&spelling, &[BAD]));
            let text = format!("{}just text", spelling.text);
            let mixed = format!("I look. {good}");
            let is_marked = spelling.first.is_none() && spelling.text.is_empty();
            let mut want = vec![true, true, false];
            let mut texts = vec![text.as_str(), &good, &bad];
            if is_marked {
                texts.push(&mixed);
                want.push(true);
            }
            assert_eq!(allows(&bounds, &texts), want, "{}", format.names()[0]);
        }
    }

    #[test]
    fn thoughts_come_first_and_schemas_may_be_the_answer() {
        let tokenizer = Tokenizer::from_folder(folder()).unwrap();
        let qwen = THOUGHTS.iter().find(|form| form.names.contains(&"qwen3")).unwrap();
        let hermes = FORMATS.iter().find(|format| format.names()[0] == "hermes").unwrap();
        let toolbox = toolbox(Choice::Auto);
        let good = call(&hermes.spelling(""), &[GOOD]);
        let bounds = |start| Bounds {
            format: Some((*hermes, "")),
            toolbox: &toolbox,
            thoughts: Some((*qwen, start)),
            answer: Some(r#"{"type": "integer"}"#),
            tokenizer: &tokenizer,
        };
        let after = format!("hm</think>\n\n{good}");
        let before = format!("<think>hm</think>{good}");
        let texts = ["hm</think>7", &after, "7", "<think>hm</think>7", &before, &good, "text"];
        assert_eq!(allows(&bounds(Start::Inside), &texts), [true, true, false, true, true, false, false]);
        assert_eq!(allows(&bounds(Start::Open), &texts), [false, false, true, true, true, true, false]);
        assert_eq!(allows(&bounds(Start::Behind), &texts), [false, false, true, false, false, true, false]);
    }

    #[test]
    fn one_call_is_one_call() {
        let tokenizer = Tokenizer::from_folder(folder()).unwrap();
        let hermes = FORMATS.iter().find(|format| format.names()[0] == "hermes").unwrap();
        let mut single = toolbox(Choice::Auto);
        single.is_parallel = false;
        let named = toolbox(Choice::Named("weather_now".to_owned()));
        let spelling = hermes.spelling("");
        let (one, two) = (call(&spelling, &[NONE]), call(&spelling, &[NONE, NONE]));
        let other = call(&spelling, &[GOOD]);
        for (toolbox, want) in [(single, [true, false, true]), (named, [true, false, false])] {
            let bounds = Bounds {
                format: Some((*hermes, "")),
                toolbox: &toolbox,
                thoughts: None,
                answer: None,
                tokenizer: &tokenizer,
            };
            assert_eq!(allows(&bounds, &[&one, &two, &other]), want);
        }
    }
}
