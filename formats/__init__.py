"""The formats: one package each, with a reader, a writer, or both. `converters.plugins` lists them."""
