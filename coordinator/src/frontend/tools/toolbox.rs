//! Tools that a request offers, and whether they must be called. In OpenAI's words; other APIs bring theirs into this shape.

use serde_json::{Map, Value, json};

use super::Names;
use crate::frontend::{
    error::ApiError,
    fields::{Fields, FromJson, kind},
    params::at_most,
};

/// Most tools of a request.
pub const MAX_TOOLS: usize = 128;
/// Longest name of a tool.
const LONGEST_NAME: usize = 64;

/// A tool.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// What it is called by.
    pub name: String,
    /// What it is for.
    pub description: Option<String>,
    /// Whether its arguments must follow the schema.
    pub is_strict: bool,
    /// JSON schema of its arguments; `None`: it has none.
    pub parameters: Option<Map<String, Value>>,
}

impl Tool {
    /// Checks a name and a schema. `at` is where these stand.
    pub fn new(
        [name_at, schema_at]: &[String; 2],
        name: String,
        description: Option<String>,
        parameters: Option<Value>,
        is_strict: bool,
    ) -> Result<Self, ApiError> {
        let is_fine = |c: char| c.is_ascii_alphanumeric() || "_-.:/".contains(c);
        if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(is_fine) {
            let reason = format!("must be 1 to {LONGEST_NAME} letters, digits or characters of \"_-.:/\"");
            return Err(ApiError::invalid(name_at, reason));
        }
        let parameters = match parameters {
            None => None,
            Some(Value::Object(schema)) => Some(schema),
            Some(other) => {
                return Err(ApiError::wrong_type(schema_at, "a JSON schema", kind(&other)));
            }
        };
        if parameters.as_ref().and_then(|schema| schema.get("type")).is_some_and(|kind| kind != "object") {
            return Err(ApiError::invalid(schema_at, "must be a schema of the type \"object\""));
        }
        Ok(Self { name, description, is_strict, parameters })
    }

    /// As chat templates are given it.
    fn shown(&self) -> Value {
        let mut function = json!({"name": self.name});
        if let Some(description) = &self.description {
            function["description"] = description.as_str().into();
        }
        let none = || json!({"type": "object", "properties": {}});
        function["parameters"] = self.parameters.clone().map_or_else(none, Value::Object);
        json!({"type": "function", "function": function})
    }
}

/// Whether tools are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// Never: the model does not hear of them.
    None,
    /// As the model likes.
    Auto,
    /// At least one is.
    Required,
    /// This one is, once.
    Named(String),
}

/// What a request offers.
#[derive(Debug, Clone, PartialEq)]
pub struct Toolbox {
    tools: Vec<Tool>,
    /// Whether tools are called.
    pub choice: Choice,
    /// Whether several may be called at once.
    pub is_parallel: bool,
    /// Those that may be called, if not all may.
    allowed: Option<Vec<String>>,
}

impl Default for Toolbox {
    fn default() -> Self {
        Self { tools: Vec::new(), choice: Choice::Auto, is_parallel: true, allowed: None }
    }
}

impl Toolbox {
    /// Tools with different names.
    pub fn new(field: &str, tools: Vec<Tool>) -> Result<Self, ApiError> {
        at_most(field, "tools", tools.len(), MAX_TOOLS)?;
        for (index, tool) in tools.iter().enumerate() {
            if tools[..index].iter().any(|other| other.name == tool.name) {
                return Err(ApiError::invalid(field, format!("has two tools of the name \"{}\"", tool.name)));
            }
        }
        Ok(Self { tools, ..Self::default() })
    }

    /// Takes `tools` alone.
    pub fn take_tools(fields: &mut Fields) -> Result<Self, ApiError> {
        let tools = fields.take::<Vec<Fields>>("tools")?.unwrap_or_default();
        Self::new("tools", tools.into_iter().map(nested).collect::<Result<_, _>>()?)
    }

