"""The GGUF format: one file for llama.cpp and the engines built on it."""
