//! What may be called.

use std::sync::Arc;

use serde_json::Value;

use super::{kinds::Kinds, toolbox::Tool};

/// Names of tools that may be called, and which kinds of values their parameters have.
#[derive(Debug, Clone, Default)]
pub struct Names(Arc<[Callable]>);

#[derive(Debug)]
struct Callable {
    name: String,
    parameters: Vec<(String, Kinds)>,
}

impl Names {
    /// Of these tools.
    pub fn of_tools<'a>(tools: impl Iterator<Item = &'a Tool>) -> Self {
        let callable = |tool: &Tool| {
            let schema = tool.parameters.as_ref();
            let properties = schema.and_then(|schema| schema.get("properties")).and_then(Value::as_object);
            let kinds = |part: &Value| schema.map_or(Kinds::ALL, |root| Kinds::of_schema(part, root));
            let parameters = properties.into_iter().flatten().map(|(key, part)| (key.clone(), kinds(part))).collect();
            Callable { name: tool.name.clone(), parameters }
        };
        Self(tools.map(callable).collect())
    }

    /// Whether it is one of them.
    pub fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|known| known.name == name)
    }

    /// What a parameter of one of them may be, as far as its schema says.
    pub fn kinds(&self, name: &str, parameter: &str) -> Kinds {
        let tool = self.0.iter().find(|known| known.name == name);
        let known = tool.and_then(|tool| tool.parameters.iter().find(|(key, _)| key == parameter));
        known.map_or(Kinds::ALL, |(_, kinds)| *kinds)
    }

    /// Memory that they take.
    pub fn bytes(&self) -> usize {
        let of_parameter = |(key, _): &(String, Kinds)| size_of::<(String, Kinds)>() + key.len();
        let of_one = |one: &Callable| {
            size_of::<Callable>() + one.name.len() + one.parameters.iter().map(of_parameter).sum::<usize>()
        };
        self.0.iter().map(of_one).sum()
    }
}

impl<S: Into<String>> FromIterator<S> for Names {
    fn from_iter<I: IntoIterator<Item = S>>(names: I) -> Self {
        Self(names.into_iter().map(|name| Callable { name: name.into(), parameters: Vec::new() }).collect())
    }
}