    /// Takes `tools`, `tool_choice` and `parallel_tool_calls` of a chat completion.
    pub fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let mut toolbox = Self::take_tools(fields)?;
        if let Some(choice) = fields.take::<Value>("tool_choice")? {
            toolbox.choose(choice, |choice| choice.require::<Fields>("function").and_then(named))?;
        }
        toolbox.is_parallel = fields.take("parallel_tool_calls")?.unwrap_or(true);
        Ok(toolbox)
    }

    /// Reads a choice of OpenAI's. `name` takes what names a tool.
    pub fn choose(&mut self, choice: Value, name: fn(&mut Fields) -> Result<String, ApiError>) -> Result<(), ApiError> {
        const FIELD: &str = "tool_choice";
        match choice {
            Value::String(word) => {
                self.choice = match word.as_str() {
                    "none" => Choice::None,
                    "auto" => Choice::Auto,
                    "required" => Choice::Required,
                    _ => return Err(ApiError::invalid(FIELD, "must be none, auto, required or a tool")),
                };
            }
            object @ Value::Object(_) => {
                let mut choice = Fields::from_json(object, FIELD)?;
                match choice.require::<String>("type")?.as_str() {
                    "function" => self.choice = Choice::Named(name(&mut choice)?),
                    "allowed_tools" => {
                        // Chat completions have them in an object of their own, responses don't.
                        match choice.take::<Fields>("allowed_tools")? {
                            Some(mut inner) => {
                                self.allow(&mut inner, name)?;
                                inner.finish()?;
                            }
                            None => self.allow(&mut choice, name)?,
                        }
                    }
                    _ => return Err(ApiError::invalid("tool_choice.type", "must be function or allowed_tools")),
                }
                choice.finish()?;
            }
            other => return Err(ApiError::wrong_type(FIELD, "a word or an object", kind(&other))),
        }
        self.check_choice(FIELD)
    }

    fn allow(
        &mut self,
        allowed: &mut Fields,
        name: fn(&mut Fields) -> Result<String, ApiError>,
    ) -> Result<(), ApiError> {
        let at = allowed.path("tools");
        self.choice = match allowed.require::<String>("mode")?.as_str() {
            "auto" => Choice::Auto,
            "required" => Choice::Required,
            _ => return Err(ApiError::invalid(&allowed.path("mode"), "must be auto or required")),
        };
        let mut names = Vec::new();
        for mut tool in allowed.require::<Vec<Fields>>("tools")? {
            if tool.require::<String>("type")? != "function" {
                return Err(ApiError::invalid(&tool.path("type"), "must be \"function\""));
            }
            names.push(name(&mut tool)?);
            tool.finish()?;
        }
        if let Some(unknown) = names.iter().find(|name| !self.has(name)) {
            return Err(ApiError::invalid(&at, format!("names \"{unknown}\", which is none of 'tools'")));
        }
        if names.is_empty() {
            return Err(ApiError::invalid(&at, "must not be empty"));
        }
        self.allowed = Some(names);
        Ok(())
    }

    /// An error if what must be called is not there. `field` says what must be.
    pub fn check_choice(&self, field: &str) -> Result<(), ApiError> {
        match &self.choice {
            Choice::None | Choice::Auto => Ok(()),
            Choice::Required if !self.tools.is_empty() => Ok(()),
            Choice::Named(name) if self.has(name) => Ok(()),
            Choice::Required => Err(ApiError::invalid(field, "needs 'tools'")),
            Choice::Named(name) => Err(ApiError::invalid(field, format!("names \"{name}\", which is none of 'tools'"))),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.tools.iter().any(|tool| tool.name == name)
    }

    /// Whether the model hears of tools.
    pub fn is_open(&self) -> bool {
        !self.tools.is_empty() && self.choice != Choice::None
    }

    /// As chat templates are given them.
    pub fn shown(&self) -> Value {
        self.tools.iter().map(Tool::shown).collect()
    }

    /// Those that may be called.
    pub fn callable(&self) -> impl Iterator<Item = &Tool> {
        self.tools.iter().filter(|tool| match (&self.choice, &self.allowed) {
            (Choice::None, _) => false,
            (Choice::Named(name), _) => tool.name == *name,
            (_, Some(allowed)) => allowed.contains(&tool.name),
            (_, None) => true,
        })
    }

    /// Their names, and what their parameters may be.
    pub fn names(&self) -> Names {
        Names::of_tools(self.callable())
    }

    /// Whether a grammar has to see to it that the output is what was asked for.
    pub fn binds(&self) -> bool {
        match self.choice {
            Choice::None => false,
            Choice::Required | Choice::Named(_) => true,
            Choice::Auto => {
                self.is_open()
                    && (!self.is_parallel || self.allowed.is_some() || self.callable().any(|tool| tool.is_strict))
            }
        }
    }

    /// Most calls of an answer.
    pub fn most_calls(&self) -> usize {
        match self.choice {
            Choice::Named(_) => 1,
            _ if !self.is_parallel => 1,
            _ => MAX_CALLS,
        }
    }
}

