"""From texts to token ids, loss masks, windows, and the store that holds them."""
