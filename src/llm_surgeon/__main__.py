"""``python -m llm_surgeon`` is the command ``llm-surgeon``."""

from llm_surgeon.cli import main

main()
