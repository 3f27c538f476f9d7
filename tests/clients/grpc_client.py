"""Calls Generate knowing nothing but the server's reflection service. Usage: grpc_client.py HOST:PORT. Prints one JSON object."""

import json
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

channel = grpc.insecure_channel(sys.argv[1])
database = ProtoReflectionDescriptorDatabase(channel)
services = sorted(database.get_services())
pool = DescriptorPool(database)


def method(service, name):
    """A callable for a method, and its request class."""
    found = pool.FindServiceByName(service).methods_by_name[name]
    request, response = GetMessageClass(found.input_type), GetMessageClass(found.output_type)
    kind = channel.unary_stream if found.server_streaming else channel.unary_unary
    return kind(f"/{service}/{name}", request_serializer=request.SerializeToString, response_deserializer=response.FromString), request


generate, request = method("phalanx.v1.Inference", "Generate")
text, tokens, usage = "", 0, None
for part in generate(request(text="The capital of France is", temperature=0, max_tokens=12)):
    text += part.text
    tokens += len(part.token_ids)
    if part.HasField("usage"):
        usage = part.usage.completion_tokens

try:
    list(generate(request(text="Once upon a time", temperature=0, max_tokens=1500, ignore_eos=True), timeout=0.3))
    deadline = "no error"
except grpc.RpcError as error:
    deadline = error.code().name
try:
    list(generate(request(text="x", temperature=-1)))
    invalid = "no error"
except grpc.RpcError as error:
    invalid = error.code().name

check, health_request = method("grpc.health.v1.Health", "Check")
print(json.dumps({
    "services": services,
    "text": text,
    "tokens": tokens,
    "usage": usage,
    "deadline": deadline,
    "invalid": invalid,
    "health": check(health_request(service="")).status,
}))
