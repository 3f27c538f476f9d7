//! Grammars of arguments that are elements: texts stand in them as they are, so it is not JSON's grammar that bounds them.

use phalanx_cluster::grammar::GrammarError;
use serde_json::{Map, Value};

use super::{
    ElementSpelling,
    grammar::{Bounds, Parameter, json_of, parameters, unwritable},
    kinds::{Kinds, resolve},
};

/// How deep references and alternatives are followed.
const DEEPEST: usize = 8;
/// Keywords that allow all that there is of a type.
const SAYING_NOTHING: &[&str] =
    &["$comment", "$defs", "default", "definitions", "deprecated", "description", "examples", "title"];

/// A part of what a value may be.
enum Branch {
    /// Any text.
    AnyText,
    /// One of these.
    Texts(Vec<String>),
    /// A text that all of these regular expressions match as a whole.
    Matching(Vec<String>),
    /// JSON that is no text. Whether it is all that there is of some types.
    Json { schema: Value, is_all: bool },
}

impl Bounds<'_> {
    /// Arguments in the order of the schema. Those that need not be there may be left out.
    pub(super) fn elements(
        &self,
        index: usize,
        schema: &Map<String, Value>,
        form: &ElementSpelling,
        rules: &mut Vec<String>,
    ) -> Result<(), GrammarError> {
        let mut all = String::new();
        for (position, Parameter { name, schema, is_required }) in parameters(schema)?.iter().enumerate() {
            if name.trim() != name || name.is_empty() || name.contains(['<', '>', '\n']) {
                return Err(unwritable(name));
            }
            let head = self.spelt(&format!("{}{name}{}", form.before, form.middle));
            let value = format!("value_{index}_{position}");
            self.element_value(&value, name, schema, form, rules)?;
            let after = self.spelt(form.after);
            rules.push(format!("argument_{index}_{position}: {head} {value} {after}"));
            all.push_str(&format!(" argument_{index}_{position}{}", if *is_required { "" } else { "?" }));
        }
        rules.push(format!("arguments_{index}: {}", if all.is_empty() { "\"\"" } else { &all }));
        Ok(())
    }

    /// A rule for a value and what ends it.
    fn element_value(
        &self,
        rule: &str,
        name: &str,
        schema: &Value,
        form: &ElementSpelling,
        rules: &mut Vec<String>,
    ) -> Result<(), GrammarError> {
        let none = Map::new();
        let root = schema.as_object().unwrap_or(&none);
        let branches = branches(schema, root, DEEPEST).map_err(|reason| refused(name, &reason))?;
        if branches.iter().any(|branch| matches!(branch, Branch::AnyText)) {
            if branches.iter().any(|branch| matches!(branch, Branch::Json { is_all: false, .. })) {
                return Err(refused(name, "any text beside something narrower"));
            }
            // Whatever stands there is a text, or something else that fits.
            self.until(rule, form.end, rules);
            return Ok(());
        }
        let line = if form.has_lines { "\n" } else { "" };
        let end = self.spelt(&format!("{line}{}", form.end));
        let mut ways = Vec::new();
        for (number, branch) in branches.into_iter().enumerate() {
            match branch {
                Branch::AnyText => {}
                Branch::Texts(texts) => {
                    if texts.iter().any(|text| text.contains(form.end)) {
                        return Err(refused(name, "a text with the mark that ends texts"));
                    }
                    ways.extend(texts.iter().map(|text| self.spelt(&format!("{text}{line}{}", form.end))));
                }
                Branch::Matching(expressions) => {
                    let term = format!("{}_{number}", rule.to_uppercase());
                    let all: Vec<_> = expressions.iter().map(|one| format!("/{}/", slashed(one))).collect();
                    let all = all.join(" & ");
                    if self.control(form.end).is_some() {
                        rules.push(format!("{term}: ({all})"));
                        ways.push(format!("{term} {end}"));
                    } else {
                        // As one word of the grammar, of which it is known where it ends.
                        let mark = slashed(form.end);
                        rules.push(format!("{term}: ({all} & ~/(?s:.*){mark}(?s:.*)/) {end}"));
                        ways.push(term);
                    }
                }
                Branch::Json { schema, .. } => {
                    let json = format!("{rule}_{number}");
                    rules.push(format!("{json}: {}", json_of(schema)?));
                    ways.push(format!("{json} {end}"));
                }
            }
        }
        rules.push(format!("{rule}: {}", ways.join(" | ")));
        Ok(())
    }
}

