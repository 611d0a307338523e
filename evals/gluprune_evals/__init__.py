"""Quality of pruned models: perplexity, and the published study with lm-eval."""
