"""The worker pools: who is a member, how members are made and replaced."""
