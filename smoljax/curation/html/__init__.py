"""HTML pages to the text of their main content: characters, bounds, and one file for each extractor."""
