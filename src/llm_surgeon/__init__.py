"""llm-surgeon."""
