"""Generated from the .proto files beside (tools/generate_protos.py). Edit those, never this folder's Python."""
