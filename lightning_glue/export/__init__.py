"""A fine-tuned model in the formats of other tools."""
