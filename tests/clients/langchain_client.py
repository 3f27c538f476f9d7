"""Talks to a cluster with langchain-openai. Usage: langchain_client.py http://HOST:PORT. Prints one JSON object."""

import json
import sys

import openai
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

base_url = sys.argv[1] + "/v1"
name = openai.OpenAI(base_url=base_url, api_key="none").models.list().data[0].id
shared = {"base_url": base_url, "api_key": "none", "model": name, "temperature": 0}
chat = ChatOpenAI(**shared, max_tokens=24)
messages = [SystemMessage("You are terse."), HumanMessage("Why is the sky blue?")]

whole = chat.invoke(messages)
pieces = list(chat.stream(messages, stream_usage=True))
batch = chat.batch([messages, [HumanMessage("Say hello.")]])
completion = OpenAI(**shared, max_tokens=5).invoke("The capital of France is")

schema = {
    "title": "person",
    "description": "A person.",
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
person = ChatOpenAI(**shared, max_tokens=64).with_structured_output(schema, method="json_schema", strict=True)
tool = {"type": "function", "function": {"name": "note", "description": "Notes a person.", "parameters": schema, "strict": True}}
called = ChatOpenAI(**shared, max_tokens=96).bind_tools([tool], tool_choice="note").invoke("Ada is 36 years old.")

print(json.dumps({
    "whole": whole.content,
    "usage": whole.usage_metadata["output_tokens"],
    "streamed": "".join(piece.content for piece in pieces),
    "streamed_usage": sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata),
    "batch": [answer.content for answer in batch],
    "completion": completion,
    "person": person.invoke("Ada is 36 years old. Who is she?"),
    "calls": [[call["name"], sorted(call["args"])] for call in called.tool_calls],
}))
