"""What fuzz.py is made of: mutations of bytes, forgeries by hand, and the readers under test."""
