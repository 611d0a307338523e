"""Pruned models in vLLM and llama.cpp, and quantized. Not part of `make test`; see docs/deploying.md."""
