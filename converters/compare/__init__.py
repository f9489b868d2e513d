"""Two models compared: code for code, value for value, or by what they compute."""
