"""One typed configuration: `diptych.toml`, the environment and the command line, in that order."""

from cluster.config.errors import ConfigError
from cluster.config.layers import Override, load
from cluster.config.schema import Config, values

__all__ = ["Config", "ConfigError", "Override", "load", "values"]
