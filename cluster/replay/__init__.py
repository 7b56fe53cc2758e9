"""A trace, sent to a live cluster: prompts with the trace's sharing, on the trace's times, and what came of it."""
