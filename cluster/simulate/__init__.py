"""The real scheduler, block pool and batching against virtual workers in virtual time."""