fn refused(name: &str, reason: &str) -> GrammarError {
    GrammarError::Refused(format!("has the property '{name}' with {reason}, which calls of this model can't follow"))
}

/// What a value may be. The reason if that can't be followed.
fn branches(schema: &Value, root: &Map<String, Value>, depth: usize) -> Result<Vec<Branch>, String> {
    let Some(map) = schema.as_object() else {
        return if *schema == Value::Bool(true) { Ok(vec![Branch::AnyText]) } else { Err("no value".to_owned()) };
    };
    if depth == 0 {
        return Err("references that have no end".to_owned());
    }
    let says = |keyword: &&String| !SAYING_NOTHING.contains(&keyword.as_str());
    let said: Vec<&str> = map.keys().filter(says).map(String::as_str).collect();
    let inner = |part: &Value| branches(part, root, depth - 1);
    match (said.as_slice(), said.first().and_then(|keyword| map.get(*keyword))) {
        (["$ref"], Some(Value::String(reference))) => {
            return inner(resolve(reference, root).ok_or_else(|| format!("the reference '{reference}'"))?);
        }
        (["anyOf"], Some(Value::Array(parts))) => {
            let all = parts.iter().map(inner).collect::<Result<Vec<_>, _>>()?;
            return Ok(all.into_iter().flatten().collect());
        }
        _ => {}
    }
    if let Some(Value::Array(names)) = map.get("type") {
        let one = |name: &Value| {
            let mut part = map.clone();
            part.insert("type".to_owned(), name.clone());
            inner(&Value::Object(part))
        };
        let all = names.iter().map(one).collect::<Result<Vec<_>, _>>()?;
        return Ok(all.into_iter().flatten().collect());
    }
    let kinds = Kinds::of_schema(schema, root);
    if !kinds.meets(Kinds::TEXT) {
        let is_all = said == ["type"];
        let mut schema = map.clone();
        for (name, value) in root.iter().filter(|(name, _)| matches!(name.as_str(), "$defs" | "definitions")) {
            schema.entry(name.clone()).or_insert_with(|| value.clone());
        }
        return Ok(vec![Branch::Json { schema: Value::Object(schema), is_all }]);
    }
    if said.is_empty() || said == ["type"] {
        return Ok(vec![Branch::AnyText]);
    }
    let listed = match (map.get("enum"), map.get("const")) {
        (Some(Value::Array(values)), None) => Some(values.clone()),
        (None, Some(value)) => Some(vec![value.clone()]),
        _ => None,
    };
    if let Some(values) = listed.filter(|_| said.iter().all(|keyword| matches!(*keyword, "type" | "enum" | "const"))) {
        let (texts, others): (Vec<_>, Vec<_>) =
            values.into_iter().filter(|value| kinds.meets(Kinds::of_value(value))).partition(Value::is_string);
        let mut all = vec![Branch::Texts(texts.iter().filter_map(Value::as_str).map(str::to_owned).collect())];
        if !others.is_empty() {
            all.push(Branch::Json { schema: serde_json::json!({"enum": others}), is_all: false });
        }
        return Ok(all);
    }
    if kinds == Kinds::TEXT {
        return text(map, &said).map(|expressions| vec![Branch::Matching(expressions)]);
    }
    Err(format!("the keyword '{}'", said.last().copied().unwrap_or_default()))
}

