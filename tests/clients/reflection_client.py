"""A client with no generated code: it asks the server for its descriptions and builds the call from them."""

import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

target, question = sys.argv[1:]
channel = grpc.insecure_channel(target)
grpc.channel_ready_future(channel).result(timeout=20)
described = ProtoReflectionDescriptorDatabase(channel)
print("services:", sorted(described.get_services()))
method = DescriptorPool(described).FindServiceByName("diptych.v1.InferenceService").methods_by_name["Generate"]
ask, told = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
request = ParseDict(
    {"chat": {"messages": [{"role": "user", "content": question}]}, "sampling": {"temperature": 0, "maxTokens": 32}},
    ask(),
)
call = channel.unary_stream(
    "/diptych.v1.InferenceService/Generate",
    request_serializer=ask.SerializeToString,
    response_deserializer=told.FromString,
)
text = ""
for response in call(request, timeout=60):
    text += MessageToDict(response).get("chunk", {}).get("text", "")
print("answer:", text)
