"""Training of a pruned model by distillation from the dense one."""
