"""What the neurons do on text, and how sensitive the loss is to their removal."""
