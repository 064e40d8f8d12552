"""Models, tokenizers and chats in the formats of other software."""
