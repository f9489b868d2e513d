"""The same values in another form: parameters, offsets, groups."""
