"""Writes the default model's tokenizer as Hugging Face's files, from the GGUF's metadata."""

import sys
from pathlib import Path

from transformers import AutoTokenizer

from cluster.models import DEFAULT_MODEL, resolve

path = Path(resolve(DEFAULT_MODEL, progress=print).path)
AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(sys.argv[1])
