"""Writing an adapter: all of it or nothing, with a model card."""
