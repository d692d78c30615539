"""What leaves the house: adapters, merged models, GGUF files, each read back before it is called done."""
