"""What FP8 does to a Llama 4, by what is looked at; the public face is ``probe.fp8_error``."""
