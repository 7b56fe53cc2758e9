"""The control plane: decides where a request runs. Never loads torch."""
