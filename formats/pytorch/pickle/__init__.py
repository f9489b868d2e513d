"""Files and pickles, read without executing anything."""
