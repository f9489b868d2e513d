"""Files and folders that appear complete or not at all, created where nobody else can interfere."""
