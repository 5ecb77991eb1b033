"""Loss and perplexity, generation, and the text they are measured on."""
