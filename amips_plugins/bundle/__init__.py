"""The published artefact: manifest, signature, registry, loading."""
