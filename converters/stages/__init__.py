"""Stages of a conversion: Model -> Model, lazily."""
