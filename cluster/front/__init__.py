"""What a client touches: HTTP, gRPC, text and tokens, and one request's life seen from the front."""