/// Most calls that a grammar allows: a model that repeats itself ends there.
const MAX_CALLS: usize = 16;

/// A tool whose function is an object in it.
fn nested(mut tool: Fields) -> Result<Tool, ApiError> {
    let kind: String = tool.require("type")?;
    if kind != "function" {
        return Err(ApiError::invalid(&tool.path("type"), "must be \"function\": there are no other tools here"));
    }
    let function: Fields = tool.require("function")?;
    tool.finish()?;
    flat(function)
}

/// A function: `name`, `description`, `parameters`, `strict`.
pub fn flat(mut function: Fields) -> Result<Tool, ApiError> {
    let at = [function.path("name"), function.path("parameters")];
    let (name, description) = (function.require("name")?, function.take("description")?);
    let (parameters, is_strict) = (function.take("parameters")?, function.flag("strict")?);
    function.finish()?;
    Tool::new(&at, name, description, parameters, is_strict)
}

/// The name in an object that has nothing else.
fn named(mut function: Fields) -> Result<String, ApiError> {
    let name = function.require("name")?;
    function.finish()?;
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(body: &Value) -> Result<Toolbox, ApiError> {
        let mut fields = Fields::of_body(body.to_string().as_bytes())?;
        let toolbox = Toolbox::take(&mut fields)?;
        fields.finish()?;
        Ok(toolbox)
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object"}}})
    }

    fn names(toolbox: &Toolbox) -> Vec<&str> {
        toolbox.callable().map(|tool| tool.name.as_str()).collect()
    }

    #[test]
    fn choices_are_read() {
        let with = |choice: Value| taken(&json!({"tools": [tool("f"), tool("g")], "tool_choice": choice}));
        let auto = with(json!("auto")).unwrap();
        assert!(auto.is_open() && !auto.binds());
        assert_eq!(names(&auto), ["f", "g"]);
        assert_eq!(auto.shown()[1], tool("g"));
        let none = with(json!("none")).unwrap();
        assert!(!none.is_open() && names(&none).is_empty());
        assert!(with(json!("required")).unwrap().binds());
        let named = with(json!({"type": "function", "function": {"name": "g"}})).unwrap();
        assert_eq!((names(&named), named.most_calls()), (vec!["g"], 1));
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let allowed = json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": tools}});
        let allowed = with(allowed).unwrap();
        assert!(allowed.binds());
        assert_eq!((names(&allowed), allowed.shown().as_array().unwrap().len()), (vec!["f"], 2));
        assert!(!taken(&json!({"tools": [], "tool_choice": "auto", "parallel_tool_calls": false})).unwrap().binds());
        assert!(taken(&json!({"tools": [tool("f")], "parallel_tool_calls": false})).unwrap().binds());
    }

    #[test]
    fn wrong_ones_are_named() {
        let function = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
        let many: Vec<Value> = (0..=MAX_TOOLS).map(|n| tool(&format!("f{n}"))).collect();
        for (body, field) in [
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (function(json!({})), "tools[0].function.name"),
            (function(json!({"name": "has blanks"})), "tools[0].function.name"),
            (function(json!({"name": "x".repeat(65)})), "tools[0].function.name"),
            (function(json!({"name": "f", "parameters": {"type": "array"}})), "tools[0].function.parameters"),
            (function(json!({"name": "f", "parameters": 5})), "tools[0].function.parameters"),
            (function(json!({"name": "f", "odd": 5})), "tools[0].function.odd"),
            (json!({"tools": [tool("f"), tool("f")]}), "tools"),
            (json!({"tools": many}), "tools"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": [tool("f")], "tool_choice": "maybe"}), "tool_choice"),
            (json!({"tools": [tool("f")], "tool_choice": 5}), "tool_choice"),
            (
                json!({"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
                "tool_choice",
            ),
            (json!({"tools": [tool("f")], "tool_choice": {"type": "custom"}}), "tool_choice.type"),
        ] {
            let error = taken(&body).unwrap_err().to_string();
            assert!(error.contains(&format!("'{field}'")), "{field}: {error}");
        }
    }
}