/// Regular expressions of what keywords say of a text.
fn text(map: &Map<String, Value>, said: &[&str]) -> Result<Vec<String>, String> {
    let known = ["type", "minLength", "maxLength", "pattern"];
    if let Some(odd) = said.iter().find(|keyword| !known.contains(keyword)) {
        return Err(format!("the keyword '{odd}'"));
    }
    let length = |keyword: &str| match map.get(keyword) {
        None => Ok(None),
        Some(value) => value.as_u64().map(Some).ok_or_else(|| format!("a '{keyword}' that is no number")),
    };
    let least = length("minLength")?.unwrap_or(0);
    let most = length("maxLength")?.map_or(String::new(), |most| most.to_string());
    let mut all = vec![format!("(?s:.{{{least},{most}}})")];
    if let Some(pattern) = map.get("pattern") {
        let pattern = pattern.as_str().ok_or("a 'pattern' that is no text")?;
        all.push(whole(pattern).ok_or_else(|| format!("the pattern '{pattern}'"))?);
    }
    Ok(all)
}

/// A regular expression that matches whole texts of those that this one is found in. `None` if the anchors of it belong to some
/// of its alternatives only, or stand inside.
fn whole(pattern: &str) -> Option<String> {
    let inner = pattern.strip_prefix('^').unwrap_or(pattern);
    let is_begun = inner.len() < pattern.len();
    let n_slashes = inner.strip_suffix('$').map(|rest| rest.len() - rest.trim_end_matches('\\').len());
    let is_ended = n_slashes.is_some_and(|n| n % 2 == 0);
    let inner = if is_ended { &inner[..inner.len() - 1] } else { inner };
    let (mut depth, mut is_class, mut is_escaped) = (0_u32, false, false);
    for c in inner.chars() {
        if std::mem::replace(&mut is_escaped, false) {
            // Borders of words, and of texts, are anchors too.
            if matches!(c, 'b' | 'B' | 'A' | 'z' | 'Z') {
                return None;
            }
            continue;
        }
        match c {
            '\\' => is_escaped = true,
            ']' => is_class = false,
            _ if is_class => {}
            '[' => is_class = true,
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            '|' if depth == 0 && (is_begun || is_ended) => return None,
            '^' | '$' => return None,
            _ => {}
        }
    }
    let open = if is_begun { "" } else { "(?s:.*)" };
    let close = if is_ended { "" } else { "(?s:.*)" };
    Some(format!("{open}(?:{inner}){close}"))
}

/// A regular expression as it stands between slashes.
fn slashed(expression: &str) -> String {
    let mut is_escaped = false;
    let mut text = String::new();
    for c in expression.chars() {
        if c == '/' && !is_escaped {
            text.push('\\');
        }
        is_escaped = c == '\\' && !is_escaped;
        text.push(c);
    }
    text
}

#[cfg(test)]
mod tests {
    use phalanx_cluster::tokenizer::Tokenizer;
    use serde_json::json;

    use super::*;
    use crate::frontend::{
        tests::fake::folder,
        tools::{
            FORMATS,
            grammar::tests::allows,
            toolbox::{Choice, Tool, Toolbox},
        },
    };

    fn toolbox(parameters: Value) -> Toolbox {
        let tool = Tool::new(&[String::new(), String::new()], "f".to_owned(), None, Some(parameters), false).unwrap();
        let mut toolbox = Toolbox::new("tools", vec![tool]).unwrap();
        toolbox.choice = Choice::Required;
        toolbox
    }

