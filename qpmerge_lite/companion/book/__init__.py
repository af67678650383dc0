"""How the book is run, recorded, judged and drawn."""
