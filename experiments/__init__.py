"""Programs: each asks one question, and answers it by a table and a picture."""
