"""Files and folders that appear whole or not at all, and are made where nobody else can put anything in the way."""
