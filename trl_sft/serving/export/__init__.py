"""Writes a tuned model in the formats of other programs: a merged folder, GGUF, Ollama, vLLM."""
