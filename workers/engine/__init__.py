"""One engine for every role: model, KV cache, batching, sampling. Knows no Ray and no network."""
