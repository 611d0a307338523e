"""Files and folders: crash-safe writing, safetensors headers, model folders."""
