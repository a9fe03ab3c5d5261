"""Building the corpus and the tokenizer, and training the tiny Llama-4 models."""
