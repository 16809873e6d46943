"""What the merged dataset is: metadata, ids, vectors, schema, card, and the other layouts it is written in."""
