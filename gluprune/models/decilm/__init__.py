"""The code that a checkpoint in the Nemotron-NAS format carries for transformers; it imports nothing of gluprune."""
