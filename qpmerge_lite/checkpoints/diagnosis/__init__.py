"""What a merge in a folder does to every expert, in numbers, words and a page."""
