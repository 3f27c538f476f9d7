"""Asks a cluster for outputs under schemas, and has them checked by jsonschema. Usage: schema_client.py http://HOST:PORT.
Prints one JSON object."""

import json
import sys

import jsonschema
import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
model = client.models.list().data[0].id
word = {"type": "string", "pattern": "^[a-z]{1,8}$"}
small = {"type": "integer", "minimum": 0, "maximum": 99}


def closed(**properties):
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


schemas = [
    closed(name=word, age=small),
    closed(tags={"type": "array", "items": word, "minItems": 1, "maxItems": 3}),
    closed(point={"type": "array", "prefixItems": [small, small], "items": False, "minItems": 2}),
    closed(shape={"oneOf": [closed(kind={"const": "circle"}, r=small), closed(kind={"const": "square"}, a=small)]}),
    closed(maybe={"type": ["string", "null"], "maxLength": 6}, on={"type": "boolean"}),
    closed(day={"type": "string", "format": "date"}, id={"type": "string", "format": "uuid"}),
    closed(share={"type": "number", "minimum": 0, "maximum": 1}, step={"type": "integer", "multipleOf": 5, "maximum": 50, "minimum": 0}),
    {"$defs": {"n": closed(v=small)}, "type": "object", "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"$ref": "#/$defs/n"}},
     "required": ["a", "b"], "additionalProperties": False},
    {"$defs": {"list": {"anyOf": [{"type": "null"}, closed(head=small, tail={"$ref": "#/$defs/list"})]}}, **closed(items={"$ref": "#/$defs/list"})},
    {"type": "object", "patternProperties": {"^x_[a-z]{1,3}$": small}, "additionalProperties": False, "minProperties": 1, "maxProperties": 2},
    {"allOf": [closed(n={"type": "integer"}), {"type": "object", "properties": {"n": {"minimum": 3, "maximum": 9}}}]},
    closed(word={"enum": ["red", "green", "blue"]}, text={"type": "string", "minLength": 2, "maxLength": 12}),
]

complete, wrong = 0, []
for index, schema in enumerate(schemas):
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "An example, please."}], temperature=1, seed=index, max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "example", "strict": True, "schema": schema}},
    ).choices[0]
    if answer.finish_reason != "stop":
        continue
    complete += 1
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    try:
        wrong += [f"{schema}: {error.message}" for error in checker.iter_errors(json.loads(answer.message.content))]
    except json.JSONDecodeError as error:
        wrong.append(f"{schema}: {error}: {answer.message.content}")

print(json.dumps({"asked": len(schemas), "complete": complete, "wrong": wrong}))
