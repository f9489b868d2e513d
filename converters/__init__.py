"""What is done to a model, whichever file it came from. Imported as `nibblecast.converters`."""
