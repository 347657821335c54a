"""The demo's data and tokenizer."""
