"""The merged dataset in the layouts of other tools; it is streamed, and no image is read again."""
