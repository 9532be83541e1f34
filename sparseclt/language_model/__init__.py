"""The language model under the CLT."""