    fn with_grammar<T>(format: &str, property: Value, ask: impl FnOnce(&Bounds<'_>) -> T) -> T {
        let format = FORMATS.iter().find(|one| one.names().contains(&format)).unwrap();
        let unit = json!({"enum": ["c", "f"]});
        let schema =
            json!({"type": "object", "properties": {"a": property}, "required": ["a"], "$defs": {"unit": unit}});
        let (toolbox, tokenizer) = (toolbox(schema), Tokenizer::from_folder(folder()).unwrap());
        let (format, thoughts, answer) = (Some((*format, "")), None, None);
        ask(&Bounds { format, toolbox: &toolbox, thoughts, answer, tokenizer: &tokenizer })
    }

    #[test]
    fn values_follow_their_schemas() {
        for (property, good, bad) in [
            (json!({"type": "string"}), vec!["", "one\ntwo", "5", "a < b </para"], vec![]),
            (json!({"type": "string", "description": "d", "enum": ["left", "5"]}), vec!["left", "5"], vec!["6", "lef"]),
            (json!({"$ref": "#/$defs/unit"}), vec!["c"], vec!["k"]),
            (json!({"anyOf": [{"$ref": "#/$defs/unit"}, {"type": "null"}]}), vec!["f", "null"], vec!["none"]),
            (json!({"anyOf": [{"type": "string"}, {"type": "null"}], "default": null}), vec!["x", "null"], vec![]),
            (json!({"type": ["string", "integer"], "enum": ["x", 5]}), vec!["x", "5"], vec!["6", "y"]),
            (
                json!({"type": "string", "minLength": 2, "maxLength": 4}),
                vec!["ab", "a\nb", "\u{1f600}>/<"],
                vec!["a", "abcde"],
            ),
            (json!({"type": "string", "pattern": "^[a-z]+/[0-9]{2}$"}), vec!["ab/12"], vec!["ab/1", " ab/12"]),
            (json!({"type": "string", "pattern": "[0-9]", "maxLength": 3}), vec!["a1b"], vec!["abc", "a1bc"]),
            (json!({"type": "integer", "minimum": 3}), vec!["3", "42"], vec!["2", "x", ""]),
            (json!({"type": "array", "items": {"type": "boolean"}}), vec!["[true, false]"], vec!["[1]"]),
        ] {
            for (format, open, line, close) in [
                (
                    "qwen3_coder",
                    "<tool_call>\n<function=f>\n<parameter=a>\n",
                    "\n",
                    "</parameter>\n</function>\n</tool_call>",
                ),
                ("glm45", "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>", "", "</arg_value>\n</tool_call>"),
            ] {
                let texts: Vec<_> = good.iter().chain(&bad).map(|text| format!("{open}{text}{line}{close}")).collect();
                let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
                let want: Vec<_> = good.iter().map(|_| true).chain(bad.iter().map(|_| false)).collect();
                let got = with_grammar(format, property.clone(), |bounds| allows(bounds, &texts));
                assert_eq!(got, want, "{format} {property}");
            }
        }
    }

    #[test]
    fn what_cant_be_followed_is_refused() {
        for property in [
            json!({"type": "string", "format": "date"}),
            json!({"type": "string", "pattern": "^a|b$"}),
            json!({"type": "string", "pattern": "a\\b"}),
            json!({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 3}]}),
            json!({"enum": ["</parameter>", "</arg_value>"]}),
            json!({"$ref": "#/$defs/none"}),
            json!(false),
        ] {
            for format in ["qwen3_coder", "glm45"] {
                let refused =
                    with_grammar(format, property.clone(), |bounds| bounds.grammar().unwrap_err().to_string());
                assert!(refused.contains("'a'"), "{property}: {refused}");
            }
        }
    }

    #[test]
    fn patterns_are_of_whole_texts() {
        assert_eq!(whole("^a(b|^c)$"), None);
        assert_eq!(whole("^a(b|c)$").unwrap(), "(?:a(b|c))");
        assert_eq!(whole("a|b").unwrap(), "(?s:.*)(?:a|b)(?s:.*)");
        assert_eq!(whole("a[$|]\\$").unwrap(), "(?s:.*)(?:a[$|]\\$)(?s:.*)");
        assert_eq!(slashed("a/b\\/c"), "a\\/b\\/c");
    }
}
