"""How kernels are configured, chosen, launched and replayed."""
