"""Files and folders that are whole or absent, and the formats that are read and written."""
