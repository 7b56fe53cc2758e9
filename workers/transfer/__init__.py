"""How KV blocks cross from one worker to another: states, links, pairs. Knows no request's meaning."""
